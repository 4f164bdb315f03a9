"""The grid epsilon x seed as one program over all devices: the only file that knows about them.

A cell is one (epsilon, seed). What cells share is computed once: the victim, its posteriors, and
for every seed the surrogate's evidence (for MAD the Gram matrices), which no epsilon enters. Then
waves of cells train their attackers, spread over the devices by `jax.shard_map`; a wave's rows are
written when it ends, and a checkpoint after each of its epochs.
"""

import importlib.metadata
import platform
import subprocess
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import AxisType, Mesh, NamedSharding
from jax.sharding import PartitionSpec as P
from tqdm import tqdm

from madjax import store
from madjax.attacks import knockoff
from madjax.batching import map_chunks
from madjax.config import Sweep, describe, digest
from madjax.datasets import Dataset, base_name, check_compatible, open_dataset
from madjax.defenses import answers
from madjax.errors import InputError
from madjax.evaluate import utility
from madjax.models import Classifier
from madjax.train import Recipe, State, epoch, fit, start

Array = jax.Array
Log = Callable[[str], None]


class Cell(NamedTuple):
    """One point of the grid; with a leading axis, a wave of them."""

    epsilon: Array
    seed: Array
    at: Array
    """Position of the seed in `Shared.evidence`."""


class Shared(NamedTuple):
    """What all cells read: the query set and the test set as the defended victim sees them.

    Evidence has a leading axis of seeds; its second axis follows the queries drawn by that seed.
    """

    images: Array
    posteriors: Array
    evidence: Any
    test_images: Array
    test_labels: Array
    test_posteriors: Array
    test_evidence: Any


class Attacker(NamedTuple):
    """One cell's attacker: what it trains on, and how far it has come."""

    drawn: Array
    """Indices of the images it sent, int32 [B]."""
    answers: Array
    """What it was told, y_tilde [B, K]."""
    state: State


@dataclass(frozen=True)
class Program:
    """The functions of one cell; hashable, without arrays."""

    classifier: Classifier
    recipe: Recipe
    defense: Any
    budget: int

    def begin(self, cell: Cell, shared: Shared) -> tuple[Attacker, dict[str, Array]]:
        """The transfer set, a fresh attacker, and the defence's utility on the test set."""
        key = knockoff.keys(cell.seed)
        drawn = knockoff.draw(key["draw"], shared.images.shape[0], self.budget)
        evidence, test_evidence = jax.tree.map(
            lambda a: a[cell.at], (shared.evidence, shared.test_evidence)
        )
        told = answers(
            self.defense, key["defense"], shared.posteriors[drawn], evidence, cell.epsilon
        )
        told_test = answers(
            self.defense,
            jax.random.fold_in(key["defense"], 1),
            shared.test_posteriors,
            test_evidence,
            cell.epsilon,
        )
        state = start(self.classifier, self.recipe, self.budget, key["train"])
        return Attacker(drawn, told, state), utility(
            shared.test_posteriors, told_test, shared.test_labels
        )

    def advance(self, attacker: Attacker, shared: Shared) -> Attacker:
        """One epoch of the attacker's training, and its accuracy after it."""

        def take(i: Array) -> tuple[Array, Array]:
            return shared.images[attacker.drawn[i]], attacker.answers[i]

        state = epoch(
            self.classifier,
            self.recipe,
            attacker.state,
            take,
            self.budget,
            shared.test_images,
            shared.test_labels,
        )
        return attacker._replace(state=state)


def serially(function: Callable[[Any], Any], cells: Any) -> Any:
    """One cell after another on a device: the faster on a CPU, whose cores one cell can fill."""
    return jax.lax.map(function, cells)


def together(function: Callable[[Any], Any], cells: Any) -> Any:
    """All cells of a device at once, as batched products: what an accelerator needs to be full."""
    return jax.vmap(function)(cells)


Mapping = Callable[[Callable[[Any], Any], Any], Any]


def default_mapping() -> Mapping:
    """`serially` on a CPU, `together` elsewhere, as measured by experiments/bench_training.py."""
    return serially if jax.default_backend() == "cpu" else together


def make_mesh(devices: Sequence[jax.Device] | None = None) -> Mesh:
    """Devices (by default all) along one axis, `cells`."""
    devices = jax.devices() if devices is None else devices
    return jax.make_mesh((len(devices),), ("cells",), (AxisType.Auto,), devices=devices)


def over_cells(function: Callable[[Any, Shared], Any], mesh: Mesh, mapping: Mapping) -> Callable:
    """Compile function(cell, shared) for cells with a leading axis that the mesh divides.

    No device talks to another. `check_vma` must stay off: with it, gradients of parameters that
    are made inside the mapped function from constants are summed over the mesh.
    """

    def local(cells: Any, shared: Shared) -> Any:
        return mapping(lambda cell: function(cell, shared), cells)

    return jax.jit(
        jax.shard_map(
            local,
            mesh=mesh,
            in_specs=(P("cells"), P()),
            out_specs=P("cells"),
            check_vma=False,
        )
    )


def waves(cells: list[Cell], size: int) -> Iterator[tuple[list[Cell], Cell]]:
    """Cut the grid into equal waves: (its cells, the same stacked and padded to `size`).

    The last wave is filled up with copies of its last cell, so that one program serves all.
    """
    for at in range(0, len(cells), size):
        wave = cells[at : at + size]
        padded = wave + wave[-1:] * (size - len(wave))
        yield wave, jax.tree.map(lambda *leaves: np.stack(leaves), *padded)


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
    victim_data = open_dataset(config.dataset, data_dir)
    query_images = _query_images(config, victim_data, data_dir)
    victim = _classifier(config.architecture, victim_data, "victim")
    stolen = _classifier(config.attack.architecture, victim_data, "attacker")
    description = describe(config)
    rows = store.open_run(directory, description, resume=resume)
    done = {(row["epsilon"], row["seed"]) for row in rows}
    cells = grid(config)
    if all(_identity(cell) in done for cell in cells):
        log(f"{directory}: all {len(cells)} cells are done")
        return rows

    victim_state = _train_victim(config, victim, victim_data, directory, log)
    mesh = make_mesh()
    shared = _share(config, victim, victim_state.params, victim_data, query_images, log)
    shared = jax.device_put(shared, NamedSharding(mesh, P()))

    program = Program(stolen, config.attack.recipe, config.defense, config.attack.budget)
    everything = -(-len(cells) // mesh.size)
    per_device = cells_per_device or (1 if jax.default_backend() == "cpu" else everything)
    size = mesh.size * min(per_device, everything)
    mapping = default_mapping()
    begin = over_cells(program.begin, mesh, mapping)
    advance = over_cells(program.advance, mesh, mapping)

    facts = _facts(config, description, victim_data, victim_state, mesh)
    epochs = config.attack.recipe.epochs
    log(
        f"attacks: {len(cells)} cells in waves of {size}, {config.attack.budget:,} queries and "
        f"{epochs} epochs each"
    )
    with tqdm(total=len(cells) * epochs, unit="epoch", desc="attackers", disable=None) as bar:
        for number, (wave, stacked) in enumerate(waves(cells, size)):
            missing = [i for i, cell in enumerate(wave) if _identity(cell) not in done]
            if not missing:
                bar.update(len(wave) * epochs)
                continue
            name = f"wave-{number}"
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
                row = facts | _row(wave[i], *jax.tree.map(lambda a, i=i: a[i], results))
                row["seconds"] = round(seconds / len(wave), 3)
                store.append_row(directory, row)
                rows.append(row)
                log(
                    f"epsilon {row['epsilon']:g} seed {row['seed']}: "
                    f"defender {row['defender_accuracy']:.2f} %, "
                    f"attacker {row['attacker_accuracy']:.2f} %, {row['seconds']:.0f} s"
                )
            store.discard(directory, name)
    return rows


def _identity(cell: Cell) -> tuple[float, int]:
    """What a row says of its cell: epsilon with the digits the user gave, and the seed."""
    return float(str(cell.epsilon)), int(cell.seed)


def _row(cell: Cell, usefulness: dict[str, Array], accuracy: Array) -> dict[str, Any]:
    epsilon, seed = _identity(cell)
    measured = {name: _number(value) for name, value in usefulness.items()}
    return {
        "epsilon": epsilon,
        "seed": seed,
        **measured,
        "attacker_accuracy": _number(accuracy[-1]),
        "attacker_accuracy_best": _number(accuracy.max()),
        "attacker_accuracies": [_number(value) for value in accuracy],
    }


def _number(value: Any) -> float | None:
    """A float32 in as few digits as tell it apart; None for what JSON lacks (infinite KL)."""
    return float(str(np.float32(value))) if np.isfinite(value) else None


def _classifier(architecture: Any, data: Dataset, role: str) -> Classifier:
    """The network of one party, checked on the victim's image shape and classes."""
    classifier = Classifier(
        architecture(data.num_classes), data.family.preprocess, data.image_shape
    )
    blank = jax.ShapeDtypeStruct((1, *data.image_shape), jnp.uint8)
    try:
        logits = jax.eval_shape(
            lambda k, x: classifier.apply(classifier.init(k), x), jax.random.key(0), blank
        )
    except (TypeError, ValueError, ZeroDivisionError) as error:
        raise InputError(
            f"the {role}'s {architecture.__name__} cannot take images of shape {data.image_shape} "
            f"({str(error).splitlines()[0][:120]}): choose another architecture or data set"
        ) from error
    if logits.shape != (1, data.num_classes):
        raise InputError(
            f"the {role}'s {architecture.__name__} gives outputs {logits.shape[1:]} for the "
            f"{data.num_classes} classes of {data.name}: choose another architecture"
        )
    return classifier


def _query_images(config: Sweep, victim: Dataset, data_dir: str | Path | None) -> np.ndarray:
    queryset = open_dataset(config.queryset, data_dir)
    check_compatible(victim, queryset)
    if not len(victim.x_test):
        raise InputError(f"data set {victim.name} has no test images: nothing can be evaluated")
    splits = {"train": queryset.x_train, "test": queryset.x_test}
    images = np.concatenate([splits[name] for name in config.query_splits])
    knockoff.check_budget(config.attack.budget, len(images))
    return images


def _train_victim(
    config: Sweep, victim: Classifier, data: Dataset, directory: Path, log: Log
) -> State:
    """The victim, from its checkpoint as far as that goes."""
    key = jax.random.fold_in(jax.random.key(config.victim_seed), len("victim"))
    fresh = jax.jit(partial(start, victim, config.victim, len(data.x_train)))(key)
    state = store.restore(directory, "victim", fresh) or fresh
    epochs = config.victim.epochs
    with tqdm(
        total=epochs, initial=int(state.epoch), unit="epoch", desc="victim", disable=None
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
            state=jax.tree.map(jnp.asarray, state),
            after_epoch=after_epoch,
        )
    log(
        f"victim: {type(victim.module).__name__} on {data.name}, {len(data.x_train):,} images, "
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


def _facts(
    config: Sweep, description: dict[str, Any], data: Dataset, victim: State, mesh: Mesh
) -> dict[str, Any]:
    """The fields that all rows of a run share."""
    return {
        "config": config.name,
        "dataset": base_name(config.dataset),
        "dataset_source": config.dataset,
        "victim": config.architecture.__name__.lower(),
        "queryset": base_name(config.queryset),
        "queryset_source": config.queryset,
        **config.defense.describe(),
        "attack": config.attack.name,
        "attack_architecture": config.attack.architecture.__name__.lower(),
        "budget": config.attack.budget,
        "epochs": config.attack.recipe.epochs,
        "victim_epochs": config.victim.epochs,
        "victim_accuracy": _number(victim.accuracy[-1]),
        "num_classes": data.num_classes,
        "n_train": len(data.x_train),
        "n_test": len(data.x_test),
        "device": device_name(mesh),
        "versions": {
            "python": platform.python_version(),
            **{
                name: importlib.metadata.version(name)
                for name in ("madjax", "jax", "flax", "optax")
            },
        },
        "git_commit": _git_commit(),
        "config_hash": digest(description),
    }


def device_name(mesh: Mesh) -> str:
    """The devices in words: how many and what; for a CPU its model and cores."""
    device = mesh.devices.flat[0]
    name = device.device_kind
    if device.platform == "cpu":
        info = Path("/proc/cpuinfo")
        lines = info.read_text().splitlines() if info.is_file() else []
        models = [line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")]
        name = f"CPU {models[0]}, {len(models)} cores" if models else f"CPU {platform.machine()}"
    return f"{mesh.size} x {name}"


def _git_commit() -> str | None:
    """The commit of the code that runs, "+" where files differ from it; None outside a checkout."""
    here = Path(__file__).parent

    def git(*words: str) -> str:
        return subprocess.run(
            ["git", *words], cwd=here, capture_output=True, text=True, check=True
        ).stdout.strip()

    try:
        git("ls-files", "--error-unmatch", __file__)
        changed = git("status", "--porcelain", "--untracked-files=no", "--", ".")
        return git("rev-parse", "--short=12", "HEAD") + ("+" if changed else "")
    except (OSError, subprocess.CalledProcessError):
        return None
