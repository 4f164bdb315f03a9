"""Data sets in folders, or .zip files, of images in any raster format that Pillow reads."""

from __future__ import annotations

import contextlib
import functools
import io
import os
import unicodedata
import warnings
import zipfile
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path, PurePosixPath
from typing import Any, NamedTuple

import numpy as np

from madjax.datasets.listing import CorruptImageError, Images, Listing
from madjax.datasets.types import DAMAGED, first_line
from madjax.errors import InputError

LARGEST = 2**26
"""Bytes of one image file in a .zip: no image of a data set is larger, and a few kilobytes of
archive may hold gigabytes."""

_SPLITS = {"train": "train", "test": "test"}
_SPLITS |= dict.fromkeys(("val", "valid", "validation"), "val")
_EXPECTED = "[train|test|val|valid|validation/]CLASS/IMAGE"
# Formats that Pillow knows of, but draws by other programs or not at all.
_NO_RASTER = {"BUFR", "EPS", "GRIB", "HDF5", "MPEG", "WMF"}


class _File(NamedTuple):
    """A file of the data set."""

    read: Callable[[], bytes]
    stamp: Callable[[], list[Any]]
    """What changes with its bytes, and is that of no other file."""


class _Tree(NamedTuple):
    """What lies below a folder or in a .zip, without hidden files: relative names."""

    files: Mapping[str, _File]
    """In the order of names."""
    folders: frozenset[str]


@contextlib.contextmanager
def _opened(path: Path) -> Iterator[_Tree]:
    if path.is_dir():
        files, folders = {}, set()
        for top, names, found in os.walk(path, followlinks=True):
            here = os.path.realpath(top)
            # A link to a folder that it lies in would be walked for ever.
            names[:] = [n for n in names if not _holds(os.path.realpath(Path(top, n)), here)]
            folders |= {Path(top, name).relative_to(path).as_posix() for name in names}
            files |= {Path(top, f).relative_to(path).as_posix(): Path(top, f) for f in found}
        yield _tree({name: _on_disk(file) for name, file in files.items()}, folders)
    elif path.is_file():
        try:
            archive = zipfile.ZipFile(path)
        except DAMAGED as error:
            raise InputError(
                f"{str(path)!r} is not a readable .zip ({first_line(error)}): give a folder or .zip"
            ) from error
        with archive:
            entries = archive.infolist()
            folders = {entry.filename.rstrip("/") for entry in entries if entry.is_dir()}
            files = {e.filename: _in_archive(archive, e, path) for e in entries if not e.is_dir()}
            yield _tree(files, folders)
    else:
        raise InputError(f"no folder or .zip {str(path)!r}: check the path after folder:")


def _holds(folder: str, other: str) -> bool:
    return os.path.commonpath([folder, other]) == folder


def _on_disk(path: Path) -> _File:
    def stamp() -> list[Any]:
        # Of two copies of a tree sizes and times may be equal, where pixels are not.
        found = path.stat()
        return [os.path.realpath(path), found.st_size, found.st_mtime_ns, found.st_ctime_ns]

    return _File(path.read_bytes, stamp)


def _in_archive(archive: zipfile.ZipFile, entry: zipfile.ZipInfo, path: Path) -> _File:
    return _File(
        functools.partial(_unpack, archive, entry, path), lambda: [entry.file_size, entry.CRC]
    )


def _unpack(archive: zipfile.ZipFile, entry: zipfile.ZipInfo, path: Path) -> bytes:
    if entry.file_size > LARGEST:
        raise InputError(
            f"image {path}/{entry.filename} unpacks to {entry.file_size / 1e6:.0f} MB, and at most "
            f"{LARGEST / 1e6:.0f} MB are read of one image: remove it, or save it smaller"
        )
    return archive.read(entry)


def _tree(files: Mapping[str, _File], folders: Iterable[str]) -> _Tree:
    """Without dot files and __MACOSX: thumbnails and resource forks that merely end in .jpg."""
    seen = {name: files[name] for name in sorted(files) if not _is_hidden(name)}
    parents = {str(parent) for name in seen for parent in PurePosixPath(name).parents}
    named = {name for name in {*folders, *parents} - {"."} if not _is_hidden(name)}
    return _Tree(seen, frozenset(named))


def _is_hidden(name: str) -> bool:
    return any(part.startswith((".", "__MACOSX")) for part in PurePosixPath(name).parts)


@functools.cache
def _suffixes() -> frozenset[str]:
    """Of the files that Pillow reads as pixels, in lower case."""
    from PIL import Image

    known = Image.registered_extensions()  # this loads all of Pillow's formats
    return frozenset(s for s, f in known.items() if f in Image.OPEN and f not in _NO_RASTER)


def _is_image(name: str) -> bool:
    return PurePosixPath(name).suffix.lower() in _suffixes()


def _corrupt(where: str, error: BaseException) -> CorruptImageError:
    return CorruptImageError(
        f"image {where} is corrupt ({first_line(error)}): replace or remove it, or write "
        "skip_corrupt first in the brackets after the data set's name"
    )


def _decode(read: Callable[[], bytes], where: str) -> np.ndarray:
    """Pixels [H, W, 1 or 3], uint8; of several frames the first, transparent ones on white."""
    from PIL import Image

    try:
        data = read()
    except OSError as error:  # of a disk or a network, which may be gone the next time
        raise InputError(
            f"image {where} cannot be read ({first_line(error)}): try again"
        ) from error
    except DAMAGED as error:  # of an archive
        raise _corrupt(where, error) from error
    if not data:
        raise CorruptImageError(f"image {where} is an empty file: copy it again, or remove it")
    try:
        with Image.open(io.BytesIO(data)) as image:
            if image.mode[0] in "IF":  # convert() would clip 16 and 32 bit pixels silently
                raise InputError(f"image {where} has {image.mode} pixels: save it with 8 bits")
            grey = image.mode in ("1", "L", "LA", "La")
            if image.has_transparency_data:
                seen = image.convert("RGBA")
                image = Image.alpha_composite(Image.new("RGBA", seen.size, "white"), seen)
            pixels = np.asarray(image.convert("L" if grey else "RGB"))
    except InputError:
        raise
    except (*DAMAGED, Image.DecompressionBombError, Image.DecompressionBombWarning) as error:
        raise _corrupt(where, error) from error
    return pixels[..., None] if grey else pixels


@contextlib.contextmanager
def open_folder(rest: str, data_dir: str | Path | None = None) -> Iterator[Listing]:
    """Train is `train`, or everything without split folders; test is `test`, else `val`.

    Images lie at [SPLIT/]CLASS/IMAGE, with splits train, test, and val, valid or validation; a
    folder around all of that is looked through. Classes are in the order of their names, in
    Unicode's composed form (NFC). Transparent pixels are shown on white. Files that Pillow does
    not read as pixels are left out, with one warning that counts them.
    """
    del data_dir
    path = Path(rest).expanduser()
    with _opened(path) as tree:
        splits = _layout(tree, path)
        held_out = "test" if "test" in splits else "val"
        classes = _classes(splits, held_out, path)
        _warn_of_the_rest(tree, path)
        parts = {
            split: _images(tree, path, classes, splits.get(folder, {}))
            for split, folder in (("train", "train"), ("test", held_out))
        }
        yield Listing(parts, classes)


def _images(
    tree: _Tree, path: Path, classes: tuple[str, ...], folders: Mapping[str, list[str]]
) -> Images:
    """A part, by the files of its classes."""
    number = {name: i for i, name in enumerate(classes)}
    labelled = [
        (file, number[_composed(name)]) for name, files in sorted(folders.items()) for file in files
    ]

    def where(i: int) -> str:
        return f"{path}/{labelled[i][0]}"

    def read(i: int) -> tuple[np.ndarray, int]:
        file, label = labelled[i]
        return _decode(tree.files[file].read, where(i)), label

    def stamp(i: int) -> list[Any]:
        file, label = labelled[i]
        return [file, label, tree.files[file].stamp()]

    labels = np.array([label for _, label in labelled], np.int32)
    return Images(len(labelled), read, lambda: labels, where, stamp)


_Layout = dict[str, dict[str, list[str]]]
"""The image files of every class of every split: none of a class folder that holds none."""


def _layout(tree: _Tree, path: Path) -> _Layout:
    """Where the images lie.

    Raises:
        InputError: no images, or some at another depth or in a split of another name.
    """
    images = {name: PurePosixPath(name).parts for name in tree.files if _is_image(name)}
    if not images:
        found = f"its first file is {next(iter(tree.files))}" if tree.files else "it has no files"
        raise InputError(f"no images below {str(path)!r} ({found}): expected {_EXPECTED}")
    around = _depth_of_wrapping(list(images.values()))
    splits = any(len(parts) > around + 2 for parts in images.values())
    found: _Layout = {}

    def place(parts: tuple[str, ...]) -> list[str] | None:
        """The files of the class whose folder has these parts, if it is one."""
        parts = parts[around:] if splits else ("train", *parts[around:])
        split = _SPLITS.get(parts[0].casefold()) if parts else None
        if len(parts) != 2 or split is None:
            return None
        return found.setdefault(split, {}).setdefault(parts[1], [])

    for folder in sorted(tree.folders):
        place(PurePosixPath(folder).parts)
    for name, parts in images.items():
        files = place(parts[:-1])
        if files is None:
            raise InputError(f"image {path}/{name} is not at {_EXPECTED}: move it into that layout")
        files.append(name)
    if not any(found.get("train", {}).values()):
        first = next(iter(images))
        raise InputError(f"no train images below {str(path)!r} (the first is {first}): add train/")
    return found


def _depth_of_wrapping(images: list[tuple[str, ...]]) -> int:
    """How many folders lie around the whole layout, as an archive of a folder has one."""
    depth = 0
    while True:
        tops = {parts[depth] for parts in images}
        shallow = min(map(len, images)) < depth + 3
        if len(tops) > 1 or shallow or tops.pop().casefold() in _SPLITS:
            return depth
        depth += 1


def _classes(splits: _Layout, held_out: str, path: Path) -> tuple[str, ...]:
    """The names of the classes, those of train.

    Raises:
        InputError: a class without images, one that only the test part has, or two whose names
            differ by case, spaces at their ends or Unicode's form alone.
    """
    for split in ("train", held_out):
        alike: dict[str, str] = {}
        for name, files in sorted(splits.get(split, {}).items()):
            if not files:
                raise InputError(
                    f"class folder {name!r} of the {split} part of {str(path)!r} has no images "
                    f"that can be read ({', '.join(sorted(_suffixes())[:3])}, ...): remove it, or "
                    "give it images"
                )
            other = alike.setdefault(_plain(name), name)
            if other != name:
                raise InputError(
                    f"class folders {other!r} and {name!r} of the {split} part of {str(path)!r} "
                    "differ by case, spaces or Unicode form alone: join or rename them"
                )
    classes = sorted(map(_composed, splits["train"]))
    for name in sorted(splits.get(held_out, {})):
        if _composed(name) not in classes:
            near = [c for c in classes if _plain(c) == _plain(name)]
            hint = f" (it has {near[0]!r})" if near else ""
            raise InputError(
                f"class {name!r} of the {held_out} part of {str(path)!r} is not in its train part"
                f"{hint}: give both the same class folders"
            )
    return tuple(classes)


def _composed(name: str) -> str:
    return unicodedata.normalize("NFC", name)


def _plain(name: str) -> str:
    return _composed(name).strip().casefold()


def _warn_of_the_rest(tree: _Tree, path: Path) -> None:
    suffixes = Counter(
        PurePosixPath(name).suffix.lower() or "no suffix"
        for name in tree.files
        if not _is_image(name)
    )
    if suffixes:
        each = ", ".join(f"{count} with {suffix}" for suffix, count in suffixes.most_common())
        warnings.warn(
            f"{path}: {suffixes.total()} files are no images that Pillow reads, and are left out: "
            f"{each}",
            stacklevel=5,
        )
