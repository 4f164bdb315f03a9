"""What an answer may maximise: functions (y_tilde [K], y [K], gram [K, K]) -> scalar.

`deviation` is MAD's, H; `angle` is the same in degrees. The others are given to `madjax.Ascend` as
`objective=`. (The line search takes its target from an oracle, whatever is maximised.)
"""

from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp

from madjax.linear import dot

Array = jax.Array
Objective = Callable[[Array, Array, Array], Array]
"""(y_tilde [K], y [K], gram [K, K]) -> scalar, to be maximised."""


def norm(v: Array, gram: Array, *, margin: float = 1) -> Array:
    """|G'v|, with 0 where rounding leaves nothing of it.

    With a margin above 1, 0 also where |G'v|^2 is at most that many times its rounding errors:
    another program, which rounds otherwise, may find nothing left there.

    G'p = 0 at the surrogate's posterior p (score identity), so near it v'Mv is a difference of
    larger numbers, and holds no information below their rounding errors: eps |v|'|M||v| of the
    products and of M itself, and eps^2 max_k M_kk |v|_1^2 of G, whose rows e_k - p have the error
    of a p near 1. The factors are twice what was found for y = p (`test_noise_is_bounded`).
    """
    square, size = dot(v, dot(gram, v)), jnp.abs(v)
    eps = jnp.finfo(gram.dtype).eps
    noise = 8 * eps * dot(size, dot(jnp.abs(gram), size))
    noise += jnp.square(4 * eps * size.sum()) * jnp.diagonal(gram).max()
    return _root(jnp.where(square > margin * noise, square, 0))


def unit(v: Array, gram: Array) -> tuple[Array, Array]:
    """V / |G'v| and whether it is defined; zeros where it is not."""
    length = norm(v, gram)
    known = length > 0
    return jnp.where(known, v / jnp.where(known, length, 1), 0), known


def defined(y: Array, gram: Array) -> Array:
    """Whether the true gradient G'y has a direction: False where y is the surrogate's posterior.

    y [K], gram [K, K] -> bool. `solve` returns y unchanged exactly where this is False. What
    float32 cannot tell from p counts as p. Near a p without a favourite that is an L1 distance up
    to about 1e-3, whatever K is; near a confident p it is a small part of 1 - max p.
    """
    y, gram = _at_least_float32(y, gram)
    return norm(y, gram) > 0


def deviation(y_tilde: Array, y: Array, gram: Array) -> Array:
    """H(y~) = || a/|a| - u/|u| ||^2 with a = G'y~ and u = G'y (Eq. 4), in [0, 4].

    y_tilde [K], y [K], gram [K, K] -> scalar. Computed as d'Md with d = y~/|a| - y/|u|, which
    keeps its digits at small angles where 2 - 2 cos loses them. 0 where either gradient vanishes
    and the angle is undefined. Does not change with `gram -> c gram`, c > 0. Half precision is
    taken as float32.
    """
    y_tilde, y, gram = _at_least_float32(y_tilde, y, gram)
    (a, a_known), (u, u_known) = unit(y_tilde, gram), unit(y, gram)
    d = a - u
    return jnp.where(a_known & u_known, jnp.clip(dot(d, dot(gram, d)), 0, 4), 0)


def angle(y_tilde: Array, y: Array, gram: Array) -> Array:
    """The angle between the poisoned and the true gradient, in degrees, in [0, 180].

    y_tilde [K], y [K], gram [K, K] -> scalar. 2 atan2(|a/|a| - u/|u||, |a/|a| + u/|u||), accurate
    at both ends (Kahan 2006, section 12). 0 where it is undefined, as in `deviation`. At 0 and 180
    degrees, where it has a kink, its gradient is taken as 0.
    """
    y_tilde, y, gram = _at_least_float32(y_tilde, y, gram)
    (a, a_known), (u, u_known) = unit(y_tilde, gram), unit(y, gram)
    known = a_known & u_known
    difference, total = (_root(dot(d, dot(gram, d))) for d in (a - u, a + u))
    # atan2 has no gradient at (0, 0).
    return _angle(jnp.where(known, difference, 0), jnp.where(known, total, 1))


def _angle(difference: Array, total: Array) -> Array:
    """The angle in degrees between unit vectors, by the lengths of their difference and sum."""
    return jnp.degrees(2 * jnp.arctan2(difference, total))


def _root(square: Array) -> Array:
    """The square root, with 0 and a gradient of 0 where rounding leaves no positive number."""
    none = square <= 0
    return jnp.where(none, 0, jnp.sqrt(jnp.where(none, 1, square)))


def _at_least_float32(*arrays: Array) -> tuple[Array, ...]:
    """Arrays in float32, or float64 where one is; half precision and integers have no digits."""
    return tuple(
        jnp.asarray(a, jnp.promote_types(jnp.result_type(*arrays), jnp.float32)) for a in arrays
    )


def angle_between(a: Any, u: Any) -> Array:
    """The angle between two gradients, pytrees of the same shapes: degrees in [0, 180].

    What `angle` has from the Gram matrix of one query, for gradients that are at hand, such as
    those of a batch. 0 where either vanishes, NaN where either is not finite. Accumulated in
    float32, by the same formula; the squares of numbers that are far from 1 would leave it, so each
    gradient is divided by its largest entry first.
    """

    def scaled(tree: Any) -> list[Array]:
        leaves = [leaf.astype(jnp.float32) for leaf in jax.tree.leaves(tree)]
        largest = jnp.stack([jnp.abs(leaf).max() for leaf in leaves]).max()
        return [leaf / jnp.where(largest == 0, 1, largest) for leaf in leaves]

    a, u = scaled(a), scaled(u)

    def total_length(leaves: list[Array]) -> Array:
        return _root(sum(jnp.square(leaf).sum() for leaf in leaves))

    (a_norm, u_norm) = total_length(a), total_length(u)
    known = (a_norm != 0) & (u_norm != 0)  # NaN is neither known to vanish, nor known not to
    a_unit, u_unit = (
        [leaf / jnp.where(known, length, 1) for leaf in leaves]
        for leaves, length in ((a, a_norm), (u, u_norm))
    )
    difference = total_length([p - q for p, q in zip(a_unit, u_unit, strict=True)])
    total = total_length([p + q for p, q in zip(a_unit, u_unit, strict=True)])
    return jnp.where(known, _angle(difference, jnp.where(known, total, 1)), 0)


def unnormalised(y_tilde: Array, y: Array, gram: Array) -> Array:
    """|G'(y~ - y)|^2, Eq. 4 without the two norms, as the authors' code has it by default."""
    moved = y_tilde - y
    return dot(moved, dot(gram, moved))


def opposition(y_tilde: Array, y: Array, gram: Array) -> Array:
    """-<G'y~, G'y>: how far the attacker's step goes against the true one, not its angle alone."""
    return -dot(y_tilde, dot(gram, y))


def towards(y_tilde: Array, y: Array, gram: Array, *, target: Sequence[float]) -> Array:
    """Cosine between the attacker's step G'y~ and G't: what it would learn from the target answer.

    target: t, [K], any direction; a one-hot t teaches that class. `functools.partial` sets it. 0
    where either gradient vanishes.
    """
    del y
    t = jnp.asarray(target, y_tilde.dtype)
    known = defined(y_tilde, gram) & defined(t, gram)
    size = dot(t, dot(gram, t)) * dot(y_tilde, dot(gram, y_tilde))
    cosine = dot(y_tilde, dot(gram, t)) / jnp.sqrt(jnp.where(known, size, 1))
    return jnp.where(known, jnp.clip(cosine, -1, 1), 0)
