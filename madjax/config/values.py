"""What a sweep or a study is: frozen dataclasses that hold no file and no array."""

import json
from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace
from numbers import Real
from typing import Any

import flax.linen as nn
import numpy as np

from madjax.attacks import Attack, Knockoff, Online
from madjax.datasets import base_name
from madjax.defenses import MAD, Defense
from madjax.errors import InputError
from madjax.models import LeNet
from madjax.recipe import Recipe
from madjax.weights import Trained

Architecture = Callable[[int], nn.Module]
"""Number of classes -> a linen module; a module class whose first field is that number will do."""


@dataclass(frozen=True)
class Task:
    """A victim, and the images that attackers may ask it about.

    dataset and queryset are names for `open_dataset`; query_splits are the parts of the query set
    that attackers may draw from. victim says how the network of this architecture is trained, on
    the data set's training part; victim_seed fixes its first parameters and the order of training.
    Or it is a `madjax.Trained` network, such as the one in production, which is taken as it is. A
    surrogate has the victim's architecture.
    """

    dataset: str
    queryset: str
    query_splits: tuple[str, ...] = ("train",)
    architecture: Architecture = LeNet
    victim: Recipe | Trained = Recipe()
    victim_seed: int = 0

    def __post_init__(self) -> None:
        _check_seed(self.victim_seed)
        if not isinstance(self.victim, Recipe | Trained):
            raise InputError(
                f"victim is {self.victim!r}: give a madjax.Recipe() by which it is trained, or "
                "madjax.Trained(path)"
            )
        if isinstance(self.victim, Trained) and self.victim_seed:
            raise InputError(
                f"victim_seed is {self.victim_seed}, and the victim is that of "
                f"{self.victim.path}, which is not trained: leave victim_seed out"
            )
        _check_distinct("query_splits", self.query_splits, self.query_splits)
        for split in self.query_splits:
            if split not in ("train", "test"):
                raise InputError(f"query_splits holds {split!r}: use 'train' and 'test'")

    @property
    def name(self) -> str:
        """The data set in rows and figures."""
        return base_name(self.dataset)

    @property
    def label(self) -> str:
        """What tells most tasks of one sweep apart, in messages."""
        seed = f", victim seed {self.victim_seed}" if self.victim_seed else ""
        return f"{self.name} <- {base_name(self.queryset)}{seed}"


@dataclass(frozen=True)
class Defended:
    """A defence at each of several strengths; without any, at those that are usual for it.

    A strength is of the rule's own kind: epsilon for MAD, and beta, a radius, a noise multiplier or
    a number of decimals for others.
    """

    rule: Defense
    strengths: tuple[float, ...] = ()

    def __post_init__(self) -> None:
        if not isinstance(self.rule, Defense):
            raise InputError(
                f"rule is {self.rule!r}, which is not a madjax.Defense: give one such as "
                "madjax.MAD(), or madjax.defenses.Custom(function=...)"
            )
        if not isinstance(self.strengths, tuple):
            raise InputError(f"strengths is {self.strengths!r}: give a tuple, such as (0.5, 0.99)")
        _check_description(self.rule, Defense)
        strengths = self.strengths or self.rule.usual
        for strength in strengths:
            if not isinstance(strength, Real):
                raise InputError(f"strengths holds {strength!r}: give numbers")
            self.rule.check_strength(strength)
        # Cells compute in float32: strengths that round to one number would be one cell.
        _check_distinct(f"strengths of {self.label}", strengths, map(np.float32, strengths))
        object.__setattr__(self, "strengths", tuple(map(float, strengths)))

    @property
    def name(self) -> str:
        """The defence in rows and figures."""
        return self.rule.name

    @property
    def label(self) -> str:
        """What tells the defences of one sweep apart, in messages."""
        return self.rule.label


@dataclass(frozen=True)
class Sweep:
    """A grid of cells: task x defence x strength x attack x budget x seed.

    defenses and attacks are told apart by what rows say of them, their variants included. budgets
    are query budgets besides each attack's own: the stolen model is trained anew on as many
    examples as each would have bought, the first of the one transfer set. A seed fixes the
    surrogate, the drawn images, the stolen model's first parameters and the order of training.
    """

    name: str
    tasks: tuple[Task, ...]
    defenses: tuple[Defended, ...]
    attacks: tuple[Attack, ...] = (Knockoff(),)
    budgets: tuple[int, ...] = ()
    seeds: tuple[int, ...] = (0,)

    def __post_init__(self) -> None:
        _check_kind("tasks", self.tasks, Task, 'madjax.Task("mnist", "emnist")')
        _check_kind("defenses", self.defenses, Defended, "madjax.Defended(madjax.MAD(), (0.5,))")
        _check_kind("attacks", self.attacks, Attack, "madjax.Knockoff()")
        for attack in self.attacks:
            _check_description(attack, Attack)
            attack.examples(attack.budget)
        _check_tuple("budgets", self.budgets, 10_000)
        _check_seeds(self.seeds)
        _check_distinct("tasks", [task.label for task in self.tasks], self.tasks)
        _check_trains(self.tasks, self.defenses)
        _check_rules("defenses", [each.rule for each in self.defenses])
        _check_attacks("attacks", self.attacks)
        for attack in self.attacks:
            for budget in self.budgets:
                attack.examples(budget)

    def budgets_of(self, attack: Attack) -> list[int]:
        """The budgets at which a stolen model is trained, smallest first."""
        return sorted({*self.budgets, attack.budget})


@dataclass(frozen=True)
class AngleStudy:
    """The white-box study (section 5.2.3): attackers trained online, at a grid of strengths.

    Each of `attackers` takes `steps` steps before each of `rules`, at each strength and seed; where
    `strengths` is empty, at those that are usual for the rule. How many queries, N, that are is
    steps times its batch, so attackers have no budget of their own. A rule's neutral strength,
    mostly 0, is the clean path, beside which `direction_kept` is measured. `sweep()` is the same
    grid for `madjax.sweep.run`.
    """

    task: Task
    strengths: tuple[float, ...] = ()
    seeds: tuple[int, ...] = (0,)
    steps: int = 10_000
    rules: tuple[Defense, ...] = (MAD(layers="all"),)
    attackers: tuple[Online, ...] = (Online(),)
    name: str = "angle"

    def __post_init__(self) -> None:
        if not isinstance(self.task, Task):
            raise InputError(f'task is {self.task!r}: give a madjax.Task("mnist", "emnist")')
        if type(self.steps) is not int or self.steps < 1:
            raise InputError(f"steps is {self.steps!r}: give a whole number >= 1")
        _check_kind("rules", self.rules, Defense, "madjax.MAD()")
        _check_kind("attackers", self.attackers, Online, "madjax.Online()")
        for attacker in self.attackers:
            if attacker.budget is not None:
                raise InputError(
                    f"attackers holds one with a budget of {attacker.budget}: steps, which is "
                    f"{self.steps}, says how many queries it sends; leave its budget out"
                )
        _check_rules("rules", self.rules)
        _check_attacks("attackers", self.attackers)
        _check_seeds(self.seeds)
        self.sweep()

    def sweep(self) -> Sweep:
        """The sweep of these cells."""
        attacks = [replace(a, budget=self.steps * a.recipe.batch_size) for a in self.attackers]
        return Sweep(
            name=self.name,
            tasks=(self.task,),
            defenses=tuple(Defended(rule, self.strengths) for rule in self.rules),
            attacks=tuple(attacks),
            seeds=self.seeds,
        )


def _check_seeds(seeds: Any) -> None:
    _check_tuple("seeds", seeds, 0)
    for seed in seeds:
        _check_seed(seed)
    _check_distinct("seeds", seeds, seeds)


def _check_rules(name: str, rules: Iterable[Defense]) -> None:
    said = [tuple(rule.describe().values()) for rule in rules]
    _check_distinct(name, [rule.label for rule in rules], said, _UNLIKE)


def _check_attacks(name: str, attacks: Iterable[Attack]) -> None:
    labels = [attack.label for attack in attacks]
    _check_distinct(name, labels, labels, _UNLIKE)


def _check_trains(tasks: Iterable[Task], defenses: Iterable[Defended]) -> None:
    """Refuse a defence that trains as the victim was trained, where nobody says how that was."""
    given = [task for task in tasks if isinstance(task.victim, Trained)]
    for rule in (each.rule for each in defenses):
        if given and rule.needs_recipe:
            raise InputError(
                f"{rule.label} trains networks by the victim's recipe, and the victim of "
                f"{given[0].label} is given, {given[0].victim.path}: leave that defence out, or "
                "give the task a victim=madjax.Recipe()"
            )


def _check_tuple(name: str, values: Any, example: Any) -> None:
    if not isinstance(values, tuple):
        raise InputError(f"{name} is {values!r}: give a tuple, such as ({example},)")


def _check_seed(seed: Any) -> None:
    if not isinstance(seed, int) or not 0 <= seed < 2**32:
        raise InputError(f"seed is {seed}: give a whole number from 0 to 2^32 - 1")


def _check_kind(name: str, values: Any, kind: type, example: str) -> None:
    """Refuse what is not a tuple of hashable values of a kind."""
    _check_tuple(name, values, example)
    for value in values:
        if not isinstance(value, kind):
            raise InputError(
                f"{name} holds {value!r}, which is not a madjax.{kind.__name__}: give one such as "
                f"{example}"
            )
        try:
            hash(value)
        except TypeError as error:
            raise InputError(
                f"{name} holds {value!r}, which cannot be told from others ({error}): give its "
                "fields tuples in place of lists, sets and arrays"
            ) from error


def _check_description(value: Any, kind: type) -> None:
    """Refuse a rule or an attack whose fields of a row lack what all of its kind have."""
    said, name = value.describe(), type(value).__name__
    lacking = kind.describe(value).keys() - (said.keys() if isinstance(said, dict) else ())
    if lacking:
        raise InputError(
            f"describe() of {name} returns {said!r}, without {min(lacking)!r}: return "
            "super().describe() | {...} with fields of its own"
        )
    try:
        json.dumps(said, default=np.generic.item)
    except TypeError as error:
        raise InputError(
            f"describe() of {name} returns {said!r}, of which a row can hold text, numbers and "
            f"lists alone ({error})"
        ) from error


_UNLIKE = ", with settings or a variant of its own"


def _check_distinct(
    name: str, shown: Iterable[Any], values: Iterable[Any], advice: str = ""
) -> None:
    """Refuse no value, and two that are the same."""
    values = list(values)
    if not values or len(set(values)) != len(values):
        raise InputError(
            f"{name} holds {'; '.join(map(str, shown)) or 'nothing'}: give at least one, each "
            f"once{advice}"
        )
