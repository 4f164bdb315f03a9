"""One cell of the grid as pure functions, and many of them over devices.

A cell is one (epsilon, seed). `Program` holds its two functions; `over_cells` compiles either for a
wave of cells, spread over a mesh; `waves` cuts a grid to size. No other file knows devices.
"""

import os
import platform
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np
from jax.sharding import AxisType, Mesh
from jax.sharding import PartitionSpec as P

from madjax.attacks import knockoff
from madjax.defenses import answers
from madjax.evaluate import utility
from madjax.models import Classifier
from madjax.train import Recipe, State, epoch, start

Array = jax.Array


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
    """`serially` on a CPU, as measured by experiments/bench_training.py; `together` elsewhere."""
    return serially if jax.default_backend() == "cpu" else together


def split_cpu(most: int) -> None:
    """Make every core a device of its own, `most` at most, unless the user chose a number.

    Cells side by side keep the cores busier than one cell that uses all of them
    (experiments/bench_training.py). To be called before anything is computed; without effect on
    accelerators.
    """
    if jax.config.jax_num_cpu_devices < 0:
        jax.config.update("jax_num_cpu_devices", max(min(os.cpu_count() or 1, most), 1))


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
