"""A defence as the grid uses it and as a plain function, and what it costs honest users."""

from dataclasses import dataclass, replace
from functools import partial

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest

import madjax
from madjax import Defended
from madjax.batching import bytes_made, map_chunks
from madjax.defenses import (
    DPSGD,
    MAD,
    Custom,
    NoDefense,
    Owner,
    RandomNoise,
    Retrained,
    ReverseSigmoid,
    Rounding,
    TopK,
    TopLabel,
    answers,
    as_function,
    fingerprints,
    gaussian,
    logit,
    uniform,
)
from madjax.evaluate import utility
from madjax.private import PrivateGradient, accounted_epsilon
from madjax.streams import stream


def apply(w, x):
    return x @ w


@pytest.fixture(scope="module")
def queries():
    keys = jax.random.split(jax.random.key(0), 3)
    w = jax.random.normal(keys[0], (6, 4))
    return w, jax.random.normal(keys[1], (5, 6)), jax.nn.softmax(jax.random.normal(keys[2], (5, 4)))


def trainable():
    """A small network, its recipe, and images of three classes."""
    classifier = madjax.Classifier(madjax.MLP(3, hidden=(4,)), lambda x: x / 255.0, (2, 2, 1))
    images = jax.random.randint(jax.random.key(0), (24, 2, 2, 1), 0, 256).astype(jnp.uint8)
    return classifier, madjax.Recipe(epochs=9, batch_size=8), (images, jnp.arange(24) % 3)


class Jacobian(MAD):
    """MAD for a surrogate that is a plain function of its parameters."""

    def evidence(self, apply, params, x):
        return madjax.gram(apply, params, x, layers=self.layers, method="jacrev")


def test_plain_function_is_perturb(queries):
    w, x, y = queries
    defend = as_function(Jacobian(layers="all"), apply, w, 0.6)
    want = madjax.perturb(apply, w, x, y, epsilon=0.6, gram_method="jacrev")
    np.testing.assert_allclose(defend(jax.random.key(0), x, y), want, atol=1e-7)


def test_strength_is_traced_and_zero_is_no_defence(queries):
    w, x, y = queries
    defense = Jacobian(solver=madjax.LineSearch(madjax.argmax_preserving, madjax.l2))
    evidence = defense.evidence(apply, w, x)

    @jax.jit
    def grid(strengths):
        return jax.vmap(lambda s: answers(defense, jax.random.key(0), x, y, evidence, s))(strengths)

    none, some = grid(jnp.array([0.0, 0.3]))
    np.testing.assert_array_equal(none, y)
    np.testing.assert_allclose(jnp.linalg.norm(some - y, axis=-1), 0.3, rtol=1e-5)
    np.testing.assert_array_equal(some.argmax(-1), y.argmax(-1))


def test_more_queries_than_a_chunk_change_nothing(queries):
    w, x, y = queries
    defense = Jacobian(layers="all")
    evidence = defense.evidence(apply, w, x)
    tiled = jnp.tile(x, (401, 1)), jnp.tile(y, (401, 1)), jnp.tile(evidence, (401, 1, 1))
    many = answers(defense, jax.random.key(0), *tiled, 0.6)
    few = answers(defense, jax.random.key(0), x, y, evidence, 0.6)
    np.testing.assert_allclose(many, jnp.tile(few, (401, 1)), atol=1e-7)


def test_rows_name_the_defence():
    assert MAD(layers="all").describe() == {
        "defense": "mad",
        "layers": "all",
        "surrogate": "random",
        "solver": "line_search",
        "oracle": "extreme",
        "distance": "l1",
        "constraints": "none",
        "objective": "none",
        "defense_variant": "",
    }
    described = MAD(solver=madjax.LineSearch(madjax.argmax_preserving, madjax.kl)).describe()
    assert described["defense"] == "mad_argmax"
    assert described["distance"] == "kl"
    with pytest.raises(madjax.InputError, match="layers is 'some'"):
        MAD(layers="some")


def test_utility_by_hand():
    y = jnp.array([[0.7, 0.3, 0.0], [0.2, 0.5, 0.3], [0.1, 0.1, 0.8]])
    y_tilde = jnp.array([[0.4, 0.6, 0.0], [0.2, 0.5, 0.3], [0.1, 0.2, 0.7]])
    got = utility(y, y_tilde, jnp.array([0, 1, 1]))
    l1 = np.array([0.6, 0.0, 0.2])
    l2 = np.array([0.3, 0.0, 0.1]) * 2**0.5
    kl = np.array(
        [0.7 * np.log(7 / 4) + 0.3 * np.log(0.5), 0, 0.1 * np.log(0.5) + 0.8 * np.log(8 / 7)]
    )
    np.testing.assert_allclose(got["defender_accuracy"], 100 / 3, rtol=1e-6)
    np.testing.assert_allclose(got["fidelity"], 200 / 3, rtol=1e-6)
    for name, values in {"l1": l1, "l2": l2, "kl": kl}.items():
        np.testing.assert_allclose(got[f"{name}_mean"], values.mean(), rtol=1e-5)
        np.testing.assert_allclose(got[f"{name}_std"], values.std(), rtol=1e-5)
    np.testing.assert_allclose(got["l1_max"], 0.6, rtol=1e-6)


def test_one_impossible_answer_makes_the_mean_kl_infinite():
    y = jnp.array([[0.5, 0.5], [0.5, 0.5]])
    got = utility(y, jnp.array([[0.5, 0.5], [1.0, 0.0]]), jnp.array([0, 0]))
    assert got["kl_mean"] == jnp.inf
    assert got["kl_std"] == jnp.inf
    assert got["l1_mean"] == 0.5


@pytest.mark.parametrize("chunk", [1, 3, 7, 10, 99])
def test_chunks_join_to_the_whole(chunk):
    x = {"a": jnp.arange(10), "b": jnp.arange(20.0).reshape(10, 2)}

    def function(x):
        return x["a"] * 2, x["b"].sum(-1)

    got = map_chunks(function, x, chunk)
    for part, want in zip(got, function(x), strict=True):
        np.testing.assert_array_equal(part, want)


@pytest.mark.parametrize("chunk", [1, 3, 4, 99])
def test_chunks_of_a_symbolic_batch_join_to_the_whole(chunk):
    """As in an export for batches of any size."""

    def chunked(x):
        return map_chunks(lambda x: (x * 2, x.sum(-1)), x, chunk)

    (batch,) = jax.export.symbolic_shape("batch")
    shape = jax.ShapeDtypeStruct((batch, 2), jnp.float32)
    exported = jax.export.export(jax.jit(chunked))(shape)
    for n in (1, 3, 4, 10, 11):
        x = jnp.arange(2.0 * n).reshape(n, 2)
        for part, want in zip(exported.call(x), chunked(x), strict=True):
            np.testing.assert_array_equal(part, want)


def test_bytes_made_counts_every_operation_and_a_loops_body_once():
    def function(x):
        y = jax.lax.fori_loop(0, 10, lambda i, y: y + 1, x)  # 4 bytes for i, 4 n for y
        return jax.jit(jnp.sin)(y).sum()

    small, large = (
        bytes_made(function, jax.ShapeDtypeStruct((n,), jnp.float32)) for n in (100, 1100)
    )
    # Of 1,000 numbers: the loop's, its body's, what jit returns and what is inside.
    assert large - small == 4 * 4 * 1000


@pytest.mark.smoke
def test_fingerprints_of_images_whose_bits_are_few_differ():
    """Of 0 and 1 the floats differ in 7 high bits alone."""
    x = np.random.default_rng(1).integers(0, 2, (5000, 28, 28, 1))
    x[1::2] = x[::2]
    x[1::2, 3, 3] ^= 1  # neighbours differ in one pixel
    key = jax.random.key(0)
    found = {kind: np.asarray(fingerprints(key, jnp.asarray(x, kind))) for kind in "Bef"}
    assert len(set(found["f"].tolist())) == 5000
    assert len(set((found["f"] % 1024).tolist())) > 1000, "in its low bits too"
    np.testing.assert_array_equal(found["B"], found["f"])
    np.testing.assert_array_equal(found["e"], found["f"])
    zero = jnp.zeros((1, 3))
    np.testing.assert_array_equal(fingerprints(key, -zero), fingerprints(key, zero))
    assert fingerprints(key, jnp.zeros((0, 3))).shape == (0,)


@pytest.mark.parametrize("kind", [jnp.uint8, jnp.float32, jnp.bfloat16, bool])
def test_fingerprints_belong_to_the_content(kind):
    rng = np.random.default_rng(0)
    x = jnp.asarray(rng.integers(0, 256, (50, 4, 4, 1))).astype(kind)
    x = jnp.concatenate([x, x[:10]])
    key = jax.random.key(0)
    numbers = np.asarray(fingerprints(key, x))
    np.testing.assert_array_equal(numbers[:10], numbers[50:])
    np.testing.assert_array_equal(numbers[::-1], fingerprints(key, x[::-1]))
    assert len(set(numbers.tolist())) == len(np.unique(np.asarray(x, np.float32), axis=0))
    assert np.all(numbers != fingerprints(jax.random.key(1), x))


def awkward(classes):
    """Posteriors of every kind that breaks formulas, [B, K]."""
    drawn = jax.nn.softmax(6 * jax.random.normal(jax.random.key(3), (40, classes)))
    one_hot = jnp.eye(classes)
    nearly = jax.nn.softmax(90 * one_hot)
    ties = jnp.zeros((1, classes)).at[:, :2].set(0.5)
    uniform = jnp.full((1, classes), 1 / classes)
    return jnp.concatenate([drawn, one_hot, nearly, ties, uniform])


@partial(jax.jit, static_argnums=0)
def _told(defense, x, y, strength, numbers, key):
    return answers(defense, jax.random.key(key), x, y, (), strength, numbers)


def told(defense, y, strength, numbers=None, key=0, x=None):
    """The answers of a defence that needs no surrogate, to queries that are places or x."""
    x = jnp.arange(len(y)) if x is None else x
    return _told(defense, x, y, strength, numbers, key)


DETERMINISTIC = {
    "none": (NoDefense(), (0.5,)),
    "top k": (TopK(), (1.0, 2.0, 5.0)),
    "top label": (TopLabel(), (1.0,)),
    "rounding": (Rounding(), (0.0, 1.0, 2.0, 6.0)),
    "reverse sigmoid": (ReverseSigmoid(gamma=0.2), (0.1, 1.0)),
    "steep reverse sigmoid": (ReverseSigmoid(gamma=1.0), (0.1, 1.0)),
    "very steep reverse sigmoid": (ReverseSigmoid(gamma=100.0), (0.1, 1.0)),
    "flat reverse sigmoid": (ReverseSigmoid(gamma=0.0), (0.1, 1.0)),
}
RANDOM = {
    f"{noise} {ball.__name__}": (RandomNoise(noise=noise, ball=ball), (0.1, 5.0, 1e6))
    for noise in ("uniform", "gaussian")
    for ball in (madjax.l1, madjax.l2)
}


@pytest.mark.parametrize("classes", [2, 10])
@pytest.mark.parametrize("name", [*DETERMINISTIC, *RANDOM])
def test_answers_are_distributions_and_the_neutral_strength_is_no_defence(name, classes):
    defense, strengths = (DETERMINISTIC | RANDOM)[name]
    y = awkward(classes)
    for strength in strengths:
        y_tilde = told(defense, y, strength)
        assert jnp.isfinite(y_tilde).all()
        assert (y_tilde >= 0).all()
        np.testing.assert_allclose(y_tilde.sum(-1), 1, atol=1e-6)
    if defense.neutral is not None:
        np.testing.assert_array_equal(told(defense, y, defense.neutral), y)


@pytest.mark.parametrize("name", [*DETERMINISTIC, *RANDOM])
def test_a_query_alone_gets_the_answer_it_gets_in_a_batch(name):
    defense, (strength, *_) = (DETERMINISTIC | RANDOM)[name]
    y = awkward(4)
    batch = told(defense, y, strength)
    for i in (0, 17, len(y) - 1):
        alone = told(defense, y[i : i + 1], strength, x=jnp.array([i]))
        np.testing.assert_allclose(alone[0], batch[i], atol=1e-7)


@pytest.mark.parametrize("name", DETERMINISTIC)
def test_renaming_the_classes_renames_the_answers(name):
    defense, strengths = DETERMINISTIC[name]
    y = jax.nn.softmax(4 * jax.random.normal(jax.random.key(5), (30, 6)))  # no ties
    order = jnp.array([3, 0, 5, 1, 4, 2])
    for strength in strengths:
        np.testing.assert_allclose(
            told(defense, y[:, order], strength), told(defense, y, strength)[:, order], atol=1e-6
        )


def test_top_k_by_hand():
    y = jnp.array([[0.5, 0.1, 0.3, 0.1], [0.25, 0.25, 0.25, 0.25]])
    np.testing.assert_allclose(told(TopK(), y, 1.0), [[1, 0, 0, 0], [1, 0, 0, 0]])
    np.testing.assert_array_equal(told(TopLabel(), y, 1.0), [[1, 0, 0, 0], [1, 0, 0, 0]])
    np.testing.assert_allclose(
        told(TopK(), y, 2.0), [[0.625, 0, 0.375, 0], [0.5, 0.5, 0, 0]], rtol=1e-6
    )
    np.testing.assert_allclose(
        told(TopK(normalised=False), y[:1], 3.0), [[0.5, 0.1, 0.3, 0]], rtol=1e-6
    )
    rounded = y * jnp.float32(0.99)  # whose sum is not 1, which a division would mend
    for k in (4.0, 9.0):
        np.testing.assert_array_equal(told(TopK(), rounded, k), rounded)


def test_rounding_by_hand():
    y = jnp.array([[0.6, 0.34, 0.06, 0.0], [0.3, 0.3, 0.2, 0.2]])
    plain = Rounding(normalised=False)
    np.testing.assert_allclose(
        told(plain, y, 1.0), [[0.6, 0.3, 0.1, 0], [0.3, 0.3, 0.2, 0.2]], atol=1e-6
    )
    np.testing.assert_array_equal(told(plain, y, 0.0), [[1, 0, 0, 0], [0, 0, 0, 0]])
    thirds = jnp.array([[0.34, 0.33, 0.33]])
    np.testing.assert_allclose(told(Rounding(), thirds, 1.0), 1 / 3, atol=1e-6)
    np.testing.assert_allclose(told(Rounding(), y, 0.0)[1], 0.25)  # nothing is left: uniform


@pytest.mark.parametrize("decimals", range(7))
def test_rounding_is_that_of_decimals(decimals):
    """Against float64, where no entry lies half-way between two answers."""
    y = np.float32(jax.nn.softmax(3 * jax.random.normal(jax.random.key(1), (200, 5))))
    scaled = np.float64(y) * 10**decimals
    clear = np.abs(scaled % 1 - 0.5) > 0.1
    got = told(Rounding(normalised=False), y, float(decimals))
    np.testing.assert_allclose(got[clear], np.round(scaled[clear]) / 10**decimals, atol=1e-7)


def test_reverse_sigmoid_by_hand():
    y = np.array([0.9, 0.08, 0.02])
    sigmoid = 1 / (1 + np.exp(-0.2 * np.log(y / (1 - y))))
    want = y - 0.5 * (sigmoid - 0.5)
    got = told(ReverseSigmoid(gamma=0.2), jnp.float32(y)[None], 0.5)[0]
    np.testing.assert_allclose(got, want / want.sum(), rtol=1e-5)
    # A one-hot posterior: the sigmoids are 1 and 0.
    got = told(ReverseSigmoid(), jnp.array([[1.0, 0, 0]]), 1.0)[0]
    np.testing.assert_allclose(got, np.array([0.5, 0.5, 0.5]) / 1.5, rtol=1e-6)
    np.testing.assert_allclose(told(ReverseSigmoid(), jnp.full((1, 4), 0.25), 1.0), 0.25)
    certain = jnp.eye(3)
    np.testing.assert_array_equal(told(ReverseSigmoid(gamma=0.0), certain, 1.0), certain)


def test_reverse_sigmoid_keeps_the_label_of_confident_posteriors_alone():
    y = jax.nn.softmax(8 * jax.random.normal(jax.random.key(2), (500, 7)))
    y_tilde = told(ReverseSigmoid(gamma=0.4), y, 0.5)
    np.testing.assert_array_equal(y_tilde.argmax(-1), y.argmax(-1))
    y = jnp.full((1, 100), 0.989 / 99).at[0, 7].set(0.011)
    assert told(ReverseSigmoid(), y, 1.0)[0].argmin() == 7


def test_logits_keep_their_digits_next_to_certainty():
    y = jax.nn.softmax(jnp.array([40.0, 0.0, -3.0]))
    assert y[0] == 1  # 1 - y_0 would be 0
    np.testing.assert_allclose(logit(y), [40 - np.log1p(np.exp(-3)), -40, -43], rtol=1e-6)
    np.testing.assert_array_equal(logit(jnp.eye(2)[0]), [np.inf, -np.inf])


def fixed(values):
    """A noise that is drawn by hand."""
    return lambda key, classes, radius, order: jnp.array(values)


@pytest.mark.parametrize(
    ("ball", "moved"),
    [
        (madjax.l1, [2.5, 0.0, -1.5]),  # the nearest point of |d|_1 = 4 to (3, .4, -2)
        (madjax.l2, 4 * np.array([3, 0.4, -2]) / np.linalg.norm([3, 0.4, -2])),
    ],
)
def test_random_noise_by_hand(ball, moved):
    drawn = fixed([3, 0.4, -2.0] if ball is madjax.l1 else [30, 4.0, -20.0])
    y = np.array([0.7, 0.2, 0.1])
    got = told(RandomNoise(noise=drawn, ball=ball), jnp.float32(y)[None], 4.0)[0]
    s = 1 / (1 + np.exp(-(np.log(y / (1 - y)) + moved)))
    np.testing.assert_allclose(got, s / s.sum(), rtol=1e-4)


def test_noise_is_drawn_as_it_says():
    draws = jax.vmap(lambda k: uniform(k, 5, jnp.float32(3), 2.0))(
        jax.random.split(jax.random.key(0), 2000)
    )
    most = 2 * 3 / 5**0.5
    assert (draws >= 0).all()
    assert (draws <= most).all()
    np.testing.assert_allclose(draws.mean(0), most / 2, rtol=0.05)
    draws = jax.vmap(lambda k: gaussian(k, 5, jnp.float32(3), 2.0))(
        jax.random.split(jax.random.key(0), 2000)
    )
    np.testing.assert_allclose(draws.std(0), 1, rtol=0.06)


def different(*answers):
    """How many different ones there are."""
    return len({tuple(row) for row in np.concatenate(answers)})


def test_every_query_has_its_own_noise_and_the_key_decides():
    y = jnp.tile(jnp.array([[0.6, 0.3, 0.1]]), (3, 1))
    first, again, other = (told(RandomNoise(), y, 5.0, key=key) for key in (0, 0, 1))
    np.testing.assert_array_equal(first, again)
    assert different(first, other) == 6


def test_a_query_sent_again_has_the_same_noise_unless_that_is_fresh():
    y = jnp.tile(jnp.array([[0.6, 0.3, 0.1]]), (3, 1))
    x = jnp.array([[4, 5], [4, 6], [4, 5]], jnp.uint8)
    for numbers in (None, jnp.array([7, 3, 1])):
        kept = told(RandomNoise(), y, 5.0, numbers, x=x)
        np.testing.assert_array_equal(kept[0], kept[2])
        assert different(kept) == 2
        np.testing.assert_array_equal(kept, told(RandomNoise(), y, 5.0, x=x))
    fresh = RandomNoise(fresh=True)
    assert different(told(fresh, y, 5.0, x=x), told(fresh, y, 5.0, jnp.arange(7, 10), x=x)) == 6


def scaled_noise(key, size, radius, order, *, scale):
    return scale * gaussian(key, size, radius, order)


def test_noise_is_named_or_a_function():
    y, numbers = awkward(4), jnp.arange(46)
    for noise in (uniform, gaussian):
        named, given = (RandomNoise(noise=n) for n in (noise.__name__, noise))
        np.testing.assert_array_equal(told(named, y, 2.0, numbers), told(given, y, 2.0, numbers))
        assert named.describe() == given.describe()
    wide = RandomNoise(noise=partial(scaled_noise, scale=3.0))
    assert wide.describe()["defense_variant"] == "scaled_noise(scale=3.0), l1 ball"
    assert told(wide, y, 2.0, numbers).shape == y.shape
    assert RandomNoise(fresh=True).describe()["defense_variant"] == "uniform, l1 ball, fresh"


def test_dp_sgd_answers_with_the_victim_of_its_noise(queries):
    w, x, y = queries
    defense = DPSGD()
    known = jnp.array([0.5, 2.0]), jnp.stack([w, -w])
    got = [as_function(defense, apply, known, s)(jax.random.key(0), x, y) for s in (0.5, 2.0, 1.0)]
    np.testing.assert_allclose(got[0], jax.nn.softmax(x @ w), atol=1e-6)
    np.testing.assert_allclose(got[1], jax.nn.softmax(-x @ w), atol=1e-6)
    assert np.isnan(got[2]).all(), "there is no such victim"


def test_dp_sgd_is_a_recipe_with_private_gradients():
    own, theirs = madjax.Recipe(batch_size=200), madjax.Recipe(epochs=4, weight_decay=5e-4)
    private = PrivateGradient(1.5, clip=0.5)
    assert DPSGD(0.5).victim_recipe(theirs, 1.5) == replace(theirs, gradient=private)
    assert DPSGD(0.5, own).victim_recipe(theirs, 1.5) == replace(own, gradient=private)
    known = DPSGD().facts(1.5, madjax.Recipe(epochs=2, batch_size=20), 60)
    want = accounted_epsilon(1.5, num_examples=60, batch_size=20, epochs=2, delta=1 / 60)
    assert (known["dp_epsilon"], known["dp_batch_size"], known["dp_epochs"]) == (want, 20, 2)
    for rule in (MAD(), NoDefense(), RandomNoise(), TopK(), TopLabel(), ReverseSigmoid()):
        assert rule.victim_recipe(theirs, 1.5) is theirs


@dataclass(frozen=True)
class Smoothed(Retrained):
    """The victim with a weight decay of the strength."""

    def victim_recipe(self, recipe, strength):
        return replace(recipe, weight_decay=strength)


def test_a_defence_in_the_training_is_a_recipe():
    """A victim for each strength and each key, which answers in place of the undefended one."""
    classifier, recipe, data = trainable()
    owner = Owner(classifier, recipe, jax.random.key(1), data, data)
    rule, x = Smoothed(), data[0]
    known = rule.prepare(owner, jax.random.key(2), (0.0, 3.0))
    again = rule.prepare(owner, jax.random.key(3), (0.0, 3.0))
    y = classifier.posterior(classifier.init(jax.random.key(0)), x)
    for strength in (0.0, 3.0):
        settings = replace(recipe, weight_decay=strength)
        own = stream(jax.random.key(2), f"smoothed-{strength:g}")
        victim = madjax.fit(classifier, settings, own, data, data).params
        got = as_function(rule, classifier.apply, known, strength)(jax.random.key(0), x, y)
        np.testing.assert_allclose(got, classifier.posterior(victim, x), atol=1e-6)
        other = as_function(rule, classifier.apply, again, strength)(jax.random.key(0), x, y)
        assert np.abs(got - other).max() > 1e-4
    assert rule.name == "smoothed"
    with pytest.raises(madjax.InputError, match="strengths of smoothed holds nothing"):
        rule.prepare(owner, jax.random.key(2))


def test_a_function_may_have_an_answer_at_strength_0():
    y = awkward(3)
    coarse = Custom(function=lambda key, x, y, strength: jnp.round(y, 1) + strength)
    np.testing.assert_array_equal(told(coarse, y, 0.0), y)
    np.testing.assert_array_equal(told(replace(coarse, neutral=None), y, 0.0), jnp.round(y, 1))
    np.testing.assert_array_equal(told(replace(coarse, neutral=2.0), y, 2.0), y)


def test_a_defence_of_ones_own_is_a_function(queries):
    w, x, y = queries

    def mix(key, x, y, strength):
        return (1 - strength) * y + strength * jax.nn.softmax(x[:4])

    got = as_function(Custom(function=mix), apply, w, 0.25)(jax.random.key(0), x, y)
    np.testing.assert_allclose(got, 0.75 * y + 0.25 * jax.nn.softmax(x[:, :4]), atol=1e-6)


@pytest.mark.parametrize(
    ("make", "words"),
    [
        (lambda: Defended(TopK(), (0.0,)), "strength is 0: that of top_k is k, give a whole"),
        (lambda: Defended(TopK(), (1.5,)), "strength is 1.5: that of top_k is k, give a whole"),
        (
            lambda: Defended(Rounding(), (7.0,)),
            "strength is 7.0: .* rounding is a number from 0 to 6",
        ),
        (lambda: Defended(Rounding(), (0.1,)), "strength is 0.1: that of rounding is a number of"),
        (lambda: ReverseSigmoid(gamma=-0.1), "gamma of ReverseSigmoid is -0.1"),
        (lambda: ReverseSigmoid(gamma=float("inf")), "gamma of ReverseSigmoid is inf"),
        (lambda: RandomNoise(noise="pink"), "noise of RandomNoise is 'pink': give 'uniform', 'g"),
        (lambda: Defended(ReverseSigmoid(), (1.5,)), "strength is 1.5: .* reverse_sigmoid"),
        (lambda: RandomNoise(ball=madjax.linf), "give madjax.l1 or madjax.l2"),
        (lambda: Defended(DPSGD(), (0.0, 1.0)), "strength is 0: .* give a number above 0"),
        (lambda: Defended(Custom(function=max)), "strengths of custom holds nothing"),
        (lambda: Defended(madjax.jbda()), "rule is JacobianAug.*not a madjax.Defense"),
        (lambda: Defended(MAD(), 0.5), r"strengths is 0.5: give a tuple, such as \(0.5, 0.99\)"),
        (lambda: Defended(MAD(), np.ones(2)), r"strengths is array.*: give a tuple"),
        (lambda: Defended(MAD(), ("much",)), "strengths holds 'much': give numbers"),
        (lambda: Defended(MAD(), (0.5, 0.50000000001)), "strengths of mad, .* each once"),
        (lambda: DPSGD(clip=0.0), "clip of DPSGD is 0.0"),
        (lambda: MAD(surrogate_epochs=-1), "surrogate_epochs is -1"),
        (lambda: Defended(MAD(), (-0.1,)), "strength is -0.1: the strength of mad"),
    ],
)
def test_settings_that_make_no_sense_are_named(make, words):
    with pytest.raises(madjax.InputError, match=words):
        make()


def test_a_defence_without_strengths_is_tried_at_its_usual_ones():
    rules = MAD(), NoDefense(), TopK(), TopLabel(), Rounding(), ReverseSigmoid(), RandomNoise()
    for rule in rules:
        assert Defended(rule).strengths == rule.usual
        assert len(rule.usual) > 0
    assert Defended(MAD(), (1,)).strengths == (1.0,)
    assert (MAD().is_budgeted, ReverseSigmoid().is_budgeted) == (True, False)


def test_rows_tell_settings_apart():
    said = [
        MAD(),
        MAD(surrogate_epochs=1),
        MAD(surrogate_epochs=5),
        MAD(layers="identity"),
        MAD(surrogate_epochs=None),
        MAD(query_statistics=True),
        TopK(),
        TopK(normalised=False),
        TopLabel(),
        Rounding(),
        ReverseSigmoid(),
        ReverseSigmoid(gamma=0.4),
        RandomNoise(),
        RandomNoise(ball=madjax.l2),
        RandomNoise(noise="gaussian"),
        RandomNoise(fresh=True),
        DPSGD(),
        NoDefense(),
        NoDefense(variant="twice"),
    ]
    labels = [defense.label for defense in said]
    assert len(set(labels)) == len(labels)
    assert labels[1] == "mad, all, extreme, l1, surrogate of 1 epoch"
    assert labels[4] == "mad, all, extreme, l1, the victim as surrogate"
    assert labels[5] == "mad, all, extreme, l1, statistics of the query"
    assert labels[7] == "top_k, not normalised"
    names = [defense.describe()["defense"] for defense in said]
    assert set(names) == {
        *("mad", "top_k", "top_label", "rounding"),
        *("reverse_sigmoid", "random_noise", "dp_sgd", "none"),
    }


def test_a_surrogate_is_trained_as_long_as_it_says():
    classifier, recipe, data = trainable()
    owner = Owner(classifier, recipe, jax.random.key(1), data, data)
    key = jax.random.key(2)
    chex.assert_trees_all_close(MAD().prepare(owner, key), classifier.init(key), atol=1e-7)
    want = madjax.fit(classifier, madjax.Recipe(epochs=2, batch_size=8), key, data, data).params
    chex.assert_trees_all_close(MAD(surrogate_epochs=2).prepare(owner, key), want)


def test_before_the_victim_itself_as_surrogate_every_answer_stands():
    """M p = 0 at the surrogate's own posterior p: no direction is known to be wrong."""
    classifier, recipe, data = trainable()
    owner = Owner(classifier, recipe, jax.random.key(1), data, data)
    victim = madjax.fit(classifier, recipe, owner.key, data, data).params
    rule, y = MAD(surrogate_epochs=None), classifier.posterior(victim, data[0])
    known = rule.prepare(owner, jax.random.key(2))
    chex.assert_trees_all_equal(known, victim)
    told = as_function(rule, classifier.apply, known, 0.9)(jax.random.key(0), data[0], y)
    np.testing.assert_array_equal(told, y)


def test_entropy_by_hand():
    y = jnp.array([[0.5, 0.25, 0.25, 0.0], [1.0, 0, 0, 0]])
    got = utility(y, y, jnp.array([0, 0]))
    np.testing.assert_allclose(got["entropy_mean"], 0.75)
    np.testing.assert_allclose(got["entropy_std"], 0.75)
