"""What the cells of a run share, each made once: victims, prepared defences, utility, answers."""

import time
from collections.abc import Callable, Hashable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from madjax.attacks import keys
from madjax.batching import QUERIES
from madjax.config import Task
from madjax.defenses import Defense, Owner
from madjax.streams import stream
from madjax.sweep import stages
from madjax.sweep.mesh import everywhere, over_rows
from madjax.sweep.rows import task_facts
from madjax.sweep.stages import Api, Own, Tests
from madjax.sweep.tasks import Opened
from madjax.sweep.victim import Log, keeper, owner_of, train_victim
from madjax.sweep.work import Group, Place, check_answers
from madjax.train import State

Array = jax.Array


class _Victim(NamedTuple):
    """A trained victim, its owner, and its posteriors of the test set."""

    owner: Owner
    state: State
    y: np.ndarray


class Stock:
    """The results of the stages that many cells read.

    What belongs to a defence is dropped as soon as another one is asked for.
    """

    def __init__(self, opened: Mapping[Task, Opened], directory: Path, mesh: Mesh, log: Log):
        self._opened, self._directory, self._mesh, self._log = opened, directory, mesh, log
        self._victims: dict[Task, _Victim] = {}
        self._rule: Defense | None = None
        self._of_rule: dict[Any, Any] = {}

    def facts(self, task: Task) -> dict[str, Any]:
        """The fields that all rows of a task share."""
        return task_facts(self._opened[task].data, self._victim(task).state)

    def own(self, group: Group) -> Own:
        """The attackers' images, on every device: one table where all tasks share it."""
        found = [self._opened[task].sources[group.attack.source] for task in group.tasks]
        if all(each is found[0] for each in found):
            found = found[:1]
        images, labels = (np.stack([each[i] for each in found]) for i in range(2))
        return everywhere(Own(images, labels), self._mesh)

    def tests(self, group: Group) -> Tests:
        """The test sets, on every device."""
        each = [
            (self._opened[task].data.x_test, self._opened[task].data.y_test, self._victim(task).y)
            for task in group.tasks
        ]
        return everywhere(Tests(*map(np.stack, zip(*each, strict=True))), self._mesh)

    def api(self, group: Group) -> Api:
        """The victims, and what the defence knows for each of `Group.owners`, on every device."""
        victims = [self._victim(task).state.params for task in group.tasks]
        known = [self._known(group, task, seed) for task, seed in group.owners]
        return everywhere(Api(*map(_stacked, (victims, known))), self._mesh)

    def utility(self, group: Group) -> dict[Place, dict[str, float]]:
        """What the defence costs honest users, at each place, measured on the test set.

        Raises:
            InputError: a defence that answers NaN.
        """
        found = {}
        for owner in group.owners:
            found |= self._at_places(group, *owner, "utility", self._utility)
        for place, values in found.items():
            check_answers(group.rule, place, values["l1_mean"])
        return found

    def told(self, group: Group) -> dict[Place, np.ndarray]:
        """The answers [Q, K] to the queries that the attack sends, at each place."""
        began, found = time.perf_counter(), {}
        for task, seed in group.owners:
            sent = group.drawn[task][seed]
            make = partial(self._told, sent=sent)
            what = group.attack.source, sent.tobytes()
            found |= self._at_places(group, task, seed, what, make)
        self._log(
            f"{group.label}: {len(found)} x {group.attack.budget:,} queries answered in "
            f"{time.perf_counter() - began:.1f} s"
        )
        return found

    def _at_places(
        self,
        group: Group,
        task: Task,
        seed: int,
        what: Hashable,
        make: Callable[[Group, Task, int, tuple[float, ...]], Sequence[Any]],
    ) -> dict[Place, Any]:
        """A result at the group's strengths; those that are not there are made in one pass."""
        made = self._of(group.rule).setdefault((what, task, seed), {})
        wanted = [place for place in group.places if (place.task, place.seed) == (task, seed)]
        missing = tuple(place.strength for place in wanted if place.strength not in made)
        if missing:
            made |= zip(missing, make(group, task, seed, missing), strict=True)
        return {place: made[place.strength] for place in wanted}

    def _utility(
        self, group: Group, task: Task, seed: int, strengths: tuple[float, ...]
    ) -> list[dict[str, float]]:
        data, y = self._opened[task].data, self._victim(task).y
        key = stream(keys(seed)["defense"], "tests")
        told = self._answers(group, task, seed, key, data.x_test, y, strengths)
        measured = jax.device_get(stages.utility(y, told, data.y_test))
        return [{name: each[i] for name, each in measured.items()} for i in range(len(told))]

    def _told(
        self, group: Group, task: Task, seed: int, strengths: tuple[float, ...], sent: np.ndarray
    ) -> np.ndarray:
        images = self._opened[task].sources[group.attack.source].images
        which, at = np.unique(sent, return_inverse=True)
        y = self._posteriors(task, self._victim(task).state.params, images[which])
        key = keys(seed)["defense"]
        return self._answers(group, task, seed, key, images[which], y, strengths, at)

    def _answers(
        self,
        group: Group,
        task: Task,
        seed: int,
        key: Array,
        images: np.ndarray,
        y: np.ndarray,
        strengths: tuple[float, ...],
        sent: np.ndarray | None = None,
    ) -> np.ndarray:
        return stages.answers(
            group.rule,
            self._opened[task].network,
            self._known(group, task, seed),
            key,
            images,
            y,
            strengths,
            sent=sent,
            over=over_rows(self._mesh),
            chunk=QUERIES * self._mesh.size,
        )

    def _posteriors(self, task: Task, params: Any, images: np.ndarray) -> np.ndarray:
        network, over = self._opened[task].network, over_rows(self._mesh)
        return stages.victim_posteriors(network, params, images, over=over)

    def _known(self, group: Group, task: Task, seed: int) -> Any:
        """What the defence has prepared for a victim and a seed."""
        rule, strengths = group.rule, group.strengths
        made = self._of(rule)
        if (task, seed) not in made:
            began = time.perf_counter()
            owner = self._victim(task).owner
            known = rule.prepare(owner, keys(seed)["surrogate"], strengths)
            made[task, seed] = jax.block_until_ready(known)
            took = f"{time.perf_counter() - began:.1f} s"
            self._log(f"{task.label}, {rule.label}: prepared for seed {seed} in {took}")
        return made[task, seed]

    def _of(self, rule: Defense) -> dict[Any, Any]:
        """The results that belong to a defence."""
        if rule != self._rule:
            self._rule, self._of_rule = rule, {}
        return self._of_rule

    def _victim(self, task: Task) -> _Victim:
        if task not in self._victims:
            each = self._opened[task]
            keep = keeper(self._directory, task, each.network, each.data, self._log)
            owner = owner_of(task, each.network, each.data, keep)
            state = train_victim(owner)
            y = self._posteriors(task, state.params, each.data.x_test)
            self._victims[task] = _Victim(owner, state, y)
        return self._victims[task]


def _stacked(trees: Sequence[Any]) -> Any:
    return jax.tree.map(lambda *leaves: jnp.stack(leaves), *trees)
