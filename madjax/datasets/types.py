"""`Dataset` and `Family`: what every opener returns, and the checks on it."""

from __future__ import annotations

import lzma
import struct
import warnings
import zipfile
import zlib
from dataclasses import dataclass, field
from functools import cached_property, reduce
from typing import Any

import numpy as np

from madjax.errors import InputError

# Pillow, zipfile and the decompressors share no base class for "these bytes are damaged".
DAMAGED = (
    OSError,
    EOFError,
    ValueError,
    SyntaxError,
    KeyError,
    NotImplementedError,
    RuntimeError,
    struct.error,
    zipfile.BadZipFile,
    zlib.error,
    lzma.LZMAError,
)


@dataclass(frozen=True)
class Family:
    """A preprocessing family: how uint8 pixels become a network's float32 input.

    Attributes:
        name: How rows and checkpoints call it.
        mean: One number a channel, on the scale where white is 1.
        std: As `mean`.
        crop: The side of the square that networks see of larger images, the middle; None: all.
    """

    name: str
    mean: tuple[float, ...]
    std: tuple[float, ...]
    crop: int | None = field(default=None, metadata={"described": "changed"})

    def inputs(self, images: Any) -> Any:
        """What a network takes of images [..., H, W, C]: their middle, preprocessed."""
        if self.crop is not None:
            top, left = (max(0, round((n - self.crop) / 2)) for n in images.shape[-3:-1])
            images = images[..., top : top + self.crop, left : left + self.crop, :]
        return self.preprocess(images)

    def preprocess(self, images: Any) -> Any:
        """Turns uint8 images [..., H, W, C] into float32 `(x / 255 - mean) / std`.

        A numpy array gives a numpy array; a JAX array or tracer gives the same kind back. Floats
        are taken as pixels in [0, 255] too: an attacker's synthetic images, before rounding.
        """
        if images.ndim < 3 or images.shape[-1] != len(self.mean):
            raise InputError(
                f"images of shape {tuple(images.shape)} do not fit family {self.name}, which wants "
                f"[..., H, W, {len(self.mean)}]: choose the family with family_for"
            )
        mean, std = self._along(images)
        return (images.astype(np.float32) / np.float32(255) - mean) / std

    def pixels(self, z: Any) -> Any:
        """The inverse of `preprocess`: float32 pixels [..., H, W, C], not rounded or clipped."""
        mean, std = self._along(z)
        return np.float32(255) * (z * std + mean)

    def _along(self, images: Any) -> tuple[np.ndarray, np.ndarray]:
        """Mean and std with as many axes as the images, all but the last of length 1."""
        shape = (1,) * (images.ndim - 1) + (-1,)
        return tuple(np.asarray(each, np.float32).reshape(shape) for each in (self.mean, self.std))


MNIST_FAMILY = Family("mnist", (0.1307,), (0.3081,))
CIFAR_FAMILY = Family("cifar", (0.4914, 0.4822, 0.4465), (0.2023, 0.1994, 0.2010))
IMAGENET_FAMILY = Family("imagenet", (0.485, 0.456, 0.406), (0.229, 0.224, 0.225), crop=224)


def family_for(image_shape: tuple[int, ...]) -> Family:
    """Chooses the preprocessing family by image shape [H, W, C].

    Grey images are `MNIST_FAMILY` (Fashion-MNIST and letters too, as in the authors' code);
    colour images up to 64 pixels a side are `CIFAR_FAMILY` (CIFAR, SVHN, Tiny-ImageNet); larger
    colour images are `IMAGENET_FAMILY`.
    """
    height, width, channels = image_shape
    if channels == 1:
        return MNIST_FAMILY
    if channels == 3:
        return CIFAR_FAMILY if max(height, width) <= 64 else IMAGENET_FAMILY
    raise InputError(
        f"images of shape {tuple(image_shape)} have {channels} channels: convert them to 1 or 3"
    )


@dataclass(frozen=True, eq=False)
class Dataset:
    """Images in memory, checked once when built. The test part may have length 0.

    Attributes:
        name: What the user typed, subset rule included.
        x_train: uint8 [N, H, W, C], N >= 1.
        y_train: int32 [N], each in [0, num_classes).
        x_test: uint8 [M, H, W, C], M >= 0.
        y_test: int32 [M].
        classes: Class names in label order.
        family: The preprocessing of these images; None chooses it by `family_for`.
    """

    name: str
    x_train: np.ndarray = field(repr=False)
    y_train: np.ndarray = field(repr=False)
    x_test: np.ndarray = field(repr=False)
    y_test: np.ndarray = field(repr=False)
    classes: tuple[str, ...] = field(repr=False)
    family: Family | None = None

    def __post_init__(self):
        for split in ("train", "test"):
            _check_split(self, split)
        if not len(self.x_train):
            raise InputError(f"data set {self.name!r} has no train images: give at least one")
        if self.x_test.shape[1:] != self.image_shape:
            raise InputError(
                f"data set {self.name!r} has {by(self.image_shape)} train images but "
                f"{by(self.x_test.shape[1:])} test images: make them one shape"
            )
        family = self.family or family_for(self.image_shape)
        if len(family.mean) != self.image_shape[-1]:
            raise InputError(
                f"family {family.name} does not fit the {by(self.image_shape)} images of data set "
                f"{self.name!r}: choose it with family_for"
            )
        object.__setattr__(self, "family", family)

    def checksum(self) -> int:
        """A number that changes with the images and labels, for telling data of one name apart."""
        return self._checksum

    @cached_property
    def _checksum(self) -> int:
        parts = (self.x_train, self.y_train, self.x_test, self.y_test)
        return reduce(lambda crc, part: zlib.crc32(np.ascontiguousarray(part), crc), parts, 0)

    @property
    def num_classes(self) -> int:
        """K, the number of class names (a subset keeps all of them)."""
        return len(self.classes)

    @property
    def image_shape(self) -> tuple[int, int, int]:
        """Shape of one image, [H, W, C]."""
        return self.x_train.shape[1:]


def check_compatible(victim: Dataset, query: Dataset) -> None:
    """Raises `InputError` unless `query` images can be fed to a victim trained on `victim`."""
    if victim.image_shape != query.image_shape:
        raise InputError(
            f"query set {query.name!r} has {by(query.image_shape)} images but victim data "
            f"{victim.name!r} has {by(victim.image_shape)}: choose sets of one shape"
        )


def _check_split(dataset: Dataset, split: str) -> None:
    x, y = getattr(dataset, f"x_{split}"), getattr(dataset, f"y_{split}")
    where = f"of data set {dataset.name!r}"
    if x.ndim == 4 and x.shape[1] in (1, 3) and x.shape[3] not in (1, 3):
        raise InputError(
            f"x_{split} {where} has shape {list(x.shape)}, channels first: give [N, H, W, C], "
            f"which is x_{split}.transpose(0, 2, 3, 1)"
        )
    if x.dtype != np.uint8 or x.ndim != 4:
        raise InputError(
            f"x_{split} {where} is {x.dtype} {list(x.shape)}: give raw pixels, uint8 [N, H, W, C]"
        )
    if y.dtype != np.int32 or y.ndim != 1:
        raise InputError(f"y_{split} {where} is {y.dtype} {list(y.shape)}: give labels, int32 [N]")
    if len(x) != len(y):
        raise InputError(
            f"{split} part {where} has {len(x)} images but {len(y)} labels: give one label each"
        )
    if len(y) and (y.min() < 0 or y.max() >= len(dataset.classes)):
        raise InputError(
            f"y_{split} {where} spans {y.min()}..{y.max()} but there are {len(dataset.classes)} "
            "classes: number the labels from 0"
        )


def build(
    name: str, train: tuple, test: tuple | None = None, classes: tuple[str, ...] | None = None
) -> Dataset:
    """A `Dataset` from what files hold: any integer labels, grey images without channel axis."""
    test = test or (train[0][:0], train[1][:0])
    xs = [x[..., None] if x.ndim == 3 else x for x in (train[0], test[0])]
    ys = [_as_int32(y, name) for y in (train[1], test[1])]
    if classes is None:
        top = max((int(y.max()) for y in ys if y.dtype.kind in "iu" and y.size), default=0)
        classes = tuple(map(str, range(top + 1)))
    return Dataset(name, xs[0], ys[0], xs[1], ys[1], classes)


def warn_of_gaps(data: Dataset, labels: np.ndarray) -> None:
    """Warn of classes that have none of these labels: they may be numbered from 1."""
    missing = sorted(set(range(data.num_classes)) - set(labels.tolist()))
    if missing:
        some = ", ".join(map(str, missing[:5])) + ", ..." * (len(missing) > 5)
        warnings.warn(
            f"data set {data.name!r} has no train image of {len(missing)} of its "
            f"{data.num_classes} classes (labels {some}): number labels from 0 without gaps, or "
            "leave those classes out",
            stacklevel=3,
        )


def _as_int32(labels: np.ndarray, name: str) -> np.ndarray:
    """Whole labels as int32, looked at before they are cast, which would wrap them around."""
    if labels.dtype.kind not in "iu":
        return labels
    if labels.size and not 0 <= int(labels.min()) <= int(labels.max()) < 2**31:
        raise InputError(
            f"labels of data set {name!r} run from {labels.min()} to {labels.max()}: number the "
            "classes from 0"
        )
    return labels.astype(np.int32)


def by(shape: tuple[int, ...]) -> str:
    """A shape as people write it, 28x28x1."""
    return "x".join(map(str, shape))


def first_line(error: BaseException) -> str:
    """What an `InputError` quotes of another error: its message may be pages long."""
    lines = str(error).strip().splitlines()
    return lines[0] if lines else type(error).__name__
