"""Networks trained elsewhere: weights of PyTorch and checkpoints of other runs."""

from madjax.weights.pytorch import from_torch
from madjax.weights.trained import Trained

__all__ = ["Trained", "from_torch"]
