"""Fig. 5: what an attacker has that learns from the top label alone.

Claim: it is back at its undefended accuracy before the defences that keep the top label, MAD-argmax
and reverse sigmoid, and not before MAD.
Command: python experiments/fig5.py --scale reduced --data-dir DIR
Cost and differences from the paper: see configs/mnist_defenses.py.
"""

from paper import DEFENSES, Exhibit, main

from madjax.report import top_label_figure

EXHIBIT = Exhibit("fig5", "Fig. 5", (DEFENSES,), draw=top_label_figure)

if __name__ == "__main__":
    raise SystemExit(main(EXHIBIT))
