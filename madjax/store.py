"""What a run leaves on disk: its config, its rows, its checkpoints.

    DIR/config.json     the config as run, and its hash
    DIR/rows.jsonl      one JSON object a line, one line a cell, written once and whole
    DIR/traces/         an .npz file for each task and seed of online attackers: every step
    DIR/checkpoints/    Orbax checkpoints: what the victim's owner trained, each with what made it,
                        and what is under way
    DIR/.lock           held by the command that is at work there

No array in a checkpoint belongs to a device: a run may go on on another machine.
"""

import contextlib
import errno
import json
import os
import re
import shutil
import signal
import threading
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jax
import numpy as np
from filelock import FileLock, Timeout

from madjax.errors import InputError, in_one_line
from madjax.files import write_atomically

CONFIG = "config.json"
ROWS = "rows.jsonl"
TRACES = "traces"
LOCK = ".lock"
MAKER = "made.json"
_ONE_AT_A_TIME = threading.Lock()
"""Threads that use Orbax at once take each other's drafts for their own (0.12.8)."""


@contextlib.contextmanager
def open_run(
    directory: Path, description: dict[str, Any], cells: list[str], *, resume: bool
) -> Iterator[list[dict[str, Any]]]:
    """Make a run's directory, or reopen it, and keep other commands out; gives the rows it holds.

    cells are the ids of the run's cells. A run may be resumed with more of them, so that a grid
    can grow; the directory then holds the larger config. A half-written last row is cut off. A
    command that ends, in any way, keeps no other out any more.

    Raises:
        InputError: the directory cannot be written, holds something else, holds a run and resume
            was not asked for, holds a run with cells that are not among these, or another command
            is at work there.
    """
    if not (directory / CONFIG).is_file() and _has_content(directory):
        raise InputError(f"{directory} exists and holds no run: give another --out")
    lock = FileLock(directory / LOCK)
    try:
        directory.mkdir(parents=True, exist_ok=True)
        lock.acquire(timeout=0)
    except Timeout as error:
        raise InputError(
            f"another command is at work in {directory}: wait until it has ended, or give another "
            "--out"
        ) from error
    except OSError as error:
        raise InputError(
            f"{directory} cannot be written ({error.strerror}): give another --out"
        ) from error
    try:
        # As JSON has it, so that what is read can be compared.
        yield _rows(directory, json.loads(json.dumps(description | {"cells": cells})), resume)
    finally:
        lock.release()


def _rows(directory: Path, description: dict[str, Any], resume: bool) -> list[dict[str, Any]]:
    """The rows of a run that is gone on with, or none, the config having been written."""
    path = directory / CONFIG
    rows: list[dict[str, Any]] = []
    if path.is_file():
        if not resume:
            raise InputError(
                f"{directory} already holds a run: add --resume to finish it, or give another --out"
            )
        old = read_config(directory)
        _check_contains(directory, old, description)
        rows = _repair(directory / ROWS)
        if old == description:
            return rows
    text = json.dumps(description, indent=2) + "\n"
    write_atomically(path, lambda draft: draft.write_text(text))
    return rows


def read_config(directory: Path) -> dict[str, Any]:
    """The config of a run, as JSON has it.

    Raises:
        InputError: its file is damaged.
    """
    path = directory / CONFIG
    try:
        return json.loads(path.read_text())
    except ValueError as error:
        raise InputError(
            f"{path} is damaged ({error}): make the run anew in another --out"
        ) from error


def _has_content(directory: Path) -> bool:
    """Whether this is a file, or a directory with more than what a crash left of its first file."""
    if not directory.is_dir():
        return directory.exists()
    return any(path.name not in (LOCK, f".{CONFIG}.part") for path in directory.iterdir())


def _check_contains(directory: Path, old: dict[str, Any], new: dict[str, Any]) -> None:
    """Refuse to go on with a run that has a cell which the new one has not."""
    if "cells" not in old:
        raise InputError(
            f"{directory} holds a run of an older madjax, which this one cannot go on with: give "
            "another --out (madjax report reads it)"
        )
    if set(old["cells"]) <= set(new["cells"]):
        return
    before, after = (dict(_flatten(value)) for value in (old, new))
    absent = object()
    differing = [k for k in before if before[k] != after.get(k, absent) and k != "cells"]
    if not differing:
        raise InputError(
            f"{directory} holds a run of the same config by another madjax: give another --out"
        )
    field = differing[0]
    now = after.get(field, "there")
    raise InputError(
        f"{directory} holds a run with {field} = {before[field]}, not {now}: resume with that "
        "config, to which tasks, defences, strengths, attacks, budgets and seeds may be added, or "
        "give another --out"
    )


def _flatten(value: Any, name: str = "") -> list[tuple[str, Any]]:
    """The leaves of a description by their path; a list of plain values is a leaf."""
    if isinstance(value, list) and any(isinstance(item, dict) for item in value):
        value = dict(enumerate(value))
    if not isinstance(value, dict):
        return [(name, value)]
    return [pair for k, v in value.items() for pair in _flatten(v, f"{name}.{k}" if name else k)]


def _repair(path: Path) -> list[dict[str, Any]]:
    """The rows of a file whose last line may be half written; that line is cut off the file."""
    if not path.exists():
        return []
    data = path.read_bytes()
    rows = _whole(path, data)
    if not data.endswith(b"\n"):
        os.truncate(path, data.rfind(b"\n") + 1)
    return rows


def _whole(path: Path, data: bytes) -> list[dict[str, Any]]:
    """The rows of a file's whole lines."""
    rows = []
    for number, line in enumerate(data[: data.rfind(b"\n") + 1].splitlines(), 1):
        try:
            rows.append(json.loads(line))
        except ValueError as error:
            raise InputError(
                f"{path}:{number} is damaged ({error}): delete the line, its cell runs again"
            ) from error
    return rows


def append_rows(directory: Path, rows: list[dict[str, Any]]) -> None:
    """Add rows: a single write of whole lines, on disk when this returns."""
    lines = "".join(json.dumps(row, allow_nan=False) + "\n" for row in rows).encode()
    handle = os.open(directory / ROWS, os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o644)
    try:
        before = os.fstat(handle).st_size
        if os.write(handle, lines) != len(lines):
            os.ftruncate(handle, before)
            raise OSError(errno.ENOSPC, "the disk is full", str(directory / ROWS))
        os.fsync(handle)
    finally:
        os.close(handle)


def save_trace(directory: Path, name: str, columns: dict[str, np.ndarray]) -> None:
    """Write the arrays of a trace as `traces/NAME.npz`, whole or not at all."""
    folder = directory / TRACES
    folder.mkdir(exist_ok=True)

    def write(draft: Path) -> None:
        with draft.open("wb") as file:  # savez adds a suffix to a path
            np.savez_compressed(file, **columns)

    write_atomically(folder / f"{name}.npz", write)


def save(directory: Path, name: str, step: int, tree: Any) -> None:
    """Checkpoint a pytree of arrays as `name` at `step`; older steps of that name are removed.

    An interrupt waits until that is done.
    """
    from orbax.checkpoint import v1 as ocp

    folder = (directory / "checkpoints" / name).resolve()
    with _uninterrupted(), _ONE_AT_A_TIME:
        ocp.save(folder / str(step), jax.tree.map(np.asarray, tree), overwrite=True)
        for old in _steps(folder):
            if old != step:
                shutil.rmtree(folder / str(old))


@contextlib.contextmanager
def _uninterrupted() -> Iterator[None]:
    """Ctrl-C takes effect at the end: in the middle, Orbax's threads would print pages."""
    if threading.current_thread() is not threading.main_thread():  # which alone has signals
        yield
        return
    asked: list[Any] = []
    before = signal.signal(signal.SIGINT, lambda *signal_and_frame: asked.append(signal_and_frame))
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, before)
    if asked:
        raise KeyboardInterrupt


def restore(directory: Path, name: str, like: Any) -> Any | None:
    """The newest checkpoint of that name, with the structure of `like`, or None if there is none.

    `like` is a pytree of arrays or of `jax.ShapeDtypeStruct`; the result holds numpy arrays. One
    that cannot be read, as its files are damaged, is passed over with a warning: the one before
    it is taken, or None, and what it held is computed again.
    """
    from orbax.checkpoint import v1 as ocp

    folder = (directory / "checkpoints" / name).resolve()
    blank = jax.tree.map(lambda a: np.empty(a.shape, a.dtype), like)
    for step in sorted(_steps(folder), reverse=True):
        try:
            with _ONE_AT_A_TIME:
                return ocp.load(folder / str(step), blank)
        except Exception as error:  # of many kinds, by what is damaged
            warnings.warn(
                f"checkpoint {folder / str(step)} is damaged ({in_one_line(error)}): what it held "
                "is computed again",
                stacklevel=2,
            )
    return None


def holds(directory: Path, name: str, step: int) -> bool:
    """Whether there is a checkpoint of that name at that step."""
    return step in _steps(directory / "checkpoints" / name)


def sign(directory: Path, name: str, maker: dict[str, Any]) -> None:
    """Write down what made the checkpoint of that name, for `maker_of`."""
    text = json.dumps(maker)
    write_atomically(directory / "checkpoints" / name / MAKER, lambda draft: draft.write_text(text))


def maker_of(directory: Path, name: str) -> dict[str, Any] | None:
    """What made the checkpoint of that name; None where that is not known."""
    try:
        return json.loads((directory / "checkpoints" / name / MAKER).read_text())
    except (OSError, ValueError):
        return None


def ids(directory: Path) -> set[str]:
    """The ids of the rows of a run, which another command may be writing; nothing where none is."""
    path = directory / ROWS
    data = path.read_bytes() if path.is_file() else b""
    return {row["id"] for row in _whole(path, data) if "id" in row}


def discard(directory: Path, name: str) -> None:
    """Remove the checkpoints whose names match; nothing happens where there is none.

    name may hold wildcards: "attack-0-*".
    """
    for folder in (directory / "checkpoints").glob(name):
        shutil.rmtree(folder, ignore_errors=True)


def _steps(folder: Path) -> list[int]:
    if not folder.is_dir():
        return []
    return [int(p.name) for p in folder.iterdir() if re.fullmatch(r"\d+", p.name)]
