"""Defences that tell less of the posterior: its largest classes, its top label, fewer digits."""

from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp

from madjax.defenses.defense import Defense
from madjax.errors import InputError

Array = jax.Array

MOST_DECIMALS = 6
"""Of float32 numbers up to 1."""


@dataclass(frozen=True)
class NoDefense(Defense):
    """No defence: y~ = y at every strength."""

    @property
    def name(self) -> str:
        """Rows call it `none`."""
        return "none"

    @property
    def usual(self) -> tuple[float, ...]:
        """One, as all are the same."""
        return (0.0,)

    def answer(self, key: Array, y: Array, evidence: Any, strength: Array | float) -> Array:
        """The posterior as it is."""
        del key, evidence, strength
        return y


@dataclass(frozen=True)
class TopK(Defense):
    """Only the k largest of the posterior's entries are told; the strength is k, from 1 on.

    y~_j = y_j / sum of the k largest, and 0 for the other classes; y itself where k is K or more.
    normalised=False leaves out the division, as the authors' code does; answers then are no
    distributions. Of equal entries the lower class counts as larger.
    """

    normalised: bool = True

    @property
    def name(self) -> str:
        """Rows call it `top_k`."""
        return "top_k"

    @property
    def usual(self) -> tuple[float, ...]:
        """A few classes."""
        return (1.0, 2.0, 3.0)

    @property
    def neutral(self) -> None:
        """None that serves all: with as many classes as there are, y is told."""
        return

    def check_strength(self, strength: float) -> None:
        """Refuse what is no number of classes."""
        super().check_strength(strength)
        if strength < 1 or strength != round(strength):
            raise InputError(
                f"strength is {strength:g}: that of top_k is k, give a whole number >= 1"
            )

    def answer(self, key: Array, y: Array, evidence: Any, strength: Array | float) -> Array:
        """The posterior cut to its k largest entries."""
        del key, evidence
        rank = jnp.argsort(jnp.argsort(-y, stable=True))
        kept = jnp.where(rank < strength, y, 0)
        return jnp.where(strength < y.size, _told(kept, self.normalised), y)

    def describe(self) -> dict[str, str]:
        """The fields of a row that say which defence this was."""
        return super().describe() | {"defense_variant": _variant(self.variant, self.normalised)}


@dataclass(frozen=True)
class TopLabel(Defense):
    """The top label alone: y~ = e_k with k = argmax y, the lowest of equal classes.

    It has no strength: the one that rows name is 1, for one class.
    """

    @property
    def name(self) -> str:
        """Rows call it `top_label`."""
        return "top_label"

    @property
    def usual(self) -> tuple[float, ...]:
        """One, as all are the same."""
        return (1.0,)

    @property
    def neutral(self) -> None:
        """None: it never tells y."""
        return

    def answer(self, key: Array, y: Array, evidence: Any, strength: Array | float) -> Array:
        """One-hot."""
        del key, evidence, strength
        return jax.nn.one_hot(y.argmax(), y.size, dtype=y.dtype)


@dataclass(frozen=True)
class Rounding(Defense):
    """Every entry is rounded; the strength is the number of decimals d, from 0 on.

    y~_k = r_k / sum_j r_j with r = 10^-d round(10^d y), ties to even. Where all entries are rounded
    to 0 the answer is uniform: nothing is known of the query. normalised=False gives r as it is, as
    the authors' code does; answers then are no distributions.
    """

    normalised: bool = True

    @property
    def name(self) -> str:
        """Rows call it `rounding`."""
        return "rounding"

    @property
    def usual(self) -> tuple[float, ...]:
        """One decimal, and two."""
        return (1.0, 2.0)

    @property
    def strongest(self) -> float:
        """As many decimals as float32 has."""
        return MOST_DECIMALS

    @property
    def neutral(self) -> None:
        """None: more decimals tell more, and none all."""
        return

    def check_strength(self, strength: float) -> None:
        """Refuse what is no number of decimals."""
        super().check_strength(strength)
        if strength != round(strength):
            raise InputError(
                f"strength is {strength:g}: that of rounding is a number of decimals, give a whole "
                f"number from 0 to {MOST_DECIMALS}"
            )

    def answer(self, key: Array, y: Array, evidence: Any, strength: Array | float) -> Array:
        """The rounded posterior."""
        del key, evidence
        scale = jnp.round(10.0 ** jnp.asarray(strength, y.dtype))
        return _told(jnp.round(y * scale) / scale, self.normalised)

    def describe(self) -> dict[str, str]:
        """The fields of a row that say which defence this was."""
        return super().describe() | {"defense_variant": _variant(self.variant, self.normalised)}


def _told(kept: Array, normalised: bool) -> Array:
    if not normalised:
        return kept
    total = kept.sum()
    return jnp.where(total > 0, kept / jnp.where(total > 0, total, 1), 1 / kept.size)


def _variant(variant: str, normalised: bool) -> str:
    return variant if normalised else ", ".join(filter(None, ("not normalised", variant)))
