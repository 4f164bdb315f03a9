"""Does a better optimum within the same budget make a better defence? Knockoff on MNIST.

Claim: an answer that turns the surrogate's gradient farther at equal L1 distance
takes more from the attacker. (The rows bear it out only where the label must be kept.)
Command: MADJAX_DATA=DIR madjax sweep configs/mnist_optimum.py
Cost: about 40 minutes on 2 CPU cores.

The victim, the queries and the attacker are those of configs/mnist_defenses.py, which says what
differs from the paper, and whose rows are the line search's.
"""

from functools import partial

from madjax import (
    MAD,
    Ascend,
    Defended,
    Knockoff,
    LineSearch,
    Recipe,
    Sweep,
    Task,
    extreme_at_budget,
)
from madjax.constraints import keep_label


def config() -> Sweep:
    """Five defences x two budgets x three seeds."""
    kept = partial(keep_label, margin=0.01)
    return Sweep(
        name="mnist_optimum",
        tasks=(
            Task(
                dataset="mnist",
                queryset="kassel_letters",
                query_splits=("train", "test"),
                victim=Recipe(epochs=15, weight_decay=5e-4, decay_epochs=10),
            ),
        ),
        defenses=tuple(
            Defended(rule, (0.5, 0.99))
            for rule in (
                MAD(layers="last", solver=LineSearch(extreme_at_budget)),
                MAD(layers="last", solver=Ascend()),
                MAD(layers="all", solver=LineSearch(extreme_at_budget)),
                MAD(layers="all", solver=Ascend()),
                MAD(layers="last", solver=Ascend(constraints=(kept,))),
            )
        ),
        seeds=(0, 1, 2),
        attacks=(Knockoff(budget=10_000, recipe=Recipe(epochs=10)),),
    )
