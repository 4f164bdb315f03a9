"""Pytrees of arrays on disk, by Orbax: each process for itself, and one thread of it at a time."""

import contextlib
import logging
import os
import re
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any

import jax
import numpy as np

from madjax import processes
from madjax.errors import InputError, in_one_line

_ITEM = "state"
"""What Orbax calls the one thing that a checkpoint holds."""
_THREAD = ThreadPoolExecutor(1, "checkpoints")
"""Threads that use Orbax at once take each other's drafts for their own (0.12.8)."""


def write(path: Path, tree: Any) -> "Future[None]":
    """Begin to write arrays, which nobody may change meanwhile: the whole directory, or none.

    What comes of it raises InputError where it cannot be written.
    """
    return _THREAD.submit(_write, path.resolve(), tree)


def read(path: Path, like: Any = None) -> Any:
    """The arrays of a checkpoint, NumPy's, with the structure of `like`, or nested dicts of them.

    `like` is a pytree of arrays or of `jax.ShapeDtypeStruct`. What is damaged raises errors of
    many kinds.
    """
    return _THREAD.submit(_read, path.resolve(), like).result()


def _write(path: Path, tree: Any) -> None:
    import orbax.checkpoint as ocp

    try:
        with _checkpointer() as checkpointer:
            item = ocp.args.Composite(**{_ITEM: ocp.args.PyTreeSave(tree)})
            checkpointer.save(path, args=item, force=True)
    except Exception as error:  # of many kinds: of a full disk ValueError
        raise InputError(
            f"the checkpoint {path} cannot be written ({_reason(error)}): see to it that it "
            "can, and go on with --resume"
        ) from error


def _reason(error: Exception) -> str:
    """What the system said, of which TensorStore has a number at the end of a long line."""
    found = re.search(r"os_error_code='(\d+)'", str(error))
    return os.strerror(int(found[1])) if found else in_one_line(error)


def _read(path: Path, like: Any) -> Any:
    import orbax.checkpoint as ocp

    with _checkpointer() as checkpointer:
        item = ocp.args.PyTreeRestore()
        if like is not None:
            blank = jax.tree.map(lambda a: np.empty(a.shape, a.dtype), like)
            ways = ocp.checkpoint_utils.construct_restore_args(blank)
            item = ocp.args.PyTreeRestore(blank, restore_args=ways)
        return checkpointer.restore(path, args=ocp.args.Composite(**{_ITEM: item}))[_ITEM]


@contextlib.contextmanager
def _checkpointer() -> Iterator[Any]:
    """Orbax's older interface, which can be told that other processes do not take part.

    The newer one waits for all of them, whatever it is told (0.12.8).
    """
    import orbax.checkpoint as ocp

    mine = processes.index()
    alone = ocp.options.MultiprocessingOptions(
        primary_host=mine, active_processes={mine}, barrier_sync_key_prefix=f"process-{mine}"
    )
    handler = ocp.CompositeCheckpointHandler(
        **{_ITEM: ocp.PyTreeCheckpointHandler(multiprocessing_options=alone)},
        composite_options=ocp.CompositeOptions(multiprocessing_options=alone),
    )
    logger = logging.getLogger("absl")
    level = logger.level
    logger.setLevel(logging.CRITICAL)  # what fails raises; else there would be pages of it
    try:
        with ocp.Checkpointer(handler, multiprocessing_options=alone) as checkpointer:
            yield checkpointer
    finally:
        logger.setLevel(level)
