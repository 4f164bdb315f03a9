"""Which set of classes, given the top class, turns the gradient farthest: the search of MAD-argmax.

The vertices of {v on the simplex: v_0 >= v_j} are the uniform distributions on the 2^(K-1) subsets
S of classes that contain class 0. With M = G G' and u = M y the cosine of the angle is, up to the
factor 1/|G'y|, sum_S u / sqrt(1_S' M 1_S): from M every subset costs a few additions.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

Array = jax.Array

EXHAUSTIVE = 16
"""Up to so many classes all subsets are compared."""


class Subset(NamedTuple):
    """A subset of classes and its cosine."""

    members: Array
    """0/1 [K]; class 0 is always in."""
    cosine: Array
    """Up to the factor 1/|G'y|; infinite where G'1_S is lost in rounding."""


def best_subset(gram: Array, u: Array) -> Subset:
    """The subset with class 0 and the smallest cosine: gram [K, K], u = gram @ y [K].

    Exact for K <= `EXHAUSTIVE`; beyond, a subset that no class added, removed or exchanged
    improves, and at least as good as all that greedy growth from {0} meets on its way.
    """
    return exhaustive(gram, u) if u.size <= EXHAUSTIVE else search(gram, u)


def exhaustive(gram: Array, u: Array) -> Subset:
    """The best of all 2^(K-1) subsets, compared in one product."""
    rest = u.size - 1
    bits = (np.arange(2**rest)[:, None] >> np.arange(rest)[None]) & 1
    subsets = jnp.asarray(np.pad(bits, ((0, 0), (1, 0)), constant_values=1), gram.dtype)
    square = jnp.sum(_dot(subsets, gram) * subsets, axis=1)
    cosine = _cosine(_dot(subsets, u), square, _noise(gram, subsets.sum(axis=1)))
    best = cosine.argmin()
    return Subset(subsets[best], cosine[best])


def search(gram: Array, u: Array) -> Subset:
    """The better of two local searches: from the best of growing {0}, and of shrinking the whole.

    Each makes the best of all single additions, removals and exchanges until none helps, at most
    4 K of them, at O(K^2) a move.
    """
    whole = jnp.ones_like(u)
    starts = jnp.stack([jnp.zeros_like(u).at[0].set(1), whole])
    grow = jnp.array([True, False])
    found = jax.vmap(lambda s, g: _improve(_greedy(s, g, gram, u), gram, u))(starts, grow)
    return jax.tree.map(lambda a: a[found.cosine.argmin()], found)


def _dot(a: Array, b: Array) -> Array:
    return jnp.matmul(a, b, precision="highest")


def _cosine(inner: Array, square: Array, noise: Array) -> Array:
    known = square > noise
    return jnp.where(known, inner / jnp.sqrt(jnp.where(known, square, 1)), jnp.inf)


def _noise(gram: Array, size: Array) -> Array:
    """What rounding leaves of |G'1_S|^2, which is at most |S| sum_S M_kk <= |S|^2 max M_kk."""
    return gram.shape[0] * jnp.finfo(gram.dtype).eps * size**2 * jnp.diagonal(gram).max()


def _judge(members: Array, gram: Array, u: Array) -> Subset:
    square = _dot(members, _dot(gram, members))
    return Subset(members, _cosine(_dot(members, u), square, _noise(gram, members.sum())))


def _better(a: Subset, b: Subset) -> Subset:
    return jax.tree.map(lambda v, w: jnp.where(a.cosine < b.cosine, v, w), a, b)


def _toggled(members: Array, gram: Array, u: Array) -> Array:
    """Cosines [K] of the subsets with class j added, or removed if it is in; class 0 stays."""
    sign, m = 1 - 2 * members, _dot(gram, members)
    square = _dot(members, m) + 2 * sign * m + jnp.diagonal(gram)
    cosine = _cosine(_dot(members, u) + sign * u, square, _noise(gram, members.sum() + sign))
    return cosine.at[0].set(jnp.inf)


def _exchanged(members: Array, gram: Array, u: Array) -> Array:
    """Cosines [K, K] of the subsets with class i taken out and class j put in."""
    m, d = _dot(gram, members), jnp.diagonal(gram)
    change = (d - 2 * m)[:, None] + (d + 2 * m)[None, :] - 2 * gram
    inner = _dot(members, u) - u[:, None] + u[None, :]
    cosine = _cosine(inner, _dot(members, m) + change, _noise(gram, members.sum()))
    leaves = members.astype(bool).at[0].set(False)
    return jnp.where(leaves[:, None] & (members == 0)[None, :], cosine, jnp.inf)


def _greedy(start: Array, grow: Array, gram: Array, u: Array) -> Subset:
    """The best subset on the way of adding (or removing) the best class until none is left."""

    def move(carry: tuple[Array, Subset], _: None) -> tuple[tuple[Array, Subset], None]:
        members, best = carry
        free = (members == 0) == grow
        # Not infinity, which marks class 0 and lost directions: a free class must be moved.
        cosine = jnp.nan_to_num(_toggled(members, gram, u), posinf=jnp.finfo(u.dtype).max)
        at = jnp.where(free.at[0].set(False), cosine, jnp.inf).argmin()
        members = members.at[at].set(jnp.where(grow, 1.0, 0.0))
        return (members, _better(_judge(members, gram, u), best)), None

    (_, best), _ = jax.lax.scan(move, (start, _judge(start, gram, u)), length=u.size - 1)
    return best


def _improve(start: Subset, gram: Array, u: Array) -> Subset:
    """Local search: the best single move, while it helps."""

    def move(carry: tuple[Array, Subset, Array]) -> tuple[Array, Subset, Array]:
        count, now, _ = carry
        toggled, exchanged = _toggled(now.members, gram, u), _exchanged(now.members, gram, u)
        at = toggled.argmin()
        leave, enter = jnp.unravel_index(exchanged.argmin(), exchanged.shape)
        by_toggle = now.members.at[at].set(1 - now.members[at])
        by_exchange = now.members.at[leave].set(0).at[enter].set(1)
        chosen = jnp.where(toggled.min() <= exchanged.min(), by_toggle, by_exchange)
        new = _judge(chosen, gram, u)
        return count + 1, _better(new, now), new.cosine < now.cosine

    begin = (jnp.zeros((), jnp.int32), start, jnp.ones((), bool))
    return jax.lax.while_loop(lambda c: c[2] & (c[0] < 4 * u.size), move, begin)[1]
