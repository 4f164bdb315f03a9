"""Data sets in folders, or .zip files, of JPEG and PNG images."""

from __future__ import annotations

import contextlib
import io
import os
import zipfile
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path, PurePosixPath

import numpy as np

from madjax.datasets.types import DAMAGED, Dataset, build, by, first_line
from madjax.errors import InputError

_IMAGE_SUFFIXES = {".jpg", ".jpeg", ".png"}


@contextlib.contextmanager
def _members(path: Path) -> Iterator[dict[str, Callable[[], bytes]]]:
    """Image files below a folder or in a .zip: relative name -> function that reads its bytes."""
    if path.is_dir():
        files = [Path(top, f) for top, _, fs in os.walk(path, followlinks=True) for f in fs]
        yield _images({f.relative_to(path).as_posix(): f.read_bytes for f in files})
    elif path.is_file():
        try:
            archive = zipfile.ZipFile(path)
        except DAMAGED as error:
            raise InputError(
                f"{str(path)!r} is not a readable .zip ({first_line(error)}): give a folder or .zip"
            ) from error
        with archive:
            names = [i.filename for i in archive.infolist() if not i.is_dir()]
            yield _images({n: lambda n=n: archive.read(n) for n in names})
    else:
        raise InputError(f"no folder or .zip {str(path)!r}: check the path after folder:")


def _images(files: Mapping[str, Callable[[], bytes]]) -> dict[str, Callable[[], bytes]]:
    # Dot files and __MACOSX hold thumbnails and resource forks that merely end in .jpg.
    return {
        name: files[name]
        for name in sorted(files)
        if PurePosixPath(name).suffix.lower() in _IMAGE_SUFFIXES
        and not any(part.startswith((".", "__MACOSX")) for part in PurePosixPath(name).parts)
    }


def _decode(read: Callable[[], bytes], where: str) -> np.ndarray:
    from PIL import Image

    try:
        with Image.open(io.BytesIO(read())) as image:
            if image.mode[0] in "IF":  # convert() would clip 16 and 32 bit pixels silently
                raise InputError(f"image {where} has {image.mode} pixels: save it with 8 bits")
            grey = image.mode in ("1", "L", "LA")
            pixels = np.asarray(image.convert("L" if grey else "RGB"))
    except InputError:
        raise
    except (*DAMAGED, Image.DecompressionBombError) as error:
        raise InputError(
            f"image {where} is corrupt ({first_line(error)}): replace or remove it"
        ) from error
    return pixels[..., None] if grey else pixels


def _split_and_class(name: str, splits: bool, where: str) -> tuple[str, str]:
    parts = PurePosixPath(name).parts[:-1]
    if not splits:
        parts = ("train", *parts)
    if len(parts) != 2 or parts[0] not in ("train", "test", "val"):
        raise InputError(
            f"image {where} is not at [train|test|val/]CLASS/FILE: move it into that layout"
        )
    return parts[0], parts[1]


def open_folder(rest: str, data_dir: str | Path | None = None) -> Dataset:
    """Train is `train`, or everything without split folders; test is `test`, else `val`."""
    del data_dir
    path = Path(rest).expanduser()
    with _members(path) as files:
        splits = any(len(PurePosixPath(name).parts) > 2 for name in files)
        places = [_split_and_class(name, splits, f"{path}/{name}") for name in files]
        held_out = "test" if any(split == "test" for split, _ in places) else "val"
        places = dict(zip(files, places, strict=True))
        used = [name for name in files if places[name][0] in ("train", held_out)]
        if not any(places[name][0] == "train" for name in used):
            raise InputError(f"no train images (.jpg, .png) below {str(path)!r}: add train/CLASS/")
        images = {name: _decode(files[name], f"{path}/{name}") for name in used}
    sizes = Counter(image.shape[:2] for image in images.values())
    size = sizes.most_common(1)[0][0]
    for name, image in images.items():
        if image.shape[:2] != size:
            raise InputError(
                f"image {path}/{name} is {by(image.shape[:2])} but most are {by(size)} (height x "
                "width): resize all to one size"
            )
    channels = max(image.shape[2] for image in images.values())
    classes = sorted({places[name][1] for name in used})
    x = np.stack([np.broadcast_to(image, (*size, channels)) for image in images.values()])
    y = np.array([classes.index(places[name][1]) for name in used], np.int32)
    train = np.array([places[name][0] == "train" for name in used])
    return build(f"folder:{rest}", (x[train], y[train]), (x[~train], y[~train]), tuple(classes))
