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
    logit,
    uniform,
)
from madjax.defenses.private import DPSGD
from madjax.defenses.retrained import Retrained
from madjax.defenses.truncation import NoDefense, Rounding, TopK, TopLabel

__all__ = [
    "DPSGD",
    "MAD",
    "MAX_STRENGTH",
    "Custom",
    "Defense",
    "NoDefense",
    "Owner",
    "RandomNoise",
    "Retrained",
    "ReverseSigmoid",
    "Rounding",
    "TopK",
    "TopLabel",
    "answers",
    "as_function",
    "fingerprints",
    "gaussian",
    "logit",
    "prediction_api",
    "uniform",
]
