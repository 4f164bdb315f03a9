"""The stages of an online attacker, who leaves no transfer set; see `stages.py`."""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from madjax.attacks import Online, keys
from madjax.attacks.online import Training, begin, lap
from madjax.batching import map_chunks
from madjax.constraints import l1
from madjax.defenses import Defense, answers
from madjax.evaluate import utility
from madjax.recipe import cross_entropy
from madjax.sweep.stages import Api, Own, Parties, Point, Tests, entry, tests_key
from madjax.train import finite, percent

Array = jax.Array


class Ground(NamedTuple):
    """What all online attackers of a group read."""

    own: Own
    api: Api
    tests: Tests


def rehearse(
    parties: Parties, attack: Online, rule: Defense, cell: Point, own: Own, api: Api, tests: Tests
) -> None:
    """Trace all that a cell will do."""
    settings, ground = (parties, attack, rule), Ground(own, api, tests)
    training = advance(*settings, (cell, start(*settings, cell, ground)), ground)
    judge(*settings, (cell, training), ground)


def start(parties: Parties, attack: Online, rule: Defense, cell: Point, ground: Ground) -> Training:
    """A fresh attacker, with its images and the victim's posteriors of them."""
    del rule
    victim = entry(ground.api.victim, cell.task)

    def posterior(images: Array) -> Array:
        return map_chunks(lambda x: parties.network.posterior(victim, x), images, 250)

    images = entry(ground.own, cell.task).images
    return begin(attack, parties.stolen, keys(cell.seed), images, posterior)


def advance(
    parties: Parties,
    attack: Online,
    rule: Defense,
    cell: tuple[Point, Training],
    ground: Ground,
) -> Training:
    """The steps up to the next evaluation."""
    point, training = cell
    key = keys(point.seed)["defense"]

    def respond(attacker: Any, numbers: Array, x: Array, y: Array) -> Array:
        evidence = _evidence(parties, attack, rule, point, attacker, ground.api, x)
        return answers(rule, key, x, y, evidence, point.strength, numbers)

    distance = getattr(rule, "distance", l1)
    images = entry(ground.own, point.task).images
    return lap(attack, parties.stolen, training, images, respond, distance)


def judge(
    parties: Parties,
    attack: Online,
    rule: Defense,
    cell: tuple[Point, Training],
    ground: Ground,
) -> dict[str, Array]:
    """The attacker on the test set, and the defence's utility on the first of its images."""
    point, training = cell
    tests = entry(ground.tests, point.task)

    def test(example: tuple[Array, Array]) -> tuple[Array, Array]:
        x, labels = example
        logits = parties.stolen.apply(training.attacker.params, x)
        one_hot = jax.nn.one_hot(labels, parties.num_classes)
        return logits.argmax(-1) == labels, cross_entropy(logits, one_hot)

    losses = training.trace.loss
    done = jnp.arange(losses.size) < training.step * attack.recipe.batch_size
    sound = finite((training.attacker.params, jnp.where(done, losses, 0)))

    hits, test_losses = map_chunks(test, (tests.images, tests.labels), 250)
    few = slice(attack.judged)
    x, y = tests.images[few], tests.posteriors[few]
    handed = training.surrogate if attack.refresh > 1 else training.attacker.params
    told = answers(
        rule,
        tests_key(rule, point.seed),
        x,
        y,
        _evidence(parties, attack, rule, point, handed, ground.api, x),
        point.strength,
    )
    return utility(y, told, tests.labels[few]) | {
        # From where it diverges on; the top class of NaN would be class 0.
        "attacker_accuracy": jnp.where(sound, percent(hits), jnp.nan),
        "test_loss": test_losses.mean(),
    }


def _evidence(
    parties: Parties,
    attack: Online,
    rule: Defense,
    cell: Point,
    attacker: Any,
    api: Api,
    x: Array,
) -> Any:
    """What the defence makes of queries: of the attacker's own network where it has it."""
    if rule.has_surrogate and attack.refresh:
        return rule.evidence(parties.stolen.apply, attacker, x)
    return rule.evidence(parties.network.apply, entry(api.known, cell.known), x)
