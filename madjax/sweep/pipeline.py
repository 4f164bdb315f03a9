"""From a config to rows: the pipeline around the grid.

What cells share is computed once: the victim, its posteriors, and for every defence and seed what
the defence has prepared (for MAD the surrogate) and its evidence (for MAD the Gram matrices), which
no strength enters, for the test set and for queries that an attack foresees. Then waves of cells,
defence by defence and attack by attack, collect transfer sets and train stolen models
(`campaign`); a wave's rows are written when it ends, and a checkpoint after each of its rounds and
epochs.
"""

import time
from collections.abc import Callable
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
from madjax.config import Sweep, describe
from madjax.datasets import Dataset, base_name, check_compatible, open_dataset
from madjax.defenses import Defense, Owner
from madjax.errors import InputError, in_one_line
from madjax.models import Classifier
from madjax.sweep.campaign import TransferCampaign, budgets_of
from madjax.sweep.cells import Cell, Program, Shared, make_mesh, waves
from madjax.sweep.online import OnlineCampaign, OnlineProgram
from madjax.sweep.rows import identity, identity_of_row, shared_facts
from madjax.sweep.victim import (
    Log,
    keeper,
    make_classifier,
    owner_of,
    train_victim,
)
from madjax.train import Recipe, State, start

Array = jax.Array


def grid(config: Sweep, defense: Defense) -> list[Cell]:
    """All cells of a defence, seed by seed, so that a sweep stopped early has whole curves."""
    return [
        Cell(np.float32(e), np.uint32(s), np.int32(i))
        for i, s in enumerate(config.seeds)
        for e in config.strengths_of(defense)
    ]


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
    that have their row are left alone and a wave goes on from its last whole epoch or round.
    cells_per_device: how many cells of a wave a device trains; by default one on a CPU, so that
    rows come early, and all on an accelerator.

    Raises:
        InputError: see `open_dataset`, `store.open_run`, `Sweep` and `Attack.check`; data sets,
            architectures and budgets that do not fit each other.
    """
    directory = Path(directory)
    data = open_dataset(config.dataset, data_dir)
    sources = _sources(config, data, data_dir)
    victim = make_classifier(config.architecture, data, "victim")
    programs = [
        _program(config, victim, defense, attack, data, sources)
        for defense in config.defenses
        for attack in config.attacks
    ]
    for program in programs:
        _rehearse(config, program, data, sources)
    # The data too: names do not change when what is behind them does.
    query = crc32(sources["queryset"].labels, crc32(sources["queryset"].images))
    sums = {"dataset": data.checksum(), "query": query}
    description = describe(config) | {"data": sums}
    rows = store.open_run(directory, description, resume=resume)
    todo = {
        program: {
            identity(program, budget, cell)
            for budget in budgets_of(config, program.attack)
            for cell in grid(config, program.defense)
        }
        - set(map(identity_of_row, rows))
        for program in programs
    }
    if not any(todo.values()):
        store.discard(directory, "attack-*")
        log(f"{directory}: all cells are done")
        return rows

    owner = owner_of(config, victim, data, keeper(directory, victim, len(data.x_train), log))
    state = train_victim(owner)
    mesh = make_mesh()
    judged = _judge(victim, state.params, data)
    facts = shared_facts(config, description, data, state, mesh)
    epochs = sum(len(missing) * p.laps for p, missing in todo.items())
    with tqdm(total=epochs, unit="epoch", desc="attackers", disable=None) as bar:
        for defense, waiting in groupby(filter(todo.get, programs), lambda p: p.defense):
            waiting = list(waiting)
            needed = any(program.needs_evidence for program in waiting)
            known, evidence = _prepare(config, defense, owner, judged, needed, log)
            cells = grid(config, defense)
            for program in waiting:
                own = sources[program.attack.source]
                attacked = _share(config, program, state.params, known, own, log)
                shared = Shared(**attacked, **judged, test_evidence=evidence)
                shared = jax.device_put(shared, NamedSharding(mesh, P()))
                said = facts | {
                    **defense.describe(),
                    "queryset": base_name(own.name),
                    "queryset_source": own.name,
                }
                kind = OnlineCampaign if isinstance(program, OnlineProgram) else TransferCampaign
                campaign = kind(config, program, shared, mesh, directory, said, rows, bar, log)
                size = _wave_size(program, len(cells), mesh.size, cells_per_device)
                for number, (wave, stacked) in enumerate(waves(cells, size)):
                    campaign.run(number, wave, stacked)
    store.discard(directory, "attack-*")  # of waves that were stopped after their last row
    return rows


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

    name: str
    images: np.ndarray
    labels: np.ndarray
    num_labels: int


def _program(
    config: Sweep,
    victim: Classifier,
    defense: Defense,
    attack: Attack,
    data: Dataset,
    sources: dict[str, _Source],
) -> Program:
    """The functions of the cells of one defence and attack, once they are known to fit."""
    own = sources[attack.source]
    stolen = make_classifier(attack.architecture, data, "attacker")
    attack.check(len(own.images), data.num_classes, data.image_shape)
    kind = OnlineProgram if isinstance(attack, Online) else Program
    return kind(victim, stolen, data.family, defense, attack, data.num_classes, own.num_labels)


def _rehearse(config: Sweep, program: Program, data: Dataset, sources: dict[str, _Source]) -> None:
    """Trace what the cells will do, on shapes alone: what fails does so before any work."""
    own = sources[program.attack.source]
    network, defense = program.network, program.defense

    def untrained(name: str, recipe: Recipe, key: Array, train: Callable[..., State]) -> State:
        del name, train
        return start(network, recipe, len(data.x_train), key)

    def everything(key: Array, images: Array, tests: Array) -> None:
        params = network.init(key)
        owner = owner_of(config, network, data, untrained)
        known = jax.tree.map(lambda a: a[None], defense.prepare(owner, key))
        shared = Shared(
            params,
            known,
            images,
            jnp.zeros(len(images), jnp.int32),
            *_foreseen(program, config.seeds[:1], params, known, images),
            tests,
            jnp.zeros(len(tests), jnp.int32),
            jnp.ones((len(tests), data.num_classes)),
            _evidence(defense, network, known, [tests]),
        )
        cell = Cell(jnp.float32(0), jnp.uint32(0), jnp.int32(0))
        program.rehearse(cell, shared)

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
            f"the defence {defense} or the attack {program.attack.label} fails on these "
            f"data ({in_one_line(error)}): choose another, or mend it"
        ) from error


def _sources(config: Sweep, victim: Dataset, data_dir: str | Path | None) -> dict[str, _Source]:
    """The images that attackers may own: the query set, and the victim's training images."""
    queryset = open_dataset(config.queryset, data_dir)
    check_compatible(victim, queryset)
    if not len(victim.x_test):
        raise InputError(f"data set {victim.name} has no test images: nothing can be evaluated")
    splits = {
        "train": (queryset.x_train, queryset.y_train),
        "test": (queryset.x_test, queryset.y_test),
    }
    images, labels = (
        np.concatenate(each) for each in zip(*map(splits.get, config.query_splits), strict=True)
    )
    return {
        "queryset": _Source(config.queryset, images, labels, queryset.num_classes),
        "dataset": _Source(config.dataset, victim.x_train, victim.y_train, victim.num_classes),
    }


def _judge(victim: Classifier, params: Any, data: Dataset) -> dict[str, Array]:
    """The fields of `Shared` by which defences and stolen models are judged."""
    images = jnp.asarray(data.x_test)
    return {
        "test_images": images,
        "test_labels": jnp.asarray(data.y_test),
        "test_posteriors": _posteriors(victim, params, images),
    }


def _prepare(
    config: Sweep,
    defense: Defense,
    owner: Owner,
    judged: dict[str, Array],
    needed: bool,
    log: Log,
) -> tuple[Any, Any]:
    """What a defence knows and its evidence of the test set, each with a leading axis of seeds.

    The evidence only where it is needed, else None.
    """
    began = time.perf_counter()
    each = [defense.prepare(owner, keys(seed)["surrogate"]) for seed in config.seeds]
    known = jax.tree.map(lambda *leaves: jnp.stack(leaves), *each)
    tests = [judged["test_images"]] * len(config.seeds) if needed else []
    evidence = jax.block_until_ready(_evidence(defense, owner.classifier, known, tests))
    log(f"{defense.label}: prepared in {time.perf_counter() - began:.1f} s")
    return known, evidence


def _share(
    config: Sweep, program: Program, victim: Any, known: Any, own: _Source, log: Log
) -> dict[str, Any]:
    """The fields of `Shared` that belong to one attack's images."""
    began = time.perf_counter()
    images, labels = jnp.asarray(own.images), jnp.asarray(own.labels)
    posteriors, evidence = _foreseen(program, config.seeds, victim, known, images)
    if posteriors is not None:
        jax.block_until_ready((posteriors, evidence))
        log(
            f"{program.label}: {len(config.seeds)} x {program.attack.budget:,} queries "
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
