"""What a sweep computes, stage by stage: functions of what they read, without files or devices.

    victim -> posteriors -> answers -> transfer set -> stolen model

Answers at all strengths are made in one pass over the queries. What the defence needs to know of a
query (for MAD: its Gram matrix) lives as long as its chunk of queries; answers alone are kept.
"""

from dataclasses import replace
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from madjax import defenses, evaluate
from madjax.attacks import Attack, World, keys, posteriors
from madjax.batching import QUERIES, map_chunks
from madjax.datasets import Family
from madjax.defenses import Defense
from madjax.models import Classifier

Array = jax.Array


@partial(jax.jit, static_argnums=0)
def victim_posteriors(network: Classifier, params: Any, images: Array) -> Array:
    """The victim's posteriors y [N, K] of images [N, H, W, C]."""
    return map_chunks(partial(network.posterior, params), images, 250)


def answers(
    rule: Defense,
    network: Classifier,
    known: Any,
    key: Array,
    images: np.ndarray,
    y: np.ndarray,
    strengths: tuple[float, ...],
) -> np.ndarray:
    """The answers to queries 0, 1, ..., N - 1 at each of E strengths: float32 [E, N, K].

    images [N, H, W, C] are the queries, y [N, K] the victim's posteriors of them; known is what the
    rule has prepared, and its randomness a function of key and a query's number. At most `QUERIES`
    queries at a time are on the device.
    """
    count = len(y)
    size = min(count, QUERIES)
    told = np.empty((len(strengths), *y.shape), np.float32)
    for at in range(0, count, size):
        # The last chunk is filled up with copies, so that one program serves all.
        numbers = np.minimum(np.arange(at, at + size, dtype=np.int32), count - 1)
        query = numbers, images[numbers], y[numbers]
        some = at_strengths(rule, network, known, key, query, np.float32(strengths))
        told[:, at : at + size] = some[:, : count - at]
    return told


@partial(jax.jit, static_argnums=(0, 1))
def at_strengths(
    rule: Defense,
    network: Classifier,
    known: Any,
    key: Array,
    query: tuple[Array, Array, Array],
    strengths: Array,
) -> Array:
    """`answers` to one chunk of queries (numbers [B], images [B, H, W, C], y [B, K]): [E, B, K]."""
    numbers, images, y = query
    evidence = rule.evidence(network.apply, known, images)

    def at(strength: Array) -> Array:
        return defenses.answers(rule, key, y, evidence, strength, numbers)

    return jax.lax.map(at, strengths)


@jax.jit
def utility(y: Array, y_tilde: Array, labels: Array) -> dict[str, Array]:
    """`madjax.evaluate.utility` at each of E strengths: y [T, K], y_tilde [E, T, K] -> [E] each."""
    return jax.lax.map(lambda told: evaluate.utility(y, told, labels), y_tilde)


def foreseen(
    attack: Attack,
    seed: int,
    images: np.ndarray,
    labels: np.ndarray,
    num_labels: int,
    num_classes: int,
    stolen: Classifier,
    family: Family,
) -> np.ndarray | None:
    """The own images that an attack sends, in order, int32 [budget]; None where it cannot be told.

    What `Attack.foreseen` says is tried: an attack that does not ask for these images by their
    index, in this order, is one that cannot be told.
    """
    tried = _tried(attack, num_labels, num_classes, stolen, family, seed, images, labels)
    return None if tried is None or not tried[1] else np.asarray(tried[0])


@partial(jax.jit, static_argnums=(0, 1, 2, 3, 4))
def _tried(
    attack: Attack,
    num_labels: int,
    num_classes: int,
    stolen: Classifier,
    family: Family,
    seed: Array,
    images: Array,
    labels: Array,
) -> tuple[Array, Array] | None:
    """What an attack says it will send, and whether it is what it asks for."""
    key = keys(seed)["draw"]
    drawn = attack.foreseen(key, len(images))
    if drawn is None:
        return None

    def told(numbers: Array, index: Array) -> Array:
        right = (drawn[numbers] == index)[:, None]
        return jnp.where(right, jnp.full((1, num_classes), 1 / num_classes), jnp.nan)

    def never(numbers: Array, images: Array) -> Array:
        del images
        return jnp.full((len(numbers), num_classes), jnp.nan)

    own = images, labels, num_labels, num_classes
    world = World(never, attack.budget, *own, stolen, family, key, told)
    attack = replace(attack, targets=posteriors)  # which say whether answers are numbers
    transfer = attack.begin(world)
    for r in range(attack.rounds):
        transfer = attack.proceed(jnp.int32(r), transfer, world)
    return drawn, jnp.isfinite(transfer.targets).all()
