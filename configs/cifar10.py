"""CIFAR10 against four attacks: the paper's Table 1 row and its curves in Fig. 3, VGG16.

Claim: with 50,000 queries knockoff reaches 0.86 of the undefended victim's 92.0 %, jbtop3 0.80,
jbda and jbself less than a third; MAD lowers every one of them as epsilon grows.
Command: madjax sweep configs/cifar10.py --data-dir DIR
On less data: madjax sweep cifar10:smoke, or cifar10:reduced, which is knockoff with a quarter of
the network's width; DIR or $MADJAX_DATA holds cifar10 and cifar100.
Cost: 5 hours on an accelerator that reaches 80 TFLOP/s, 47 minutes on eight, 2 GB of each (by
experiments/plan_paper.py; not measured); smoke takes 3 minutes on 2 CPU cores.

Differs from the paper: victim and attackers start from random parameters. The paper's start from a
TinyImageNet network; with one, add --set tasks.victim.start=PATH --set attacks.recipe.start=PATH.
The networks that the Jacobian attacks train on the way start from random parameters in any case.
Gradients are those of the last layer, as in the authors' code; Eq. 5 has all parameters (--set
defenses.rule.layers=all). The victim is that of its last epoch, where the code keeps the epoch that
is best on the test images. The victim's weight decay and its crops and flips are the code's. jbda
steps away from the top class as in the code, where appendix C of the paper steps towards it. The
Jacobian attacks are without the code's defects, on which Table 1 may rest (as_published_code=True
has them). The surrogate's BatchNorm is in inference mode (--set
defenses.rule.query_statistics=True is the code's).
"""

from dataclasses import replace
from functools import partial

from madjax import (
    MAD,
    VGG16,
    Defended,
    Knockoff,
    LineSearch,
    Recipe,
    Sweep,
    Task,
    argmax_preserving,
    jbda,
    jbself,
    jbtop,
)
from madjax.attacks import crop_and_flip


def config() -> Sweep:
    """Four attacks x (MAD at eight epsilons, MAD-argmax at three) x three seeds."""
    recipe = Recipe(epochs=100, decay_epochs=50)
    attack = {"budget": 50_000, "architecture": VGG16, "recipe": recipe}
    return Sweep(
        name="cifar10",
        tasks=(
            Task(
                dataset="tfds:cifar10",
                queryset="tfds:cifar100",
                architecture=VGG16,
                victim=replace(recipe, weight_decay=5e-4, augment=crop_and_flip),
            ),
        ),
        defenses=(
            Defended(MAD(layers="last"), (0.0, 0.1, 0.3, 0.5, 0.8, 0.99, 1.1, 1.5)),
            Defended(MAD(layers="last", solver=LineSearch(argmax_preserving)), (0.5, 0.99, 1.5)),
        ),
        seeds=(0, 1, 2),
        attacks=(
            Knockoff(**attack),
            *(make(seeds=500, **attack) for make in (jbda, jbself, jbtop)),
        ),
    )


def reduced() -> Sweep:
    """Knockoff alone, on what two CPU cores can do: a network of a sixteenth of the arithmetic."""
    base = config()
    recipe = Recipe(epochs=20, decay_epochs=10)
    (task,), small = base.tasks, partial(VGG16, width=1 / 4)
    return replace(
        base,
        name="cifar10_reduced",
        tasks=(
            replace(
                task,
                dataset="cifar10[:20000]",
                queryset="cifar100",
                architecture=small,
                victim=replace(recipe, weight_decay=5e-4, augment=crop_and_flip),
            ),
        ),
        defenses=(Defended(MAD(layers="last"), (0.0, 0.5, 0.99)),),
        seeds=(0,),
        attacks=(Knockoff(budget=24_000, architecture=small, recipe=recipe),),
    )


def smoke() -> Sweep:
    """The whole path in a few minutes, most of them for compiling; accuracies say nothing."""
    base, recipe = config(), Recipe(epochs=1)
    (task,), small = base.tasks, partial(VGG16, width=1 / 16)
    attack = {"budget": 256, "architecture": small, "recipe": recipe}
    return replace(
        base,
        name="cifar10_smoke",
        tasks=(
            replace(
                task,
                dataset="cifar10[:512,:256]",
                queryset="cifar100[:512]",
                architecture=small,
                victim=replace(recipe, augment=crop_and_flip),
            ),
        ),
        defenses=(Defended(MAD(layers="last"), (0.5,)),),
        seeds=(0,),
        attacks=(
            Knockoff(**attack),
            jbtop(seeds=64, substitute=recipe, **attack),
        ),
    )
