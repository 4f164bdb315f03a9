"""Fig. 6: histogram of the angles between the poisoned and the true gradient.

Claim: deviations of 0 to 115 degrees, 24.9 on the average at the budgets 0.95 to 0.99, beyond 90 at
2.
Command: python experiments/fig6.py --scale reduced --data-dir DIR
Cost and differences from the paper: see configs/mnist_angle.py.

The paper shows VGG16 on CIFAR10, and so does the scale `paper` beside LeNet on MNIST.
"""

from paper import ANGLE, Exhibit, main, where

from madjax.report import histogram_figure

EXHIBIT = Exhibit(
    "fig6",
    "Fig. 6",
    (ANGLE,),
    chosen=where(lambda row: row["dataset"] in ("mnist", "cifar10")),
    draw=histogram_figure,
)

if __name__ == "__main__":
    raise SystemExit(main(EXHIBIT))
