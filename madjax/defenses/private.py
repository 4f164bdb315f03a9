"""DP-SGD as a defence: the API is another victim, trained with differential privacy."""

from dataclasses import dataclass
from functools import cache, partial
from typing import Any

import jax
import jax.numpy as jnp

from madjax import private
from madjax.defenses.defense import Apply, Defense, Owner
from madjax.errors import InputError
from madjax.models import Classifier
from madjax.train import Recipe

Array = jax.Array


@dataclass(frozen=True)
class DPSGD(Defense):
    """A victim trained by DP-SGD (Abadi et al. 2016); the strength is the noise multiplier.

    Per-example gradients are clipped to L2 norm `clip` and summed, Gaussian noise of standard
    deviation strength * clip is added (`madjax.private.fit`). Each strength is a victim of its own,
    with the undefended victim's key; y~ is its posterior, and distances are taken from the
    undefended victim's. Rows have the accounted `dp_epsilon` at `dp_delta` = 1 / (number of
    training examples).
    """

    recipe: Recipe = Recipe(epochs=10, batch_size=600, learning_rate=0.5, decay_epochs=0)
    clip: float = 1.0

    def __post_init__(self) -> None:
        if not 0 < self.clip < float("inf"):
            raise InputError(f"clip of DPSGD is {self.clip}: give a number above 0")

    @property
    def name(self) -> str:
        """Rows call it `dp_sgd`."""
        return "dp_sgd"

    @property
    def usual(self) -> tuple[float, ...]:
        """Little noise, and much."""
        return (0.7, 2.0, 8.0)

    def check_strength(self, strength: float) -> None:
        """Refuse a noise multiplier that is none."""
        super().check_strength(strength)
        if not strength:
            raise InputError(
                "strength is 0: that of dp_sgd is a noise multiplier, give a number above 0, or "
                "madjax.Undefended() as the defence"
            )

    def check(self, classifier: Classifier, num_examples: int) -> None:
        """Refuse networks that mix examples, and batches larger than the data."""
        private.check(classifier, self.recipe, num_examples)

    def prepare(self, owner: Owner, key: Array, strengths: tuple[float, ...] = ()) -> Any:
        """The noise multipliers, and the parameters of their victims stacked."""
        del key
        trained = [
            owner.train(
                f"dp-sgd-noise-{strength:g}-clip-{self.clip:g}",
                self.recipe,
                owner.key,
                partial(private.fit, noise_multiplier=strength, clip=self.clip),
            )
            for strength in strengths
        ]
        return jnp.asarray(strengths), jax.tree.map(lambda *leaves: jnp.stack(leaves), *trained)

    def evidence(self, apply: Apply, known: Any, x: Array) -> Any:
        """For each of x [B, ...] the noise multipliers [B, S] and their victims' y [B, S, K]."""
        strengths, victims = known
        y = [
            jax.nn.softmax(apply(jax.tree.map(lambda a, i=i: a[i], victims), x).astype(jnp.float32))
            for i in range(len(strengths))
        ]
        return jnp.tile(strengths, (len(x), 1)), jnp.stack(y, axis=1)

    def answer(self, key: Array, y: Array, evidence: Any, strength: Array | float) -> Array:
        """The posterior of the victim with this noise multiplier; NaN if there is none."""
        del key, y
        strengths, told = evidence
        is_it = strengths == jnp.float32(strength)
        return jnp.where(is_it.any(), told[is_it.argmax()], jnp.nan)

    def describe(self) -> dict[str, str]:
        """The fields of a row that say which defence this was."""
        parts = (f"clip {self.clip:g}", self.variant)
        return super().describe() | {"defense_variant": ", ".join(filter(None, parts))}

    def facts(self, strength: float, num_examples: int) -> dict[str, Any]:
        """The accounted privacy of this victim; null at strength 0, where nothing is private."""
        delta = 1 / num_examples
        epsilon = _epsilon(strength, num_examples, self.recipe.batch_size, self.recipe.epochs)
        return {"dp_epsilon": epsilon, "dp_delta": delta, "dp_clip": self.clip}


@cache
def _epsilon(noise: float, num_examples: int, batch_size: int, epochs: int) -> float | None:
    if not noise:
        return None
    return private.accounted_epsilon(
        noise,
        num_examples=num_examples,
        batch_size=batch_size,
        epochs=epochs,
        delta=1 / num_examples,
    )
