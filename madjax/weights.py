"""Networks trained elsewhere: weights in PyTorch's layout, read into Flax modules."""

import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax.traverse_util import flatten_dict, unflatten_dict

from madjax.errors import InputError, in_one_line
from madjax.models import Classifier

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

    Convolutions go from [features, C, h, w] to [h, w, C, features], dense layers from
    [outputs, inputs] to [inputs, outputs]. A dense layer behind a convolution reads its pixels in
    the order (row, column, channel), where PyTorch flattens (channel, row, column).

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
    said, held = ("the state dict", weights) if isinstance(weights, Mapping) else _read(weights)
    held = {name: value for name, value in held.items() if not name.endswith("num_batches_tracked")}
    network = type(classifier.module).__name__
    if names is None:
        if not hasattr(classifier.module, "torch_names"):
            raise InputError(
                f"{network} has no torch_names: give names, its layers -> their names in {said}"
            )
        names = classifier.module.torch_names()
    slots, last = _slots(classifier, names), list(names)[-1]
    found = {}
    if head is not None:
        held = {name: v for name, v in held.items() if not name.startswith(f"{names[last]}.")}
        new = [slot.path for slot in slots if slot.layer == last]
        slots = [slot for slot in slots if slot.layer != last]
        found = jax.jit(lambda key: _some(classifier.init(key), new))(head)
    _check_names(said, network, held, {slot.name for slot in slots})
    for slot in slots:
        value = _array(held[slot.name])
        if value.shape != slot.shape:
            anew = ", or head=jax.random.key(0) for a new last layer" if slot.layer == last else ""
            raise InputError(
                f"{said}: {slot.name} has shape {value.shape}, where {network} for images of shape "
                f"{classifier.image_shape} has {slot.shape}: give the weights of that network{anew}"
            )
        if not np.isfinite(value).all():
            raise InputError(f"{said}: {slot.name} holds NaN or infinity: give finite weights")
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
    slots, channels = [], None
    for layer, name in names.items():
        for (collection, leaf), suffix in _LEAVES.items():
            path = (collection, *layer.split("/"), leaf)
            if path not in shapes:
                continue
            shape, seen = shapes[path].shape, (1, 1, 1)
            if leaf == "kernel":
                if len(shape) == 2:
                    seen = _seen(classifier, layer, shape[0], channels)
                channels = shape[-1] if len(shape) == 4 else None
                shape = (shape[-1], shape[-2], *shape[:-2])
            slots.append(_Slot(layer, path, f"{name}.{suffix}", shape, seen))
    unnamed = shapes.keys() - {slot.path for slot in slots}
    if unnamed:
        raise InputError(
            f"{type(classifier.module).__name__} has {'/'.join(min(unnamed))}, for which names has "
            "no layer of PyTorch: name all convolutions, dense layers and BatchNorms; one with "
            "layers of other kinds is yours to fill"
        )
    return slots


def _seen(
    classifier: Classifier, layer: str, inputs: int, channels: int | None
) -> tuple[int, int, int]:
    """Channels, rows and columns of what a dense layer reads, of that many numbers.

    channels: those of the convolution before it, if there is one.
    """
    if channels is None or inputs == channels:
        return inputs, 1, 1
    side = math.isqrt(inputs // channels)
    if side * side * channels != inputs or len(set(classifier.image_shape[:2])) > 1:
        raise InputError(
            f"{layer} reads {inputs} numbers of {channels} channels, which are no square image: "
            "how PyTorch flattens them cannot be told, fill its variables yourself"
        )
    return channels, side, side


def _check_names(said: str, network: str, held: Mapping[str, Any], wanted: set[str]) -> None:
    """Refuse a state dict that lacks an array, or has one too many."""
    lacking, left = (sorted(names) for names in (wanted - held.keys(), held.keys() - wanted))
    parts = [f"it lacks {_first(lacking)}"] if lacking else []
    parts += [f"it holds {_first(left)}, for which {network} has no place"] if left else []
    if parts:
        raise InputError(
            f"{said} does not fit {network}: {'; '.join(parts)}: give the weights of the same "
            "network, or names, its layers -> their names there"
        )


def _first(names: list[str]) -> str:
    return names[0] + (f" and {len(names) - 1} more" if len(names) > 1 else "")


def _read(path: str | Path) -> tuple[str, dict[str, Any]]:
    """What a file is called in messages, and the arrays that it holds by their names."""
    path = Path(path)
    if not path.is_file():
        raise InputError(f"{path} is no file: give one of weights, .safetensors or .pth")
    try:
        held = _opened(path)
    except ModuleNotFoundError as error:
        raise InputError(
            f"{path} needs PyTorch to be read: pip install torch, or save the state dict as "
            ".safetensors with safetensors.torch.save_file"
        ) from error
    except Exception as error:  # of many kinds, by what is wrong with the file
        raise InputError(
            f"{path} cannot be read ({in_one_line(error)}): give the state dict of a PyTorch "
            "network, as torch.save or safetensors.torch.save_file writes it"
        ) from error
    held = held.get("state_dict", held) if isinstance(held, Mapping) else {}
    if not held or not all(hasattr(value, "shape") for value in held.values()):
        raise InputError(f"{path} holds no state dict: save network.state_dict(), not the network")
    if all(name.startswith("module.") for name in held):  # of torch.nn.DataParallel
        held = {name.removeprefix("module."): value for name, value in held.items()}
    return str(path), held


def _opened(path: Path) -> Any:
    if path.suffix == ".safetensors":
        from safetensors.flax import load_file  # the one that reads bfloat16 without PyTorch

        return load_file(path)
    import torch

    return torch.load(path, map_location="cpu", weights_only=True)


def _array(value: Any) -> np.ndarray:
    """A tensor of PyTorch or an array, of any type, as float32."""
    if hasattr(value, "detach"):
        value = value.detach().cpu().float().numpy()
    return np.asarray(value).astype(np.float32)


def _some(variables: Any, paths: list[tuple[str, ...]]) -> dict[tuple[str, ...], Array]:
    """The leaves at some paths."""
    flat = flatten_dict(variables)
    return {path: flat[path] for path in paths}
