"""A pass of a defence over its queries, of which a kill loses no more than the latest part."""

import time
from collections.abc import Callable
from pathlib import Path

import jax
import numpy as np

from madjax import processes, store

INTERVAL = 30.0
"""Seconds after which what there is of a pass is kept again, at the earliest."""
PATIENCE = 10
"""How many times as long as keeping it took that is, at the earliest."""


class Pass:
    """The answers [E, Q, K] of a pass under way: those of the first `done` images are there.

    Of a name, which says all that determines them, they are kept in a run's directory, so that the
    run goes on with them; without a name they are not. at(done) is told how far it is.
    """

    def __init__(
        self,
        directory: Path,
        name: str | None,
        shape: tuple[int, int, int],
        at: Callable[[int], object],
    ):
        self._directory, self._name, self._at = directory, name, at
        self._last, self._wait = time.monotonic(), INTERVAL
        self.told, self.done = np.zeros(shape, np.float32), 0
        like = jax.ShapeDtypeStruct(shape, np.float32), jax.ShapeDtypeStruct((), np.int64)
        held = store.restore(directory, name, like) if name else None
        if held is not None:
            self.told, self.done = np.array(held[0]), int(held[1])
        at(self.done)

    def after_chunk(self, done: int) -> None:
        """Take note that these images are done, and keep their answers if that is due."""
        self.done = done
        self._at(done)
        self._keep_if_due()

    def end(self, *, kept: bool) -> None:
        """All are done; kept: elsewhere too, so that they need not be here."""
        if self._name and kept:
            store.discard(self._directory, self._name)
        else:
            self._keep_if_due()

    @processes.by_first
    def _keep_if_due(self) -> None:
        began = time.monotonic()
        if not self._name or began - self._last < self._wait:
            return
        store.save(self._directory, self._name, self.done, (self.told, np.asarray(self.done)))
        self._last = time.monotonic()
        self._wait = max(INTERVAL, PATIENCE * (self._last - began))
