"""Networks trained elsewhere: weights of PyTorch and checkpoints of other runs."""

import hashlib
import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import lru_cache
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


@dataclass(frozen=True)
class Trained:
    """A network that was trained elsewhere, by the file or directory that it is in.

    path: weights in PyTorch's layout, as `from_torch` takes them; or a checkpoint of a madjax run,
    `RUN/checkpoints/NAME`, of which the last epoch is taken.

    It is read when this is made. What tells one from another, in `id` and `task_settings` of rows,
    is `digest`, which is of the arrays and their names: the file may be moved, and saved anew. On
    an accelerator VGG16 and ResNet18 compute in bfloat16, unless their dtype says otherwise.

    Raises:
        InputError: it cannot be read.
    """

    path: str = field(compare=False, metadata={"described": False})
    digest: str = field(init=False)

    def __post_init__(self) -> None:
        object.__setattr__(self, "path", str(self.path))
        object.__setattr__(self, "digest", _digest(_held(self.path)))

    def variables(self, classifier: Classifier) -> dict[str, Any]:
        """The variables of a network, which these have to fit.

        Raises:
            InputError: they do not fit; they are not those of when this was made.
        """
        return _variables(self, classifier)


@lru_cache(maxsize=1)  # as a run asks for them several times
def _variables(trained: Trained, classifier: Classifier) -> dict[str, Any]:
    with jax.ensure_compile_time_eval():  # as they may be asked for inside a trace
        held = _held(trained.path)
        if _digest(held) != trained.digest:
            raise InputError(
                f"{trained.path} was changed after its config was read: leave it as it is until "
                "the run has ended"
            )
        if _path(trained.path).is_dir():
            return _as_they_are(classifier, held, trained.path)
        return _from_torch(classifier, held, trained.path, _GIVEN)


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
        return _from_torch(classifier, weights, "the state dict", _CALLED, head, names)
    held = _read(_path(weights))
    return _from_torch(classifier, held, str(weights), _CALLED, head, names)


class _Ways(NamedTuple):
    """What else a user can do, as messages say it."""

    names: str
    head: str


_CALLED = _Ways(
    "or names, its layers -> their names there", ", or head=jax.random.key(0) for a new last layer"
)
_GIVEN = _Ways("or its module a method torch_names, its layers -> their names there", "")


def _from_torch(
    classifier: Classifier,
    held: Mapping[str, Any],
    said: str,
    ways: _Ways,
    head: Array | None = None,
    names: Mapping[str, str] | None = None,
) -> dict[str, Any]:
    """`from_torch` of a state dict, which messages call `said`."""
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
    found = {}
    if head is not None:
        held = {name: v for name, v in held.items() if not name.startswith(f"{names[last]}.")}
        new = [slot.path for slot in slots if slot.layer == last]
        slots = [slot for slot in slots if slot.layer != last]
        found = jax.jit(lambda key: _some(classifier.init(key), new))(head)
    _check_names(said, network, held, {slot.name for slot in slots}, ways.names)
    for slot in slots:
        value = _array(held[slot.name])
        anew = ways.head if slot.layer == last else ""
        _check_shape(said, slot.name, value.shape, slot.shape, classifier, anew)
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


def _check_names(
    said: str, network: str, held: Mapping[str, Any], wanted: set[str], way: str
) -> None:
    """Refuse arrays of which one is missing, or one too many; way is what else will do."""
    lacking, left = (sorted(names) for names in (wanted - held.keys(), held.keys() - wanted))
    parts = [f"it lacks {_first(lacking)}"] if lacking else []
    parts += [f"it holds {_first(left)}, for which {network} has no place"] if left else []
    if parts:
        raise InputError(
            f"{said} does not fit {network}: {'; '.join(parts)}: give the weights of the same "
            f"network, {way}"
        )


def _check_shape(
    said: str,
    name: str,
    found: tuple[int, ...],
    wanted: tuple[int, ...],
    classifier: Classifier,
    anew: str = "",
) -> None:
    """Refuse an array of another shape than the network's; anew is what else will do."""
    if found != wanted:
        raise InputError(
            f"{said}: {name} has shape {found}, where {type(classifier.module).__name__} for these "
            f"classes and images of shape {classifier.image_shape} has {wanted}: give the weights "
            f"of that network{anew}"
        )


def _first(names: list[str]) -> str:
    return names[0] + (f" and {len(names) - 1} more" if len(names) > 1 else "")


def _as_they_are(classifier: Classifier, held: Mapping[str, np.ndarray], said: str) -> Any:
    """The variables of a network from the arrays at their paths, joined by "/"."""
    shapes = flatten_dict(jax.eval_shape(classifier.init, jax.random.key(0)), sep="/")
    network = type(classifier.module).__name__
    _check_names(said, network, held, set(shapes), "from a run of it")
    for name, wanted in shapes.items():
        _check_shape(said, name, held[name].shape, wanted.shape, classifier)
    return unflatten_dict({name: jnp.asarray(held[name]) for name in shapes}, sep="/")


def _digest(held: Mapping[str, Any]) -> str:
    """Hexadecimal digits that change with the arrays and their names."""
    found = hashlib.sha256()
    for name, value in sorted(held.items()):
        array = np.ascontiguousarray(_array(value))
        found.update(f"{name} {array.shape}".encode())
        found.update(array)
    return found.hexdigest()[:12]


def _held(path: str) -> dict[str, Any]:
    """The arrays of a file, or of the checkpoint in a directory, by their names."""
    return _checkpoint(_path(path)) if _path(path).is_dir() else _read(_path(path))


def _path(path: str | Path) -> Path:
    return Path(path).expanduser()


def _checkpoint(path: Path) -> dict[str, Any]:
    """The variables in a checkpoint, or in the last of a directory of them, by their paths."""
    from orbax.checkpoint import v1 as ocp

    steps = sorted((p for p in path.iterdir() if p.name.isdigit()), key=lambda p: int(p.name))
    try:
        tree = ocp.load((steps[-1] if steps else path).resolve())
        tree = tree["params"] if "opt_state" in tree else tree
        return {name: _array(a) for name, a in flatten_dict(tree, sep="/").items()}
    except Exception as error:  # of many kinds, by what is wrong with it
        raise InputError(
            f"{path} cannot be read as a checkpoint ({in_one_line(error)}): give "
            "RUN/checkpoints/NAME of a run, or a file of weights"
        ) from error


def _read(path: Path) -> dict[str, Any]:
    """The arrays that a file holds by their names."""
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
    return held


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
