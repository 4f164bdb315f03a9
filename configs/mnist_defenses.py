"""MAD beside every defence that the paper compares with, and its ablations: Fig. 4, 5 and 8.

Claim: at equal L1 distance, and at equal defender accuracy, MAD takes more from a knockoff attacker
than reverse sigmoid, random noise, DP-SGD, the top label alone or rounding do; an attacker that
learns from the top label alone is as good as undefended against the defences that keep it, and not
against MAD; and what is lost without MAD's Jacobian (G = I), its oracle (a random vertex, the least
likely class), its normalised objective, or with a surrogate that is trained. (experiments/README.md
says what of it the rows bear out.)
Command: MADJAX_DATA=DIR madjax sweep configs/mnist_defenses.py
Others: mnist_defenses:more_seeds, of what three do not tell apart; mnist_defenses:fashion_mnist,
another victim; mnist_defenses:paper, at the paper's sizes, as mnist_defenses:paper_fashion and
mnist_defenses:cifar10; mnist_defenses:smoke, in seconds.
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
    MLP,
    Defended,
    Knockoff,
    LineSearch,
    NoDefense,
    RandomNoise,
    Recipe,
    ReverseSigmoid,
    Rounding,
    Sweep,
    TopK,
    TopLabel,
    argmax_preserving,
    top_label,
)
from madjax.ablations import argmin, extreme_unnormalised, random_vertex
from madjax.attacks import Attack
from madjax.config import load


def config() -> Sweep:
    """Seventeen defences with strengths of their own x two attackers x three seeds: 222 cells."""
    (task,) = load("mnist_knockoff").tasks
    victim = Recipe(epochs=15, weight_decay=5e-4, decay_epochs=10)
    return Sweep(
        name="mnist_defenses",
        tasks=(replace(task, victim=victim),),
        defenses=(
            *_compared(gamma=0.2),
            *_ablations(),
            Defended(MAD(layers="last", solver=LineSearch(argmin)), (0.99,)),
            *(Defended(MAD(layers="last", surrogate_epochs=e), (0.99,)) for e in (1, 15, None)),
            _private(),
        ),
        seeds=(0, 1, 2),
        attacks=_with_labels(Knockoff(budget=10_000, recipe=Recipe(epochs=10))),
    )


def fashion_mnist() -> Sweep:
    """The defences and MAD's ablations on Fashion-MNIST, with fewer strengths: 144 cells."""
    dropped = {0.8, 1.1, 200, 8}
    return replace(
        config(),
        name="fashion_defenses",
        tasks=load("mnist_knockoff:fashion_mnist").tasks,
        defenses=tuple(
            replace(each, strengths=tuple(s for s in each.strengths if s not in dropped))
            for each in (*_compared(gamma=0.4), *_ablations(), _private())
        ),
    )


def more_seeds() -> Sweep:
    """What three seeds do not tell apart, seven seeds more: MAD of either layers, and G = I."""
    rules = [MAD(layers=name) for name in ("last", "all", "identity")]
    return replace(
        config(),
        defenses=(Defended(NoDefense()), *(Defended(rule, (0.8, 0.99)) for rule in rules)),
        seeds=tuple(range(3, 10)),
        attacks=config().attacks[:1],
    )


def paper() -> Sweep:
    """MNIST at the paper's sizes."""
    return _at_the_papers_sizes(0, gamma=0.2)


def paper_fashion() -> Sweep:
    """Fashion-MNIST at the paper's sizes."""
    return _at_the_papers_sizes(1, gamma=0.4)


def cifar10() -> Sweep:
    """CIFAR10 at the paper's sizes, but for DP-SGD, which cannot train BatchNorm."""
    base = load("cifar10")
    return replace(
        config(),
        name="paper_defenses_cifar10",
        tasks=base.tasks,
        defenses=(*_compared(gamma=0.1), *_ablations()),
        attacks=_with_labels(base.attacks[0]),
    )


def smoke() -> Sweep:
    """The whole path in seconds: perceptrons, on the embedded data; accuracies say nothing."""
    private = DPSGD(recipe=Recipe(epochs=1, batch_size=50, learning_rate=0.5))
    rules = (*_compared(gamma=0.2), *_ablations(), Defended(private))
    return replace(
        config(),
        name="smoke_defenses",
        tasks=load("mnist_knockoff:smoke").tasks,
        defenses=tuple(replace(each, strengths=each.strengths[:1]) for each in rules),
        seeds=(0,),
        attacks=_with_labels(Knockoff(budget=64, architecture=MLP, recipe=Recipe(epochs=1))),
    )


def _at_the_papers_sizes(task: int, gamma: float) -> Sweep:
    chosen = load("mnist_knockoff:paper").tasks[task]
    return replace(
        config(),
        name=f"paper_defenses_{chosen.name}",
        tasks=(chosen,),
        defenses=(*_compared(gamma), *_ablations(), _private()),
        attacks=_with_labels(Knockoff(budget=50_000, recipe=Recipe(epochs=30))),
    )


def _compared(gamma: float) -> tuple[Defended, ...]:
    """MAD and what it is compared with."""
    return (
        Defended(NoDefense()),
        Defended(MAD(layers="last"), (0.5, 0.8, 0.99, 1.1, 1.5)),
        Defended(MAD(layers="all"), (0.5, 0.8, 0.99, 1.1, 1.5)),
        Defended(MAD(layers="last", solver=LineSearch(argmax_preserving)), (0.5, 1, 1.5)),
        Defended(ReverseSigmoid(gamma), (0.1, 0.25, 0.5, 1)),
        Defended(RandomNoise(), (50, 100, 200)),
        Defended(TopLabel()),
        Defended(Rounding(), (1,)),
        Defended(TopK(), (2,)),
    )


def _ablations() -> tuple[Defended, ...]:
    """MAD without a part of it: G = I, a random y*, the objective not normalised."""
    rules = (
        MAD(layers="identity"),
        MAD(layers="last", solver=LineSearch(random_vertex)),
        MAD(layers="all", solver=LineSearch(extreme_unnormalised)),
    )
    return tuple(Defended(rule, (0.8, 0.99)) for rule in rules)


def _private() -> Defended:
    recipe = Recipe(epochs=5, batch_size=600, learning_rate=0.5)
    return Defended(DPSGD(recipe=recipe), (0.7, 2, 8))


def _with_labels(attack: Attack) -> tuple[Attack, Attack]:
    """An attacker that learns from whole answers, and one from their top labels."""
    return attack, replace(attack, targets=top_label, variant="top label")
