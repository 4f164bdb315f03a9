"""What a sweep would do: cells, stages held and missing, programs, bytes and time."""

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path

import jax
from jax.sharding import Mesh

from madjax import backend, store
from madjax.attacks import Online
from madjax.batching import QUERIES
from madjax.config import Sweep, Task
from madjax.datasets import Dataset
from madjax.errors import InputError
from madjax.models import Classifier
from madjax.sweep import cache, load, rates
from madjax.sweep.cache import in_bytes
from madjax.sweep.grid import cell_id, expand
from madjax.sweep.keyring import Asked
from madjax.sweep.load import transfer_bytes, wave_of
from madjax.sweep.mesh import Machine, arranged, device_name, make_mesh
from madjax.sweep.progress import Progress
from madjax.sweep.stock import LARGEST_TRANSFER, Stock
from madjax.sweep.tally import Stage, Tally, Work, measured, supposed
from madjax.sweep.tasks import Opened, open_tasks
from madjax.sweep.trial import tried
from madjax.sweep.work import Group, grouped


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
    """That the largest wave of stolen models takes on one device, as far as is foreseen: its
    arrays, and what a training step holds for its gradient."""
    device_memory: float | None
    """Bytes that each device has; None where it does not say."""

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
            f"{in_bytes(self.device_bytes)} on a device{self._too_much()}, "
            f"{in_bytes(self.disk_bytes)} on disk, {self._time()}"
        )

    def _too_much(self) -> str:
        if self.device_memory is None or self.device_bytes <= self.device_memory:
            return ""
        return f" (which has {in_bytes(self.device_memory)})"

    def table(self) -> str:
        """The summary, and a line for each stage."""
        head = "stage", "needed", "held", "work of the others", "time"
        lines = [
            (
                stage.name,
                f"{stage.needed:,}",
                f"{stage.held:,}",
                f"{stage.amount:,} {stage.unit}",
                "not measured" if stage.seconds is None else duration(stage.seconds),
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
            return "time not known, as nothing of the kind was measured before"
        besides = f", besides {' and '.join(unknown)}" if unknown else ""
        return f"about {duration(self.seconds)} and compiling{besides}"


def duration(seconds: float) -> str:
    """Seconds for people, in a unit that suits them."""
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
    datasets: Mapping[str, Dataset] | None = None,
    memory: float | None = None,
    machine: Machine | None = None,
) -> Plan:
    """What `run` with the same arguments would do; nothing is trained or answered.

    Data sets are read, and the cache keeps images that had to be decoded. memory: see `run`; cells
    that need more are no error here. machine: what the plan is for, in place of the devices that
    are here. It has none of this machine's cache. Its times are those of the operations of the
    networks alone, at the rate that it is said to reach; what a defence makes of an answer, and
    online attackers, are not in them.

    Raises:
        InputError: what `run` would refuse, but for the directory and what has no room on a device;
            memory beside a machine.
    """
    if machine is not None and memory is not None:
        raise InputError(f"memory is {memory}: the machine says its own, leave memory out")
    directory, mesh = Path(directory), machine.mesh if machine else make_mesh(devices)
    opened = open_tasks(config.tasks, data_dir, cache.folder(), datasets)
    ahead = tried(config, opened)
    cells = {cell_id(cell, opened[cell.task].checksums): cell for cell in expand(config)}
    done = store.ids(directory)
    groups = grouped({i: cell for i, cell in cells.items() if i not in done}, config, ahead)
    kept = cache.open_cache({"device": machine.label if machine else device_name(mesh)})
    if machine is not None:
        kept, memory = replace(kept, folder=None), machine.memory
    stock = Stock(opened, directory, mesh, kept, Progress(None), memory, devices_per_cell)
    ways = cells_per_device, devices_per_cell
    with backend.traced_for(machine and machine.platform):
        return planned(config.name, len(cells), groups, stock, directory, mesh, *ways, machine)


def planned(
    name: str,
    cells: int,
    groups: Sequence[Group],
    stock: Stock,
    directory: Path,
    mesh: Mesh,
    per_device: int | None,
    per_cell: int | None,
    machine: Machine | None = None,
) -> Plan:
    """The plan of the groups of a run that have no row yet."""
    tally = Tally(supposed(machine) if machine else measured(stock.pace))
    for group in groups:
        knows = _count_answers(group, stock, tally, mesh)
        _count_networks(
            group, stock, tally, knows, arranged(mesh, 1, per_cell, [group.parties.network])
        )
        own = arranged(mesh, len(group.places), per_cell, group.parties.networks)
        _count_cells(group, stock, tally, own, per_device)
    return Plan(
        name,
        str(directory),
        machine.label if machine else device_name(mesh),
        cells,
        sum(len(group.cells) for group in groups),
        tally.stages(),
        len(tally.programs),
        tally.disk,
        _data_bytes(stock.opened)
        + max((sum(held.values()) for held in tally.answers.values()), default=0),
        tally.device,
        stock.memory,
    )


def _count_networks(group: Group, stock: Stock, tally: Tally, knows: bool, mesh: Mesh) -> None:
    """Victims, and what defences train where they have to answer."""
    for task, seed in [(task, None) for task in group.tasks] + group.owners * knows:
        owner = group.rule if seed is not None else None, task, seed
        if owner in tally.owners:  # as another attack of the same defence has it
            continue
        tally.owners.add(owner)
        trained, _ = stock.foreseen(group, task, seed)
        for i, each in enumerate(trained):
            name = each.name or (owner, i)
            operations = partial(load.learning, group.parties.network)
            work = Work(each.kind, operations, mesh.shape["data"])
            if tally.need("networks", "examples", name, each.held, work, each.amount):
                tally.disk += 2 * each.size  # in the cache, and in the run's directory


def _count_answers(group: Group, stock: Stock, tally: Tally, mesh: Mesh) -> bool:
    """Posteriors and answers, on the test set and to queries; whether any has to be made."""
    network, online = group.parties.network, isinstance(group.attack, Online)
    for task in group.tasks:
        _count_posteriors(stock, tally, network, task, stock.keys.tested(task), mesh)
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
                name = key.digest or (group.rule, place, str(asked.inputs))
                if asked.sent is not None:
                    tally.answers[group.rule][name] = size
                # What the defence has to know of an image is the same at all strengths.
                share = 0 if made else asked.size / asked.count
                operations = partial(_answering, stock, tally, group, share)
                work = Work(rates.answering(group.rule, network), operations, mesh.size)
                if tally.need("answers", "queries", name, stock.kept.has(key), work, asked.count):
                    made += 1
                    tally.disk += size
            if made:
                knows = True
                _count_posteriors(stock, tally, network, task, asked, mesh)
                rows = min(asked.size, QUERIES * mesh.size), asked.repeats
                tally.programs.add(("at_strengths", group.rule, network, rows, made))
    return knows


def _answering(stock: Stock, tally: Tally, group: Group, share: float = 1) -> float:
    """Operations for what the defence of a group has to know of that share of its queries."""
    if not share:
        return 0.0
    defended = group.rule, group.parties.network
    if defended not in tally.operations:
        _, known = stock.foreseen(group, *group.owners[0])
        tally.operations[defended] = load.answering(*defended, known)
    return share * tally.operations[defended]


def _count_posteriors(
    stock: Stock, tally: Tally, network: Classifier, task: Task, asked: Asked, mesh: Mesh
) -> None:
    key = stock.keys.posteriors(task, asked)
    name = key.digest or (task, str(asked.inputs))
    work = Work(rates.knowing(network), partial(load.knowing, network), mesh.size)
    if tally.need("posteriors", "images", name, stock.kept.has(key), work, asked.size):
        tally.disk += asked.size * stock.opened[task].data.num_classes * 4
        tally.programs.add(("posterior", network, min(asked.size, QUERIES * mesh.size)))


def _count_cells(
    group: Group,
    stock: Stock,
    tally: Tally,
    mesh: Mesh,
    per_device: int | None,
) -> None:
    """Transfer sets and stolen models, and what a wave of them takes on a device."""
    attack, parties = group.attack, group.parties
    if isinstance(attack, Online):
        work, steps = Work(rates.online(attack, group.rule, parties.stolen)), attack.steps
        for task, seed in group.owners:
            for strength in group.strengths:  # all of them, see `study`
                name = group.rule, attack, task, seed, strength
                tally.need("online attackers", "steps", name, False, work, steps)
        tally.programs |= {(f, parties, attack, group.rule) for f in ("start", "advance", "judge")}
        return
    memory = stock.memory
    size = wave_of(group, stock.opened, mesh, per_device, memory)
    cells = size // mesh.shape["cells"]
    turns = -(-len(group.places) // size) * cells  # of each device, copies that fill up included
    busy = len(group.places) / turns * mesh.shape["data"]
    rule = group.rule if group.drawn is None else None
    for place in group.places if rule else ():
        key = stock.keys.transfer(group, place)
        kind = rates.collecting(attack, group.rule, parties.stolen)
        work = Work(kind, partial(_collecting, stock, tally, group), busy)
        name = key.digest or (rule, attack, place)
        held, takes = stock.kept.has(key), transfer_bytes(group)
        if tally.need("transfer sets", "queries", name, held, work, attack.budget):
            tally.disk += takes * (takes <= LARGEST_TRANSFER)
    kind = rates.stealing(parties.stolen, attack.recipe)
    work = Work(kind, partial(load.learning, parties.stolen), busy)
    for (place, budget), name in group.waiting.items():
        epochs = attack.recipe.epochs
        amount = attack.examples(budget) * epochs
        held = rule is not None and stock.kept.has(stock.keys.stolen(group, place, budget, ()))
        if tally.need("stolen models", "examples", name, held, work, amount):
            tally.disk += 4 * (2 * epochs + 2)  # accuracies and losses, queries, fidelity
    settings = parties.stolen, attack.recipe, attack.examples(attack.budget)
    part = load.at_once(group, stock.opened, mesh, cells, memory)
    epoch = ("advance",) if part is None else ("visited", "advance_part", "judged")
    tally.programs |= {(f, *settings, size) for f in ("start", *epoch)}
    tally.programs.add(("fidelity", parties.stolen, size))
    asking = ("begin", "proceed") if attack.rounds else ("begin",)
    tally.programs |= {(f, parties, attack, rule, size) for f in asking}
    tally.device = max(tally.device, load.taken(group, stock.opened, mesh, cells, memory))


def _collecting(stock: Stock, tally: Tally, group: Group) -> float:
    """Operations for a query of an attacker who meets the defence."""
    own = load.collecting(group.attack, group.parties.stolen)
    return load.knowing(group.parties.network) + _answering(stock, tally, group) + own


def _data_bytes(opened: Mapping[Task, Opened]) -> int:
    """What the data sets take, each once."""
    arrays = {}
    for each in opened.values():
        data = each.data
        held = [data.x_train, data.y_train, data.x_test, data.y_test]
        held += [array for own in each.sources.values() for array in (own.images, own.labels)]
        arrays |= {id(array): array.nbytes for array in held}
    return sum(arrays.values())
