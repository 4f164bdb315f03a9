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

``NAME@32`` has square images of side 32: each is scaled so that its shorter side is that, and cut
in the middle. (After a folder that itself ends in @ and a number, write /.) Rules in brackets say
which images are taken:

==========================  =======================================================================
``[:5000]``                 the first 5,000 TRAIN images, and all test images: a numpy slice
``[:5000,:1000]``           slices of both parts
``[random:50000]``          50,000 train images drawn at random, the same ones every time
``[heldout:25]``            25 images of each class, drawn from train, are the test part
``[heldout:25,:5000]``      of what is left for train the first 5,000
``[skip_corrupt,:5000]``    of the first 5,000 those that can be decoded, with a warning that counts
                            the others; written before other rules
==========================  =======================================================================

Images that no rule takes are not decoded. Those that are taken stay uint8 until
`Family.inputs`, which runs inside jit: a data set costs one byte a pixel on the host and on the
way to the device. Nothing here augments.
"""

from __future__ import annotations

import os
import re
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path

from madjax.datasets.folder import open_folder
from madjax.datasets.listing import CorruptImageError, Listing, decode
from madjax.datasets.names import base_name, choose, parse
from madjax.datasets.npz import EMBEDDED, open_embedded, open_npz, open_sheets, sheet_parts
from madjax.datasets.tfds import open_tfds
from madjax.datasets.types import (
    CIFAR_FAMILY,
    IMAGENET_FAMILY,
    MNIST_FAMILY,
    Dataset,
    Family,
    build,
    check_compatible,
    family_for,
    warn_of_gaps,
)
from madjax.errors import InputError

__all__ = [
    "CIFAR_FAMILY",
    "IMAGENET_FAMILY",
    "MNIST_FAMILY",
    "CorruptImageError",
    "Dataset",
    "Family",
    "base_name",
    "check_compatible",
    "family_for",
    "list_names",
    "open_dataset",
]


def open_dataset(
    name: str,
    data_dir: str | Path | None = None,
    *,
    folder: str | Path | None = None,
) -> Dataset:
    """Opens a data set by name; the module's docstring lists the kinds of name.

    Args:
        name: For instance ``embedded:mnist``, ``cifar10[:5000]``, ``tfds:mnist``.
        data_dir: Where bare names are looked up before ``$MADJAX_DATA``; for ``tfds:`` names the
            TFDS directory, by default TFDS's own (``$TFDS_DATA_DIR`` or ~/tensorflow_datasets).
        folder: Where decoded images of ``folder:`` and ``tfds:`` sets are kept for the next time,
            in files that are mapped into memory. Without it they are in memory.

    Returns:
        The data set, its `name` as typed.

    Raises:
        InputError: If it cannot be found or read, an image is corrupt, or a rule of the name is
            malformed or leaves nothing. The message is one line that says what to do.
    """
    parsed = parse(name)
    if parsed.scheme and parsed.scheme not in _SCHEMES:
        raise InputError(
            f"unknown scheme {parsed.scheme!r} in data set {name!r}: use one of "
            f"{', '.join(s + ':' for s in _SCHEMES)} or a bare name"
        )
    opener = _SCHEMES[parsed.scheme] if parsed.scheme else _open_bare
    with opener(parsed.source, data_dir) as listing:
        whole, (listing, chosen) = listing.parts["train"], choose(name, parsed, listing)
        parts = decode(
            listing, chosen, name, parsed.side, parsed.skip_corrupt, folder and Path(folder)
        )
        known = whole.labels() if whole.pixels is not None else parts["train"][1]
        classes = listing.classes or _numbered(listing)
    data = build(name, parts["train"], parts.get("test"), classes)
    if whole.pixels is not None or not parsed.rules:
        warn_of_gaps(data, known)
    return data


def _numbered(listing: Listing) -> tuple[str, ...]:
    """The classes of a set that has no names for them, as many as its labels have in all parts."""
    top = max(int(part.labels().max(initial=0)) for part in listing.parts.values())
    return tuple(map(str, range(top + 1)))


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


def _roots(data_dir: str | Path | None) -> list[Path]:
    given = (data_dir, os.environ.get("MADJAX_DATA"))
    return [Path(root).expanduser() for root in given if root]


_Opened = AbstractContextManager[Listing]
_Opener = Callable[[str, str | Path | None], _Opened]


def _in_memory(opener: Callable[[str, str | Path | None], Dataset]) -> _Opener:
    """The opener of a listing, from that of a data set that is in memory as soon as it is open."""
    return lambda source, data_dir: nullcontext(Listing.of(opener(source, data_dir)))


def _open_bare(name: str, data_dir: str | Path | None) -> _Opened:
    if not re.fullmatch(r"\w[\w.-]*", name):
        raise InputError(
            f"data set name {name!r} is not a plain name: for a path write npz:PATH or folder:PATH"
        )
    for root in _roots(data_dir):
        for path in (root / f"{name}.npz", root / name):
            if path.suffix == ".npz" and path.is_file():
                return nullcontext(Listing.of(open_npz(str(path))))
        if parts := sheet_parts(root, name):
            return nullcontext(Listing.of(open_sheets(root, name, parts)))
        for path in (root / f"{name}.zip", root / name):
            if path.exists():
                return open_folder(str(path))
    searched = ", ".join(map(str, _roots(data_dir))) or "nowhere (no data_dir, $MADJAX_DATA unset)"
    raise InputError(
        f"no data set {name!r} in {searched}: use one of {', '.join(list_names(data_dir))}, or set "
        "data_dir or $MADJAX_DATA"
    )


_SCHEMES: dict[str, _Opener] = {
    "embedded": _in_memory(open_embedded),
    "tfds": open_tfds,
    "npz": _in_memory(open_npz),
    "folder": open_folder,
}
