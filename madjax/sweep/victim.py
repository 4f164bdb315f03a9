"""The victim, and all else that its owner trains, each with a checkpoint after every epoch."""

from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from madjax import processes, stopping, store
from madjax.batching import bytes_of
from madjax.config import Task, describe, digest, name_of
from madjax.datasets import Dataset
from madjax.defenses import Owner
from madjax.defenses.defense import Training, untracked
from madjax.errors import InputError
from madjax.models import Classifier
from madjax.recipe import Recipe
from madjax.sweep import cache, rates
from madjax.sweep.cache import Cache, Key, Maker
from madjax.sweep.clock import Stopwatch
from madjax.sweep.mesh import examples_shared
from madjax.sweep.progress import Progress
from madjax.sweep.rates import Rates
from madjax.train import State, check_converges, start
from madjax.weights import Trained

Array = jax.Array
Keep = Callable[[str, Training], State]
"""`Owner.keep`."""

VICTIM = 6
"""Folded into the victim's key, so that it shares no randomness with an attacker of its seed."""


def owner_of(task: Task, victim: Classifier, data: Dataset, keep: Keep) -> Owner:
    """The victim's owner, who trains by `keep`."""
    key = jax.random.fold_in(jax.random.key(task.victim_seed), VICTIM)
    train, test = (data.x_train, data.y_train), (data.x_test, data.y_test)
    return Owner(victim, task.victim, key, train, test, keep)


def keeper(
    directory: Path,
    task: Task,
    victim: Classifier,
    data: Dataset,
    kept: Cache,
    pace: Rates,
    found: Callable[[str, Maker], None],
    progress: Progress,
    mesh: Mesh,
    at_once: Callable[[Classifier, Recipe, np.ndarray], int | None],
) -> Keep:
    """The `Owner.keep` of a run: training goes on from the checkpoint in its directory.

    A finished network lies there, and in the cache for other runs, with what made it, of which
    found(name, maker) is told; pace is told how long training took. Victims that several tasks
    share are trained once, each by the devices of the mesh that share a cell, on `at_once` images
    at a time. It raises InputError as soon as training diverges, and keeps no checkpoint of that.
    """
    num_examples = len(data.x_train)

    def keep(name: str, train: Training) -> State:
        recipe = train.recipe
        folder, whole = identified(name, task, data, train)
        like = _like(victim, recipe, num_examples)
        saved = store.restore(directory, folder, like)
        done = int(saved.epoch) if saved else 0

        def after_epoch(state: State) -> None:
            processes.together(check_converges)(name, recipe, state)  # waits for the last step
            with watch.paused():
                store.save(directory, folder, int(state.epoch), state)
                if int(state.epoch) == recipe.epochs:
                    store.sign(directory, folder, kept.maker)
                told(*(float(each[int(state.epoch) - 1]) for each in (state.accuracy, state.loss)))
            stopping.check()

        title = f"{task.name}, {name}"
        with kept.alone(whole, progress.log):
            held = kept.get(whole, like)
            if held is not None:
                state, maker = held
                found(name, maker)
                if done < recipe.epochs:
                    store.save(directory, folder, recipe.epochs, state)
                    store.sign(directory, folder, maker)
                return jax.tree.map(jnp.asarray, state)
            with (
                progress.network(title, folder, done, recipe.epochs, num_examples) as told,
                Stopwatch() as watch,
                stopping.deferred(),
                examples_shared(mesh),
            ):
                state = train(
                    state=jax.tree.map(jnp.asarray, saved),
                    after_epoch=after_epoch,
                    at_once=at_once(victim, recipe, train.data[0]),
                )
            host = jax.tree.map(np.asarray, state)
            # Each process has trained it, and they may round otherwise; on one device again.
            state = jax.tree.map(jnp.asarray, processes.by_first(lambda: host)())
            maker = store.maker_of(directory, folder)
            if maker is not None:  # else a command was killed before it signed
                found(name, maker)
                kept.put(whole, state, maker)
        kind = rates.training(victim, recipe)
        pace.note(kind, (recipe.epochs - done) * num_examples, watch.running)
        if done < recipe.epochs:
            progress.log(
                f"{title}: {name_of(type(victim.module))}, {num_examples:,} images, "
                f"{recipe.epochs} epochs: {float(state.accuracy[-1]):.2f} % of the test images"
            )
        return state

    return keep


def agrees(directory: Path, task: Task, victim: Classifier, data: Dataset, kept: Cache) -> bool:
    """Whether directory and cache hold the same victim, where both hold one.

    They may not where the run was begun on another kind of machine, which rounds otherwise.
    """
    if isinstance(task.victim, Trained):  # neither holds it
        return True
    owner = owner_of(task, victim, data, untracked)
    folder, whole = identified("victim", task, data, owner.victim)
    if not (kept.has(whole) and store.holds(directory, folder, task.victim.epochs)):
        return True
    like = _like(victim, task.victim, len(data.x_train))
    here, held = store.restore(directory, folder, like), kept.get(whole, like)
    if here is None or held is None:  # one is damaged
        return True
    return all(map(np.array_equal, *map(jax.tree.leaves, (here.params, held[0].params))))


class Planned(NamedTuple):
    """A network that a run would train."""

    name: str | None
    """Of its checkpoint; None where its key is traced."""
    held: bool
    """Whether it is in the run's directory or in the cache."""
    kind: str
    """Of work, see `rates`."""
    amount: int
    """Examples times epochs."""
    size: int
    """Bytes of its checkpoint."""


def planner(
    directory: Path, task: Task, victim: Classifier, data: Dataset, kept: Cache
) -> tuple[Keep, list[Planned]]:
    """The `Owner.keep` of who plans a run, inside a trace, and the list of what it is asked for."""
    found: list[Planned] = []

    def keep(name: str, train: Training) -> State:
        held, folder, recipe = False, None, train.recipe
        if not isinstance(train.key, jax.core.Tracer):
            with jax.ensure_compile_time_eval():  # of the key's numbers, which are known
                folder, whole = identified(name, task, data, train)
            held = kept.has(whole) or store.holds(directory, folder, recipe.epochs)
        kind = rates.training(victim, recipe)
        state = start(victim, recipe, len(data.x_train), train.key)
        size = bytes_of(state)
        found.append(Planned(folder, held, kind, recipe.epochs * len(data.x_train), size))
        return state

    return keep, found


def finder(directory: Path, task: Task, victim: Classifier, data: Dataset) -> Keep:
    """The `Owner.keep` of who reads a finished run: what is not there is an error, not trained."""

    def keep(name: str, train: Training) -> State:
        recipe = train.recipe
        folder, _ = identified(name, task, data, train)
        saved = store.restore(directory, folder, _like(victim, recipe, len(data.x_train)))
        if saved is None or int(saved.epoch) < recipe.epochs:
            raise InputError(
                f"{directory} holds no {name} trained for {recipe.epochs} epochs: finish the run "
                "with madjax sweep --resume, or choose what it has"
            )
        return saved

    return keep


def victim_key(task: Task, victim: Classifier, data: Dataset) -> Key:
    """The key of the undefended victim in the cache."""
    if isinstance(task.victim, Trained):
        inputs = _network(task, data) | {"weights": describe(task.victim)}
        return cache.key("network", f"{task.name}, victim", **inputs)
    owner = owner_of(task, victim, data, untracked)
    return identified("victim", task, data, owner.victim)[1]


def identified(name: str, task: Task, data: Dataset, train: Training) -> tuple[str, Key]:
    """What a network of a task's owner is called in a run's directory, and its key in the cache.

    Other data, networks and trainings have other names and keys.
    """
    inputs = _inputs(task, data, train)
    key = cache.key("network", f"{task.name}, {name}", **inputs)
    return f"{name}-{digest(inputs)}", key


def _inputs(task: Task, data: Dataset, train: Training) -> dict[str, Any]:
    """All that determines a network but the machine."""
    same = train.data[0] is data.x_train and train.data[1] is data.y_train
    return _network(task, data) | {
        "recipe": describe(train.recipe),
        "key": jax.random.key_data(train.key).tolist(),
        "owned": None if same else describe([np.asarray(each) for each in train.data]),
    }


def _network(task: Task, data: Dataset) -> dict[str, Any]:
    """What tells a network of a task's owner from those of others, but for its parameters."""
    return {
        "architecture": describe(task.architecture),
        "data": [data.checksum(), data.num_classes, describe(data.family)],
    }


def _like(victim: Classifier, recipe: Recipe, num_examples: int) -> State:
    """The shapes of a training's state."""
    return jax.eval_shape(partial(start, victim, recipe, num_examples), jax.random.key(0))
