"""One cell of the grid as pure functions, and many of them over devices.

A cell is here one (strength, seed) of a defence and an attack. `Program` holds its functions;
`over_cells` compiles any of them for a wave of cells, spread over a mesh; `waves` cuts a grid to
size.
"""

import contextlib
import os
import platform
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import AxisType, Mesh
from jax.sharding import PartitionSpec as P

from madjax.attacks import Attack, Transfer, World, keys
from madjax.batching import map_chunks
from madjax.datasets import Family
from madjax.defenses import Defense, prediction_api
from madjax.errors import InputError
from madjax.models import Classifier
from madjax.train import Recipe, State, epoch, percent, start

Array = jax.Array


class Point(NamedTuple):
    """The numbers in which the cells of a wave differ; with a leading axis, those of a wave."""

    strength: Array
    """Of the defence."""
    seed: Array
    at: Array
    """Position of the seed in the leading axis of `Shared.known`."""
    told: Array | None = None
    """The answers [Q, K] to the queries of an attack, in order, if they were foreseen."""


class Shared(NamedTuple):
    """What all cells of one defence and attack read."""

    victim: Any
    """The victim's parameters."""
    known: Any
    """What the defence has prepared (for MAD: the surrogates), with a leading axis of seeds."""
    images: Array
    """The attacker's own images, and their classes."""
    labels: Array
    test_images: Array
    test_labels: Array
    test_posteriors: Array


@dataclass(frozen=True)
class Program:
    """The functions of one cell; hashable, without arrays.

    network is the victim's and the surrogate's, stolen the attacker's; the attacker's own images
    have num_labels classes.
    """

    network: Classifier
    stolen: Classifier
    family: Family
    defense: Defense
    attack: Attack
    num_classes: int
    num_labels: int

    @property
    def label(self) -> str:
        """Defence and attack, as the log calls them."""
        return f"{self.defense.label} against {self.attack.label}"

    @property
    def laps(self) -> int:
        """How many pieces of a cell's work the progress bar counts."""
        return self.attack.recipe.epochs

    def rehearse(self, cell: Point, shared: Shared) -> None:
        """Trace all that a cell will do.

        Raises:
            InputError: an attack that makes another transfer set than it says.
        """
        transfer = self.begin(cell, shared)
        if self.attack.rounds:
            transfer = self.proceed((cell, transfer), (shared, jnp.int32(0)))
        wanted = (self.attack.examples(self.attack.budget), self.num_classes)
        if transfer.targets.shape != wanted:
            raise InputError(
                f"the attack {self.attack.label} makes targets of shape "
                f"{transfer.targets.shape}: return {wanted}, one row for each example"
            )

    def begin(self, cell: Point, shared: Shared) -> Transfer:
        """The attack's first queries."""
        return self.attack.begin(self._world(cell, shared))

    def proceed(self, cell: tuple[Point, Transfer], shared: tuple[Shared, Array]) -> Transfer:
        """Round r of the attack's queries; shared = (what cells share, r)."""
        return self.attack.proceed(shared[1], cell[1], self._world(cell[0], shared[0]))

    def _world(self, cell: Point, shared: Shared) -> World:
        key = keys(cell.seed)
        known = jax.tree.map(lambda a: a[cell.at], shared.known)
        respond = prediction_api(
            self.defense, self.network, shared.victim, known, key["defense"], cell.strength
        )

        def told(numbers: Array, index: Array) -> Array:
            del index  # those of the queries of these numbers, which was tried (`stages.foreseen`)
            return cell.told[numbers]

        return World(
            respond,
            self.attack.budget,
            shared.images,
            shared.labels,
            self.num_labels,
            self.num_classes,
            self.stolen,
            self.family,
            key["draw"],
            None if cell.told is None else told,
        )


class Lesson(NamedTuple):
    """What the training of all stolen models reads: the attacker's own images and the test set."""

    images: Array
    test_images: Array
    test_labels: Array
    test_posteriors: Array
    """The victim's, undefended."""
    count: Array
    """Examples, from the first, that a stolen model is trained on, int32."""


@dataclass(frozen=True)
class Training:
    """The training of the stolen model of one cell, whatever the defence was.

    One program serves all budgets: the transfer set has `size` examples, of which `Lesson.count`,
    from the first, are trained on.
    """

    stolen: Classifier
    recipe: Recipe
    size: int

    def start(self, cell: Point, lesson: Lesson) -> State:
        """A fresh stolen model."""
        del lesson
        return start(self.stolen, self.recipe, self.size, keys(cell.seed)["train"])

    def advance(self, cell: tuple[Transfer, State], lesson: Lesson) -> State:
        """One epoch, and the accuracy after it."""
        transfer, state = cell
        return epoch(
            self.stolen,
            self.recipe,
            state,
            lambda i: transfer.take(lesson.images, i),
            self.size,
            lesson.test_images,
            lesson.test_labels,
            lesson.count,
        )

    def fidelity(self, state: State, lesson: Lesson) -> Array:
        """The share of test images with the victim's own top class, in percent; NaN if diverged."""
        logits = map_chunks(partial(self.stolen.apply, state.params), lesson.test_images, 250)
        agree = percent(logits.argmax(-1) == lesson.test_posteriors.argmax(-1))
        return jnp.where(jnp.isfinite(state.accuracy[-1]), agree, jnp.nan)


def map_cells(function: Callable[[Any], Any], cells: Any) -> Any:
    """One cell after another on a device: the faster on a CPU, whose cores one cell can fill."""
    return jax.lax.map(function, cells)


def vmap_cells(function: Callable[[Any], Any], cells: Any) -> Any:
    """All cells of a device at once, as batched products: what an accelerator needs to be full."""
    return jax.vmap(function)(cells)


Mapping = Callable[[Callable[[Any], Any], Any], Any]


def default_mapping() -> Mapping:
    """`map_cells` on a CPU (measured by experiments/bench_training.py), `vmap_cells` elsewhere."""
    return map_cells if jax.default_backend() == "cpu" else vmap_cells


def split_cpu(most: int) -> None:
    """Make every core a device of its own, `most` at most, unless the user chose a number.

    Cells side by side keep the cores busier than one cell that uses all of them
    (experiments/bench_training.py). Cores are those that this process may use. Without effect on
    accelerators, and once anything has been computed.
    """
    if jax.config.jax_num_cpu_devices < 0:
        # Later it cannot be changed: the devices are there.
        with contextlib.suppress(RuntimeError):
            jax.config.update("jax_num_cpu_devices", max(min(_cores(), most), 1))


def _cores() -> int:
    """How many cores this process may use, where the system says so; else all."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def make_mesh(devices: Sequence[jax.Device] | None = None) -> Mesh:
    """Devices (by default all) along one axis, `cells`."""
    devices = jax.devices() if devices is None else devices
    return jax.make_mesh((len(devices),), ("cells",), (AxisType.Auto,), devices=devices)


def over_cells(function: Callable[[Any, Any], Any], mesh: Mesh, mapping: Mapping) -> Callable:
    """Compile function(cell, shared) for cells with a leading axis that the mesh divides.

    No device talks to another. `check_vma` must stay off: with it, gradients of parameters that
    are made inside the mapped function from constants are summed over the mesh.
    """

    def local(cells: Any, shared: Any) -> Any:
        return mapping(lambda cell: function(cell, shared), cells)

    local.__name__ = getattr(function, "__name__", local.__name__)  # as the compiler's log says
    return jax.jit(
        jax.shard_map(
            local,
            mesh=mesh,
            in_specs=(P("cells"), P()),
            out_specs=P("cells"),
            check_vma=False,
        )
    )


def waves(cells: list[Point], size: int) -> Iterator[tuple[list[Point], Point]]:
    """Cut the grid into equal waves: (its cells, the same stacked and padded to `size`).

    The last wave is filled up with copies of its last cell, so that one program serves all.
    """
    for at in range(0, len(cells), size):
        wave = cells[at : at + size]
        padded = wave + wave[-1:] * (size - len(wave))
        yield wave, jax.tree.map(lambda *leaves: np.stack(leaves), *padded)


def device_name(mesh: Mesh) -> str:
    """How many devices the mesh has and of what kind; for a CPU its model and cores."""
    device = mesh.devices.flat[0]
    name = device.device_kind
    if device.platform == "cpu":
        info = Path("/proc/cpuinfo")
        lines = info.read_text().splitlines() if info.is_file() else []
        models = [line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")]
        name = f"CPU {models[0]}, {len(models)} cores" if models else f"CPU {platform.machine()}"
    return f"{mesh.size} x {name}"
