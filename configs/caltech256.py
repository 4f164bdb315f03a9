"""Caltech256 against four attacks: the paper's Table 1 row and its curves in Fig. 3, VGG16.

Claim: with 50,000 ImageNet queries knockoff reaches 0.93 of the undefended victim's 80.0 %, jbtop3
0.37, jbself and jbda a fifth or less; MAD lowers every one of them as epsilon grows.
Command: madjax sweep configs/caltech256.py --data-dir DIR
On less data: madjax sweep caltech256:smoke, where DIR or $MADJAX_DATA holds caltech101_mini and
tinyimagenet_mini
Cost: 11 days on an accelerator that reaches 80 TFLOP/s, 38 hours on eight, 63 GB of each (by
experiments/plan_paper.py; not measured); smoke takes 5 minutes and 7 GB on 2 CPU cores.

DIR/caltech256 is the folder of 256_ObjectCategories.tar without 257.clutter. ImageNet and the
weights to start from are as for configs/cub200.py.

Differs from the paper as configs/cub200.py does. The 25 test images of each class are drawn by this
package, so they are not those of the authors' code, which draws as many.
"""

from dataclasses import replace

from madjax import Sweep
from madjax.config import load


def config() -> Sweep:
    """The grid of configs/cub200.py on 256 kinds of things."""
    return _of_caltech(load("cub200"))


def scratch() -> Sweep:
    """The same from random parameters."""
    return _of_caltech(load("cub200:scratch"))


def smoke() -> Sweep:
    """The whole path in a few minutes, most of them for compiling; accuracies say nothing."""
    return replace(load("cub200:smoke"), name="caltech256_smoke")


def _of_caltech(base: Sweep) -> Sweep:
    task = replace(base.tasks[0], dataset="caltech256@256[heldout:25]")
    return replace(base, name="caltech256", tasks=(task,))
