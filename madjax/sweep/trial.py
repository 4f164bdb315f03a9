"""What a sweep will do, tried on shapes: what fails does so before any work."""

import json
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from madjax.attacks import Attack, Online
from madjax.config import Defended, Sweep, Task, describe
from madjax.defenses import Defense
from madjax.defenses.defense import Training
from madjax.errors import InputError, in_one_line
from madjax.recipe import Recipe
from madjax.sweep import online, stages
from madjax.sweep.foresight import foreseen
from madjax.sweep.rows import plain
from madjax.sweep.stages import Api, Own, Parties, Point, Tests
from madjax.sweep.tasks import Opened
from madjax.sweep.victim import owner_of
from madjax.train import State, start

Array = jax.Array


class Prospect(NamedTuple):
    """What is known of an attack on a task before anything is computed."""

    parties: Parties
    drawn: dict[int, np.ndarray] | None
    """For every seed the own images that it sends, in order; None where that cannot be told."""
    alike: tuple[Any, ...]
    """Equal for tasks that one set of programs serves."""


def tried(config: Sweep, opened: Mapping[Task, Opened]) -> dict[tuple[Task, Attack], Prospect]:
    """Trace all that the cells of a sweep will do; tasks of equal shapes are tried once.

    Raises:
        InputError: attacks and defences that these data do not allow, or that are in error.
    """
    prospects, knowledge, done = {}, {}, set()
    for task, each in opened.items():
        for attack in config.attacks:
            prospects[task, attack] = _look_ahead(each, attack, config)
        for defended in config.defenses:
            victim = defended, task.victim, each.shapes
            if victim not in knowledge:
                knowledge[victim] = _try_defense(each, defended)
            for attack in config.attacks:
                ahead = prospects[task, attack]
                # Where the answers are known before, the attack never meets the defence.
                meets = victim if ahead.drawn is None else None
                if (ahead.alike, attack, meets) not in done:
                    done.add((ahead.alike, attack, meets))
                    _try_attack(each, attack, ahead, defended.rule, knowledge[victim])
    return prospects


def _look_ahead(opened: Opened, attack: Attack, config: Sweep) -> Prospect:
    """Check an attack's settings, and find out what it sends."""
    own, data = opened.sources[attack.source], opened.data
    parties = opened.parties(attack)
    attack.check(len(own.images), data.num_classes, data.image_shape)
    attack.recipe.check(parties.stolen, min(map(attack.examples, config.budgets_of(attack))))
    try:
        found = {
            seed: foreseen(parties, attack, seed, own.images, own.labels) for seed in config.seeds
        }
    except Exception:  # which `_try_attack` meets again, and tells in one line
        found = {0: None}
    drawn = found if all(sent is not None for sent in found.values()) else None
    return Prospect(parties, drawn, (parties, opened.shapes, len(own.images), drawn is None))


def _try_defense(opened: Opened, defended: Defended) -> Any:
    """The shapes of what a defence prepares, having seen it answer."""
    data, network, rule = opened.data, opened.network, defended.rule

    def untrained(name: str, train: Training) -> State:
        del name
        describe(train.recipe)  # or its network could be taken for another
        return start(network, train.recipe, len(data.x_train), train.key)

    def defend(key: Array, images: Array) -> Any:
        owner = owner_of(opened.task, network, data, untrained)
        known = rule.prepare(owner, key, defended.strengths)
        y = jnp.ones((len(images), data.num_classes))
        rows = jnp.arange(len(images))[:, None], images, y
        stages.at_strengths(rule, network, rows, (known, key, jnp.ones(1)))
        return known

    with _in_one_line(f"the defence {rule}"):
        recipe, count = opened.task.victim, len(data.x_train)
        for strength in defended.strengths:
            trained = rule.victim_recipe(recipe, strength)
            if isinstance(trained, Recipe):
                trained.check(network, count)
            json.dumps(plain(rule.facts(strength, recipe, count)))
        return jax.eval_shape(defend, jax.random.key(0), _blank(opened, len(data.x_test)))


def _try_attack(opened: Opened, attack: Attack, ahead: Prospect, rule: Defense, known: Any) -> None:
    """Trace a cell: all its queries, or all its steps."""
    parties = ahead.parties

    def cell(key: Array, images: Array, tests: Array, known: Any) -> None:
        own = Own(images[None], jnp.zeros((1, len(images)), jnp.int32))
        victim = jax.tree.map(lambda a: a[None], parties.network.init(key))
        api = Api(victim, jax.tree.map(lambda a: a[None], known))
        y = jnp.ones((1, len(tests), parties.num_classes))
        judged = Tests(tests[None], jnp.zeros((1, len(tests)), jnp.int32), y)
        told = ahead.drawn and jnp.ones((attack.budget, parties.num_classes))
        point = Point(jnp.float32(0), jnp.uint32(0), told=told)
        if isinstance(attack, Online):
            online.rehearse(parties, attack, rule, point, own, api, judged)
        else:
            _rehearse(parties, attack, rule, point, own, api)

    sizes = len(opened.sources[attack.source].images), len(opened.data.x_test)
    with _in_one_line(f"the attack {attack.label}"):
        blanks = (_blank(opened, size) for size in sizes)
        jax.eval_shape(cell, jax.random.key(0), *blanks, known)


def _rehearse(
    parties: Parties, attack: Attack, rule: Defense, cell: Point, own: Own, api: Api
) -> None:
    """Trace all queries of a cell.

    Raises:
        InputError: an attack that makes another transfer set than it says.
    """
    transfer = stages.begin(parties, attack, rule, cell, (own, api))
    if attack.rounds:
        transfer = stages.proceed(parties, attack, rule, (cell, transfer), (own, api, jnp.int32(0)))
    wanted = attack.examples(attack.budget), parties.num_classes
    if transfer.targets.shape != wanted:
        raise InputError(
            f"the attack {attack.label} makes targets of shape {transfer.targets.shape}: return "
            f"{wanted}, one row for each example"
        )


def _blank(opened: Opened, count: int) -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct((count, *opened.data.image_shape), jnp.uint8)


@contextmanager
def _in_one_line(what: str) -> Iterator[None]:
    """Make any error one of the input, that names what is to be mended."""
    try:
        yield
    except InputError:
        raise
    except Exception as error:
        raise InputError(
            f"{what} fails on these data ({in_one_line(error)}): choose another, or mend it"
        ) from error
