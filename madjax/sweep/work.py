"""What there is to do and where its results go: groups of cells, and the desk of a run."""

from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from jax.sharding import Mesh

from madjax import processes, store
from madjax.attacks import Attack, Online
from madjax.config import Sweep, Task, describe, digest
from madjax.defenses import Defense
from madjax.errors import InputError
from madjax.sweep.grid import Cell
from madjax.sweep.progress import Epoch, Progress
from madjax.sweep.rows import plain, which
from madjax.sweep.stages import Parties, Point
from madjax.sweep.tasks import Opened
from madjax.sweep.trial import Prospect


class Place(NamedTuple):
    """Where a cell stands in its group; those of several budgets share a place."""

    task: Task
    strength: float
    seed: int


@dataclass(frozen=True, eq=False)
class Group:
    """Cells without a row, by id, of one defence and attack, on tasks of equal shapes.

    One set of programs serves all of them. strengths are all of the defence's in the config.
    """

    rule: Defense
    strengths: tuple[float, ...]
    attack: Attack
    parties: Parties
    cells: dict[str, Cell]
    drawn: dict[Task, dict[int, np.ndarray]] | None
    """The own images that are sent, in order, int32 [Q], by task and seed, if they are foreseen."""

    @property
    def label(self) -> str:
        """Defence and attack, as the log calls them."""
        return f"{self.rule.label} against {self.attack.label}"

    @property
    def examples(self) -> int:
        """On which all its cells train, each as often as there are epochs."""
        return sum(self.seen(cell.budget) for cell in self.cells.values())

    def seen(self, budget: int) -> int:
        """The examples that a cell of this budget trains on, each as often as there are epochs."""
        if isinstance(self.attack, Online):
            return int(self.attack.budget)  # which may be NumPy's
        return int(self.attack.recipe.epochs * self.attack.examples(budget))

    def those(self, places: list[Place], budget: int) -> dict[int, str]:
        """Which of these places wait for this budget, with the ids of their cells."""
        ids = {i: self.waiting.get((place, budget)) for i, place in enumerate(places)}
        return {i: name for i, name in ids.items() if name is not None}

    def epoch(
        self, those: dict[int, str], epoch: int, epochs: int, accuracy: Any, loss: Any
    ) -> Epoch:
        """What came of an epoch of `those`; accuracy and loss [W] are of all of a wave."""
        some, ids = list(those), tuple(those.values())
        labels = tuple(self.cells[each].label for each in ids)
        return Epoch(labels, ids, epoch, epochs, accuracy[some], loss[some])

    @cached_property
    def waiting(self) -> dict[tuple[Place, int], str]:
        """The ids by place and budget."""
        return {(Place(c.task, c.strength, c.seed), c.budget): i for i, c in self.cells.items()}

    @cached_property
    def places(self) -> list[Place]:
        """Each once, in the order of the grid."""
        return list(dict.fromkeys(place for place, _ in self.waiting))

    @cached_property
    def budgets(self) -> list[int]:
        """The smallest first."""
        return sorted({budget for _, budget in self.waiting})

    @cached_property
    def tasks(self) -> list[Task]:
        """The order of what cells read of a task."""
        return list(dict.fromkeys(place.task for place in self.places))

    @cached_property
    def owners(self) -> list[tuple[Task, int]]:
        """Tasks and seeds, in the order of what cells read of a defence."""
        return list(dict.fromkeys((place.task, place.seed) for place in self.places))

    def point(self, place: Place, told: np.ndarray | None = None) -> Point:
        """A place as numbers; told [Q, K] are the answers to its queries, if they are foreseen."""
        task, strength, seed = place
        at = self.tasks.index(task), self.owners.index((task, seed))
        return Point(np.float32(strength), np.uint32(seed), *map(np.int32, at), told)

    def checkpoint(self, places: list[Place], size: int) -> str:
        """The name of that of a wave; on another count of devices a wave is another."""
        described = digest(describe([self.rule, self.attack, places]))
        return f"attack-{described}-of-{size}-cells"


def grouped(
    cells: Mapping[str, Cell], config: Sweep, ahead: Mapping[tuple[Task, Attack], Prospect]
) -> list[Group]:
    """The groups that cells fall into, in the order of the grid."""
    strengths = {each.rule: each.strengths for each in config.defenses}
    found: dict[Any, Group] = {}
    for name, cell in cells.items():
        parties, drawn, alike = ahead[cell.task, cell.attack]
        kind = alike, cell.rule, cell.attack
        if kind not in found:
            settings = cell.rule, strengths[cell.rule], cell.attack
            found[kind] = Group(*settings, parties, {}, None if drawn is None else {})
        found[kind].cells[name] = cell
        if drawn is not None:
            found[kind].drawn[cell.task] = drawn
    return list(found.values())


@dataclass(frozen=True, eq=False)
class Desk:
    """Where the results of a run go, and the devices that they are made on.

    facts are the fields that all rows share, rows those that there are so far.
    """

    opened: Mapping[Task, Opened]
    directory: Path
    mesh: Mesh
    facts: dict[str, Any]
    rows: list[dict[str, Any]]
    progress: Progress
    per_cell: int | None = None
    """Devices that share a cell, see `mesh.arranged`."""

    def finish(self, group: Group, budget: int, measured: Mapping[Place, dict[str, Any]]) -> None:
        """Write the rows of cells at once, all or none, and log what they say."""
        rows = []
        for place, values in measured.items():
            name = group.waiting[place, budget]
            cell = group.cells[name]
            said = which(cell, self.opened[cell.task].checksums)
            row = {"id": name} | self.facts | said | values
            known = cell.rule.facts(cell.strength, cell.task.victim, row["n_train"])
            rows.append(plain(row | known))

        @processes.by_first
        def written() -> list[dict[str, Any]]:
            store.append_rows(self.directory, rows)
            return rows  # with its seconds

        self.rows.extend(written())
        self.progress.rows(rows, [group.cells[row["id"]].label for row in rows])


def check_answers(rule: Defense, place: Place, distance: float) -> None:
    """Refuse a defence whose answers are no numbers: the top class of NaN would be class 0.

    distance is the mean one from the posteriors of the test set.
    """
    if np.isnan(distance):
        raise InputError(
            f"the defence {rule.label} answers NaN on the test set at strength "
            f"{place.strength:g}, seed {place.seed}: mend it, or leave this out"
        )
