"""Arrays of files and checkpoints, by their names there."""

import hashlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from flax.traverse_util import flatten_dict

from madjax import checkpoints
from madjax.errors import InputError, in_one_line


def arrays_of(path: str) -> dict[str, Any]:
    """The arrays of a file, or of the checkpoint in a directory, by their names."""
    return _checkpoint(path_of(path)) if path_of(path).is_dir() else read(path_of(path))


def path_of(path: str | Path) -> Path:
    """The path, ~ being the user's home."""
    return Path(path).expanduser()


def _checkpoint(path: Path) -> dict[str, Any]:
    """The variables in a checkpoint, or in the last of a directory of them, by their paths."""
    steps = sorted((p for p in path.iterdir() if p.name.isdigit()), key=lambda p: int(p.name))
    try:
        tree = checkpoints.read(steps[-1] if steps else path)
        tree = tree["params"] if "opt_state" in tree else tree
        return {name: as_float32(a) for name, a in flatten_dict(tree, sep="/").items()}
    except Exception as error:  # of many kinds, by what is wrong with it
        raise InputError(
            f"{path} cannot be read as a checkpoint ({in_one_line(error)}): give "
            "RUN/checkpoints/NAME of a run, or a file of weights"
        ) from error


def read(path: Path) -> dict[str, Any]:
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


def as_float32(value: Any) -> np.ndarray:
    """A tensor of PyTorch or an array, of any type, as float32."""
    if hasattr(value, "detach"):
        value = value.detach().cpu().float().numpy()
    return np.asarray(value).astype(np.float32)


def digest_of(held: Mapping[str, Any]) -> str:
    """Hexadecimal digits that change with the arrays and their names."""
    found = hashlib.sha256()
    for name, value in sorted(held.items()):
        array = np.ascontiguousarray(as_float32(value))
        found.update(f"{name} {array.shape}".encode())
        found.update(array)
    return found.hexdigest()[:12]
