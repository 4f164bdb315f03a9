"""Accuracy of a knockoff attacker by query budget: Fig. 1, A2 and A3 on MNIST.

Claim: an undefended victim is stolen with few queries, and from the top label alone about as well
as from whole posteriors; before MAD no budget brings the attacker back.
Command: MADJAX_DATA=DIR madjax sweep configs/mnist_budgets.py
Others: mnist_budgets:fashion_mnist, another victim.
Cost: about 20 minutes on 2 CPU cores.

Differs from the paper as configs/mnist_knockoff.py does. Each stolen model starts from scratch,
where the authors' code goes on from the weights of the smaller budget. Every budget trains for as
many epochs.
"""

from dataclasses import replace

from madjax import MAD, Defended, Knockoff, Recipe, Sweep, top_label
from madjax.config import load


def config() -> Sweep:
    """Two attackers x two epsilons x six budgets x three seeds, last-layer gradients."""
    knockoff = Knockoff(budget=50_000, recipe=Recipe(epochs=10))
    return Sweep(
        name="mnist_budgets",
        tasks=load("mnist_knockoff").tasks,
        defenses=(Defended(MAD(layers="last"), (0.0, 0.99)),),
        seeds=(0, 1, 2),
        budgets=(100, 300, 1_000, 3_000, 10_000),
        attacks=(knockoff, replace(knockoff, targets=top_label, variant="top label")),
    )


def fashion_mnist() -> Sweep:
    """The same on Fashion-MNIST."""
    tasks = load("mnist_knockoff:fashion_mnist").tasks
    return replace(config(), name="fashion_budgets", tasks=tasks)
