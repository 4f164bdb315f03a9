"""CUB200 against four attacks: the paper's Table 1 row and its curves in Fig. 3, VGG16 at 224x224.

Claim: with 50,000 ImageNet queries knockoff reaches 0.81 of the undefended victim's 80.4 %, jbtop3
0.27, jbda and jbself less than a tenth; MAD lowers every one of them as epsilon grows.
Command: madjax sweep configs/cub200.py --data-dir DIR
On less data: madjax sweep cub200:smoke; DIR or $MADJAX_DATA holds caltech101_mini and
tinyimagenet_mini.
Cost: 11 days on an accelerator that reaches 80 TFLOP/s, 38 hours on eight, 59 GB of each (by
experiments/plan_paper.py; not measured); smoke takes 5 minutes and 7 GB on 2 CPU cores.

As in the paper, victim and attackers start from a network that was trained on ImageNet, but for its
last layer. It is weights/vgg16_bn.safetensors, below the directory that the command runs in:
    from safetensors.torch import save_file; from torchvision.models import vgg16_bn
    save_file(vgg16_bn(weights="IMAGENET1K_V1").state_dict(), "weights/vgg16_bn.safetensors")
`scratch` starts from random parameters, for a plan without that file. Test images are those of the
official split. 50,000 queries, the same ones for all seeds, are drawn from ImageNet's training
images; but for one test image no others are decoded.

Differs from the paper: images are squares of 256, cut from the middle, before they are cropped at
random. The surrogate is random, as the paper has it; in the authors' code it has ImageNet's weights
but for the last layer. The rest is as in configs/cifar10.py. `smoke` has Caltech-101 in place of
CUB200 and Tiny-ImageNet in place of ImageNet, both scaled up from 64x64, and no weights to start
from.
"""

from dataclasses import replace
from functools import partial

from madjax import VGG16, Knockoff, Recipe, Sweep, Task, Trained, jbtop
from madjax.augment import random_resized_crop
from madjax.config import load


def config() -> Sweep:
    """The grid of configs/cifar10.py on 200 kinds of birds."""
    return _started(scratch(), Trained("weights/vgg16_bn.safetensors"))


def scratch() -> Sweep:
    """The same from random parameters."""
    base, large = load("cifar10"), partial(VGG16, hidden=(4096, 4096))
    victim = replace(base.tasks[0].victim, augment=random_resized_crop)
    task = Task(
        dataset="tfds:caltech_birds2011@256",
        queryset="tfds:imagenet2012@256[random:50000,:1]",
        architecture=large,
        victim=victim,
    )
    attacks = tuple(replace(attack, architecture=large) for attack in base.attacks)
    return replace(base, name="cub200", tasks=(task,), attacks=attacks)


def smoke() -> Sweep:
    """The whole path in a few minutes, most of them for compiling; accuracies say nothing."""
    base, recipe = load("cifar10:smoke"), Recipe(epochs=1)
    small = partial(VGG16, width=1 / 16, hidden=(64, 64))
    attack = {"budget": 64, "architecture": small, "recipe": recipe}
    task = Task(
        dataset="caltech101_mini@256[random:128,random:64]",
        queryset="tinyimagenet_mini@256[random:64]",
        architecture=small,
        victim=replace(recipe, augment=random_resized_crop),
    )
    attacks = (
        Knockoff(**attack),
        jbtop(seeds=16, substitute=recipe, **attack),
    )
    return replace(base, name="cub200_smoke", tasks=(task,), attacks=attacks)


def _started(base: Sweep, start: Trained) -> Sweep:
    """A sweep whose networks start from given weights."""

    def from_it(recipe: Recipe) -> Recipe:
        return replace(recipe, start=start)

    tasks = tuple(replace(each, victim=from_it(each.victim)) for each in base.tasks)
    attacks = tuple(replace(each, recipe=from_it(each.recipe)) for each in base.attacks)
    return replace(base, tasks=tasks, attacks=attacks)
