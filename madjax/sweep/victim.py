"""The victim, and all else that its owner trains, each with a checkpoint after every epoch."""

from collections.abc import Callable
from functools import partial
from pathlib import Path

import jax
import jax.numpy as jnp
from tqdm import tqdm

from madjax import store
from madjax.config import Task, describe, digest, name_of
from madjax.datasets import Dataset
from madjax.defenses import Owner
from madjax.errors import InputError
from madjax.models import Classifier
from madjax.train import Recipe, State, check_converges, fit, start

Array = jax.Array
Log = Callable[[str], None]
Keep = Callable[[str, Recipe, Array, Callable[..., State]], State]
"""`Owner.keep`."""

VICTIM = 6
"""Folded into the victim's key, so that it shares no randomness with an attacker of its seed."""


def owner_of(task: Task, victim: Classifier, data: Dataset, keep: Keep) -> Owner:
    """The victim's owner, who trains by `keep`."""
    key = jax.random.fold_in(jax.random.key(task.victim_seed), VICTIM)
    train, test = (data.x_train, data.y_train), (data.x_test, data.y_test)
    return Owner(victim, task.victim, key, train, test, keep)


def keeper(directory: Path, task: Task, victim: Classifier, data: Dataset, log: Log) -> Keep:
    """The `Owner.keep` of a run: training goes on from the checkpoint in its directory.

    Victims that several tasks share are trained once. It raises InputError as soon as training
    diverges, and keeps no checkpoint of that.
    """
    num_examples = len(data.x_train)

    def keep(name: str, recipe: Recipe, key: Array, train: Callable[..., State]) -> State:
        folder = _folder(name, task, data, recipe, key)
        saved = _restore(directory, folder, victim, recipe, num_examples)
        done = int(saved.epoch) if saved else 0
        bar = tqdm(total=recipe.epochs, initial=done, unit="epoch", desc=name, disable=None)

        def after_epoch(state: State) -> None:
            check_converges(name, recipe, state)
            store.save(directory, folder, int(state.epoch), state)
            bar.update()

        with bar:
            state = train(state=jax.tree.map(jnp.asarray, saved), after_epoch=after_epoch)
        if done < recipe.epochs:
            log(
                f"{task.name}, {name}: {name_of(type(victim.module))}, {num_examples:,} images, "
                f"{recipe.epochs} epochs: {float(state.accuracy[-1]):.2f} % of the test images"
            )
        return state

    return keep


def train_victim(owner: Owner) -> State:
    """The undefended victim."""
    return owner.keep(
        "victim",
        owner.recipe,
        owner.key,
        partial(fit, owner.classifier, owner.recipe, owner.key, owner.data, owner.test),
    )


def finder(directory: Path, task: Task, victim: Classifier, data: Dataset) -> Keep:
    """The `Owner.keep` of who reads a finished run: what is not there is an error, not trained."""

    def keep(name: str, recipe: Recipe, key: Array, train: Callable[..., State]) -> State:
        del train
        folder = _folder(name, task, data, recipe, key)
        saved = _restore(directory, folder, victim, recipe, len(data.x_train))
        if saved is None or int(saved.epoch) < recipe.epochs:
            raise InputError(
                f"{directory} holds no {name} trained for {recipe.epochs} epochs: finish the run "
                "with madjax sweep --resume, or choose what it has"
            )
        return saved

    return keep


def _folder(name: str, task: Task, data: Dataset, recipe: Recipe, key: Array) -> str:
    """A checkpoint's name: other data, networks, recipes and keys have others."""
    said = [describe(task.architecture), data.checksum(), describe(recipe)]
    return f"{name}-{digest([*said, jax.random.key_data(key).tolist()])}"


def _restore(
    directory: Path, folder: str, victim: Classifier, recipe: Recipe, num_examples: int
) -> State | None:
    like = jax.eval_shape(partial(start, victim, recipe, num_examples), jax.random.key(0))
    return store.restore(directory, folder, like)
