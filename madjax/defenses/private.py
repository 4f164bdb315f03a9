"""DP-SGD as a defence: the API is a victim trained with differential privacy."""

from dataclasses import dataclass, replace
from functools import cache
from typing import Any

from madjax.defenses.retrained import Retrained
from madjax.errors import InputError
from madjax.private import PrivateGradient, accounted_epsilon
from madjax.recipe import Recipe


@dataclass(frozen=True)
class DPSGD(Retrained):
    """A victim trained by DP-SGD (Abadi et al. 2016); the strength is the noise multiplier sigma.

    g = (1 / B) (sum_i clip(g_i, C) + N(0, (C sigma)^2 I)) in place of the mean gradient of a batch,
    which is Poisson-sampled (`madjax.private.PrivateGradient`). clip: C. recipe: how these victims
    are trained, by default as the undefended one; noise asks for larger batches. Rows have the
    accounted `dp_epsilon` at `dp_delta` = 1 / (number of training examples). That is of this
    training: what the recipe's `start` was trained on is not covered by it.
    """

    clip: float = 1.0
    recipe: Recipe | None = None

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

    @property
    def needs_recipe(self) -> bool:
        """Whether it has none of its own."""
        return self.recipe is None

    def check_strength(self, strength: float) -> None:
        """Refuse a noise multiplier that is none."""
        super().check_strength(strength)
        if not strength:
            raise InputError(
                "strength is 0: that of dp_sgd is a noise multiplier, give a number above 0, or "
                "madjax.NoDefense() as the defence"
            )

    def victim_recipe(self, recipe: Recipe, strength: float) -> Recipe:
        """The recipe with clipped and noised gradients."""
        gradient = PrivateGradient(noise_multiplier=float(strength), clip=self.clip)
        return replace(self.recipe or recipe, gradient=gradient)

    def describe(self) -> dict[str, str]:
        """The fields of a row that say which defence this was."""
        parts = (f"clip {self.clip:g}", self.variant)
        return super().describe() | {"defense_variant": ", ".join(filter(None, parts))}

    def facts(self, strength: float, recipe: Recipe, num_examples: int) -> dict[str, Any]:
        """The accounted privacy of this victim, and how it was trained."""
        trained = self.victim_recipe(recipe, strength)
        epsilon = _epsilon(strength, num_examples, trained.batch_size, trained.epochs)
        return {
            "dp_epsilon": epsilon,
            "dp_delta": 1 / num_examples,
            "dp_clip": self.clip,
            "dp_batch_size": trained.batch_size,
            "dp_epochs": trained.epochs,
            "dp_learning_rate": trained.learning_rate,
        }


@cache
def _epsilon(noise: float, num_examples: int, batch_size: int, epochs: int) -> float:
    return accounted_epsilon(
        noise,
        num_examples=num_examples,
        batch_size=batch_size,
        epochs=epochs,
        delta=1 / num_examples,
    )
