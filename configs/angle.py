"""White-box mode on the embedded data: the angle between the poisoned and the true gradient.

Claim: a defence that knows the attacker's parameters turns its gradient by more the larger the
budget is, and past 90 degrees where epsilon is 2.
Command: madjax angle
Cost: about 5 minutes on 2 CPU cores.

See configs/mnist_angle.py for the paper's study, on all of MNIST; here Fashion-MNIST images are the
queries, and the victim has 10,000 training images.
"""

from madjax import AngleStudy, Online, Recipe, Task


def config() -> AngleStudy:
    """Eight epsilons, 0 for the clean path; all-parameter gradients of the live attacker."""
    return AngleStudy(
        name="angle",
        task=Task(
            dataset="embedded:mnist",
            queryset="embedded:fashion_mnist",
            victim=Recipe(epochs=8, weight_decay=5e-4),
        ),
        strengths=(0.0, 0.1, 0.5, 0.95, 0.99, 1.1, 1.5, 2.0),
        steps=5_000,
        attackers=(Online(judged=500),),
    )
