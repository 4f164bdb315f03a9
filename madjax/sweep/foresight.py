"""What an attack will send, told before any answer."""

from dataclasses import replace
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np

from madjax.attacks import Attack, World, keys, posteriors
from madjax.sweep.stages import Parties, unanswered

Array = jax.Array


def foreseen(
    parties: Parties, attack: Attack, seed: int, images: np.ndarray, labels: np.ndarray
) -> np.ndarray | None:
    """The own images that an attack sends, in order, int32 [budget]; None where it cannot be told.

    What `Attack.foreseen` says is tried: an attack that does not ask for these images by their
    index, in this order, is one that cannot be told.
    """
    tried = _tried(parties, attack, np.uint32(seed), images, labels)
    return None if tried is None or not tried[1] else np.asarray(tried[0])


@partial(jax.jit, static_argnums=(0, 1))
def _tried(
    parties: Parties, attack: Attack, seed: Array, images: Array, labels: Array
) -> tuple[Array, Array] | None:
    """What an attack says it will send, and whether it is what it asks for."""
    key = keys(seed)["draw"]
    drawn = attack.foreseen(key, len(images))
    if drawn is None:
        return None

    def told(numbers: Array, index: Array) -> Array:
        right = (drawn[numbers] == index)[:, None]
        return jnp.where(
            right, jnp.full((1, parties.num_classes), 1 / parties.num_classes), jnp.nan
        )

    never = unanswered(parties.num_classes)
    own = images, labels, parties.num_labels, parties.num_classes
    world = World(never, attack.budget, *own, parties.stolen, parties.family, key, told)
    attack = replace(attack, targets=posteriors)  # which say whether answers are numbers
    transfer = attack.begin(world)
    for r in range(attack.rounds):
        transfer = attack.proceed(jnp.int32(r), transfer, world)
    return drawn, jnp.isfinite(transfer.targets).all()
