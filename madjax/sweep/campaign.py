"""One defence and attack, wave after wave: what is computed is kept, rows are written once."""

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
from madjax.sweep.clock import Stopwatch
from madjax.sweep.grid import Cell
from madjax.sweep.rows import DIVERGED, measured, which
from madjax.sweep.victim import Log
from madjax.train import State

Place = tuple[float, int]
"""Strength and seed: which of the cells of one task, defence and attack."""


@lru_cache(maxsize=64)
def _compiled(training: Training, mesh: Mesh) -> tuple[Callable, ...]:
    """The training's functions; no defence enters them, so that a sweep compiles them once."""
    functions = training.start, training.advance, training.fidelity
    return tuple(over_cells(f, mesh, default_mapping()) for f in functions)


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

    def __init__(self, program: Program, *rest: Any):
        super().__init__(program, *rest)
        self.begin, self.proceed = self.over(program.begin), self.over(program.proceed)
        size = self.attack.examples(self.attack.budget)
        training = Training(program.stolen, self.attack.recipe, size)
        self.begin_training, self.advance, self.fidelity = _compiled(training, self.mesh)

    def run(self, wave: list[Place], stacked: Point) -> None:
        """Collect the transfer sets of a wave, and train the stolen models at each budget."""
        missing = {budget: self.missing(budget, wave) for budget in self.budgets}
        # On another count of devices a wave holds other cells, and begins anew.
        name = f"{self.name}-wave-{digest(wave)}-of-{stacked.seed.size}-cells"
        transfer, collecting = self._collect(f"{name}-transfer", stacked)
        for budget in filter(missing.get, self.budgets):
            at = f"{name}-budget-{budget}"
            shared = self.shared
            tests = shared.test_images, shared.test_labels, shared.test_posteriors
            lesson = Lesson(shared.images, *tests, np.int32(self.attack.examples(budget)))
            state, training = self._train(at, lesson, transfer, stacked, len(missing[budget]))
            with training:
                fidelity = jax.block_until_ready(self.fidelity(state, lesson))
            results = jax.device_get((transfer.asked, state.accuracy, state.loss, fidelity))
            running = collecting.running + training.running
            compiling = collecting.compiling + training.compiling
            took = {
                "seconds": round(running / len(wave), 3),
                "seconds_collecting": round(collecting.running / len(wave), 3),
                "seconds_compiling": round(compiling / len(wave), 3),
            }
            collecting.compiling = 0.0  # which rows of one budget have
            each = {i: jax.tree.map(lambda a, i=i: a[i], results) for i in missing[budget]}
            rows = {
                wave[i]: measured(self.program, budget, self.useful[wave[i]], *mine) | took
                for i, mine in each.items()
            }
            self.finish(budget, rows)
            store.discard(self.directory, at)
        store.discard(self.directory, f"{name}-transfer")

    def _collect(self, name: str, stacked: Point) -> tuple[Transfer, Stopwatch]:
        """The wave's transfer sets and the seconds; a checkpoint spares the rounds it holds."""
        rounds = self.attack.rounds
        like = jax.eval_shape(self.begin, stacked, self.shared), np.zeros(()), np.zeros((), int)
        saved = store.restore(self.directory, name, like)
        if saved is None:
            watch, first = Stopwatch(), 0
            with watch:
                transfer = jax.block_until_ready(self.begin(stacked, self.shared))
            if stacked.told is None:  # else they are made anew at no cost
                self._keep(name, transfer, watch, 0)
        else:
            transfer = jax.device_put(saved[0], self.sharding)
            watch, first = Stopwatch(float(saved[1])), int(saved[2])
        for r in range(first, rounds):
            with watch:
                transfer = self.proceed((stacked, transfer), (self.shared, np.int32(r)))
                jax.block_until_ready(transfer)
            self._keep(name, transfer, watch, r + 1)
            self.log(
                f"{self.program.label}: round {r + 1} of {rounds}, "
                f"{int(transfer.asked[0]):,} queries, {watch.running:.0f} s"
            )
        check_transfer(self.attack, transfer)
        return transfer, watch

    def _keep(self, name: str, transfer: Transfer, watch: Stopwatch, rounds: int) -> None:
        state = transfer, np.asarray(watch.running), np.asarray(rounds)
        store.save(self.directory, name, rounds, state)

    def _train(
        self, name: str, lesson: Lesson, transfer: Transfer, stacked: Point, cells: int
    ) -> tuple[State, Stopwatch]:
        """The wave's stolen models after their last epoch, and the seconds."""
        watch = Stopwatch()
        with watch:
            state = self.begin_training(stacked._replace(told=None), lesson)
        saved = store.restore(self.directory, name, (state, np.zeros(())))
        if saved is not None:
            state, watch.running = jax.device_put(saved[0], self.sharding), float(saved[1])
        finished = int(state.epoch[0])
        self.bar.update(cells * finished)
        for e in range(finished, self.attack.recipe.epochs):
            with watch:
                state = jax.block_until_ready(self.advance((transfer, state), lesson))
            store.save(self.directory, name, e + 1, (state, np.asarray(watch.running)))
            self.bar.update(cells)
        return state, watch
