r"""The best answer within a budget, beyond a line search towards a vertex: `method="ascend"`.

The answers within a budget are a set of K - 1 dimensions; Algorithm 1 looks at one segment of it.
Here H, or any other objective, is maximised over all of it from M alone, in two ways:

- Where the set is a polytope, the simplex cut by an L1 or Linf ball, by conditional gradients
  (Frank and Wolfe 1956): the linear problem at each gradient is solved exactly by sorting (for L1,
  mass moves from the classes with the smallest entries of the gradient to the one with the
  largest), and the segment to its solution is searched. While the angle stays below 90 degrees, the
  optimum is a vertex of the polytope: there c'v > 0, c = M y, and |G'v| / c'v is quasiconvex. Past
  90 degrees maximising H is a quasiconcave problem, whose local optima are global.
- With constraints, or another distance, by an augmented Lagrangian in coordinates in which the
  simplex is a sphere, q^2 / sum q^2, brought into the ball along the segment to y; from a point
  where all constraints hold the result is then pulled back to where they do. (The angle grows along
  any ray from y, so to bring a point to the ball's surface loses nothing.)

Both start from every vertex at the budget, from what the line search found, and from beyond the
surrogate's own posterior p: as M p = 0, the answer p + t (p - y) has the gradient -t G'y, the
opposite of the true one, whatever the network. The answers found are never worse than any start.
"""

from collections.abc import Callable, Sequence
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import optax

from madjax.constraints import NORMS, l1, linf
from madjax.steps import Constraint, Distance, holds, reach, residual, step

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


def ascend(
    value: Value,
    y: Array,
    gram: Array,
    found: Array,
    epsilon: Array | float,
    distance: Distance,
    constraints: Sequence[Constraint],
) -> Array:
    """The best answer [K] found within the budget, by `value`, at least as good as `found`.

    y [K], gram [K, K]; found [K] is the line search's. y where no point was found at which the
    constraints hold.
    """
    inside = partial(step, y, epsilon=epsilon, distance=distance)
    targets = jnp.concatenate([jnp.eye(y.size, dtype=y.dtype), overshoot(y, gram)[None]])
    starts = jnp.concatenate([jax.vmap(inside)(targets), found[None]])
    if distance in POLYTOPES:
        best_linear = partial(POLYTOPES[distance], y=y, epsilon=epsilon)
        if y.size <= PAIRS:
            starts = jnp.concatenate([jax.vmap(best_linear)(_slopes(y.size)), starts])
        starts = _best(value, starts, STARTS)
        ends = jax.vmap(partial(conditional_gradient, value, best_linear))(starts)
        # Rounding may leave the ball.
        starts = jnp.concatenate([jax.vmap(inside)(ends), starts])
        if not constraints:
            return starts[jax.vmap(value)(starts).argmax()]

    def within(y_tilde: Array, y: Array) -> Array:
        return distance(y_tilde, y) - epsilon

    everything = (within, *constraints)
    near = _best(lambda v: -residual(v, y, everything), starts, FEW)
    first = _feasible_point(jnp.append(near, y[None], axis=0), y, everything)
    first = jnp.where(holds(y, y, everything), y, first)

    def allowed(candidates: Array) -> tuple[Array, Array]:
        """The candidates pulled back to where all constraints hold, and their values."""
        points = jax.vmap(lambda end: reach(first, end, y, everything))(candidates)
        known = jax.vmap(lambda v: holds(v, y, everything))(points)
        return points, jnp.where(known, jax.vmap(value)(points), -jnp.inf)

    points, values = allowed(starts)
    best = points[jax.lax.top_k(values, min(FEW, len(values)))[1]]
    brought = partial(_bring, y=y, epsilon=epsilon, distance=distance)
    climb = partial(augmented_lagrangian, value, brought, y=y, constraints=constraints)
    ends, end_values = allowed(jax.vmap(climb)(best))
    points = jnp.concatenate([points, ends, found[None], y[None]])
    last = [jnp.where(holds(v, y, everything), value(v), -jnp.inf) for v in (found, y)]
    values = jnp.concatenate([values, end_values, jnp.stack(last)])
    at = values.argmax()
    return jnp.where(values[at] > -jnp.inf, points[at], y)


def _best(value: Value, points: Array, count: int) -> Array:
    """The points with the largest values."""
    return points[jax.lax.top_k(jax.vmap(value)(points), min(count, len(points)))[1]]


def _slopes(k: int) -> Array:
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
    p = _solved(gram / safe + jnp.outer(ones, ones), ones)
    away = p - y
    room = jnp.where(away < 0, -p / jnp.where(away < 0, away, 1), jnp.inf).min()
    far = p + jnp.where(jnp.isfinite(room), room, 0) * away
    # p, and with it all that follows, is known only up to rounding.
    far = jnp.maximum(far, 0)
    far = far / far.sum()
    return jnp.where(jnp.isfinite(far).all() & (scale > 0), far, y)


def _solved(a: Array, b: Array) -> Array:
    """The x with a x = b, a [K, K] positive definite, by Gauss and Jordan's elimination.

    In place of `jnp.linalg.solve`, whose LAPACK call waits for ever when several CPU devices share
    few threads (jaxlib 0.10), and which an exported file would have to carry.
    """
    k = b.size

    def eliminate(i: Array, rows: Array) -> Array:
        pivot = rows[i] / rows[i, i]
        return (rows - rows[:, i][:, None] * pivot[None]).at[i].set(pivot)

    return jax.lax.fori_loop(0, k, eliminate, jnp.concatenate([a, b[:, None]], axis=1))[:, -1]


def best_in_l1(slope: Array, y: Array, epsilon: Array | float) -> Array:
    """The v of the simplex with |v - y|_1 <= epsilon and the largest slope'v.

    slope, y [K] -> [K]. epsilon / 2 moves to the class with the largest slope, from those with the
    smallest as far as they have it.
    """
    order = jnp.argsort(slope)
    owned = y[order]
    before = jnp.cumsum(owned) - owned
    given = jnp.clip(epsilon / 2 - before, 0, owned)
    top = order[-1]
    given = given.at[-1].set(0)
    return y.at[order].add(-given).at[top].add(given.sum())


def best_in_linf(slope: Array, y: Array, epsilon: Array | float) -> Array:
    """The v of the simplex with |v - y|_inf <= epsilon and the largest slope'v.

    slope, y [K] -> [K]. Every entry is as small as may be, and what is left of the mass goes to the
    largest slopes, as far as they may take it.
    """
    order = jnp.argsort(-slope)
    low = jnp.maximum(y - epsilon, 0)
    room = (jnp.minimum(y + epsilon, 1) - low)[order]
    before = jnp.cumsum(room) - room
    return low.at[order].add(jnp.clip(1 - low.sum() - before, 0, room))


POLYTOPES: dict[Distance, Callable[..., Array]] = {l1: best_in_l1, linf: best_in_linf}
"""Distances whose balls are polytopes, and how to maximise a linear function over them."""


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
    residuals = partial(_residuals, y=y, constraints=constraints)

    def round_(carry: tuple[Array, Array, Array], rate: Array) -> tuple[tuple, None]:
        q, multipliers, weight = carry

        def loss(q: Array) -> Array:
            v = brought(_on_simplex(q))
            pressure = jnp.maximum(multipliers + weight * residuals(v), 0)
            return jnp.square(pressure).sum() / (2 * weight) - value(v) / scale

        q = _adam(loss, q, rate)
        multipliers = jnp.maximum(multipliers + weight * residuals(brought(_on_simplex(q))), 0)
        return (q, multipliers, 3 * weight), None

    begin = (_coordinates(start), jnp.zeros_like(residuals(start)), jnp.asarray(10, y.dtype))
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
    if not constraints:
        return jnp.zeros(1, y.dtype)
    found = [jnp.ravel(constraint(v, y)) for constraint in constraints]
    # An infinite distance has no gradient, and any large one says as much.
    return jnp.minimum(jnp.nan_to_num(jnp.concatenate(found).astype(y.dtype), nan=10.0), 10.0)


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
