"""Files that a crash leaves whole."""

from collections.abc import Callable, Mapping
from pathlib import Path

import numpy as np

from madjax.errors import InputError


def write_atomically(path: Path, write: Callable[[Path], object]) -> None:
    """Let write(draft) make the file, then put it in place: the old file or the new, never a part.

    A draft that fails is removed, and the old file stays.

    Raises:
        InputError: the file cannot be written there.
    """
    check_can_write(path)
    draft = path.with_name(f".{path.name}.part")
    try:
        try:
            write(draft)
            draft.replace(path)
        finally:
            draft.unlink(missing_ok=True)
    except OSError as error:
        raise InputError(
            f"{path} cannot be written ({error.strerror or error}): give another"
        ) from error


def save_npz(path: Path, arrays: Mapping[str, np.ndarray]) -> None:
    """Write arrays as a compressed .npz of exactly this path, whatever its suffix."""
    with path.open("wb") as file:  # savez adds a suffix to a path
        np.savez_compressed(file, **arrays)


def check_can_write(path: Path) -> None:
    """Refuse a file that has no directory to lie in, or is one: before what it is to hold is made.

    Raises:
        InputError: so it is.
    """
    if path.is_dir():
        raise InputError(f"{path} is a directory: give the name of a file")
    if not path.parent.is_dir():
        raise InputError(f"{path} cannot be written: there is no directory {path.parent}; make it")
