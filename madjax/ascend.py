r"""The best answer within a budget, beyond a line search towards a vertex: `madjax.Ascend`.

The answers within a budget are a set of K - 1 dimensions; Algorithm 1 looks at one segment of it.
Here H, or any other objective, is maximised over all of it from M alone:

- H in an L1 or Linf ball, by exchanges between two classes (`madjax.polytope`), also where the top
  label has to be kept (`madjax.label`).
- Another objective there, by conditional gradients (Frank and Wolfe 1956): the linear problem at
  each gradient is solved exactly by sorting, and the segment to its solution is searched.
- With constraints, or another distance, by an augmented Lagrangian in coordinates in which the
  simplex is a sphere, q^2 / sum q^2, brought into the ball along the segment to y; from a point
  where all constraints hold the result is then pulled back to where they do. (The angle grows along
  any ray from y, so to bring a point to the ball's surface loses nothing.)

All start from what the line search found, from every vertex at the budget, and from beyond the
surrogate's own posterior p: as M p = 0, the answer p + t (p - y) has the gradient -t G'y, the
opposite of the true one, whatever the network.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import optax

from madjax.constraints import NORMS, l1
from madjax.label import farthest_keeping_label
from madjax.linear import dot, solved
from madjax.mad import LineSearch, Solver, argmax_preserving, label_margin, name_of, scaled
from madjax.objectives import Objective, deviation, norm
from madjax.polytope import POLYTOPES, Polytope, best_linear, farthest, parts
from madjax.steps import Constraint, Distance, holds, reach, residual, residuals, step

Array = jax.Array
Value = Callable[[Array], Array]
"""An objective of one query: y_tilde [K] -> scalar, to be maximised."""

STEPS = 16
"""Conditional gradient steps from each start."""
OUTER, INNER = 6, 40
"""Rounds of the augmented Lagrangian, and steps of Adam in each."""
STARTS, FEW = 12, 4
"""How many starts, the best of all, go through each of the two."""
PAIRS = 16
"""Up to so many classes the moves between any two of them are starts too."""
SURE = 2
"""`margin` of `norm`: of answers with shorter gradients H counts as 0."""
EQUAL = 5e-5
"""H within such a part of the best counts as the best: the answer of longest gradient is taken."""


@dataclass(frozen=True)
class Ascend(Solver):
    """The best answer of all within the budget that a search finds, never worse than LineSearch's.

    Args:
        distance: (y_tilde [K], y [K]) -> scalar, that does not fall along a ray leaving y.
        constraints: functions (y_tilde [K], y [K]) -> residuals, all to be <= 0 (within 1e-6),
            differentiable in y_tilde. They need not hold at y.
        objective: (y_tilde [K], y [K], gram [K, K]) -> scalar, maximised in place of H.

    Edge cases:
        L1 and Linf balls, H, no constraints: the best of all up to rounding where it is past 90
            degrees, and for K <= 10; `report` says how far from it the answer can be at most.
        the surrogate's posterior p within the budget: H = 4, and of the answers with it one of the
            longest gradient that is found.
        L1 ball, H, `keep_label`: the best answer on a fine search of the label's probability; never
            below that of MAD-argmax.
        no point found at which all constraints hold: y, and `report` says so.
    """

    distance: Distance = l1
    constraints: tuple[Constraint, ...] = ()
    objective: Objective = deviation

    def search(self, y: Array, gram: Array, epsilon: Array) -> Array:
        """The best answer found within the budget; y where none was found."""

        def value(y_tilde: Array) -> Array:
            reached = self.objective(y_tilde, y, gram)
            if self.objective is not deviation:
                return reached
            # H is up to 4 on one side of where float32 knows the angle, and 0 on the other.
            return jnp.where(norm(y_tilde, gram, margin=SURE) > 0, reached, 0)

        known = [LineSearch(distance=self.distance, constraints=self.constraints)]
        if self.keeps_label:
            known.append(LineSearch(argmax_preserving, self.distance, self.constraints))
        found = jnp.stack([solver(y, gram, epsilon) for solver in known])
        inside = partial(step, y, epsilon=epsilon, distance=self.distance)
        far = jnp.append(jnp.eye(y.size, dtype=y.dtype), overshoot(y, gram)[None], axis=0)
        points = jnp.append(found, jax.vmap(inside)(far), axis=0)
        if self.distance is l1 and self.objective is deviation and self.keeps_label:
            margins = [m for m in map(label_margin, self.constraints) if m is not None]
            kept = farthest_keeping_label(y, *scaled(y, gram), epsilon, max(margins))
            if len(margins) == len(self.constraints):
                points = jnp.append(found, kept[None], axis=0)
                return self._chosen(jax.vmap(value)(points), gram, points, len(found))
            points = jnp.append(points, kept[None], axis=0)
        if self.distance in POLYTOPES:
            ball = POLYTOPES[self.distance](y, epsilon)
            ends = self._in_polytope(value, y, gram, ball, points)
            # Rounding may leave the ball.
            points = jnp.append(points, jax.vmap(inside)(ends), axis=0)
            if not self.constraints:
                return self._chosen(jax.vmap(value)(points), gram, points, len(found))
        known = jnp.append(found, y[None], axis=0)
        values, points = constrained(
            value, y, points, known, epsilon, self.distance, self.constraints
        )
        best = self._chosen(values, gram, points, len(known))
        return jnp.where(values.max() > -jnp.inf, best, y)

    def _in_polytope(
        self, value: Value, y: Array, gram: Array, ball: Polytope, starts: Array
    ) -> Array:
        """The ends [N, K] of the search in a ball that is a polytope."""
        if self.objective is deviation:
            return farthest(ball, *scaled(y, gram), jax.vmap(partial(parts, ball))(starts))
        slopes = jnp.eye(y.size, dtype=y.dtype)
        if y.size <= PAIRS:
            slopes = jnp.concatenate([slopes, _pairs(y.size)])

        def best(slope: Array) -> Array:
            return best_linear(ball, slope).sum(axis=0)

        starts = _best(value, jnp.concatenate([jax.vmap(best)(slopes), starts]), STARTS)
        return jax.vmap(partial(conditional_gradient, value, best))(starts)

    def _chosen(self, values: Array, gram: Array, points: Array, known: int) -> Array:
        """The best of points [N, K] with values [N], by H the longest of those that are as good.

        Never below the first `known` of them.
        """
        if self.objective is not deviation:
            return points[values.argmax()]
        # Of one and the same point another program may know another value.
        least = jnp.maximum((1 - EQUAL) * values.max(), values[:known].max())
        lengths = (dot(points, gram) * points).sum(axis=1)
        return points[jnp.where(values >= least, lengths, -jnp.inf).argmax()]

    def describe(self) -> dict[str, str]:
        """The fields of a row that say which solver this was."""
        return super().describe() | {"solver": "ascend", "objective": name_of(self.objective)}


def constrained(
    value: Value,
    y: Array,
    starts: Array,
    known: Array,
    epsilon: Array | float,
    distance: Distance,
    constraints: Sequence[Constraint],
) -> tuple[Array, Array]:
    """Answers and their values: first those known [M, K], then what is found from starts [N, K].

    Returns values [A] and answers [A, K]. The value is -infinity where not all constraints hold.
    """

    def within(y_tilde: Array, y: Array) -> Array:
        return distance(y_tilde, y) - epsilon

    everything = (within, *constraints)
    near = _best(lambda v: -residual(v, y, everything), starts, FEW)
    first = _feasible_point(jnp.append(near, y[None], axis=0), y, everything)
    first = jnp.where(holds(y, y, everything), y, first)

    def judged(points: Array) -> Array:
        kept = jax.vmap(lambda v: holds(v, y, everything))(points)
        return jnp.where(kept, jax.vmap(value)(points), -jnp.inf)

    def allowed(candidates: Array) -> tuple[Array, Array]:
        """The candidates pulled back to where all constraints hold, and their values."""
        points = jax.vmap(lambda end: reach(first, end, y, everything))(candidates)
        return points, judged(points)

    points, values = allowed(starts)
    best = points[jax.lax.top_k(values, min(FEW, len(values)))[1]]
    brought = partial(_bring, y=y, epsilon=epsilon, distance=distance)
    climb = partial(augmented_lagrangian, value, brought, y=y, constraints=constraints)
    ends, end_values = allowed(jax.vmap(climb)(best))
    values = jnp.concatenate([judged(known), values, end_values])
    return values, jnp.concatenate([known, points, ends])


def _best(value: Value, points: Array, count: int) -> Array:
    """The points with the largest values."""
    return points[jax.lax.top_k(jax.vmap(value)(points), min(count, len(points)))[1]]


def _pairs(k: int) -> Array:
    """Linear objectives [K (K - 1), K]: take from class i before any other, give to class j."""
    giver, taker = np.nonzero(1 - np.eye(k))
    slopes = np.zeros((len(giver), k), np.float32)
    rows = np.arange(len(giver))
    slopes[rows, giver], slopes[rows, taker] = -1, 1
    return jnp.asarray(slopes)


def overshoot(y: Array, gram: Array) -> Array:
    """The answer p + t (p - y) with t as large as can be, p the surrogate's posterior.

    y [K], gram [K, K] -> [K]. p is had from M p = 0 and sum_k p_k = 1; y where M has more than that
    one direction without gradient, or p = y.
    """
    scale = jnp.trace(gram) / y.size
    ones = jnp.ones_like(y)
    safe = jnp.where(scale > 0, scale, 1)
    p = solved(gram / safe + jnp.outer(ones, ones), ones)
    away = p - y
    room = jnp.where(away < 0, -p / jnp.where(away < 0, away, 1), jnp.inf).min()
    far = p + jnp.where(jnp.isfinite(room), room, 0) * away
    # p, and with it all that follows, is known only up to rounding.
    far = jnp.maximum(far, 0)
    far = far / far.sum()
    return jnp.where(jnp.isfinite(far).all() & (scale > 0), far, y)


def conditional_gradient(
    value: Value, best_linear: Callable[[Array], Array], start: Array
) -> Array:
    """`STEPS` steps of Frank and Wolfe's method from start [K]; the value never falls.

    best_linear(slope [K]) -> the point of the set with the largest slope'v.
    """
    coarse = jnp.linspace(0, 1, 9, dtype=start.dtype)
    fine = jnp.linspace(-1, 1, 9, dtype=start.dtype) / 8

    def move(v: Array, _: None) -> tuple[Array, None]:
        end = best_linear(jnp.nan_to_num(jax.grad(value)(v)))

        def along(shares: Array) -> tuple[Array, Array]:
            points = (1 - shares[:, None]) * v[None] + shares[:, None] * end[None]
            return points, jax.vmap(value)(points)

        _, values = along(coarse)
        points, values = along(jnp.append(jnp.clip(coarse[values.argmax()] + fine, 0, 1), 0))
        return points[values.argmax()], None

    return jax.lax.scan(move, start, None, length=STEPS)[0]


def augmented_lagrangian(
    value: Value,
    brought: Callable[[Array], Array],
    start: Array,
    y: Array,
    constraints: Sequence[Constraint],
) -> Array:
    """A point [K] within the budget near a local optimum under smooth constraints.

    Maximises value(v) - sum_i (max(0, m_i + w r_i(v))^2 - m_i^2) / 2w with residuals r by Adam,
    over v = brought(q^2 / sum q^2), brought a map from the simplex into the ball; the multipliers m
    follow max(0, m + w r), and the weight w grows.
    """
    scale = jnp.maximum(jnp.abs(value(start)), 1e-3)
    broken = partial(_residuals, y=y, constraints=constraints)

    def round_(carry: tuple[Array, Array, Array], rate: Array) -> tuple[tuple, None]:
        q, multipliers, weight = carry

        def loss(q: Array) -> Array:
            v = brought(_on_simplex(q))
            pressure = jnp.maximum(multipliers + weight * broken(v), 0)
            return jnp.square(pressure).sum() / (2 * weight) - value(v) / scale

        q = _adam(loss, q, rate)
        multipliers = jnp.maximum(multipliers + weight * broken(brought(_on_simplex(q))), 0)
        return (q, multipliers, 3 * weight), None

    begin = (_coordinates(start), jnp.zeros_like(broken(start)), jnp.asarray(10, y.dtype))
    rates = jnp.geomspace(0.1, 0.003, OUTER, dtype=y.dtype)
    return brought(_on_simplex(jax.lax.scan(round_, begin, rates)[0][0]))


def _bring(v: Array, y: Array, epsilon: Array | float, distance: Distance) -> Array:
    """`step` from y to v, with the derivative of its length also where that is bisected.

    At the ball's surface d(y + a (v - y)) = epsilon, so da = -dd / (the slope of d in a).
    """
    end = step(y, v, epsilon, distance)
    if distance in NORMS:
        return end
    move = v - y
    square = jnp.square(move).sum()
    a = jnp.dot(end - y, move) / jnp.where(square > 0, square, 1)
    a = jax.lax.stop_gradient(a)
    spent, slope = jax.jvp(lambda a: distance(y + a * move, y), (a,), (jnp.ones_like(a),))
    slope = jax.lax.stop_gradient(slope)
    known = (a < 1) & jnp.isfinite(slope) & (slope > 0)
    moved = spent - jax.lax.stop_gradient(spent)
    return y + (a - jnp.where(known, moved / jnp.where(known, slope, 1), 0)) * move


def _feasible_point(starts: Array, y: Array, constraints: Sequence[Constraint]) -> Array:
    """The point with the smallest of the largest residuals that descent from the starts finds."""

    def broken(q: Array) -> Array:
        margin = 1e-4  # so that it ends inside, where there is an inside
        return jnp.square(jnp.maximum(_residuals(_on_simplex(q), y, constraints) + margin, 0)).sum()

    rates = jnp.geomspace(0.1, 4e-3, 3, dtype=y.dtype)

    def descend(start: Array) -> Array:
        def more(q: Array, rate: Array) -> tuple[Array, None]:
            return _adam(broken, q, rate), None

        return _on_simplex(jax.lax.scan(more, _coordinates(start), rates)[0])

    points = jnp.concatenate([jax.vmap(descend)(starts), starts])
    return points[jax.vmap(lambda v: residual(v, y, constraints))(points).argmin()]


def _residuals(v: Array, y: Array, constraints: Sequence[Constraint]) -> Array:
    # An infinite distance has no gradient, and any large one says as much.
    return jnp.minimum(jnp.nan_to_num(residuals(v, y, constraints)), 10.0)


def _coordinates(v: Array) -> Array:
    """Coordinates of a point of the simplex; entries at 0 get a little, or they would stay."""
    return jnp.sqrt(jnp.maximum(v, 1e-4))


def _on_simplex(q: Array) -> Array:
    square = jnp.square(q)
    return square / square.sum()


def _adam(loss: Callable[[Array], Array], q: Array, rate: Array | float) -> Array:
    optimizer = optax.adam(optax.cosine_decay_schedule(rate, INNER))

    def move(carry: tuple, _: None) -> tuple[tuple, None]:
        q, state = carry
        updates, state = optimizer.update(jnp.nan_to_num(jax.grad(loss)(q)), state)
        return (q + updates, state), None

    (q, _), _ = jax.lax.scan(move, (q, optimizer.init(q)), None, length=INNER)
    return q
