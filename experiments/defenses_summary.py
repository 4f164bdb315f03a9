"""MAD beside the paper's other defences in one table, and what its top-label attacker recovers.

Claim: see configs/mnist_defenses.py and configs/mnist_top_label.py, whose rows this reads.
Command: python experiments/defenses_summary.py [DIR TOP_LABEL_DIR]     (the two's results)
Cost: none; writes summary.md beside the rows of each, or nothing with --smoke.

The first table has, for each defence, the measured strength that hurts the attacker most among
those that cost the defender at most `COST` points, or the cheapest where none does. The next has
the mean entropy of the answers to the test set at L1 = 1 (section 5.2.2), interpolated linearly
between measured strengths. The last compares attackers that learn from posteriors, from the first
directory, with those that learn from the top label.
"""

import argparse
import math
from pathlib import Path

from measuring import RESULTS, markdown, parse

from madjax.report import read_rows, summarise
from madjax.report.names import defence, name, remarked

COST = 2.5
PAPER = {"reverse_sigmoid": "3.02 ± 0.16", "mad_argmax": "1.79 ± 0.11"}


def called(curve):
    """The defence in words."""
    return remarked(defence(curve), curve.defense_variant)


def said(stat, digits=1):
    """Mean ± sample standard deviation over seeds; without it where it rounds to nothing."""
    spread = "" if stat.std is None or stat.std < 0.05 else f" ± {stat.std:.{digits}f}"
    return f"{stat.mean:.{digits}f}{spread}"


def strongest(points):
    """A line for every defence: the strength that costs little and hurts the attacker most."""
    (start,) = [p for p in points if p.curve.defense == "none"]
    lines = []
    for curve in dict.fromkeys(p.curve for p in points):
        own = [p for p in points if p.curve == curve]
        cheap = [p for p in own if defender(p) >= defender(start) - COST]
        best = min(cheap, key=attacker) if cheap else max(own, key=defender)
        lines.append(
            [
                called(curve),
                f"{best.strength:g}",
                said(best.defender_accuracy),
                said(best.attacker_accuracy),
                said(best.l1_mean, 2),
                said(best.entropy_mean, 2),
            ]
        )
    head = ["defence", "strength", "defender %", "attacker %", "L1", "entropy, bits"]
    return markdown(head, lines)


def entropies(points):
    """A line for each defence of which the paper gives the entropy of its answers at L1 = 1."""
    lines = []
    for defense, paper in PAPER.items():
        curve = sorted((p for p in points if p.curve.defense in ("none", defense)), key=distance)
        low = max((p for p in curve if distance(p) <= 1), key=distance)
        high = min((p for p in curve if distance(p) >= 1), key=distance)
        share = (1 - distance(low)) / ((distance(high) - distance(low)) or 1)
        bits = low.entropy_mean.mean * (1 - share) + high.entropy_mean.mean * share
        lines.append([name(defense), paper, f"{bits:.2f}", f"{bits * math.log(2):.2f}"])
    return markdown(["entropy at L1 = 1", "paper", "bits", "nats"], lines)


def defender(point):
    """The defender's mean accuracy at a point, percent."""
    return point.defender_accuracy.mean


def attacker(point):
    """The attacker's mean accuracy at a point, percent."""
    return point.attacker_accuracy.mean


def distance(point):
    """The mean L1 distance of a point."""
    return point.l1_mean.mean


def top_label(points, posteriors):
    """A line for every defence and strength: attackers of posteriors and of the top label."""
    same = {(called(p.curve), p.strength): p for p in posteriors}
    lines = []
    for point in points:
        other = same[called(point.curve), point.strength]
        lines.append(
            [
                called(point.curve),
                f"{point.strength:g}",
                said(point.defender_accuracy),
                said(other.attacker_accuracy),
                said(point.attacker_accuracy),
            ]
        )
    head = ["defence", "strength", "defender %", "attacker %", "attacker of the top label %"]
    return markdown(head, lines)


def main():
    """Write the tables beside the rows, and print them."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    for metavar, folder in (("DIR", "mnist_defenses"), ("TOP_LABEL_DIR", "mnist_top_label")):
        parser.add_argument(metavar, type=Path, nargs="?", default=RESULTS / folder)
    options = parse(parser)
    first, second = vars(options)["DIR"], vars(options)["TOP_LABEL_DIR"]
    posteriors = summarise(read_rows(first))
    tables = {
        first: f"{strongest(posteriors)}\n{entropies(posteriors)}",
        second: top_label(summarise(read_rows(second)), posteriors),
    }
    for directory, text in tables.items():
        print(text)
        if not options.smoke:
            (directory / "summary.md").write_text(text)


if __name__ == "__main__":
    main()
