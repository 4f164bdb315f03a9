"""How far along a segment an answer may go: the step of Algorithm 1, and constraints beside it.

A constraint is a function (y_tilde[K], y[K]) -> residuals, a scalar or an array: it holds where all
of them are <= 0.
"""

from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp

from madjax.constraints import NORMS, l1

Array = jax.Array
Distance = Callable[[Array, Array], Array]
Constraint = Callable[[Array, Array], Array]

TOLERANCE = 1e-6
"""A residual up to this is taken as 0: y itself meets many constraints only up to rounding."""


def residuals(y_tilde: Array, y: Array, constraints: Sequence[Constraint]) -> Array:
    """All residuals of all constraints, [R]; NaN counts as broken, and is inf."""
    each = [jnp.ravel(jnp.asarray(rule(y_tilde, y), y.dtype)) for rule in constraints]
    found = jnp.concatenate([jnp.zeros(0, y.dtype), *each])
    return jnp.where(jnp.isnan(found), jnp.inf, found)


def residual(y_tilde: Array, y: Array, constraints: Sequence[Constraint]) -> Array:
    """The largest residual of all constraints, -inf without any; NaN counts as broken."""
    return residuals(y_tilde, y, constraints).max(initial=-jnp.inf)


def holds(y_tilde: Array, y: Array, constraints: Sequence[Constraint]) -> Array:
    """Whether no residual at y_tilde is above `TOLERANCE`."""
    return residual(y_tilde, y, constraints) <= TOLERANCE


def step(y: Array, y_star: Array, epsilon: Array | float, distance: Distance = l1) -> Array:
    """y~ = (1 - a) y + a y*, a the largest in [0, 1] with distance(y~, y) <= epsilon (OptStep).

    y, y_star [K] -> y_tilde [K]. a = min(epsilon / ||y - y*||_p, 1) for norms (the paper prints
    max, a slip); 32 bisections for any other distance, which must not fall along the segment.
    epsilon = 0 returns y and epsilon >= distance(y*, y) returns y*, both bit for bit.
    """
    if distance in NORMS:
        far = distance(y_star, y)
        a = jnp.where(far > 0, jnp.clip(epsilon / jnp.where(far > 0, far, 1), 0, 1), 0)
        # A distance of 2 may come out as the next number above: that is still all the way.
        a = jnp.where(a > 1 - 3 * jnp.finfo(y.dtype).eps, 1, a)
    else:
        a = _bisect(lambda a: distance((1 - a) * y + a * y_star, y) <= epsilon, y.dtype)
        # Rounding may hide a small distance, yet a budget of 0 must change nothing.
        a = jnp.where(epsilon > 0, a, 0)
    return (1 - a) * y + a * y_star


def _bisect(feasible: Callable[[Array], Array], dtype: Any) -> Array:
    """The largest a in [0, 1] with feasible(a), for a predicate true up to a point and then false.

    0 is taken as feasible without asking.
    """

    def halve(_: int, bounds: tuple[Array, Array]) -> tuple[Array, Array]:
        low, high = bounds
        middle = (low + high) / 2
        inside = feasible(middle)
        return jnp.where(inside, middle, low), jnp.where(inside, high, middle)

    one = jnp.ones((), dtype)
    low, _ = jax.lax.fori_loop(0, 32, halve, (jnp.zeros((), dtype), one))
    return jnp.where(feasible(one), one, low)


def reach(start: Array, end: Array, y: Array, constraints: Sequence[Constraint]) -> Array:
    """The point of the segment nearest to its end, of those found, where the constraints hold.

    start, end, y [K] -> [K]. end itself if they hold there, else 32 bisections from start, at which
    they must hold: the last point at which they do, where they hold up to a point only. A residual
    that is below 0 at the start stays below it, by 5e-7 or as much as there: a top label that has
    to be kept is then ahead, and not level.
    """
    first = residuals(start, y, constraints)
    # Stricter than `holds`, as the point that is returned may be rounded otherwise.
    most = jnp.where(first < 0, jnp.maximum(first, -TOLERANCE / 2), TOLERANCE / 2)

    def inside(a: Array) -> Array:
        return (residuals((1 - a) * start + a * end, y, constraints) <= most).all()

    a = _bisect(inside, y.dtype)
    return (1 - a) * start + a * end
