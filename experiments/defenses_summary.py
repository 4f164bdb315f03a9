"""MAD beside the paper's other defences and its own ablations: tables of what holds.

Claim: see configs/mnist_defenses.py, whose rows this reads.
Command: python experiments/defenses_summary.py [DIR]
Cost: none; writes summary.md beside the rows, or nothing with --smoke.

The first table has, for each defence, the measured strength that hurts the attacker most among
those that cost the defender at most `COST` points, or the cheapest where none does; beside it the
attacker that learns from the top label alone. The second follows each curve, from no defence to the
strongest, to the levels that the paper speaks of, by linear interpolation between measured
strengths, seed by seed. The third has MAD's ablations, with their distance from MAD in pairs: same
seed, same strength. All are means ± sample standard deviations over seeds.
"""

import argparse
from pathlib import Path

from measuring import RESULTS, markdown, parse

from madjax.report import read_rows, summarise
from madjax.report.found import reading
from madjax.report.names import MAD, defence, is_ablation, remarked
from madjax.report.points import Stat, sound_curves, started, stat

COST = 2.5
LEVELS = (
    ("attacker % at L1 0.5", "l1_mean", 0.5, "attacker_accuracy", 1),
    ("at L1 1", "l1_mean", 1.0, "attacker_accuracy", 1),
    ("at L1 1.5", "l1_mean", 1.5, "attacker_accuracy", 1),
    ("L1 where the attacker has 80 %", "attacker_accuracy", 80.0, "l1_mean", 2),
    ("defender % where the attacker has 70 %", "attacker_accuracy", 70.0, "defender_accuracy", 1),
    ("entropy at L1 1, bits", "l1_mean", 1.0, "entropy_mean", 2),
)
"""Columns: the head, where on the curve (a field and its value), what is read there, digits."""


def called(curve):
    """The defence in words."""
    return remarked(defence(curve), curve.defense_variant)


def said(value, digits=1):
    """Mean ± sample standard deviation over seeds; without it where it rounds to nothing."""
    if value.mean is None:
        return ""
    spread = "" if value.std is None or value.std < 0.05 else f" ± {value.std:.{digits}f}"
    return f"{value.mean:.{digits}f}{spread}"


def learners(rows):
    """The rows of attackers of whole answers, and of those of the top label alone."""
    return ([r for r in rows if r["targets"] == t] for t in ("posteriors", "top_label"))


def by_defence(rows):
    """(Defence, its digest, strength) -> the point."""
    return {(called(p.curve), p.curve.defense_settings, p.strength): p for p in summarise(rows)}


def operating_points(rows):
    """A line for every defence: the strength that costs little and hurts the attacker most."""
    whole, labels = map(by_defence, learners(rows))
    (start,) = [p for p in whole.values() if p.curve.defense == "none"]
    lines = []
    for rule in dict.fromkeys(key[:2] for key in whole):
        own = {key: p for key, p in whole.items() if key[:2] == rule}
        least = start.defender_accuracy.mean - COST
        cheap = {key: p for key, p in own.items() if p.defender_accuracy.mean >= least}
        best = (
            min(cheap, key=lambda key: cheap[key].attacker_accuracy.mean)
            if cheap
            else max(own, key=lambda key: own[key].defender_accuracy.mean)
        )
        point, twin = own[best], labels.get(best)
        lines.append(
            [
                rule[0],
                f"{point.strength:g}",
                said(point.defender_accuracy),
                said(point.attacker_accuracy),
                said(twin.attacker_accuracy) if twin else "",
                said(point.l1_mean, 2),
                said(point.entropy_mean, 2),
            ]
        )
    attackers = ["attacker %", "attacker of the top label %"]
    return markdown(["defence", "strength", "defender %", *attackers, "L1", "entropy, bits"], lines)


def levels(rows):
    """A line for every defence but ablations: what is where the paper looks."""
    whole, _ = learners(rows)
    seeds = sorted({row["seed"] for row in whole})
    each = [started(sound_curves([r for r in whole if r["seed"] == seed])) for seed in seeds]
    lines = []
    for curve in each[0]:
        if is_ablation(curve) or curve.defense == "none":
            continue
        own = [points[curve] for points in each if curve in points]
        found = [
            said(stat([reading(points, at, level, field) for points in own]), digits)
            for _, at, level, field, digits in LEVELS
        ]
        if any(found):
            lines.append([called(curve), *found])
    return markdown(["defence", *(head for head, *_ in LEVELS)], lines)


def ablations(rows):
    """A line for MAD and for what each ablation leaves of it, at each strength that all have."""
    whole, labels = learners(rows)
    mad = [r for r in whole if r["defense"] in MAD]
    curves = {c: points for c, points in sound_curves(mad).items() if c.defense == "mad"}
    altered = [c for c in curves if is_ablation(c)]
    strengths = sorted({p.strength for c in altered for p in curves[c]})
    twins, lines = by_defence(labels), []
    (plain,) = [c for c in curves if c.layers == "last" and not is_ablation(c)]
    for curve in sorted(curves, key=is_ablation):
        for point in curves[curve]:
            if point.strength not in strengths:
                continue
            twin = twins.get((called(curve), curve.defense_settings, point.strength))
            lines.append(
                [
                    called(curve),
                    f"{point.strength:g}",
                    said(point.attacker_accuracy),
                    said(paired(mad, curve, plain, point.strength)) if curve != plain else "",
                    said(twin.attacker_accuracy) if twin else "",
                    said(point.defender_accuracy),
                    said(point.l1_mean, 2),
                    said(Stat(*(v and 100 * v for v in point.undefended_share)), 0),
                ]
            )
    if not lines:
        return ""
    head = ["defence", "epsilon", "attacker %", "above MAD, last layer", "of the top label %"]
    return markdown([*head, "defender %", "L1", "answers left as they are %"], lines)


def paired(rows, curve, other, strength):
    """How much more the attacker has before one defence than before the other, seed by seed."""
    found = {
        (row["defense_settings"], row["seed"]): row["attacker_accuracy"]
        for row in rows
        if row["strength"] == strength
    }
    ours, theirs = (
        {seed: value for (rule, seed), value in found.items() if rule == c.defense_settings}
        for c in (curve, other)
    )
    return stat([ours[seed] - theirs[seed] for seed in ours if seed in theirs])


def main():
    """Write the tables beside the rows, and print them."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("DIR", type=Path, nargs="?", default=RESULTS / "mnist_defenses")
    options = parse(parser)
    directory = vars(options)["DIR"]
    rows = read_rows(directory)
    text = "\n".join(filter(None, (make(rows) for make in (operating_points, levels, ablations))))
    print(text)
    if not options.smoke:
        (directory / "summary.md").write_text(text)


if __name__ == "__main__":
    main()
