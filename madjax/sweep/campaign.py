"""One defence and attack, wave after wave: what is computed is kept, rows are written once."""

import time
from collections.abc import Callable
from functools import lru_cache, partial
from pathlib import Path
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P
from tqdm import tqdm

from madjax import store
from madjax.attacks import Transfer, check_transfer
from madjax.config import describe, digest
from madjax.defenses import Defense
from madjax.errors import InputError
from madjax.sweep.cells import (
    Lesson,
    Point,
    Program,
    Shared,
    Training,
    default_mapping,
    over_cells,
)
from madjax.sweep.grid import Cell
from madjax.sweep.rows import DIVERGED, measured, which
from madjax.sweep.victim import Log
from madjax.train import State

Place = tuple[float, int]
"""Strength and seed: which of the cells of one task, defence and attack."""


@lru_cache(maxsize=64)
def _compiled(training: Training, mesh: Mesh) -> tuple[Callable, Callable]:
    """The training's functions; no defence enters them, so that a sweep compiles them once."""
    return tuple(over_cells(f, mesh, default_mapping()) for f in (training.start, training.advance))


def check_answers(rule: Defense, strength: float, seed: int, distance: float) -> None:
    """Refuse a defence whose answers are no numbers: the top class of NaN would be class 0.

    distance is the mean one from the posteriors of the test set.
    """
    if np.isnan(distance):
        raise InputError(
            f"the defence {rule.label} answers NaN on the test set at strength {strength:g}, seed "
            f"{seed}: mend it, or leave this out"
        )


class Campaign:
    """The waves of a task, defence and attack: what all of them need, and where results go.

    cells are those that have no row yet, by id.
    """

    def __init__(
        self,
        program: Program,
        cells: dict[str, Cell],
        shared: Shared,
        useful: dict[Place, dict[str, float]],
        mesh: Mesh,
        directory: Path,
        facts: dict[str, Any],
        rows: list[dict[str, Any]],
        bar: tqdm,
        log: Log,
    ):
        self.program, self.attack, self.shared = program, program.attack, shared
        self.useful = useful
        self.directory, self.facts, self.rows, self.log, self.bar = directory, facts, rows, log, bar
        self.budgets = sorted({cell.budget for cell in cells.values()})
        self.todo = {(c.strength, c.seed, c.budget): (name, c) for name, c in cells.items()}
        one = next(iter(cells.values()))
        self.name = f"attack-{digest(describe([one.task, one.rule, one.attack]))}"
        self.mesh, self.sharding = mesh, NamedSharding(mesh, P("cells"))
        self.over = partial(over_cells, mesh=mesh, mapping=default_mapping())

    def run(self, wave: list[Place], stacked: Point) -> None:
        """All that the cells of a wave have to do, and their rows."""
        raise NotImplementedError

    def missing(self, budget: int, wave: list[Place]) -> list[int]:
        """The cells of a wave that have no row yet."""
        return [i for i, place in enumerate(wave) if (*place, budget) in self.todo]

    def finish(self, budget: int, measured: dict[Place, dict[str, Any]]) -> None:
        """Write the rows of cells at once, all or none, and log what they say."""
        rows = []
        for place, values in measured.items():
            name, cell = self.todo[*place, budget]
            row = {"id": name} | self.facts | which(cell) | values
            rows.append(row | cell.rule.facts(cell.strength, row["n_train"]))
        store.append_rows(self.directory, rows)
        self.rows += rows
        for place, row in zip(measured, rows, strict=True):
            _, cell = self.todo[*place, budget]
            angle = [f"angle {row['angle_mean']:.1f} degrees"] if row.get("angle_mean") else []
            said = (
                *angle,
                f"defender {row['defender_accuracy']:.2f} %",
                "attacker diverged"
                if row["status"] == DIVERGED
                else f"attacker {row['attacker_accuracy']:.2f} %",
                f"{row['seconds']:.0f} s",
            )
            self.log(f"{cell.label}: {', '.join(said)}")


class TransferCampaign(Campaign):
    """Waves that collect transfer sets and train stolen models on them."""

    def __init__(
        self,
        program: Program,
        cells: dict[str, Cell],
        shared: Shared,
        useful: dict[Place, dict[str, float]],
        mesh: Mesh,
        *rest: Any,
    ):
        super().__init__(program, cells, shared, useful, mesh, *rest)
        self.begin, self.proceed = self.over(program.begin), self.over(program.proceed)
        self.lesson = Lesson(shared.images, shared.test_images, shared.test_labels)
        trainings = {
            budget: Training(program.stolen, self.attack.recipe, self.attack.examples(budget))
            for budget in self.budgets
        }
        self.trainings = {budget: _compiled(each, mesh) for budget, each in trainings.items()}

    def run(self, wave: list[Place], stacked: Point) -> None:
        """Collect the transfer sets of a wave, and train the stolen models at each budget."""
        missing = {budget: self.missing(budget, wave) for budget in self.budgets}
        # On another count of devices a wave holds other cells, and begins anew.
        name = f"{self.name}-wave-{digest(wave)}-of-{stacked.seed.size}-cells"
        transfer, spent = self._collect(f"{name}-transfer", stacked)
        for budget in filter(missing.get, self.budgets):
            at = f"{name}-budget-{budget}"
            state, seconds = self._train(at, budget, transfer, stacked, len(missing[budget]))
            results = jax.device_get((transfer.asked, state.accuracy, state.loss))
            took = {
                "seconds": round((seconds + spent) / len(wave), 3),
                "seconds_collecting": round(spent / len(wave), 3),
            }
            each = {i: jax.tree.map(lambda a, i=i: a[i], results) for i in missing[budget]}
            rows = {
                wave[i]: measured(self.program, budget, self.useful[wave[i]], *mine) | took
                for i, mine in each.items()
            }
            self.finish(budget, rows)
            store.discard(self.directory, at)
        store.discard(self.directory, f"{name}-transfer")

    def _collect(self, name: str, stacked: Point) -> tuple[Transfer, float]:
        """The wave's transfer sets and the seconds; a checkpoint spares the rounds it holds."""
        rounds = self.attack.rounds
        like = jax.eval_shape(self.begin, stacked, self.shared), np.zeros(()), np.zeros((), int)
        saved = store.restore(self.directory, name, like)
        if saved is None:
            began = time.perf_counter()
            transfer = jax.block_until_ready(self.begin(stacked, self.shared))
            seconds, first = time.perf_counter() - began, 0
            if stacked.told is None:  # else they are made anew at no cost
                self._keep(name, transfer, seconds, 0)
        else:
            transfer = jax.device_put(saved[0], self.sharding)
            seconds, first = float(saved[1]), int(saved[2])
        for r in range(first, rounds):
            began = time.perf_counter()
            transfer = self.proceed((stacked, transfer), (self.shared, np.int32(r)))
            jax.block_until_ready(transfer)
            seconds += time.perf_counter() - began
            self._keep(name, transfer, seconds, r + 1)
            self.log(
                f"{self.program.label}: round {r + 1} of {rounds}, "
                f"{int(transfer.asked[0]):,} queries, {seconds:.0f} s"
            )
        check_transfer(self.attack, transfer)
        return transfer, seconds

    def _keep(self, name: str, transfer: Transfer, seconds: float, rounds: int) -> None:
        state = transfer, np.asarray(seconds), np.asarray(rounds)
        store.save(self.directory, name, rounds, state)

    def _train(
        self, name: str, budget: int, transfer: Transfer, stacked: Point, cells: int
    ) -> tuple[State, float]:
        """The wave's stolen models after their last epoch, and the seconds."""
        start, advance = self.trainings[budget]
        state = start(stacked, self.lesson)
        seconds = 0.0
        saved = store.restore(self.directory, name, (state, np.zeros(())))
        if saved is not None:
            state, seconds = jax.device_put(saved[0], self.sharding), float(saved[1])
        finished = int(state.epoch[0])
        self.bar.update(cells * finished)
        for e in range(finished, self.attack.recipe.epochs):
            began = time.perf_counter()
            state = jax.block_until_ready(advance((transfer, state), self.lesson))
            seconds += time.perf_counter() - began
            store.save(self.directory, name, e + 1, (state, np.asarray(seconds)))
            self.bar.update(cells)
        return state, seconds
