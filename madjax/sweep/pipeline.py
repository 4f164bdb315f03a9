"""From a config to rows: the pipeline around the grid.

What cells share is computed once: a task's victim, its posteriors, and for every defence and seed
what the defence has prepared (for MAD the surrogate) and its evidence (for MAD the Gram matrices),
which no strength enters, for the test set and for queries that an attack foresees. Then waves of
cells, defence by defence and attack by attack, collect transfer sets and train stolen models
(`campaign`); a wave's rows are written when it ends, and a checkpoint after each of its rounds and
epochs.
"""

import time
from collections.abc import Callable, Iterable
from functools import partial
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
from madjax.batching import map_chunks
from madjax.config import Defended, Sweep, Task, describe
from madjax.datasets import Dataset, check_compatible, open_dataset
from madjax.defenses import Defense, Owner
from madjax.errors import InputError, in_one_line
from madjax.models import Classifier
from madjax.sweep.campaign import Place, TransferCampaign
from madjax.sweep.cells import Point, Program, Shared, make_mesh, waves
from madjax.sweep.grid import cell_id, expand
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
    programs = {
        (task, defended.rule, attack): _program(each, defended, attack)
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
                needed = any(programs[task, rule, attack].needs_evidence for attack in waiting)
                known, evidence = _prepare(rule, strengths, seeds, owner, judged, needed, log)
                for attack, cells in waiting.items():
                    program, source = programs[task, rule, attack], own.sources[attack.source]
                    attacked = _share(program, seeds, state.params, known, source, log)
                    shared = Shared(**attacked, **judged, test_evidence=evidence)
                    shared = jax.device_put(shared, NamedSharding(mesh, P()))
                    online = isinstance(program, OnlineProgram)
                    # Online cells each are held against the one of their seed at strength 0.
                    every = [(strength, seed) for seed in seeds for strength in strengths]
                    waiting_at = {(cell.strength, cell.seed) for cell in cells.values()}
                    places = [place for place in every if online or place in waiting_at]
                    kind = OnlineCampaign if online else TransferCampaign
                    campaign = kind(program, cells, shared, mesh, directory, facts, rows, bar, log)
                    size = _wave_size(program, len(places), mesh.size, cells_per_device)
                    for i, (_, stacked) in enumerate(waves(_points(places, seeds), size)):
                        campaign.run(places[i * size : (i + 1) * size], stacked)
    store.discard(directory, "attack-*")  # of waves that were stopped after their last row
    return rows


def _points(places: Iterable[Place], seeds: tuple[int, ...]) -> list[Point]:
    """Places as numbers, with the position of the seed in what the cells share."""
    return [Point(np.float32(e), np.uint32(s), np.int32(seeds.index(s))) for e, s in places]


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


def _program(opened: _Opened, defended: Defended, attack: Attack) -> Program:
    """The functions of the cells of one task, defence and attack, which are tried on shapes."""
    data, own = opened.data, opened.sources[attack.source]
    stolen = make_classifier(attack.architecture, data, "attacker")
    attack.check(len(own.images), data.num_classes, data.image_shape)
    kind = OnlineProgram if isinstance(attack, Online) else Program
    networks = opened.victim, stolen, data.family
    program = kind(*networks, defended.rule, attack, data.num_classes, own.num_labels)
    _rehearse(opened, program, defended)
    return program


def _rehearse(opened: _Opened, program: Program, defended: Defended) -> None:
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
        known = jax.tree.map(lambda a: a[None], known)
        shared = Shared(
            params,
            known,
            images,
            jnp.zeros(len(images), jnp.int32),
            *_foreseen(program, (0,), params, known, images),
            tests,
            jnp.zeros(len(tests), jnp.int32),
            jnp.ones((len(tests), data.num_classes)),
            _evidence(rule, network, known, [tests]),
        )
        program.rehearse(Point(jnp.float32(0), jnp.uint32(0), jnp.int32(0)), shared)

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


def _judge(victim: Classifier, params: Any, data: Dataset) -> dict[str, Array]:
    """The fields of `Shared` by which defences and stolen models are judged."""
    images = jnp.asarray(data.x_test)
    return {
        "test_images": images,
        "test_labels": jnp.asarray(data.y_test),
        "test_posteriors": _posteriors(victim, params, images),
    }


def _prepare(
    rule: Defense,
    strengths: tuple[float, ...],
    seeds: tuple[int, ...],
    owner: Owner,
    judged: dict[str, Array],
    needed: bool,
    log: Log,
) -> tuple[Any, Any]:
    """What a defence knows and its evidence of the test set, each with a leading axis of seeds.

    The evidence only where it is needed, else None.
    """
    began = time.perf_counter()
    each = [rule.prepare(owner, keys(seed)["surrogate"], strengths) for seed in seeds]
    known = jax.tree.map(lambda *leaves: jnp.stack(leaves), *each)
    tests = [judged["test_images"]] * len(seeds) if needed else []
    evidence = jax.block_until_ready(_evidence(rule, owner.classifier, known, tests))
    log(f"{rule.label}: prepared in {time.perf_counter() - began:.1f} s")
    return known, evidence


def _share(
    program: Program, seeds: tuple[int, ...], victim: Any, known: Any, own: _Source, log: Log
) -> dict[str, Any]:
    """The fields of `Shared` that belong to one attack's images."""
    began = time.perf_counter()
    images, labels = jnp.asarray(own.images), jnp.asarray(own.labels)
    posteriors, evidence = _foreseen(program, seeds, victim, known, images)
    if posteriors is not None:
        jax.block_until_ready((posteriors, evidence))
        log(
            f"{program.label}: {len(seeds)} x {program.attack.budget:,} queries "
            f"prepared in {time.perf_counter() - began:.1f} s"
        )
    return {
        "victim": victim,
        "known": known,
        "images": images,
        "labels": labels,
        "posteriors": posteriors,
        "evidence": evidence,
    }


def _foreseen(
    program: Program, seeds: tuple[int, ...], victim: Any, known: Any, images: Array
) -> tuple[Array | None, Any]:
    """Posteriors of the attacker's images and evidence of each seed's queries, if foreseen."""
    drawn = [program.attack.foreseen(keys(seed)["draw"], len(images)) for seed in seeds]
    if drawn[0] is None:
        return None, None
    evidence = _evidence(program.defense, program.network, known, [images[each] for each in drawn])
    return _posteriors(program.network, victim, images), evidence


def _posteriors(network: Classifier, params: Any, images: Array) -> Array:
    return jax.jit(lambda params, x: map_chunks(partial(network.posterior, params), x, 250))(
        params, images
    )


def _evidence(defense: Defense, network: Classifier, known: Any, images: list[Array]) -> Any:
    """Evidence of the i-th images by what is known for the i-th seed, with a leading axis for i."""
    each = [
        defense.evidence(network.apply, jax.tree.map(lambda a, i=i: a[i], known), x)
        for i, x in enumerate(images)
    ]
    return jax.tree.map(lambda *leaves: jnp.stack(leaves), *each) if each else None
