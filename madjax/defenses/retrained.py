"""Defences that are in the victim's training: the API is another victim."""

from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp

from madjax.defenses.defense import Apply, Defense, Owner
from madjax.errors import InputError
from madjax.streams import stream

Array = jax.Array


@dataclass(frozen=True)
class Retrained(Defense):
    """The base of defences that train the victim in another way: override `victim_recipe`.

    Each strength and seed has a victim of its own, with the network and data of the undefended one.
    They share no randomness. y~ is that victim's posterior, and distances are taken from the
    undefended victim's y.
    """

    @property
    def neutral(self) -> None:
        """None: a victim trained anew is never the undefended one."""
        return

    @property
    def needs_recipe(self) -> bool:
        """Yes: to train the victim in another way."""
        return True

    def prepare(self, owner: Owner, key: Array, strengths: tuple[float, ...] = ()) -> Any:
        """The strengths, and the parameters of their victims stacked."""
        if not strengths:
            raise InputError(
                f"strengths of {self.name} holds nothing: give those at which it will answer, each "
                "has a victim of its own"
            )
        trained = []
        for strength in strengths:
            recipe, name = self.victim_recipe(owner.recipe, strength), f"{self.name}-{strength:g}"
            trained.append(owner.train(name, recipe, stream(key, name)))
        return jnp.asarray(strengths), jax.tree.map(lambda *leaves: jnp.stack(leaves), *trained)

    def evidence(self, apply: Apply, known: Any, x: Array) -> Any:
        """For each of x [B, ...] the strengths [B, S] and their victims' posteriors [B, S, K]."""
        strengths, victims = known
        y = [
            jax.nn.softmax(apply(jax.tree.map(lambda a, i=i: a[i], victims), x).astype(jnp.float32))
            for i in range(len(strengths))
        ]
        return jnp.tile(strengths, (len(x), 1)), jnp.stack(y, axis=1)

    def answer(self, key: Array, y: Array, evidence: Any, strength: Array | float) -> Array:
        """The posterior of the victim of this strength; NaN if there is none."""
        del key, y
        strengths, told = evidence
        is_it = strengths == jnp.float32(strength)
        return jnp.where(is_it.any(), told[is_it.argmax()], jnp.nan)
