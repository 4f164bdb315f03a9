"""What a run is at, for whoever looks on: in a terminal, by callbacks, from another shell."""

import contextlib
import os
import platform
import time
from collections import deque
from collections.abc import Callable, Iterator
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from tqdm import tqdm

from madjax import processes, store
from madjax.errors import in_one_line
from madjax.sweep.clock import Compiled
from madjax.sweep.rows import DIVERGED

Log = Callable[[str], None]

INTERVAL = 1.0
"""Seconds between two looks that are written for other shells."""


class Epoch(NamedTuple):
    """An epoch that networks were trained, side by side; for online attackers, an evaluation."""

    networks: tuple[str, ...]
    """What each is called: as its cell, or for a victim's owner by data set and purpose."""
    ids: tuple[str, ...]
    """That of each one's row, or for a victim's owner the name of its checkpoint."""
    epoch: int
    """From 1."""
    epochs: int
    """That there are."""
    accuracy: np.ndarray
    """[networks], in percent of the test images; NaN where training diverged."""
    loss: np.ndarray
    """[networks], in nats: of training, for online attackers of the test images."""


OnEpoch = Callable[[Epoch], object]
OnRow = Callable[[dict[str, Any]], object]


class Progress:
    """Counts what a run has done, and tells who looks on: of several processes the first alone.

    log gets a line for each event, and a terminal has a bar; without log, neither. What a callback
    raises ends the run, in all processes, as whatever stops it does: nothing that is done is lost.
    """

    def __init__(
        self,
        log: Log | None,
        on_row: OnRow | None = None,
        on_epoch: OnEpoch | None = None,
    ):
        self._first = processes.is_first()
        self._log = log if self._first else None
        self._on_row, self._on_epoch = on_row, on_epoch
        self._directory: Path | None = None
        self._state: dict[str, Any] = {}
        self._bar = self._counting(0)
        self._pace: deque[tuple[float, int]] = deque(maxlen=32)
        self._written, self._stage = -np.inf, ""

    def log(self, line: str) -> None:
        """A line for the user."""
        if self._log is not None:
            self._log(line)

    @contextlib.contextmanager
    def of_run(self, directory: Path, cells: int, done: int, examples: int) -> Iterator[None]:
        """While a run is at work in a directory: so many cells, of which some have their row.

        examples: that its attackers will train on, each as often as there are epochs.
        """
        before = Compiled.so_far()
        self._compiled = lambda: Compiled.so_far().since(before)
        self._directory = directory
        self._state = {
            "state": "at work",
            "process": os.getpid(),
            "host": platform.node(),
            "began": _now(),
            "cells": cells,
            "cells_done": done,
            "stage": "begins",
            "examples": 0,
            "examples_total": examples,
            "examples_per_second": None,
        }
        with self._counting(examples, desc="attackers") as self._bar:
            self._look(at_once=True)
            try:
                yield
            except BaseException as error:
                stopped = isinstance(error, KeyboardInterrupt)
                self._state["state"] = (
                    f"stopped by {str(error) or 'SIGINT'}"
                    if stopped
                    else f"failed ({in_one_line(error)})"
                )
                raise
            else:
                self._state |= {"state": "finished", "stage": "ended"}
            finally:
                self._look(at_once=True)
        self.log(f"programs: {self._compiled()}")

    def at(self, stage: str, done: int = 0, total: int = 0, unit: str = "image") -> None:
        """What is under way from now on, and how far that is, where it has parts."""
        far = f", {unit} {done:,} of {total:,}" if total else ""
        self._state["stage"] = f"{stage}{far}"
        before, self._stage = self._stage, stage
        self._look(at_once=stage != before)

    def trains(self, stage: str, done: int, epochs: int) -> None:
        """Stolen models are trained from now on, of which so many epochs are done."""
        self._pace.clear()
        self._count()
        self.at(stage, done, epochs, "epoch")

    def skip(self, examples: int) -> None:
        """Examples that were trained on before, or need not be."""
        self._bar.total -= examples
        self._state["examples_total"] -= examples
        self._look()

    def trained(self, stage: str, examples: int, epoch: Callable[[], Epoch]) -> None:
        """Stolen models were trained for one more epoch, on so many examples."""
        self._state["examples"] += examples
        self._count()
        self._bar.update(examples)
        self._tell(stage, epoch)

    @contextlib.contextmanager
    def network(
        self, name: str, checkpoint: str, done: int, epochs: int, examples: int
    ) -> Iterator[Callable[[float, float], None]]:
        """While a network of a victim's owner is trained, of which some epochs are done.

        Gives what is to be called with its accuracy and loss after each of the others.
        """
        with self._counting(epochs * examples, desc=name, initial=done * examples) as bar:

            def after_epoch(accuracy: float, loss: float) -> None:
                nonlocal done
                done += 1
                bar.update(examples)
                each = np.asarray([accuracy]), np.asarray([loss])
                self._tell(name, lambda: Epoch((name,), (checkpoint,), done, epochs, *each))

            self.at(name, done, epochs, "epoch")
            yield after_epoch

    def rows(self, rows: list[dict[str, Any]], labels: list[str]) -> None:
        """Rows that are on disk now, and the labels of their cells."""
        for row, label in zip(rows, labels, strict=True):
            self.log(f"{label}: {_in_short(row)}")
        self._state["cells_done"] += len(rows)
        self._look(at_once=True)
        self._call_on_rows(rows, labels)

    @processes.by_first
    def _call_on_rows(self, rows: list[dict[str, Any]], labels: list[str]) -> None:
        if self._on_row is not None:
            for row, label in zip(rows, labels, strict=True):
                self._on_row(row | {"label": label})

    @processes.by_first
    def _tell(self, stage: str, made: Callable[[], Epoch]) -> None:
        epoch = made()
        self.at(stage, epoch.epoch, epoch.epochs, "epoch")
        if self._on_epoch is not None:
            self._on_epoch(epoch)

    def _count(self) -> None:
        self._pace.append((time.monotonic(), self._state["examples"]))
        (began, before), (now, done) = self._pace[0], self._pace[-1]
        if now > began:
            self._state["examples_per_second"] = (done - before) / (now - began)

    def _counting(self, total: int, **says: Any) -> tqdm:
        """A bar of examples, which a terminal shows."""
        hidden = True if self._log is None or not total else None
        return tqdm(total=total, unit="example", unit_scale=True, disable=hidden, **says)

    def _look(self, *, at_once: bool = False) -> None:
        """Let others have a look at the state, if the last one was a while ago."""
        now = time.monotonic()
        if self._directory is None or not self._first:
            return
        if not at_once and now - self._written < INTERVAL:
            return
        self._written = now
        said = self._state
        self._bar.set_postfix_str(f"{said['cells_done']} of {said['cells']} cells, {said['stage']}")
        compiled = self._compiled()._asdict()
        store.save_progress(self._directory, said | {"at": _now(), "compiled": compiled})


def _in_short(row: dict[str, Any]) -> str:
    """What a row says, in a line."""
    angle = [f"angle {row['angle_mean']:.1f} degrees"] if row.get("angle_mean") else []
    diverged = row["status"] == DIVERGED
    attacker = "diverged" if diverged else f"{row['attacker_accuracy']:.2f} %"
    defender, took = f"defender {row['defender_accuracy']:.2f} %", f"{row['seconds']:.0f} s"
    return ", ".join((*angle, defender, f"attacker {attacker}", took))


def _now() -> str:
    return f"{datetime.now(UTC):%FT%TZ}"
