"""Knockoff Nets (Orekondy et al., 2019) with the random strategy, as in the paper.

Draw B images without replacement from a set of natural images that need not resemble the
victim's, ask the defended victim for each one's posterior, and train a fresh network on the
pairs: the transfer set.
"""

from collections.abc import Callable

import jax
import jax.numpy as jnp

from madjax.errors import InputError
from madjax.models import Classifier
from madjax.train import Recipe, State, fit

Array = jax.Array
Query = Callable[[Array, Array], Array]
"""The defended victim: (key, images [B, H, W, C]) -> y_tilde [B, K]."""


def draw(key: Array, num_images: int, budget: int) -> Array:
    """Which images of the query set are sent: `budget` distinct indices, a function of the key.

    A larger budget with the same key extends a smaller one.

    Raises:
        InputError: a budget larger than the query set, or not positive.
    """
    check_budget(budget, num_images)
    return jax.random.permutation(key, num_images)[:budget]


def check_budget(budget: int, num_images: int) -> None:
    """Refuse a budget that the query set cannot serve without repeating an image."""
    if not 1 <= budget <= num_images:
        raise InputError(
            f"budget is {budget}: the query set holds {num_images} images, "
            f"give a budget from 1 to {num_images}"
        )


def keys(seed: Array | int) -> dict[str, Array]:
    """The keys of an attack with this seed, by what they are for.

    They depend on the seed alone: every strength of a defence meets the same images, the same
    initial network and the same order, and adding cells to a grid changes no other cell.
    """
    uses = ("draw", "surrogate", "defense", "train")
    return dict(zip(uses, jax.random.split(jax.random.key(seed), len(uses)), strict=True))


def knockoff(
    seed: int,
    query: Query,
    images: Array,
    budget: int,
    classifier: Classifier,
    recipe: Recipe,
    test: tuple[Array, Array],
) -> State:
    """The whole attack on one defended victim: the trained stolen model and its accuracies.

    images uint8 [N, H, W, C] is the query set; classifier and recipe are the attacker's; test =
    (images, labels) is the victim's test set, on which the stolen model is judged.
    """
    key = keys(seed)
    x = jnp.asarray(images)[draw(key["draw"], len(images), budget)]
    return fit(classifier, recipe, key["train"], (x, query(key["defense"], x)), test)
