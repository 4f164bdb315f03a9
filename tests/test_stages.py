"""Each stage of a sweep against the plain functions that it is made of."""

from dataclasses import dataclass

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from madjax import (
    MAD,
    AdaptiveKnockoff,
    Classifier,
    Defended,
    Knockoff,
    NoDefense,
    RandomNoise,
    Recipe,
    Sweep,
    Task,
    jbda,
    sweep,
)
from madjax.attacks import Transfer, crop_and_flip, keys
from madjax.datasets import MNIST_FAMILY
from madjax.defenses import as_function
from madjax.evaluate import utility
from madjax.sweep import stages
from madjax.sweep.foresight import foreseen
from madjax.sweep.mesh import over_rows
from tests.networks import Linear

pytestmark = pytest.mark.smoke


NETWORK = Classifier(Linear(4), MNIST_FAMILY.preprocess, (6, 6, 1))
VICTIM, SURROGATE = (NETWORK.init(jax.random.key(i)) for i in (0, 1))
IMAGES = np.random.default_rng(0).integers(0, 256, (37, 6, 6, 1), dtype=np.uint8)
LABELS = np.arange(37, dtype=np.int32) % 3
Y = np.asarray(NETWORK.posterior(VICTIM, IMAGES))
STRENGTHS = (0.0, 0.4, 1.2)


@pytest.mark.parametrize(
    "rule", [MAD(), RandomNoise(), RandomNoise(fresh=True)], ids=lambda rule: rule.label
)
@pytest.mark.parametrize("queries", [1000, 37, 36, 5])
def test_answers_are_those_of_each_strength_alone_in_any_chunks(rule, queries):
    """The noise of a query depends on its content or on its number, not on its chunk."""
    key = jax.random.key(7)
    told = stages.answers(rule, NETWORK, SURROGATE, key, IMAGES, Y, STRENGTHS, chunk=queries)
    assert told.shape == (3, 37, 4)
    for each, strength in zip(told, STRENGTHS, strict=True):
        want = as_function(rule, NETWORK.apply, SURROGATE, strength)(key, IMAGES, Y)
        np.testing.assert_allclose(each, want, atol=1e-6)
    assert np.abs(told[2] - told[1]).max() > 1e-3


@dataclass(frozen=True)
class Counting(RandomNoise):
    """Noise that depends on the image and, where it is fresh, on the number of the query."""

    def evidence(self, apply, known, x):
        LOOKED_AT.append(len(x))
        return x.astype(jnp.float32).mean((1, 2, 3)) / 255

    def answer(self, key, y, evidence, strength):
        return super().answer(key, y, (), strength * evidence)


LOOKED_AT = []


@pytest.mark.parametrize("fresh", [True, False])
@pytest.mark.parametrize("devices", [1, 4])
def test_an_image_that_is_sent_often_is_looked_at_once(devices, fresh):
    """And where noise is fresh every query has its own answer, wherever it was made."""
    LOOKED_AT.clear()
    key, few, rule = jax.random.key(3), slice(11), Counting(variant=str(devices), fresh=fresh)
    sent = np.random.default_rng(0).permutation(np.r_[np.arange(11), np.arange(0, 11, 2)])
    over = over_rows(sweep.make_mesh(jax.devices()[:devices]))
    query = key, IMAGES[few], Y[few]
    told = stages.answers(
        rule, NETWORK, (), *query, STRENGTHS, sent=sent, over=over, chunk=4 * devices
    )
    assert [{1: 4, 4: 3}[devices]] == LOOKED_AT  # a chunk of one device; one program
    for each, strength in zip(told, STRENGTHS, strict=True):
        want = as_function(rule, NETWORK.apply, (), strength)(key, IMAGES[sent], Y[sent])
        np.testing.assert_allclose(each, want, atol=1e-6)
    assert len(np.unique(np.round(told[2], 5), axis=0)) == (len(sent) if fresh else 11)


def test_the_utility_at_each_strength_is_that_of_its_answers():
    told = np.stack([Y, Y[:, ::-1], np.full_like(Y, 0.25)])
    got = stages.utility(Y, told, LABELS)
    for i, each in enumerate(told):
        for name, value in utility(Y, jnp.asarray(each), LABELS).items():
            np.testing.assert_allclose(got[name][i], value, rtol=1e-6, err_msg=name)


def test_a_cell_takes_memory_for_its_answers_and_transfer_set_alone():
    """Of many classes the Gram matrices would be much more, by XLA's own account."""
    classes, queries = 50, 400
    network = Classifier(Linear(classes), MNIST_FAMILY.preprocess, (6, 6, 1))
    attack = Knockoff(budget=queries, architecture=Linear)
    parties = sweep.Parties(network, network, MNIST_FAMILY, classes, 3)
    own = sweep.Own(np.zeros((1, queries, 6, 6, 1), np.uint8), np.zeros((1, queries), np.int32))
    mesh = sweep.make_mesh(jax.devices()[:1])

    def taken(cells):
        told = np.zeros((cells, queries, classes), np.float32)
        point = sweep.Point(*np.zeros((4, cells), np.int32), told)
        settings = {"mesh": mesh, "mapping": sweep.vmap_cells}
        begin = sweep.over_cells(stages.begin, parties, attack, None, **settings)
        held = begin.lower(point, (own, None)).compile().memory_analysis()
        return held.temp_size_in_bytes + held.argument_size_in_bytes + held.output_size_in_bytes

    answers = 4 * queries * classes
    assert answers <= (taken(8) - taken(4)) / 4 <= 4 * answers


@dataclass(frozen=True)
class Brightest(Knockoff):
    """It asks for other images than it says, as who inherits may forget."""

    name: str = "brightest"

    def begin(self, world):
        x = jnp.argsort(-world.images.astype(jnp.float32).mean((1, 2, 3)))[: self.budget]
        answers, asked = world.ask(jnp.int32(0), x)
        return Transfer(x, answers, asked)


@dataclass(frozen=True)
class Renamed(Knockoff):
    """It asks for what it says, and not by index."""

    def begin(self, world):
        x = self.foreseen(world.key, len(world.images))
        answers, asked = world.ask(jnp.int32(0), world.images[x])
        return Transfer(x, answers, asked)


def numbers(y):
    """Targets that hide what is no number."""
    return jnp.nan_to_num(y)


@pytest.mark.parametrize(
    ("attack", "told"),
    [
        (Knockoff(budget=20), True),
        (Knockoff(budget=20, repeats=4), True),
        (Knockoff(budget=20, augment=crop_and_flip), False),
        (AdaptiveKnockoff(budget=20), False),
        (jbda(budget=20, seeds=5), False),
        (Brightest(budget=20), False),
        (Brightest(budget=20, targets=numbers), False),
        (Renamed(budget=20), False),
    ],
    ids=lambda value: getattr(value, "name", str(value)),
)
def test_what_an_attack_says_that_it_sends_is_tried(attack, told):
    parties = sweep.Parties(NETWORK, NETWORK, MNIST_FAMILY, 4, 3)
    for seed in (5, 2**32 - 1):
        drawn = foreseen(parties, attack, seed, IMAGES, LABELS)
        assert (drawn is not None) == told
        if told:
            np.testing.assert_array_equal(drawn, attack.foreseen(keys(seed)["draw"], 37))


def test_an_attack_that_keeps_no_promise_gets_the_answers_to_its_own_images(tmp_path):
    """All of the images are the attacker's: its stolen model does as well as the victim."""
    rng = np.random.default_rng(1)
    y = np.arange(240) % 4
    x = rng.integers(0, 80, (240, 6, 6)) + 150 * (np.arange(6) == y[:, None])[:, None]
    x = x.astype(np.uint8)
    np.savez(
        tmp_path / "easy.npz", x_train=x[:160], y_train=y[:160], x_test=x[160:], y_test=y[160:]
    )
    recipe = Recipe(epochs=8, batch_size=16)
    attack = Brightest(budget=160, architecture=Linear, recipe=recipe)
    task = Task("easy", "easy", architecture=Linear, victim=recipe)
    config = Sweep("s", (task,), (Defended(NoDefense()),), (attack,))
    (row,) = sweep.run(config, tmp_path / "out", data_dir=tmp_path, log=lambda line: None)
    assert row["attacker_accuracy"] > 95
