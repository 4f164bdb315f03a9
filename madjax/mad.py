r"""MAD, maximising angular deviation: objective, oracle, step. A reader starts here.

The attacker's gradient on a query with answer y~ is G' y~, where G = d log F_sur(x; w) / d w is
[K, D] (Eq. 5). The defence wants the answer whose gradient points farthest from that of the true
posterior y (Eq. 4):

    H(y~) = || G'y~ / |G'y~| - G'y / |G'y| ||^2 = 2 - 2 cos(G'y~, G'y).

Only M = G G', [K, K], enters: cos = y~'M y / sqrt(y~'M y~ . y'M y). `madjax.gram` computes M
once for a query; everything in this file costs O(K^2) and never sees D.
"""

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from madjax.ascend import ascend
from madjax.constraints import l1, off_the_simplex
from madjax.errors import InputError
from madjax.steps import Constraint, Distance, holds, reach, step
from madjax.subsets import best_subset, cone_bound

Array = jax.Array
Oracle = Callable[[Array, Array], Array]
"""(y [K], gram [K, K]) -> the target y* [K] of the step, or several, [N, K], of which the one that
is best where the budget ends is taken."""
Objective = Callable[[Array, Array, Array], Array]
"""(y_tilde [K], y [K], gram [K, K]) -> scalar, to be maximised."""

# Products with M are K x K work: full float32, where TPUs and recent GPUs would round to bf16/TF32.
_dot = partial(jnp.matmul, precision="highest")


def _norm(v: Array, gram: Array) -> Array:
    """|G'v|, with 0 where rounding leaves nothing of it.

    G'p = 0 at the surrogate's posterior p (score identity), so near it v'Mv is a difference of
    larger numbers, and holds no information below their rounding errors: eps |v|'|M||v| of the
    products and of M itself, and eps^2 max_k M_kk |v|_1^2 of G, whose rows e_k - p have the error
    of a p near 1. The factors are twice what was found for y = p (`test_noise_is_bounded`).
    """
    square, size = _dot(v, _dot(gram, v)), jnp.abs(v)
    eps = jnp.finfo(gram.dtype).eps
    noise = 8 * eps * _dot(size, _dot(jnp.abs(gram), size))
    noise += jnp.square(4 * eps * size.sum()) * jnp.diagonal(gram).max()
    return _root(jnp.where(square > noise, square, 0))


def _unit(v: Array, gram: Array) -> tuple[Array, Array]:
    """V / |G'v| and whether it is defined; zeros where it is not."""
    norm = _norm(v, gram)
    known = norm > 0
    return jnp.where(known, v / jnp.where(known, norm, 1), 0), known


def defined(y: Array, gram: Array) -> Array:
    """Whether the true gradient G'y has a direction: False where y is the surrogate's posterior.

    y [K], gram [K, K] -> bool. `solve` returns y unchanged exactly where this is False. What
    float32 cannot tell from p counts as p. Near a p without a favourite that is an L1 distance up
    to about 1e-3, whatever K is; near a confident p it is a small part of 1 - max p.
    """
    y, gram = _at_least_float32(y, gram)
    return _norm(y, gram) > 0


def deviation(y_tilde: Array, y: Array, gram: Array) -> Array:
    """H(y~) = || a/|a| - u/|u| ||^2 with a = G'y~ and u = G'y (Eq. 4), in [0, 4].

    y_tilde [K], y [K], gram [K, K] -> scalar. Computed as d'Md with d = y~/|a| - y/|u|, which
    keeps its digits at small angles where 2 - 2 cos loses them. 0 where either gradient vanishes
    and the angle is undefined. Does not change with `gram -> c gram`, c > 0. Half precision is
    taken as float32.
    """
    y_tilde, y, gram = _at_least_float32(y_tilde, y, gram)
    (a, a_known), (u, u_known) = _unit(y_tilde, gram), _unit(y, gram)
    d = a - u
    return jnp.where(a_known & u_known, jnp.clip(_dot(d, _dot(gram, d)), 0, 4), 0)


def angle(y_tilde: Array, y: Array, gram: Array) -> Array:
    """The angle between the poisoned and the true gradient, in degrees, in [0, 180].

    y_tilde [K], y [K], gram [K, K] -> scalar. 2 atan2(|a/|a| - u/|u||, |a/|a| + u/|u||), accurate
    at both ends (Kahan 2006, section 12). 0 where it is undefined, as in `deviation`. At 0 and 180
    degrees, where it has a kink, its gradient is taken as 0.
    """
    y_tilde, y, gram = _at_least_float32(y_tilde, y, gram)
    (a, a_known), (u, u_known) = _unit(y_tilde, gram), _unit(y, gram)
    known = a_known & u_known
    difference, total = (_root(_dot(d, _dot(gram, d))) for d in (a - u, a + u))
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
    float32, by the same formula.
    """
    a, u = ([leaf.astype(jnp.float32) for leaf in jax.tree.leaves(each)] for each in (a, u))

    def norm(leaves: list[Array]) -> Array:
        return _root(sum(jnp.square(leaf).sum() for leaf in leaves))

    (a_norm, u_norm) = norm(a), norm(u)
    known = (a_norm != 0) & (u_norm != 0)  # NaN is neither known to vanish, nor known not to
    a_unit, u_unit = (
        [leaf / jnp.where(known, length, 1) for leaf in leaves]
        for leaves, length in ((a, a_norm), (u, u_norm))
    )
    difference = norm([p - q for p, q in zip(a_unit, u_unit, strict=True)])
    total = norm([p + q for p, q in zip(a_unit, u_unit, strict=True)])
    return jnp.where(known, _angle(difference, jnp.where(known, total, 1)), 0)


def extreme(y: Array, gram: Array) -> Array:
    """y*: the vertex e_k of the simplex with the largest H(e_k) (Algorithm 1, line 4).

    y [K], gram [K, K] -> one-hot [K]. Needs diag M and M y only: H(e_k) = 2 - 2 (M y)_k /
    sqrt(M_kk y'My). A vertex whose gradient vanishes counts as H = 0; the first of equal vertices
    is taken; y itself is returned where its own gradient vanishes. The vertex is the maximiser over
    the simplex only while the best angle is below 90 degrees.
    """
    square = jnp.diagonal(gram)
    cosine = _dot(gram, y) / jnp.sqrt(jnp.where(square > 0, square, jnp.inf))
    cosine = jnp.where(square > 0, cosine, jnp.inf)
    vertex = jax.nn.one_hot(jnp.argmin(cosine), y.size, dtype=y.dtype)
    return jnp.where(defined(y, gram), vertex, y)


def argmax_preserving(y: Array, gram: Array) -> Array:
    """y*: the best vertex of the part of the simplex where y's top label stays on top (MAD-argmax).

    y [K], gram [K, K] -> [K]. The vertices of {v on the simplex: v_k >= v_j}, k = argmax y, are the
    uniform distributions on the subsets of classes that contain k (Delta_K^k of section 4). All
    2^(K-1) are compared where K <= 16; beyond that they are searched (`madjax.subsets`), never with
    a worse end than the authors' greedy, which stops after 1,024 candidates.

    As in the authors' code the top label gets 1e-5 more before normalising, so that it stays on top
    at y* itself; the first of equal top labels is the label. y is returned where its own gradient
    vanishes.
    """
    k = y.argmax()
    turned = jnp.roll(gram, (-k, -k), axis=(0, 1))
    best = best_subset(turned, _dot(turned, jnp.roll(y, -k)))
    weights = jnp.roll(best.members, k) + 1e-5 * jax.nn.one_hot(k, y.size, dtype=y.dtype)
    return jnp.where(defined(y, gram), weights / weights.sum(), y)


def argmax_bound(y: Array, gram: Array) -> Array:
    """An upper bound of H, in [2, 4], for answers of any budget that keep the top label of y.

    y [K], gram [K, K] -> scalar, max(2, max H(v) over {v on the simplex: v_k >= v_j}), k =
    argmax y: a convex problem where that is above 2, solved to about 1e-3. What `argmax_preserving`
    finds by search is the best vertex; `argmax_bound(y, gram) - deviation(y_star, y, gram)` says
    how much better anything could be. 0 where y's own gradient vanishes.
    """
    k = y.argmax()
    turned, first = jnp.roll(gram, (-k, -k), axis=(0, 1)), jnp.roll(y, -k)
    (unit, known) = _unit(first, turned)
    cosine = cone_bound(turned, _dot(turned, unit))
    return jnp.where(known, jnp.clip(2 - 2 * cosine, 2, 4), 0)


def extreme_at_budget(y: Array, gram: Array) -> Array:
    """All vertices of the simplex as targets: compared where the budget ends, not at the vertex.

    y [K], gram [K, K] -> [K, K]. H along the way to a vertex is not in the order of H at the
    vertices; this costs one H more for every class.
    """
    del gram
    return jnp.eye(y.size, dtype=y.dtype)


class Solution(NamedTuple):
    """An answer, and whether it is what was asked for."""

    y_tilde: Array
    """[K]."""
    value: Array
    """The objective at y_tilde."""
    feasible: Array
    """Whether all constraints hold; where not, no point was found at which they do, and y_tilde is
    y."""


def solution(
    y: Array,
    gram: Array,
    *,
    epsilon: Array | float,
    oracle: Oracle = extreme,
    distance: Distance = l1,
    constraints: Sequence[Constraint] = (),
    objective: Objective = deviation,
    method: str = "line_search",
) -> Solution:
    """`solve`, and with it the objective reached and whether all constraints hold.

    Arguments and errors as for `solve`.
    """
    y, gram = as_posterior(y), jnp.asarray(gram, jnp.float32)
    epsilon = jnp.asarray(epsilon, jnp.float32)
    if y.ndim != 1 or gram.shape != (y.size, y.size):
        raise InputError(
            f"solve takes one query, y [K] and gram [K, K], not {y.shape} and {gram.shape}: "
            "use jax.vmap over a batch"
        )
    check_epsilon(epsilon)
    check_gram(gram)
    check_method(method)

    def value(y_tilde: Array) -> Array:
        return objective(y_tilde, y, gram)

    found = _line_search(value, y, oracle(y, gram), epsilon, distance, constraints)
    if method == "ascend":
        found = ascend(value, y, gram, found, epsilon, distance, constraints)
    found = jnp.where(defined(y, gram) & (epsilon > 0), found, y)
    found = jnp.where(holds(found, y, constraints), found, y)
    return Solution(found, value(found), holds(found, y, constraints))


def _line_search(
    value: Callable[[Array], Array],
    y: Array,
    y_star: Array,
    epsilon: Array | float,
    distance: Distance,
    constraints: Sequence[Constraint],
) -> Array:
    """The best of the ends of the steps towards the targets y* [K] or [N, K]."""

    def end(y_star: Array) -> Array:
        y_tilde = step(y, y_star, epsilon, distance)
        return reach(y, y_tilde, y, constraints) if constraints else y_tilde

    if y_star.ndim == 1:
        return end(y_star)
    ends = jax.vmap(end)(y_star)
    return ends[jax.vmap(value)(ends).argmax()]


def solve(
    y: Array,
    gram: Array,
    *,
    epsilon: Array | float,
    oracle: Oracle = extreme,
    distance: Distance = l1,
    constraints: Sequence[Constraint] = (),
    objective: Objective = deviation,
    method: str = "line_search",
) -> Array:
    """The MAD answer to one query: the farthest angle within the budget, by Algorithm 1.

    y~ = argmax H(y~) (Eq. 4) over the simplex (Eq. 6) with distance(y~, y) <= epsilon (Eq. 7).
    One query: `jax.vmap` it over queries and over epsilons.

    Args:
        y: the victim's posterior [K], on the simplex to 0.01; of any type, and taken as float32.
        gram: M [K, K] of the surrogate at the query, from `madjax.gram`.
        epsilon: the budget, >= 0, in the units of distance: L1 reaches from 0 to 2. It may be
            traced.
        oracle: (y [K], gram [K, K]) -> the target y* of the step, [K] or several [N, K].
        distance: (y_tilde [K], y [K]) -> scalar, the utility constraint.
        constraints: further functions (y_tilde [K], y [K]) -> residuals, all of which are to be
            <= 0 (within 1e-6). `madjax.constraints` has examples.
        objective: (y_tilde [K], y [K], gram [K, K]) -> scalar, maximised in place of H.
        method: "line_search" goes along the segment from y to y* as far as it may, so every
            constraint must hold at y and up to a point. "ascend" maximises the objective over all
            answers within the budget (`madjax.ascend`), takes any differentiable constraints, and
            is never worse than the line search.

    Returns:
        y_tilde float32 [K], on the simplex as y is, within epsilon of y.

    Edge cases:
        epsilon = 0: y, bit for bit.
        a budget beyond the farthest answer: y*, bit for bit.
        y is the surrogate's own posterior: y; the true gradient vanishes (`defined`).
        gram = 0: y; no answer moves the attacker.
        gram times a positive number: the same answer.
        two vertices with equal H: the first of them is y*.
        no answer found at which all constraints hold: y; `solution` says so.
        y in half precision, or one-hot integers: the same number in float32.
        logits, log-probabilities or percent for y: refused, where y is not traced.

    Raises:
        InputError: shapes that do not fit; another method; where they are not traced, epsilon < 0,
            y that is no posterior, a gram that is not finite.

    Example:
        >>> import jax.numpy as jnp, madjax
        >>> y = jnp.array([0.7, 0.2, 0.1])
        >>> gram = jnp.array([[1.0, -1.0, 0.0], [-1.0, 1.0, 0.0], [0.0, 0.0, 4.0]])
        >>> madjax.solve(y, gram, epsilon=0.5).round(2)
        Array([0.48, 0.45, 0.07], dtype=float32)
    """
    return solution(
        y,
        gram,
        epsilon=epsilon,
        oracle=oracle,
        distance=distance,
        constraints=constraints,
        objective=objective,
        method=method,
    ).y_tilde


def check_epsilon(epsilon: Array | float) -> None:
    """Refuse a budget below 0 or NaN, where it is not traced."""
    if isinstance(epsilon, jax.core.Tracer):
        return
    if not np.all(np.asarray(epsilon) >= 0):
        raise InputError(f"epsilon is {epsilon}: the budget is a distance, give a number >= 0")


def as_posterior(y: Array) -> Array:
    """Posteriors [..., K] in float32.

    Raises:
        InputError: where y is not traced, entries that are no probabilities to 0.01.
    """
    y = jnp.asarray(y, jnp.float32)
    if y.ndim == 0 or isinstance(y, jax.core.Tracer):
        return y
    if y.size and (wrong := off_the_simplex(np.asarray(y))):
        raise InputError(
            f"y is no posterior: {wrong}; give probabilities, such as the softmax of logits, "
            "exp(log-probabilities) or percent / 100"
        )
    return y


def check_gram(gram: Array) -> None:
    """Refuse a Gram matrix that is not finite, where it is not traced."""
    if not isinstance(gram, jax.core.Tracer) and not jnp.isfinite(gram).all():
        raise InputError(
            "the Gram matrix is not finite: the surrogate's parameters are NaN, or its gradients "
            "leave float32; give another surrogate, or scale its inputs"
        )


METHODS = ("line_search", "ascend")


def check_method(method: str) -> None:
    """Refuse a method that `solve` does not know."""
    if method not in METHODS:
        raise InputError(
            f"method is {method!r}: choose one of {', '.join(map(repr, METHODS))} (the way to the "
            "Gram matrix is gram_method)"
        )
