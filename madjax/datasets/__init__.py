"""Image data sets: one function, `open_dataset`, and one type, `Dataset`.

What a name may be:

===================================  ==============================================================
``embedded:mnist``                   the small sets inside the package (`madjax/data/LICENSES.md`)
``tfds:NAME[/CONFIG][:VERSION]``     a TensorFlow Datasets set, already prepared as array_record
``npz:PATH``                         one .npz file of ``x_train y_train [x_test y_test] [classes]``
``folder:PATH``                      a folder or .zip of ``[train|test|val/]CLASS/IMAGE``
``NAME``                             under ``data_dir``, then under ``$MADJAX_DATA``: ``NAME.npz``,
                                     ``NAME_train_*.npz`` sheets, ``NAME.zip``, a folder ``NAME``
===================================  ==============================================================

Any of them may end in a subset rule, a numpy slice: ``mnist[:5000]`` keeps the first 5,000 TRAIN
images and all test images; ``mnist[:5000,:1000]`` cuts both.

Images stay uint8 until `Family.preprocess`, which runs inside jit: a data set costs one byte a
pixel on the host and on the way to the device. Nothing here resizes or augments.
"""

from __future__ import annotations

import os
import re
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

from madjax.datasets.folder import open_folder
from madjax.datasets.npz import EMBEDDED, open_embedded, open_npz, open_sheets, sheet_parts
from madjax.datasets.tfds import open_tfds
from madjax.datasets.types import (
    CIFAR_FAMILY,
    IMAGENET_FAMILY,
    MNIST_FAMILY,
    Dataset,
    Family,
    check_compatible,
    family_for,
)
from madjax.errors import InputError

__all__ = [
    "CIFAR_FAMILY",
    "IMAGENET_FAMILY",
    "MNIST_FAMILY",
    "Dataset",
    "Family",
    "base_name",
    "check_compatible",
    "family_for",
    "list_names",
    "open_dataset",
]

_RULE_HELP = (
    "write [start:stop] for train, or [start:stop,start:stop] for train and test; after a path "
    "that itself ends in ], write [:]"
)


def open_dataset(name: str, data_dir: str | Path | None = None) -> Dataset:
    """Opens a data set by name; the module's docstring lists the kinds of name.

    Args:
        name: For instance ``embedded:mnist``, ``cifar10[:5000]``, ``tfds:mnist``.
        data_dir: Where bare names are looked up before ``$MADJAX_DATA``; for ``tfds:`` names the
            TFDS directory, by default TFDS's own (``$TFDS_DATA_DIR`` or ~/tensorflow_datasets).

    Returns:
        The data set, its `name` as typed.

    Raises:
        InputError: If it cannot be found or read, or the subset rule is malformed or leaves
            nothing. The message is one line that says what to do.
    """
    base, rules = _parse_rules(name)
    scheme, colon, rest = base.partition(":")
    if colon and scheme not in _SCHEMES:
        raise InputError(
            f"unknown scheme {scheme!r} in data set {name!r}: use one of "
            f"{', '.join(s + ':' for s in _SCHEMES)} or a bare name"
        )
    dataset = _SCHEMES[scheme](rest, data_dir) if colon else _open_bare(base, data_dir)
    return _subset(replace(dataset, name=name), rules)


def list_names(data_dir: str | Path | None = None) -> tuple[str, ...]:
    """Names that `open_dataset` knows without a path, embedded ones first."""
    names = set()
    for root in filter(Path.is_dir, _roots(data_dir)):
        for path in root.iterdir():
            if path.is_dir() and (path / "train").is_dir():
                names.add(path.name)
            elif path.suffix in (".npz", ".zip"):
                names.add(re.sub(r"_(train_\d+|test)$", "", path.stem))
    embedded = sorted(f"embedded:{path.stem}" for path in EMBEDDED.glob("*.npz"))
    return (*embedded, *sorted(names))


def base_name(name: str) -> str:
    """What a data set is called in results: no scheme, path, or subset rule.

    "embedded:mnist[:5000]" and "npz:data/mnist.npz" are both "mnist", "tfds:emnist/letters:3.1.0"
    is "emnist_letters".
    """
    base = _parse_rules(name)[0]
    scheme, _, source = base.partition(":")
    if scheme == "tfds":
        return source.partition(":")[0].replace("/", "_")
    source = source or base
    return Path(source).name.removesuffix(".npz").removesuffix(".zip")


def _parse_rules(name: str) -> tuple[str, tuple[slice, ...]]:
    if not name.endswith("]"):
        return name, ()
    base, bracket, text = name[:-1].rpartition("[")
    rules = text.split(",")
    if not bracket or not base or len(rules) > 2:
        raise InputError(f"malformed subset rule in data set {name!r}: {_RULE_HELP}")
    return base, tuple(_parse_slice(rule, name) for rule in rules)


def _parse_slice(rule: str, name: str) -> slice:
    bounds = [bound.strip() for bound in rule.split(":")]
    if len(bounds) not in (2, 3) or not all(re.fullmatch(r"(-?[0-9]+)?", b) for b in bounds):
        raise InputError(f"malformed subset rule {rule!r} in data set {name!r}: {_RULE_HELP}")
    numbers = [int(bound) if bound else None for bound in bounds]
    if numbers[2:] == [0]:
        raise InputError(f"subset rule {rule!r} in data set {name!r} has step 0: use 1 or more")
    return slice(*numbers)


def _subset(dataset: Dataset, rules: tuple[slice, ...]) -> Dataset:
    # Copies, not views: a view would keep the whole set in memory.
    cut = {}
    for split, rule in zip(("train", "test"), rules, strict=False):
        x, y = getattr(dataset, f"x_{split}"), getattr(dataset, f"y_{split}")
        if not len(y[rule]):
            raise InputError(
                f"subset rule of data set {dataset.name!r} leaves none of the {len(y)} {split} "
                "images: widen it"
            )
        cut |= {f"x_{split}": x[rule].copy(), f"y_{split}": y[rule].copy()}
    return replace(dataset, **cut)


def _roots(data_dir: str | Path | None) -> list[Path]:
    given = (data_dir, os.environ.get("MADJAX_DATA"))
    return [Path(root).expanduser() for root in given if root]


def _open_bare(name: str, data_dir: str | Path | None) -> Dataset:
    if not re.fullmatch(r"\w[\w.-]*", name):
        raise InputError(
            f"data set name {name!r} is not a plain name: for a path write npz:PATH or folder:PATH"
        )
    for root in _roots(data_dir):
        for path in (root / f"{name}.npz", root / name):
            if path.suffix == ".npz" and path.is_file():
                return open_npz(str(path))
        if parts := sheet_parts(root, name):
            return open_sheets(root, name, parts)
        for path in (root / f"{name}.zip", root / name):
            if path.exists():
                return open_folder(str(path))
    searched = ", ".join(map(str, _roots(data_dir))) or "nowhere (no data_dir, $MADJAX_DATA unset)"
    raise InputError(
        f"no data set {name!r} in {searched}: use one of {', '.join(list_names(data_dir))}, or set "
        "data_dir or $MADJAX_DATA"
    )


_SCHEMES: dict[str, Callable[[str, str | Path | None], Dataset]] = {
    "embedded": open_embedded,
    "tfds": open_tfds,
    "npz": open_npz,
    "folder": open_folder,
}
