"""Fig. 7: the online attacker's test loss as it trains.

Claim: at epsilon 2 the loss rises; at smaller budgets it falls more slowly than undefended.
Command: python experiments/fig7.py --scale reduced --data-dir DIR
Cost and differences from the paper: see configs/mnist_angle.py.

The paper shows VGG16 on CIFAR10, and so does the scale `paper` beside LeNet on MNIST.
"""

from paper import ANGLE, Exhibit, main, where

from madjax.report import test_loss_figure

EXHIBIT = Exhibit(
    "fig7",
    "Fig. 7",
    (ANGLE,),
    chosen=where(lambda row: row["dataset"] in ("mnist", "cifar10")),
    draw=test_loss_figure,
)

if __name__ == "__main__":
    raise SystemExit(main(EXHIBIT))
