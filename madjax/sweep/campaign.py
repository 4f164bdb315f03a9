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
from madjax.attacks import Attack, Transfer, check_transfer
from madjax.config import Sweep
from madjax.errors import InputError
from madjax.sweep.cells import (
    Cell,
    Lesson,
    Program,
    Shared,
    Training,
    default_mapping,
    over_cells,
)
from madjax.sweep.rows import DIVERGED, identity, identity_of_row, measured
from madjax.sweep.victim import Log
from madjax.train import State


def budgets_of(config: Sweep, attack: Attack) -> list[int]:
    """The budgets at which a stolen model is trained, smallest first."""
    return sorted({*config.budgets, attack.budget})


@lru_cache(maxsize=64)
def _compiled(training: Training, mesh: Mesh) -> tuple[Callable, Callable]:
    """The training's functions; no defence enters them, so that a sweep compiles them once."""
    return tuple(over_cells(f, mesh, default_mapping()) for f in (training.start, training.advance))


class Campaign:
    """The waves of a defence and an attack: what all of them need, and where results go."""

    def __init__(
        self,
        config: Sweep,
        program: Program,
        shared: Shared,
        mesh: Mesh,
        directory: Path,
        facts: dict[str, Any],
        rows: list[dict[str, Any]],
        bar: tqdm,
        log: Log,
    ):
        self.program, self.attack, self.shared = program, program.attack, shared
        self.directory, self.facts, self.rows, self.log, self.bar = directory, facts, rows, log, bar
        self.budgets = budgets_of(config, self.attack)
        self.place = (
            f"attack-{config.attacks.index(self.attack)}"
            f"-defense-{config.defenses.index(program.defense)}"
        )
        self.done = set(map(identity_of_row, rows))
        self.mesh, self.sharding = mesh, NamedSharding(mesh, P("cells"))
        self.over = partial(over_cells, mesh=mesh, mapping=default_mapping())

    def run(self, number: int, wave: list[Cell], stacked: Cell) -> None:
        """All that the cells of a wave have to do, and their rows."""
        raise NotImplementedError

    def missing(self, budget: int, wave: list[Cell]) -> list[int]:
        """The cells of a wave that have no row yet."""
        identities = [identity(self.program, budget, cell) for cell in wave]
        return [i for i, each in enumerate(identities) if each not in self.done]

    def check_answers(self, wave: list[Cell], useful: dict[str, jax.Array]) -> None:
        """Refuse a defence whose answers are no numbers: the top class of NaN would be class 0."""
        for cell, distance in zip(wave, np.asarray(useful["l1_mean"]), strict=False):
            if np.isnan(distance):
                raise InputError(
                    f"the defence {self.program.defense.label} answers NaN on the test set at "
                    f"strength {cell.epsilon:g}, seed {cell.seed}: mend it, or leave this out"
                )

    def finish(self, measured: dict[str, Any], *said: str) -> None:
        """Write the row of a cell, and log what it says."""
        row = self.facts | measured
        row |= self.program.defense.facts(row["epsilon"], row["n_train"])
        store.append_row(self.directory, row)
        self.rows.append(row)
        said = (
            *said,
            f"defender {row['defender_accuracy']:.2f} %",
            "attacker diverged"
            if row["status"] == DIVERGED
            else f"attacker {row['attacker_accuracy']:.2f} %",
            f"{row['seconds']:.0f} s",
        )
        self.log(
            f"{self.program.label}, budget {row['budget']:,}, epsilon {row['epsilon']:g}, seed "
            f"{row['seed']}: {', '.join(said)}"
        )


class TransferCampaign(Campaign):
    """Waves that collect transfer sets and train stolen models on them."""

    def __init__(self, config: Sweep, program: Program, shared: Shared, mesh: Mesh, *rest: Any):
        super().__init__(config, program, shared, mesh, *rest)
        self.utility, self.begin, self.proceed = (
            self.over(f) for f in (program.utility, program.begin, program.proceed)
        )
        self.lesson = Lesson(shared.images, shared.test_images, shared.test_labels)
        trainings = {
            budget: Training(program.stolen, self.attack.recipe, self.attack.examples(budget))
            for budget in self.budgets
        }
        self.trainings = {budget: _compiled(each, mesh) for budget, each in trainings.items()}

    def run(self, number: int, wave: list[Cell], stacked: Cell) -> None:
        """Collect the transfer sets of a wave, and train the stolen models at each budget."""
        missing = {budget: self.missing(budget, wave) for budget in self.budgets}
        if not any(missing.values()):
            return
        # On another count of devices a wave holds other cells, and begins anew.
        name = f"{self.place}-wave-{number}-of-{stacked.seed.size}-cells"
        transfer, spent = self._collect(f"{name}-transfer", stacked)
        useful = self.utility(stacked, self.shared)
        self.check_answers(wave, useful)
        for budget in filter(missing.get, self.budgets):
            at = f"{name}-budget-{budget}"
            state, seconds = self._train(at, budget, transfer, stacked, len(missing[budget]))
            results = jax.device_get((useful, transfer.asked, state.accuracy, state.loss))
            for i in missing[budget]:
                mine = jax.tree.map(lambda a, i=i: a[i], results)
                row = measured(self.program, budget, wave[i], *mine)
                row["seconds"] = round((seconds + spent) / len(wave), 3)
                row["seconds_collecting"] = round(spent / len(wave), 3)
                self.finish(row)
            store.discard(self.directory, at)
        store.discard(self.directory, f"{name}-transfer")

    def _collect(self, name: str, stacked: Cell) -> tuple[Transfer, float]:
        """The wave's transfer sets and the seconds; a checkpoint spares the rounds it holds."""
        rounds = self.attack.rounds
        like = jax.eval_shape(self.begin, stacked, self.shared), np.zeros(()), np.zeros((), int)
        saved = store.restore(self.directory, name, like)
        if saved is None:
            began = time.perf_counter()
            transfer = jax.block_until_ready(self.begin(stacked, self.shared))
            seconds, first = time.perf_counter() - began, 0
            if self.shared.posteriors is None:
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
        self, name: str, budget: int, transfer: Transfer, stacked: Cell, cells: int
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
