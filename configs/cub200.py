"""CUB200 against four attacks: the paper's Table 1 row and its curves in Fig. 3, VGG16 at 224x224.

Claim: with 50,000 ImageNet queries knockoff reaches 0.81 of the undefended victim's 80.4 %, jbtop3
0.27, jbda and jbself less than a tenth; MAD lowers every one of them as epsilon grows.
Command: madjax sweep configs/cub200.py --data-dir DIR
On less data: madjax sweep cub200:smoke, where DIR or $MADJAX_DATA holds caltech101_mini and
tinyimagenet_mini
Cost: COST

weights/vgg16_bn.pth, below the directory that the command runs in, is torchvision's vgg16_bn,
trained on ImageNet: victim and attackers start from it, but for the last layer, as in the paper.
`scratch` starts from random parameters, for a plan without that file. Test images are those of the
official split; 50,000 queries are drawn from ImageNet's training images, which alone are decoded.

Differs from the paper: images are squares of 256, cut from the middle, before they are cropped at
random. The surrogate is random, as the paper has it; in the authors' code it has ImageNet's weights
but for the last layer. The victim's weight decay is that of the authors' code. `smoke` has
Caltech-101 in place of CUB200 and Tiny-ImageNet in place of ImageNet, both scaled up from 64x64.
"""

from dataclasses import replace
from functools import partial

from madjax import VGG16, Knockoff, Recipe, Sweep, Task, Trained, jbtop
from madjax.augment import random_resized_crop
from madjax.config import load


def config() -> Sweep:
    """The grid of configs/cifar10.py on 200 kinds of birds."""
    return _started(scratch(), Trained("weights/vgg16_bn.pth"))


def scratch() -> Sweep:
    """The same from random parameters."""
    base = load("cifar10")
    victim = replace(base.tasks[0].victim, augment=random_resized_crop)
    task = Task(
        dataset="tfds:caltech_birds2011@256",
        queryset="tfds:imagenet2012@256[random:50000]",
        architecture=partial(VGG16, hidden=(4096, 4096)),
        victim=victim,
    )
    return replace(base, name="cub200", tasks=(task,))


def smoke() -> Sweep:
    """Every line of the path in two minutes; its accuracies say nothing."""
    base, recipe = load("cifar10:smoke"), Recipe(epochs=1)
    task = Task(
        dataset="caltech101_mini@256[random:128]",
        queryset="tinyimagenet_mini@256[random:128]",
        architecture=partial(VGG16, width=1 / 16, hidden=(64, 64)),
        victim=replace(recipe, augment=random_resized_crop),
    )
    attacks = (
        Knockoff(budget=64, recipe=recipe),
        jbtop(budget=64, seeds=16, recipe=recipe, substitute=recipe),
    )
    return replace(base, name="cub200_smoke", tasks=(task,), attacks=attacks)


def _started(base: Sweep, start: Trained) -> Sweep:
    """A sweep whose networks start from given weights."""

    def from_it(recipe: Recipe) -> Recipe:
        return replace(recipe, start=start)

    def attacker(attack):
        changed = {
            name: from_it(getattr(attack, name))
            for name in ("recipe", "substitute")
            if hasattr(attack, name)
        }
        return replace(attack, **changed)

    tasks = tuple(replace(task, victim=from_it(task.victim)) for task in base.tasks)
    return replace(base, tasks=tasks, attacks=tuple(map(attacker, base.attacks)))
