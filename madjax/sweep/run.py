"""From a config to rows.

What cells share is made once (stock.py), by the first stages of stages.py. Then groups of cells,
each of one defence and attack, go wave by wave through the stages that are a cell's own: a wave
collects its transfer sets, and trains and judges its stolen models at each budget. Its rows are
written when it ends, and a checkpoint after each of its rounds and epochs.
"""

from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np
from tqdm import tqdm

from madjax import store
from madjax.attacks import Online, Transfer, check_transfer
from madjax.config import Sweep, describe
from madjax.defenses import Defense
from madjax.sweep import rates, stages
from madjax.sweep.cache import open_cache
from madjax.sweep.clock import Stopwatch
from madjax.sweep.grid import cell_id, expand
from madjax.sweep.mesh import make_mesh, over_cells, spread, stack, wave_size
from madjax.sweep.plan import planned
from madjax.sweep.rows import made_with, measured, run_facts
from madjax.sweep.stages import Api, Own, Point, Tests
from madjax.sweep.stock import Stock
from madjax.sweep.study import study
from madjax.sweep.tasks import open_tasks
from madjax.sweep.trial import tried
from madjax.sweep.victim import Log, agrees
from madjax.sweep.work import Desk, Group, Place, grouped
from madjax.train import State

Array = jax.Array


def run(
    config: Sweep,
    directory: str | Path,
    *,
    data_dir: str | Path | None = None,
    resume: bool = False,
    cells_per_device: int | None = None,
    devices: Sequence[jax.Device] | None = None,
    log: Log = tqdm.write,
) -> list[dict[str, Any]]:
    """Run a sweep into a directory and return its rows, one dict a cell.

    Everything the user gave is checked before anything is computed or written. With resume, cells
    that have their row are left alone and a wave goes on from its last whole epoch or round; the
    config may have more cells than that of the run had. cells_per_device: how many cells of a wave
    a device trains; by default one on a CPU, so that rows come early, and all on an accelerator.
    devices: those to run on, by default all.

    Raises:
        InputError: see `open_dataset`, `store.open_run`, `Sweep` and `Attack.check`; data sets,
            architectures and budgets that do not fit each other; attackers that would train on the
            images they are judged by.
    """
    directory = Path(directory)
    opened = open_tasks(config.tasks, data_dir)
    ahead = tried(config, opened)
    cells = {cell_id(cell, opened[cell.task].checksums): cell for cell in expand(config)}
    description = describe(config) | {"data": [each.checksums for each in opened.values()]}
    with store.open_run(directory, description, list(cells), resume=resume) as rows:
        done = {row["id"] for row in rows}
        missing = {name: cell for name, cell in cells.items() if name not in done}
        if missing:
            mesh = make_mesh(devices)
            facts = run_facts(config, description, mesh)
            kept = open_cache(made_with(facts))
            for task, each in opened.items():
                if not agrees(directory, task, each.network, each.data, kept):
                    log(f"{task.label}: the cache has another victim than {directory}: not used")
                    kept = replace(kept, folder=None)
            stock = Stock(opened, directory, mesh, kept, log)
            groups = grouped(missing, config, ahead)
            ways = stock, directory, mesh, cells_per_device
            log(planned(config.name, len(cells), groups, *ways).summary())
            epochs = sum(group.epochs * len(group.cells) for group in groups)
            with tqdm(total=epochs, unit="epoch", desc="attackers", disable=None) as bar:
                desk = Desk(opened, directory, mesh, facts, rows, bar, log)
                for group in groups:
                    if isinstance(group.attack, Online):
                        study(group, stock, desk)
                    else:
                        _steal(group, stock, desk, cells_per_device)
        else:
            log(f"{directory}: all cells are done")
        store.discard(directory, "attack-*")  # of waves that were stopped after their last row
    return rows


class _Wave(NamedTuple):
    """Cells that are trained side by side: their checkpoints' name, their places, their numbers."""

    name: str
    places: list[Place]
    points: Point


def _steal(group: Group, stock: Stock, desk: Desk, per_device: int | None) -> None:
    """Collect the transfer sets of a group's cells, train stolen models on them, and judge them."""
    useful, own, tests = stock.utility(group), stock.own(group), stock.tests(group)
    if group.drawn is None:
        rule, api, told = group.rule, stock.api(group), {}
    else:  # all answers are made before, and no cell meets the defence
        rule, api, told = None, None, stock.told(group)
    size = wave_size(len(group.places), desk.mesh, per_device)
    for at in range(0, len(group.places), size):
        places = group.places[at : at + size]
        points = stack([group.point(place, told.get(place)) for place in places], size)
        wave = _Wave(group.checkpoint(places, size), places, points)
        transfer, collecting = _collect(wave, group, rule, own, api, stock, desk)
        for budget in group.budgets:
            waiting = {i: p for i, p in enumerate(places) if (p, budget) in group.waiting}
            if not waiting:
                continue
            state, agreed, learning = _learn(wave, group, budget, transfer, own, tests, desk)
            seen = len(places) * group.epochs * group.attack.examples(budget)
            kind = rates.stealing(group.parties.stolen, group.attack.recipe)
            stock.pace.note(kind, seen, learning.running)
            found = jax.device_get((transfer.asked, state.accuracy, state.loss, agreed))
            took = {
                "seconds": collecting.running + learning.running,
                "seconds_collecting": collecting.running,
                "seconds_compiling": collecting.compiling + learning.compiling,
            }
            collecting.compiling = 0.0  # which rows of one budget have
            took = {name: round(seconds / len(places), 3) for name, seconds in took.items()}
            judged = partial(measured, group.attack, group.parties.num_classes, budget)
            rows = {
                place: judged(useful[place], *(each[i] for each in found))
                | stock.facts(group, place)
                | took
                for i, place in waiting.items()
            }
            desk.finish(group, budget, rows)
            store.discard(desk.directory, f"{wave.name}-budget-{budget}")
        store.discard(desk.directory, f"{wave.name}-transfer")


def _collect(
    wave: _Wave,
    group: Group,
    rule: Defense | None,
    own: Own,
    api: Api | None,
    stock: Stock,
    desk: Desk,
) -> tuple[Transfer, Stopwatch]:
    """The wave's transfer sets and the seconds that took.

    Cells that meet the defence find theirs in the cache, where it has all of the wave's, and leave
    them there. Those of others are made anew from the answers, at no cost.
    """
    begin, proceed = (
        over_cells(stage, group.parties, group.attack, rule, mesh=desk.mesh)
        for stage in (stages.begin, stages.proceed)
    )
    if rule is None:
        return _ask(wave, group, begin, proceed, (own, api), desk)
    like = jax.eval_shape(begin, wave.points, (own, api))._replace(memory=())
    with stock.collecting(group, wave.places, like) as held:
        if held is not None:
            return spread(stack(held, len(wave.points.seed)), desk.mesh), Stopwatch()
        transfer, watch = _ask(wave, group, begin, proceed, (own, api), desk)
        kind = rates.collecting(group.attack, rule, group.parties.stolen)
        stock.pace.note(kind, len(wave.places) * group.attack.budget, watch.running)
        stock.keep_transfers(group, wave.places, transfer)
    return transfer, watch


def _ask(
    wave: _Wave,
    group: Group,
    begin: Callable[..., Transfer],
    proceed: Callable[..., Transfer],
    shared: tuple[Own, Api | None],
    desk: Desk,
) -> tuple[Transfer, Stopwatch]:
    """Ask all queries, round by round; a checkpoint spares the rounds it holds."""
    name = f"{wave.name}-transfer"

    def keep(done: int) -> None:
        state = transfer, np.asarray(watch.running), np.asarray(done)
        store.save(desk.directory, name, done, state)

    like = jax.eval_shape(begin, wave.points, shared)
    saved = store.restore(desk.directory, name, (like, np.zeros(()), np.zeros((), int)))
    if saved is None:
        watch, first = Stopwatch(), 0
        with watch:
            transfer = jax.block_until_ready(begin(wave.points, shared))
        if shared[1] is not None:  # else they are made anew at no cost
            keep(0)
    else:
        transfer = spread(saved[0], desk.mesh)
        watch, first = Stopwatch(float(saved[1])), int(saved[2])
    for r in range(first, group.attack.rounds):
        with watch:
            transfer = proceed((wave.points, transfer), (*shared, np.int32(r)))
            jax.block_until_ready(transfer)
        keep(r + 1)
        desk.log(
            f"{group.label}: round {r + 1} of {group.attack.rounds}, "
            f"{int(transfer.asked[0]):,} queries, {watch.running:.0f} s"
        )
    check_transfer(group.attack, transfer)
    return transfer._replace(memory=()), watch


def _learn(
    wave: _Wave,
    group: Group,
    budget: int,
    transfer: Transfer,
    own: Own,
    tests: Tests,
    desk: Desk,
) -> tuple[State, Array, Stopwatch]:
    """The wave's stolen models after their last epoch, their fidelity, and the seconds."""
    attack, stolen, name = group.attack, group.parties.stolen, f"{wave.name}-budget-{budget}"
    settings = stolen, attack.recipe, attack.examples(attack.budget)
    start = over_cells(stages.start, *settings, mesh=desk.mesh)
    advance = over_cells(stages.advance, *settings, mesh=desk.mesh)
    fidelity = over_cells(stages.fidelity, stolen, mesh=desk.mesh)
    points, count = wave.points._replace(told=None), np.int32(attack.examples(budget))
    cells = sum((place, budget) in group.waiting for place in wave.places)
    watch = Stopwatch()
    with watch:
        state = start(points, None)
    saved = store.restore(desk.directory, name, (state, np.zeros(())))
    if saved is not None:
        state, watch.running = spread(saved[0], desk.mesh), float(saved[1])
    finished = int(state.epoch[0])
    desk.bar.update(cells * finished)
    for e in range(finished, group.epochs):
        with watch:
            shared = own.images, tests, count
            state = jax.block_until_ready(advance((points, transfer, state), shared))
        store.save(desk.directory, name, e + 1, (state, np.asarray(watch.running)))
        desk.bar.update(cells)
    with watch:
        agreed = jax.block_until_ready(fidelity((points, state), tests))
    return state, agreed, watch
