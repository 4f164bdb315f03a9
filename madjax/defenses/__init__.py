"""Defences: what stands between the victim's posterior and the world."""

from madjax.defenses.defense import (
    MAX_STRENGTH,
    Custom,
    Defense,
    Owner,
    answers,
    as_function,
    fingerprints,
    prediction_api,
)
from madjax.defenses.mad import MAD
from madjax.defenses.noise import (
    RandomNoise,
    ReverseSigmoid,
    gaussian,
    l1_ball,
    l2_ball,
    logit,
    uniform,
)
from madjax.defenses.private import DPSGD
from madjax.defenses.truncation import Rounding, TopK, Undefended

__all__ = [
    "DPSGD",
    "MAD",
    "MAX_STRENGTH",
    "Custom",
    "Defense",
    "Owner",
    "RandomNoise",
    "ReverseSigmoid",
    "Rounding",
    "TopK",
    "Undefended",
    "answers",
    "as_function",
    "fingerprints",
    "gaussian",
    "l1_ball",
    "l2_ball",
    "logit",
    "prediction_api",
    "uniform",
]
