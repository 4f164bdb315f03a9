"""The attacker that learns from the top label alone, against defences that keep it and MAD: Fig. 5.

Claim: against defences that keep the top label (MAD-argmax, reverse sigmoid) this attacker is about
as good as against no defence; against MAD less so.
Command: MADJAX_DATA=DIR madjax sweep configs/mnist_top_label.py
Cost: about 15 minutes on 2 CPU cores.

The victim, the queries and the knockoff attacker to compare with are those of
configs/mnist_defenses.py, which says what differs from the paper.
"""

from madjax import (
    MAD,
    Defended,
    Knockoff,
    LineSearch,
    NoDefense,
    Recipe,
    ReverseSigmoid,
    Sweep,
    Task,
    argmax_preserving,
    top_label,
)


def config() -> Sweep:
    """Four defences x three seeds."""
    return Sweep(
        name="mnist_top_label",
        tasks=(
            Task(
                dataset="mnist",
                queryset="kassel_letters",
                query_splits=("train", "test"),
                victim=Recipe(epochs=15, weight_decay=5e-4, decay_epochs=10),
            ),
        ),
        defenses=(
            Defended(NoDefense()),
            Defended(MAD(layers="last"), (0.99,)),
            Defended(MAD(layers="last", solver=LineSearch(argmax_preserving)), (1.0, 1.5)),
            Defended(ReverseSigmoid(gamma=0.2), (0.25, 1.0)),
        ),
        seeds=(0, 1, 2),
        attacks=(
            Knockoff(
                budget=10_000, recipe=Recipe(epochs=10), targets=top_label, variant="top label"
            ),
        ),
    )
