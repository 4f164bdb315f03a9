"""Utility constraints: distances between the perturbed and the true posterior (Eq. 7).

A distance is a function (y_tilde[K], y[K]) -> scalar, zero where both agree. `madjax.solve` takes
any that does not fall along a ray leaving y (star-shaped balls about y).
"""

import jax
import jax.numpy as jnp

Array = jax.Array


def l1(y_tilde: Array, y: Array) -> Array:
    """sum_k |y~_k - y_k|, in [0, 2] on the simplex: the paper's distance."""
    return jnp.abs(y_tilde - y).sum()


def l2(y_tilde: Array, y: Array) -> Array:
    """sqrt(sum_k (y~_k - y_k)^2), in [0, sqrt(2)] on the simplex; its gradient at y~ = y is 0."""
    square = jnp.square(y_tilde - y).sum()
    return jnp.where(square > 0, jnp.sqrt(jnp.where(square > 0, square, 1)), 0)


def linf(y_tilde: Array, y: Array) -> Array:
    """max_k |y~_k - y_k|, in [0, 1] on the simplex."""
    return jnp.abs(y_tilde - y).max()


def kl(y_tilde: Array, y: Array) -> Array:
    """KL(y || y~) = sum_k y_k log(y_k / y~_k) in nats, in [0, inf]: the authors' direction.

    A class with y_k = 0 adds nothing; y_k > 0 = y~_k makes it infinite.
    """
    known = y > 0
    ratio = jnp.where(known, y, 1) / jnp.where(known, y_tilde, 1)
    return jnp.maximum(jnp.sum(y * jnp.log(ratio)), 0)


NORMS = frozenset({l1, l2, linf})
"""Distances with dist(y + a d, y) = a dist(y + d, y): the step has a closed form."""
