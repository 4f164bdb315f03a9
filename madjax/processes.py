"""Several processes that run one program, on as many machines: the first decides, and writes.

Each has some of the devices, and goes through the same steps as the others. What depends on files
or on the user, who may send a signal to one of them, is found out by the first and told to all, so
that they agree. Where there is one process, everything here is what it would be without.
"""

import os
import pickle
import sys
from collections import Counter
from collections.abc import Callable
from functools import wraps
from typing import Any, NoReturn, ParamSpec, TypeVar

import jax
import numpy as np
from jax.experimental import multihost_utils

from madjax.errors import InputError, in_one_line

Given = ParamSpec("Given")
Found = TypeVar("Found")

_deciding: list[None] = []
"""Not empty while the first process is in a call that the others wait for."""


def connect(address: str | None = None, count: int | None = None, index: int | None = None) -> None:
    """Make this one of several processes, before anything is computed: `jax.distributed`.

    address: host and port of the first one. count: how many there are; index: which this one is,
    from 0. By default all three are what the cluster says: Slurm, Kubernetes and Cloud TPU do.

    Raises:
        InputError: they cannot be told, or the others do not answer.
    """
    try:
        jax.config.update("jax_enable_preemption_service", True)
        jax.distributed.initialize(address, count, index)
    except (ValueError, TypeError, IndexError, RuntimeError) as error:
        raise InputError(
            f"the processes cannot be connected ({in_one_line(error)}): give --coordinator "
            "HOST:PORT, --processes N and --process I, the same but for the last to each of them"
        ) from error


def leave(status: int) -> NoReturn:
    """End at once, where another process has died: without waiting for it."""
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(status)


def several() -> bool:
    """Whether there is more than one, without touching a device where nobody has connected."""
    return jax.distributed.is_initialized() and jax.process_count() > 1


def index() -> int:
    """Which of them this one is, from 0."""
    return jax.process_index() if several() else 0


def is_first() -> bool:
    """Whether this is the one that writes."""
    return index() == 0


def meet() -> None:
    """Wait until all are here: how long each takes to get ready is its own affair.

    Raises:
        InputError: they have not as many devices each.
    """
    if not several():
        return
    counts = Counter(device.process_index for device in jax.devices())
    if len(set(counts.values())) > 1:
        found = ", ".join(f"process {i} has {count}" for i, count in sorted(counts.items()))
        raise InputError(
            f"processes differ in their devices: {found}; give each as many, on CPUs by "
            "JAX_NUM_CPU_DEVICES"
        )
    any_of(False)


def by_first(function: Callable[Given, Found]) -> Callable[Given, Found]:
    """The function, called in the first process alone; all return, or raise, what it did.

    Every process has to call it. What it returns can be pickled. One that is called inside another
    is called as it is.
    """

    @wraps(function)
    def call(*args: Given.args, **options: Given.kwargs) -> Found:
        if not several() or _deciding:
            return function(*args, **options)
        outcome = None
        if is_first():
            _deciding.append(None)
            try:
                outcome = True, function(*args, **options)
            except BaseException as error:
                outcome = False, error
            finally:
                _deciding.pop()
        went_well, found = _told(outcome)
        if not went_well:
            raise found
        return found

    return call


def _told(outcome: tuple[bool, Any] | None) -> tuple[bool, Any]:
    """The outcome that the first process has, in all of them."""
    data = b""
    if is_first():
        data, outcome = _pickled(outcome)
    head = _broadcast((len(data).to_bytes(_LENGTH) + data)[:_BLOCK], _BLOCK)
    size = int.from_bytes(head[:_LENGTH])
    found = [head[_LENGTH:]]
    for at in range(_BLOCK - _LENGTH, size, _LARGE):  # of few sizes, so that few programs do
        some = data[at : at + _LARGE]
        left = min(size - at, _LARGE)
        found.append(_broadcast(some, max(1 << (left - 1).bit_length(), _BLOCK)))
    return outcome if is_first() else pickle.loads(b"".join(found)[:size])


_BLOCK, _LENGTH, _LARGE = 1024, 8, 2**26
"""Bytes that are sent first, so many of which say how long the whole is, and most at a time."""


def _broadcast(data: bytes, size: int) -> bytes:
    """What the first process has, filled up with zeros."""
    padded = np.frombuffer(data.ljust(size, b"\0"), np.uint8)
    return multihost_utils.broadcast_one_to_all(padded).astype(np.uint8).tobytes()


def _pickled(outcome: tuple[bool, Any]) -> tuple[bytes, tuple[bool, Any]]:
    """An outcome as bytes; or, where others could not read it, an error in its place."""
    try:
        data = pickle.dumps(outcome)
        if not outcome[0]:  # an error may be written, and not be read
            pickle.loads(data)
    except Exception as error:
        said = in_one_line(error if outcome[0] else outcome[1])
        outcome = False, RuntimeError(said)
        data = pickle.dumps(outcome)
    return data, outcome


def together(function: Callable[Given, Found]) -> Callable[Given, Found]:
    """The function, called in every process; what one of them raises, all raise.

    For what each finds out on its own machine, as whether the data is there.
    """

    @wraps(function)
    def call(*args: Given.args, **options: Given.kwargs) -> Found:
        if not several():
            return function(*args, **options)
        failure, found = None, None
        try:
            found = function(*args, **options)
        except Exception as error:
            failure = error
        said = _gathered("" if failure is None else in_one_line(failure))
        if failure is not None:
            raise failure
        for index, line in enumerate(said):
            if line:
                raise InputError(f"process {index}: {line}")
        return found

    return call


def check_same(what: str, text: str) -> None:
    """Refuse to go on where processes have different texts of what they are to have in common.

    Raises:
        InputError: they have.
    """
    if not several():
        return
    said = _gathered(text)
    for index, each in enumerate(said):
        if each != said[0]:
            raise InputError(f"process {index} has other {what} than the first: give all the same")


def _gathered(text: str) -> list[str]:
    """A text of each process, of which the first 1,000 bytes count."""
    line = np.zeros(1000, np.uint8)
    data = np.frombuffer(text.encode()[: line.size], np.uint8)
    line[: data.size] = data
    lines = multihost_utils.process_allgather(line)
    return [each.tobytes().rstrip(b"\0").decode(errors="replace") for each in lines]


def any_of(flag: bool) -> bool:
    """Whether it holds in one of the processes."""
    return bool(multihost_utils.process_allgather(np.array([flag])).any()) if several() else flag


def is_preempted(step: int) -> bool:
    """Whether one of several processes got SIGTERM, and this step is where all are to stop.

    step: a number that is larger each time, and the same in all processes.
    """
    return several() and multihost_utils.reached_preemption_sync_point(step)
