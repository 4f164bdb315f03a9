"""A defence as the grid uses it and as a plain function, and what it costs honest users."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import madjax
from madjax.batching import map_chunks
from madjax.defenses import MAD, answers, as_function
from madjax.evaluate import utility


def apply(w, x):
    return x @ w


@pytest.fixture(scope="module")
def queries():
    keys = jax.random.split(jax.random.key(0), 3)
    w = jax.random.normal(keys[0], (6, 4))
    return w, jax.random.normal(keys[1], (5, 6)), jax.nn.softmax(jax.random.normal(keys[2], (5, 4)))


class Jacobian(MAD):
    """MAD for a surrogate that is a plain function of its parameters."""

    def evidence(self, apply, params, x):
        return madjax.gram(apply, params, x, layers=self.layers, method="jacrev")


def test_plain_function_is_perturb(queries):
    w, x, y = queries
    defend = as_function(Jacobian(layers="all"), apply, w, 0.6)
    want = madjax.perturb(apply, w, x, y, epsilon=0.6, method="jacrev")
    np.testing.assert_allclose(defend(jax.random.key(0), x, y), want, atol=1e-7)


def test_strength_is_traced_and_zero_is_no_defence(queries):
    w, x, y = queries
    defense = Jacobian(layers="all", oracle=madjax.argmax_preserving, distance=madjax.l2)
    evidence = defense.evidence(apply, w, x)

    @jax.jit
    def grid(strengths):
        return jax.vmap(lambda s: answers(defense, jax.random.key(0), y, evidence, s))(strengths)

    none, some = grid(jnp.array([0.0, 0.3]))
    np.testing.assert_array_equal(none, y)
    np.testing.assert_allclose(jnp.linalg.norm(some - y, axis=-1), 0.3, rtol=1e-5)
    np.testing.assert_array_equal(some.argmax(-1), y.argmax(-1))


def test_more_queries_than_a_chunk_change_nothing(queries):
    w, x, y = queries
    defense = Jacobian(layers="all")
    evidence = defense.evidence(apply, w, x)
    many = answers(
        defense, jax.random.key(0), jnp.tile(y, (401, 1)), jnp.tile(evidence, (401, 1, 1)), 0.6
    )
    few = answers(defense, jax.random.key(0), y, evidence, 0.6)
    np.testing.assert_allclose(many, jnp.tile(few, (401, 1)), atol=1e-7)


def test_rows_name_the_defence():
    assert MAD(layers="all").describe() == {
        "defense": "mad",
        "layers": "all",
        "oracle": "extreme",
        "distance": "l1",
    }
    described = MAD(oracle=madjax.argmax_preserving, distance=madjax.kl).describe()
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
