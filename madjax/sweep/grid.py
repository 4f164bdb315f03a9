"""The grid as values: a sweep's cells, and what tells each from every other."""

from collections.abc import Mapping
from dataclasses import dataclass

from madjax.attacks import Attack
from madjax.config import Sweep, Task, describe, digest
from madjax.defenses import Defense


@dataclass(frozen=True)
class Cell:
    """One row of a sweep: a stolen model, and the defended victim that it was stolen from."""

    task: Task
    rule: Defense
    strength: float
    attack: Attack
    budget: int
    seed: int

    @property
    def label(self) -> str:
        """The cell in messages."""
        return (
            f"{self.task.label}, {self.rule.label} against {self.attack.label}, budget "
            f"{self.budget:,}, strength {self.strength:g}, seed {self.seed}"
        )


def expand(sweep: Sweep) -> list[Cell]:
    """All cells, seed by seed within a defence and attack, so that whole curves come early."""
    return [
        Cell(task, defended.rule, strength, attack, budget, seed)
        for task in sweep.tasks
        for defended in sweep.defenses
        for attack in sweep.attacks
        for seed in sweep.seeds
        for strength in defended.strengths
        for budget in sweep.budgets_of(attack)
    ]


def cell_id(cell: Cell, checksums: Mapping[str, int]) -> str:
    """Twelve hexadecimal digits that change with anything that determines the cell's row.

    checksums are of the images and labels behind the names in the task: names do not change when
    what is behind them does. How a sweep is run is no part of it: devices, waves and other cells.
    """
    return digest({"cell": describe(cell), "data": dict(checksums)})
