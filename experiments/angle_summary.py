"""The white-box study in short: angles by epsilon, the paper's claims, variants, and ages.

Claim: see configs/mnist_angle.py, mnist_angle_variants.py and mnist_angle_age.py, whose rows this
reads.
Command: python experiments/angle_summary.py [DIR VARIANTS_DIR AGE_DIR]     (their results)
Cost: none; writes summary.md beside the rows of each, or nothing with --smoke.

Angles in degrees over all steps of all seeds' means; ± is the sample standard deviation over seeds.
The paper's figures are those of section 5.2.3, for a VGG16 on CIFAR10 with N steps that it does not
say; ours are LeNet on MNIST.
"""

import argparse
from pathlib import Path
from statistics import fmean

from measuring import RESULTS, markdown, parse

from madjax.report import read_rows, summarise
from madjax.report.found import percent as said
from madjax.report.names import attack, defence
from madjax.report.points import curve_of


def mean(points, field):
    """The mean over seeds of a field at each point, without a spread."""
    return {p.strength: getattr(p, field).mean for p in points}


def angles(points):
    """A line for every epsilon."""
    head = ["epsilon", "angle", "std over steps", "5 %", "median", "95 %", "max"]
    head += ["test loss", "attacker %", "defender %", "direction kept"]
    fields = ("angle_std", "angle_p05", "angle_p50", "angle_p95", "angle_max")
    lines = [
        [f"{p.strength:g}", said(p.angle_mean)]
        + [f"{getattr(p, field).mean:.1f}" for field in fields]
        + [said(p.test_loss, 2), said(p.attacker_accuracy), said(p.defender_accuracy)]
        + [said(p.direction_kept, 2)]
        for p in points
    ]
    return markdown(head, lines)


def claims(points, rows):
    """What the paper says of its figures 6 and 7, and what these rows say."""
    maxima, means, losses = (
        mean(points, field) for field in ("angle_max", "angle_mean", "test_loss")
    )
    useful = [e for e in means if 0.95 <= e <= 0.99]
    early = [fmean(row["angle_means"][0] for row in rows if row["strength"] == e) for e in useful]
    flipped = [row for row in rows if row["strength"] == 2]
    first = fmean(row["test_losses"][0] for row in flipped)
    clean = losses[0.0]
    lines = [
        ["range of the deviations", "0 to 115", f"0 to {max(maxima.values()):.0f}"],
        [
            "mean at epsilon 0.95 to 0.99",
            "24.9",
            f"{means[min(useful)]:.1f} to {means[max(useful)]:.1f}",
        ],
        [
            f"the same, first {rows[0]['steps_at'][0]:,} steps alone",
            "",
            f"{min(early):.1f} to {max(early):.1f}",
        ],
        ["mean at epsilon 2", "above 90", f"{means[2.0]:.1f}"],
        [
            "test loss at epsilon 2",
            "rises",
            f"{first:.1f} after {flipped[0]['steps_at'][0]:,} steps, {losses[2.0]:.1f} after "
            f"{flipped[0]['steps_at'][-1]:,} (clean: {clean:.2f})",
        ],
    ]
    return markdown(["claim (degrees, nats)", "paper, VGG16 on CIFAR10", "LeNet on MNIST"], lines)


def variants(points):
    """A line for every defence, attacker and epsilon."""
    curves = {}
    for point in points:
        curves.setdefault(point.curve, {})[point.strength] = point
    head = ["defence", "attacker", "epsilon", "angle", "of batches", "of updates"]
    head += ["test loss", "clean", "direction kept"]
    lines = []
    for curve, own in curves.items():
        for p in own.values():
            if p.strength:
                line = [defence(curve), attack(curve), f"{p.strength:g}", said(p.angle_mean)]
                line += [said(p.batch_angle_mean), said(p.update_angle_mean)]
                line += [said(p.test_loss, 2), f"{own[0.0].test_loss.mean:.2f}"]
                lines.append([*line, said(p.direction_kept, 2)])
    return markdown(head, lines)


def ages(points, rows):
    """A line for every surrogate, from white-box to black-box, with the columns of each epsilon."""
    refresh = {curve_of(row): row["refresh"] for row in rows}
    steps = {row["steps"] for row in rows}
    found = {}
    for p in points:
        found.setdefault(refresh[p.curve], {})[p.strength] = p
    epsilons = sorted({p.strength for p in points} - {0})
    head = ["the defence knows the attacker's parameters"]
    head += [f"{what} at {e:g}" for e in epsilons for what in ("angle", "test loss", "kept")]
    lines = []
    for m in sorted(found, key=lambda m: m or float("inf")):
        known = {0: "never (black-box)", 1: "of every step"}.get(m, f"of every {m:,} steps")
        line = ["of the start alone" if m in steps else known]
        for e in epsilons:
            p = found[m][e]
            line += [said(p.angle_mean), said(p.test_loss, 2), said(p.direction_kept, 2)]
        lines.append(line)
    return markdown(head, lines)


def main():
    """Write the tables beside the rows, and print them."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    folders = {"DIR": "", "VARIANTS_DIR": "_variants", "AGE_DIR": "_age"}
    for name, folder in folders.items():
        parser.add_argument(name, type=Path, nargs="?", default=RESULTS / f"mnist_angle{folder}")
    options = parse(parser)
    first, second, third = (vars(options)[name] for name in folders)
    rows, aged = read_rows(first), read_rows(third)
    points = summarise(rows)
    tables = {
        first: f"{angles(points)}\n{claims(points, rows)}",
        second: variants(summarise(read_rows(second))),
        third: ages(summarise(aged), aged),
    }
    for directory, text in tables.items():
        print(text)
        if not options.smoke:
            (directory / "summary.md").write_text(text)


if __name__ == "__main__":
    main()
