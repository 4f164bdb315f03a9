"""Oracles that MAD is compared with: what is lost without its objective, its Jacobian, its search.

Each is an oracle (y, gram) -> y*, to be given to `madjax.solve`, `madjax.perturb` or `madjax.MAD`
in place of `madjax.extreme`. The ablation G = I is no oracle but a Gram matrix:
`layers="identity"`.
"""

import jax
import jax.numpy as jnp

from madjax.linear import dot
from madjax.objectives import defined

Array = jax.Array


def extreme_unnormalised(y: Array, gram: Array) -> Array:
    """y*: the vertex e_k with the largest |G'(e_k - y)|^2 = M_kk - 2 (M y)_k + y'M y.

    The authors' code maximises this, Eq. 4 without the two norms, unless `objmax` is set. With
    last-layer gradients the surrogate drops out of it, and it is `argmin`. y [K], gram [K, K] ->
    one-hot [K]; the first of equal vertices; y where G'y vanishes, as with `madjax.extreme`.
    """
    square = jnp.diagonal(gram) - 2 * dot(gram, y)
    return jnp.where(defined(y, gram), _vertex(square.argmax(), y), y)


def argmin(y: Array, gram: Array) -> Array:
    """y*: the vertex of the least likely class, whatever the gradients (section 5.2).

    y [K] -> one-hot [K]; the first of equally unlikely classes.
    """
    del gram
    return _vertex(y.argmin(), y)


def random_vertex(y: Array, gram: Array) -> Array:
    """y*: a random vertex, whatever the gradients (section 5.2).

    Drawn from the bits of y: uniform over the classes, and the same for equal posteriors, so that
    asking again tells an attacker nothing. y [K] -> one-hot [K].
    """
    del gram
    bits = jax.lax.bitcast_convert_type(y.astype(jnp.float32), jnp.uint32)
    # Fibonacci hashing of every class's bits with its place; sums of whole numbers have no order.
    places = 2 * jnp.arange(y.size, dtype=jnp.uint32) + jnp.uint32(0x9E3779B1)
    mixed = (bits ^ (bits >> 15)) * places
    key = jax.random.fold_in(jax.random.key(0), mixed.sum())
    return _vertex(jax.random.randint(key, (), 0, y.size), y)


def _vertex(k: Array, y: Array) -> Array:
    return jax.nn.one_hot(k, y.size, dtype=y.dtype)
