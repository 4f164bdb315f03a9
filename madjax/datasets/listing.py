"""Data sets of which the images are chosen before any is decoded.

ImageNet has 1.3 million images of many sizes; an attacker asks for 50,000 of them, all of one size.
What an opener gives is a `Listing`. `decode` reads the images that are wanted, several at a time
and once: where a folder is given they stay there, in a file that is mapped into memory.
"""

from __future__ import annotations

import functools
import hashlib
import json
import os
import shutil
import warnings
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from filelock import FileLock, Timeout
from tqdm import tqdm

from madjax.datasets.types import Dataset, by, first_line
from madjax.errors import InputError

VERSION = 1
"""Of `decode`: to be raised when it makes other pixels of the same files."""
KIND = "images"
FACTS, PIXELS, LABELS = "facts.json", "pixels.npy", "labels.npy"
_BLOCK = 256
"""Images that are read before the first of them is put away."""


class CorruptImageError(InputError):
    """An image that cannot be decoded."""


@dataclass(frozen=True)
class Images:
    """The train or the test part of a data set.

    Attributes:
        size: How many there are.
        read: Pixels uint8 [h, w, 1 or 3] and label of image i.
        labels: Those of all, integers [size].
        where: What messages call image i.
        stamp: What changes with the file of image i.
        pixels: uint8 [size, h, w, c], where they are in memory anyway; else None.
    """

    size: int
    read: Callable[[int], tuple[np.ndarray, int]]
    labels: Callable[[], np.ndarray]
    where: Callable[[int], str]
    stamp: Callable[[int], Any]
    pixels: np.ndarray | None = None


class Listing(NamedTuple):
    """A data set before it is decoded: its "train" part, and its "test" part if it has one."""

    parts: Mapping[str, Images]
    classes: tuple[str, ...] | None
    """Names in label order; None: the labels themselves."""

    @classmethod
    def of(cls, data: Dataset) -> Listing:
        """That of a data set in memory."""

        def part(x: np.ndarray, y: np.ndarray) -> Images:
            def read(i: int) -> tuple[np.ndarray, int]:
                return x[i], y[i]

            return Images(len(y), read, lambda: y, "number {}".format, lambda i: i, x)

        parts = {"train": part(data.x_train, data.y_train), "test": part(data.x_test, data.y_test)}
        return cls(parts, data.classes)


def decode(
    listing: Listing,
    chosen: Mapping[str, np.ndarray],
    title: str,
    side: int | None = None,
    skip_corrupt: bool = False,
    folder: Path | None = None,
) -> dict[str, tuple[np.ndarray, np.ndarray]]:
    """Pixels uint8 [n, H, W, C] and labels [n] of the chosen images of each part, in their order.

    chosen: positions; of parts that it lacks, all. title: what messages call the data set. side:
    every image is scaled so that its shorter side is this, and cut to a square in its middle;
    without it images stay as they are, and have to be of one size. skip_corrupt: leave out images
    that cannot be decoded, with a warning that counts them. folder: where images that are not in
    memory anyway are kept for the next time.

    Raises:
        InputError: an image that cannot be read, or is of another size than most.
    """
    parts = listing.parts
    in_memory = all(part.pixels is not None for part in parts.values())
    if side is None and in_memory:
        whole = {split: (part.pixels, part.labels()) for split, part in parts.items()}
        return {
            split: tuple(each[chosen[split]] if split in chosen else each for each in both)
            for split, both in whole.items()
        }
    places = [
        (split, int(i))
        for split, part in parts.items()
        for i in chosen.get(split, range(part.size))
    ]
    reading = functools.partial(_read, parts, places, title, side, skip_corrupt)
    if folder is None or in_memory:
        found = reading(np.empty)
    else:
        stamps = [[split, parts[split].stamp(i)] for split, i in places]
        found = _kept(folder, title, [stamps, side, skip_corrupt], reading)
    if found.lost:
        warnings.warn(
            f"data set {title!r}: {len(found.lost)} images are corrupt, and are left out; the "
            f"first is {found.lost[0]}",
            stacklevel=3,
        )
    counts = Counter(found.splits)
    cuts = np.cumsum([0, *(counts[split] for split in parts)])
    return {
        split: (found.pixels[a:b], found.labels[a:b])
        for split, a, b in zip(parts, cuts, cuts[1:], strict=False)
    }


class _Found(NamedTuple):
    """What was read."""

    pixels: np.ndarray
    """With rows to spare where images were lost."""
    labels: np.ndarray
    splits: list[str]
    """Of each image."""
    lost: list[str]
    """What messages call the corrupt ones."""


def _read(
    parts: Mapping[str, Images],
    places: list[tuple[str, int]],
    title: str,
    side: int | None,
    skip_corrupt: bool,
    empty: Callable[..., np.ndarray],
) -> _Found:
    """Read images into one array, empty(shape, type), of colour if any of them is."""

    def one(place: tuple[str, int]) -> tuple[np.ndarray, int] | None:
        split, i = place
        try:
            image, label = parts[split].read(i)
        except CorruptImageError:
            if skip_corrupt:
                return None
            raise
        image = image[..., None] if image.ndim == 2 else image
        if image.dtype != np.uint8 or image.ndim != 3 or image.shape[2] not in (1, 3):
            raise InputError(
                f"image {parts[split].where(i)} of data set {title!r} is {image.dtype} "
                f"{list(image.shape)}: give raw pixels, uint8 [H, W, 1 or 3]"
            )
        return (image if side is None else squared(image, side)), label

    pixels, labels, splits, lost = None, [], [], []
    bar = tqdm(total=len(places), unit="image", desc=title, disable=None, delay=2)
    with bar, _no_bombs(), ThreadPoolExecutor(os.cpu_count()) as pool:
        for at in range(0, len(places), _BLOCK):
            block = places[at : at + _BLOCK]
            for (split, i), found in zip(block, pool.map(one, block), strict=True):
                bar.update()
                if found is None:
                    lost.append(parts[split].where(i))
                    continue
                image, label = found
                if pixels is None:
                    pixels = empty((len(places), *image.shape), np.uint8)
                if image.shape[:2] != pixels.shape[1:3]:
                    raise _odd_one(parts, places)
                if image.shape[2] > pixels.shape[3]:
                    wider = empty((*pixels.shape[:3], image.shape[2]), np.uint8)
                    wider[: len(splits)] = pixels[: len(splits)]
                    pixels = wider
                pixels[len(splits)] = image
                labels.append(label)
                splits.append(split)
    if pixels is None:
        raise InputError(f"data set {title!r} has no image that can be decoded: give another")
    return _Found(pixels, np.asarray(labels), splits, lost)


_LONGEST = 8
"""Times its shorter side: of longer images the middle alone is scaled."""


def squared(image: np.ndarray, side: int) -> np.ndarray:
    """An image [h, w, c] scaled so that its shorter side is `side`, and its middle square.

    Bilinear, as torchvision's Resize and CenterCrop do it for Pillow's images.
    """
    from PIL import Image

    h, w = image.shape[:2]
    if (h, w) == (side, side):
        return image
    longest = _LONGEST * min(h, w) + (max(h, w) - min(h, w) * _LONGEST) % 2  # of the same middle
    if max(h, w) > longest:  # what is far from it would fill the memory, scaled
        top, left = (max(0, n - longest) // 2 for n in (h, w))
        return squared(image[top : top + longest, left : left + longest], side)
    size = (side, side * h // w) if w <= h else (side * w // h, side)
    picture = Image.fromarray(image[..., 0] if image.shape[2] == 1 else image)
    scaled = np.asarray(picture.resize(size, Image.Resampling.BILINEAR))
    top, left = (round((n - side) / 2) for n in scaled.shape[:2])
    return scaled[top : top + side, left : left + side].reshape(side, side, -1)


@contextmanager
def _no_bombs() -> Iterator[None]:
    """Pillow's warning of an image that would fill the memory is an error, in every thread."""
    from PIL import Image

    with warnings.catch_warnings():
        warnings.simplefilter("error", Image.DecompressionBombWarning)
        yield


_LOOKED_AT = 1000
"""Images whose sizes say which is the usual one."""


def _odd_one(parts: Mapping[str, Images], places: list[tuple[str, int]]) -> InputError:
    """The error that names the first image of another size than most."""
    sizes = {}
    for split, i in places:
        with suppress(CorruptImageError):
            sizes[split, i] = parts[split].read(i)[0].shape[:2]
        if len(sizes) >= _LOOKED_AT and len(set(sizes.values())) > 1:
            break
    most = Counter(sizes.values()).most_common(1)[0][0]
    split, i = next(place for place, size in sizes.items() if size != most)
    return InputError(
        f"image {parts[split].where(i)} is {by(sizes[split, i])} but most are {by(most)} (height x "
        f"width): write @{min(most)} after the data set's name to make all of one size"
    )


def _kept(folder: Path, title: str, inputs: list[Any], reading: Callable[..., _Found]) -> _Found:
    """What is read of these inputs, from the folder, or read now and kept there.

    Where that cannot be, a warning says so, and all is in memory.
    """
    from PIL import __version__

    text = json.dumps([VERSION, __version__, *inputs])
    entry = folder / f"{KIND}-{hashlib.sha256(text.encode()).hexdigest()[:24]}"
    held = _load(entry)
    if held is not None:
        return held
    try:
        (folder / "locks").mkdir(parents=True, exist_ok=True)
        with lock_of(entry):
            held = _load(entry)  # as another command may have made it meanwhile
            if held is None:
                _write(entry, title, reading)
                held = _load(entry)
    except OSError as error:  # of writing: readers have errors of their own
        warnings.warn(
            f"the images of {title} are not kept in {folder}: {error.strerror or error}",
            stacklevel=4,
        )
    return reading(np.empty) if held is None else held


@contextmanager
def lock_of(entry: Path, *, wait: bool = True) -> Iterator[None]:
    """Hold an entry while it is made or removed; Timeout where another does, and wait is False."""
    lock = FileLock(entry.parent / "locks" / f"{entry.name}.lock")
    try:
        lock.acquire(timeout=0)
    except Timeout:
        if not wait:
            raise
        tqdm.write(f"{entry}: another command decodes these images, waiting")
        lock.acquire()
    try:
        yield
    finally:
        lock.release()


def _write(entry: Path, title: str, reading: Callable[..., _Found]) -> None:
    """Make an entry: whole, or not at all."""
    draft = entry.with_name(f".{entry.name}.part")
    shutil.rmtree(draft, ignore_errors=True)
    draft.mkdir()
    try:

        def empty(shape: tuple[int, ...], dtype: Any) -> np.ndarray:
            path = draft / PIXELS
            path.unlink(missing_ok=True)  # that of grey images, which is still mapped
            found = np.lib.format.open_memmap(path, "w+", dtype, shape)
            if hasattr(os, "posix_fallocate"):
                # Without it a full disk would kill the process, as pages are written, not fail.
                with path.open("r+b") as file:
                    os.posix_fallocate(file.fileno(), 0, path.stat().st_size)
            return found

        found = reading(empty)
        found.pixels.flush()
        np.save(draft / LABELS, found.labels)
        facts = {"what": title, "made": f"{datetime.now(UTC):%F %T}"}
        facts |= {"splits": Counter(found.splits), "lost": found.lost}
        (draft / FACTS).write_text(json.dumps(facts))
        for name in (LABELS, FACTS):
            with (draft / name).open("rb") as file:
                os.fsync(file.fileno())
        draft.rename(entry)
    finally:
        shutil.rmtree(draft, ignore_errors=True)


def _load(entry: Path) -> _Found | None:
    """What an entry holds; None where there is none.

    One that is damaged is named in a warning and removed, and None.
    """
    if not entry.is_dir():
        return None
    try:
        facts = json.loads((entry / FACTS).read_text())
        pixels, labels = np.load(entry / PIXELS, mmap_mode="r"), np.load(entry / LABELS)
        splits = [split for split, count in facts["splits"].items() for _ in range(count)]
        if len(labels) != len(splits) or len(pixels) < len(labels):
            raise ValueError("it holds other labels than images")
        found = _Found(pixels, labels, splits, facts["lost"])
    except Exception as error:  # of many kinds, by what is damaged
        if not isinstance(error, OSError):  # of which the files may know nothing
            shutil.rmtree(entry, ignore_errors=True)
        warnings.warn(
            f"cache entry {entry} is damaged ({first_line(error)}): it is made anew", stacklevel=5
        )
        return None
    with suppress(OSError):  # of another user, perhaps
        os.utime(entry)
    return found
