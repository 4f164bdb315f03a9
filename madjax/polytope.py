"""Balls that are polytopes inside the simplex, and the farthest angle in them.

{v on the simplex: |v - y|_1 <= epsilon} is all that can be written v = kept + given, where a mass
epsilon / 2 is given to any classes, and kept, 0 <= kept <= y, is what remains of y. The Linf ball
is a box cut by sum v = 1. So both are sums of boxes that are cut so: a linear function is maximised
over each by sorting, and every edge moves mass from one class to another.

With M scaled so that |G'y| = 1, and c = M y, the cosine of the angle is c'v / |G'v|, where |G'v|^2
= v'Mv. Two cases:

- c'v > 0 all over the polytope. There c'v / |G'v| is quasi-concave, so that it is smallest at a
  vertex: of the polytope, not of the simplex.
- c'v < 0 somewhere. There -c'v / |G'v| is quasi-concave, so that an answer which no small change
  improves is the best of all, past 90 degrees.

`exchange` ends where no exchange between two classes helps, in both cases. `bound` says how much
better anything could be.
"""

from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from madjax.constraints import l1, linf
from madjax.linear import dot

Array = jax.Array

EXHAUSTIVE = 10
"""Up to so many classes all vertices are compared."""
ORDERS = 32
"""Beyond that, so many orders of the classes, whose prefixes are kept."""
STARTS = 2
"""How many of the best points known are starts of `exchange`."""
EXCHANGES = 200
"""At most so many from a start."""
ROUNDING = float(np.finfo(np.float32).eps)
"""The error of |G'v|^2, as a part of (sum_k v_k |G_k|)^2."""
ENOUGH = 1e-4
"""Room beyond this does not count when `exchange` chooses a class; less counts in proportion."""

SHORTEST = 0.01
"""What `bound` takes as the least |G'v| / |G'y|: of much shorter ones float32 knows no angle."""


class Polytope(NamedTuple):
    """All v = sum_b x_b with low_b <= x_b <= high_b and sum_k x_bk = mass_b."""

    low: Array
    """[N, K]."""
    high: Array
    """[N, K]."""
    mass: Array
    """[N]."""
    most: Array | None = None
    """Where given, of two parts the masses are free, but for their sum and this bound of the second
    part's."""


def l1_ball(y: Array, epsilon: Array | float) -> Polytope:
    """The answers within an L1 distance, in two parts: kept of y [K], and given to any class."""
    given = jnp.minimum(epsilon / 2, y.sum())
    high = jnp.stack([y, jnp.full_like(y, given)])
    return Polytope(jnp.zeros_like(high), high, jnp.stack([y.sum() - given, given]))


def linf_ball(y: Array, epsilon: Array | float) -> Polytope:
    """The answers within an Linf distance, in one part."""
    low, high = jnp.maximum(y - epsilon, 0), jnp.minimum(y + epsilon, 1)
    return Polytope(low[None], high[None], y.sum()[None])


POLYTOPES = {l1: l1_ball, linf: linf_ball}
"""Distances whose balls in the simplex are polytopes: (y [K], epsilon) -> Polytope."""


def parts(polytope: Polytope, v: Array) -> Array:
    """The x [N, K] of an answer v [K] of the polytope."""
    if polytope.low.shape[0] == 1:
        return v[None]
    kept = jnp.minimum(v, polytope.high[0])
    kept *= jnp.minimum(polytope.mass[0] / jnp.where(kept.sum() > 0, kept.sum(), 1), 1)
    return jnp.stack([kept, v - kept])


def best_linear(polytope: Polytope, slope: Array) -> Array:
    """The x [N, K] with the largest slope'v: classes take what they may in the order of slope [K].

    Exact, in O(K log K).
    """
    order = jnp.argsort(-slope)
    room = (polytope.high - polytope.low)[:, order]
    before = jnp.cumsum(room, axis=1) - room
    free = (polytope.mass - polytope.low.sum(axis=1))[:, None]
    return polytope.low.at[:, order].add(jnp.clip(free - before, 0, room))


def farthest(polytope: Polytope, gram: Array, c: Array, others: Array) -> Array:
    """The answers [STARTS, K] that `exchange` finds from the best vertices, and others [M, N, K].

    gram [K, K], scaled so that |G'y| = 1, and c = M y [K]. The best of them is the best of all, up
    to rounding, where some answer is past 90 degrees, and for K <= `EXHAUSTIVE`.
    """
    gram = rounded(gram)
    best = partial(_best, polytope=polytope, gram=gram, c=c)
    if c.size <= EXHAUSTIVE:
        vertices = jax.lax.map(lambda k: best(_vertices(polytope, k)), jnp.arange(c.size))
    else:
        prefixes = jax.vmap(partial(best_linear, polytope))(slopes(gram, c, ORDERS))[:, 0]
        vertices = jax.vmap(lambda kept: best(kept[None]))(prefixes)
    starts = jnp.concatenate([vertices, best_linear(polytope, -c)[None], others])
    starts = starts[jax.lax.top_k(-cosines(starts.sum(axis=1), gram, c), STARTS)[1]]
    return jax.vmap(partial(exchange, polytope, gram, c))(starts).sum(axis=1)


class Kind(NamedTuple):
    """What an exchange is: of one class with all others."""

    to_taker: bool
    """All others give to the best taker; else the best giver gives to all others."""
    across: bool
    """From one part to the other."""


class _State(NamedTuple):
    """Where `exchange` is."""

    count: Array
    x: Array
    before: Array
    """x one exchange ago."""
    better: Array


def exchange(polytope: Polytope, gram: Array, c: Array, x: Array, most: int = EXCHANGES) -> Array:
    """From x [N, K], move mass from one class to another, as is best, until nothing turns farther.

    gram [K, K], `rounded`, and c [K] as for `farthest` -> x [N, K]. In each part the class that the
    gradient drains most is tried with every taker, and the one that it fills most with every giver:
    of those with room, as one that has almost nothing to give or to take would stop it all. After
    each exchange, x goes on along what the last two have moved (Hooke and Jeeves 1961): two that
    undo each other in part, again and again, become one long step. Where the parts' masses are
    free (`Polytope.most`), mass moves from one part to the other as well. It ends after `most`
    exchanges, or `EXCHANGES` if that is less.
    """
    most = min(most, EXCHANGES)
    diagonal = jnp.diagonal(gram)

    def move(state: _State) -> _State:
        x = state.x
        v = x.sum(axis=0)
        mv = dot(gram, v)
        n, q = dot(c, v), dot(v, mv)
        uphill = n * mv - q * c  # along the gradient of -c'v / |G'v|
        can_give, can_take = x - polytope.low, polytope.high - x
        gain = jnp.stack([uphill.max() - uphill, uphill - uphill.min()])[:, None]
        rooms = jnp.minimum(jnp.stack([can_give, can_take]), ENOUGH)
        giver, taker = (gain * rooms).argmax(axis=2)

        def tried(fixed: Array, sign: int, room: Array, of_others: Array, most: Array) -> tuple:
            """Of classes fixed [N] with all others: cosines and masses, [2, N, K] each."""
            room = jnp.minimum(jnp.take_along_axis(room, fixed[:, None], axis=1), of_others)
            room = jnp.minimum(room, most)
            change = [sign * (a[None] - a[fixed][:, None]) for a in (c, mv)]
            square = diagonal[None] + diagonal[fixed][:, None] - 2 * gram[fixed]
            cosine, mass = _along((n, q), (*change, square), room)
            return jnp.where(room[None] > 0, cosine, jnp.inf), mass

        far = jnp.full((len(giver), 1), jnp.inf, c.dtype)
        kinds = {
            Kind(to_taker=False, across=False): tried(giver, 1, can_give, can_take, far),
            Kind(to_taker=True, across=False): tried(taker, -1, can_take, can_give, far),
        }
        if polytope.most is not None:
            # The second part may grow by so much only: limits by the part of giver and of taker.
            spare = jnp.maximum(polytope.most - x[1].sum(), 0)
            of_giver = jnp.stack([spare, jnp.inf])[:, None]
            of_taker = of_giver[::-1]
            kinds |= {
                Kind(to_taker=False, across=True): tried(
                    giver, 1, can_give, can_take[::-1], of_giver
                ),
                Kind(to_taker=True, across=True): tried(
                    taker, -1, can_take, can_give[::-1], of_taker
                ),
            }
        cosine, mass = map(jnp.stack, zip(*kinds.values(), strict=True))
        at = cosine.argmin()
        kind, _, part, other = jnp.unravel_index(at, cosine.shape)
        to_taker, across = jnp.array(list(kinds))[kind]
        elsewhere = jnp.where(across, 1 - part, part)
        source = jnp.where(to_taker, other, giver[part])
        target = jnp.where(to_taker, taker[part], other)
        from_part = jnp.where(to_taker, elsewhere, part)
        to_part = jnp.where(to_taker, part, elsewhere)
        moved = mass.ravel()[at]
        moved = x.at[from_part, source].add(-moved).at[to_part, target].add(moved)
        better = cosine.ravel()[at] < _cosine(n, q) - 2 * jnp.finfo(c.dtype).eps
        x = jnp.where(better, moved, x)
        return _State(state.count + 1, onward(x, x - state.before), state.x, better)

    def onward(x: Array, way: Array) -> Array:
        """From x further along a way [N, K], as far as is best."""
        v, d = x.sum(axis=0), way.sum(axis=0)
        md = dot(gram, d)
        room = jnp.where(way > 0, polytope.high - x, x - polytope.low) / jnp.where(
            way == 0, 1, jnp.abs(way)
        )
        room = jnp.where(way == 0, jnp.inf, room).min()
        if polytope.most is not None:
            grown = way[1].sum()
            spare = jnp.maximum(polytope.most - x[1].sum(), 0)
            room = jnp.where(
                grown > 0, jnp.minimum(room, spare / jnp.where(grown > 0, grown, 1)), room
            )
        here = dot(c, v), dot(v, dot(gram, v))
        change = dot(c, d), dot(v, md), dot(d, md)
        cosine, far = _along(here, change, jnp.where(jnp.isfinite(room), room, 0))
        at = cosine.argmin()
        moved = _settled(polytope, jnp.clip(x + far[at] * way, polytope.low, polytope.high))
        return jnp.where(cosine[at] < _cosine(*here), moved, x)

    def goes_on(state: _State) -> Array:
        return (state.count < most) & state.better

    start = _State(jnp.zeros((), jnp.int32), x, x, jnp.ones((), bool))
    return jax.lax.while_loop(goes_on, move, start).x


def _settled(polytope: Polytope, x: Array) -> Array:
    """The x [N, K] with what rounding made of its masses put right, where there is most room.

    A long way onward from two tiny exchanges enlarges their rounding errors as well.
    """
    room = jnp.minimum(x - polytope.low, polytope.high - x)
    if polytope.most is not None:
        place = jnp.arange(x.size).reshape(x.shape) == room.argmax()
        return x + jnp.where(place, polytope.mass.sum() - x.sum(), 0)
    place = jnp.arange(x.shape[1])[None] == room.argmax(axis=1)[:, None]
    return x + jnp.where(place, (polytope.mass - x.sum(axis=1))[:, None], 0)


def _along(here: tuple, change: tuple, room: Array) -> tuple[Array, Array]:
    """The two best points v + t d, 0 <= t <= room [...]: cosines and t, [2, ...] each.

    here = (n, q) = (c'v, v'Mv); change = (n', s, r) = (c'd, d'Mv, d'Md). The cosine
    (n + n' t) / sqrt(q + 2 s t + r t^2) has one stationary point, t = (n s - n' q) / (n' s - n r);
    it is best there or at an end.
    """
    (n, q), (slope, s, r) = here, change
    below = slope * s - n * r
    t = (n * s - slope * q) / jnp.where(below == 0, 1, below)
    t = jnp.where(below == 0, room, jnp.clip(t, 0, room))

    def at(t: Array) -> Array:
        return _cosine(n + slope * t, q + 2 * s * t + r * jnp.square(t))

    return jnp.stack([at(t), at(room)]), jnp.stack([t, room])


def bound(polytope: Polytope, gram: Array, c: Array, x: Array) -> Array:
    """H of no answer in the polytope is above this, in [0, 4].

    (But of answers whose gradient is shorter than `SHORTEST` |G'y|.) gram [K, K], c [K] as for
    `farthest`; x [N, K] is the best answer that is known. Two bounds:

    Where c'v > 0 everywhere, the best H itself for K <= `EXHAUSTIVE`. Else |G'v|, which is convex,
    is bounded by a linear function, and the ratio of the two is maximised for each class that all
    mass may be given to.

    Past 90 degrees f = max -c'v / |G'v| is the length of the w = s v that minimises the convex
    |G'w|^2 / 2 + c'w. At any v it is at most its value plus s max (-c - M w)'v', a linear problem,
    which is 0 at the best v but for rounding; s is taken as that of an answer with |G'v| =
    `SHORTEST` |G'y|.
    """
    found = farthest(polytope, gram, c, x[None])
    v = found[cosines(found, rounded(gram), c).argmin()]
    mv = dot(gram, v)
    length = jnp.sqrt(jnp.maximum(dot(v, mv), jnp.finfo(c.dtype).tiny))
    best = dot(c, v) / length
    reached = jnp.clip(-best, 0, 1)
    slope = -c - reached * mv / length
    # slope'v is 0, and what it is in float32 is an error that both sides share.
    gain = dot(slope, best_linear(polytope, slope).sum(axis=0) - v)
    gap = jnp.maximum(gain, 0) / SHORTEST
    past_90 = -(gap + jnp.sqrt(jnp.square(gap) + jnp.square(reached)))
    below_90 = best if c.size <= EXHAUSTIVE else _below_90(polytope, gram, c)
    all_below = dot(c, best_linear(polytope, -c).sum(axis=0)) > 0
    return jnp.clip(2 - 2 * jnp.where(all_below, below_90, past_90), 0, 4)


def _below_90(polytope: Polytope, gram: Array, c: Array) -> Array:
    """A lower bound of c'v / |G'v|, where c'v > 0 all over the polytope.

    A vertex gives all mass of the second part to one class. What the first part has beyond its
    least, or lacks to its most, are shares g_i of a mass m, sum g = m, so that v = sum_i (g_i / m)
    v_i with v_i = v at g = m e_i, and |G'v| <= sum_i (g_i / m) |G'v_i|. The ratio of that sum to
    c'v is maximised by Dinkelbach's iteration (1967), a linear problem a step.
    """
    k = c.size
    given = jnp.zeros((1, k), c.dtype)
    if len(polytope.mass) > 1:
        given = polytope.mass[1] * jnp.eye(k, dtype=c.dtype)
    low, high, mass = polytope.low[0], polytope.high[0], polytope.mass[0]

    def ratio(given: Array, end: Array, moved: Array) -> Array:
        """The largest of the sum over c'v, where v = end + given + sum_i g_i sign e_i."""
        base = end + given
        square = dot(base, dot(gram, base)) + 2 * moved * dot(gram, base)
        square += jnp.square(moved) * jnp.diagonal(gram)
        lengths = jnp.sqrt(jnp.maximum(square, 0))
        inner = dot(c, base) + moved * c
        shares = Polytope(
            jnp.zeros((1, k), c.dtype), ((high - low) / jnp.abs(moved))[None], jnp.ones(1, c.dtype)
        )

        def improve(_: int, most: Array) -> Array:
            g = best_linear(shares, lengths - most * inner)[0]
            return jnp.maximum(dot(g, lengths) / dot(g, inner), most)

        return jax.lax.fori_loop(0, 12, improve, jnp.zeros((), c.dtype))

    def most(given: Array) -> Array:
        up, down = mass - low.sum(), high.sum() - mass
        tiny = jnp.finfo(c.dtype).tiny
        return jnp.minimum(
            ratio(given, low, jnp.maximum(up, tiny)), ratio(given, high, -jnp.maximum(down, tiny))
        )

    return 1 / jax.vmap(most)(given).max()


def _best(firsts: Array, polytope: Polytope, gram: Array, c: Array) -> Array:
    """The best x [N, K] of all first parts [n, K], where the second is given to one class."""
    k = c.size
    given = jnp.zeros((1, k), c.dtype)
    if len(polytope.mass) > 1:
        given = polytope.mass[1] * jnp.eye(k, dtype=c.dtype)
    across = dot(firsts, gram)
    square = (across * firsts).sum(axis=1)[:, None] + 2 * dot(across, given.T)
    square += (dot(given, gram) * given).sum(axis=1)[None]
    cosine = _cosine(dot(firsts, c)[:, None] + dot(given, c)[None], square).ravel()
    # In place of argmin, which takes one number at a time on CPUs.
    places = jnp.arange(cosine.size)
    at = jnp.where(cosine == cosine.min(), places, cosine.size - 1).min()
    first, second = jnp.divmod(at, len(given))
    return jnp.stack([firsts[first], given[second]][: len(polytope.mass)])


def _vertices(polytope: Polytope, last: Array) -> Array:
    """Vertices [2^(K-1), K] of the first part where class `last` takes what the others leave.

    Those have their least or their most. Where there is no such vertex, one that there is.
    """
    k = polytope.low.shape[1]
    full = (np.arange(2 ** (k - 1))[:, None] << 1 >> np.arange(k)) & 1
    full = jnp.asarray(full, polytope.low.dtype)
    low, high = (jnp.roll(a[0], -last) for a in (polytope.low, polytope.high))
    left = polytope.mass[0] - low.sum() - dot(full, high - low)
    x = low[None] + full * (high - low)[None]
    x = jnp.roll(x.at[:, 0].add(left), last, axis=1)
    known = (left >= 0) & (left <= high[0] - low[0])
    return jnp.where(known[:, None], x, best_linear(polytope, polytope.low[0])[:1])


def slopes(gram: Array, c: Array, orders: int) -> Array:
    """Linear objectives [orders + 1, K]: mixtures of c and diag M, and -c."""

    def scaled(v: Array) -> Array:
        v = v - v.mean()
        return v / jnp.maximum(jnp.abs(v).max(), jnp.finfo(v.dtype).tiny)

    turn = (2 * jnp.pi / orders) * jnp.arange(orders, dtype=c.dtype)[:, None]
    mixed = jnp.cos(turn) * scaled(c)[None] + jnp.sin(turn) * scaled(jnp.diagonal(gram))[None]
    return jnp.append(mixed, -c[None], axis=0)


def cosines(v: Array, gram: Array, c: Array) -> Array:
    """Cosines c'v / |G'v| [N] of answers v [N, K]; infinity where rounding leaves no |G'v|."""
    return _cosine(dot(v, c), (dot(v, gram) * v).sum(axis=1))


def rounded(gram: Array) -> Array:
    """M with rounding as one more parameter: v'Mv is |G'v|^2 + ROUNDING (sum_k v_k |G_k|)^2.

    So of a gradient that is short by cancellation, whose angle float32 does not know, the cosine is
    taken as smaller than it is, and as smaller the less it is known.
    """
    lengths = jnp.sqrt(jnp.maximum(jnp.diagonal(gram), 0))
    return gram + ROUNDING * jnp.outer(lengths, lengths)


def _cosine(inner: Array, square: Array) -> Array:
    """Inner / sqrt(square); infinity where the square is 0, or below by rounding."""
    known = square > 0
    return jnp.where(known, inner / jnp.sqrt(jnp.where(known, square, 1)), jnp.inf)
