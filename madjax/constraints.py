"""Utility constraints: distances between the perturbed and the true posterior (Eq. 7), and others.

A distance is a function (y_tilde[K], y[K]) -> scalar, zero where both agree. `madjax.solve` takes
any that does not fall along a ray leaving y (star-shaped balls about y).

A constraint is a function (y_tilde[K], y[K]) -> residuals, a scalar or an array, all of which are
<= 0 where it holds; `functools.partial` sets its parameters, which all have names:

    constraints = (partial(keep_label, margin=0.1), bound_entropy)
    solve(y, gram, epsilon=0.99, solver=LineSearch(constraints=constraints))

Those here are examples: any function that is differentiable in y_tilde will do.
"""

from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np

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


def off_the_simplex(y: np.ndarray) -> str:
    """What is wrong with rows [..., K] that are to be posteriors, to 0.01; nothing: ""."""
    if (unknown := ~np.isfinite(y).all(-1)).any():
        return f"NaN or infinity in {unknown.sum()} of {unknown.size}"
    total = y.sum(-1)
    if np.all(y >= -1e-6) and np.all(np.abs(total - 1) <= 0.01):
        return ""
    return (
        f"entries run from {y.min():g} to {y.max():g} and sum to {total.min():g} .. {total.max():g}"
    )


NORMS = frozenset({l1, l2, linf})
"""Distances with dist(y + a d, y) = a dist(y + d, y): the step has a closed form."""


def keep_label(y_tilde: Array, y: Array, *, margin: float = 0.0) -> Array:
    """The top label of y stays ahead of every other class by a margin: y~_j + margin <= y~_k.

    Residuals [K]; the first of equal top classes is the label. At margin 0 a solver leaves it ahead
    by 5e-7, or by what it is ahead in y; of top classes equal in y any may come out first.
    """
    label = y.argmax()
    behind = y_tilde + margin - y_tilde[label]
    return jnp.where(jnp.arange(y.size) == label, -1, behind)


def keep_top_k(y_tilde: Array, y: Array, *, k: int) -> Array:
    """The k most likely classes of y stay the k most likely, in any order.

    One residual: the largest entry outside less the smallest inside.
    """
    inside = jnp.zeros(y.size, bool).at[jax.lax.top_k(y, k)[1]].set(True)
    return jnp.where(inside, -jnp.inf, y_tilde).max() - jnp.where(inside, y_tilde, jnp.inf).min()


def bound_confidence(y_tilde: Array, y: Array, *, most: float) -> Array:
    """The confidence in y's top label changes by at most so much: |y~_k - y_k| <= most."""
    label = y.argmax()
    return jnp.abs(y_tilde[label] - y[label]) - most


def keep_bin(y_tilde: Array, y: Array, *, bins: int = 10) -> Array:
    """The confidence in y's top label stays in its bin of a reliability diagram, of width 1 / bins.

    Two residuals: the bin's lower end less the confidence, and the confidence less its upper end.
    """
    label = y.argmax()
    low = jnp.minimum(jnp.floor(y[label] * bins), bins - 1) / bins
    return jnp.stack([low - y_tilde[label], y_tilde[label] - low - 1 / bins])


def bound_entropy(y_tilde: Array, y: Array, *, least: float = 0.0, most: float = jnp.inf) -> Array:
    """The entropy of the answer lies between two numbers of bits."""
    del y
    bits = entropy(y_tilde)
    return jnp.stack([least - bits, jnp.where(jnp.isfinite(most), bits - most, -1)])


def bound_cost(y_tilde: Array, y: Array, *, cost: Sequence[Sequence[float]], most: float) -> Array:
    """Mean cost sum_ij y_i C_ij y~_j <= most, of acting on class j where the truth is class i.

    cost: C, [K, K]; truth and action are drawn from y and y~.
    """
    return jnp.matmul(jnp.matmul(y, jnp.asarray(cost, y.dtype)), y_tilde) - most


def cap(y_tilde: Array, y: Array, *, most: float) -> Array:
    """No class has more than so much: residuals y~ - most, [K]."""
    del y
    return y_tilde - most


def entropy(y: Array) -> Array:
    """-sum_k y_k log2 y_k in bits, in [0, log2 K] on the simplex; a class with y_k = 0 adds 0."""
    return jnp.sum(y * -jnp.log2(jnp.where(y > 0, y, 1)))
