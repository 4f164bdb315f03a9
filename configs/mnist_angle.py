"""The paper's study of angular deviations (Fig. 6, 7 and A5) on MNIST: the angle at every step.

Claim: an attacker whose parameters the defence knows sees its gradient turned by the more the
larger the budget, though the answer has but K - 1 degrees of freedom; at epsilon 2 by more than 90
degrees on the average, and its test loss rises.
Command: MADJAX_DATA=DIR madjax angle configs/mnist_angle.py
Others: mnist_angle:fashion_mnist, another victim; mnist_angle:paper and mnist_angle:cifar10, of the
paper's victims; mnist_angle:smoke, in seconds.
Cost: about 30 minutes on 2 CPU cores.

Differs from the paper, which has this figure for VGG16 on CIFAR10 in its text and for all victims
in its appendix, and says neither N nor B: here N = 10,000 steps over B = 5,000 distinct images.
Kassel letters stand in for EMNIST letters; the victim trains for 15 epochs, its rate tenfold lower
after 10. Epsilon 0 is the clean path.
"""

from dataclasses import replace

from madjax import MLP, VGG16, AngleStudy, Online, Recipe, Task
from madjax.config import load


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


def fashion_mnist() -> AngleStudy:
    """The same on Fashion-MNIST."""
    (task,) = load("mnist_knockoff:fashion_mnist").tasks
    return replace(config(), name="fashion_angle", task=task)


def paper() -> AngleStudy:
    """MNIST with the paper's query set."""
    return replace(config(), name="paper_angle", task=load("mnist_knockoff:paper").tasks[0])


def cifar10() -> AngleStudy:
    """VGG16 on CIFAR10, as in the paper's text."""
    base = load("cifar10")
    (online,) = config().attackers
    return replace(
        config(),
        name="paper_angle_cifar10",
        task=base.tasks[0],
        attackers=(replace(online, architecture=VGG16),),
    )


def smoke() -> AngleStudy:
    """The whole path in seconds: perceptrons, on the embedded data; angles say nothing."""
    return replace(
        config(),
        name="smoke_angle",
        task=load("mnist_knockoff:smoke").tasks[0],
        strengths=(0.0, 0.99, 2.0),
        seeds=(0,),
        steps=60,
        attackers=(Online(images=30, every=20, judged=50, architecture=MLP),),
    )
