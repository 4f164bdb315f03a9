"""Fig. A5: histograms of angles, and below them the test loss, of all victims.

Claim: as in Fig. 6 and 7.
Command: python experiments/figa5.py --scale reduced --data-dir DIR
Cost and differences from the paper: see configs/mnist_angle.py.
"""

from paper import ANGLE, Exhibit, main

from madjax.report import angles_figure

EXHIBIT = Exhibit("figa5", "Fig. A5", (ANGLE,), draw=angles_figure)

if __name__ == "__main__":
    raise SystemExit(main(EXHIBIT))
