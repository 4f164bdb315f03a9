"""White-box mode: an attacker that trains online, before a defence that knows its parameters.

The study of the paper's section 5.2.3 (Fig. 6, 7 and A5): at every step the attacker sends a query,
the defence perturbs the answer with the attacker's own gradients in place of a surrogate's, and
the angle between the poisoned and the true gradient, over all parameters, is recorded.
`white_box` is the loop; `step` is one step of it, for loops of another kind.
"""

from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

from madjax.batching import map_within
from madjax.constraints import l1
from madjax.errors import InputError
from madjax.gram import check_layers, gram
from madjax.mad import AnySolver, LineSearch, as_posterior, check_epsilon, check_solver, solve
from madjax.objectives import angle, angle_between
from madjax.taps import Apply, Params, as_logits, weights

Array = jax.Array
Callback = Callable[[Array, Params], Any]
"""(steps done, the attacker's parameters) -> a pytree of arrays."""


class Trace(NamedTuple):
    """What is recorded of N queries, and of the N / B steps that took B of them each; float32."""

    angle: Array
    """[N] degrees between the gradients of -log F on the answer and on the posterior, over all
    parameters; 0 where either vanishes, NaN where the attacker has diverged."""
    distance: Array
    """[N] between the answer and the posterior, by the solver's distance."""
    loss: Array
    """[N] -sum_k y~_k log F_k(x), in nats, before the step."""
    y_tilde: Array
    """[N, K] the answers."""
    batch_angle: Array
    """[N / B] degrees between the two gradients of a batch's mean loss; `angle` where B is 1."""
    update_angle: Array
    """[N / B] degrees between the step taken and the one that the optimiser, in the same state,
    would make of the true gradient; `batch_angle` for plain SGD."""
    called: Any = ()
    """What the callback returned, its calls along the first axis."""


def white_box(
    apply: Apply,
    params: Params,
    x: Array,
    y: Array,
    *,
    epsilon: Array | float,
    learning_rate: Array | float = 1e-3,
    layers: str = "all",
    solver: AnySolver = LineSearch(),
    optimizer: optax.GradientTransformation | None = None,
    batch: int = 1,
    refresh: int = 1,
    surrogate: tuple[Apply, Params] | None = None,
    callback: Callback | None = None,
    every: int = 1,
) -> tuple[Params, Trace]:
    """Train an attacker online, one step a query, against a defence that knows its parameters.

    At step t the answer is y~ = argmax H(y~) (Eq. 4 to 7) with G = d log F(x_t; w_t) / d w of the
    attacker itself; then w_{t+1} = w_t + learning_rate G'y~. The angle recorded is that between
    G'y~ and G'y over all parameters, whatever `layers` is (section 5.2.3, Fig. 6). One `lax.scan`;
    memory does not grow with N but for the trace. It is a function of its arrays: `jax.vmap` it
    over epsilon, learning_rate or params, or give it to `jax.shard_map(..., check_vma=False)`.
    Programs are compiled once for each function, solver and optimizer: give the same objects at
    every call.

    Args:
        apply: the attacker's network, apply(params, x [B, ...]) -> logits [B, K]; see `gram`. What
            `gram` cannot take by layers goes by `jacrev`, with a warning.
        params: its first parameters.
        x: the queries [N, ...], sent in this order. Repeat what is to be sent again.
        y: the victim's posteriors for them [N, K].
        epsilon: the budget, a scalar; 0 is the clean path.
        learning_rate: of plain SGD, where no optimizer is given.
        layers: what the defence's G is taken over; see `gram`.
        solver: see `solve`.
        optimizer: any optax transformation, its learning rate included, in place of plain SGD. It
            steps over the weights, params["params"] where there is that key; the loss is its
            argument `value` where it takes one.
        batch: B, queries a step; the step is by the mean of their losses.
        refresh: the defence is handed the attacker's parameters every so many steps: 1 is
            white-box, more a surrogate that grows stale; 0 leaves it the first ones for ever.
        surrogate: (apply, params) of another network that the defence has in place of the
            attacker's, as in black-box mode.
        callback: callback(steps done, parameters), called after every `every` steps; what it
            returns, a pytree of arrays, is in the trace. It is traced: `jax.debug.callback` inside
            it reaches Python.
        every: steps between two calls.

    Returns:
        The parameters after the last step, a FrozenDict as a dict, and the `Trace`. trace.angle
        [N], trace.distance [N], trace.loss [N] and trace.y_tilde [N, K] are of queries,
        trace.batch_angle and trace.update_angle [N / batch] of steps.

    Edge cases:
        epsilon = 0: answers are y, bit for bit, and angles are 0.
        no query: params as they are, and an empty trace.
        y is the attacker's own posterior: its angle is 0, and its answer y where the defence knows
            that, by the attacker's own "all" or "last" layers.
        training that diverges: angles are NaN from there on.
        fewer steps than every: the callback is not called, and what it returned is empty.

    Raises:
        InputError: see `gram` and `solve`; a batch that does not divide N; an optimizer that is no
            optax transformation; refresh with a surrogate, which is never refreshed.

    Example:
        >>> import jax, madjax
        >>> x, y = jax.random.normal(jax.random.key(0), (8, 5)), jax.numpy.full((8, 3), 1 / 3)
        >>> network = madjax.MLP(3, hidden=(4,))
        >>> params = network.init(jax.random.key(1), x)
        >>> params, trace = madjax.white_box(network.apply, params, x, y, epsilon=0.5)
        >>> trace.angle.shape, trace.y_tilde.shape, trace.distance.max().round(3)
        ((8,), (8, 3), Array(0.5, dtype=float32))
    """
    check_epsilon(epsilon)
    check_layers(layers)
    check_solver(solver)
    x, y, epsilon = jnp.asarray(x), as_posterior(y), jnp.asarray(epsilon, jnp.float32)
    if y.ndim != 2 or len(y) != len(x):
        raise InputError(f"white_box takes posteriors y [N, K] for {len(x)} queries, not {y.shape}")
    if epsilon.ndim:
        raise InputError(
            f"epsilon has shape {epsilon.shape}: give one budget, and jax.vmap over several"
        )
    for name, value, least in (("batch", batch, 1), ("refresh", refresh, 0), ("every", every, 1)):
        if not isinstance(value, int | np.integer) or value < least:
            raise InputError(f"{name} is {value}: give a whole number >= {least}")
    if len(x) % batch:
        raise InputError(
            f"batch is {batch} for {len(x)} queries: give a divisor of that, so that all are spent"
        )
    if surrogate is not None:
        if refresh != 1:
            raise InputError(
                f"refresh is {refresh} with a surrogate, which is never refreshed: leave out one"
            )
        if not isinstance(surrogate, tuple) or len(surrogate) != 2:
            raise InputError("surrogate is no pair: give (apply, params) of another network")
    if callback is not None and not callable(callback):
        raise InputError(f"callback is {callback!r}: give a function of (steps done, parameters)")
    if optimizer is not None and not (hasattr(optimizer, "init") and hasattr(optimizer, "update")):
        raise InputError(
            f"optimizer is {optimizer!r}: give an optax transformation, such as optax.adam(1e-3)"
        )
    _check_rate(learning_rate)
    defence = _Defence(layers, solver, refresh, surrogate and surrogate[0])
    calling = _Calling(callback, every) if callback else None
    known = surrogate and surrogate[1]
    settings = apply, defence, optimizer, batch, calling
    return _white_box(*settings, params, known, x, y, epsilon, jnp.asarray(learning_rate))


class _Defence(NamedTuple):
    layers: str
    solver: AnySolver
    refresh: int
    apply: Apply | None
    """Of a surrogate other than the attacker."""


class _Calling(NamedTuple):
    callback: Callback
    every: int


def _check_rate(learning_rate: Any) -> None:
    """Refuse what is no number >= 0, where it is not traced."""
    if callable(learning_rate):
        raise InputError(
            "learning_rate is a function: give optimizer=optax.sgd(learning_rate) for a schedule"
        )
    if jnp.ndim(learning_rate):
        shape = jnp.shape(learning_rate)
        raise InputError(f"learning_rate has shape {shape}: give one, and jax.vmap over several")
    if isinstance(learning_rate, jax.core.Tracer):
        return
    if not 0 <= learning_rate < np.inf:
        raise InputError(f"learning_rate is {learning_rate}: give a number >= 0")


@partial(jax.jit, static_argnums=(0, 1, 2, 3, 4))
def _white_box(
    apply: Apply,
    defence: _Defence,
    optimizer: optax.GradientTransformation | None,
    batch: int,
    calling: _Calling | None,
    params: Params,
    surrogate: Params,
    x: Array,
    y: Array,
    epsilon: Array,
    learning_rate: Array,
) -> tuple[Params, Trace]:
    one_query = jax.ShapeDtypeStruct((1, *x.shape[1:]), x.dtype)
    k = as_logits(jax.eval_shape(apply, params, one_query), 1).shape[1]
    if k != y.shape[1]:
        raise InputError(f"y has posteriors of {y.shape[1]} classes: apply returns {k} logits")
    steps = len(x) // batch
    distance = getattr(defence.solver, "distance", l1)
    is_plain = optimizer is None
    optimizer = optax.sgd(learning_rate) if is_plain else optimizer

    def answer(known: Params, x: Array, y: Array) -> Array:
        m = gram(defence.apply or apply, known, x, layers=defence.layers)
        solved = partial(solve, epsilon=epsilon, solver=defence.solver)
        return map_within(jax.vmap(lambda query: solved(*query)), (y, m))

    def one(now: _Run, at: tuple[Array, Array, Array]) -> tuple[_Run, Seen]:
        t, x, y = at
        if defence.refresh > 1:
            now = now._replace(known=handed(defence.refresh, t, now.attacker.params, now.known))
        known = now.attacker.params if now.known is None else now.known
        y_tilde = answer(known, x, y)
        attacker, seen = step(apply, optimizer, now.attacker, x, y, y_tilde, is_plain=is_plain)
        if calling and steps >= calling.every:
            now = now._replace(called=_called(calling, t + 1, attacker.params, now.called))
        far = jax.vmap(distance)(y_tilde, y)
        return now._replace(attacker=attacker), (seen, far, y_tilde)

    attacker = fresh(optimizer, params)
    start = _Run(
        attacker,
        known=attacker.params if surrogate is None and defence.refresh != 1 else surrogate,
        called=_blank(calling, params, steps) if calling else (),
    )
    numbers = jnp.arange(steps, dtype=jnp.int32)
    by_step = jax.tree.map(lambda a: a.reshape(steps, batch, *a.shape[1:]), (x, y))
    with jax.default_matmul_precision("highest"):  # angles are what this is run for
        end, (seen, far, y_tilde) = jax.lax.scan(one, start, (numbers, *by_step))
    by_query = (seen.angle, far, seen.loss, y_tilde)
    by_query = (a.reshape(len(x), *a.shape[2:]) for a in by_query)
    return end.attacker.params, Trace(*by_query, seen.batch_angle, seen.update_angle, end.called)


class Attacker(NamedTuple):
    """An online attacker between two steps."""

    params: Params
    opt_state: Any
    """Of `weights(params).tree`."""


def fresh(optimizer: optax.GradientTransformation, params: Params) -> Attacker:
    """An attacker before its first step; a FrozenDict is a dict, as every step makes it."""
    w = weights(params)
    return Attacker(w.rebuild(w.leaves), optimizer.init(w.tree))


class _Run(NamedTuple):
    attacker: Attacker
    known: Params
    """What the defence was last handed; None where that is at every step."""
    called: Any


def handed(refresh: int, t: Array, attacker: Params, known: Params) -> Params:
    """What the defence knows at step t, being handed the attacker's parameters now and then."""
    return jax.lax.cond(t % refresh == 0, lambda: attacker, lambda: known)


def _blank(calling: _Calling, params: Params, steps: int) -> Any:
    """Room for what the callback will return."""
    one = jax.eval_shape(calling.callback, jnp.zeros((), jnp.int32), params)
    calls = steps // calling.every
    return jax.tree.map(lambda a: jnp.zeros((calls, *a.shape), a.dtype), one)


def _called(calling: _Calling, done: Array, params: Params, called: Any) -> Any:
    """What the callback returned so far."""

    def call() -> Any:
        at, new = done // calling.every - 1, calling.callback(done, params)
        return jax.tree.map(lambda old, new: old.at[at].set(new), called, new)

    return jax.lax.cond(done % calling.every == 0, call, lambda: called)


class Seen(NamedTuple):
    """What one step shows of its B queries; see `Trace`."""

    angle: Array
    """[B]."""
    loss: Array
    """[B]."""
    batch_angle: Array
    update_angle: Array


def step(
    apply: Apply,
    optimizer: optax.GradientTransformation,
    attacker: Attacker,
    x: Array,
    y: Array,
    targets: Array,
    *,
    is_plain: bool = False,
) -> tuple[Attacker, Seen]:
    """One step of an online attacker on targets [B, K], where the posteriors are y [B, K].

    The gradient of the batch's mean loss on t is -(1/B) sum_i G_i't_i, with G_i the attacker's
    d log F(x_i; w) / d w. As G'p = 0 (score identity), t - p takes the place of t, and y - p that
    of y: near p nothing but rounding would be left of G'y. A query's angle is that of its Gram
    matrix M = G G', which XLA computes once where the defence computes the same. is_plain: the
    optimiser's updates are its gradients times a negative number, and it takes no `value`.
    """
    w = weights(attacker.params)

    def log_likelihoods(trained: Params) -> Array:
        logits = apply(w.rebuild(jax.tree.leaves(trained)), x)
        return jax.nn.log_softmax(logits.astype(jnp.float32))

    log_p, pull_back = jax.vjp(log_likelihoods, w.tree)
    a, u = _less(log_p, targets), _less(log_p, y)
    loss = -(targets * log_p).sum(-1)
    update = partial(optax.with_extra_args_support(optimizer).update, value=loss.mean())
    (poisoned,) = pull_back(-a / len(x))
    updates, opt_state = update(poisoned, attacker.opt_state, w.tree)
    moved = optax.apply_updates(w.tree, updates)

    m = gram(apply, attacker.params, x)
    angles = jax.vmap(angle)(a, u, m)
    still = (targets == y).all(-1)
    sound = jnp.isfinite(m).all((1, 2)) & jnp.isfinite(log_p).all(-1)
    angles = jnp.where(sound, jnp.where(still, 0, angles), jnp.nan)

    def turned(poisoned: Params, true: Params) -> Array:
        between = angle_between(poisoned, true)
        return jnp.where(still.all() & ~jnp.isnan(between), 0, between)

    batch_angle = angles[0]
    if len(x) > 1 or not is_plain:
        (true,) = pull_back(-u / len(x))
        batch_angle = turned(poisoned, true) if len(x) > 1 else batch_angle
    update_angle = batch_angle
    if not is_plain:
        wanted, _ = update(true, attacker.opt_state, w.tree)
        update_angle = turned(updates, wanted)
    after = Attacker(w.rebuild(jax.tree.leaves(moved)), opt_state)
    return after, Seen(angles, loss, batch_angle, update_angle)


def _less(log_p: Array, t: Array) -> Array:
    """The part t - p sum_k t_k of targets t [B, K], as G'p = 0; 0 where that is but rounding.

    Entry by entry, as those of an attacker that is certain have digits however small they are; the
    largest p has none, and its entry is what the others leave of a sum of 0.
    """
    p, total = jnp.exp(log_p), t.sum(-1, keepdims=True)
    v = t - p * total
    noise = jnp.finfo(v.dtype).eps * (3 * jnp.maximum(jnp.abs(t), p) - p * log_p / 2)
    is_top = jax.nn.one_hot(log_p.argmax(-1), p.shape[-1], dtype=bool)
    others = jnp.where(is_top | (jnp.abs(v) <= noise), 0, v)
    return jnp.where(is_top, -others.sum(-1, keepdims=True), others)
