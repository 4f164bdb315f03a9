"""Model-stealing attacks as pure functions with fixed shapes."""

from madjax.attacks.adaptive import AdaptiveKnockoff, certainty, disagreement, diversity
from madjax.attacks.attack import (
    Attack,
    Custom,
    Transfer,
    World,
    check_transfer,
    draw,
    keys,
    posteriors,
    steal,
    top_label,
)
from madjax.attacks.jacobian import (
    JacobianAugmentation,
    away_from_top,
    jbda,
    jbself,
    jbtop,
    towards_next,
    towards_top,
)
from madjax.attacks.knockoff import Knockoff, crop_and_flip, unchanged
from madjax.attacks.online import Online
from madjax.attacks.remote import RemoteVictim

__all__ = [
    "AdaptiveKnockoff",
    "Attack",
    "Custom",
    "JacobianAugmentation",
    "Knockoff",
    "Online",
    "RemoteVictim",
    "Transfer",
    "World",
    "away_from_top",
    "certainty",
    "check_transfer",
    "crop_and_flip",
    "disagreement",
    "diversity",
    "draw",
    "jbda",
    "jbself",
    "jbtop",
    "keys",
    "posteriors",
    "steal",
    "top_label",
    "towards_next",
    "towards_top",
    "unchanged",
]
