"""What a run leaves on disk: its config, its rows, its checkpoints.

    DIR/config.json     the config as run, and its hash
    DIR/rows.jsonl      one JSON object a line, one line a cell, written once and whole
    DIR/progress.json   what the command that is at work there has done, or the last one had
    DIR/traces/         an .npz file for each task and seed of online attackers: every step
    DIR/checkpoints/    Orbax checkpoints: what the victim's owner trained, each with what made it,
                        and what is under way
    DIR/.lock           held by the command that is at work there

No array in a checkpoint belongs to a device: a run may go on on another machine. Of several
processes (`madjax.processes`) the first alone reads and writes here, and tells the others.
"""

import contextlib
import errno
import json
import os
import re
import shutil
import warnings
from collections.abc import Iterator
from concurrent import futures
from pathlib import Path
from typing import Any

import jax
import numpy as np
from filelock import FileLock, Timeout

from madjax import checkpoints, processes
from madjax.errors import InputError, in_one_line
from madjax.files import save_npz, write_atomically

CONFIG = "config.json"
ROWS = "rows.jsonl"
PROGRESS = "progress.json"
TRACES = "traces"
LOCK = ".lock"
MAKER = "made.json"
_writing: dict[Path, tuple[str, int, "futures.Future[None]"]] = {}
"""Of each directory the checkpoint that is being written, which nobody has waited for."""


@contextlib.contextmanager
def open_run(
    directory: Path, description: dict[str, Any], cells: list[str], *, resume: bool
) -> Iterator[list[dict[str, Any]]]:
    """Make a run's directory, or reopen it, and keep other commands out; gives the rows it holds.

    cells are the ids of the run's cells. A run may be resumed with more of them, so that a grid
    can grow; the directory then holds the larger config. A half-written last row is cut off, with
    a warning. A command that ends, in any way, keeps no other out any more.

    Raises:
        InputError: the directory cannot be written, holds something else, holds a run and resume
            was not asked for, holds a run with cells that are not among these, or another command
            is at work there.
    """
    with contextlib.ExitStack() as stack:

        @processes.by_first
        def enter() -> list[dict[str, Any]]:
            stack.enter_context(_alone(directory))
            # As JSON has it, so that what is read can be compared.
            return _rows(directory, json.loads(json.dumps(description | {"cells": cells})), resume)

        yield enter()


@contextlib.contextmanager
def _alone(directory: Path) -> Iterator[None]:
    """Hold the directory, which is made, against other commands."""
    if not (directory / CONFIG).is_file() and _has_content(directory):
        raise InputError(f"{directory} exists and holds no run: give another --out")
    lock = FileLock(directory / LOCK)
    try:
        directory.mkdir(parents=True, exist_ok=True)
        lock.acquire(timeout=0.2)  # which `is_at_work` may hold for a moment
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
        yield
    except BaseException:
        try:
            wait(directory)
        except InputError as error:  # which is not why the run ends
            warnings.warn(str(error), stacklevel=2)
        raise
    else:
        wait(directory)
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
    said = [f"{field} = {before[field]}, not {after.get(field, 'there')}" for field in differing]
    more = f"; and {len(said) - _SAID} more" if len(said) > _SAID else ""
    raise InputError(
        f"{directory} holds a run with {'; '.join(said[:_SAID])}{more}: resume with that config, "
        "to which tasks, defences, strengths, attacks, budgets and seeds may be added, or give "
        "another --out"
    )


_SAID = 8
"""Of the fields in which a config differs: another one may differ in all of them."""


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
    if data and not data.endswith(b"\n"):
        os.truncate(path, data.rfind(b"\n") + 1)
        warnings.warn(
            f"{path}: the last row was half written and is cut off: its cell runs again",
            stacklevel=2,
        )
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


@processes.by_first
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


def save_progress(directory: Path, progress: dict[str, Any]) -> None:
    """Write down what a run is at; where that cannot be, what there was is left."""
    text = json.dumps(progress, indent=2) + "\n"
    with contextlib.suppress(InputError):  # which a row or a checkpoint will say
        write_atomically(directory / PROGRESS, lambda draft: draft.write_text(text))


def read_progress(directory: Path) -> dict[str, Any] | None:
    """What a run was at when it was last written down; None where that is not known."""
    try:
        return json.loads((directory / PROGRESS).read_text())
    except (OSError, ValueError):
        return None


def is_at_work(directory: Path) -> bool | None:
    """Whether a command is at work in a run's directory; None where that cannot be told."""
    if not (directory / LOCK).exists():
        return False
    try:
        with FileLock(directory / LOCK).acquire(timeout=0):
            return False
    except Timeout:
        return True
    except OSError:  # of another user
        return None


@processes.by_first
def save_trace(directory: Path, name: str, columns: dict[str, np.ndarray]) -> None:
    """Write the arrays of a trace as `traces/NAME.npz`, whole or not at all."""
    folder = directory / TRACES
    folder.mkdir(exist_ok=True)
    write_atomically(folder / f"{name}.npz", lambda draft: save_npz(draft, columns))


@processes.by_first
def save(directory: Path, name: str, step: int, tree: Any) -> None:
    """Checkpoint a pytree of arrays as `name` at `step`; older steps of that name are removed.

    They are copied, and written while the program goes on. One write of a directory waits for
    the one before, and whatever reads here waits for all. A write that fails raises then.
    """
    wait(directory)
    copy = jax.tree.map(np.array, tree)  # of arrays whose memory others may be given meanwhile
    folder = directory / "checkpoints" / name
    _writing[directory] = name, step, checkpoints.write(folder / str(step), copy)


def wait(directory: Path) -> None:
    """Until nothing is being written in a directory.

    Raises:
        InputError: what was to be written could not be.
    """
    if directory not in _writing:
        return
    name, step, written = _writing[directory]
    futures.wait([written])
    del _writing[directory]
    written.result()
    folder = directory / "checkpoints" / name
    for old in _steps(folder):
        if old != step:
            shutil.rmtree(folder / str(old))


@processes.by_first
def restore(directory: Path, name: str, like: Any) -> Any | None:
    """The newest checkpoint of that name, with the structure of `like`, or None if there is none.

    `like` is a pytree of arrays or of `jax.ShapeDtypeStruct`; the result holds numpy arrays. One
    that cannot be read, as its files are damaged, is passed over with a warning: the one before
    it is taken, or None, and what it held is computed again.
    """
    wait(directory)
    folder = (directory / "checkpoints" / name).resolve()
    for step in sorted(_steps(folder), reverse=True):
        try:
            return checkpoints.read(folder / str(step), like)
        except Exception as error:  # of many kinds, by what is damaged
            warnings.warn(
                f"checkpoint {folder / str(step)} is damaged ({in_one_line(error)}): what it held "
                "is computed again",
                stacklevel=3,
            )
    return None


@processes.by_first
def holds(directory: Path, name: str, step: int) -> bool:
    """Whether there is a checkpoint of that name at that step."""
    wait(directory)
    return step in _steps(directory / "checkpoints" / name)


@processes.by_first
def sign(directory: Path, name: str, maker: dict[str, Any]) -> None:
    """Write down what made the checkpoint of that name, for `maker_of`."""
    wait(directory)
    text = json.dumps(maker)
    write_atomically(directory / "checkpoints" / name / MAKER, lambda draft: draft.write_text(text))


@processes.by_first
def maker_of(directory: Path, name: str) -> dict[str, Any] | None:
    """What made the checkpoint of that name; None where that is not known."""
    try:
        return json.loads((directory / "checkpoints" / name / MAKER).read_text())
    except (OSError, ValueError):
        return None


@processes.by_first
def ids(directory: Path) -> set[str]:
    """The ids of the rows of a run, which another command may be writing; nothing where none is."""
    return {row["id"] for row in rows(directory) if "id" in row}


def rows(directory: Path) -> list[dict[str, Any]]:
    """The rows of a run that are whole; another command may be writing the next."""
    path = directory / ROWS
    return _whole(path, path.read_bytes() if path.is_file() else b"")


@processes.by_first
def discard(directory: Path, name: str) -> None:
    """Remove the checkpoints whose names match; nothing happens where there is none.

    name may hold wildcards: "attack-0-*".
    """
    wait(directory)
    for folder in (directory / "checkpoints").glob(name):
        shutil.rmtree(folder, ignore_errors=True)


def _steps(folder: Path) -> list[int]:
    if not folder.is_dir():
        return []
    return [int(p.name) for p in folder.iterdir() if re.fullmatch(r"\d+", p.name)]
