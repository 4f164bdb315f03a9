"""Fig. A3: accuracy by budget at several epsilons.

Claim: before MAD no query budget brings the attacker back to its undefended accuracy.
Command: python experiments/figa3.py --scale reduced --data-dir DIR
Cost and differences from the paper: see configs/mnist_budgets.py.
"""

from paper import BUDGETS, Exhibit, main, where

from madjax.report import budgets_figure

EXHIBIT = Exhibit(
    "figa3",
    "Fig. A3",
    (BUDGETS,),
    chosen=where(lambda row: row["targets"] == "posteriors"),
    draw=budgets_figure,
)

if __name__ == "__main__":
    raise SystemExit(main(EXHIBIT))
