"""Fig. 9: ways around MAD.

Claim: no other network, optimiser or number of queries an image helps the attacker much; the top
label alone helps it most, and leaves it 9 points short.
Command: python experiments/fig9.py --scale reduced --data-dir DIR
Cost and differences from the paper: see configs/mnist_subversion.py.
"""

from paper import SUBVERSION, Exhibit, main

from madjax.report import figure

EXHIBIT = Exhibit("fig9", "Fig. 9", (SUBVERSION,), draw=figure)

if __name__ == "__main__":
    raise SystemExit(main(EXHIBIT))
