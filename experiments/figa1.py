"""Fig. A1: every attack on undefended victims, by budget.

Claim: knockoff is the strongest attack.
Command: python experiments/figa1.py --scale reduced --data-dir DIR
Cost and differences from the paper: see configs/mnist_attacks.py.
"""

from paper import ATTACKS, Exhibit, main, where

from madjax.report import budgets_figure

EXHIBIT = Exhibit(
    "figa1",
    "Fig. A1",
    (ATTACKS,),
    chosen=where(lambda row: row["strength"] == 0 and "published" not in row["variant"]),
    draw=budgets_figure,
)

if __name__ == "__main__":
    raise SystemExit(main(EXHIBIT))
