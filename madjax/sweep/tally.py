"""What the groups of a plan need, added up: each result once."""

from collections import defaultdict
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NamedTuple

from madjax.defenses import Defense
from madjax.sweep.mesh import Machine
from madjax.sweep.rates import Rates

_ORDER = {
    name: i
    for i, name in enumerate(
        ("networks", "posteriors", "answers", "transfer sets", "stolen models", "online attackers")
    )
}


@dataclass(frozen=True)
class Stage:
    """One kind of result that the cells without a row need."""

    name: str
    needed: int
    held: int
    """Of these, in the cache or in the run's directory."""
    amount: int
    """What the others take, in `unit`."""
    unit: str
    seconds: float | None
    """For that, at the rates that were measured on this device, or at those of a `Machine`; None
    where they are not known."""


class Work(NamedTuple):
    """How long a unit of work takes is told by one of these."""

    kind: str
    """See `rates`."""
    operations: Callable[[], float] | None = None
    """For each unit, see `load`; None: not known."""
    devices: float = 1
    """That are busy with it, all the time."""


Pace = Callable[[Work, int], float | None]
"""(work, amount) -> seconds; None where they are not known."""


def measured(rates: Rates) -> Pace:
    """As this machine was before."""
    return lambda work, amount: rates.seconds(work.kind, amount)


def supposed(machine: Machine) -> Pace:
    """As a machine would be that reaches what it is said to."""

    def seconds(work: Work, amount: int) -> float | None:
        if work.operations is None:
            return None
        return amount * work.operations() / (machine.flops * work.devices)

    return seconds


class Tally:
    """Adds up what groups of cells need, each result once."""

    def __init__(self, pace: Pace):
        self._pace = pace
        self._needed: dict[str, dict[Any, bool]] = {}
        self._amounts: dict[str, int] = {}
        self._seconds: dict[str, float | None] = {}
        self._units: dict[str, str] = {}
        self.programs: set[Any] = set()
        self.owners: set[Any] = set()
        self.answers: dict[Defense, dict[Any, int]] = defaultdict(dict)
        """Bytes of the answers to queries that are held while a defence is at work."""
        self.operations: dict[Any, float] = {}
        """Of a defence with a network, for a query: counting them takes a while."""
        self.disk = self.device = 0

    def need(self, stage: str, unit: str, name: Any, held: bool, work: Work, amount: int) -> bool:
        """Count a result; whether it has to be made, and was not counted before."""
        counted = self._needed.setdefault(stage, {})
        self._units[stage] = unit
        new = name not in counted
        counted.setdefault(name, held)
        if held or not new:
            return False
        self._amounts[stage] = self._amounts.get(stage, 0) + amount
        took, before = self._pace(work, amount), self._seconds.get(stage, 0.0)
        self._seconds[stage] = None if took is None or before is None else before + took
        return True

    def stages(self) -> tuple[Stage, ...]:
        """All that was counted, in the order of the pipeline."""
        return tuple(
            Stage(
                stage,
                len(counted),
                sum(counted.values()),
                self._amounts.get(stage, 0),
                self._units[stage],
                self._seconds.get(stage, 0.0),
            )
            for stage, counted in sorted(self._needed.items(), key=lambda each: _ORDER[each[0]])
        )
