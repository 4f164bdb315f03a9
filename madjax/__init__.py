"""madjax: prediction poisoning (MAD), a defence of prediction APIs against model stealing."""

from madjax import augment
from madjax.ascend import Ascend
from madjax.attacks import (
    AdaptiveKnockoff,
    Attack,
    JacobianAugmentation,
    Knockoff,
    Online,
    jbda,
    jbself,
    jbtop,
    steal,
    top_label,
)
from madjax.config import AngleStudy, Defended, Sweep, Task
from madjax.constraints import kl, l1, l2, linf
from madjax.datasets import Dataset, open_dataset
from madjax.defenses import (
    DPSGD,
    MAD,
    Defense,
    NoDefense,
    RandomNoise,
    ReverseSigmoid,
    Rounding,
    TopK,
    TopLabel,
)
from madjax.errors import InputError
from madjax.gram import coverage, gram
from madjax.mad import (
    LineSearch,
    argmax_bound,
    argmax_preserving,
    extreme,
    extreme_at_budget,
    solve,
)
from madjax.models import MLP, VGG16, Classifier, LeNet, ResNet18
from madjax.objectives import angle, deviation
from madjax.recipe import Recipe
from madjax.serving import defend, export, load, perturb
from madjax.statistics import query_statistics
from madjax.train import fit
from madjax.weights import Trained, from_torch
from madjax.white_box import white_box

__all__ = [
    "DPSGD",
    "MAD",
    "MLP",
    "VGG16",
    "AdaptiveKnockoff",
    "AngleStudy",
    "Ascend",
    "Attack",
    "Classifier",
    "Dataset",
    "Defended",
    "Defense",
    "InputError",
    "JacobianAugmentation",
    "Knockoff",
    "LeNet",
    "LineSearch",
    "NoDefense",
    "Online",
    "RandomNoise",
    "Recipe",
    "ResNet18",
    "ReverseSigmoid",
    "Rounding",
    "Sweep",
    "Task",
    "TopK",
    "TopLabel",
    "Trained",
    "angle",
    "argmax_bound",
    "argmax_preserving",
    "augment",
    "coverage",
    "defend",
    "deviation",
    "export",
    "extreme",
    "extreme_at_budget",
    "fit",
    "from_torch",
    "gram",
    "jbda",
    "jbself",
    "jbtop",
    "kl",
    "l1",
    "l2",
    "linf",
    "load",
    "open_dataset",
    "perturb",
    "query_statistics",
    "solve",
    "steal",
    "top_label",
    "white_box",
]
