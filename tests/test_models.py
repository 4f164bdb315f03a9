"""The networks are those of the authors' code: counts of parameters, shapes, initial values."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import madjax
from madjax import VGG16, Classifier, LeNet
from madjax.datasets import MNIST_FAMILY


def count(module, shape):
    variables = jax.eval_shape(module.init, jax.random.key(0), jnp.zeros((1, *shape)))
    return sum(leaf.size for leaf in jax.tree.leaves(variables["params"]))


@pytest.mark.parametrize(
    ("module", "shape", "parameters"),
    [
        (VGG16(10), (32, 32, 3), 14_728_266),
        (VGG16(100), (32, 32, 3), 14_774_436),
        # torchvision's vgg16_bn
        (VGG16(1000, hidden=(4096, 4096)), (224, 224, 3), 138_365_992),
    ],
)
def test_parameters_are_as_many_as_the_originals(module, shape, parameters):
    assert count(module, shape) == parameters
    logits = jax.eval_shape(
        lambda x: module.init_with_output(jax.random.key(0), x)[0], jnp.zeros((2, *shape))
    )
    assert logits.shape == (2, module.num_classes)


def test_lenet_is_the_authors_network():
    classifier = Classifier(LeNet(10), MNIST_FAMILY.preprocess, (28, 28, 1))
    params = jax.jit(classifier.init)(jax.random.key(0))["params"]
    shapes = {name: layer["kernel"].shape for name, layer in params.items()}
    assert shapes == {
        "Conv_0": (5, 5, 1, 20),
        "Conv_1": (5, 5, 20, 50),
        "Dense_0": (800, 500),
        "Dense_1": (500, 10),
    }
    assert sum(leaf.size for leaf in jax.tree.leaves(params)) == 431_080
    for name, fan_in in {"Conv_0": 25, "Conv_1": 500, "Dense_0": 800, "Dense_1": 500}.items():
        limit = fan_in**-0.5
        for leaf in jax.tree.leaves(params[name]):
            assert jnp.abs(leaf).max() <= limit
        # U(-l, l) has standard deviation l / sqrt(3).
        kernel = params[name]["kernel"]
        spread = 4 / np.sqrt(kernel.size)
        np.testing.assert_allclose(kernel.std() * 3**0.5 / limit, 1, atol=spread)
        assert jnp.abs(params[name]["bias"]).max() > 0.5 * limit


def test_width_scales_the_hidden_layers():
    variables = LeNet(10, width=3).init(jax.random.key(0), jnp.zeros((1, 28, 28, 1)))
    shapes = [leaf.shape for leaf in jax.tree.leaves(variables) if leaf.ndim > 1]
    assert shapes == [(5, 5, 1, 60), (5, 5, 60, 150), (2400, 1500), (1500, 10)]


def test_vgg16_trains_and_is_then_fixed():
    """In training the batch's statistics are used and kept; otherwise every row is by itself."""
    module = VGG16(4, hidden=(8,))
    x = jax.random.normal(jax.random.key(0), (3, 32, 32, 3))
    variables = jax.jit(module.init)(jax.random.key(1), x)
    kernel = variables["params"]["Conv_5"]["kernel"]
    np.testing.assert_allclose(kernel.std(), np.sqrt(2 / (9 * 256)), rtol=0.02)

    @jax.jit
    def train(variables, x, key):
        return module.apply(
            variables, x, train=True, rngs={"dropout": key}, mutable=["batch_stats"]
        )

    logits, updated = train(variables, x, jax.random.key(2))
    assert logits.shape == (3, 4)
    old = jax.tree.leaves(variables["batch_stats"])
    assert all(
        np.any(a != b) for a, b in zip(old, jax.tree.leaves(updated["batch_stats"]), strict=True)
    )
    again, _ = train(variables, x, jax.random.key(3))
    assert np.any(logits != again)
    apply = jax.jit(module.apply)
    np.testing.assert_allclose(apply(variables, x)[:1], apply(variables, x[:1]), atol=1e-5)


@pytest.mark.slow
def test_vgg16_structured_is_jacrev():
    module = VGG16(3)
    x = jax.random.normal(jax.random.key(0), (2, 32, 32, 3))
    params = jax.jit(module.init)(jax.random.key(1), x)
    got, want = (
        np.asarray(madjax.gram(module.apply, params, x, method=method, chunk=1))
        for method in ("structured", "jacrev")
    )
    np.testing.assert_allclose(got / np.abs(want).max(), want / np.abs(want).max(), atol=1e-5)
