"""From a config to rows.

What cells share is made once (stock.py), by the first stages of stages.py. Then groups of cells,
each of one defence and attack, go through the stages that are a cell's own (steal.py, study.py).
"""

from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import jax
from tqdm import tqdm

from madjax import processes, stopping, store
from madjax.attacks import Online
from madjax.config import Sweep, describe, digest
from madjax.datasets import Dataset
from madjax.sweep import cache
from madjax.sweep.grid import cell_id, expand
from madjax.sweep.load import check_fits, check_fits_alone
from madjax.sweep.mesh import arranged, make_mesh, memory_of
from madjax.sweep.plan import planned
from madjax.sweep.progress import Log, OnEpoch, OnRow, Progress
from madjax.sweep.rows import made_with, run_facts
from madjax.sweep.steal import steal
from madjax.sweep.stock import Stock
from madjax.sweep.study import study
from madjax.sweep.tasks import open_tasks
from madjax.sweep.trial import tried
from madjax.sweep.victim import agrees
from madjax.sweep.work import Desk, grouped

Array = jax.Array


def run(
    config: Sweep,
    directory: str | Path,
    *,
    data_dir: str | Path | None = None,
    resume: bool = False,
    cells_per_device: int | None = None,
    devices: Sequence[jax.Device] | None = None,
    devices_per_cell: int | None = None,
    datasets: Mapping[str, Dataset] | None = None,
    memory: float | None = None,
    log: Log | None = tqdm.write,
    on_row: OnRow | None = None,
    on_epoch: OnEpoch | None = None,
) -> list[dict[str, Any]]:
    """Run a sweep into a directory and return its rows, one dict a cell.

    Everything the user gave is checked before anything is computed or written. With resume, cells
    that have their row are left alone and a wave goes on from its last whole epoch or round, but
    that it asks anew for transfer sets beyond 2 GB; the config may have more cells than that of the
    run had. cells_per_device: how many cells of a wave
    a device trains; by default one on a CPU and of wide networks (`Classifier.is_wide`), so that
    rows come early, else as many as fit. devices: those to run on, by default all.
    devices_per_cell: how many of them train one network together, each on its share of every batch;
    it divides their number. By default that is one, but for wide networks on an accelerator as many
    as let all cells of a group run at once. The results differ by rounding from those of one
    device. Queries and online attackers are not shared. datasets: data sets that are at hand, by
    the names that tasks have for them; others are opened by name, as all are to export a run.
    memory: bytes that each device may take, by default all it says it has. Images that have no room
    there stay on the host, and go to the device in parts of an epoch.

    log: gets a line for each event; without one nothing is shown, no bars either. on_row: is called
    with each row, and the `label` of its cell in it, when all of its wave are on disk. on_epoch:
    with an `Epoch` after each epoch of victims, surrogates and stolen models, when its checkpoint
    has been taken. Of several processes the first alone calls these three. What they raise ends the
    run, which may be resumed; what it does once more is told once more.

    Raises:
        InputError: see `open_dataset`, `store.open_run`, `Sweep` and `Attack.check`; data sets,
            architectures and budgets that do not fit each other; attackers that would train on the
            images they are judged by; cells of which not one fits on a device.
    """
    directory, mesh = Path(directory), make_mesh(devices)
    progress = Progress(log, on_row, on_epoch)
    arranged(mesh, 1, devices_per_cell)  # which may not divide them
    processes.meet()
    opened = processes.together(open_tasks)(config.tasks, data_dir, cache.folder(), datasets)
    ahead = processes.together(tried)(config, opened)
    description = describe(config) | {"data": [each.checksums for each in opened.values()]}
    facts = run_facts(config, description, mesh)
    options = [resume, cells_per_device, devices_per_cell, memory, len(mesh.devices)]
    told = {name: facts[name] for name in ("versions", "git_commit", "config_hash")}
    processes.check_same("data, config, options or versions", digest([options, told]))
    cells = {cell_id(cell, opened[cell.task].checksums): cell for cell in expand(config)}
    found = store.ids(directory) if resume else {}
    for group in grouped({i: c for i, c in cells.items() if i not in found}, config, ahead):
        own = arranged(mesh, len(group.places), devices_per_cell, group.parties.networks)
        check_fits(group, opened, own, memory_of(mesh, memory))
    for task, each in opened.items():
        own = arranged(mesh, 1, devices_per_cell, [each.network])
        check_fits_alone(task, config.defenses, each, own, memory_of(mesh, memory, alone=True))
    with store.open_run(directory, description, list(cells), resume=resume) as rows:
        done = {row["id"] for row in rows}
        missing = {name: cell for name, cell in cells.items() if name not in done}
        if missing:
            groups = grouped(missing, config, ahead)
            examples = sum(group.examples for group in groups)
            with progress.of_run(directory, len(cells), len(cells) - len(missing), examples):
                kept = cache.open_cache(made_with(facts))
                for task, each in opened.items():
                    if not agrees(directory, task, each.network, each.data, kept):
                        progress.log(
                            f"{task.label}: the cache has another victim than {directory}: not used"
                        )
                        kept = replace(kept, folder=None)
                stock = Stock(opened, directory, mesh, kept, progress, memory, devices_per_cell)
                ways = stock, directory, mesh, cells_per_device, devices_per_cell
                foreseen = processes.by_first(planned)(config.name, len(cells), groups, *ways)
                progress.log(foreseen.summary())
                desk = Desk(opened, directory, mesh, facts, rows, progress, devices_per_cell)
                for group in groups:
                    stopping.check()
                    if isinstance(group.attack, Online):
                        study(group, stock, desk)
                    else:
                        steal(group, stock, desk, cells_per_device)
        else:
            progress.log(f"{directory}: all cells are done")
        for left in "attack-*", "answers-*":  # of what was stopped after its last result
            store.discard(directory, left)
    return rows
