"""Devices: the only file that knows them. Many cells at once, spread over a mesh.

A mesh has two axes. Along `cells` devices have cells of their own, and never talk to each other.
Along `data` they share the examples of the same cells (`madjax.sharing`). Its devices may be those
of several processes (`madjax.processes`), each of which holds its part of an array: `spread` and
`everywhere` put arrays there that all processes have, and `fetch` gives all of them the whole.
"""

import contextlib
import os
import platform
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

import jax
import numpy as np
from jax.sharding import AbstractMesh, AxisType, Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from madjax import backend, processes, stopping
from madjax.batching import bytes_of
from madjax.errors import InputError
from madjax.models import Classifier
from madjax.sharing import SHARED

Mapping = Callable[[Callable[[Any], Any], Any], Any]
"""Applies a function to each of some values with a leading axis, on one device."""


def map_cells(function: Callable[[Any], Any], cells: Any) -> Any:
    """One cell after another on a device: the faster on a CPU, whose cores one cell can fill."""
    return jax.lax.map(function, cells)


def vmap_cells(function: Callable[[Any], Any], cells: Any) -> Any:
    """All cells of a device at once, as batched products: what an accelerator needs to be full."""
    return jax.vmap(function)(cells)


def at_once(function: Callable[[Any], Any], cells: Any) -> Any:
    """All rows of a device in one call, of a function that takes many itself."""
    return function(cells)


def one_by_one(networks: Sequence[Classifier] = ()) -> bool:
    """Whether the cells of a device, which have these networks, go one after another.

    On a CPU they do (measured by experiments/bench_training.py), and on an accelerator if a network
    is wide: it fills the device better than small ones do, and its convolutions side by side would
    be grouped ones. (On accelerators that is a guess.)
    """
    return backend.platform() == "cpu" or any(network.is_wide for network in networks)


def default_mapping(networks: Sequence[Classifier] = ()) -> Mapping:
    """`map_cells` where cells go `one_by_one`, else `vmap_cells`."""
    return map_cells if one_by_one(networks) else vmap_cells


def split_cpu(most: int, multiple: int = 1) -> None:
    """Make every core a device of its own, `most` at most, unless the user chose a number.

    Where there are enough, their number is one that `multiple` divides.

    Cells side by side keep the cores busier than one cell that uses all of them
    (experiments/bench_training.py). Cores are those that this process may use. Without effect on
    accelerators, and once anything has been computed.
    """
    if jax.config.jax_num_cpu_devices < 0:
        # Later it cannot be changed: the devices are there.
        with contextlib.suppress(RuntimeError):
            count = max(min(_cores(), most), 1)
            count -= count % multiple if count > multiple else 0
            jax.config.update("jax_num_cpu_devices", count)


def _cores() -> int:
    """How many cores this process may use, where the system says so; else all."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def make_mesh(devices: Sequence[jax.Device] | None = None) -> Mesh:
    """Devices (by default all, of all processes), each with cells of its own."""
    devices = jax.devices() if devices is None else devices
    # Those of one process side by side: they may share a cell.
    ordered = sorted(devices, key=lambda device: device.process_index)
    return Mesh(np.array(ordered).reshape(-1, 1), _AXES, axis_types=_TYPES)


def within_process(mesh: Mesh) -> Mesh:
    """Those of the devices that are this process's."""
    own = [device for device in mesh.devices.flat if device.process_index == jax.process_index()]
    return make_mesh(own)


_AXES, _TYPES = ("cells", SHARED), (AxisType.Auto,) * 2


@dataclass(frozen=True)
class Machine:
    """Devices that a plan is made for (`madjax.sweep.plan`); they need not be here.

    count: how many there are. memory: bytes of each. flops: floating-point operations a second
    that training reaches on each, which is a share of what the maker states: it goes by the size
    of the network and of the batch.
    """

    count: int
    memory: float
    flops: float
    platform: str = "gpu"
    name: str = "accelerator"

    def __post_init__(self) -> None:
        for name in ("count", "memory", "flops"):
            if not 1 <= getattr(self, name) < float("inf"):
                raise InputError(
                    f"{name} of the machine is {getattr(self, name)}: give a number >= 1"
                )

    @property
    def label(self) -> str:
        """What it is called in a plan."""
        return f"{self.count} x {self.name} at {self.flops / 1e12:g} TFLOP/s"

    @property
    def mesh(self) -> Mesh:
        """As of `make_mesh`, without devices."""
        return AbstractMesh((self.count, 1), _AXES, axis_types=_TYPES)


@processes.by_first
def memory_of(mesh: Mesh, given: float | None = None, *, alone: bool = False) -> float | None:
    """Bytes that each device of a mesh may take, those given or all; None: it does not say.

    Devices of a CPU share the machine's memory. alone: of one that works while the others rest. Of
    several processes it is the first that says it.

    Raises:
        InputError: given bytes that are no number above 0.
    """
    if given is not None:
        if not 0 < given < float("inf"):
            raise InputError(
                f"memory is {given}: give the bytes that each device may take, above 0"
            )
        return given
    if processes.several():
        mesh = within_process(mesh)
    device = mesh.devices.flat[0]
    said = device.memory_stats()
    if said and "bytes_limit" in said:
        return said["bytes_limit"]
    if device.platform == "cpu" and hasattr(os, "sysconf"):
        whole = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
        return whole if alone else whole // mesh.size
    return None


def arranged(
    mesh: Mesh, cells: int, per_cell: int | None = None, networks: Sequence[Classifier] = ()
) -> Mesh:
    """The same devices, `per_cell` of which share each of so many cells.

    By default that is one, but for wide networks on an accelerator (`Classifier.is_wide`): for
    these it is as many as let all cells run at once.

    Raises:
        InputError: a number that does not divide the devices of each process.
    """
    whole = _of_one_process(mesh)
    if per_cell is None:
        alone = backend.platform() == "cpu" or not one_by_one(networks)
        most = 1 if alone else min(max(mesh.size // cells, 1), whole)
        per_cell = max(n for n in range(1, most + 1) if whole % n == 0)
    if per_cell < 1 or whole % per_cell:
        where = "devices" if whole == mesh.size else "devices of each process"
        raise InputError(
            f"devices_per_cell is {per_cell}: give a number that divides the {whole} {where}"
        )
    if isinstance(mesh, AbstractMesh):
        return AbstractMesh((mesh.size // per_cell, per_cell), _AXES, axis_types=_TYPES)
    # In the same order, so that what lies on all devices of one lies there on the other.
    return Mesh(mesh.devices.reshape(-1, per_cell), _AXES, axis_types=_TYPES)


def _of_one_process(mesh: Mesh) -> int:
    """How many of the devices are in the process that has fewest."""
    if isinstance(mesh, AbstractMesh):
        return mesh.size
    return min(Counter(device.process_index for device in mesh.devices.flat).values())


@contextlib.contextmanager
def examples_shared(mesh: Mesh) -> Iterator[None]:
    """Inside, networks that are trained one at a time have their examples shared by the devices."""
    if mesh.shape[SHARED] == 1:
        yield
        return
    with jax.set_mesh(mesh):
        yield


def over_cells(
    function: Callable[..., Any],
    *settings: Any,
    mesh: Mesh,
    networks: Sequence[Classifier] = (),
    mapping: Mapping | None = None,
    in_place: bool = False,
) -> Callable[[Any, Any], Any]:
    """Compile function(*settings, cell, shared) for cells with a leading axis, over a mesh.

    The mesh's axis `cells` divides the number of cells; along it no device talks to another.
    settings are hashable and no arrays: equal ones share a program. mapping is by default what
    suits the networks of the cells (`default_mapping`). in_place: cells are pairs, of which the
    second has the shapes of the result, which takes its memory: it cannot be read any more.
    `check_vma` must stay off: with it, gradients of parameters that are made inside the mapped
    function from constants are summed over the mesh.
    """
    mapping = mapping or default_mapping(networks)
    return _compiled(function, settings, mesh, mapping, ("cells",), in_place)


@lru_cache(maxsize=128)
def _compiled(
    function: Callable[..., Any],
    settings: tuple[Any, ...],
    mesh: Mesh,
    mapping: Mapping,
    axes: tuple[str, ...],
    in_place: bool = False,
) -> Callable[[Any, Any], Any]:
    def local(cells: Any, shared: Any) -> Any:
        return mapping(lambda cell: function(*settings, cell, shared), cells)

    local.__name__ = getattr(function, "__name__", local.__name__)  # as the compiler's log says
    mapped = jax.shard_map(
        local,
        mesh=mesh,
        in_specs=(P(axes), P()),
        out_specs=P(axes),
        axis_names=set(axes),  # the others are XLA's to partition
        check_vma=False,
    )
    if not in_place:
        return jax.jit(mapped)

    def apart(fixed: Any, changing: Any, shared: Any) -> Any:
        return mapped((fixed, changing), shared)

    apart.__name__ = local.__name__
    compiled = jax.jit(apart, donate_argnums=1)
    return lambda cells, shared: compiled(*cells, shared)


def over_rows(mesh: Mesh) -> Callable[..., Callable[[Any, Any], Any]]:
    """A `stages.Over` that spreads rows over the devices, in equal parts.

    Copies of the last row fill up what the mesh does not divide; their results are dropped.
    """

    def over(function: Callable[..., Any], *settings: Any) -> Callable[[Any, Any], Any]:
        compiled = _compiled(function, settings, mesh, at_once, mesh.axis_names)

        def run(rows: Any, shared: Any) -> Any:
            stopping.check()
            count = len(jax.tree.leaves(rows)[0])
            every = np.minimum(np.arange(-(-count // mesh.size) * mesh.size), count - 1)
            padded = jax.tree.map(lambda a: a[every], rows)
            results = compiled(padded, everywhere(shared, mesh))
            return jax.tree.map(lambda a: a[:count], fetch(results))

        return run

    return over


def stack(cells: Sequence[Any], size: int) -> Any:
    """Cells as one pytree with a leading axis; copies of the last fill it up to `size`."""
    padded = [*cells, *[cells[-1]] * (size - len(cells))]
    return jax.tree.map(lambda *leaves: np.stack(leaves), *padded)


def spread(cells: Any, mesh: Mesh) -> Any:
    """Put arrays with a leading axis of cells where `over_cells` wants them."""
    return _placed(cells, NamedSharding(mesh, P("cells")))


def everywhere(shared: Any, mesh: Mesh) -> Any:
    """Put what all cells read on every device."""
    return _placed(shared, NamedSharding(mesh, P()))


def _placed(tree: Any, sharding: NamedSharding) -> Any:
    """As `jax.device_put`, which would compare whole arrays across processes."""

    def place(array: Any) -> jax.Array:
        if isinstance(array, jax.Array):
            if not array.is_fully_addressable:
                return jax.device_put(array, sharding)
            if jax.dtypes.issubdtype(array.dtype, jax.dtypes.prng_key):
                kind = jax.random.key_impl(array)
                return jax.random.wrap_key_data(place(jax.random.key_data(array)), impl=kind)
        host = np.asarray(array)
        return jax.make_array_from_callback(host.shape, sharding, lambda where: host[where])

    return jax.tree.map(place, tree) if processes.several() else jax.device_put(tree, sharding)


def fetch(tree: Any, *, first: bool = False) -> Any:
    """Arrays as NumPy's, whole, in every process; all of these have to call it.

    first: only the first of them gets them, the others None.
    """
    if not processes.several():
        return jax.device_get(tree)
    leaves, structure = jax.tree.flatten(tree)
    far = {i: leaf for i, leaf in enumerate(leaves) if _is_far(leaf)}
    # Many small ones by one program; else one by one, as each device will hold what is gathered.
    pieces = [far] if bytes_of(far) <= _AT_ONCE else [{i: leaf} for i, leaf in far.items()]
    for some in filter(None, pieces):
        for i, leaf in _gather(some).items():
            leaves[i] = leaf
    if first and not processes.is_first():
        return None
    return jax.tree.unflatten(structure, jax.device_get([_here(leaf) for leaf in leaves]))


_AT_ONCE = 2**26
"""Bytes of arrays that are gathered by one program."""


def _is_far(array: Any) -> bool:
    """Whether this process has but a part of it."""
    known = isinstance(array, jax.Array)
    return known and not (array.is_fully_addressable or array.is_fully_replicated)


def _here(array: Any) -> Any:
    """One that is whole on each device, on one of this process."""
    if isinstance(array, jax.Array) and not array.is_fully_addressable:
        return array.addressable_data(0)
    return array


def _gather(arrays: Any) -> Any:
    """Arrays on all devices, whole."""
    mesh = jax.tree.leaves(arrays)[0].sharding.mesh
    return jax.jit(_same, out_shardings=NamedSharding(mesh, P()))(arrays)


def _same(arrays: Any) -> Any:
    return arrays


def wave_size(
    cells: int,
    mesh: Mesh,
    per_device: int | None,
    networks: Sequence[Classifier] = (),
    *,
    together: bool = False,
) -> int:
    """How many cells are trained side by side: so many a device, or as many as there are.

    By default one a device where they go `one_by_one`, so that rows come early and take the memory
    of one; else all, as where they are to stay together.
    """
    groups = mesh.shape["cells"]
    all_of_them = -(-cells // groups)
    wanted = per_device or (1 if one_by_one(networks) and not together else all_of_them)
    return groups * min(wanted, all_of_them)


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
