"""Fig. 3: defender against attacker accuracy as epsilon grows, four attacks before MAD.

Claim: one and the same defence takes much from every attack, on MNIST for less than a point of the
defender's accuracy.
Command: python experiments/fig3.py --scale reduced --data-dir DIR
Cost and differences from the paper: see configs/mnist_attacks.py and configs/mnist_knockoff.py.
"""

from paper import ATTACKS, KNOCKOFF, Exhibit, main

from madjax.report import figure


def of_one_budget(row):
    """Last-layer gradients; of knockoff the runs of 50,000 queries; no attack as published code."""
    doubled = row["attack"] == "knockoff" and row["config"].endswith("_attacks")
    return row["layers"] == "last" and not doubled and row["variant"] == ""


EXHIBIT = Exhibit(
    "fig3",
    "Fig. 3",
    (
        ATTACKS,
        KNOCKOFF,
    ),
    chosen=of_one_budget,
    draw=figure,
)

if __name__ == "__main__":
    raise SystemExit(main(EXHIBIT))
