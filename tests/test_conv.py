"""Patches times a matrix is the convolution; a reshaped maximum is the pooling."""

import re

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax

import madjax
from madjax import sweep
from madjax.conv import convolution, max_pool_2x2, patch_convolution, unfold
from madjax.sweep.mesh import wave_size
from madjax.train import one_pass, start

NHWC = ("NHWC", "HWIO", "NHWC")
CASES = [
    {"window": (5, 5)},
    {"window": (3, 3), "padding": "SAME"},
    {"window": (3, 2), "strides": (2, 1), "padding": ((1, 0), (2, 1))},
    {"window": (2, 3), "dilation": (1, 2), "strides": (2, 2), "padding": "SAME"},
    {"window": (3, 3), "dilation": (2, 1), "padding": "VALID"},
    {"window": (1, 1), "strides": (3, 3)},
    {"window": (3, 3), "padding": "SAME", "columns": 70},
    {"window": (3, 3), "padding": "SAME", "channels": 32},
    {"window": (3, 2), "padding": ((1, 0), (2, 1)), "channels": 32},
    {"window": (2, 3), "dilation": (2, 1), "channels": 32},
    {"window": (3, 3), "strides": (2, 2), "padding": "SAME", "channels": 32},
    {"window": (2, 2), "padding": ((3, 3), (3, 3)), "channels": 32},
    {"window": (12, 3), "padding": "SAME", "channels": 32},
]


def both(case):
    """The same convolution as patches and as XLA's own, functions of (x, kernel)."""
    strides, dilation = case.get("strides", (1, 1)), case.get("dilation", (1, 1))
    padding = case.get("padding", "VALID")

    def run(convolve):
        return lambda x, k: convolve(
            x, k, strides, padding, rhs_dilation=dilation, dimension_numbers=NHWC
        )

    return run(patch_convolution), run(lax.conv_general_dilated)


@pytest.mark.parametrize("case", CASES, ids=str)
def test_values_and_gradients_are_those_of_xla(case):
    channels = case.get("channels", 3)
    x = jax.random.normal(jax.random.key(0), (2, 9, case.get("columns", 11), channels))
    kernel = jax.random.normal(jax.random.key(1), (*case["window"], channels, 4))
    ours, theirs = both(case)
    shape = jax.eval_shape(theirs, x, kernel).shape
    cotangent = jax.random.normal(jax.random.key(2), shape)

    def value_and_pull(convolve):
        value, pull = jax.vjp(convolve, x, kernel)
        return value, *pull(cotangent)

    got, want = (jax.jit(value_and_pull, static_argnums=0)(each) for each in (ours, theirs))
    for a, b in zip(got, want, strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-5, atol=2e-5 * channels**0.5)


def test_unfold_orders_a_patch_as_a_kernel_is_flattened():
    x = jnp.arange(2 * 4 * 5 * 3, dtype=jnp.float32).reshape(2, 4, 5, 3)
    patches = unfold(x, (2, 3))
    assert patches.shape == (2, 3, 3, 18)
    for i, j in [(0, 0), (2, 1)]:
        np.testing.assert_array_equal(patches[1, i, j], x[1, i : i + 2, j : j + 3].reshape(-1))


def test_grouped_convolution_is_left_to_xla():
    layer = nn.Conv(4, (3, 3), feature_group_count=2)
    x = jax.random.normal(jax.random.key(0), (2, 6, 6, 4))
    params = layer.init(jax.random.key(1), x)
    ours = nn.Conv(4, (3, 3), feature_group_count=2, conv_general_dilated=patch_convolution)
    np.testing.assert_allclose(ours.apply(params, x), layer.apply(params, x), atol=1e-5)


def test_other_layouts_and_options_are_left_to_xla():
    x = jax.random.normal(jax.random.key(0), (2, 3, 6, 5))
    kernel = jax.random.normal(jax.random.key(1), (4, 3, 2, 2))
    for options in ({}, {"dimension_numbers": ("NCHW", "OIHW", "NHWC")}):
        want = lax.conv_general_dilated(x, kernel, (1, 1), "SAME", **options)
        np.testing.assert_array_equal(patch_convolution(x, kernel, (1, 1), "SAME", **options), want)
    half = x.transpose(0, 2, 3, 1).astype(jnp.bfloat16)
    options = {"dimension_numbers": NHWC, "preferred_element_type": jnp.float32}
    kernel = kernel.transpose(2, 3, 1, 0).astype(jnp.bfloat16)
    got = patch_convolution(half, kernel, (1, 1), "SAME", **options)
    assert got.dtype == jnp.float32


@pytest.mark.parametrize("shape", [(2, 6, 4, 3), (1, 7, 5, 2)])
def test_pooling_is_flax_pooling_with_its_gradient(shape):
    x = jax.random.normal(jax.random.key(0), shape)
    want, pull_want = jax.vjp(lambda x: nn.max_pool(x, (2, 2), (2, 2)), x)
    got, pull = jax.vjp(max_pool_2x2, x)
    np.testing.assert_array_equal(got, want)
    cotangent = jax.random.normal(jax.random.key(1), want.shape)
    np.testing.assert_allclose(pull(cotangent)[0], pull_want(cotangent)[0], atol=1e-6)


@pytest.mark.parametrize(
    ("channels", "strides"), [(3, (1, 2)), pytest.param(32, (1, 1), marks=pytest.mark.slow)]
)
def test_forward_mode_agrees_with_reverse_mode(channels, strides):
    x = jax.random.normal(jax.random.key(0), (2, 9, 8, channels))
    kernel = jax.random.normal(jax.random.key(1), (3, 3, channels, 4))

    convolve, _ = both({"strides": strides, "padding": "SAME"})

    def network(x, kernel):
        return jnp.sum(jnp.square(max_pool_2x2(convolve(x, kernel))))

    direction = jax.tree.map(jnp.cos, (x, kernel))
    _, forward = jax.jvp(network, (x, kernel), direction)
    gradient = jax.grad(network, argnums=(0, 1))(x, kernel)
    reverse = sum(jnp.vdot(g, d) for g, d in zip(gradient, direction, strict=True))
    np.testing.assert_allclose(forward, reverse, rtol=1e-5)


def test_equal_maxima_share_the_gradient():
    gradient = jax.grad(lambda x: max_pool_2x2(x).sum())(
        jnp.array([[3.0, 1], [3, 0]])[None, ..., None]
    )
    np.testing.assert_allclose(gradient[0, ..., 0], [[0.5, 0], [0.5, 0]])


def test_the_gradient_of_what_is_normalised_and_pooled_is_finite():
    """XLA computed the normalised image twice, and rounded it in two ways: no maximum was found."""
    x = jax.random.normal(jax.random.key(0), (64, 14, 14, 32))
    cotangent = jax.random.normal(jax.random.key(1), (64, 7, 7, 32))
    norm = nn.BatchNorm(use_running_average=False)
    scale, bias = jax.random.normal(jax.random.key(2), (2, 32))
    variables = norm.init(jax.random.key(3), x) | {"params": {"scale": scale, "bias": bias}}

    def pooled(x, pool):
        normed, _ = norm.apply(variables, x, mutable=["batch_stats"])
        return (cotangent * pool(nn.relu(normed))).sum()

    got = jax.jit(jax.grad(lambda x: pooled(x, max_pool_2x2)))(x)
    want = jax.jit(jax.grad(lambda x: pooled(x, lambda a: nn.max_pool(a, (2, 2), (2, 2)))))(x)
    np.testing.assert_allclose(got, want, atol=1e-4)


@pytest.fixture
def _accelerated(monkeypatch):
    """Programs are traced as on an accelerator."""
    monkeypatch.setattr("jax.default_backend", lambda: "gpu")


@pytest.mark.usefixtures("_accelerated")
@pytest.mark.parametrize("channels", [3, 40, 64])
def test_on_an_accelerator_values_and_gradients_are_those_of_xla(channels):
    """Of cells side by side, up to the channels from which XLA's own is taken and beyond."""
    x = jax.random.normal(jax.random.key(0), (2, 2, 7, 6, channels))
    kernel = jax.random.normal(jax.random.key(1), (2, 3, 3, channels, 4)) / channels**0.5

    def loss(convolve, x, kernel):
        out = convolve(x, kernel, (1, 1), "SAME", dimension_numbers=NHWC)
        return jnp.square(out).sum()

    def found(convolve):
        side_by_side = jax.vmap(jax.value_and_grad(loss, (1, 2)), (None, 0, 0))
        return side_by_side(convolve, x, kernel)

    for a, b in zip(*map(jax.tree.leaves, map(found, (convolution, own))), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-4)


def own(x, kernel, *args, **kwargs):
    return lax.conv_general_dilated(x, kernel, *args, **kwargs)


def cuda_program(module, shape, mapping=None):
    """Eight cells that train a network for an epoch, as they are lowered for CUDA."""
    network = madjax.Classifier(module, lambda x: x / 255.0, shape)
    recipe = madjax.Recipe(epochs=1, batch_size=4)

    def train(seed, data):
        x, y = data
        state = start(network, recipe, 8, jax.random.key(seed))
        return one_pass(network, recipe, state, lambda i: (x[i], y[i]), 8).params

    mesh = sweep.make_mesh(jax.devices()[:1])
    cells = sweep.over_cells(train, mesh=mesh, networks=[network], mapping=mapping)
    data = jax.ShapeDtypeStruct((8, *shape), np.uint8), jax.ShapeDtypeStruct((8, 10), np.float32)
    exported = jax.export.export(cells, platforms=["cuda"])(np.arange(8), data)
    return exported.mlir_module()


@pytest.mark.usefixtures("_accelerated")
@pytest.mark.parametrize(
    ("module", "shape", "convolutions"),
    [
        (madjax.LeNet(10), (28, 28, 1), 0),
        (madjax.models.LeNetDouble(10), (28, 28, 1), 0),
        (madjax.ResNet18(10, stages=(64, 128), blocks=1), (32, 32, 3), 15),
    ],
    ids=["LeNet", "twice LeNet", "a network that fills the device alone"],
)
def test_no_grouped_convolution_on_an_accelerator(module, shape, convolutions):
    """Small networks side by side are batched products; large ones go one after another."""
    text = cuda_program(module, shape)
    assert len(re.findall(r"stablehlo\.convolution", text)) == convolutions
    assert set(re.findall(r"feature_group_count = (\d+)", text)) <= {"1"}
    batched = re.findall(r"dot_general.*batching_dims = \[0\]", text)
    assert bool(batched) == (not convolutions)


@pytest.mark.usefixtures("_accelerated")
def test_convolutions_side_by_side_would_be_grouped():
    """What the two rules avoid."""
    module = madjax.LeNet(10, convolution=lax.conv_general_dilated)
    assert "feature_group_count = 8" in cuda_program(module, (28, 28, 1), sweep.vmap_cells)


@pytest.mark.usefixtures("_accelerated")
@pytest.mark.parametrize(
    ("module", "shape", "wide"),
    [
        (madjax.LeNet(10), (28, 28, 1), False),
        (madjax.models.LeNetDouble(10), (28, 28, 1), False),
        (madjax.VGG16(10, width=1 / 16), (32, 32, 3), False),
        (madjax.VGG16(10, width=1 / 8), (32, 32, 3), True),
        (madjax.ResNet18(10, stages=(16, 32, 64)), (32, 32, 3), True),
        (madjax.MLP(10), (28, 28, 1), False),
    ],
)
def test_networks_with_many_channels_are_wide(module, shape, wide):
    network = madjax.Classifier(module, lambda x: x / 255, shape)
    assert network.is_wide == wide
    assert sweep.default_mapping([network]) == (sweep.map_cells if wide else sweep.vmap_cells)
    mesh = sweep.make_mesh(jax.devices()[:2])
    assert wave_size(6, mesh, None, [network]) == (2 if wide else 6)
    assert wave_size(6, mesh, None, [network], together=True) == 6


def test_on_a_cpu_no_network_is_looked_at():
    """Whether one is wide takes a trace."""
    assert sweep.default_mapping([None]) == sweep.map_cells
