"""From a config to rows: the pipeline around the grid.

What cells share is computed once (`stages`): a task's victim, its posteriors, and for every
defence and seed what the defence has prepared (for MAD the surrogate), its utility, and its answers
to the queries that an attack foresees, at all strengths. Then waves of cells, defence by defence
and attack by attack, collect transfer sets and train stolen models (`campaign`); a wave's rows are
written when it ends, and a checkpoint after each of its rounds and epochs.
"""

import time
from collections.abc import Callable, Iterable
from itertools import groupby
from pathlib import Path
from typing import Any, NamedTuple
from zlib import crc32

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P
from tqdm import tqdm

from madjax import store
from madjax.attacks import Attack, Online, keys
from madjax.config import Defended, Sweep, Task, describe
from madjax.datasets import Dataset, check_compatible, open_dataset
from madjax.defenses import Defense, Owner
from madjax.errors import InputError, in_one_line
from madjax.models import Classifier
from madjax.streams import stream
from madjax.sweep import stages
from madjax.sweep.campaign import Place, TransferCampaign, check_answers
from madjax.sweep.cells import Point, Program, Shared, make_mesh, waves
from madjax.sweep.grid import Cell, cell_id, expand
from madjax.sweep.online import OnlineCampaign, OnlineProgram
from madjax.sweep.rows import shared_facts
from madjax.sweep.victim import (
    Log,
    keeper,
    make_classifier,
    owner_of,
    train_victim,
)
from madjax.train import Recipe, State, start

Array = jax.Array


def run(
    config: Sweep,
    directory: str | Path,
    *,
    data_dir: str | Path | None = None,
    resume: bool = False,
    cells_per_device: int | None = None,
    log: Log = tqdm.write,
) -> list[dict[str, Any]]:
    """Run a sweep into a directory and return its rows, one dict a cell.

    Everything the user gave is checked before anything is computed or written. With resume, cells
    that have their row are left alone and a wave goes on from its last whole epoch or round; the
    config may have more cells than that of the run had. cells_per_device: how many cells of a wave
    a device trains; by default one on a CPU, so that rows come early, and all on an accelerator.

    Raises:
        InputError: see `open_dataset`, `store.open_run`, `Sweep` and `Attack.check`; data sets,
            architectures and budgets that do not fit each other; attackers that would train on the
            images they are judged by.
    """
    directory = Path(directory)
    opened = {task: _open(task, data_dir) for task in config.tasks}
    drawn = {
        (task, attack): _drawn(each, attack, config.seeds)
        for task, each in opened.items()
        for attack in config.attacks
    }
    programs = {
        (task, defended.rule, attack): _program(each, defended, attack, drawn[task, attack])
        for task, each in opened.items()
        for defended in config.defenses
        for attack in config.attacks
    }
    checksums = {task: each.checksums for task, each in opened.items()}
    cells = {cell_id(cell, checksums[cell.task]): cell for cell in expand(config)}
    description = describe(config) | {"data": list(checksums.values())}
    rows = store.open_run(directory, description, list(cells), resume=resume)
    done = {row["id"] for row in rows}
    missing = [(name, cell) for name, cell in cells.items() if name not in done]
    if not missing:
        store.discard(directory, "attack-*")
        log(f"{directory}: all cells are done")
        return rows

    mesh = make_mesh()
    epochs = sum(programs[cell.task, cell.rule, cell.attack].laps for _, cell in missing)
    with tqdm(total=epochs, unit="epoch", desc="attackers", disable=None) as bar:
        for task, of_task in groupby(missing, lambda named: named[1].task):
            own = opened[task]
            keep = keeper(directory, task, own.victim, own.data, log)
            owner = owner_of(task, own.victim, own.data, keep)
            state = train_victim(owner)
            judged = _judge(own.victim, state.params, own.data)
            facts = shared_facts(config, description, own.data, state, mesh)
            for rule, of_rule in groupby(of_task, lambda named: named[1].rule):
                waiting = {
                    attack: dict(group)
                    for attack, group in groupby(of_rule, lambda named: named[1].attack)
                }
                seeds = tuple(dict.fromkeys(c.seed for g in waiting.values() for c in g.values()))
                strengths = next(each.strengths for each in config.defenses if each.rule == rule)
                known = _prepare(rule, strengths, seeds, owner, log)
                useful = _useful(rule, own.victim, known, judged, waiting)
                for attack, cells in waiting.items():
                    program, source = programs[task, rule, attack], own.sources[attack.source]
                    sent = drawn[task, attack]
                    told = _told(program, sent, state.params, known, source, cells, log)
                    of_seeds = jax.tree.map(lambda *leaves: jnp.stack(leaves), *known.values())
                    images, labels = source.images, source.labels
                    shared = Shared(state.params, of_seeds, images, labels, **judged)
                    shared = jax.device_put(shared, NamedSharding(mesh, P()))
                    online = isinstance(program, OnlineProgram)
                    # Each online cell is held against the one of its seed at strength 0.
                    every = [(strength, seed) for seed in seeds for strength in strengths]
                    waiting_at = {(cell.strength, cell.seed) for cell in cells.values()}
                    places = [place for place in every if online or place in waiting_at]
                    kind = OnlineCampaign if online else TransferCampaign
                    campaign = kind(
                        program, cells, shared, useful, mesh, directory, facts, rows, bar, log
                    )
                    size = _wave_size(program, len(places), mesh.size, cells_per_device)
                    for i, (_, stacked) in enumerate(waves(_points(places, seeds, told), size)):
                        campaign.run(places[i * size : (i + 1) * size], stacked)
    store.discard(directory, "attack-*")  # of waves that were stopped after their last row
    return rows


def _points(
    places: Iterable[Place], seeds: tuple[int, ...], told: dict[Place, np.ndarray]
) -> list[Point]:
    """Places as numbers, with the position of the seed in what the cells share."""
    return [
        Point(np.float32(e), np.uint32(s), np.int32(seeds.index(s)), told.get((e, s)))
        for e, s in places
    ]


def _wave_size(program: Program, cells: int, devices: int, per_device: int | None) -> int:
    """How many cells are trained side by side; see `run`.

    Online cells all go together, as each is held against the one of its seed at strength 0.
    """
    everything = -(-cells // devices)
    one_by_one = jax.default_backend() == "cpu" and not isinstance(program, OnlineProgram)
    wanted = per_device or (1 if one_by_one else everything)
    return devices * min(wanted, everything)


class _Source(NamedTuple):
    """Images that an attacker may own, with their classes."""

    images: np.ndarray
    labels: np.ndarray
    num_labels: int


class _Opened(NamedTuple):
    """A task with its data and its victim's network, which fit each other."""

    task: Task
    data: Dataset
    sources: dict[str, _Source]
    victim: Classifier
    checksums: dict[str, int]


def _open(task: Task, data_dir: str | Path | None) -> _Opened:
    data = open_dataset(task.dataset, data_dir)
    sources = _sources(task, data, data_dir)
    victim = make_classifier(task.architecture, data, "victim")
    asked = sources["queryset"]
    sums = {"dataset": data.checksum(), "queryset": crc32(asked.labels, crc32(asked.images))}
    return _Opened(task, data, sources, victim, sums)


Drawn = dict[int, np.ndarray] | None
"""For every seed the own images that an attack sends, in order; None where that cannot be told."""


def _drawn(opened: _Opened, attack: Attack, seeds: tuple[int, ...]) -> Drawn:
    data, own = opened.data, opened.sources[attack.source]
    stolen = make_classifier(attack.architecture, data, "attacker")
    attack.check(len(own.images), data.num_classes, data.image_shape)
    found = {}
    for seed in seeds:
        try:
            drawn = stages.foreseen(attack, seed, *own, data.num_classes, stolen, data.family)
        except Exception:  # which the rehearsal meets again, and tells in one line
            return None
        if drawn is None:
            return None
        found[seed] = drawn
    return found


def _program(opened: _Opened, defended: Defended, attack: Attack, drawn: Drawn) -> Program:
    """The functions of the cells of one task, defence and attack, which are tried on shapes."""
    data, own = opened.data, opened.sources[attack.source]
    stolen = make_classifier(attack.architecture, data, "attacker")
    kind = OnlineProgram if isinstance(attack, Online) else Program
    networks = opened.victim, stolen, data.family
    program = kind(*networks, defended.rule, attack, data.num_classes, own.num_labels)
    _rehearse(opened, program, defended, drawn)
    return program


def _rehearse(opened: _Opened, program: Program, defended: Defended, drawn: Drawn) -> None:
    """Trace what the cells will do, on shapes alone: what fails does so before any work."""
    data, own = opened.data, opened.sources[program.attack.source]
    network, rule = program.network, defended.rule

    def untrained(name: str, recipe: Recipe, key: Array, train: Callable[..., State]) -> State:
        del name, train
        return start(network, recipe, len(data.x_train), key)

    def everything(key: Array, images: Array, tests: Array) -> None:
        params = network.init(key)
        owner = owner_of(opened.task, network, data, untrained)
        known = rule.prepare(owner, key, defended.strengths)
        y = jnp.ones((len(tests), data.num_classes))
        query = jnp.arange(len(tests)), tests, y
        stages.at_strengths(rule, network, known, key, query, jnp.ones(1))
        shared = Shared(
            params,
            jax.tree.map(lambda a: a[None], known),
            images,
            jnp.zeros(len(images), jnp.int32),
            tests,
            jnp.zeros(len(tests), jnp.int32),
            y,
        )
        told = drawn and jnp.ones((program.attack.budget, data.num_classes))
        program.rehearse(Point(jnp.float32(0), jnp.uint32(0), jnp.int32(0), told), shared)

    shapes = (
        jax.ShapeDtypeStruct((n, *data.image_shape), jnp.uint8)
        for n in (len(own.images), len(data.x_test))
    )
    try:
        jax.eval_shape(everything, jax.random.key(0), *shapes)
    except InputError:
        raise
    except Exception as error:
        raise InputError(
            f"the defence {rule} or the attack {program.attack.label} fails on these "
            f"data ({in_one_line(error)}): choose another, or mend it"
        ) from error


def _sources(task: Task, victim: Dataset, data_dir: str | Path | None) -> dict[str, _Source]:
    """The images that attackers may own: the query set, and the victim's training images."""
    queryset = open_dataset(task.queryset, data_dir)
    check_compatible(victim, queryset)
    if not len(victim.x_test):
        raise InputError(f"data set {victim.name} has no test images: nothing can be evaluated")
    if "test" in task.query_splits:
        _check_apart(victim, queryset)
    splits = {
        "train": (queryset.x_train, queryset.y_train),
        "test": (queryset.x_test, queryset.y_test),
    }
    images, labels = (
        np.concatenate(each) for each in zip(*map(splits.get, task.query_splits), strict=True)
    )
    return {
        "queryset": _Source(images, labels, queryset.num_classes),
        "dataset": _Source(victim.x_train, victim.y_train, victim.num_classes),
    }


def _check_apart(victim: Dataset, queryset: Dataset) -> None:
    """Refuse test images of the victim as queries: stolen models would train on their own test.

    A few that two sets happen to share, up to one in a hundred, are no concern.
    """
    asked = {image.tobytes() for image in queryset.x_test}
    both = sum(image.tobytes() in asked for image in victim.x_test)
    if both > len(victim.x_test) / 100:
        raise InputError(
            f"{both} of the {len(victim.x_test)} test images of {victim.name}, by which stolen "
            f"models are judged, are in the test part of the query set {queryset.name}: give "
            "query_splits=('train',), or another queryset"
        )


def _judge(victim: Classifier, params: Any, data: Dataset) -> dict[str, Any]:
    """The fields of `Shared` by which defences and stolen models are judged."""
    return {
        "test_images": data.x_test,
        "test_labels": data.y_test,
        "test_posteriors": np.asarray(stages.victim_posteriors(victim, params, data.x_test)),
    }


def _prepare(
    rule: Defense, strengths: tuple[float, ...], seeds: tuple[int, ...], owner: Owner, log: Log
) -> dict[int, Any]:
    """What a defence knows, for each seed."""
    began = time.perf_counter()
    known = {seed: rule.prepare(owner, keys(seed)["surrogate"], strengths) for seed in seeds}
    jax.block_until_ready(known)
    log(f"{rule.label}: prepared in {time.perf_counter() - began:.1f} s")
    return known


def _useful(
    rule: Defense,
    network: Classifier,
    known: dict[int, Any],
    judged: dict[str, Any],
    waiting: dict[Attack, dict[str, Cell]],
) -> dict[Place, dict[str, float]]:
    """The utility of a defence on the test set, at the strengths and seeds of cells by attack.

    Not against online attackers, which it sees change with every step.
    """
    cells = [c for a, named in waiting.items() if not isinstance(a, Online) for c in named.values()]
    images, labels, y = (judged[f"test_{name}"] for name in ("images", "labels", "posteriors"))
    found = {}
    for seed, own in known.items():
        key = stream(keys(seed)["defense"], "tests")
        strengths = tuple(dict.fromkeys(c.strength for c in cells if c.seed == seed))
        if not strengths:
            continue
        told = stages.answers(rule, network, own, key, images, y, strengths)
        measured = jax.device_get(stages.utility(y, told, labels))
        for i, strength in enumerate(strengths):
            found[strength, seed] = {name: values[i] for name, values in measured.items()}
            check_answers(rule, strength, seed, found[strength, seed]["l1_mean"])
    return found


def _told(
    program: Program,
    drawn: Drawn,
    victim: Any,
    known: dict[int, Any],
    own: _Source,
    cells: dict[str, Cell],
    log: Log,
) -> dict[Place, np.ndarray]:
    """The answers to an attack's queries at the strengths and seeds of its cells, if foreseen."""
    if drawn is None:
        return {}
    began = time.perf_counter()
    found = {}
    for seed in dict.fromkeys(cell.seed for cell in cells.values()):
        images = own.images[drawn[seed]]
        y = np.asarray(stages.victim_posteriors(program.network, victim, images))
        strengths = tuple(dict.fromkeys(c.strength for c in cells.values() if c.seed == seed))
        key, rule = keys(seed)["defense"], program.defense
        told = stages.answers(rule, program.network, known[seed], key, images, y, strengths)
        found |= {(strength, seed): each for strength, each in zip(strengths, told, strict=True)}
    log(
        f"{program.label}: {len(found)} x {program.attack.budget:,} queries answered in "
        f"{time.perf_counter() - began:.1f} s"
    )
    return found
