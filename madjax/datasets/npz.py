"""Data sets in .npz files: plain arrays, or sheets of lossless WebP pictures."""

from __future__ import annotations

import io
import re
from collections.abc import Mapping
from itertools import pairwise
from pathlib import Path

import numpy as np

from madjax.datasets.types import DAMAGED, Dataset, build, first_line
from madjax.errors import InputError

EMBEDDED = Path(__file__).parents[1] / "data"
_SHEET_COLUMNS = 64


def _load_npz(path: Path) -> dict[str, np.ndarray]:
    if not path.is_file():
        raise InputError(f"no file {str(path)!r}: check the path after npz:")
    try:
        # np.load(path) leaves the file open when its content is damaged.
        with path.open("rb") as file, np.load(file) as arrays:
            return {key: arrays[key] for key in arrays.files}
    except (*DAMAGED, TypeError) as error:  # TypeError: a plain .npy array is no context manager
        raise InputError(
            f"{str(path)!r} cannot be read as .npz ({first_line(error)}): write it with "
            "np.savez(PATH, x_train=..., y_train=...)"
        ) from error


def _keys(arrays: Mapping[str, np.ndarray], wanted: tuple[str, ...], path: Path) -> list:
    missing = [key for key in wanted if key not in arrays]
    if missing:
        raise InputError(
            f"{str(path)!r} lacks {', '.join(missing)} (it has {', '.join(sorted(arrays))}): "
            f"add {'it' if len(missing) == 1 else 'them'}"
        )
    return [arrays[key] for key in wanted]


def _class_names(arrays: Mapping[str, np.ndarray]) -> tuple[str, ...] | None:
    return tuple(map(str, arrays["classes"])) if "classes" in arrays else None


def open_npz(rest: str, data_dir: str | Path | None = None) -> Dataset:
    """Opens `npz:PATH`; grey images may lack their channel axis."""
    del data_dir
    path = Path(rest).expanduser()
    arrays = _load_npz(path)
    train = tuple(_keys(arrays, ("x_train", "y_train"), path))
    has_test = "x_test" in arrays or "y_test" in arrays
    test = tuple(_keys(arrays, ("x_test", "y_test"), path)) if has_test else None
    return build(f"npz:{rest}", train, test, _class_names(arrays))


def open_embedded(rest: str, data_dir: str | Path | None) -> Dataset:
    """Opens `embedded:NAME`, a file inside the package."""
    del data_dir
    names = sorted(path.stem for path in EMBEDDED.glob("*.npz"))
    if rest not in names:
        raise InputError(f"no embedded data set {rest!r}: choose one of {', '.join(names)}")
    return open_npz(str(EMBEDDED / f"{rest}.npz"))


def sheet_parts(root: Path, name: str) -> list[Path]:
    """The train parts in number order; a gap would silently drop data, so it is an error."""
    numbered = {}
    for path in root.glob(f"{name}_train_*.npz"):
        if match := re.fullmatch(r"\d+", path.stem.removeprefix(f"{name}_train_")):
            numbered[int(match[0])] = path
    gaps = sorted(set(range(max(numbered, default=-1) + 1)) - set(numbered))
    if gaps:
        raise InputError(
            f"data set {name!r} in {str(root)!r} lacks part {name}_train_{gaps[0]}.npz: copy it "
            "there too"
        )
    return [numbered[number] for number in sorted(numbered)]


def _cut_sheet(webp: bytes) -> np.ndarray:
    from PIL import Image

    with Image.open(io.BytesIO(webp)) as picture:
        sheet = np.asarray(picture.convert("RGB"))
    side = sheet.shape[1] // _SHEET_COLUMNS
    grid = sheet.reshape(-1, side, _SHEET_COLUMNS, side, 3)
    return grid.swapaxes(1, 2).reshape(-1, side, side, 3)


def _load_sheets(paths: list[Path]) -> tuple[np.ndarray, np.ndarray, tuple[str, ...] | None]:
    xs, ys, classes = [], [], None
    for path in paths:
        arrays = _load_npz(path)
        webp, offsets, y = _keys(arrays, ("webp", "off", "y"), path)
        try:
            x = np.concatenate([_cut_sheet(webp[a:b].tobytes()) for a, b in pairwise(offsets)])
        except DAMAGED as error:
            raise InputError(
                f"a WebP sheet in {str(path)!r} cannot be decoded ({first_line(error)}): copy the "
                "file again"
            ) from error
        xs.append(x[: len(y)])
        ys.append(y)
        classes = classes or _class_names(arrays)
    return np.concatenate(xs), np.concatenate(ys), classes


def open_sheets(root: Path, name: str, parts: list[Path]) -> Dataset:
    """Opens sheet parts; the test part is NAME_test.npz where there is one."""
    *train, classes = _load_sheets(parts)
    test_path = root / f"{name}_test.npz"
    test = _load_sheets([test_path])[:2] if test_path.is_file() else None
    return build(name, tuple(train), test, classes)
