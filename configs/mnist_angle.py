"""The paper's study of angular deviations (Fig. 6, 7 and A5) on MNIST: the angle at every step.

Claim: an attacker whose parameters the defence knows sees its gradient turned by the more the
larger the budget, though the answer has but K - 1 degrees of freedom; at epsilon 2 by more than 90
degrees on the average, and its test loss rises.
Command: MADJAX_DATA=DIR madjax angle configs/mnist_angle.py
Cost: about 25 minutes on 2 CPU cores.

Differs from the paper, which has this figure for VGG16 on CIFAR10 in its text and for all victims
in its appendix, and says neither N nor B: here N = 10,000 steps over B = 5,000 distinct images.
Kassel letters stand in for EMNIST letters; the victim trains for 15 epochs, its rate tenfold lower
after 10. Epsilon 0 is the clean path.
"""

from madjax import AngleStudy, Online, Recipe, Task


def config() -> AngleStudy:
    """Seven epsilons and the clean path x three seeds, gradients over all parameters."""
    return AngleStudy(
        name="mnist_angle",
        task=Task(
            dataset="mnist",
            queryset="kassel_letters",
            query_splits=("train", "test"),
            victim=Recipe(epochs=15, weight_decay=5e-4, decay_epochs=10),
        ),
        strengths=(0.0, 0.1, 0.5, 0.95, 0.99, 1.1, 1.5, 2.0),
        seeds=(0, 1, 2),
        steps=10_000,
        attackers=(Online(images=5_000, every=1_000, judged=1_000),),
    )
