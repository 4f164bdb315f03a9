"""MAD beside every defence that the paper compares with, and its ablations: Fig. 4, 5 and 8.

Claim: at equal L1 distance, and at equal defender accuracy, MAD takes more from a knockoff attacker
than reverse sigmoid, random noise, DP-SGD, the top label alone or rounding do; an attacker that
learns from the top label alone is as good as undefended against the defences that keep it, and not
against MAD; and what is lost without MAD's Jacobian (G = I), its oracle (a random vertex, the least
likely class), its normalised objective, or with a surrogate that is trained. (experiments/README.md
says what of it the rows bear out.)
Command: MADJAX_DATA=DIR madjax sweep configs/mnist_defenses.py
Cost: some 4 hours on 2 CPU cores; it may be stopped, and --resume goes on.

Differs from the paper: 10,000 queries in place of 50,000 and 10 epochs in place of 30; Kassel
letters stand in for EMNIST letters; the victim trains for 15 epochs, its rate tenfold lower after
10. The paper says neither how large the noise of its DP-SGD is nor which of the authors' two balls
its random noise is projected to: here the L1 ball, as it cites Duchi et al. (2008).
"""

from dataclasses import replace

from madjax import (
    DPSGD,
    MAD,
    Defended,
    Knockoff,
    LineSearch,
    NoDefense,
    RandomNoise,
    Recipe,
    ReverseSigmoid,
    Rounding,
    Sweep,
    Task,
    TopK,
    TopLabel,
    argmax_preserving,
    top_label,
)
from madjax.ablations import argmin, extreme_unnormalised, random_vertex


def config() -> Sweep:
    """Seventeen defences with strengths of their own x two attackers x three seeds: 222 cells."""
    victim = Recipe(epochs=15, weight_decay=5e-4, decay_epochs=10)
    private = Recipe(epochs=5, batch_size=600, learning_rate=0.5)
    ablations = (
        MAD(layers="identity"),
        MAD(layers="last", solver=LineSearch(random_vertex)),
        MAD(layers="all", solver=LineSearch(extreme_unnormalised)),
    )
    others = (
        MAD(layers="last", solver=LineSearch(argmin)),
        MAD(layers="last", surrogate_epochs=1),
        MAD(layers="last", surrogate_epochs=victim.epochs),
        MAD(layers="last", surrogate_epochs=None),
    )
    knockoff = Knockoff(budget=10_000, recipe=Recipe(epochs=10))
    return Sweep(
        name="mnist_defenses",
        tasks=(
            Task(
                dataset="mnist",
                queryset="kassel_letters",
                query_splits=("train", "test"),
                victim=victim,
            ),
        ),
        defenses=(
            Defended(NoDefense()),
            Defended(MAD(layers="last"), (0.5, 0.8, 0.99, 1.1, 1.5)),
            Defended(MAD(layers="all"), (0.5, 0.8, 0.99, 1.1, 1.5)),
            Defended(MAD(layers="last", solver=LineSearch(argmax_preserving)), (0.5, 1, 1.5)),
            Defended(ReverseSigmoid(gamma=0.2), (0.1, 0.25, 0.5, 1)),
            Defended(RandomNoise(), (50, 100, 200)),
            Defended(TopLabel()),
            Defended(Rounding(), (1,)),
            Defended(TopK(), (2,)),
            *(Defended(rule, (0.8, 0.99)) for rule in ablations),
            *(Defended(rule, (0.99,)) for rule in others),
            Defended(DPSGD(recipe=private), (0.7, 2, 8)),
        ),
        seeds=(0, 1, 2),
        attacks=(knockoff, replace(knockoff, targets=top_label, variant="top label")),
    )
