"""Fig. 1: the attacker's accuracy by budget, undefended, with top labels, and before MAD.

Claim: 50,000 queries steal an undefended victim; truncating answers to the top label, as existing
defences do at most, changes little; MAD does.
Command: python experiments/fig1.py --scale reduced --data-dir DIR
Cost and differences from the paper: see configs/mnist_budgets.py.
"""

from paper import BUDGETS, Exhibit, main, where

from madjax.report import budgets_figure

EXHIBIT = Exhibit(
    "fig1",
    "Fig. 1",
    (BUDGETS,),
    chosen=where(lambda row: row["targets"] == "posteriors" or row["strength"] == 0),
    draw=budgets_figure,
)

if __name__ == "__main__":
    raise SystemExit(main(EXHIBIT))
