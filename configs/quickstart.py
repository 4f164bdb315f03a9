"""The whole path on the embedded data, small enough for a laptop.

Claim: as epsilon grows, the stolen model gets worse long before the defended victim does.
Command: madjax sweep
Cost: about 5 minutes on 2 CPU cores.

Not the paper's protocol: 10,000 of MNIST's 60,000 training images, Fashion-MNIST images as
queries in place of EMNIST letters, 10,000 queries in place of 50,000, 6 epochs in place of 30.
"""

from madjax import MAD, Defended, Knockoff, Recipe, Sweep, Task


def config() -> Sweep:
    """Six epsilons x two seeds, last-layer gradients."""
    return Sweep(
        name="quickstart",
        tasks=(
            Task(
                dataset="embedded:mnist",
                queryset="embedded:fashion_mnist",
                victim=Recipe(epochs=8, weight_decay=5e-4),
            ),
        ),
        defenses=(Defended(MAD(layers="last"), (0.0, 0.5, 0.8, 0.99, 1.1, 1.5)),),
        seeds=(0, 1),
        attacks=(Knockoff(budget=10_000, recipe=Recipe(epochs=6)),),
    )
