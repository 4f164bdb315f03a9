"""Fig. A2: knockoff on undefended victims with whole posteriors and with top labels alone.

Claim: on simple data sets the top label alone costs the attacker next to nothing.
Command: python experiments/figa2.py --scale reduced --data-dir DIR
Cost and differences from the paper: see configs/mnist_budgets.py.
"""

from paper import BUDGETS, Exhibit, main, where

from madjax.report import budgets_figure

EXHIBIT = Exhibit(
    "figa2",
    "Fig. A2",
    (BUDGETS,),
    chosen=where(lambda row: row["strength"] == 0),
    draw=budgets_figure,
)

if __name__ == "__main__":
    raise SystemExit(main(EXHIBIT))
