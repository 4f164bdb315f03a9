"""Small linear algebra, K x K, in full float32."""

from functools import partial

import jax
import jax.numpy as jnp

Array = jax.Array

dot = partial(jnp.matmul, precision="highest")
"""A product in full float32, where TPUs and recent GPUs would round to bfloat16 or TF32."""


def solved(a: Array, b: Array) -> Array:
    """The x [K] with a x = b, for a [K, K] positive definite, by Gauss and Jordan's elimination.

    In place of `jnp.linalg.solve`, whose LAPACK call waits for ever when several CPU devices share
    few threads (jaxlib 0.10), and which an exported file would have to carry.
    """
    k = b.size

    def eliminate(i: Array, rows: Array) -> Array:
        pivot = rows[i] / rows[i, i]
        return (rows - rows[:, i][:, None] * pivot[None]).at[i].set(pivot)

    return jax.lax.fori_loop(0, k, eliminate, jnp.concatenate([a, b[:, None]], axis=1))[:, -1]
