"""Stolen models of a group's cells: transfer sets, training, judging, rows.

What came of a stolen model is kept in the cache by its transfer set and its training, so that cells
of equal sets are trained once, whatever the defence was. The others go wave by wave through the
stages that are a cell's own; a wave's rows are written when it ends, and a checkpoint after each of
its epochs, and of its rounds where they are small.
"""

from collections.abc import Callable
from dataclasses import replace
from functools import partial
from typing import Any, NamedTuple

import jax
import numpy as np

from madjax import stopping, store
from madjax.attacks import Transfer, check_transfer
from madjax.defenses import Defense
from madjax.sweep import rates, stages
from madjax.sweep.cache import Maker
from madjax.sweep.clock import Stopwatch
from madjax.sweep.load import at_once, sends_numbers, transfer_bytes, wave_of
from madjax.sweep.mesh import arranged, everywhere, fetch, over_cells, spread, stack
from madjax.sweep.progress import Epoch
from madjax.sweep.rows import measured
from madjax.sweep.stages import Api, Own, Point, Tests
from madjax.sweep.stock import Stock
from madjax.sweep.work import Desk, Group, Place
from madjax.train import State, parts

Array = jax.Array

LARGEST_ROUND = 2**31
"""Bytes of a transfer set whose rounds are checkpointed: 39 GB at 224x224 are sooner made anew."""


class _Wave(NamedTuple):
    """Cells that are trained side by side: their checkpoints' name, their places, their numbers."""

    name: str
    places: list[Place]
    points: Point


def steal(group: Group, stock: Stock, desk: Desk, per_device: int | None) -> None:
    """Collect the transfer sets of a group's cells, train stolen models on them, and judge them."""
    group = _without_known(group, stock, desk, per_device)
    if not group.cells:
        return
    networks = group.parties.networks
    desk = replace(desk, mesh=arranged(desk.mesh, len(group.places), desk.per_cell, networks))
    useful, tests = stock.utility(group), stock.tests(group)
    size = wave_of(group, stock.opened, desk.mesh, per_device, stock.memory)
    cells = size // desk.mesh.shape["cells"]
    part = at_once(group, stock.opened, desk.mesh, cells, stock.memory)
    whole = stock.own(group) if part is None else None
    own = stock.own(group, unseen=True) if sends_numbers(group, stock.opened) else whole
    images = None if whole is None else whole.images
    if group.drawn is None:
        rule, api, told = group.rule, stock.api(group), {}
    else:  # all answers are made before, and no cell meets the defence
        rule, api, told = None, None, stock.told(group)
    for at in range(0, len(group.places), size):
        places = group.places[at : at + size]
        points = stack([group.point(place, told.get(place)) for place in places], size)
        wave = _Wave(group.checkpoint(places, size), places, points)
        transfer, collecting = _collect(wave, group, rule, own, api, stock, desk)
        for budget in group.budgets:
            waiting = {i: p for i, p in enumerate(places) if (p, budget) in group.waiting}
            if not waiting:
                continue
            stolen, learning = _stolen(
                wave, group, budget, transfer, images, tests, part, stock, desk
            )
            took = {
                "seconds": collecting.running + learning.running,
                "seconds_collecting": collecting.running,
                "seconds_compiling": collecting.compiling + learning.compiling,
            }
            collecting.compiling = 0.0  # which rows of one budget have
            took = {name: round(seconds / len(places), 3) for name, seconds in took.items()}
            rows = {
                place: _row(group, place, budget, useful, stolen[i], stock) | took
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
    settings, ways = (group.parties, group.attack, rule), _ways(group, desk)
    begin = over_cells(stages.begin, *settings, **ways)
    proceed = over_cells(stages.proceed, *settings, **ways, in_place=True)  # sets may be large
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
    name, small = f"{wave.name}-transfer", transfer_bytes(group) <= LARGEST_ROUND

    def keep(done: int) -> None:
        if not small:
            return
        state = fetch(transfer, first=True), np.asarray(watch.running), np.asarray(done)
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
    desk.progress.at(group.label, first, group.attack.rounds, "round")
    with stopping.deferred():
        for r in range(first, group.attack.rounds):
            with watch:
                transfer = proceed((wave.points, transfer), (*shared, np.int32(r)))
                jax.block_until_ready(transfer)
            keep(r + 1)
            asked = f"{int(fetch(transfer.asked)[0]):,} queries"
            desk.progress.at(f"{group.label}, {asked}", r + 1, group.attack.rounds, "round")
            desk.progress.log(
                f"{group.label}: round {r + 1} of {group.attack.rounds}, {asked}, "
                f"{watch.running:.0f} s"
            )
            stopping.check()
    check_transfer(group.attack, transfer)
    return transfer._replace(memory=()), watch


def _ways(group: Group, desk: Desk) -> dict[str, Any]:
    """Where the cells of a group are, and what says whether side by side."""
    return {"mesh": desk.mesh, "networks": group.parties.networks}


class _Learned(NamedTuple):
    """What came of a stolen model: queries asked, accuracy and loss of its epochs, fidelity."""

    asked: np.ndarray
    accuracy: np.ndarray
    loss: np.ndarray
    fidelity: np.ndarray


class _Stolen(NamedTuple):
    """What came of a stolen model, and what made it."""

    learned: _Learned
    maker: Maker


def _row(
    group: Group,
    place: Place,
    budget: int,
    useful: dict[Place, dict[str, float]],
    stolen: _Stolen,
    stock: Stock,
) -> dict[str, Any]:
    """The fields of a cell's row that were measured, and what made them."""
    classes = group.parties.num_classes
    row = measured(group.attack, classes, budget, useful[place], *stolen.learned)
    return row | stock.facts(group, place, stolen.maker)


def _like(group: Group) -> _Learned:
    shapes = (group.attack.recipe.epochs,), ()
    course, one = (jax.ShapeDtypeStruct(shape, np.float32) for shape in shapes)
    return _Learned(jax.ShapeDtypeStruct((), np.int32), course, course, one)


def _without_known(group: Group, stock: Stock, desk: Desk, per_device: int | None) -> Group:
    """Write the rows of cells whose stolen models the cache has; the group of the others.

    An equal transfer set makes an equal stolen model, whatever the defence was.
    """
    if stock.kept.folder is None:
        return group
    made: dict[Place, list[np.ndarray]] = {place: [] for place in group.places}
    if group.drawn is not None:
        told = stock.told(group)
        own = stock.own(group, unseen=sends_numbers(group, stock.opened))
        begin = over_cells(stages.begin, group.parties, group.attack, None, **_ways(group, desk))
        size = wave_of(group, stock.opened, desk.mesh, per_device, stock.memory)
        for at in range(0, len(group.places), size):
            places = group.places[at : at + size]
            points = stack([group.point(place, told[place]) for place in places], size)
            transfer = fetch(begin(points, (own, None)))
            made |= {p: [transfer.x[i], transfer.targets[i]] for i, p in enumerate(places)}
    found: dict[int, dict[Place, _Stolen]] = {}
    for place, budget in group.waiting:
        held = stock.kept.get(stock.keys.stolen(group, place, budget, made[place]), _like(group))
        if held is not None:
            found.setdefault(budget, {})[place] = _Stolen(*held)
    if not found:
        return group
    useful = stock.utility(group)
    free = {"seconds": 0.0, "seconds_collecting": 0.0, "seconds_compiling": 0.0}
    for budget, each in found.items():
        rows = {p: _row(group, p, budget, useful, held, stock) | free for p, held in each.items()}
        desk.finish(group, budget, rows)
        desk.progress.skip(group.seen(budget) * len(rows))
    known = {group.waiting[place, budget] for budget, each in found.items() for place in each}
    return replace(group, cells={n: c for n, c in group.cells.items() if n not in known})


def _stolen(
    wave: _Wave,
    group: Group,
    budget: int,
    transfer: Transfer,
    images: Array | None,
    tests: Tests,
    part: int | None,
    stock: Stock,
    desk: Desk,
) -> tuple[list[_Stolen], Stopwatch]:
    """What came of the wave's stolen models, which another command may have trained meanwhile."""
    # One that is not foreseen has another key than its arrays, which may be large.
    made = fetch((transfer.x, transfer.targets)) if group.drawn is not None else ()
    keys = [
        stock.keys.stolen(group, place, budget, [each[i] for each in made])
        for i, place in enumerate(wave.places)
    ]
    with stock.alone_with(keys, _like(group)) as held:
        if held is not None:
            desk.progress.skip(group.seen(budget) * len(group.those(wave.places, budget)))
            return [_Stolen(*each) for each in held], Stopwatch()
        state, agreed, watch = _learn(
            wave, group, budget, transfer, images, tests, part, stock, desk
        )
        found = fetch((transfer.asked, state.accuracy, state.loss, agreed))
        learned = [_Learned(*(each[i] for each in found)) for i in range(len(keys))]
        for key, each in zip(keys, learned, strict=True):
            stock.kept.put(key, each)
    seen = len(keys) * group.seen(budget)
    kind = rates.stealing(group.parties.stolen, group.attack.recipe)
    stock.pace.note(kind, seen, watch.running)
    return [_Stolen(each, stock.kept.maker) for each in learned], watch


def _learn(
    wave: _Wave,
    group: Group,
    budget: int,
    transfer: Transfer,
    images: Array | None,
    tests: Tests,
    part: int | None,
    stock: Stock,
    desk: Desk,
) -> tuple[State, Array, Stopwatch]:
    """The wave's stolen models after their last epoch, their fidelity, and the seconds.

    images: the attackers' own, on the devices; where they are on the host, part says how many a
    cell is sent at a time.
    """
    attack, stolen, name = group.attack, group.parties.stolen, f"{wave.name}-budget-{budget}"
    settings = stolen, attack.recipe, attack.examples(attack.budget)
    start = over_cells(stages.start, *settings, **_ways(group, desk))
    fidelity = over_cells(stages.fidelity, stolen, **_ways(group, desk))
    points, count = wave.points._replace(told=None), np.int32(attack.examples(budget))
    those, epochs = group.those(wave.places, budget), attack.recipe.epochs
    examples = int(count) * len(those)
    initial = everywhere(attack.recipe.initial(stolen), desk.mesh)
    watch = Stopwatch()
    with watch:
        state = start(points, initial)
    saved = store.restore(desk.directory, name, (state, np.zeros(())))
    if saved is not None:
        state, watch.running = spread(saved[0], desk.mesh), float(saved[1])
    finished = int(fetch(state.epoch)[0])
    desk.progress.skip(examples * finished)
    if images is not None:
        whole = over_cells(stages.advance, *settings, **_ways(group, desk))

        def advance(state: State) -> State:
            return whole((points, transfer, state), (images, tests, count))
    else:
        advance = _in_parts(wave, group, budget, transfer, tests, part, stock, desk)
    stage = f"{group.label}, {len(those)} stolen models"
    desk.progress.trains(stage, finished, epochs)
    with stopping.deferred():
        for e in range(finished, epochs):
            with watch:
                state = jax.block_until_ready(advance(state))
            mine = fetch(state, first=True)
            store.save(desk.directory, name, e + 1, (mine, np.asarray(watch.running)))
            desk.progress.trained(stage, examples, partial(_epoch, group, those, e, epochs, mine))
            stopping.check()
    with watch:
        agreed = jax.block_until_ready(fidelity((points, state), tests))
    return state, agreed, watch


def _epoch(group: Group, those: dict[int, str], e: int, epochs: int, state: State) -> Epoch:
    return group.epoch(those, e + 1, epochs, state.accuracy[:, e], state.loss[:, e])


def _in_parts(
    wave: _Wave,
    group: Group,
    budget: int,
    transfer: Transfer,
    tests: Tests,
    part: int,
    stock: Stock,
    desk: Desk,
) -> Callable[[State], State]:
    """An epoch of the wave's stolen models, whose images are on the host and come in parts."""
    attack, stolen = group.attack, group.parties.stolen
    size, count = attack.examples(attack.budget), np.int32(attack.examples(budget))
    visited = over_cells(stages.visited, size, **_ways(group, desk))
    some = over_cells(stages.advance_part, stolen, attack.recipe, **_ways(group, desk))
    judged = over_cells(stages.judged, stolen, **_ways(group, desk))
    points, sent = wave.points._replace(told=None), fetch(transfer.x)
    images = [stock.opened[task].sources[attack.source].images for task in group.tasks]

    def sent_to(orders: np.ndarray) -> Array:
        """Of each cell those at the same places of its order."""
        cells = zip(points.task, sent, orders, strict=True)
        return spread(np.stack([images[t][own[numbers]] for t, own, numbers in cells]), desk.mesh)

    def advance(state: State) -> State:
        orders = fetch(visited(state, count))[:, :count]
        batch = attack.recipe.batch_size
        for each in parts(lambda at: sent_to(orders[:, at]), np.arange(count), batch, part):
            jax.block_until_ready(state)
            state = some((transfer, state, each.images), (count, each.first, each.stop))
        return judged((points, state), tests)

    return advance
