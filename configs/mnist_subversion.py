"""Ways around MAD on MNIST: the attackers of the paper's Fig. 9.

Claim: no attacker does much better before MAD for another network, another optimiser, or for asking
about each image several times; the top label alone is the best it can learn from, and still costs
it 9 points.
Command: MADJAX_DATA=DIR madjax sweep configs/mnist_subversion.py
Others: mnist_subversion:paper and mnist_subversion:cifar10, at the paper's sizes;
mnist_subversion:smoke, in seconds.
Cost: about 50 minutes on 2 CPU cores.

argmax trains on the top label; arch-* is another network; nquery sends each image four times and
trains on the mean answer; nquery+aug crops and mirrors it anew each time; opt-* is another
optimiser. How often an image is sent, and the rates of 0.01 (Adam: 0.001), are ours, as the paper
gives none. Differs from the paper: 10,000 queries (nquery: 40,000) in place of 50,000 and 10 epochs
in place of 30; Kassel letters stand in for EMNIST letters.
"""

from dataclasses import replace
from functools import partial
from typing import Any

from madjax import MAD, MLP, VGG16, Defended, Knockoff, LeNet, Recipe, Sweep, top_label
from madjax.attacks import crop_and_flip
from madjax.config import Architecture, load
from madjax.models import LeNetDouble, LeNetHalf
from madjax.recipe import adagrad, adam

NETWORKS = {"smaller": LeNetHalf, "larger": LeNetDouble, "MLP": MLP}


def config() -> Sweep:
    """Eleven attackers x three epsilons x three seeds, last-layer gradients."""
    return Sweep(
        name="mnist_subversion",
        tasks=load("mnist_knockoff").tasks,
        defenses=(Defended(MAD(layers="last"), (0.0, 0.9, 0.99)),),
        seeds=(0, 1, 2),
        attacks=_attackers(Knockoff(budget=10_000, recipe=Recipe(epochs=10)), NETWORKS),
    )


def paper() -> Sweep:
    """MNIST and Fashion-MNIST at the paper's sizes."""
    whole = load("mnist_knockoff:paper")
    return replace(
        config(),
        name="paper_subversion",
        tasks=whole.tasks,
        defenses=whole.defenses[:1],
        attacks=_attackers(Knockoff(budget=50_000, recipe=Recipe(epochs=30)), NETWORKS),
    )


def cifar10() -> Sweep:
    """CIFAR10 at the paper's sizes."""
    base = load("cifar10")
    plain = base.attacks[0]
    others = {"smaller": partial(VGG16, width=1 / 2), "larger": partial(VGG16, width=2)}
    return replace(
        paper(),
        name="paper_subversion_cifar10",
        tasks=base.tasks,
        attacks=_attackers(plain, others | {"LeNet": LeNet}),
    )


def smoke() -> Sweep:
    """The whole path in seconds: perceptrons, on the embedded data; accuracies say nothing."""
    plain = Knockoff(budget=40, architecture=MLP, recipe=Recipe(epochs=1))
    return replace(
        config(),
        name="smoke_subversion",
        tasks=load("mnist_knockoff:smoke").tasks,
        defenses=(Defended(MAD(layers="last"), (0.0, 0.99)),),
        seeds=(0,),
        attacks=_attackers(plain, {"smaller": partial(MLP, hidden=(100,))}),
    )


def _attackers(plain: Knockoff, others: dict[str, Architecture]) -> tuple[Knockoff, ...]:
    """An attacker, and others that differ from it in one thing, in networks among others."""
    four = replace(plain, budget=4 * plain.budget, repeats=4)

    def opt(name: str, learning_rate: float, **changes: Any) -> Knockoff:
        own = replace(plain.recipe, learning_rate=learning_rate, **changes)
        return replace(plain, variant=f"opt-{name}", recipe=own)

    return (
        plain,
        replace(plain, variant="argmax", targets=top_label),
        *(replace(plain, variant=f"arch-{name}", architecture=a) for name, a in others.items()),
        replace(four, variant="nquery"),
        replace(four, variant="nquery+aug", augment=crop_and_flip),
        opt("sgd", 0.01, momentum=0.0),
        opt("sgdm", 0.01),
        opt("adam", 0.001, optimizer=adam),
        opt("adagrad", 0.01, optimizer=adagrad),
    )
