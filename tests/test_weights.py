"""Weights from PyTorch: the same logits, whole files, and one line for what does not fit."""

import sys
from functools import partial
from pathlib import Path

import flax.linen as nn
import jax
import numpy as np
import pytest
from safetensors.flax import load_file, save_file

from madjax import MLP, VGG16, Classifier, InputError, LeNet, ResNet18, from_torch

GOLDEN = load_file(Path(__file__).parent / "golden" / "torch.safetensors")
NETWORKS = {
    "lenet": (LeNet(4, width=0.1), (28, 28, 1)),
    "vgg16_bn": (VGG16(7, hidden=(6, 5), width=1 / 32), (64, 64, 3)),
    "vgg16": (VGG16(7, hidden=(6,), width=1 / 32, batch_norm=False), (64, 64, 3)),
    "vgg16_cifar": (VGG16(10, width=1 / 32), (32, 32, 3)),
    "resnet18": (ResNet18(5, stages=(4, 6, 8, 10), large_images=True), (64, 64, 3)),
}


def scaled(x):
    return x / 255


def classifier(name, **changed):
    """The network of that name, with other fields of the module, or on images of another shape."""
    module, shape = NETWORKS[name]
    return Classifier(module.clone(**changed), scaled, shape)


def state_dict(name):
    """What PyTorch's `state_dict()` has, as arrays."""
    start = f"{name}/state/"
    return {k.removeprefix(start): np.asarray(v) for k, v in GOLDEN.items() if k.startswith(start)}


def images(name):
    return np.asarray(GOLDEN[f"{name}/images"]).transpose(0, 2, 3, 1)


@pytest.mark.parametrize("name", NETWORKS)
def test_logits_are_those_of_pytorch(name):
    network = classifier(name)
    logits = jax.jit(network.apply)(from_torch(network, state_dict(name)), images(name))
    wanted = GOLDEN[f"{name}/logits"]
    np.testing.assert_allclose(logits, wanted, atol=1e-4 * np.abs(wanted).max())


@pytest.mark.parametrize("name", NETWORKS)
def test_variables_are_those_of_init(name):
    network = classifier(name)
    like = jax.eval_shape(network.init, jax.random.key(0))
    found = from_torch(network, state_dict(name))
    assert jax.tree.structure(found) == jax.tree.structure(like)
    for leaf, wanted in zip(*map(jax.tree.leaves, (found, like)), strict=True):
        assert (leaf.shape, leaf.dtype) == (wanted.shape, np.float32)


@pytest.mark.parametrize("name", ["lenet", "vgg16_bn", "resnet18"])
def test_a_new_head_is_drawn_and_the_rest_is_the_files(name):
    key, weights = jax.random.key(3), state_dict(name)
    whole, other = classifier(name), classifier(name, num_classes=6)
    found, old, drawn = from_torch(other, weights, head=key), from_torch(whole, weights), None
    drawn = jax.jit(other.init)(key)["params"]
    last = list(other.module.torch_names())[-1]
    for layer, each in found["params"].items():
        wanted = drawn if layer == last else old["params"]
        jax.tree.map(np.testing.assert_array_equal, each, wanted[layer])
    assert found["params"][last]["kernel"].shape[-1] == 6
    headless = {
        k: v for k, v in weights.items() if not k.startswith(whole.module.torch_names()[last])
    }
    jax.tree.map(np.testing.assert_array_equal, found, from_torch(other, headless, head=key))


def test_a_safetensors_file_is_read_without_pytorch(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "torch", None)
    network, weights = classifier("lenet"), state_dict("lenet")
    path = tmp_path / "lenet.safetensors"
    save_file({f"module.{k}": jax.numpy.asarray(v) for k, v in weights.items()}, path)
    jax.tree.map(
        np.testing.assert_array_equal, from_torch(network, path), from_torch(network, weights)
    )
    half = {k: jax.numpy.asarray(v, jax.numpy.bfloat16) for k, v in weights.items()}
    save_file(half, path)
    found = from_torch(network, str(path))["params"]["Dense_1"]["bias"]
    assert found.dtype == np.float32
    np.testing.assert_array_equal(found, half["fc2.bias"].astype(np.float32))

    (tmp_path / "lenet.pth").write_bytes(b"anything")
    with pytest.raises(InputError, match=r"lenet\.pth needs PyTorch to be read: pip install torch"):
        from_torch(network, tmp_path / "lenet.pth")


@pytest.mark.parametrize("name", NETWORKS)
def test_a_file_of_pytorch_gives_its_logits(name, tmp_path):
    """As for the golden file, which `torch_networks.py` made."""
    torch = pytest.importorskip("torch")
    from tests.torch_networks import make

    module, x = make()[name]
    network, path = classifier(name), tmp_path / "checkpoint.pth.tar"
    for kept in ("float", "half"):
        state = getattr(module, kept)().state_dict()
        torch.save(state if kept == "float" else {"epoch": 3, "state_dict": state}, path)
        with torch.no_grad():
            wanted = module.float()(x / 255).numpy()
        logits = jax.jit(network.apply)(from_torch(network, path), x.numpy().transpose(0, 2, 3, 1))
        np.testing.assert_allclose(logits, wanted, atol=1e-4 * np.abs(wanted).max())
    torch.save({"network": 3}, path)
    with pytest.raises(InputError, match=r"holds no state dict: save network\.state_dict"):
        from_torch(network, path)
    jax.tree.map(
        np.testing.assert_array_equal,
        from_torch(network, module.state_dict()),
        from_torch(network, {k: v.numpy() for k, v in module.state_dict().items()}),
    )


class Body(nn.Module):
    """One convolution."""

    @nn.compact
    def __call__(self, x):
        return nn.Conv(3, (2, 2), padding="VALID")(x)


class Nested(nn.Module):
    """A network of a user's own, with layers inside layers."""

    num_classes: int

    @nn.compact
    def __call__(self, x):
        x = nn.relu(Body(name="body")(x))
        return nn.Dense(self.num_classes, name="head")(x.reshape(len(x), -1))


def test_names_of_a_users_own_network():
    """By hand: PyTorch flattens (channel, row, column)."""
    network, rng = Classifier(Nested(2), scaled, (3, 3, 1)), np.random.default_rng(0)
    kernel, dense = rng.normal(size=(3, 1, 2, 2)), rng.normal(size=(2, 12))
    weights = {"a.weight": kernel, "a.bias": np.zeros(3), "b.weight": dense, "b.bias": np.ones(2)}
    names = {"body/Conv_0": "a", "head": "b"}
    x = rng.integers(256, size=(1, 3, 3, 1), dtype=np.uint8)
    seen = np.zeros((3, 2, 2))
    for f, i, j in np.ndindex(3, 2, 2):
        seen[f, i, j] = (kernel[f, 0] * x[0, i : i + 2, j : j + 2, 0] / 255).sum()
    wanted = dense @ np.maximum(seen, 0).ravel() + 1
    found = network.apply(from_torch(network, weights, names=names), x)[0]
    np.testing.assert_allclose(found, wanted, rtol=1e-5)
    with pytest.raises(InputError, match=r"Nested has no torch_names, which .* or names, its"):
        from_torch(network, weights)
    with pytest.raises(InputError, match=r"Nested has params/body/Conv_0/.*, for which names has"):
        from_torch(network, weights, names={"head": "b"})
    wide = Classifier(Nested(2), scaled, (3, 4, 1))
    with pytest.raises(
        InputError, match=r"head reads 18 numbers of 3 channels, which are no square"
    ):
        from_torch(wide, weights, names=names)


def test_a_dense_layer_on_the_image_itself():
    network, rng = Classifier(MLP(2, hidden=(4,)), scaled, (2, 3, 2)), np.random.default_rng(0)
    first, second = rng.normal(size=(4, 12)), rng.normal(size=(2, 4))
    weights = {"a.weight": first, "a.bias": np.ones(4), "b.weight": second, "b.bias": np.ones(2)}
    x = rng.integers(256, size=(2, 2, 3, 2), dtype=np.uint8)
    flat = x.transpose(0, 3, 1, 2).reshape(2, 12) / 255
    wanted = np.maximum(flat @ first.T + 1, 0) @ second.T + 1
    variables = from_torch(network, weights, names={"Dense_0": "a", "Dense_1": "b"})
    np.testing.assert_allclose(network.apply(variables, x), wanted, rtol=1e-5)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            lambda w: w.pop("conv2.bias"),
            r"^the state dict does not fit LeNet: it lacks conv2\.bias: ",
        ),
        (
            lambda w: [w.pop(f"conv{i}.{part}") for i in (1, 2) for part in ("weight", "bias")],
            r"it lacks conv1\.bias and 3 more: ",
        ),
        (lambda w: w.update(bn=np.ones(2)), "it holds bn, for which LeNet has no place: "),
        (lambda w: w.update({"fc2.bias": np.full(4, np.nan)}), r"fc2\.bias holds NaN or infinity"),
        (
            lambda w: w.update({"fc2.weight": np.ones((9, 50))}),
            r"fc2\.weight has shape \(9, 50\), where LeNet for these classes and images of shape "
            r"\(28, 28, 1\) has \(4, 50\): .*, or head=jax\.random\.key\(0\) for a new last layer$",
        ),
        (
            lambda w: w.update({"conv1.weight": np.ones((2, 3, 5, 5))}),
            r"conv1\.weight has shape \(2, 3, 5, 5\), where .* has \(2, 1, 5, 5\): give the "
            "weights of that network$",
        ),
    ],
)
def test_what_does_not_fit_is_one_clear_line(change, message):
    weights = state_dict("lenet")
    change(weights)
    with pytest.raises(InputError, match=message):
        from_torch(classifier("lenet"), weights)


def test_the_other_vgg_is_named():
    plain = classifier("vgg16_bn", batch_norm=False)
    with pytest.raises(
        InputError, match=r"it lacks features\.12\.bias and 9 more; it holds features\.1\.bias"
    ):
        from_torch(plain, state_dict("vgg16_bn"))


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.safetensors", b"nothing", r"a\.safetensors cannot be read \(SafetensorError: "),
        ("none.pth", None, r"none\.pth is no file: give one of weights"),
    ],
)
def test_a_file_that_is_none_is_named(name, content, message, tmp_path):
    path = tmp_path / name
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(InputError, match=message):
        from_torch(Classifier(MLP(2), scaled, (2, 2, 1)), path)


def test_parameters_are_as_many_as_torchvisions():
    for module, count in (
        (ResNet18(1000, large_images=True), 11_689_512),
        (VGG16(1000, hidden=(4096, 4096), batch_norm=False), 138_357_544),
    ):
        init = partial(module.init, jax.random.key(0))
        shapes = jax.eval_shape(init, jax.ShapeDtypeStruct((1, 224, 224, 3), np.float32))
        assert sum(leaf.size for leaf in jax.tree.leaves(shapes["params"])) == count
