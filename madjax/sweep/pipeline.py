"""From a config to rows: the pipeline around the grid.

What cells share is computed once: the victim, its posteriors, and for every seed the surrogate's
evidence (for MAD the Gram matrices), which no epsilon enters. Then waves of cells train their
attackers; a wave's rows are written when it ends, and a checkpoint after each of its epochs.
"""

import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any
from zlib import crc32

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P
from tqdm import tqdm

from madjax import store
from madjax.attacks import knockoff
from madjax.batching import map_chunks
from madjax.config import Sweep, describe, name_of
from madjax.datasets import Dataset, check_compatible, open_dataset
from madjax.errors import InputError
from madjax.models import Classifier
from madjax.sweep.cells import Cell, Program, Shared, default_mapping, make_mesh, over_cells, waves
from madjax.sweep.rows import identity, identity_of_row, measured, shared_facts
from madjax.train import State, fit, start

Log = Callable[[str], None]

VICTIM = 6
"""Folded into the victim's key, so that it shares no randomness with an attacker of its seed."""


def grid(config: Sweep) -> list[Cell]:
    """All cells, seed by seed, so that a sweep that is stopped early has whole curves."""
    return [
        Cell(np.float32(e), np.uint32(s), np.int32(i))
        for i, s in enumerate(config.seeds)
        for e in config.epsilons
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
    that have their row are left alone and a wave goes on from its last whole epoch.
    cells_per_device: how many cells of a wave a device trains; by default one on a CPU, so that
    rows come early, and all on an accelerator.

    Raises:
        InputError: see `open_dataset`, `store.open_run` and `Sweep`; data sets, architectures and
            budget that do not fit each other.
    """
    directory = Path(directory)
    data = open_dataset(config.dataset, data_dir)
    images = _query_images(config, data, data_dir)
    victim = make_classifier(config.architecture, data, "victim")
    stolen = make_classifier(config.attack.architecture, data, "attacker")
    program = Program(stolen, config.attack.recipe, config.defense, config.attack.budget)
    _rehearse(config, victim, program, data, len(images))
    # The data too: names do not change when what is behind them does.
    description = describe(config) | {"data": {"dataset": data.checksum(), "query": crc32(images)}}
    rows = store.open_run(directory, description, resume=resume)
    cells = grid(config)
    if {identity(cell) for cell in cells} <= set(map(identity_of_row, rows)):
        log(f"{directory}: all {len(cells)} cells are done")
        return rows

    state = _train_victim(config, victim, data, directory, log)
    mesh = make_mesh()
    shared = _share(config, victim, state.params, data, images, log)
    shared = jax.device_put(shared, NamedSharding(mesh, P()))
    facts = shared_facts(config, description, data, state, mesh)
    everything = -(-len(cells) // mesh.size)
    per_device = cells_per_device or (1 if jax.default_backend() == "cpu" else everything)
    size = mesh.size * min(per_device, everything)
    _attack(program, shared, mesh, list(waves(cells, size)), facts, rows, directory, log)
    return rows


def _attack(
    program: Program,
    shared: Shared,
    mesh: Mesh,
    todo: list[tuple[list[Cell], Cell]],
    facts: dict[str, Any],
    rows: list[dict[str, Any]],
    directory: Path,
    log: Log,
) -> None:
    """Train wave after wave; append what is missing to `rows` and to the file."""
    mapping = default_mapping()
    begin = over_cells(program.begin, mesh, mapping)
    advance = over_cells(program.advance, mesh, mapping)
    done = set(map(identity_of_row, rows))
    epochs, total = program.recipe.epochs, sum(len(wave) for wave, _ in todo)
    log(
        f"attacks: {total} cells in {len(todo)} waves, {program.budget:,} queries and "
        f"{epochs} epochs each"
    )
    with tqdm(total=total * epochs, unit="epoch", desc="attackers", disable=None) as bar:
        for number, (wave, stacked) in enumerate(todo):
            missing = [i for i, cell in enumerate(wave) if identity(cell) not in done]
            if not missing:
                bar.update(len(wave) * epochs)
                continue
            # On another count of devices a wave holds other cells, and begins anew.
            name = f"wave-{number}-of-{stacked.seed.size}-cells"
            attackers, usefulness = begin(stacked, shared)
            seconds = 0.0
            saved = store.restore(directory, name, (attackers.state, np.zeros(())))
            if saved is not None:
                state = jax.device_put(saved[0], NamedSharding(mesh, P("cells")))
                attackers, seconds = attackers._replace(state=state), float(saved[1])
            finished = int(attackers.state.epoch[0])
            bar.update(len(wave) * finished)
            for e in range(finished, epochs):
                began = time.perf_counter()
                attackers = jax.block_until_ready(advance(attackers, shared))
                seconds += time.perf_counter() - began
                store.save(directory, name, e + 1, (attackers.state, np.asarray(seconds)))
                bar.update(len(wave))
            results = jax.device_get((usefulness, attackers.state.accuracy))
            for i in missing:
                row = facts | measured(wave[i], *jax.tree.map(lambda a, i=i: a[i], results))
                row["seconds"] = round(seconds / len(wave), 3)
                store.append_row(directory, row)
                rows.append(row)
                log(
                    f"epsilon {row['epsilon']:g} seed {row['seed']}: "
                    f"defender {row['defender_accuracy']:.2f} %, "
                    f"attacker {row['attacker_accuracy']:.2f} %, {row['seconds']:.0f} s"
                )
            store.discard(directory, name)


def make_classifier(architecture: Any, data: Dataset, role: str) -> Classifier:
    """The network of one party, checked on the victim's image shape and classes."""
    name = name_of(architecture)
    blank = jax.ShapeDtypeStruct((1, *data.image_shape), jnp.uint8)
    try:
        module = architecture(data.num_classes)
        classifier = Classifier(module, data.family.preprocess, data.image_shape)
        logits = jax.eval_shape(
            lambda k, x: classifier.apply(classifier.init(k), x), jax.random.key(0), blank
        )
    except Exception as error:
        raise InputError(
            f"the {role}'s {name} cannot take images of shape {data.image_shape} "
            f"({_first_line(error)}): choose another architecture or data set"
        ) from error
    if logits.shape != (1, data.num_classes):
        raise InputError(
            f"the {role}'s {name} gives outputs {logits.shape[1:]} for the "
            f"{data.num_classes} classes of {data.name}: choose another architecture"
        )
    return classifier


def _first_line(error: Exception) -> str:
    return f"{type(error).__name__}: {(str(error) or '-').splitlines()[0][:120]}"


def _rehearse(config: Sweep, victim: Classifier, program: Program, data: Dataset, n: int) -> None:
    """Trace what the cells will do, on shapes alone: a defence that fails does so before work."""

    def begin(key: jax.Array, queries: jax.Array, tests: jax.Array) -> Any:
        surrogate = victim.init(key)
        images = jnp.zeros((n, *data.image_shape), jnp.uint8)
        evidence, test_evidence = (
            jax.tree.map(lambda a: a[None], config.defense.evidence(victim.apply, surrogate, x))
            for x in (queries, tests)
        )
        posteriors, test_posteriors = (jnp.ones((m, data.num_classes)) for m in (n, len(tests)))
        labels = jnp.zeros(len(tests), jnp.int32)
        shared = Shared(images, posteriors, evidence, tests, labels, test_posteriors, test_evidence)
        return program.begin(Cell(jnp.float32(0), jnp.uint32(0), jnp.int32(0)), shared)

    queries, tests = (
        jax.ShapeDtypeStruct((m, *data.image_shape), jnp.uint8)
        for m in (program.budget, len(data.x_test))
    )
    try:
        jax.eval_shape(begin, jax.random.key(0), queries, tests)
    except InputError:
        raise
    except Exception as error:
        raise InputError(
            f"the defence {config.defense} fails on these data ({_first_line(error)}): "
            "choose another, or mend it"
        ) from error


def _query_images(config: Sweep, victim: Dataset, data_dir: str | Path | None) -> np.ndarray:
    queryset = open_dataset(config.queryset, data_dir)
    check_compatible(victim, queryset)
    if not len(victim.x_test):
        raise InputError(f"data set {victim.name} has no test images: nothing can be evaluated")
    splits = {"train": queryset.x_train, "test": queryset.x_test}
    images = np.concatenate([splits[name] for name in config.query_splits])
    knockoff.check_budget(config.attack.budget, len(images))
    return images


def _victim(config: Sweep, victim: Classifier, data: Dataset) -> tuple[jax.Array, Any]:
    """The key of the victim's training, and the shapes of its state."""
    key = jax.random.fold_in(jax.random.key(config.victim_seed), VICTIM)
    begin = partial(start, victim, config.victim, len(data.x_train))
    return key, jax.eval_shape(begin, key)


def restore_victim(config: Sweep, victim: Classifier, data: Dataset, directory: Path) -> State:
    """The trained victim of a run.

    Raises:
        InputError: it is not there, or its training has not ended.
    """
    saved = store.restore(directory, "victim", _victim(config, victim, data)[1])
    if saved is None or int(saved.epoch) < config.victim.epochs:
        raise InputError(
            f"{directory} holds no victim trained for {config.victim.epochs} epochs: finish it "
            "with madjax sweep --resume"
        )
    return saved


def _train_victim(
    config: Sweep, victim: Classifier, data: Dataset, directory: Path, log: Log
) -> State:
    """The victim, from its checkpoint as far as that goes."""
    key, like = _victim(config, victim, data)
    saved = store.restore(directory, "victim", like)
    epochs = config.victim.epochs
    with tqdm(
        total=epochs,
        initial=int(saved.epoch) if saved else 0,
        unit="epoch",
        desc="victim",
        disable=None,
    ) as bar:

        def after_epoch(state: State) -> None:
            store.save(directory, "victim", int(state.epoch), state)
            bar.update()

        state = fit(
            victim,
            config.victim,
            key,
            (data.x_train, data.y_train),
            (data.x_test, data.y_test),
            state=jax.tree.map(jnp.asarray, saved),
            after_epoch=after_epoch,
        )
    log(
        f"victim: {name_of(config.architecture)} on {data.name}, {len(data.x_train):,} images, "
        f"{epochs} epochs: {float(state.accuracy[-1]):.2f} % of {len(data.x_test):,} test images"
    )
    return state


def _share(
    config: Sweep, victim: Classifier, params: Any, data: Dataset, images: np.ndarray, log: Log
) -> Shared:
    """Posteriors once, evidence once for every seed."""
    began = time.perf_counter()
    posterior = jax.jit(lambda params, x: map_chunks(partial(victim.posterior, params), x, 250))
    images, test_images = jnp.asarray(images), jnp.asarray(data.x_test)
    posteriors, test_posteriors = posterior(params, images), posterior(params, test_images)
    evidence = []
    for seed in tqdm(config.seeds, unit="seed", desc="evidence", disable=None):
        key = knockoff.keys(seed)
        surrogate = jax.jit(victim.init)(key["surrogate"])
        drawn = knockoff.draw(key["draw"], len(images), config.attack.budget)
        evidence.append(
            [
                jax.device_get(config.defense.evidence(victim.apply, surrogate, x))
                for x in (images[drawn], test_images)
            ]
        )
    stack = partial(jax.tree.map, lambda *leaves: np.stack(leaves))
    queries, tests = (stack(*each) for each in zip(*evidence, strict=True))
    log(
        f"evidence: {len(config.seeds)} x ({config.attack.budget:,} + {len(test_images):,}) "
        f"queries in {time.perf_counter() - began:.1f} s"
    )
    return Shared(
        images,
        posteriors,
        queries,
        test_images,
        jnp.asarray(data.y_test),
        test_posteriors,
        tests,
    )
