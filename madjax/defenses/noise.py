"""Defences that disturb the posterior's logits: reverse sigmoid, and random noise in a ball."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import optax

from madjax.constraints import l1, l2
from madjax.defenses.defense import Defense
from madjax.errors import InputError
from madjax.linear import dot
from madjax.mad import name_of

Array = jax.Array


def logit(y: Array) -> Array:
    """log(y_k / (1 - y_k)) of a posterior y [K]; -inf and inf for entries 0 and 1.

    1 - y_k is summed up from the other entries: as a difference it has no digits where y_k is
    nearly 1, which is what the victim's top class mostly is.
    """
    others = dot(1 - jnp.eye(y.size, dtype=y.dtype), y)
    return jnp.log(y) - jnp.log(others)


@dataclass(frozen=True)
class ReverseSigmoid(Defense):
    """Reverse sigmoid (Lee et al. 2018, https://arxiv.org/abs/1806.00054); the strength is beta.

    y~ = y' / sum_k y'_k with y' = y - beta (sigmoid(gamma logit(y)) - 1/2), beta in [0, 1]. The
    paper's gamma is 0.2 for MNIST, 0.4 for FashionMNIST, 0.1 for CIFAR10 and 0.2 for its other data
    sets; 0 leaves y as it is. The top label of a confident posterior is kept. Not every one is:
    with s the sigmoid, the order of entries is reversed where beta gamma s (1 - s) > y (1 - y),
    which is so for small y. A one-hot posterior becomes uniform at beta = 1; a uniform one is its
    own answer.
    """

    gamma: float = 0.2

    def __post_init__(self) -> None:
        if not 0 <= self.gamma < float("inf"):
            raise InputError(f"gamma of ReverseSigmoid is {self.gamma}: give a number >= 0")

    @property
    def name(self) -> str:
        """Rows call it `reverse_sigmoid`."""
        return "reverse_sigmoid"

    @property
    def usual(self) -> tuple[float, ...]:
        """Betas, to the largest."""
        return (0.1, 0.25, 0.5, 1.0)

    @property
    def strongest(self) -> float:
        """Beta = 1."""
        return 1.0

    def answer(self, key: Array, y: Array, evidence: Any, strength: Array | float) -> Array:
        """The posterior less what the sigmoid says."""
        del key, evidence
        # 0 times the infinite logit of an entry 0 or 1 is no number.
        bent = jax.nn.sigmoid(self.gamma * logit(y)) if self.gamma else jnp.full_like(y, 0.5)
        told = y - strength * (bent - 0.5)
        return told / told.sum()

    def describe(self) -> dict[str, str]:
        """The fields of a row that say which defence this was."""
        described = ", ".join(filter(None, (f"gamma {self.gamma:g}", self.variant)))
        return super().describe() | {"defense_variant": described}


Noise = Callable[[Array, int, Array, float], Array]
"""(key, classes K, radius, order p of the ball) -> noise [K] before it is projected."""


def uniform(key: Array, classes: int, radius: Array, order: float) -> Array:
    """U[0, 1] * 2 radius / K^(1/p): never negative, and as large as the ball on the average."""
    return jax.random.uniform(key, (classes,)) * 2 * radius / classes ** (1 / order)


def gaussian(key: Array, classes: int, radius: Array, order: float) -> Array:
    """N(0, 1), which a large ball leaves as it is."""
    del radius, order
    return jax.random.normal(key, (classes,))


NOISES: dict[str, Noise] = {"uniform": uniform, "gaussian": gaussian}
BALLS = {
    l1: (1.0, optax.projections.projection_l1_ball),
    l2: (2.0, optax.projections.projection_l2_ball),
}
"""Of a distance: the order p of its norm, and the projection onto its ball (Duchi et al. 2008)."""


@dataclass(frozen=True)
class RandomNoise(Defense):
    """Random noise on the logits (section 5.1); the strength is epsilon_z, the noise's radius.

    y~ = s / sum_k s_k with s = sigmoid(logit(y) + d), d the projection of a draw of `noise` onto
    the ball of radius epsilon_z in `ball`, which is madjax.l1 or madjax.l2. noise: "uniform", which
    is U[0, 1]^K 2 epsilon_z / K^(1/p), "gaussian", which is N(0, I), or any function (key, K,
    epsilon_z, p) -> [K]. A query has the same draw each time it is sent; with `fresh` a new one, so
    that an attacker who asks again and again averages it out. Radii are in logits: a victim's
    posteriors on MNIST have logits beyond 15, and a radius of some 100 to move them.
    """

    noise: str | Noise = "uniform"
    ball: Callable[[Array, Array], Array] = l1
    fresh: bool = False

    def __post_init__(self) -> None:
        if not (self.noise in NOISES or callable(self.noise)):
            raise InputError(
                f"noise of RandomNoise is {self.noise!r}: give 'uniform', 'gaussian' or a function"
            )
        if self.ball not in BALLS:
            raise InputError(f"ball of RandomNoise is {self.ball}: give madjax.l1 or madjax.l2")

    @property
    def name(self) -> str:
        """Rows call it `random_noise`."""
        return "random_noise"

    @property
    def usual(self) -> tuple[float, ...]:
        """Radii that move the answers of a victim on MNIST."""
        return (50.0, 100.0, 200.0)

    @property
    def is_fresh(self) -> bool:
        """As `fresh` says."""
        return self.fresh

    def answer(self, key: Array, y: Array, evidence: Any, strength: Array | float) -> Array:
        """The posterior of the disturbed logits."""
        del evidence
        radius = jnp.asarray(strength, y.dtype)
        order, project = BALLS[self.ball]
        drawn = NOISES.get(self.noise, self.noise)(key, y.size, radius, order)
        # As a softmax of log-sigmoids, the sum that divides cannot vanish.
        return jax.nn.softmax(jax.nn.log_sigmoid(logit(y) + project(drawn, radius)))

    def describe(self) -> dict[str, str]:
        """The fields of a row that say which defence this was."""
        noise = self.noise if isinstance(self.noise, str) else name_of(self.noise)
        parts = (f"{noise}, {self.ball.__name__} ball", "fresh" if self.fresh else "", self.variant)
        return super().describe() | {"defense_variant": ", ".join(filter(None, parts))}
