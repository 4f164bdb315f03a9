"""What a sweep would do: cells, stages held and missing, programs, bytes and time."""

import json
from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh

from madjax import store
from madjax.attacks import Online
from madjax.batching import QUERIES
from madjax.config import Sweep, Task
from madjax.defenses import Defense
from madjax.models import Classifier
from madjax.sweep import cache, rates, stages
from madjax.sweep.cache import in_bytes
from madjax.sweep.grid import cell_id, expand
from madjax.sweep.keyring import Asked
from madjax.sweep.mesh import arranged, device_name, make_mesh, wave_size
from madjax.sweep.rates import Rates
from madjax.sweep.stages import Point
from madjax.sweep.stock import LARGEST_TRANSFER, Stock
from madjax.sweep.tasks import Opened, open_tasks
from madjax.sweep.trial import tried
from madjax.sweep.work import Group, grouped


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
    """For that, at the rates that were measured on this device; None where none was."""


@dataclass(frozen=True)
class Plan:
    """What a sweep would do; nothing of it has been computed.

    Stolen models are found in the cache by their transfer sets. A plan makes none of these: where
    the key of one does not tell it, its stolen model counts as missing.
    """

    name: str
    directory: str
    device: str
    cells: int
    missing: int
    stages: tuple[Stage, ...]
    programs: int
    """That are compiled for the stages, each once."""
    disk_bytes: int
    """That are added in the cache and the run's directory."""
    host_bytes: int
    """Of the data sets, and of the answers to the queries of the defence that has most of them."""
    device_bytes: int
    """That the arrays of the largest wave take on one device, without what XLA needs besides."""

    @property
    def seconds(self) -> float | None:
        """For the stages whose rates are known; None where none is."""
        known = [stage.seconds for stage in self.stages if stage.seconds is not None]
        return sum(known) if known else None

    def as_json(self) -> str:
        """All of it as one JSON object."""
        return json.dumps(asdict(self) | {"seconds": self.seconds}, indent=2)

    def summary(self) -> str:
        """One line: what is left to do, and how long that takes."""
        if not self.missing:
            return f"{self.name}: all {self.cells} cells have their row in {self.directory}"
        return (
            f"{self.name}: {self.missing} of {self.cells} cells to run on {self.device}, "
            f"{self.programs} programs, {in_bytes(self.host_bytes)} in memory, "
            f"{in_bytes(self.device_bytes)} on a device, {in_bytes(self.disk_bytes)} on disk, "
            f"{self._time()}"
        )

    def table(self) -> str:
        """The summary, and a line for each stage."""
        head = "stage", "needed", "held", "work of the others", "time"
        lines = [
            (
                stage.name,
                f"{stage.needed:,}",
                f"{stage.held:,}",
                f"{stage.amount:,} {stage.unit}",
                "not measured" if stage.seconds is None else _duration(stage.seconds),
            )
            for stage in self.stages
        ]
        widths = [max(map(len, column)) for column in zip(head, *lines, strict=True)]
        rows = (
            "  ".join(each.ljust(width) for each, width in zip(line, widths, strict=True)).rstrip()
            for line in (head, *lines)
        )
        return "\n".join((*rows, self.summary()) if lines else (self.summary(),))

    def _time(self) -> str:
        unknown = [stage.name for stage in self.stages if stage.seconds is None]
        if self.seconds is None or len(unknown) == len(self.stages):
            return "time not known, as nothing of the kind was measured here before"
        besides = f", besides {' and '.join(unknown)}" if unknown else ""
        return f"about {_duration(self.seconds)} and compiling{besides}"


def _duration(seconds: float) -> str:
    if seconds < 120:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 7200 else f"{seconds / 3600:.1f} h"


def plan(
    config: Sweep,
    directory: str | Path,
    *,
    data_dir: str | Path | None = None,
    cells_per_device: int | None = None,
    devices: Sequence[jax.Device] | None = None,
    devices_per_cell: int | None = None,
) -> Plan:
    """What `run` with the same arguments would do; nothing is trained or answered.

    Data sets are read, and the cache keeps images that had to be decoded.

    Raises:
        InputError: what `run` would refuse, but for the directory.
    """
    directory, mesh = Path(directory), make_mesh(devices)
    opened = open_tasks(config.tasks, data_dir, cache.folder())
    ahead = tried(config, opened)
    cells = {cell_id(cell, opened[cell.task].checksums): cell for cell in expand(config)}
    done = store.ids(directory)
    groups = grouped({i: cell for i, cell in cells.items() if i not in done}, config, ahead)
    kept = cache.open_cache({"device": device_name(mesh)})
    stock = Stock(opened, directory, mesh, kept, print, devices_per_cell)
    ways = cells_per_device, devices_per_cell
    return planned(config.name, len(cells), groups, stock, directory, mesh, *ways)


_ORDER = {
    name: i
    for i, name in enumerate(
        ("networks", "posteriors", "answers", "transfer sets", "stolen models", "online attackers")
    )
}


class Tally:
    """Adds up what groups of cells need, each result once."""

    def __init__(self, rates: Rates):
        self._rates = rates
        self._needed: dict[str, dict[Any, bool]] = {}
        self._amounts: dict[str, int] = {}
        self._seconds: dict[str, float | None] = {}
        self._units: dict[str, str] = {}
        self.programs: set[Any] = set()
        self.owners: set[Any] = set()
        self.answers: dict[Defense, dict[Any, int]] = defaultdict(dict)
        """Bytes of the answers to queries that are held while a defence is at work."""
        self.disk = self.device = 0

    def need(self, stage: str, unit: str, name: Any, held: bool, kind: str, amount: int) -> bool:
        """Count a result; whether it has to be made, and was not counted before."""
        counted = self._needed.setdefault(stage, {})
        self._units[stage] = unit
        new = name not in counted
        counted.setdefault(name, held)
        if held or not new:
            return False
        self._amounts[stage] = self._amounts.get(stage, 0) + amount
        took, before = self._rates.seconds(kind, amount), self._seconds.get(stage, 0.0)
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


def planned(
    name: str,
    cells: int,
    groups: Sequence[Group],
    stock: Stock,
    directory: Path,
    mesh: Mesh,
    per_device: int | None,
    per_cell: int | None,
) -> Plan:
    """The plan of the groups of a run that have no row yet."""
    tally = Tally(stock.pace)
    for group in groups:
        knows = _count_answers(group, stock, tally, mesh)
        _count_networks(group, stock, tally, knows)
        networks = group.parties.networks
        own = arranged(mesh, len(group.places), per_cell, networks)
        _count_cells(group, stock, tally, own, per_device)
    return Plan(
        name,
        str(directory),
        device_name(mesh),
        cells,
        sum(len(group.cells) for group in groups),
        tally.stages(),
        len(tally.programs),
        tally.disk,
        _data_bytes(stock.opened)
        + max((sum(held.values()) for held in tally.answers.values()), default=0),
        tally.device,
    )


def _count_networks(group: Group, stock: Stock, tally: Tally, knows: bool) -> None:
    """Victims, and what defences train where they have to answer."""
    for task, seed in [(task, None) for task in group.tasks] + group.owners * knows:
        owner = group.rule if seed is not None else None, task, seed
        if owner in tally.owners:  # as another attack of the same defence has it
            continue
        tally.owners.add(owner)
        for i, each in enumerate(stock.networks(group, task, seed)):
            name = each.name or (owner, i)
            if tally.need("networks", "examples", name, each.held, each.kind, each.amount):
                tally.disk += 2 * each.size  # in the cache, and in the run's directory


def _count_answers(group: Group, stock: Stock, tally: Tally, mesh: Mesh) -> bool:
    """Posteriors and answers, on the test set and to queries; whether any has to be made."""
    network, online = group.parties.network, isinstance(group.attack, Online)
    for task in group.tasks:
        _count_posteriors(stock, tally, network, task, stock.keys.tested(task))
    if online:
        return True
    knows = group.drawn is None
    for task, seed in group.owners:
        sets = [stock.keys.tested(task)]
        if group.drawn is not None:
            sets.append(stock.keys.queries(group, task, seed))
        places = [each for each in group.places if (each.task, each.seed) == (task, seed)]
        for asked in sets:
            made, size = 0, asked.count * group.parties.num_classes * 4
            for place in places:
                key = stock.keys.answers(group.rule, task, seed, asked, place.strength)
                kind = rates.answering(group.rule, network)
                name = key.digest or (group.rule, place, str(asked.inputs))
                if asked.sent is not None:
                    tally.answers[group.rule][name] = size
                if tally.need("answers", "queries", name, stock.kept.has(key), kind, asked.count):
                    made += 1
                    tally.disk += size
            if made:
                knows = True
                _count_posteriors(stock, tally, network, task, asked)
                rows = min(asked.size, QUERIES * mesh.size), asked.repeats
                tally.programs.add(("at_strengths", group.rule, network, rows, made))
    return knows


def _count_posteriors(
    stock: Stock, tally: Tally, network: Classifier, task: Task, asked: Asked
) -> None:
    key = stock.keys.posteriors(task, asked)
    name, kind = key.digest or (task, str(asked.inputs)), rates.knowing(network)
    if tally.need("posteriors", "images", name, stock.kept.has(key), kind, asked.size):
        tally.disk += asked.size * stock.opened[task].data.num_classes * 4
        tally.programs.add(("posterior", network, asked.size))


def _count_cells(
    group: Group, stock: Stock, tally: Tally, mesh: Mesh, per_device: int | None
) -> None:
    """Transfer sets and stolen models, and what a wave of them takes on a device."""
    attack, parties = group.attack, group.parties
    if isinstance(attack, Online):
        kind, steps = rates.online(attack, group.rule, parties.stolen), attack.steps
        for task, seed in group.owners:
            for strength in group.strengths:  # all of them, see `study`
                name = group.rule, attack, task, seed, strength
                tally.need("online attackers", "steps", name, False, kind, steps)
        tally.programs |= {(f, parties, attack, group.rule) for f in ("start", "advance", "judge")}
        return
    rule = group.rule if group.drawn is None else None
    for place in group.places if rule else ():
        key = stock.keys.transfer(group, place)
        kind = rates.collecting(attack, group.rule, parties.stolen)
        name = key.digest or (rule, attack, place)
        held, size = stock.kept.has(key), _transfer_bytes(group)
        if tally.need("transfer sets", "queries", name, held, kind, attack.budget):
            tally.disk += size * (size <= LARGEST_TRANSFER)
    kind = rates.stealing(parties.stolen, attack.recipe)
    for (place, budget), name in group.waiting.items():
        amount = attack.examples(budget) * attack.recipe.epochs
        held = rule is not None and stock.kept.has(stock.keys.stolen(group, place, budget, ()))
        if tally.need("stolen models", "examples", name, held, kind, amount):
            tally.disk += 4 * (2 * group.epochs + 2)  # accuracies and losses, queries, fidelity
    size = wave_size(len(group.places), mesh, per_device, parties.networks)
    settings = parties.stolen, attack.recipe, attack.examples(attack.budget)
    tally.programs |= {(f, *settings, size) for f in ("start", "advance")}
    tally.programs.add(("fidelity", parties.stolen, size))
    asking = ("begin", "proceed") if attack.rounds else ("begin",)
    tally.programs |= {(f, parties, attack, rule, size) for f in asking}
    cells = size // mesh.shape["cells"]
    tally.device = max(tally.device, _device_bytes(group, stock.opened, cells))


def _data_bytes(opened: Mapping[Task, Opened]) -> int:
    """What the data sets take, each once."""
    arrays = {}
    for each in opened.values():
        data = each.data
        held = [data.x_train, data.y_train, data.x_test, data.y_test]
        held += [array for own in each.sources.values() for array in (own.images, own.labels)]
        arrays |= {id(array): array.nbytes for array in held}
    return sum(arrays.values())


def _device_bytes(group: Group, opened: Mapping[Task, Opened], cells: int) -> int:
    """What the arrays of so many cells of a group, and what they share, take on a device."""
    attack, parties = group.attack, group.parties
    sources = {id(s): s for s in (opened[t].sources[attack.source] for t in group.tasks)}
    shared = sum(s.images.nbytes + s.labels.nbytes for s in sources.values())
    for task in group.tasks:
        data = opened[task].data
        shared += data.x_test.nbytes + len(data.x_test) * 4 * (1 + parties.num_classes)
    size = attack.examples(attack.budget)
    state = jax.eval_shape(
        partial(stages.start, parties.stolen, attack.recipe, size),
        Point(np.float32(0), np.uint32(0)),
        None,
    )
    each = _transfer_bytes(group) + sum(a.size * a.dtype.itemsize for a in jax.tree.leaves(state))
    return shared + cells * each


def _transfer_bytes(group: Group) -> int:
    """What a transfer set takes; one whose images are not foreseen as if all were synthetic."""
    attack, parties = group.attack, group.parties
    image = 1 if group.drawn is not None else int(np.prod(parties.network.image_shape))
    return 4 * (attack.examples(attack.budget) * image + attack.budget * parties.num_classes)
