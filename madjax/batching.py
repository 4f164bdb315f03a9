"""Rows in chunks: bounded memory, one compiled body."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

Array = jax.Array


def map_chunks(function: Callable[[Array], Any], x: Array, chunk: int) -> Any:
    """Function over x [N, ...] in chunks of `chunk` rows, results joined along their first axis.

    function([n, ...]) -> a pytree of [n, ...], every row a function of its own row of x. The last
    chunk is padded with zeros, whose results are dropped, so that one body is compiled.
    """
    n = x.shape[0]
    if n <= chunk:
        return function(x)
    x = jnp.concatenate([x, jnp.zeros((-n % chunk, *x.shape[1:]), x.dtype)])
    results = jax.lax.map(function, x.reshape(-1, chunk, *x.shape[1:]))
    return jax.tree.map(lambda a: a.reshape(-1, *a.shape[2:])[:n], results)
