"""The networks are the originals (parameters, shapes, initial values) and learn as they should."""

from functools import partial

import chex
import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax

import madjax
from madjax import MLP, VGG16, Classifier, InputError, LeNet, Recipe, ResNet18, Task, fit
from madjax.datasets import MNIST_FAMILY
from madjax.models import computed_in
from madjax.sweep.tasks import open_tasks

TINY = Classifier(ResNet18(3, stages=(4, 6), blocks=1), lambda x: x / 255, (8, 8, 2))


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
        (ResNet18(10), (32, 32, 3), 11_173_962),
        (MLP(10), (28, 28, 1), 784 * 500 + 500 + 500 * 500 + 500 + 500 * 10 + 10),
        (MLP(3, hidden=()), (4, 4, 2), 32 * 3 + 3),
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


@pytest.mark.parametrize(
    ("width", "sizes"), [(2, (40, 100, 1000)), (0.5, (10, 25, 250)), (0.01, (1, 1, 5))]
)
def test_width_scales_the_hidden_layers(width, sizes):
    one, two, hidden = sizes
    variables = jax.eval_shape(
        LeNet(10, width=width).init, jax.random.key(0), jnp.zeros((1, 28, 28, 1))
    )
    shapes = [leaf.shape for leaf in jax.tree.leaves(variables) if leaf.ndim > 1]
    assert shapes == [(5, 5, 1, one), (5, 5, one, two), (16 * two, hidden), (hidden, 10)]


@pytest.mark.slow
def test_vgg16_trains_and_is_then_fixed():
    """In training the batch's statistics are used and kept; otherwise every row is by itself."""
    classifier = Classifier(VGG16(4, hidden=(8,)), lambda x: x / 255, (32, 32, 3))
    x = jax.random.uniform(jax.random.key(0), (3, 32, 32, 3), maxval=255)
    variables = jax.jit(classifier.init)(jax.random.key(1))
    kernel = variables["params"]["Conv_5"]["kernel"]
    np.testing.assert_allclose(kernel.std(), np.sqrt(2 / (9 * 256)), rtol=0.02)

    learn = jax.jit(classifier.learn)
    logits, updated = learn(variables, x, jax.random.key(2))
    assert logits.shape == (3, 4)
    chex.assert_trees_all_equal(updated["params"], variables["params"])
    old = jax.tree.leaves(variables["batch_stats"])
    assert all(
        np.any(a != b) for a, b in zip(old, jax.tree.leaves(updated["batch_stats"]), strict=True)
    )
    again, _ = learn(variables, x, jax.random.key(3))
    assert np.any(logits != again)
    apply = jax.jit(classifier.apply)
    np.testing.assert_allclose(apply(variables, x)[:1], apply(variables, x[:1]), atol=1e-5)


def some(classifier):
    """Random parameters and statistics; drawn by NumPy, as `init` takes seconds to compile."""
    shapes = jax.eval_shape(classifier.init, jax.random.key(0))
    rng = np.random.default_rng(0)
    draw = {
        "params": lambda leaf: rng.normal(0, 0.5, leaf.shape).astype(np.float32),
        "batch_stats": lambda leaf: rng.uniform(0.5, 2, leaf.shape).astype(np.float32),
    }
    return {name: jax.tree.map(draw[name], shapes[name]) for name in draw if name in shapes}


def images(classifier):
    """Three images with values in [0, 255]."""
    x = np.random.default_rng(1).uniform(0, 255, (3, *classifier.image_shape))
    return x.astype(np.float32)


def test_mlp_is_dense_layers_with_relu_between():
    classifier = Classifier(MLP(3, hidden=(6, 5)), lambda x: x / 255, (2, 2, 1))
    variables, x = some(classifier), images(classifier)
    first, second, last = variables["params"].values()
    want = x.reshape(3, 4) / 255
    for layer in (first, second):
        want = np.maximum(want @ layer["kernel"] + layer["bias"], 0)
    want = want @ last["kernel"] + last["bias"]
    np.testing.assert_allclose(classifier.apply(variables, x), want, atol=1e-5)


def tiny_by_hand(variables, x, train):
    """Logits, and the statistics of the batch: two stages of one block, written out."""
    params, running = (jax.tree.map(np.asarray, variables[k]) for k in ("params", "batch_stats"))
    batch = {}

    def conv(x, i, stride=1):
        kernel, norm = params[f"Conv_{i}"]["kernel"], f"BatchNorm_{i}"
        x = lax.conv_general_dilated(
            x,
            kernel,
            (stride, stride),
            2 * [2 * (len(kernel) // 2,)],
            dimension_numbers=("NHWC", "HWIO", "NHWC"),
        )
        x = np.asarray(x)
        batch[norm] = {"mean": x.mean((0, 1, 2)), "var": x.var((0, 1, 2))}
        moments = (batch if train else running)[norm]
        x = (x - moments["mean"]) / np.sqrt(moments["var"] + 1e-5)
        return x * params[norm]["scale"] + params[norm]["bias"]

    def relu(x):
        return np.maximum(x, 0)

    x = relu(conv(x / 255, 0))
    x = relu(x + conv(relu(conv(x, 1)), 2))
    x = relu(conv(x, 5, stride=2) + conv(relu(conv(x, 3, stride=2)), 4))
    return x.mean((1, 2)) @ params["Dense_0"]["kernel"] + params["Dense_0"]["bias"], batch


def test_resnet_learns_by_the_statistics_of_the_batch():
    variables, x = some(TINY), images(TINY)
    want, batch = tiny_by_hand(variables, x, train=True)
    logits, moved = jax.jit(TINY.learn)(variables, x, jax.random.key(0))
    np.testing.assert_allclose(logits, want, atol=1e-4)
    chex.assert_trees_all_equal(moved["params"], variables["params"])
    statistics = jax.tree.map(lambda a, b: 0.9 * a + 0.1 * b, variables["batch_stats"], batch)
    chex.assert_trees_all_close(moved["batch_stats"], statistics, atol=1e-4)
    want, _ = tiny_by_hand(variables, x, train=False)
    np.testing.assert_allclose(jax.jit(TINY.apply)(variables, x), want, atol=1e-4)


@pytest.mark.slow
def test_resnet_structured_is_jacrev():
    variables, x = some(TINY), images(TINY)

    @jax.jit
    @jax.jacrev
    def jacobian(params):
        return jax.nn.log_softmax(TINY.apply({**variables, "params": params}, x))

    leaves = jax.tree.leaves(jacobian(variables["params"]))
    g = np.concatenate([np.asarray(leaf).reshape(3, 3, -1) for leaf in leaves], axis=-1)
    want = g @ g.swapaxes(1, 2)
    got = np.asarray(madjax.gram(TINY.apply, variables, x, method="structured"))
    scale = np.abs(want).max(axis=(1, 2), keepdims=True)
    np.testing.assert_allclose(got / scale, want / scale, atol=1e-5)


def test_a_module_that_is_always_the_same_learns_by_apply():
    classifier = Classifier(LeNet(3, width=0.1), lambda x: x / 255, (16, 16, 1))
    variables, x = some(classifier), images(classifier)
    logits, same = jax.jit(classifier.learn)(variables, x, jax.random.key(0))
    chex.assert_trees_all_equal(same, variables)
    np.testing.assert_array_equal(logits, jax.jit(classifier.apply)(variables, x))


class ByFlag(nn.Module):
    """The same network whatever the flag is called."""

    @nn.compact
    def run(self, x, training):
        x = nn.Dense(4)(x.reshape(x.shape[0], -1))
        x = nn.BatchNorm(use_running_average=not training, momentum=0.5)(x)
        return nn.Dense(3)(nn.Dropout(0.5, deterministic=not training)(x))


class Train(ByFlag):
    def __call__(self, x, train=False):
        return self.run(x, train)


class Training(ByFlag):
    def __call__(self, x, *, training: bool = False):
        return self.run(x, training)


class Deterministic(ByFlag):
    def __call__(self, x, deterministic=True):
        return self.run(x, not deterministic)


class Fixed(ByFlag):
    def __call__(self, x):
        return self.run(x, False)


def test_a_module_is_trained_by_any_of_three_flags():
    x = jax.random.randint(jax.random.key(0), (6, 4, 4, 1), 0, 256).astype(jnp.uint8)
    found = []
    for kind in (Train, Training, Deterministic):
        classifier = Classifier(kind(), MNIST_FAMILY.preprocess, (4, 4, 1))
        variables = classifier.init(jax.random.key(1))
        logits, moved = classifier.learn(variables, x, jax.random.key(2))
        assert np.any(logits != classifier.apply(variables, x)), "dropout drops"
        means = variables["batch_stats"]["BatchNorm_0"]["mean"]
        assert np.all(moved["batch_stats"]["BatchNorm_0"]["mean"] != means)
        found.append((logits, moved))
    chex.assert_trees_all_equal(found[0], found[1])
    chex.assert_trees_all_equal(found[0], found[2])


def test_a_network_that_pools_images_away_is_refused():
    """Five poolings of VGG16 leave nothing of MNIST's 28 pixels: its logits would be constant."""
    classifier = Classifier(VGG16(10, width=1 / 64), MNIST_FAMILY.preprocess, (28, 28, 1))
    shapes = jax.eval_shape(classifier.init, jax.random.key(0))
    with pytest.raises(InputError, match=r"VGG16 leaves nothing of images of shape \(28, "):
        classifier.check_learns(shapes)
    task = Task("embedded:mnist[:20]", "embedded:mnist[:20]", architecture=VGG16)
    with pytest.raises(InputError, match=r"shape \(0, 10\), .* give larger images \(NAME@32\)"):
        open_tasks((task,), None, None)


def test_statistics_that_nothing_could_move_are_refused():
    """In inference mode BatchNorm would keep its first statistics, in silence."""
    classifier = Classifier(Fixed(), MNIST_FAMILY.preprocess, (4, 4, 1))
    x = jnp.zeros((6, 4, 4, 1), jnp.uint8)
    for call in (
        lambda: classifier.learn(classifier.init(jax.random.key(0)), x, jax.random.key(1)),
        lambda: fit(classifier, Recipe(), jax.random.key(0), (x, jnp.zeros(6, int)), (x, x)),
    ):
        with pytest.raises(InputError, match="Fixed has BatchNorm, and no way to say"):
            call()


def test_a_module_without_statistics_learns_and_gets_no_new_collection():
    class Dropped(nn.Module):
        @nn.compact
        def __call__(self, x, train=False):
            x = nn.Dropout(0.5, deterministic=not train)(x.reshape(x.shape[0], -1))
            self.sow("intermediates", "dropped", x)
            return nn.Dense(2)(x)

    classifier = Classifier(Dropped(), lambda x: x / 255, (4, 4, 1))
    variables, x = some(classifier), images(classifier)
    (one, same), (other, _) = (classifier.learn(variables, x, jax.random.key(k)) for k in (2, 3))
    chex.assert_trees_all_equal(same, variables)
    assert np.any(one != other)


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


def test_half_precision_is_of_the_computation_alone():
    """Variables, statistics and logits are float32; MAD's answers are nearly the same."""
    half = Classifier(TINY.module.clone(dtype=jnp.bfloat16), TINY.preprocess, TINY.image_shape)
    variables = some(TINY)
    x = np.random.default_rng(1).uniform(0, 255, (20, *TINY.image_shape)).astype(np.float32)
    logits, learned = jax.jit(half.learn)(variables, x, jax.random.key(0))
    assert {leaf.dtype for leaf in jax.tree.leaves((logits, learned))} == {np.dtype("float32")}
    hlo = jax.jit(half.apply).lower(variables, x).as_text()
    assert "bf16" in hlo
    assert "bf16" not in jax.jit(TINY.apply).lower(variables, x).as_text()
    found, wanted = (jax.jit(each.apply)(variables, x) for each in (half, TINY))
    np.testing.assert_allclose(found, wanted, atol=0.03 * np.abs(wanted).max())
    grams = [madjax.gram(each.apply, variables, x) for each in (half, TINY)]
    assert {gram.dtype for gram in grams} == {np.dtype("float32")}
    np.testing.assert_allclose(*grams, atol=0.1 * np.abs(grams[1]).max())
    y = jax.nn.softmax(jax.random.normal(jax.random.key(2), (20, 3)))
    solve = jax.vmap(partial(madjax.solve, epsilon=0.5))
    angles = [jax.vmap(madjax.angle)(solve(y, gram), y, grams[1]).mean() for gram in grams]
    np.testing.assert_allclose(*angles, rtol=0.02)


def test_the_platform_says_what_is_computed_in(monkeypatch):
    assert computed_in(None) == jnp.float32
    assert computed_in(jnp.float16) == jnp.float16
    monkeypatch.setattr(jax, "default_backend", lambda: "gpu")
    assert computed_in(None) == jnp.bfloat16
    assert computed_in(jnp.float32) == jnp.float32
