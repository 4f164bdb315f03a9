"""The white-box study of a group: attackers trained online, their evaluations and their traces."""

from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from madjax import stopping, store
from madjax.attacks import Online
from madjax.config import describe, digest
from madjax.datasets import base_name
from madjax.linear import dot
from madjax.sweep import online, rates
from madjax.sweep.clock import Stopwatch
from madjax.sweep.mesh import fetch, over_cells, spread, stack, wave_size
from madjax.sweep.rows import after, number, numbers
from madjax.sweep.stages import Point
from madjax.sweep.stock import Stock
from madjax.sweep.work import Desk, Group, Place, check_answers

Array = jax.Array

BINS = 180
"""Of the histogram of angles in rows: one degree each."""
QUANTILES = (5, 25, 50, 75, 95)
"""Percent; rows have the angle at each."""
OF_STEPS = ("batch_angle", "update_angle")
"""What a trace has of every step; the rest is of every query."""


def study(group: Group, stock: Stock, desk: Desk) -> None:
    """Train the attackers of a group together, evaluated and checkpointed after each lap.

    Each is held against the one of its task and seed at the neutral strength, so those of all
    strengths in the config train beside it.
    """
    attack = group.attack
    places = [Place(task, s, seed) for task, seed in group.owners for s in group.strengths]
    size = wave_size(len(places), desk.mesh, None, together=True)
    name, cells = group.checkpoint(places, size), stack([group.point(p) for p in places], size)
    ground = online.Ground(stock.own(group), stock.api(group), stock.tests(group))
    settings = group.parties, attack, group.rule
    start, advance, judge = (
        over_cells(stage, *settings, mesh=desk.mesh, networks=group.parties.networks)
        for stage in (online.start, online.advance, online.judge)
    )
    training = start(cells, ground)
    origin = training.attacker.params
    fields = jax.eval_shape(judge, (cells, training), ground)
    laps = {
        field: np.full((attack.laps, size), np.nan, np.float32)
        for field in (*fields, "direction_kept")
    }
    watch, first = Stopwatch(), 0
    saved = store.restore(desk.directory, name, (training, laps, np.zeros(())))
    if saved is not None:
        training, laps, watch.running = spread(saved[0], desk.mesh), saved[1], float(saved[2])
        first = -(-int(fetch(training.step)[0]) // attack.every)
    ends, stage = _ends(attack), f"{group.label}, {len(places)} attackers"
    waiting = group.those(places, attack.budget)
    batch = attack.recipe.batch_size
    desk.progress.skip(len(waiting) * batch * (ends[first - 1] if first else 0))
    desk.progress.trains(stage, first, attack.laps)
    with stopping.deferred():
        for at in range(first, attack.laps):
            with watch:
                training = advance((cells, training), ground)
                results = fetch(judge((cells, training), ground))
                for place, distance in zip(places, results["l1_mean"], strict=False):
                    check_answers(group.rule, place, distance)
                products = fetch(_products(origin, training.attacker.params))
                results["direction_kept"] = direction_kept(cells, products, group.rule.neutral)
                for field, values in results.items():
                    laps[field][at] = values
            state = fetch(training, first=True), laps, np.asarray(watch.running)
            store.save(desk.directory, name, at + 1, state)
            steps = ends[at] - (ends[at - 1] if at else 0)
            course = laps["attacker_accuracy"][at], laps["test_loss"][at]
            said = partial(group.epoch, waiting, at + 1, attack.laps, *course)
            desk.progress.trained(stage, len(waiting) * batch * steps, said)
            stopping.check()
    kind = rates.online(attack, group.rule, group.parties.stolen)
    stock.pace.note(kind, len(places) * attack.steps, watch.running)
    trace = fetch(training.trace._asdict())
    _save_traces(group, places, trace, desk)
    rows = {}
    for i, place in enumerate(places):
        if (place, attack.budget) not in group.waiting:
            continue
        course = {field: values[:, i] for field, values in laps.items()}
        row = _settings(attack, len(stock.opened[place.task].data.x_test)) | _evaluated(course)
        row |= _summary(attack, {field: values[i] for field, values in trace.items()})
        losses = np.array(row["train_losses"], float)
        row |= after(course["attacker_accuracy"], losses, group.parties.num_classes)
        rows[place] = (
            stock.facts(group, place)
            | row
            | {
                "seconds": round(watch.running / len(places), 3),
                "seconds_compiling": round(watch.compiling / len(places), 3),
            }
        )
    desk.finish(group, attack.budget, rows)
    store.discard(desk.directory, name)


def _ends(attack: Online) -> list[int]:
    """The steps of the evaluations."""
    return [min((i + 1) * attack.every, attack.steps) for i in range(attack.laps)]


def _save_traces(
    group: Group, places: list[Place], trace: dict[str, np.ndarray], desk: Desk
) -> None:
    """A file for each task and seed, in place of an older one with fewer strengths."""
    said = group.rule.describe() | group.attack.describe()
    batch = group.attack.recipe.batch_size
    by_step = {field: np.repeat(trace[field], batch, axis=1) for field in OF_STEPS}
    steps = np.arange(group.attack.budget, dtype=np.int32) // batch
    trace = {"step": np.tile(steps, (len(places), 1))} | trace | by_step
    for task, seed in group.owners:
        mine = [i for i, place in enumerate(places) if (place.task, place.seed) == (task, seed)]
        name = digest(describe([task, group.rule, group.attack, seed]))
        columns = {field: values[mine] for field, values in trace.items()} | {
            "strength": np.array([places[i].strength for i in mine]),
            "seed": np.array([seed] * len(mine)),
            "dataset": np.array(task.name),
            "queryset": np.array(base_name(task.queryset)),
            "victim_seed": np.array(task.victim_seed),
        }
        store.save_trace(
            desk.directory,
            f"attack-{name}",
            columns | {field: np.array(value) for field, value in said.items()},
        )


@jax.jit
def _products(origin: Any, params: Any) -> Array:
    """Inner products [cells, cells] of the cells' ways from their first parameters."""
    total = jnp.zeros(())
    for old, new in zip(*map(jax.tree.leaves, (origin, params)), strict=True):
        way = (new - old).reshape(len(new), -1)
        total += dot(way, way.T)
    return total


def direction_kept(cells: Point, products: np.ndarray, neutral: float | None) -> np.ndarray:
    """Cosine between a cell's way and that of its task and seed undefended; NaN where none is.

    neutral: the strength that is no defence, if there is one.
    """
    lengths = np.sqrt(np.diagonal(products))
    clean = np.full((1, len(cells.strength)), False)
    if neutral is not None:
        clean = (cells.strength == neutral)[None, :]
    for mine in (cells.seed, cells.task):
        clean = clean & (mine[:, None] == mine[None, :])
    twin = clean.argmax(1)
    cosine = np.full(len(lengths), np.nan, np.float32)
    size = lengths * lengths[twin]
    known = clean.any(1) & (size > 0)
    cosine[known] = (products[np.arange(len(twin)), twin] / np.where(size > 0, size, 1))[known]
    return np.clip(cosine, -1, 1)


def _settings(attack: Online, num_tests: int) -> dict[str, Any]:
    """The fields of a row that say how the attacker trained, and how the defender was judged."""
    return {
        "queries": attack.budget,
        "steps": attack.steps,
        "epochs": None,  # its recipe's are not used
        "refresh": attack.refresh,
        "n_judged": min(attack.judged, num_tests),
    }


def _evaluated(laps: dict[str, np.ndarray]) -> dict[str, Any]:
    """The fields of a row from its evaluations: the last of each, and the course of some."""
    row = {field: number(values[-1]) for field, values in laps.items()}
    courses = {
        "test_losses": "test_loss",
        "defender_accuracies": "defender_accuracy",
        "directions_kept": "direction_kept",
    }
    return row | {name: numbers(laps[field]) for name, field in courses.items()}


def _summary(attack: Online, trace: dict[str, np.ndarray]) -> dict[str, Any]:
    """The fields of a row from its trace; `steps_at` are the steps of the evaluations."""
    angle, batch = trace["angle"], attack.recipe.batch_size
    ends = _ends(attack)
    pieces = [slice(i * attack.every * batch, end * batch) for i, end in enumerate(ends)]
    counts, _ = np.histogram(np.clip(angle, 0, 180), BINS, (0, 180))
    return {
        "angle_mean": number(angle.mean(dtype=np.float64)),
        "angle_std": number(angle.std(dtype=np.float64)),
        "angle_max": number(angle.max()),
        **{f"angle_p{q:02}": number(np.percentile(angle, q)) for q in QUANTILES},
        "angle_histogram": counts.tolist(),
        **{f"{field}_mean": number(trace[field].mean(dtype=np.float64)) for field in OF_STEPS},
        "distance_used_mean": number(trace["distance_used"].mean(dtype=np.float64)),
        "unchanged": number(100 * np.mean(trace["distance_used"] == 0)),
        "steps_at": ends,
        "angle_means": [number(angle[piece].mean(dtype=np.float64)) for piece in pieces],
        "train_losses": [number(trace["loss"][piece].mean(dtype=np.float64)) for piece in pieces],
    }
