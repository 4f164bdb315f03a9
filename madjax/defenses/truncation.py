"""Defences that tell less of the posterior: all of it, its largest classes, or fewer digits."""

from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp

from madjax.defenses.defense import Defense
from madjax.errors import InputError

Array = jax.Array


@dataclass(frozen=True)
class Undefended(Defense):
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
    """Only the k largest of the posterior's entries are told; any strength above 0 is the same.

    y~_j = y_j / sum of the k largest, and 0 for the other classes. k = 1 is the top label alone.
    normalised=False leaves out the division, as the authors' code does; answers then are no
    distributions. Of equal entries the lower class counts as larger.
    """

    k: int = 1
    normalised: bool = True

    def __post_init__(self) -> None:
        if self.k < 1:
            raise InputError(f"k of TopK is {self.k}: give a whole number >= 1")

    @property
    def name(self) -> str:
        """top1, top2, ..."""
        return f"top{self.k}"

    @property
    def usual(self) -> tuple[float, ...]:
        """One, as all above 0 are the same."""
        return (1.0,)

    def answer(self, key: Array, y: Array, evidence: Any, strength: Array | float) -> Array:
        """The posterior cut to its k largest entries."""
        del key, evidence, strength
        if self.k >= y.size:
            return y
        kept = jnp.zeros_like(y).at[jax.lax.top_k(y, self.k)[1]].set(1)
        return _told(y * kept, self.normalised)

    def describe(self) -> dict[str, str]:
        """The fields of a row that say which defence this was."""
        return super().describe() | {"defense_variant": _variant(self.variant, self.normalised)}


@dataclass(frozen=True)
class Rounding(Defense):
    """Every entry is rounded to a multiple of the strength, 0.1 for one decimal, in (0, 1].

    y~_k = r_k / sum_j r_j with r = strength round(y / strength), ties to even. Where all entries
    are rounded to 0 the answer is uniform: nothing is known of the query. normalised=False gives r
    as it is, as the authors' code does; answers then are no distributions.
    """

    normalised: bool = True

    @property
    def name(self) -> str:
        """Rows call it `rounding`."""
        return "rounding"

    @property
    def usual(self) -> tuple[float, ...]:
        """Two decimals, and one."""
        return (0.01, 0.1)

    @property
    def strongest(self) -> float:
        """1: entries are 0 or 1."""
        return 1.0

    def answer(self, key: Array, y: Array, evidence: Any, strength: Array | float) -> Array:
        """The rounded posterior."""
        del key, evidence
        step = jnp.where(strength > 0, strength, 1)
        return _told(jnp.round(y / step) * step, self.normalised)

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
