"""Accuracy of a knockoff attacker by query budget: Fig. 1, A2 and A3 on MNIST.

Claim: an undefended victim is stolen with few queries, and from the top label alone about as well
as from whole posteriors; before MAD no budget brings the attacker back.
Command: MADJAX_DATA=DIR madjax sweep configs/mnist_budgets.py
Others: mnist_budgets:fashion_mnist, another victim; mnist_budgets:paper, both at the paper's sizes,
and mnist_budgets:cifar10; mnist_budgets:smoke, in seconds.
Cost: about 30 minutes on 2 CPU cores.

Differs from the paper as configs/mnist_knockoff.py does. Each stolen model starts from scratch,
where the authors' code goes on from the weights of the smaller budget. Every budget trains for as
many epochs.
"""

from dataclasses import replace

from madjax import MAD, MLP, Defended, Knockoff, Recipe, Sweep, top_label
from madjax.config import load


def config() -> Sweep:
    """Two attackers x two epsilons x six budgets x three seeds, last-layer gradients."""
    return Sweep(
        name="mnist_budgets",
        tasks=load("mnist_knockoff").tasks,
        defenses=(Defended(MAD(layers="last"), (0.0, 0.99)),),
        seeds=(0, 1, 2),
        budgets=(100, 300, 1_000, 3_000, 10_000),
        attacks=_both(Knockoff(budget=50_000, recipe=Recipe(epochs=10))),
    )


def fashion_mnist() -> Sweep:
    """The same on Fashion-MNIST."""
    tasks = load("mnist_knockoff:fashion_mnist").tasks
    return replace(config(), name="fashion_budgets", tasks=tasks)


def paper() -> Sweep:
    """MNIST and Fashion-MNIST at the paper's sizes."""
    return replace(
        config(),
        name="paper_budgets",
        tasks=load("mnist_knockoff:paper").tasks,
        defenses=(Defended(MAD(layers="last"), (0.0, 0.5, 0.9, 0.99)),),
        attacks=_both(Knockoff(budget=50_000, recipe=Recipe(epochs=30))),
    )


def cifar10() -> Sweep:
    """CIFAR10 at the paper's sizes."""
    base = load("cifar10")
    attacks = _both(base.attacks[0])
    return replace(paper(), name="paper_budgets_cifar10", tasks=base.tasks, attacks=attacks)


def smoke() -> Sweep:
    """The whole path in seconds: perceptrons, on the embedded data; accuracies say nothing."""
    return replace(
        config(),
        name="smoke_budgets",
        tasks=load("mnist_knockoff:smoke").tasks,
        seeds=(0, 1),
        budgets=(50, 100),
        attacks=_both(Knockoff(budget=200, architecture=MLP, recipe=Recipe(epochs=1))),
    )


def _both(attack: Knockoff) -> tuple[Knockoff, Knockoff]:
    """The attacker that learns from whole posteriors, and the one that learns from top labels."""
    return attack, replace(attack, targets=top_label, variant="top label")
