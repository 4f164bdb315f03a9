"""Which set of classes, given the top class, turns the gradient farthest: the search of MAD-argmax.

The vertices of {v on the simplex: v_0 >= v_j} are the uniform distributions on the 2^(K-1) subsets
S of classes that contain class 0. With M = G G' and u = M y the cosine of the angle is, up to the
factor 1/|G'y|, sum_S u / sqrt(1_S' M 1_S): from M every subset costs a few additions.
"""

from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from madjax.linear import dot

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
    """The best of all 2^(K-1) subsets, compared 1,024 at a time.

    1_S'M 1_S is a product of M's upper triangle with a 0/1 matrix that is the same for every query,
    so that a batch of queries is one matrix product.
    """
    k = u.size
    left, right = np.triu_indices(k)
    triangle = jnp.where(left == right, 1, 2) * gram[left, right]
    codes = jnp.arange(2 ** (k - 1)).reshape(-1, min(2 ** (k - 1), 1024))

    def subsets(codes: Array) -> Array:
        members = (codes[:, None] >> jnp.arange(k - 1)[None]) & 1
        return jnp.pad(members, ((0, 0), (1, 0)), constant_values=1).astype(gram.dtype)

    def compare(best: tuple[Array, Array], codes: Array) -> tuple[tuple[Array, Array], None]:
        members = subsets(codes)
        square = dot(members[:, left] * members[:, right], triangle)
        cosine = _cosine(dot(members, u), square, _noise(gram, members.sum(axis=1)))
        at = cosine.argmin()
        better = cosine[at] < best[0]
        return jax.tree.map(partial(jnp.where, better), (cosine[at], codes[at]), best), None

    none = (jnp.full((), jnp.inf, gram.dtype), jnp.zeros((), codes.dtype))
    (cosine, code), _ = jax.lax.scan(compare, none, codes)
    return Subset(subsets(code[None])[0], cosine)


def search(gram: Array, u: Array) -> Subset:
    """The best of three local searches.

    They start from the best subset that greedy growth from {0} meets, from the best that shrinking
    the whole set meets, and from the best of `sorted_prefixes`. Each makes the best of all single
    additions, removals and exchanges until none helps, at most 4 K of them, at O(K^2) a move.
    """
    start = jnp.stack([jnp.zeros_like(u).at[0].set(1), jnp.ones_like(u)])
    greedy = jax.vmap(_greedy, in_axes=(0, 0, None, None))(start, jnp.array([True, False]), gram, u)
    starts = jax.tree.map(
        lambda a, b: jnp.concatenate([a, b[None]]), greedy, sorted_prefixes(gram, u)
    )
    found = jax.vmap(_improve, in_axes=(0, None, None))(starts, gram, u)
    return jax.tree.map(lambda a: a[found.cosine.argmin()], found)


def sorted_prefixes(gram: Array, u: Array, directions: int = 32) -> Subset:
    """The best of {0} with the first n classes, n = 0..K-1, in the orders of some scores.

    The scores are cos(t) u_k + sin(t) M_kk, u and diag M scaled alike, t over half a circle. With
    last-layer gradients, M ~ (I - 1 p')(I - 1 p')', the best subset of each size n <= K is such a
    prefix for some t wherever its angle is above 90 degrees: there its cosine, a function of
    sum_S (y - p) and sum_S p alone, is best at a corner of their convex hull.
    """

    def scaled(v: Array) -> Array:
        v = v - v.mean()
        return v / jnp.maximum(jnp.abs(v).max(), jnp.finfo(v.dtype).tiny)

    def prefixes(t: Array) -> tuple[Array, Array]:
        score = jnp.cos(t) * scaled(u) + jnp.sin(t) * scaled(jnp.diagonal(gram))
        order = jnp.argsort(score.at[0].set(-jnp.inf))
        square = jnp.diagonal(gram[order][:, order].cumsum(axis=0).cumsum(axis=1))
        cosine = _cosine(u[order].cumsum(), square, _noise(gram, 1.0 + jnp.arange(u.size)))
        best = cosine.argmin()
        return cosine[best], jnp.zeros_like(u).at[order].set(jnp.arange(u.size) <= best)

    cosine, members = jax.vmap(prefixes)(jnp.linspace(-jnp.pi / 2, jnp.pi / 2, directions))
    return _judge(members[cosine.argmin()], gram, u)


def cone_bound(gram: Array, u: Array, steps: int = 400) -> Array:
    """The smallest cosine, up to 1/|G'y|, of any v with v_0 >= v_j >= 0: below it is no subset.

    max over the cone of (-u'v) / |G'v| is |G'v| at the v that minimises |G'v|^2 / 2 + u'v there, a
    convex problem; `steps` of projected gradients with restarted momentum. 0 where all of the
    cone's angles are below 90 degrees, which bounds nothing closer. gram [K, K], u = gram @ y [K].
    """
    rate = 1 / jnp.maximum(jnp.abs(gram).sum(axis=1).max(), jnp.finfo(gram.dtype).tiny)

    def step(carry: tuple[Array, Array, Array], _: None) -> tuple[Any, None]:
        v, ahead, t = carry
        new = _project(ahead - rate * (dot(gram, ahead) + u))
        backwards = jnp.vdot(ahead - new, new - v) > 0
        t = jnp.where(backwards, 1.0, t)
        grown = (1 + jnp.sqrt(1 + 4 * t**2)) / 2
        momentum = jnp.where(backwards, 0, (t - 1) / grown)
        return (new, new + momentum * (new - v), grown), None

    zero = jnp.zeros_like(u)
    (v, _, _), _ = jax.lax.scan(step, (zero, zero, jnp.ones((), u.dtype)), length=steps)
    # At the minimum u'v = -v'Mv; this is the larger of the two ways to say so.
    return -jnp.sqrt(jnp.maximum(dot(v, dot(gram, v)), -dot(u, v)).clip(0))


def _project(z: Array) -> Array:
    """The nearest point with v_0 >= v_j >= 0: entries above the level t come down to it."""
    order = jnp.sort(z[1:])[::-1]
    sums = z[0] + jnp.append(0.0, order.cumsum())
    levels = sums / jnp.arange(1, z.size + 1)
    # The level of n capped entries is right where the n-th is above it and the next is not.
    level = jnp.max(levels).clip(0)
    return jnp.clip(z, 0, level).at[0].set(level)


def _cosine(inner: Array, square: Array, noise: Array) -> Array:
    known = square > noise
    return jnp.where(known, inner / jnp.sqrt(jnp.where(known, square, 1)), jnp.inf)


def _noise(gram: Array, size: Array) -> Array:
    """What rounding leaves of |G'1_S|^2, which is at most |S| sum_S M_kk <= |S|^2 max M_kk."""
    return gram.shape[0] * jnp.finfo(gram.dtype).eps * size**2 * jnp.diagonal(gram).max()


def _judge(members: Array, gram: Array, u: Array) -> Subset:
    square = dot(members, dot(gram, members))
    return Subset(members, _cosine(dot(members, u), square, _noise(gram, members.sum())))


def _better(a: Subset, b: Subset) -> Subset:
    return jax.tree.map(lambda v, w: jnp.where(a.cosine < b.cosine, v, w), a, b)


def _toggled(members: Array, gram: Array, u: Array) -> Array:
    """Cosines [K] of the subsets with class j added, or removed if it is in; class 0 stays."""
    sign, m = 1 - 2 * members, dot(gram, members)
    square = dot(members, m) + 2 * sign * m + jnp.diagonal(gram)
    cosine = _cosine(dot(members, u) + sign * u, square, _noise(gram, members.sum() + sign))
    return cosine.at[0].set(jnp.inf)


def _exchanged(members: Array, gram: Array, u: Array) -> Array:
    """Cosines [K, K] of the subsets with class i taken out and class j put in."""
    m, d = dot(gram, members), jnp.diagonal(gram)
    change = (d - 2 * m)[:, None] + (d + 2 * m)[None, :] - 2 * gram
    inner = dot(members, u) - u[:, None] + u[None, :]
    cosine = _cosine(inner, dot(members, m) + change, _noise(gram, members.sum()))
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
