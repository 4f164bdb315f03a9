"""Fig. 4: MAD beside other defences, by L1 distance and by defender accuracy.

Claim: for the same attacker MAD and MAD-argmax change answers less than reverse sigmoid and random
noise do, and MAD costs less accuracy than random noise and DP-SGD.
Command: python experiments/fig4.py --scale reduced --data-dir DIR
Cost and differences from the paper: see configs/mnist_defenses.py.
"""

from paper import DEFENSES, Exhibit, main, where

from madjax.report import defenses_figure

EXHIBIT = Exhibit(
    "fig4",
    "Fig. 4",
    (DEFENSES,),
    chosen=where(lambda row: row["targets"] == "posteriors"),
    draw=defenses_figure,
)

if __name__ == "__main__":
    raise SystemExit(main(EXHIBIT))
