"""Random keys by what they are for."""

from zlib import crc32

import jax
import numpy as np

Array = jax.Array


def stream(key: Array, name: str) -> Array:
    """The key for one purpose, which no sampler and no other purpose draws from.

    In JAX `split(key)[i]` is `fold_in(key, i)`, and samplers split the key that they are given: the
    key of a small number may be one that a sampler uses inside. Numbers of queries, epochs and
    rounds are below 2^31, and a stream's is above.
    """
    return jax.random.fold_in(key, np.uint32(crc32(name.encode()) | 1 << 31))
