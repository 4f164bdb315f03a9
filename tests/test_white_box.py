"""White-box mode: every step of an online attacker against explicit gradients and plain loops."""

from functools import partial

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx
from flax.core import freeze
from jax.sharding import PartitionSpec

import madjax
from madjax import MLP, InputError, LeNet, LineSearch, argmax_preserving, open_dataset, white_box
from madjax.sweep import make_mesh

NETWORK = MLP(4, (7,))
KEY = jax.random.split(jax.random.key(0), 5)
X = jax.random.normal(KEY[0], (24, 3, 3, 1))
PARAMS, OTHER, VICTIM = (NETWORK.init(key, X[:1]) for key in KEY[1:4])
Y = jax.nn.softmax(3 * NETWORK.apply(VICTIM, X))
APPLY = NETWORK.apply
train = partial(white_box, APPLY, PARAMS, X, Y, learning_rate=0.3)


def degrees(a, u):
    """Between two pytrees, in float64."""
    a, u = (
        np.concatenate([np.ravel(g).astype(np.float64) for g in jax.tree.leaves(each)])
        for each in (a, u)
    )
    cosine = a @ u / np.linalg.norm(a) / np.linalg.norm(u)
    return np.degrees(np.arccos(np.clip(cosine, -1, 1)))


def explicit(apply, params, x, targets):
    """The gradient of -sum_k t_k log F_k of every query, in float64."""
    with jax.enable_x64(True):
        params, targets = jax.tree.map(lambda a: jnp.asarray(a, jnp.float64), (params, targets))
        return jax.device_get(_gradients(apply, params, x, targets))


@partial(jax.jit, static_argnums=0)
def _gradients(apply, params, x, targets):
    def loss(params, x, t):
        log_p = jax.nn.log_softmax(apply(params, x[None])[0])
        assert log_p.dtype == jnp.float64
        return -(t * log_p).sum()

    return jax.vmap(jax.grad(loss), (None, 0, 0))(params, x, targets)


def explicit_angle(apply, params, x, y_tilde, y):
    """The angle between the two gradients of one query, in float64."""
    both = explicit(apply, params, jnp.stack([x, x]), jnp.stack([y_tilde, y]))
    return degrees(*(jax.tree.map(lambda g, i=i: g[i], both) for i in (0, 1)))


def same(got, wanted, **tolerance):
    assert jax.tree.structure(got) == jax.tree.structure(wanted)
    compare = partial(np.testing.assert_allclose, **({"atol": 1e-5} | tolerance))
    jax.tree.map(compare, got, wanted)


# --- the angle ------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("epsilon", "layers"), [pytest.param(0.99, "last", marks=pytest.mark.slow), (2.0, "all")]
)
def test_the_angle_is_that_of_explicit_gradients_in_float64_while_lenet_trains(epsilon, layers):
    """50 steps with updates, each at the parameters that the attacker has then, to 1e-3 degrees."""
    data = open_dataset("embedded:mnist[:50]")
    network = madjax.Classifier(LeNet(10), data.family.preprocess, data.image_shape)
    params, x = jax.jit(network.init)(jax.random.key(0)), jnp.asarray(data.x_train)
    y = 0.97 * jax.nn.one_hot(data.y_train, 10) + 0.003
    options = {"learning_rate": 0.02, "callback": lambda done, now: now}
    _, trace = white_box(network.apply, params, x, y, epsilon=epsilon, layers=layers, **options)
    wanted = []
    for t in range(50):
        now = params if t == 0 else jax.tree.map(lambda a, t=t: a[t - 1], trace.called)
        wanted.append(explicit_angle(network.apply, now, x[t], trace.y_tilde[t], y[t]))
    wanted = np.array(wanted)
    away = (wanted > 1) & (wanted < 179)
    assert away.sum() > 45
    assert np.ptp(wanted) > 5
    np.testing.assert_allclose(trace.angle[away], wanted[away], atol=1e-3)
    np.testing.assert_allclose(trace.angle, wanted, atol=0.05)


def test_near_the_attackers_own_posterior_the_angle_keeps_its_digits():
    """There G'y is a small difference, which a product of y with the Gram matrix has lost."""
    p = jax.nn.softmax(APPLY(PARAMS, X))
    y = p + 3e-3 * (Y - p)
    still = {"epsilon": 0.5, "layers": "identity", "learning_rate": 0.0}
    _, trace = white_box(APPLY, PARAMS, X, y, **still)
    wanted = [
        explicit_angle(APPLY, PARAMS, *each) for each in zip(X, trace.y_tilde, y, strict=True)
    ]
    np.testing.assert_allclose(trace.angle, wanted, atol=0.02)
    product = jax.vmap(madjax.angle)(trace.y_tilde, y, madjax.gram(APPLY, PARAMS, X))
    assert np.abs(product - np.array(wanted)).max() > 0.5


EXTREME = LineSearch()


# --- the loop -------------------------------------------------------------------------------------


def plain_loop(
    epsilon,
    layers="all",
    solver=EXTREME,
    optimizer=None,
    batch=1,
    refresh=1,
    surrogate=None,
):
    """`madjax.perturb`, `jax.grad` and optax by hand: parameters and the fields of the trace."""
    rule = optimizer or optax.sgd(0.3)
    params, known, state = PARAMS, PARAMS, rule.init(PARAMS)
    poison = partial(madjax.perturb, epsilon=epsilon, layers=layers, solver=solver)
    distance = getattr(solver, "distance", madjax.l1)
    trace = []
    for t in range(len(X) // batch):
        x, y = (a[t * batch : (t + 1) * batch] for a in (X, Y))
        known = params if refresh and t % refresh == 0 else known
        y_tilde = poison(*(surrogate or (APPLY, known)), x, y)
        loss = -(y_tilde * jax.nn.log_softmax(APPLY(params, x))).sum(-1)
        far = jax.vmap(distance)(y_tilde, y)
        apart = [explicit(APPLY, params, x, targets) for targets in (y_tilde, y)]
        angle = [
            degrees(*(jax.tree.map(lambda g, i=i: g[i], each) for each in apart))
            for i in range(batch)
        ]
        poisoned, true = jax.tree.map(lambda g: g.mean(0).astype(np.float32), apart)
        (updates, after), (wanted, _) = (rule.update(g, state, params) for g in (poisoned, true))
        trace.append(
            (angle, far, loss, y_tilde, [degrees(poisoned, true)], [degrees(updates, wanted)])
        )
        params, state = optax.apply_updates(params, updates), after
    return params, [np.concatenate(each) for each in zip(*trace, strict=True)]


def slow(settings):
    return pytest.param(settings, marks=pytest.mark.slow)


MOMENTUM = optax.sgd(0.3, momentum=0.9)
SLOWER, FASTER = optax.sgd(0.9), optax.sgd(2.0)


@pytest.mark.parametrize(
    "settings",
    [
        slow({"epsilon": 0.7}),
        {"epsilon": 2.0},
        slow({"epsilon": 0.7, "layers": "last"}),
        {"epsilon": 0.7, "solver": LineSearch(argmax_preserving, distance=madjax.l2)},
        slow({"epsilon": 0.7, "optimizer": MOMENTUM}),
        {"epsilon": 0.7, "optimizer": optax.adam(0.05), "batch": 4},
        slow({"epsilon": 0.7, "batch": 4}),
        slow({"epsilon": 1.5, "refresh": 6, "optimizer": SLOWER}),
        {"epsilon": 1.5, "refresh": 2, "batch": 3, "optimizer": FASTER},
        slow({"epsilon": 0.7, "refresh": 0}),
        {"epsilon": 0.7, "surrogate": (APPLY, OTHER)},
    ],
    ids=lambda settings: ", ".join(settings),
)
def test_the_scan_is_a_plain_loop(settings):
    got, trace = train(**settings)
    params, wanted = plain_loop(**settings)
    same(got, params, atol=5e-5)
    for field, values in zip(trace._fields, wanted, strict=False):
        atol = 0.05 if field.endswith("angle") else 2e-4
        np.testing.assert_allclose(getattr(trace, field), values, atol=atol, err_msg=field)
    assert trace.angle.max() > 20
    if settings.get("refresh"):
        live = train(**(settings | {"refresh": 1}))[1]
        assert jnp.abs(trace.y_tilde - live.y_tilde).max() > 0.1
    plain = settings.get("optimizer") in (None, SLOWER, FASTER)
    assert (np.abs(trace.update_angle - trace.batch_angle).max() < 1e-4) == plain
    one = settings.get("batch", 1) == 1
    assert trace.batch_angle.shape == ((24 // settings.get("batch", 1)),)
    assert not one or (trace.batch_angle == trace.angle).all()


def test_a_batch_that_holds_a_query_twice_has_its_angle():
    twice = np.array([0, 0, 1, 1])
    _, trace = white_box(APPLY, PARAMS, X[twice], Y[twice], epsilon=0.7, batch=2)
    np.testing.assert_allclose(trace.batch_angle, trace.angle[::2], atol=1e-3)


def test_it_maps_over_epsilons_seeds_and_devices():
    """A grid of 2 x 2 attackers by vmap, and over 4 devices, is the 4 attackers one by one."""
    epsilons, both = jnp.array([0.5, 1.5]), jax.tree.map(lambda *a: jnp.stack(a), PARAMS, OTHER)

    def one(params, epsilon, refresh=3):
        how = {"refresh": refresh, "batch": 2, "learning_rate": 0.5}
        return white_box(APPLY, params, X, Y, epsilon=epsilon, **how)

    def grid(over):
        return jax.jit(
            over(lambda params: jax.vmap(partial(one, params))(epsilons)),
        )(both)

    def spread(function):
        here = PartitionSpec("cells")
        options = {"mesh": make_mesh(jax.devices()[:2]), "in_specs": here, "out_specs": here}
        return jax.shard_map(partial(jax.lax.map, function), **options, check_vma=False)

    mapped, spread_out = grid(jax.vmap), grid(spread)
    for s, params in enumerate((PARAMS, OTHER)):
        for e, epsilon in enumerate(epsilons):
            after, trace = one(params, epsilon)
            for many in (mapped, spread_out):
                got, seen = jax.tree.map(lambda a, at=(s, e): a[at], many)
                same(got, after, atol=1e-4)
                same(seen._replace(**angles(seen)), trace._replace(**angles(trace)), atol=1e-4)
                for field, values in angles(trace, 1).items():
                    same(getattr(seen, field), values, atol=0.05)
            assert jnp.abs(trace.y_tilde - one(params, epsilon, refresh=0)[1].y_tilde).max() > 0.1


def angles(trace, factor=0):
    """The fields of a trace in degrees, times a factor."""
    return {f: factor * getattr(trace, f) for f in trace._fields if f.endswith("angle")}


def test_memory_does_not_grow_with_steps_but_for_the_trace():
    def needs(n):
        x, y = (jnp.zeros((n, *a.shape[1:])) for a in (X, Y))
        run = jax.jit(lambda x, y: white_box(APPLY, PARAMS, x, y, epsilon=0.5))
        return run.lower(x, y).compile().memory_analysis().temp_size_in_bytes

    inputs = X[0].size + 4
    trace = 4 + 3 + 2
    assert needs(4096) - needs(64) <= 4 * (4096 - 64) * (inputs + trace + 1)
    jaxpr = str(jax.make_jaxpr(lambda x, y: white_box(APPLY, PARAMS, x, y, epsilon=0.5))(X, Y))
    assert jaxpr.count("scan[") == 1


def test_an_optimizer_may_take_the_loss():
    """As those do that lower the rate when it no longer falls."""

    def update(gradient, state, params=None, *, value, **_):
        return jax.tree.map(lambda g: -0.3 * value * g, gradient), state

    scaled = optax.GradientTransformationExtraArgs(lambda params: (), update)
    params, trace = white_box(APPLY, PARAMS, X[:1], Y[:1], epsilon=0.7, optimizer=scaled)
    rate = 0.3 * trace.loss[0]
    same(params, white_box(APPLY, PARAMS, X[:1], Y[:1], epsilon=0.7, learning_rate=rate)[0])


def test_where_nothing_is_turned_angles_are_exactly_0():
    for settings in ({}, {"optimizer": optax.adam(0.05), "batch": 4}):
        _, trace = train(epsilon=0.0, **settings)
        assert max(field.max() for field in angles(trace, 1).values()) == 0
    p = jax.nn.softmax(APPLY(PARAMS, X))
    still = {"epsilon": 0.5, "learning_rate": 0.0}
    for other in ({"layers": "identity"}, {"surrogate": (APPLY, OTHER)}):
        _, trace = white_box(APPLY, PARAMS, X, p, **still, **other)
        assert trace.distance.min() > 0.1
        assert trace.angle.max() == 0


def test_under_x64_the_trace_is_the_same():
    with jax.enable_x64(True):
        _, trace = train(epsilon=0.7, callback=lambda done, _: done, every=9)
    assert trace.called.tolist() == [9, 18]
    same(trace.angle, train(epsilon=0.7)[1].angle, atol=0.05)


@pytest.mark.parametrize("every", [9, 24])
def test_the_callback_sees_the_parameters_of_its_step(every):
    def watch(done, params):
        return {"done": done, "weights": params, "loss": -jnp.log(APPLY(params, X[:1]).max())}

    params, trace = train(epsilon=0.7, callback=watch, every=every)
    done = list(range(every, 25, every))
    assert trace.called["done"].tolist() == done
    for at, steps in enumerate(done):
        now, _ = white_box(APPLY, PARAMS, X[:steps], Y[:steps], epsilon=0.7, learning_rate=0.3)
        same(jax.tree.map(lambda a, at=at: a[at], trace.called["weights"]), now)
    same(train(epsilon=0.7)[0], params)


# --- networks of any kind -------------------------------------------------------------------------


class Scaled(nn.Module):
    """A layer that `gram` takes by jacrev, with most of the parameters."""

    @nn.compact
    def __call__(self, x):
        x = x.reshape(len(x), -1)
        return nn.Dense(4)(x * self.param("scale", nn.initializers.ones, (1, 9)) ** 3)


def test_a_network_of_unknown_layers_goes_by_jacrev_and_says_so():
    network = Scaled()
    params = network.init(KEY[4], X[:1])
    with pytest.warns(UserWarning, match="go by jacrev, slower: parameter scale"):
        _, trace = white_box(network.apply, params, X[:1], Y[:1], epsilon=0.7)
    wanted = explicit_angle(network.apply, params, X[0], trace.y_tilde[0], Y[0])
    np.testing.assert_allclose(trace.angle, wanted, atol=1e-3)


def test_what_is_no_weight_stays_as_it_is():
    """Statistics, counters and random keys are not trained; a FrozenDict is one no more."""

    def apply(params, x):
        return NETWORK.apply({"params": params["params"]["net"]}, x - params["mean"])

    params = {
        "params": {"net": PARAMS["params"], "seen": jnp.arange(3)},
        "mean": jnp.float32(0.1),
    }
    for given in (params, freeze(params)):
        after, _ = white_box(apply, given, X, Y, epsilon=0.7, optimizer=MOMENTUM)
        assert (after["mean"], after["params"]["seen"].tolist()) == (jnp.float32(0.1), [0, 1, 2])
        weights = jax.tree.leaves(after["params"]["net"]), jax.tree.leaves(PARAMS)
        assert all(jnp.abs(a - b).max() > 1e-3 for a, b in zip(*weights, strict=True))


def test_a_model_of_nnx_trains_too():
    model = nnx.Linear(9, 4, rngs=nnx.Rngs(0))
    structure, state = nnx.split(model)

    def apply(state, x):
        return nnx.merge(structure, state)(x.reshape(len(x), -1))

    with pytest.warns(UserWarning, match="jacrev"):
        after, trace = white_box(apply, state, X, Y, epsilon=0.7, learning_rate=0.3)
    plain = {"w": model.kernel[...], "b": model.bias[...]}
    with pytest.warns(UserWarning, match="jacrev"):
        wanted, again = white_box(
            lambda w, x: x.reshape(len(x), -1) @ w["w"] + w["b"][None],
            plain,
            X,
            Y,
            epsilon=0.7,
            learning_rate=0.3,
        )
    np.testing.assert_allclose(after["kernel"][...], wanted["w"], atol=1e-5)
    np.testing.assert_allclose(trace.angle, again.angle, atol=1e-2)


# --- bad input ------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("settings", "wrong"),
    [
        ({"optimizer": 0.1}, "optimizer is 0.1: give an optax transformation"),
        ({"optimizer": optax.adam}, "give an optax transformation, such as optax.adam"),
        ({"batch": 0}, "batch is 0"),
        ({"batch": 4.0}, "batch is 4.0"),
        ({"refresh": 1.5}, "refresh is 1.5"),
        ({"learning_rate": optax.constant_schedule(0.1)}, r"give optimizer=optax.sgd"),
        ({"learning_rate": np.array([0.1, 0.2])}, r"shape \(2,\)"),
        ({"surrogate": OTHER}, "surrogate is no pair"),
        ({"callback": 3}, "callback is 3"),
        ({"batch": 5}, "batch is 5 for 24 queries: give a divisor"),
        ({"refresh": -1}, "refresh is -1"),
        ({"refresh": 2, "surrogate": (APPLY, OTHER)}, "never refreshed"),
        ({"every": 0}, "every is 0"),
        ({"learning_rate": -1.0}, "learning_rate is -1.0"),
        ({"learning_rate": np.nan}, "learning_rate is nan"),
        ({"epsilon": -0.1}, "epsilon is -0.1"),
        ({"epsilon": np.array([0.1, 0.2])}, r"shape \(2,\): give one budget, and jax.vmap"),
        ({"layers": "first"}, "layers is 'first'"),
        ({"solver": 3}, "solver"),
    ],
    ids=lambda value: None if isinstance(value, str) else ", ".join(value),
)
def test_bad_input_is_named(settings, wrong):
    with pytest.raises(InputError, match=wrong):
        train(**({"epsilon": 0.5} | settings))


def test_posteriors_of_other_classes_are_refused():
    with pytest.raises(InputError, match="y has posteriors of 3 classes: apply returns 4 logits"):
        white_box(APPLY, PARAMS, X, jnp.full((24, 3), 1 / 3), epsilon=0.5)


@pytest.mark.parametrize("y", [Y[:5], Y[0], jnp.log(Y)])
def test_what_is_no_set_of_posteriors_is_refused(y):
    with pytest.raises(InputError, match=r"posterior"):
        white_box(APPLY, PARAMS, X, y, epsilon=0.5)
