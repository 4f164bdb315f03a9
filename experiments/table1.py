"""Table 1: victims, and what each attack makes of them undefended.

Claim: knockoff is the strongest attack; on MNIST all of them reach 87 % or more.
Command: python experiments/table1.py --scale reduced --data-dir DIR
Cost and differences from the paper: see configs/mnist_attacks.py and configs/mnist_knockoff.py.

"As published code" repeats the defects of the authors' code, on which the paper's figures may rest.
"""

from measuring import markdown
from paper import ATTACKS, KNOCKOFF, Exhibit, main, where

from madjax.report.found import TABLE_1, percent, victims
from madjax.report.names import name
from madjax.report.points import at_full_budget, sound_curves, stat


def table(rows):
    """Markdown: for each data set a line for the victim, and one for each attack on it."""
    points = [point for own in at_full_budget(sound_curves(rows)).values() for point in own]
    lines, seen = [], set()
    for point in sorted(points, key=order):
        curve = point.curve
        paper = TABLE_1[curve.dataset]
        if curve.dataset not in seen:
            seen.add(curve.dataset)
            own = victims([row for row in rows if row["dataset"] == curve.dataset])
            said = [f"{paper['victim']}", percent(stat(own)), "", "", f"{len(own)}"]
            lines.append([name(curve.dataset), "(victim)", "", *said])
        own = [percent(point.attacker_accuracy), f"{curve.budget:,}"]
        reading = curve.variant or "as described"
        line = [name(curve.dataset), curve.attack, reading, f"{paper[curve.attack]}", *own]
        lines.append([*line, f"{curve.epochs}", f"{point.n}"])
    head = ["victim", "attack", "reading", "paper, 50,000 queries", "ours"]
    head += ["queries", "epochs", "n"]
    return markdown(head, lines)


def order(point):
    """Data sets and attacks as the paper has them, the attacks as published code last."""
    curve = point.curve
    attacks = list(TABLE_1[curve.dataset])
    known = list(TABLE_1).index(curve.dataset), bool(curve.variant), attacks.index(curve.attack)
    return (*known, curve.budget)


def is_undefended(row):
    """Each undefended cell once: a sweep of two kinds of gradients has it twice."""
    return row["strength"] == 0 and row["layers"] == "last"


EXHIBIT = Exhibit(
    "table1", "Table 1", (ATTACKS, KNOCKOFF), chosen=where(is_undefended), table=table
)

if __name__ == "__main__":
    raise SystemExit(main(EXHIBIT))
