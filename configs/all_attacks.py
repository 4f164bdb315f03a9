"""Every attack and every way around the defence, on the embedded data at reduced scale.

Claim: all of them run, over a grid of epsilons, each in under 3 minutes on 2 CPU cores. At this
scale (one seed, 2,000 queries) their accuracies say little; configs/mnist_attacks.py is for those.
Command: madjax sweep all_attacks
One alone: madjax sweep all_attacks --set attacks=madjax.jbda
Cost: about 7 minutes on 2 CPU cores.

The paper's Fig. 9: argmax (train on the top label), arch-* (another network), nquery (each image
sent four times, answers averaged), nquery+aug (cropped and mirrored anew each time), opt-* (another
optimiser, at a rate of 0.01, Adam 0.001). Its Table 1: jbda, jbself, jbtop3 and knockoff, the first
three also as the authors' code has them. Knockoff Nets' adaptive strategy with each of its rewards.
"""

from dataclasses import replace

from madjax import (
    MAD,
    MLP,
    AdaptiveKnockoff,
    Defended,
    Knockoff,
    Recipe,
    Sweep,
    Task,
    jbda,
    jbself,
    jbtop,
    top_label,
)
from madjax.attacks import certainty, crop_and_flip, disagreement, diversity
from madjax.models import LeNetDouble, LeNetHalf
from madjax.recipe import adagrad, adam

RECIPE = Recipe(epochs=8)
COMMON = {"budget": 2_000, "recipe": RECIPE}
REWARDS = {"certainty": certainty, "diversity": diversity, "loss": disagreement}


def opt(name, **changes):
    """Knockoff with another optimiser."""
    return Knockoff(variant=f"opt-{name}", budget=2_000, recipe=replace(RECIPE, **changes))


def config() -> Sweep:
    """Twenty-one attacks x two epsilons."""
    knockoffs = (
        Knockoff(**COMMON),
        Knockoff(variant="argmax", targets=top_label, **COMMON),
        Knockoff(variant="arch-smaller", architecture=LeNetHalf, **COMMON),
        Knockoff(variant="arch-larger", architecture=LeNetDouble, **COMMON),
        Knockoff(variant="arch-MLP", architecture=MLP, **COMMON),
        Knockoff(variant="nquery", repeats=4, **COMMON),
        Knockoff(variant="nquery+aug", repeats=4, augment=crop_and_flip, **COMMON),
        opt("sgd", learning_rate=0.01, momentum=0.0),
        opt("sgdm", learning_rate=0.01, momentum=0.5),
        opt("adam", learning_rate=0.001, optimizer=adam),
        opt("adagrad", learning_rate=0.01, optimizer=adagrad),
    )
    adaptive = (
        AdaptiveKnockoff(variant="all", **COMMON),
        *(
            AdaptiveKnockoff(variant=variant, rewards=(reward,), **COMMON)
            for variant, reward in REWARDS.items()
        ),
    )
    jacobian = (
        *(make(**COMMON) for make in (jbda, jbself, jbtop)),
        *(make(as_published_code=True, **COMMON) for make in (jbda, jbself, jbtop)),
    )
    return Sweep(
        name="all_attacks",
        tasks=(
            Task(
                dataset="embedded:mnist",
                queryset="embedded:fashion_mnist",
                victim=Recipe(epochs=8, weight_decay=5e-4),
            ),
        ),
        defenses=(Defended(MAD(layers="last"), (0.0, 0.99)),),
        attacks=(*knockoffs, *adaptive, *jacobian),
    )
