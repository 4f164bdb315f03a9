"""The farthest angle in an L1 ball among answers that keep the top label.

Where the label's probability is fixed, v_k = h, "no other class is above h - margin" is a bound of
each class, so that what is kept of y and what is given are boxes again (`madjax.polytope`), and
`exchange` finds the best answer. h is searched on a line. Past 90 degrees the best H is a
quasi-concave function of h, with one maximum. Below there may be several. A grid finds the wide
ones; the narrow ones lie where the label and n other classes, equal but for the margin, share all
mass, and these h are looked at first.
"""

from functools import partial

import jax
import jax.numpy as jnp

from madjax.polytope import Polytope, best_linear, cosines, exchange, rounded, slopes
from madjax.steps import TOLERANCE

Array = jax.Array

GRID, ROUNDS = 20, 2
"""Values of h at a time; and how often they are taken anew between the neighbours of the best."""
ORDERS = 8
"""Orders of the classes, whose prefixes are kept and given: starts of `exchange` at each h."""
PER_CLASS = 5
"""At most so many exchanges for each class. Few starts would go on longer, by ever smaller gains,
and the whole batch would wait for them."""


def farthest_keeping_label(
    y: Array, gram: Array, c: Array, epsilon: Array | float, margin: Array | float
) -> Array:
    """The best answer v [K] found with |v - y|_1 <= epsilon and v_j + margin <= v_k, k = argmax y.

    y [K]; gram [K, K], c [K] as for `madjax.polytope.farthest`. y where there is no such answer.
    Without a margin the label stays ahead by 1e-6, or by as much as it is in y, so that no rounding
    makes another class the first.
    """
    gram = rounded(gram)
    top, others = y.max(), jnp.where(jnp.arange(y.size) == y.argmax(), -jnp.inf, y)
    margin = jnp.maximum(margin, jnp.minimum(top - others.max(), TOLERANCE))
    given = jnp.minimum(epsilon / 2, y.sum())
    low = jnp.maximum(top - given, (y.sum() + (y.size - 1) * margin) / y.size)
    high = jnp.minimum(top + given, y.sum())
    at = jax.vmap(partial(_best_at, y, gram, c, given, margin))

    def look(found: tuple, around: tuple) -> tuple[tuple, None]:
        width, places = around
        near = found[2] + width * jnp.linspace(-1, 1, GRID, dtype=y.dtype)
        h = jnp.append(jnp.clip(jnp.where(width > 0, near, places), low, high), top)
        cosine, points = at(h)
        i = cosine.argmin()
        new = (cosine[i], points[i], h[i])
        return jax.tree.map(partial(jnp.where, cosine[i] < found[0]), new, found), None

    n = jnp.arange(1, GRID + 1, dtype=y.dtype)
    ties = (y.sum() + n * margin) / (n + 1)
    places = jnp.stack([ties, jnp.linspace(low, high, GRID, dtype=y.dtype)])
    closer = (high - low) / 2 * (2 / (GRID - 1)) ** jnp.arange(1, ROUNDS + 1, dtype=y.dtype)
    rounds = (jnp.append(jnp.zeros(2, y.dtype), closer), jnp.pad(places, ((0, ROUNDS), (0, 0))))
    begin = (jnp.full((), jnp.inf, y.dtype), y, top)
    return jax.lax.scan(look, begin, rounds)[0][1]


def _best_at(
    y: Array, gram: Array, c: Array, given: Array, margin: Array | float, h: Array
) -> tuple[Array, Array]:
    """The smallest cosine with v_k = h, and the answer [K]; infinity where there is none.

    From two starts: as much given as may be, and as little.
    """
    slices, known = _slices(y, given, margin, h)
    ends = jax.vmap(partial(_ascended, gram=gram, c=c))(slices)
    cosine = jnp.where(known, cosines(ends, gram, c), jnp.inf)
    return cosine.min(), ends[cosine.argmin()]


def _ascended(polytope: Polytope, gram: Array, c: Array) -> Array:
    """The answer [K] that `exchange` finds from the best of some pairs of prefixes."""
    x = jax.vmap(partial(best_linear, polytope))(slopes(gram, c, ORDERS))
    n, _, k = x.shape
    kept, others = (jnp.broadcast_to(a, (n, n, k)) for a in (x[:, None, 0], x[None, :, 1]))
    starts = jnp.stack([kept, others], axis=2).reshape(n * n, 2, k)
    start = starts[cosines(starts.sum(axis=1), gram, c).argmin()]
    return exchange(polytope, gram, c, start, PER_CLASS * c.size).sum(axis=0)


def _slices(y: Array, given: Array, margin: Array | float, h: Array) -> tuple[Polytope, Array]:
    """The answers with v_k = h, twice, begun with as much given as may be and as little.

    And if there are any. A class that may have more than it has gets up to the difference, one that
    may have less keeps that at most.
    """
    label = jnp.arange(y.size) == y.argmax()
    cap = jnp.maximum(h - margin, 0)
    kept = jnp.where(label, jnp.minimum(y, h), jnp.minimum(y, cap))
    added = jnp.where(label, jnp.maximum(h - y, 0), jnp.maximum(cap - y, 0))
    high = jnp.stack([kept, added])
    low = jnp.where(label[None], high, 0)
    most = jnp.minimum(jnp.minimum(given, added.sum()), y.sum() - low[0].sum())
    least = jnp.maximum(y.sum() - kept.sum(), low[1].sum())
    begun = jnp.stack([most, least])
    mass = jnp.stack([y.sum() - begun, begun], axis=1)
    twice = jax.tree.map(lambda a: jnp.stack([a, a]), (low, high))
    return Polytope(*twice, mass, jnp.stack([most, most])), least <= most
