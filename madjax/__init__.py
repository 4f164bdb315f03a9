"""madjax: prediction poisoning (MAD), a defence of prediction APIs against model stealing."""

from madjax.config import Knockoff, Sweep
from madjax.constraints import kl, l1, l2, linf
from madjax.datasets import Dataset, open_dataset
from madjax.defenses import MAD
from madjax.errors import InputError
from madjax.gram import coverage, gram
from madjax.mad import angle, argmax_bound, argmax_preserving, deviation, extreme, perturb, solve
from madjax.models import VGG16, Classifier, LeNet
from madjax.serving import defend, export, load
from madjax.train import Recipe, fit

__all__ = [
    "MAD",
    "VGG16",
    "Classifier",
    "Dataset",
    "InputError",
    "Knockoff",
    "LeNet",
    "Recipe",
    "Sweep",
    "angle",
    "argmax_bound",
    "argmax_preserving",
    "coverage",
    "defend",
    "deviation",
    "export",
    "extreme",
    "fit",
    "gram",
    "kl",
    "l1",
    "l2",
    "linf",
    "load",
    "open_dataset",
    "perturb",
    "solve",
]
