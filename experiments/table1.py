"""The paper's Table 1 beside our rows: every attack on an undefended victim, and against MAD.

Claim: see configs/mnist_attacks.py, whose rows this reads.
Command: python experiments/table1.py [DIR]     (DIR: experiments/results/mnist_attacks)
Cost: none; writes table1.md beside the rows, or nothing with --smoke.

The paper's figures are those of its Table 1, at a budget of 50,000 queries.
"""

import argparse
from pathlib import Path

from measuring import RESULTS, parse

from madjax.report import read_rows, summarise

PAPER = {
    "mnist": {"jbda": 89.2, "jbself": 89.4, "jbtop3": 87.3, "knockoff": 99.0},
    "fashion_mnist": {"jbda": 38.7, "jbself": 45.8, "jbtop3": 68.7, "knockoff": 69.2},
    "cifar10": {"jbda": 28.6, "jbself": 20.7, "jbtop3": 73.8, "knockoff": 78.7},
    "cifar100": {"jbda": 5.3, "jbself": 2.9, "jbtop3": 39.2, "knockoff": 51.9},
    "cub200": {"jbda": 6.8, "jbself": 3.9, "jbtop3": 21.5, "knockoff": 65.1},
    "caltech256": {"jbda": 12.5, "jbself": 16.0, "jbtop3": 29.5, "knockoff": 74.6},
}


def said(stat):
    """Mean ± sample standard deviation, in percent."""
    return f"{stat.mean:.1f}" + ("" if stat.std is None else f" ± {stat.std:.1f}")


def table(rows):
    """Markdown: a line for every attack and variant, a column for every epsilon."""
    points = {(p.curve.attack, p.curve.variant, p.strength): p for p in summarise(rows)}
    epsilons = sorted({epsilon for *_, epsilon in points})
    attacks = dict.fromkeys((row["attack"], row["variant"]) for row in rows)
    (dataset,) = {row["dataset"] for row in rows}
    defender = [
        said(next(p for (*_, e), p in points.items() if e == epsilon).defender_accuracy)
        for epsilon in epsilons
    ]
    head = ["attack", "reading", "paper, 50,000 queries"]
    budgets = ", ".join(f"{b:,}" for b in sorted({row["budget"] for row in rows}))
    head += [f"{budgets} queries, epsilon {epsilon:g}" for epsilon in epsilons]
    lines = [
        [name, variant or "as described", f"{PAPER[dataset].get(name, '-')}"]
        + [said(points[name, variant, epsilon].attacker_accuracy) for epsilon in epsilons]
        for name, variant in attacks
    ]
    lines.append(["(defender)", "", "", *defender])
    rule = ["---", "---", *["--:"] * (len(head) - 2)]
    return "".join("| " + " | ".join(line) + " |\n" for line in (head, rule, *lines))


def main():
    """Write the table beside the rows, and print it."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument(
        "directory", type=Path, nargs="?", metavar="DIR", default=RESULTS / "mnist_attacks"
    )
    options = parse(parser)
    text = table(read_rows(options.directory))
    print(text)
    if not options.smoke:
        (options.directory / "table1.md").write_text(text)


if __name__ == "__main__":
    main()
