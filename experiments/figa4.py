"""Fig. A4: the defences of Fig. 4 against an attacker that learns from the top label alone.

Claim: MAD-argmax and reverse sigmoid take nothing from it; MAD does.
Command: python experiments/figa4.py --scale reduced --data-dir DIR
Cost and differences from the paper: see configs/mnist_defenses.py.
"""

from paper import DEFENSES, Exhibit, main, where

from madjax.report import defenses_figure

EXHIBIT = Exhibit(
    "figa4",
    "Fig. A4",
    (DEFENSES,),
    chosen=where(lambda row: row["targets"] == "top_label"),
    draw=defenses_figure,
)

if __name__ == "__main__":
    raise SystemExit(main(EXHIBIT))
