"""Rows in chunks: bounded memory, one compiled body."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

Array = jax.Array


def map_chunks(function: Callable[[Any], Any], x: Any, chunk: int) -> Any:
    """Apply function to x [N, ...] in chunks of `chunk` rows, and join the results' first axes.

    x is an array or a pytree of arrays with the same N; function([n, ...]) -> a pytree of
    [n, ...], every row a function of its own row of x. Chunks are as even as can be; the last is
    padded with zeros, whose results are dropped, so that one body is compiled. A symbolic N, as in
    an export for batches of any size, is one chunk.
    """
    n = jax.tree.leaves(x)[0].shape[0]
    if not isinstance(n, int) or n <= chunk:
        return function(x)
    chunk = -(-n // -(-n // chunk))

    def cut(a: Array) -> Array:
        a = jnp.concatenate([a, jnp.zeros((-n % chunk, *a.shape[1:]), a.dtype)])
        return a.reshape(-1, chunk, *a.shape[1:])

    results = jax.lax.map(function, jax.tree.map(cut, x))
    return jax.tree.map(lambda a: a.reshape(-1, *a.shape[2:])[:n], results)


QUERIES = 1000
"""Solved at a time: an oracle may look at hundreds of candidates for every one."""
