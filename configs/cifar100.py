"""CIFAR100 against four attacks: the paper's Table 1 row and its curves in Fig. 3, VGG16.

Claim: with 50,000 queries knockoff reaches 0.72 of the undefended victim's 72.2 %, jbtop3 0.54,
jbda and jbself less than a tenth; MAD lowers every one of them as epsilon grows.
Command: madjax sweep configs/cifar100.py --data-dir DIR
On less data: madjax sweep cifar100:smoke, where DIR or $MADJAX_DATA holds cifar10 and cifar100
Cost: 5 hours on an accelerator that reaches 80 TFLOP/s, 46 minutes on eight, 2 GB of each (by
experiments/plan_paper.py; not measured); smoke takes 3 minutes on 2 CPU cores.

Differs from the paper as configs/cifar10.py does. Queries are CIFAR10's, and the Jacobian attacks
begin with 1,000 images. `smoke` has no test images of CIFAR100: ten of each class of the train
images are held out.
"""

from dataclasses import replace

from madjax import Sweep
from madjax.attacks import JacobianAugmentation
from madjax.config import load


def config() -> Sweep:
    """The grid of configs/cifar10.py with the two data sets exchanged."""
    base = load("cifar10")
    attacks = (
        replace(each, seeds=1_000) if isinstance(each, JacobianAugmentation) else each
        for each in base.attacks
    )
    tasks = (replace(base.tasks[0], dataset="tfds:cifar100", queryset="tfds:cifar10"),)
    return replace(base, name="cifar100", tasks=tasks, attacks=tuple(attacks))


def smoke() -> Sweep:
    """The whole path in a few minutes, most of them for compiling; accuracies say nothing."""
    base = load("cifar10:smoke")
    task = replace(base.tasks[0], dataset="cifar100[heldout:10,:512]", queryset="cifar10[:512,:1]")
    return replace(base, name="cifar100_smoke", tasks=(task,))
