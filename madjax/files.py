"""Files that a crash leaves whole."""

from collections.abc import Callable
from pathlib import Path


def write_atomically(path: Path, write: Callable[[Path], object]) -> None:
    """Let write(draft) make the file, then put it in place: the old file or the new, never a part.

    A draft that fails is removed, and the old file stays.
    """
    draft = path.with_name(f".{path.name}.part")
    try:
        write(draft)
        draft.replace(path)
    finally:
        draft.unlink(missing_ok=True)
