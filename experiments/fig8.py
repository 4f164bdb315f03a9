"""Fig. 8: MAD's ablations.

Claim: a random vertex is a poor y*, G = I a slightly better one, and MAD ahead of both.
Command: python experiments/fig8.py --scale reduced --data-dir DIR
Cost and differences from the paper: see configs/mnist_defenses.py.
"""

from paper import DEFENSES, Exhibit, main, where

from madjax.report import ablations_figure

EXHIBIT = Exhibit(
    "fig8",
    "Fig. 8",
    (DEFENSES,),
    chosen=where(lambda row: row["targets"] == "posteriors" and row["dataset"] == "mnist"),
    draw=ablations_figure,
)

if __name__ == "__main__":
    raise SystemExit(main(EXHIBIT))
