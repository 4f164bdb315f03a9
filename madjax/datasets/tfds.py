"""Data sets that TensorFlow Datasets has prepared, read without TensorFlow."""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

from madjax.datasets.listing import CorruptImageError, Images, Listing
from madjax.datasets.types import DAMAGED, first_line
from madjax.errors import InputError

_TRANSPOSED = {"emnist"}
"""Sets that TFDS gives with rows and columns exchanged, as its catalogue says."""
_DAMAGED = (*DAMAGED, AttributeError)
"""The last is of OpenCV, by which TFDS decodes where it is installed, and which gives None."""


def _prepare_command(name: str, data_dir: str | Path | None) -> str:
    # Not `tfds build`: in TFDS 4.9.10 that command line also needs apache-beam installed.
    where = f" data_dir={str(data_dir)!r}," if data_dir else ""
    return (
        'pip install tensorflow && python -c "import tensorflow_datasets as tfds; '
        f"tfds.builder({name!r},{where} file_format='array_record').download_and_prepare()\""
    )


@contextlib.contextmanager
def _quiet_absl() -> Iterator[None]:
    """Keeps TFDS from advising OpenCV: these images are small and read once."""
    logger = logging.getLogger("absl")
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        yield
    finally:
        logger.setLevel(level)


@contextlib.contextmanager
def open_tfds(rest: str, data_dir: str | Path | None) -> Iterator[Listing]:
    """Opens `tfds:NAME`; the test part is `test`, else `validation`, else empty."""
    import tensorflow_datasets as tfds

    command = _prepare_command(rest, data_dir)
    data_dir = None if data_dir is None else str(Path(data_dir).expanduser())
    with _quiet_absl():
        try:
            builder = tfds.builder(rest, data_dir=data_dir, file_format="array_record")
        except tfds.core.DatasetNotFoundError as error:
            raise InputError(
                f"TFDS knows no data set {rest!r} and none is prepared under "
                f"{data_dir or 'its default directory'}: see tfds.list_builders()"
            ) from error
        except (ValueError, AssertionError, RuntimeError, ImportError) as error:
            raise InputError(_cannot_open(rest, data_dir, error)) from error
        try:
            source = builder.as_data_source(split="train")
        except KeyError as error:
            raise InputError(
                f"TFDS data set {rest!r} is not prepared under {builder.data_dir}: {command}"
            ) from error
        except (ValueError, NotImplementedError) as error:
            raise InputError(
                f"TFDS data set {rest!r} has no train split to read ({first_line(error)}): "
                "choose another"
            ) from error
        keys = _tfds_keys(source, rest)
        splits = {"train": "train", "test": _held_out(builder, keys[1])}
        parts = {
            part: _images(builder, split, rest, keys)
            for part, split in splits.items()
            if split is not None
        }
        names = getattr(source.dataset_info.features[keys[1]], "names", None)
        yield Listing(parts, tuple(names) if names else None)


def _cannot_open(name: str, data_dir: str | None, error: BaseException) -> str:
    import tensorflow_datasets as tfds

    with contextlib.suppress(ValueError, AssertionError, RuntimeError, ImportError):
        found = tfds.builder(name, data_dir=data_dir).info.file_format
        return (
            f"TFDS data set {name!r} is prepared as {found.value}, which only TensorFlow reads: "
            f"prepare it in another directory: {_prepare_command(name, 'NEW_DIR')}"
        )
    return f"TFDS cannot open {name!r} ({first_line(error)}): check name, config and version"


def _held_out(builder: Any, label_key: str) -> str | None:
    """The split to test on: not one without classes, as ImageNet's `test`, whose labels are -1."""
    for split in ("test", "validation"):
        try:
            examples = builder.as_data_source(split=split)
        except ValueError:  # what TFDS raises for a split that a set lacks
            continue
        label = 0
        with contextlib.suppress(*_DAMAGED):
            label = examples[0][label_key] if len(examples) else 0
        if label != -1:
            return split
    return None


def _tfds_keys(source: Any, name: str) -> tuple[str, str]:
    """The names of image and label."""
    info = source.dataset_info
    keys = info.supervised_keys or ("image", "label")
    if len(keys) != 2 or not all(isinstance(k, str) and k in info.features for k in keys):
        raise InputError(
            f"TFDS data set {name!r} is not an image classification set (features "
            f"{', '.join(info.features)}): choose one with an image and a label"
        )
    return tuple(keys)


def _images(builder: Any, split: str, name: str, keys: tuple[str, str]) -> Images:
    """A split, by its data source."""
    import tensorflow_datasets as tfds

    source, (image_key, label_key) = builder.as_data_source(split=split), keys
    size, where = len(source), f"{{}} of {split} of {builder.info.full_name}"
    if not size:
        raise InputError(f"a split of TFDS data set {name!r} is empty: prepare it again")

    def read(i: int) -> tuple[np.ndarray, int]:
        try:
            example = source[i]
        except _DAMAGED as error:
            raise CorruptImageError(
                f"image {where.format(i)} is corrupt ({first_line(error)}): prepare the set again, "
                "or write skip_corrupt first in the brackets after its name"
            ) from error
        image = np.asarray(example[image_key])
        return image.swapaxes(0, 1) if builder.name in _TRANSPOSED else image, example[label_key]

    def labels() -> np.ndarray:
        raw = builder.as_data_source(split=split, decoders={image_key: tfds.decode.SkipDecoding()})
        return np.asarray([raw[i][label_key] for i in range(size)])

    def stamp(i: int) -> list[Any]:
        return [split, str(builder.data_dir), size, i]

    return Images(size, read, labels, where.format, stamp)
