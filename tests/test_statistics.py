"""BatchNorm with the statistics of a query alone, against training mode on one query at a time."""

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

import madjax
from madjax import InputError, query_statistics


class Normed(nn.Module):
    """BatchNorm of other settings, over features that are the last axis and over some that are not.

    The second has no scale, the third no parameters at all.
    """

    @nn.compact
    def __call__(self, x, train=False):
        norm = {"use_running_average": not train, "momentum": 0.5, "epsilon": 0.1}
        x = nn.tanh(nn.BatchNorm(**norm)(nn.Conv(4, (3, 3))(x)))
        x = nn.Conv(3, (3, 3))(x).swapaxes(1, 3)
        x = nn.tanh(nn.BatchNorm(**norm, axis=1, use_scale=False)(x))
        x = nn.BatchNorm(**norm, axis=(1, 3), use_scale=False, use_bias=False)(x)
        return nn.Dense(5)(x.reshape(x.shape[0], -1))


NETWORK = Normed()
X = jax.random.normal(jax.random.key(0), (3, 6, 4, 2))


def drawn(network=NETWORK, x=X):
    """Variables none of which has a special value: norms scale, move and have seen data."""
    variables = jax.tree.map(jnp.asarray, network.init(jax.random.key(1), x))
    leaves, tree = jax.tree.flatten(variables)
    keys = jax.random.split(jax.random.key(2), len(leaves))
    moved = [
        0.5 + a + 0.3 * jax.random.uniform(k, a.shape) for k, a in zip(keys, leaves, strict=True)
    ]
    return jax.tree.unflatten(tree, moved)


def one_at_a_time(variables, x):
    """Training mode on batches of one: the definition."""

    def alone(x):
        logits, _ = NETWORK.apply(variables, x[None], train=True, mutable=["batch_stats"])
        return logits[0]

    return jax.vmap(alone)(x)


def test_logits_are_those_of_training_mode_on_one_query_at_a_time():
    variables, apply = drawn(), query_statistics(NETWORK.apply)
    want = one_at_a_time(variables, X)
    np.testing.assert_allclose(apply(variables, X), want, rtol=1e-5, atol=1e-5)
    assert not np.allclose(NETWORK.apply(variables, X), want, atol=0.1)


def test_running_statistics_are_not_read():
    variables, apply = drawn(), query_statistics(NETWORK.apply)
    other = variables | {"batch_stats": jax.tree.map(jnp.zeros_like, variables["batch_stats"])}
    np.testing.assert_array_equal(apply(variables, X), apply(other, X))


@pytest.mark.parametrize("layers", ["all", "last"])
def test_gram_matrices_are_those_of_its_jacobian(layers):
    """As many layers are explained as with fixed statistics; the reference is one_at_a_time's."""
    variables, apply = drawn(), query_statistics(NETWORK.apply)
    explained = madjax.coverage(apply, variables, X)
    assert explained == madjax.coverage(NETWORK.apply, variables, X)
    assert explained["BatchNorm_0/scale"] == "structured"

    def log_likelihoods(params, x):
        logits = one_at_a_time(variables | {"params": params}, x[None])
        return jax.nn.log_softmax(logits[0])

    jacobians = jax.vmap(jax.jacrev(log_likelihoods), (None, 0))(variables["params"], X)
    chosen = [jacobians["Dense_0"]["kernel"]] if layers == "last" else jax.tree.leaves(jacobians)
    g = np.concatenate([np.asarray(j, np.float64).reshape(3, 5, -1) for j in chosen], axis=2)
    want = g @ g.swapaxes(1, 2)
    got = madjax.gram(apply, variables, X, layers=layers)
    np.testing.assert_allclose(got, want, rtol=1e-4, atol=1e-4 * want.max())


def test_the_networks_of_the_package_are_explained():
    small = madjax.ResNet18(4, stages=(4, 8), blocks=1)
    x = jax.random.normal(jax.random.key(3), (2, 8, 8, 3))
    apply, variables = query_statistics(small.apply), drawn(small, x)
    assert set(madjax.coverage(apply, variables, x).values()) == {"structured"}
    want = madjax.gram(apply, variables, x, method="jacrev")
    got = madjax.gram(apply, variables, x)
    np.testing.assert_allclose(got, want, rtol=1e-4, atol=1e-4 * want.max())


def test_what_was_compiled_before_is_not_taken():
    """A jitted function whose program has the running statistics."""
    variables, jitted = drawn(), jax.jit(NETWORK.apply)
    jitted(variables, X)
    got = query_statistics(jitted)(variables, X)
    np.testing.assert_allclose(got, one_at_a_time(variables, X), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("known", [False, True])
def test_batch_norm_inside_jit_is_refused_and_leaves_no_trace(known):
    """What jit keeps is what it would have kept."""
    jitted = jax.jit(lambda variables, x: NETWORK.apply(variables, x))
    want = NETWORK.apply(drawn(), X)
    if known:
        jitted(drawn(), X)
    apply = query_statistics(lambda variables, x: jitted(variables, x))
    for _ in range(2):
        with pytest.raises(InputError, match=r"BatchNorm_0 is no plain flax\.linen\.BatchNorm"):
            apply(drawn(), X)
    np.testing.assert_allclose(jitted(drawn(), X), want, rtol=1e-5, atol=1e-5)


class Own(nn.BatchNorm):
    """Of a user's own kind, which might do anything."""


def test_a_batch_norm_of_another_kind_is_refused():
    network = nn.Sequential([Own(use_running_average=True), nn.Conv(2, (2, 2))])
    variables = network.init(jax.random.key(0), X)
    with pytest.raises(InputError, match="layers_0 is no plain"):
        query_statistics(network.apply)(variables, X)


def test_a_mask_is_kept():
    """Of positions that count."""
    mask = jnp.arange(6)[None, :, None, None] < 4
    x, norm = X - X[:, :4].mean(), nn.BatchNorm(use_running_average=True)
    variables = norm.init(jax.random.key(0), x)
    part = x[:, :4]

    def masked(variables, x):
        return norm.apply(variables, x, mask=jnp.broadcast_to(mask, x.shape))

    got = query_statistics(masked)(variables, x)[:, :4]
    np.testing.assert_allclose(got, query_statistics(norm.apply)(variables, part), atol=1e-5)


def test_batch_norm_in_training_mode_is_refused_by_gram_as_ever():
    def apply(variables, x):
        return NETWORK.apply(variables, x, train=True, mutable=["batch_stats"])[0]

    with pytest.raises(InputError, match="BatchNorm_0 is a BatchNorm in training mode"):
        madjax.gram(query_statistics(apply), drawn(), X)


@pytest.mark.parametrize("shape", [(3, 6), (3, 1, 1, 6)])
def test_one_value_of_a_feature_has_no_statistics(shape):
    network = nn.Sequential([nn.BatchNorm(use_running_average=True), nn.Dense(2)])
    x = jnp.ones(shape)
    variables = network.init(jax.random.key(0), x)
    with pytest.raises(InputError, match="layers_0 has one value of each feature of a query"):
        query_statistics(network.apply)(variables, x)


def test_equal_functions_have_one_program():
    assert query_statistics(NETWORK.apply) == query_statistics(NETWORK.apply)
    assert hash(query_statistics(NETWORK.apply)) == hash(query_statistics(NETWORK.apply))
    assert query_statistics(NETWORK.apply) != query_statistics(madjax.LeNet(5).apply)


def test_mad_takes_them_where_it_is_told_to():
    network = madjax.Classifier(NETWORK, lambda x: x / 255 - 0.5, (6, 4, 2))
    images = np.random.default_rng(0).integers(0, 256, (3, 6, 4, 2), np.uint8)
    variables = drawn()
    rule = madjax.MAD(query_statistics=True)
    want = madjax.gram(query_statistics(network.apply), variables, images)
    np.testing.assert_array_equal(rule.evidence(network.apply, variables, images), want)
    plain = madjax.gram(network.apply, variables, images)
    np.testing.assert_array_equal(madjax.MAD().evidence(network.apply, variables, images), plain)
    assert not np.allclose(want, plain, rtol=0.1)
