"""Fig. A6: MAD's ablations on all victims.

Claim: as in Fig. 8.
Command: python experiments/figa6.py --scale reduced --data-dir DIR
Cost and differences from the paper: see configs/mnist_defenses.py.
"""

from paper import DEFENSES, Exhibit, main, where

from madjax.report import ablations_figure

EXHIBIT = Exhibit(
    "figa6",
    "Fig. A6",
    (DEFENSES,),
    chosen=where(lambda row: row["targets"] == "posteriors"),
    draw=ablations_figure,
)

if __name__ == "__main__":
    raise SystemExit(main(EXHIBIT))
