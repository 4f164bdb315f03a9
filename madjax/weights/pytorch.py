"""Weights in the layout of PyTorch, as variables of Flax modules."""

import math
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax.traverse_util import flatten_dict, unflatten_dict

from madjax.errors import InputError
from madjax.models import Classifier
from madjax.weights.files import as_float32, path_of, read
from madjax.weights.fits import check_finite, check_names, check_shape

Array = jax.Array

_LEAVES = {
    ("params", "kernel"): "weight",
    ("params", "scale"): "weight",
    ("params", "bias"): "bias",
    ("batch_stats", "mean"): "running_mean",
    ("batch_stats", "var"): "running_var",
}
"""A leaf's collection and name -> its name in PyTorch."""


def from_torch(
    classifier: Classifier,
    weights: str | Path | Mapping[str, Any],
    *,
    head: Array | None = None,
    names: Mapping[str, str] | None = None,
) -> dict[str, Any]:
    """The variables of a network from a state dict of the same network in PyTorch.

    Convolutions, but transposed ones, go from [features, C, h, w] to [h, w, C, features], dense
    layers from [outputs, inputs] to [inputs, outputs]. A dense layer behind a convolution or the
    image reads pixels in the order (row, column, channel), where PyTorch flattens (channel, row,
    column).

    Args:
        classifier: the network; its preprocessing is what the PyTorch network was trained behind.
        weights: a state dict, or a file of one: `.safetensors`, or what `torch.save` wrote, for
            which PyTorch has to be installed. A checkpoint with a "state_dict" will do, as will
            the names of a `DataParallel` network, which begin with "module.".
        head: a key from which the last layer is drawn anew, as for other classes. The file's is
            not read then.
        names: the network's layers, parts of a path joined by "/" -> their names in the state
            dict, from first to last. By default those that the module's `torch_names` says:
            torchvision's `vgg16`, `vgg16_bn` and `resnet18`, and the authors' LeNet and CIFAR VGG.

    Returns:
        float32 variables for `classifier.apply`: "params", and "batch_stats" if any.

    Raises:
        InputError: a file that cannot be read; a module without `torch_names`; an array that is
            missing, is left over, has another shape, or is not finite.

    Example:
        >>> import jax, madjax, numpy as np
        >>> network = madjax.Classifier(madjax.LeNet(10), lambda x: x / 255, (28, 28, 1))
        >>> shapes = {"conv1": (20, 1, 5, 5), "conv2": (50, 20, 5, 5), "fc1": (500, 800)}
        >>> weights = {f"{name}.weight": np.ones(shape) for name, shape in shapes.items()}
        >>> weights |= {f"{name}.bias": np.ones(shape[0]) for name, shape in shapes.items()}
        >>> victim = madjax.from_torch(network, weights, head=jax.random.key(0))
        >>> victim["params"]["Dense_0"]["kernel"].shape
        (800, 500)
    """
    if isinstance(weights, Mapping):
        return fitted(classifier, weights, "the state dict", CALLED, head, names)
    held = read(path_of(weights))
    return fitted(classifier, held, str(weights), CALLED, head, names)


class Ways(NamedTuple):
    """What else a user can do, as messages say it."""

    names: str
    head: str


CALLED = Ways(
    "or names, its layers -> their names there", ", or head=jax.random.key(0) for a new last layer"
)
GIVEN = Ways("or its module a method torch_names, its layers -> their names there", "")


def fitted(
    classifier: Classifier,
    held: Mapping[str, Any],
    said: str,
    ways: Ways,
    head: Array | None = None,
    names: Mapping[str, str] | None = None,
    skipped: Collection[str] = (),
) -> dict[str, Any]:
    """`from_torch` of a state dict, which messages call `said`, but for variables at some paths."""
    held = {name: value for name, value in held.items() if not name.endswith("num_batches_tracked")}
    network = type(classifier.module).__name__
    if names is None:
        if not hasattr(classifier.module, "torch_names"):
            raise InputError(
                f"{network} has no torch_names, which {said} asks for: give another network, "
                f"{ways.names}"
            )
        names = classifier.module.torch_names()
    slots, last = _slots(classifier, names), list(names)[-1]
    found, left_out = {}, {slot.name for slot in slots if "/".join(slot.path) in skipped}
    held = {name: value for name, value in held.items() if name not in left_out}
    slots = [slot for slot in slots if slot.name not in left_out]
    if head is not None:
        held = {name: v for name, v in held.items() if not name.startswith(f"{names[last]}.")}
        new = [slot.path for slot in slots if slot.layer == last]
        slots = [slot for slot in slots if slot.layer != last]
        found = jax.jit(lambda key: _some(classifier.init(key), new))(head)
    check_names(said, network, held, {slot.name for slot in slots}, ways.names)
    for slot in slots:
        value = as_float32(held[slot.name])
        anew = ways.head if slot.layer == last else ""
        check_shape(said, slot.name, value.shape, slot.shape, classifier, anew)
        check_finite(said, slot.name, value)
        found[slot.path] = jnp.asarray(slot.ordered(value))
    return unflatten_dict(found)


class _Slot(NamedTuple):
    """Where an array goes."""

    layer: str
    path: tuple[str, ...]
    """Of the leaf in the network's variables."""
    name: str
    """In PyTorch."""
    shape: tuple[int, ...]
    """There."""
    seen: tuple[int, int, int]
    """Channels, rows and columns that a dense layer reads, as PyTorch flattens them."""

    def ordered(self, value: np.ndarray) -> np.ndarray:
        """The array in Flax's order."""
        if value.ndim == 4:
            return value.transpose(2, 3, 1, 0)
        if value.ndim == 2:
            outputs, inputs = value.shape
            return value.reshape(outputs, *self.seen).transpose(2, 3, 1, 0).reshape(inputs, outputs)
        return value


def _slots(classifier: Classifier, names: Mapping[str, str]) -> list[_Slot]:
    """What the variables of a network hold, layer by layer."""
    shapes = flatten_dict(jax.eval_shape(classifier.init, jax.random.key(0)))
    named = {(group, *layer.split("/"), leaf) for layer in names for group, leaf in _LEAVES}
    unnamed = shapes.keys() - named
    if unnamed:
        raise InputError(
            f"{type(classifier.module).__name__} has {'/'.join(min(unnamed))}, for which names has "
            "no layer of PyTorch: name all convolutions, dense layers and BatchNorms; one with "
            "layers of other kinds is yours to fill"
        )
    image = jax.eval_shape(
        classifier.preprocess, jax.ShapeDtypeStruct((1, *classifier.image_shape), jnp.uint8)
    ).shape[1:]
    slots, channels = [], image[2]
    for layer, name in names.items():
        for (collection, leaf), suffix in _LEAVES.items():
            path = (collection, *layer.split("/"), leaf)
            if path not in shapes:
                continue
            shape, seen = shapes[path].shape, (1, 1, 1)
            if leaf == "kernel":
                if len(shape) not in (2, 4):
                    raise InputError(
                        f"{layer} has a kernel of shape {shape}, which is of no dense layer and no "
                        "convolution of images: fill its variables yourself"
                    )
                if len(shape) == 2:
                    seen = _seen(image, layer, shape[0], channels)
                channels = shape[-1] if len(shape) == 4 else None
                shape = (shape[-1], shape[-2], *shape[:-2])
            slots.append(_Slot(layer, path, f"{name}.{suffix}", shape, seen))
    return slots


def _seen(
    image: tuple[int, ...], layer: str, inputs: int, channels: int | None
) -> tuple[int, int, int]:
    """Channels, rows and columns of what a dense layer reads, of that many numbers.

    image: the shape of what the network takes. channels: those of the image or convolution before
    it; None where that is a dense layer.
    """
    rows, columns, _ = image
    if channels is None or inputs == channels:
        return inputs, 1, 1
    if inputs == channels * rows * columns:
        return channels, rows, columns
    side = math.isqrt(inputs // channels)
    if side * side * channels != inputs or rows != columns:
        raise InputError(
            f"{layer} reads {inputs} numbers of {channels} channels, which are no square image: "
            "how PyTorch flattens them cannot be told, fill its variables yourself"
        )
    return channels, side, side


def _some(variables: Any, paths: list[tuple[str, ...]]) -> dict[tuple[str, ...], Array]:
    """The leaves at some paths."""
    flat = flatten_dict(variables)
    return {path: flat[path] for path in paths}
