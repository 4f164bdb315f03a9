"""What results of a run's stages are: the keys by which the cache knows them."""

from collections.abc import Mapping
from typing import Any, NamedTuple

import numpy as np

from madjax.config import Task, describe
from madjax.defenses import Defense
from madjax.sweep import cache
from madjax.sweep.cache import Key
from madjax.sweep.tasks import Opened
from madjax.sweep.victim import victim_key
from madjax.sweep.work import Group, Place


class Asked(NamedTuple):
    """Images that a victim is asked about: each once, or those at `which`, query by query."""

    source: np.ndarray
    inputs: list[Any]
    """What tells them from others."""
    which: np.ndarray | None = None
    sent: np.ndarray | None = None
    """Which of these each query sends."""

    @property
    def images(self) -> np.ndarray:
        """Those that are asked about; a copy, where they are not all."""
        return self.source if self.which is None else self.source[self.which]

    @property
    def size(self) -> int:
        """Images."""
        return len(self.source if self.which is None else self.which)

    @property
    def count(self) -> int:
        """Queries."""
        return self.size if self.sent is None else len(self.sent)

    @property
    def repeats(self) -> int:
        """How often the image is sent that is sent most."""
        return 1 if self.sent is None else int(np.bincount(self.sent).max())


class Keyring:
    """The keys of results behind the cells of some tasks."""

    def __init__(self, opened: Mapping[Task, Opened]):
        self._opened = opened
        self._victims: dict[Task, Key] = {}

    def victim(self, task: Task) -> Key:
        """The key of a task's victim."""
        if task not in self._victims:
            each = self._opened[task]
            self._victims[task] = victim_key(task, each.network, each.data)
        return self._victims[task]

    def transfer(self, group: Group, place: Place) -> Key:
        """The key of a cell's transfer set."""
        task, strength, seed = place
        return cache.key(
            "transfer",
            f"{task.label}, {group.label}, strength {strength:g}, seed {seed}",
            victim=self.victim(task),
            rule=describe(group.rule),
            attack=describe(group.attack),
            own=self._opened[task].checksums[group.attack.source],
            labels=group.parties.num_labels,
            strength=strength,
            seed=seed,
        )

    def stolen(self, group: Group, place: Place, budget: int, made: Any) -> Key:
        """The key of what came of a stolen model; made are the arrays of its transfer set.

        So equal transfer sets have one, whatever the defence was. The key of the set itself stands
        for one that is collected as the defence answers.
        """
        attack = group.attack
        return cache.key(
            "stolen",
            f"{place.task.label}, {group.label}, strength {place.strength:g}, seed {place.seed}",
            victim=self.victim(place.task),
            own=self._opened[place.task].checksums[attack.source],
            transfer=describe(made) if group.drawn is not None else self.transfer(group, place),
            architecture=describe(attack.architecture),
            recipe=describe(attack.recipe),
            examples=[int(attack.examples(each)) for each in (budget, attack.budget)],
            seed=place.seed,
        )

    def tested(self, task: Task) -> Asked:
        """The test set, each image once."""
        opened = self._opened[task]
        return Asked(opened.data.x_test, [opened.checksums["dataset"], "test"])

    def queries(self, group: Group, task: Task, seed: int) -> Asked:
        """What an attack sends whose queries are foreseen."""
        opened, source, sent = self._opened[task], group.attack.source, group.drawn[task][seed]
        which, at = np.unique(sent, return_inverse=True)
        inputs = [opened.checksums[source], describe(sent)]
        return Asked(opened.sources[source].images, inputs, which, at)

    def answers(
        self, rule: Defense, task: Task, seed: int, asked: Asked, strength: float | None
    ) -> Key:
        """The key of the answers at a strength, or of one pass over the queries for several."""
        at = "" if strength is None else f", strength {strength:g}"
        return cache.key(
            "answers",
            f"{task.label}, {rule.label}, seed {seed}{at}",
            victim=self.victim(task),
            rule=describe(rule),
            seed=seed,
            asked=asked.inputs,
            strength=strength,
        )

    def posteriors(self, task: Task, asked: Asked) -> Key:
        """The key of the victim's own posteriors."""
        return cache.key("posteriors", task.label, victim=self.victim(task), asked=asked.inputs)
