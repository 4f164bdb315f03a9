r"""MAD, maximising angular deviation: objective, oracles, line search. A reader starts here.

The attacker's gradient on a query with answer y~ is G' y~, where G = d log F_sur(x; w) / d w is
[K, D] (Eq. 5). The defence wants the answer whose gradient points farthest from that of the true
posterior y (Eq. 4):

    H(y~) = || G'y~ / |G'y~| - G'y / |G'y| ||^2 = 2 - 2 cos(G'y~, G'y).

Only M = G G', [K, K], enters: cos = y~'M y / sqrt(y~'M y~ . y'M y). `madjax.gram` computes M
once for a query; everything in this file costs O(K^2) and never sees D.
"""

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from madjax.constraints import keep_label, l1, off_the_simplex
from madjax.errors import InputError
from madjax.linear import dot
from madjax.objectives import defined, deviation, norm, unit
from madjax.polytope import POLYTOPES, bound, parts
from madjax.steps import Constraint, Distance, holds, reach, step
from madjax.subsets import best_subset, cone_bound

Array = jax.Array
Oracle = Callable[[Array, Array], Array]
"""(y [K], gram [K, K]) -> the target y* [K] of the step, or several, [N, K], of which the one that
is best where the budget ends is taken."""
AnySolver = Callable[[Array, Array, Array], Array]
"""(y [K], gram [K, K], epsilon) -> y_tilde [K]."""


def extreme(y: Array, gram: Array) -> Array:
    """y*: the vertex e_k of the simplex with the largest H(e_k) (Algorithm 1, line 4).

    y [K], gram [K, K] -> one-hot [K]. Needs diag M and M y only: H(e_k) = 2 - 2 (M y)_k /
    sqrt(M_kk y'My). A vertex whose gradient vanishes counts as H = 0; the first of equal vertices
    is taken; y itself is returned where its own gradient vanishes. The vertex is the maximiser over
    the simplex only while the best angle is below 90 degrees.
    """
    square = jnp.diagonal(gram)
    cosine = dot(gram, y) / jnp.sqrt(jnp.where(square > 0, square, jnp.inf))
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
    best = best_subset(turned, dot(turned, jnp.roll(y, -k)))
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
    (direction, known) = unit(first, turned)
    cosine = cone_bound(turned, dot(turned, direction))
    return jnp.where(known, jnp.clip(2 - 2 * cosine, 2, 4), 0)


def extreme_at_budget(y: Array, gram: Array) -> Array:
    """All vertices of the simplex as targets: compared where the budget ends, not at the vertex.

    y [K], gram [K, K] -> [K, K]. H along the way to a vertex is not in the order of H at the
    vertices; this costs one H more for every class.
    """
    del gram
    return jnp.eye(y.size, dtype=y.dtype)


class Info(NamedTuple):
    """What a solver says of its answer y~ to one query."""

    deviation: Array
    """H(y~), in [0, 4]."""
    bound: Array
    """No answer within the distance has a larger H, but of those whose gradient vanishes.

    4 where nothing better is known (`madjax.polytope.bound`)."""
    length: Array
    """|G'y~| / |G'y|: the objective does not see it, the attacker's step does. 0 without a G'y."""
    feasible: Array
    """Whether a point was found at which all constraints hold; where not, y~ is y."""
    defended: Array
    """Whether y~ is not y. It is y too where G'y has no direction, and at a budget of 0."""


class Solver:
    """What LineSearch and Ascend share: checks before, and y where there is nothing to be done.

    A subclass is a frozen dataclass with the fields distance and constraints. A plain function is a
    solver too (`AnySolver`), without a report.
    """

    distance: Distance
    constraints: tuple[Constraint, ...]

    def __post_init__(self) -> None:
        if callable(self.constraints):
            raise InputError(
                f"constraints is {name_of(self.constraints)}: give a tuple of functions"
            )
        object.__setattr__(self, "constraints", tuple(self.constraints))  # hashable, as it must be

    def search(self, y: Array, gram: Array, epsilon: Array) -> Array:
        """The answer y~ [K], were all well: G'y has a direction, epsilon > 0. Given float32."""
        raise NotImplementedError

    def __call__(self, y: Array, gram: Array, epsilon: Array | float) -> Array:
        """The answer y~ float32 [K] to a query with posterior y [K]; see `solve`."""
        y, gram, epsilon = _checked(y, gram, epsilon)
        found = _guarded(self.search(y, gram, epsilon), y, gram, epsilon)
        return jnp.where(holds(found, y, self.constraints), found, y)

    def report(self, y: Array, gram: Array, epsilon: Array | float) -> tuple[Array, Info]:
        """The answer y~ [K], and what there is to say of it."""
        y, gram, epsilon = _checked(y, gram, epsilon)
        y_tilde = self(y, gram, epsilon)
        length, true = norm(y_tilde, gram), norm(y, gram)
        known = true > 0
        reached = deviation(y_tilde, y, gram)
        most = jnp.full((), 4.0, y.dtype)
        if self.distance in POLYTOPES:
            ball = POLYTOPES[self.distance](y, epsilon)
            most = bound(ball, *scaled(y, gram), parts(ball, y_tilde))
            most = jnp.maximum(most, reached)
        return y_tilde, Info(
            deviation=reached,
            bound=jnp.where(known & (epsilon > 0), most, 0),
            length=jnp.where(known, length / jnp.where(known, true, 1), 0),
            feasible=holds(y_tilde, y, self.constraints),
            defended=known & (y_tilde != y).any(),
        )

    @property
    def keeps_label(self) -> bool:
        """Whether every answer keeps the top label of y, because a constraint says so."""
        return any(label_margin(constraint) is not None for constraint in self.constraints)

    def describe(self) -> dict[str, str]:
        """The fields of a row that say which solver this was."""
        return NO_SOLVER | {
            "solver": name_of(type(self)),
            "distance": name_of(self.distance),
            "constraints": ", ".join(map(name_of, self.constraints)) or "none",
        }


@dataclass(frozen=True)
class LineSearch(Solver):
    """Algorithm 1: from y towards the oracle's target y*, as far as the budget goes.

    y~ = (1 - a) y + a y*, a the largest in [0, 1] with distance(y~, y) <= epsilon and, in further
    steps back, all constraints held: each must hold at y and up to a point of the way. Of an
    oracle's several targets the one with the largest H at its end is taken.

    Args:
        oracle: (y [K], gram [K, K]) -> y* [K], or [N, K].
        distance: (y_tilde [K], y [K]) -> scalar, that does not fall along a ray leaving y.
        constraints: functions (y_tilde [K], y [K]) -> residuals, all to be <= 0 (within 1e-6).

    Example:
        >>> import madjax
        >>> keep = madjax.LineSearch(madjax.argmax_preserving)
        >>> keep(jnp.array([0.7, 0.2, 0.1]), jnp.diag(jnp.arange(3.0)), 0.2).argmax()
        Array(0, dtype=int32)
    """

    oracle: Oracle = extreme
    distance: Distance = l1
    constraints: tuple[Constraint, ...] = ()

    def search(self, y: Array, gram: Array, epsilon: Array) -> Array:
        """The best of the ends of the steps towards the targets."""

        def end(y_star: Array) -> Array:
            y_tilde = step(y, y_star, epsilon, self.distance)
            return reach(y, y_tilde, y, self.constraints) if self.constraints else y_tilde

        y_star = jnp.asarray(self.oracle(y, gram), y.dtype)
        if y_star.ndim not in (1, 2) or y_star.shape[-1] != y.size:
            raise InputError(
                f"the oracle {name_of(self.oracle)} gives an array of shape {y_star.shape} for "
                f"{y.size} classes: it is to give a target [K], or several [N, K]"
            )
        if y_star.ndim == 1:
            return end(y_star)
        ends = jax.vmap(end)(y_star)
        return ends[jax.vmap(lambda v: deviation(v, y, gram))(ends).argmax()]

    @property
    def keeps_label(self) -> bool:
        """Also where the target keeps it: the way from y to it does then."""
        return self.oracle is argmax_preserving or super().keeps_label

    def describe(self) -> dict[str, str]:
        """The fields of a row that say which solver this was."""
        return super().describe() | {"solver": "line_search", "oracle": name_of(self.oracle)}


def solve(
    y: Array,
    gram: Array,
    *,
    epsilon: Array | float,
    solver: AnySolver = LineSearch(),
) -> Array:
    """The MAD answer to one query: the farthest angle within the budget, by Algorithm 1.

    y~ = argmax H(y~) (Eq. 4) over the simplex (Eq. 6) with distance(y~, y) <= epsilon (Eq. 7).
    One query: `jax.vmap` it over queries and over epsilons.

    Args:
        y: the victim's posterior [K], on the simplex to 0.01; of any type, and taken as float32.
        gram: M [K, K] of the surrogate at the query, from `madjax.gram`.
        epsilon: the budget, >= 0, in the units of the distance: L1 reaches from 0 to 2. It may be
            traced.
        solver: `madjax.LineSearch` with its oracle, distance and constraints (Algorithm 1),
            `madjax.Ascend`, which searches all answers within the budget, or any function
            (y [K], gram [K, K], epsilon) -> y_tilde [K].

    Returns:
        y_tilde float32 [K], on the simplex as y is, within epsilon of y. A solver or an oracle of
        your own has to see to that: its shape is checked, and nothing else.

    Edge cases:
        epsilon = 0: y, bit for bit.
        a budget beyond the farthest answer: y*, bit for bit.
        y is the surrogate's own posterior: y; the true gradient vanishes (`defined`).
        gram = 0: y; no answer moves the attacker.
        a traced gram that is not finite: y. (`madjax.perturb` answers as with G = I.)
        gram times a positive number: the same answer.
        two vertices with equal H: the first of them is y*.
        no answer found at which all constraints hold: y; `solver.report` says so.
        y in half precision, or one-hot integers: the same number in float32.
        logits, log-probabilities or percent for y: refused, where y is not traced.

    Raises:
        InputError: shapes that do not fit, also of what the solver or its oracle gives; several
            budgets; a solver that is no function; where they are not traced, epsilon < 0, y that is
            no posterior, a gram that is not finite.

    Example:
        >>> import jax.numpy as jnp, madjax
        >>> y = jnp.array([0.7, 0.2, 0.1])
        >>> gram = jnp.array([[1.0, -1.0, 0.0], [-1.0, 1.0, 0.0], [0.0, 0.0, 4.0]])
        >>> madjax.solve(y, gram, epsilon=0.5).round(2)
        Array([0.48, 0.45, 0.07], dtype=float32)
    """
    check_solver(solver)
    y, gram, epsilon = _checked(y, gram, epsilon)
    y_tilde = jnp.asarray(solver(y, gram, epsilon), y.dtype)
    if y_tilde.shape != y.shape:
        raise InputError(
            f"the solver {name_of(solver)} gives an array of shape {y_tilde.shape} for "
            f"{y.size} classes: it is to give y_tilde [K]"
        )
    return _guarded(y_tilde, y, gram, epsilon)


def _checked(y: Array, gram: Array, epsilon: Array | float) -> tuple[Array, Array, Array]:
    """One query in float32, or why not."""
    check_epsilon(epsilon)
    y, gram = as_posterior(y), jnp.asarray(gram, jnp.float32)
    if y.ndim != 1 or gram.shape != (y.size, y.size):
        raise InputError(
            f"solve takes one query, y [K] and gram [K, K], not {y.shape} and {gram.shape}: "
            "use jax.vmap over a batch"
        )
    check_gram(gram)
    epsilon = jnp.asarray(epsilon, jnp.float32)
    if epsilon.ndim:
        raise InputError(
            f"epsilon has shape {epsilon.shape}: solve takes one budget; use jax.vmap over several"
        )
    return y, gram, epsilon


def scaled(y: Array, gram: Array) -> tuple[Array, Array]:
    """The Gram matrix scaled so that |G'y| = 1, and c = M y: the cosine is c'v / |G'v|."""
    length = norm(y, gram)
    gram = gram / jnp.square(jnp.where(length > 0, length, 1))
    return gram, dot(gram, y)


def _guarded(y_tilde: Array, y: Array, gram: Array, epsilon: Array) -> Array:
    """Y where there is no direction to turn away from, and without a budget."""
    return jnp.where(defined(y, gram) & (epsilon > 0), y_tilde, y)


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
    if not isinstance(gram, jax.core.Tracer) and not np.isfinite(np.asarray(gram)).all():
        raise InputError(
            "the Gram matrix is not finite: the surrogate's parameters are NaN, or its gradients "
            "leave float32; give another surrogate, or scale its inputs"
        )


def check_solver(solver: Any) -> None:
    """Refuse what is no function of (y, gram, epsilon)."""
    if isinstance(solver, type) or not callable(solver):
        raise InputError(
            f"solver is {solver!r}: give madjax.LineSearch(), madjax.Ascend(), or a function "
            "(y, gram, epsilon) -> y_tilde"
        )


NO_SOLVER = dict.fromkeys(("solver", "oracle", "distance", "constraints", "objective"), "none")
"""The fields of a row that a solver fills, of a defence that has none."""


def describe_solver(solver: AnySolver) -> dict[str, str]:
    """The fields of a row that say which solver this was; of a plain function, its name."""
    if isinstance(solver, Solver):
        return solver.describe()
    return NO_SOLVER | {"solver": name_of(solver)}


def name_of(function: Any) -> str:
    """A function by its name, a partial with the parameters that it sets."""
    if isinstance(function, partial):
        given = (f"{name}={value}" for name, value in function.keywords.items())
        return f"{name_of(function.func)}({', '.join(given)})"
    return getattr(function, "__name__", type(function).__name__)


def label_margin(constraint: Constraint) -> float | None:
    """The margin of a `keep_label`, where it is known not to be below 0; None for all others."""
    if not isinstance(constraint, partial):
        return 0.0 if constraint is keep_label else None
    margin = constraint.keywords.get("margin", 0.0)
    known = constraint.func is keep_label and isinstance(margin, int | float) and margin >= 0
    return margin if known else None
