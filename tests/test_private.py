"""DP-SGD against a plain Python loop over the drawn examples; its accounting against dp_accounting.

jax-privacy is imported inside the tests, as the package imports it: it takes seconds.
"""

import math
import subprocess
import sys
from dataclasses import replace
from functools import partial

import chex
import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

import madjax
from madjax import Classifier, InputError, Recipe, train
from madjax.datasets import MNIST_FAMILY
from madjax.private import PrivateGradient, _bernoulli, accounted_epsilon
from madjax.recipe import Lesson
from madjax.streams import stream

SHAPE = (8, 8, 1)


class Small(nn.Module):
    """A convolution and a dense layer; the convolution by patches, as LeNet has it."""

    classes: int = 3

    @nn.compact
    def __call__(self, x):
        x = nn.relu(nn.Conv(4, (3, 3), strides=2)(x))
        return nn.Dense(self.classes)(x.reshape(x.shape[0], -1))


class Linear(nn.Module):
    @nn.compact
    def __call__(self, x):
        return nn.Dense(2)(x.reshape(x.shape[0], -1))


class Bias(nn.Module):
    """Logits that no image moves: three parameters."""

    @nn.compact
    def __call__(self, x):
        return jnp.zeros((len(x), 3)) + self.param("bias", nn.initializers.zeros, (1, 3))


class Flat(nn.Module):
    """Many parameters, none of which has a gradient."""

    @nn.compact
    def __call__(self, x):
        weights = self.param("weights", nn.initializers.zeros, (200, 100))
        return jnp.zeros((len(x), 3)) + 0 * weights.sum()


class Dropped(nn.Module):
    """A bias that dropout scales by 0 or 2 when training."""

    @nn.compact
    def __call__(self, x, *, train=False):
        kept = nn.Dropout(0.5, deterministic=not train)(jnp.ones((len(x), 1)))
        return kept * self.param("bias", nn.initializers.zeros, (1, 3))


class Normed(nn.Module):
    @nn.compact
    def __call__(self, x, *, train=False):
        x = nn.BatchNorm(use_running_average=not train)(x)
        return nn.Dense(3)(x.reshape(x.shape[0], -1))


def classifier(module):
    return Classifier(module, MNIST_FAMILY.preprocess, SHAPE)


SMALL = classifier(Small())
RECIPE = Recipe(epochs=3, batch_size=8, learning_rate=0.05, momentum=0.5, decay_epochs=0)


@partial(jax.jit, static_argnums=0)
def examples(n):
    keys = jax.random.split(jax.random.key(7), 2)
    x = jax.random.randint(keys[0], (n, *SHAPE), 0, 256).astype(jnp.uint8)
    return x, jax.random.randint(keys[1], (n,), 0, 3)


@pytest.fixture(scope="module")
def data():
    """61 images: eight steps an epoch, the expected batch is eight."""
    return examples(61)


def fit(module, recipe, key, data, test, *, after_epoch=lambda state: None, state=None, **settings):
    """Train by DP-SGD with these settings."""
    recipe = replace(recipe, gradient=PrivateGradient(**settings))
    return madjax.fit(module, recipe, key, data, test, state=state, after_epoch=after_epoch)


def drawn(state, epoch, n, batch_size):
    """The examples of every step of an epoch, as the library draws them."""
    key = jax.random.fold_in(jax.random.wrap_key_data(state.key), epoch)
    key = stream(key, "private steps")
    for i in range(-(-n // batch_size)):
        draw_key, _, _ = jax.random.split(jax.random.fold_in(key, i), 3)
        bits = np.asarray(jax.random.bits(draw_key, (n,), jnp.uint32), np.float64)
        yield np.flatnonzero(bits / 2**32 < batch_size / n)


def plain_loop(recipe, key, data, clip):
    """DP-SGD without noise, one example at a time: the parameters and the loss of each epoch."""
    x, labels = data
    state = jax.jit(train.start, static_argnums=(0, 1, 2))(SMALL, recipe, len(x), key)
    params, losses = state.params, []
    velocity = jax.tree.map(jnp.zeros_like, params)

    @jax.jit
    def add_one(total, params, x, label):
        def loss(params):
            return -jax.nn.log_softmax(SMALL.apply(params, x[None]))[0, label]

        value, g = jax.value_and_grad(loss)(params)
        norm = jnp.sqrt(sum(jnp.sum(leaf**2) for leaf in jax.tree.leaves(g)))
        scale = jnp.minimum(1, clip / norm)
        return jax.tree.map(lambda t, g: t + scale * g, total, g), value, norm

    @jax.jit
    def sgd(params, velocity, total):
        mean = jax.tree.map(lambda t: t / recipe.batch_size, total)
        velocity = jax.tree.map(lambda v, g: recipe.momentum * v + g, velocity, mean)
        return jax.tree.map(lambda w, v: w - recipe.learning_rate * v, params, velocity), velocity

    norms = []
    for e in range(recipe.epochs):
        seen = []
        for batch in drawn(state, e, len(x), recipe.batch_size):
            total = jax.tree.map(jnp.zeros_like, params)
            values = []
            for i in batch:
                total, value, norm = add_one(total, params, x[i], labels[i])
                values.append(value)
                norms.append(norm)
            params, velocity = sgd(params, velocity, total)
            seen.append(np.sum(values) / recipe.batch_size)
        losses.append(np.mean(seen))
    assert min(norms) < clip < max(norms), "some gradients must be clipped and some must not"
    return params, losses


def test_without_noise_it_is_a_plain_loop_over_the_drawn_examples(data):
    """Whatever the microbatch, of which padding fills up the last."""
    key, recipe, clip = jax.random.key(0), replace(RECIPE, epochs=2), 2.5
    params, losses = plain_loop(recipe, key, data, clip)
    hits = SMALL.apply(params, data[0]).argmax(-1) == data[1]
    for microbatch in (None, 4):
        state = fit(
            SMALL, recipe, key, data, data, noise_multiplier=0.0, clip=clip, microbatch=microbatch
        )
        chex.assert_trees_all_close(state.params, params, atol=1e-5)
        np.testing.assert_allclose(state.loss, losses, rtol=1e-5)
        np.testing.assert_allclose(state.accuracy[-1], 100 * hits.mean(), rtol=1e-6)


def step_of(n, batch_size, count=None, microbatch=1, noise=0.0):
    """One step of DP-SGD, and a list of the examples that it takes: (params, i) -> ..."""
    x, labels = examples(n)
    taken = []

    def take(index):
        jax.debug.callback(taken.append, index, ordered=True)
        return x[index], jax.nn.one_hot(labels[index], 3)

    lesson = Lesson(take, n, count, batch_size, jax.random.key(2), jnp.int32(0))
    step = PrivateGradient(noise, microbatch=microbatch)(classifier(Bias()), lesson)
    return jax.jit(step), taken


def test_draws_are_poisson_at_the_rate_of_the_batch():
    """600 draws of 2000 examples: counts of a binomial, examples drawn equally often."""
    n, batch_size, steps = 2000, 10, 600
    params = classifier(Bias()).init(jax.random.key(0))
    step, taken = step_of(n, batch_size)
    counts = []
    for i in range(steps):
        before = len(taken)
        step(params, i)
        jax.effects_barrier()
        counts.append(len(taken) - before)
    variance = batch_size * (1 - batch_size / n)
    np.testing.assert_allclose(np.mean(counts), 10, atol=4 * np.sqrt(variance / steps))
    np.testing.assert_allclose(np.var(counts), variance, atol=4 * variance * np.sqrt(2.1 / steps))
    ends = np.cumsum(counts)
    drawn = np.concatenate(taken)
    assert all(len(set(part)) == len(part) for part in np.split(drawn, ends[:-1]))
    often = np.bincount(drawn, minlength=n)
    np.testing.assert_allclose(often.var(), 3, atol=0.5)  # of a binomial with mean 3


@pytest.mark.parametrize("microbatch", [1, 7])
def test_of_examples_that_are_not_there_yet_none_is_drawn(microbatch):
    """The first 20 of 61 at a rate of 1: every one, and none of the others."""
    params = classifier(Bias()).init(jax.random.key(0))
    step, _ = step_of(61, 20, jnp.int32(20), microbatch)
    loss, gradient, _ = step(params, 0)
    want = (1 / 3 - jax.nn.one_hot(examples(61)[1][:20], 3)).mean(0)
    np.testing.assert_allclose(gradient["params"]["bias"][0], want, rtol=1e-5)
    np.testing.assert_allclose(loss, np.log(3), rtol=1e-6)


def test_a_step_that_draws_nothing_changes_nothing():
    """A third of the steps of 1 of 3 examples."""
    params = classifier(Bias()).init(jax.random.key(0))
    step, taken = step_of(3, 1)
    empty = 0
    for i in range(20):
        before = len(taken)
        loss, gradient, _ = step(params, i)
        jax.effects_barrier()
        if len(taken) == before:
            empty += 1
            assert loss == 0
            np.testing.assert_array_equal(gradient["params"]["bias"], 0)
            noisy, _ = step_of(3, 1, noise=1.0)
            assert np.all(noisy(params, i)[1]["params"]["bias"] != 0), "or it would show"
    assert 1 <= empty <= 15


def test_at_a_rate_of_one_every_example_is_drawn():
    for key in jax.random.split(jax.random.key(0), 5):
        assert _bernoulli(key, 700, 700, 1000).all()
        assert not _bernoulli(key, 0, 700, 1000).any()


def test_noise_has_the_stated_deviation_and_is_new_in_every_step():
    """No gradients: after s plain steps, N(0, s (rate C sigma / B)^2) in every parameter."""
    module, data = classifier(Flat()), examples(12)
    recipe = Recipe(epochs=2, batch_size=4, learning_rate=0.5, momentum=0.0, decay_epochs=0)

    def change(noise, key=3, clip=0.25):
        states = []
        fit(
            module,
            recipe,
            jax.random.key(key),
            data,
            data,
            noise_multiplier=noise,
            clip=clip,
            after_epoch=states.append,
        )
        first, second = (np.asarray(s.params["params"]["weights"]).ravel() for s in states)
        return first, second - first

    first, second = change(2.0)
    want = 0.5 * 0.25 * 2.0 / 4 * np.sqrt(3)
    for noise in (first, second):
        np.testing.assert_allclose(noise.std(), want, rtol=0.02)  # 4 standard errors of 20,000
        np.testing.assert_allclose(noise.mean(), 0, atol=4 * want / np.sqrt(noise.size))
    assert abs(np.corrcoef(first, second)[0, 1]) < 4 / np.sqrt(first.size)
    np.testing.assert_allclose(change(4.0)[0], 2 * first, rtol=1e-5)
    np.testing.assert_allclose(change(2.0, clip=1.0)[0], 4 * first, rtol=1e-5)
    assert abs(np.corrcoef(first, change(2.0, key=4)[0])[0, 1]) < 4 / np.sqrt(first.size)
    np.testing.assert_array_equal(change(0.0)[0], 0)


def test_a_stopped_run_goes_on_as_if_it_had_not_stopped(data):
    states = []
    run = (SMALL, RECIPE, jax.random.key(1), data, data)
    whole = fit(*run, noise_multiplier=1.0, after_epoch=states.append)
    again = fit(*run, noise_multiplier=1.0, state=states[0])
    chex.assert_trees_all_equal(whole, again)
    assert [int(s.epoch) for s in states] == [1, 2, 3]
    assert np.isneginf(states[0].accuracy).tolist() == [False, True, True]
    fresh = jax.eval_shape(lambda key: train.start(SMALL, RECIPE, 61, key), jax.random.key(1))
    chex.assert_trees_all_equal_shapes_and_dtypes(whole, fresh)


def test_it_learns_what_can_be_learnt():
    """Images bright on the left or on the right; the noise is small beside 64 gradients."""
    keys = jax.random.split(jax.random.key(0), 2)
    labels = jax.random.randint(keys[0], (256,), 0, 2)
    right = jnp.arange(8)[None, None, :, None] >= 4
    bright = right == labels[:, None, None, None]
    x = (jax.random.randint(keys[1], (256, *SHAPE), 0, 136) + 120 * bright).astype(jnp.uint8)
    recipe, data = Recipe(epochs=2, batch_size=64, decay_epochs=0), (x, labels)
    state = fit(classifier(Linear()), recipe, jax.random.key(0), data, data, noise_multiplier=1.0)
    assert state.accuracy[-1] > 95
    assert state.loss[-1] < 0.5 * state.loss[0]


def test_dropout_falls_on_every_example_by_itself():
    """Label 0 alone: a dropped example has no gradient, another that of logits doubled."""
    recipe = Recipe(epochs=1, batch_size=400, learning_rate=1.0, decay_epochs=0)
    x, labels = examples(400)[0], jnp.zeros(400, int)
    data = x, labels
    shares = []
    for microbatch in (1, 7):
        settings = {"noise_multiplier": 0, "clip": 10, "microbatch": microbatch}
        state = fit(classifier(Dropped()), recipe, jax.random.key(0), data, data, **settings)
        # Of the examples that were kept.
        shares.append(state.params["params"]["bias"][0, 0] / (2 * 2 / 3))
    np.testing.assert_allclose(shares[0], 0.5, atol=0.1)
    assert shares[0] != 0.5
    np.testing.assert_allclose(shares[1], shares[0], rtol=1e-5, err_msg="rounding alone")


def test_every_example_is_augmented_by_itself(data):
    """Whatever the microbatch; and the same examples, as they are, teach something else."""

    def brighter(key, x):
        return x + 200 * jax.random.uniform(key, (len(x), 1, 1, 1))

    found = []
    for augment, microbatch in ((brighter, 1), (brighter, 7), (None, 1)):
        recipe = replace(RECIPE, epochs=1, augment=augment)
        settings = {"noise_multiplier": 0, "clip": 10, "microbatch": microbatch}
        found.append(fit(SMALL, recipe, jax.random.key(0), data, data, **settings).params)
    chex.assert_trees_all_close(found[0], found[1], rtol=1e-4, atol=1e-6)
    gaps = jax.tree.map(lambda a, b: abs(a - b).max(), found[0], found[2])
    assert min(jax.tree.leaves(gaps)) > 1e-3


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"classifier": classifier(Normed())}, "DP-SGD cannot train Normed: BatchNorm"),
        ({"recipe": Recipe(batch_size=62)}, "batch_size is 62: DP-SGD draws that many of 61"),
        ({"labels": jnp.zeros(60, int)}, r"61 images have targets of shape \(60,\)"),
        ({"labels": jnp.full(61, 3)}, "labels run from 3 to 3: the network has 3 classes"),
        ({"noise_multiplier": -1.0}, "noise_multiplier of DP-SGD is -1.0: give a number >= 0"),
        ({"noise_multiplier": float("nan")}, "noise_multiplier of DP-SGD is nan"),
        ({"clip": 0.0}, "clip of DP-SGD is 0.0: give a number above 0"),
        ({"clip": float("inf")}, "clip of DP-SGD is inf"),
        ({"microbatch": 0}, "microbatch of DP-SGD is 0: give a whole number >= 1"),
    ],
)
def test_what_cannot_be_trained_privately_is_named(data, change, words):
    x, labels = data
    settings = {"noise_multiplier": 1.0, "classifier": SMALL, "recipe": RECIPE, "labels": labels}
    settings |= change
    with pytest.raises(InputError, match=words):
        fit(
            settings.pop("classifier"),
            settings.pop("recipe"),
            jax.random.key(0),
            (x, settings.pop("labels")),
            data,
            **settings,
        )


def test_importing_the_package_does_not_import_jax_privacy():
    program = "import madjax, madjax.private, sys; sys.exit('jax_privacy' in sys.modules)"
    subprocess.run([sys.executable, "-c", program], check=True)


MNIST = {"num_examples": 60_000, "batch_size": 600, "epochs": 10, "delta": 1 / 60_000}


@pytest.mark.parametrize(
    ("noise", "settings"),
    [
        (0.7, MNIST),
        (8.0, MNIST),
        (1.5, {"num_examples": 61, "batch_size": 8, "epochs": 3, "delta": 1 / 61}),
        (1.0, {"num_examples": 50, "batch_size": 50, "epochs": 4, "delta": 0.01}),
    ],
)
def test_epsilon_is_that_of_poisson_sampled_gaussians(noise, settings):
    """Against dp_accounting itself: PLD on its own grid, and the bound by Renyi divergences."""
    import dp_accounting
    from dp_accounting import pld, rdp

    rate = settings["batch_size"] / settings["num_examples"]
    steps = settings["epochs"] * -(-settings["num_examples"] // settings["batch_size"])
    event = dp_accounting.SelfComposedDpEvent(
        dp_accounting.PoissonSampledDpEvent(rate, dp_accounting.GaussianDpEvent(noise)), steps
    )
    delta, found = settings["delta"], accounted_epsilon(noise, **settings)
    want = pld.PLDAccountant().compose(event).get_epsilon(delta)
    np.testing.assert_allclose(found, want, rtol=1e-3)
    assert found <= rdp.RdpAccountant().compose(event).get_epsilon(delta)


def test_epsilon_is_a_little_below_the_bound_by_moments_worked_out_by_hand():
    """Mironov et al. 2019, section 3.3, and Balle et al. 2020, theorem 21, at whole orders a.

    E[(P/Q)^a] = sum_k binom(a, k) (1 - q)^(a - k) q^k exp(k (k - 1) / 2 sigma^2), summed in logs.
    """
    q, sigma, steps, delta = 0.01, 1.3, 1000, 1e-5

    def renyi(a):
        terms = [
            math.lgamma(a + 1)
            - math.lgamma(k + 1)
            - math.lgamma(a - k + 1)
            + (a - k) * math.log1p(-q)
            + k * math.log(q)
            + k * (k - 1) / (2 * sigma**2)
            for k in range(a + 1)
        ]
        most = max(terms)
        return (most + math.log(sum(math.exp(t - most) for t in terms))) / (a - 1)

    bound = min(
        steps * renyi(a) + math.log1p(-1 / a) - (math.log(delta) + math.log(a)) / (a - 1)
        for a in range(2, 100)
    )
    settings = {"num_examples": 60_000, "batch_size": 600, "epochs": 10, "delta": delta}
    found = accounted_epsilon(sigma, **settings)
    assert 0.85 * bound < found < bound


def test_epsilon_of_one_step_on_all_examples_is_that_of_a_gaussian():
    """delta = Phi(1/2s - e s) - exp(e) Phi(-1/2s - e s): Balle and Wang 2018, theorem 8."""
    from scipy.stats import norm

    for noise in (0.05, 0.5, 1.0, 5.0):
        e = accounted_epsilon(noise, num_examples=9, batch_size=9, epochs=1, delta=1e-3)
        far, near = 0.5 / noise - e * noise, -0.5 / noise - e * noise
        delta = norm.cdf(far) - np.exp(e + norm.logcdf(near))
        np.testing.assert_allclose(delta, 1e-3, rtol=5e-3)


def test_epsilon_falls_with_the_noise_and_grows_with_the_epochs():
    found = [accounted_epsilon(s, **MNIST) for s in (0, 1e-9, 0.1, 2, 1e6)]
    assert found[:2] == [np.inf, np.inf]
    assert np.isfinite(found[2:]).all()
    assert (np.diff(found[1:]) < 0).all()
    assert found[-1] == 0  # delta covers it
    longer = accounted_epsilon(1.0, **{**MNIST, "epochs": 20})
    assert longer > accounted_epsilon(1.0, **MNIST)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"noise_multiplier": -0.1}, "noise_multiplier is -0.1"),
        ({"noise_multiplier": float("inf")}, "noise_multiplier is inf"),
        ({"delta": 0.0}, "delta is 0.0"),
        ({"delta": 1.0}, "delta is 1.0"),
        ({"batch_size": 0}, "batch_size is 0"),
        ({"batch_size": 60_001}, "batch_size is 60001"),
        ({"epochs": 0}, "epochs is 0"),
    ],
)
def test_an_epsilon_of_nothing_is_refused(change, words):
    settings = {"noise_multiplier": 1.0, **MNIST, **change}
    with pytest.raises(InputError, match=words):
        accounted_epsilon(settings.pop("noise_multiplier"), **settings)
