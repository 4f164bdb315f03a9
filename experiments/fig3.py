"""Fig. 3: defender against attacker accuracy as epsilon grows, four attacks before MAD.

Claim: one and the same defence takes much from every attack, on MNIST for less than a point of the
defender's accuracy.
Command: python experiments/fig3.py --scale reduced --data-dir DIR
Cost and differences from the paper: see configs/mnist_attacks.py and configs/mnist_knockoff.py.
"""

from paper import ATTACKS, KNOCKOFF, Exhibit, main

from madjax.report import figure


def of_one_budget(rows):
    """Last-layer gradients; knockoff at the largest budget alone; no attack as published code."""
    own = [row for row in rows if row["layers"] == "last" and row["variant"] == ""]
    most = {}
    for row in own:
        if row["attack"] == "knockoff":
            most[row["dataset"]] = max(row["budget"], most.get(row["dataset"], 0))
    return [
        row for row in own if row["attack"] != "knockoff" or row["budget"] == most[row["dataset"]]
    ]


EXHIBIT = Exhibit("fig3", "Fig. 3", (ATTACKS, KNOCKOFF), chosen=of_one_budget, draw=figure)

if __name__ == "__main__":
    raise SystemExit(main(EXHIBIT))
