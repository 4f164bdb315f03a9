"""Budget and objective hold for posteriors and networks of every type, with and without x64."""

from dataclasses import replace
from functools import partial

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import madjax
from madjax import (
    MAD,
    MLP,
    AdaptiveKnockoff,
    Classifier,
    Defended,
    InputError,
    Knockoff,
    LineSearch,
    Online,
    Recipe,
    Sweep,
    Task,
    angle,
    argmax_preserving,
    deviation,
    jbtop,
    perturb,
    report,
    solve,
    sweep,
)
from madjax.datasets import MNIST_FAMILY
from madjax.evaluate import utility
from madjax.objectives import angle_between, defined
from madjax.recipe import cross_entropy

jit_solve = jax.jit(solve, static_argnames="solver")


class Net(nn.Module):
    dtype: object = None

    @nn.compact
    def __call__(self, x):
        x = nn.relu(nn.Dense(8, dtype=self.dtype)(x))
        return nn.Dense(4, dtype=self.dtype)(x)


X = jax.random.normal(jax.random.key(0), (5, 6))
PARAMS = Net().init(jax.random.key(1), X)
Y = jax.nn.softmax(20 * jax.random.normal(jax.random.key(3), (5, 4)))
surrogate = partial(perturb, Net().apply, PARAMS, X)


def spent(y_tilde, y):
    """L1 distances in float64."""
    return np.abs(np.asarray(y_tilde, np.float64) - np.asarray(y, np.float64)).sum(-1)


# --- posteriors of any type -----------------------------------------------------------------------


@pytest.mark.parametrize("kind", [jnp.bfloat16, jnp.float16, np.float16, np.float64])
@pytest.mark.parametrize("epsilon", [0.0, 0.3, 1.96])
def test_the_ball_holds_for_posteriors_of_any_precision(kind, epsilon):
    y = np.asarray(Y).astype(kind)
    y_tilde = surrogate(y, epsilon=epsilon)
    assert y_tilde.dtype == jnp.float32
    assert np.all(spent(y_tilde, y) <= epsilon + 1e-6)
    np.testing.assert_array_equal(y_tilde, surrogate(y.astype(np.float32), epsilon=epsilon))


@pytest.mark.parametrize("kind", [bool, np.uint8, np.int32, np.int64])
@pytest.mark.parametrize("oracle", [madjax.extreme, argmax_preserving])
def test_one_hot_posteriors_may_be_whole_numbers(kind, oracle):
    y = np.eye(4)[[0, 1, 2, 3, 0]]
    answer = partial(surrogate, epsilon=0.5, solver=LineSearch(oracle))
    got = answer(y.astype(kind))
    np.testing.assert_array_equal(got, answer(y.astype(np.float32)))
    assert np.all(np.abs(spent(got, y) - 0.5) < 1e-6)


@pytest.mark.parametrize(
    "y",
    [
        jnp.log(Y),
        20 * Y - 3,
        100 * Y,
        2 * Y,
        Y.at[3].set(jnp.nan),
        Y.at[1].set(jnp.array([1.5, -0.5, 0, 0])),
        jnp.zeros((5, 4), jnp.uint8),
        np.asarray(100 * Y).astype(np.int32),
    ],
    ids=["log", "logits", "percent", "twice", "nan", "outside", "zeros", "whole percent"],
)
def test_what_is_no_posterior_is_refused_where_it_can_be_seen(y):
    wrong = "NaN or infinity in 1 of 5" if np.isnan(y).any() else "entries run from"
    with pytest.raises(InputError, match=f"y is no posterior: {wrong}"):
        surrogate(y, epsilon=0.5)
    with pytest.raises(InputError, match="exp"):
        jax.tree.map(lambda row: solve(row, jnp.eye(4), epsilon=0.5), list(y))
    # Inside jit nobody can look.
    assert jax.jit(lambda y: surrogate(y, epsilon=0.5))(y).shape == (5, 4)


@pytest.mark.parametrize("decimals", [3, 4, 7])
def test_rounded_posteriors_are_posteriors(decimals):
    y = np.round(np.asarray(Y), decimals)
    assert np.all(spent(surrogate(y, epsilon=0.4), y) <= 0.4 + 1e-6)


def test_a_gram_matrix_that_is_not_finite_is_refused():
    """With it, every answer would be y itself, as if the defence were there."""
    with pytest.raises(InputError, match="the surrogate's parameters are NaN"):
        perturb(Net().apply, jax.tree.map(lambda a: a * jnp.nan, PARAMS), X, Y, epsilon=0.5)
    with pytest.raises(InputError, match="the Gram matrix is not finite"):
        solve(Y[0], jnp.eye(4).at[1, 1].set(jnp.inf), epsilon=0.5)


# --- networks in half precision, and x64 ----------------------------------------------------------


def half(num_classes):
    return HalfNet(num_classes)


class HalfNet(nn.Module):
    num_classes: int

    @nn.compact
    def __call__(self, x):
        return 8 * nn.Dense(self.num_classes, dtype=jnp.bfloat16)(x.reshape(len(x), -1))


def small(num_classes):
    return MLP(num_classes, (5,))


RECIPE = Recipe(epochs=2, batch_size=16)
TASK = Task("tiny", "tiny", architecture=small, victim=RECIPE)
CONFIG = Sweep(
    name="tiny",
    tasks=(TASK,),
    defenses=(Defended(MAD(), (0.0, 0.9)),),
    attacks=(Knockoff(budget=40, architecture=small, recipe=RECIPE),),
)


def test_a_half_precision_network_keeps_the_budget_of_a_sweep(folder, tmp_path):
    attack = Knockoff(budget=40, architecture=half, recipe=RECIPE)
    task = replace(TASK, architecture=half)
    config = Sweep("half", (task,), (Defended(MAD(), (0.3, 1.97)),), (attack,))
    rows = sweep.run(config, tmp_path, data_dir=folder, log=lambda line: None)
    assert all(row["l1_max"] <= row["epsilon"] + 1e-6 for row in rows)
    assert max(row["l1_max"] for row in rows) > 1.5


def test_posteriors_and_losses_are_float32_of_any_network():
    classifier = Classifier(HalfNet(4), MNIST_FAMILY.preprocess, (6, 6, 1))
    x = jnp.arange(72, dtype=jnp.uint8).reshape(2, 6, 6, 1)
    params = classifier.init(jax.random.key(0))
    y = classifier.posterior(params, x)
    assert y.dtype == jnp.float32
    np.testing.assert_allclose(y.sum(-1), 1, atol=1e-6)
    logits = classifier.apply(params, x)
    assert logits.dtype == jnp.bfloat16
    want = -np.log(np.asarray(y))[:, 2]
    loss = cross_entropy(logits, jnp.eye(4, dtype=jnp.bfloat16)[jnp.array([2, 2])])
    assert loss.dtype == jnp.float32
    np.testing.assert_allclose(loss, want, rtol=1e-5)


OPTIONS = {
    "line search": {},
    "argmax": {"solver": LineSearch(argmax_preserving)},
    "grid": {"epsilon": [0.2, 0.5]},
    "ascend kl": {"solver": madjax.Ascend(madjax.kl)},
    "last": {"layers": "last"},
    "jacrev": {"gram_method": "jacrev"},
}


@pytest.mark.parametrize("name", OPTIONS)
def test_answers_under_x64_are_those_without(name):
    options = {"epsilon": 0.5, **OPTIONS[name]}
    want = surrogate(Y, **options)
    with jax.enable_x64(True):
        y, x = jnp.asarray(Y, jnp.float64), jnp.asarray(X, jnp.float64)
        got = perturb(Net().apply, PARAMS, x, y, **options)
        assert got.dtype == jnp.float32
        m = madjax.gram(Net().apply, PARAMS, x, layers=options.get("layers", "all"))
        assert m.dtype == jnp.float32
    h = jax.vmap(deviation)
    m = madjax.gram(Net().apply, PARAMS, X)
    each = got if got.ndim == 3 else got[None]
    for one, other in zip(each, want if want.ndim == 3 else want[None], strict=True):
        np.testing.assert_allclose(h(one, Y, m), h(other, Y, m), rtol=1e-3)
    assert np.all(spent(got, Y) <= 0.5 + 1e-6) or name.endswith("kl")


def test_a_sweep_runs_under_x64(folder, tmp_path):
    attack = jbtop(2, seeds=10, budget=30, substitute=RECIPE, recipe=RECIPE, architecture=small)
    config = replace(CONFIG, attacks=(attack,), defenses=(Defended(MAD(), (0.9,)),))
    with jax.enable_x64(True):
        (row,) = sweep.run(config, tmp_path, data_dir=folder, log=lambda line: None)
    assert row["status"] == "ok"
    np.testing.assert_allclose([row["l1_mean"], row["l1_max"]], 0.9, atol=1e-6)


@pytest.mark.slow
def test_a_sweep_makes_no_nan_to_fill_gaps_with(folder, tmp_path):
    """So JAX_DEBUG_NANS=1 finds those of a fault."""
    small_budget = {"budget": 30, "architecture": small, "recipe": RECIPE}
    online = {"budget": 32, "images": 20, "every": 20, "judged": 10}
    attacks = (
        CONFIG.attacks[0],
        AdaptiveKnockoff(**small_budget),
        jbtop(2, seeds=10, substitute=RECIPE, **small_budget),
        Online(architecture=small, recipe=Recipe(batch_size=1), **online),
    )
    with jax.debug_nans(True):
        config = replace(CONFIG, attacks=attacks, defenses=(Defended(MAD(), (0.9,)),))
        rows = sweep.run(config, tmp_path, data_dir=folder, log=lambda line: None)
    assert len(rows) == 4


# --- where the true gradient has a direction ------------------------------------------------------


def problem(rng, k, concentration, width=None):
    """A surrogate's posterior p and its Gram matrix, G = (I - 1 p') W, in float64."""
    p = rng.dirichlet(np.full(k, concentration))
    p = (p + 1e-9) / (p + 1e-9).sum()
    g = np.eye(k) - p[None]
    if width:
        g = g @ rng.normal(size=(k, width))
    return p, g


def direction(rng, k):
    u = rng.normal(size=k)
    u -= u.mean()
    return u / np.abs(u).sum()


@settings(deadline=None, max_examples=100)
@given(
    seed=st.integers(0, 2**32 - 1),
    k=st.sampled_from([10, 100]),
    concentration=st.sampled_from([50.0, 5.0, 1.0]),
    width=st.sampled_from([None, 300]),
    log_l1=st.floats(-4, -1),
)
def test_an_angle_that_float32_knows_is_defended(seed, k, concentration, width, log_l1):
    """Where y'My in float32 has 3 digits, and never where it has none."""
    rng = np.random.default_rng(seed)
    p, g = problem(rng, k, concentration, width)
    m = (g @ g.T).astype(np.float32)
    y = np.maximum(p + 10**log_l1 * direction(rng, k), 0)
    y = (y / y.sum()).astype(np.float32)
    single = float(JIT_SQUARE(y, m))
    double = float(np.square(g.T @ y.astype(np.float64)).sum())
    known = bool(JIT_DEFINED(y, m))
    if abs(single / double - 1) < 1e-3 and abs(double) > 1e-5 * np.abs(y) @ np.abs(m) @ np.abs(y):
        assert known
    if known:
        assert abs(single / double - 1) < 0.5
    assert not JIT_DEFINED(p.astype(np.float32), m), "y is the surrogate's own posterior"


JIT_DEFINED = jax.jit(defined)
JIT_SQUARE = jax.jit(lambda y, m: y @ (m @ y))


@pytest.mark.parametrize("k", [10, 100, 256])
def test_a_posterior_near_the_surrogates_is_defended(k):
    """At an L1 distance of 2e-3, and 20 times that, the best angle in float64 is nearly reached."""
    rng = np.random.default_rng(0)
    p, g = problem(rng, k, 50.0)
    m = g @ g.T
    for distance in (2e-3, 4e-2):
        y = p + distance * direction(rng, k)
        best = np.min(m @ y / np.sqrt(np.diag(m) * (y @ m @ y)))
        y = y.astype(np.float32)
        y_tilde = np.asarray(jit_solve(y, m.astype(np.float32), epsilon=2.0), np.float64)
        got = y_tilde @ m @ y / np.sqrt((y_tilde @ m @ y_tilde) * (y @ m @ y))
        assert best < 0, "beyond 90 degrees"
        assert got < 0.99 * best
        assert spent(jit_solve(y, m.astype(np.float32), epsilon=0.5), y) > 0.499


@pytest.mark.parametrize("scale", [1.0, 3.0, 10.0])
@pytest.mark.parametrize("layers", ["all", "last"])
@pytest.mark.parametrize("method", ["structured", "jacrev"])
@pytest.mark.parametrize("k", [2, 10, 40])
def test_noise_is_bounded(scale, layers, method, k):
    """At y = p all of y'My is rounding, however confident the surrogate is: never a direction."""
    network = MLP(k, (40,))
    x = jax.random.normal(jax.random.key(0), (30, 5, 5, 1))
    params = network.init(jax.random.key(1), x)
    params = jax.tree.map(lambda a: a * scale if a.ndim > 1 else a, params)
    m = madjax.gram(network.apply, params, x, layers=layers, method=method)
    p = jax.nn.softmax(network.apply(params, x))
    assert not jax.vmap(defined)(p, m).any()


def test_a_victim_more_confident_than_its_surrogate_is_defended():
    """Both certain of class 0, to 1e-3 and to 1e-4: a tenth of that is known of the difference."""
    p = np.full(10, 1e-3 / 9)
    y = np.full(10, 1e-4 / 9)
    p[0], y[0] = 1 - 1e-3, 1 - 1e-4
    g = np.eye(10) - p[None]
    m = (g @ g.T).astype(np.float32)
    assert defined(y.astype(np.float32), m)
    assert not defined(p.astype(np.float32), m)


# --- gradients of the angle -----------------------------------------------------------------------


def test_the_angle_has_a_gradient_at_equality_and_opposition():
    m = jnp.array([[1.0, -1.0, 0.0], [-1.0, 1.0, 0.0], [0.0, 0.0, 4.0]])
    one, two, _ = jnp.eye(3)
    for y_tilde in (one, two):
        gradients = jax.grad(angle, argnums=(0, 1, 2))(y_tilde, one, m)
        assert all(np.isfinite(g).all() for g in gradients)
    y = jnp.array([0.5, 0.3, 0.2])
    assert np.isfinite(jax.grad(angle)(y, y, m)).all()
    assert np.isfinite(jax.grad(angle)(y, y, jnp.zeros((3, 3)))).all(), "nothing is defined"
    assert np.isfinite(jax.grad(angle)(y, jnp.array([0.5, 0.5, 0.0]), m)).all(), "y has no angle"


def test_the_gradient_of_the_angle_is_a_finite_difference():
    rng = np.random.default_rng(0)
    g = rng.normal(size=(4, 9))
    m = jnp.asarray(g @ g.T, jnp.float32)
    y, y_tilde = rng.dirichlet(np.ones(4), 2)

    def exact(v):
        a, u = g.T @ v, g.T @ y
        return np.degrees(np.arccos(a @ u / np.linalg.norm(a) / np.linalg.norm(u)))

    want = [(exact(y_tilde + h) - exact(y_tilde - h)) / 2e-6 for h in 1e-6 * np.eye(4)]
    got = jax.grad(angle)(jnp.float32(y_tilde), jnp.float32(y), m)
    np.testing.assert_allclose(got, want, rtol=1e-3, atol=1e-2)


@pytest.mark.parametrize("sign", [1, -1])
def test_the_angle_between_gradients_has_a_gradient_at_its_ends(sign):
    a = {"w": jnp.array([1.0, -2.0])}
    u = jax.tree.map(lambda leaf: sign * leaf, a)
    assert np.isfinite(jax.grad(angle_between)(a, u)["w"]).all()


def test_angles_of_half_precision_are_those_in_float32():
    y, y_tilde = Y[0].astype(jnp.bfloat16), Y[1].astype(jnp.bfloat16)
    m = madjax.gram(Net().apply, PARAMS, X)[0]
    for measure in (angle, deviation):
        got = measure(y_tilde, y, m)
        assert got.dtype == jnp.float32
        assert got == measure(y_tilde.astype(jnp.float32), y.astype(jnp.float32), m)


# --- what rows say of it --------------------------------------------------------------------------


def test_the_share_of_answers_left_as_they_are_is_counted():
    y = jnp.eye(3)[jnp.array([0, 1, 2, 0])]
    told = y.at[1].set(jnp.array([0.5, 0.5, 0.0]))
    assert utility(y, told, jnp.zeros(4, int))["undefended_share"] == 0.75
    assert utility(y, y, jnp.zeros(4, int))["undefended_share"] == 1


def test_rows_say_how_many_answers_are_undefended(folder, tmp_path):
    """The surrogate is the victim: it has no direction to leave."""
    config = replace(CONFIG, defenses=(Defended(Own(), (0.0, 0.9)),))
    rows = sweep.run(config, tmp_path, data_dir=folder, log=lambda line: None)
    assert [row["undefended_share"] for row in rows] == [1, 1]
    text = report.table(rows)
    assert "undefended %" in text
    rows = sweep.run(CONFIG, tmp_path / "mad", data_dir=folder, log=lambda line: None)
    assert [row["undefended_share"] for row in rows] == [1, 0]
    assert "undefended %" not in report.table(rows)


class Own(MAD):
    """MAD whose surrogate is the victim."""

    def prepare(self, owner, key, strengths):
        return owner.train("own", owner.recipe, owner.key)
