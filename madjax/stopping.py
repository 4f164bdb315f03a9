"""Signals that ask a program to end: it does so where nothing that is done is lost.

    with by_signal():               SIGINT and SIGTERM raise `Stopped`
        with deferred():            not inside of this
            train(); save()
            check()                 but here

A second SIGINT does not wait. Several processes stop at the same check, whichever of them got the
signal (`madjax.processes`).
"""

import contextlib
import itertools
import os
import signal
from collections.abc import Iterator
from types import FrameType

from madjax import processes

ENDING = signal.SIGINT, signal.SIGTERM


class Stopped(KeyboardInterrupt):
    """The program was asked to end by a signal, of which this has the number."""

    def __init__(self, number: int):
        super().__init__(signal.Signals(number).name)
        self.number = number

    def __reduce__(self) -> tuple[type, tuple[int]]:
        return Stopped, (self.number,)


class _Watch:
    """What came of signals since `by_signal` began."""

    def __init__(self) -> None:
        self.asked: int | None = None
        self.deferring = 0

    def handle(self, number: int, frame: FrameType | None) -> None:
        del frame
        again, self.asked = self.asked is not None, number
        if again or not (self.deferring or processes.several()):
            raise Stopped(number)
        name = signal.Signals(number).name
        line = f"madjax: {name}: stopping after what is under way; once more stops at once\n"
        os.write(2, line.encode())  # as something else may be in the middle of printing


_watches: list[_Watch] = []
_checks = itertools.count(1)
"""By which several processes agree where to stop: never the same number again."""


@contextlib.contextmanager
def by_signal() -> Iterator[None]:
    """Inside, SIGINT and SIGTERM raise `Stopped`; to be entered by the main thread.

    Where there are several processes JAX listens to SIGTERM, and tells all of them.
    """
    watch = _Watch()
    heard = [n for n in _heard() if signal.getsignal(n) is not signal.SIG_IGN]  # as with nohup
    before = {number: signal.signal(number, watch.handle) for number in heard}
    _watches.append(watch)
    try:
        yield
    finally:
        _watches.pop()
        for number, handler in before.items():
            signal.signal(number, handler)


def _heard() -> tuple[int, ...]:
    return (signal.SIGINT,) if processes.several() else ENDING


@contextlib.contextmanager
def deferred() -> Iterator[None]:
    """Inside, a signal waits for the next `check`, or for the end."""
    if not _watches:
        yield
        return
    watch = _watches[-1]
    watch.deferring += 1
    try:
        yield
    finally:
        watch.deferring -= 1
    if not (processes.several() or watch.deferring):
        _raise_if_asked(watch)


def check() -> None:
    """Stop here, if that was asked for; all processes have to call it alike.

    Raises:
        Stopped: it was.
    """
    if not _watches:
        return
    watch = _watches[-1]
    if processes.several():
        interrupted = processes.any_of(watch.asked is not None)
        preempted = processes.is_preempted(next(_checks))
        if interrupted or preempted:
            raise Stopped(signal.SIGINT if interrupted else signal.SIGTERM)
        return  # a signal of this moment is one that the others have not heard of
    _raise_if_asked(watch)


def _raise_if_asked(watch: _Watch) -> None:
    if watch.asked is not None:
        raise Stopped(watch.asked)
