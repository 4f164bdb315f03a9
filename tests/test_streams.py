"""No key is used for two things: every draw of an attack and its defence is independent."""

from collections import Counter
from dataclasses import replace

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from madjax import AdaptiveKnockoff, Classifier, Knockoff, Recipe, jbda
from madjax.attacks import World, crop_and_flip, keys
from madjax.datasets import MNIST_FAMILY
from madjax.defenses import Custom, answers
from madjax.streams import stream
from madjax.train import epoch, start

pytestmark = pytest.mark.smoke

SAMPLERS = ("permutation", "uniform", "randint", "bernoulli", "normal", "categorical", "bits")
RECIPE = Recipe(epochs=2, batch_size=8, decay_epochs=0)


class Dropped(nn.Module):
    """A network that draws at every step of its training."""

    num_classes: int

    @nn.compact
    def __call__(self, x, train=False):
        x = nn.Dropout(0.1, deterministic=not train)(x.reshape(len(x), -1))
        return nn.Dense(self.num_classes)(x)


class Uses:
    """What becomes of keys: those that are drawn from, and the small numbers folded into others."""

    def __init__(self):
        self.drawn, self.parents = Counter(), set()

    def draw(self, key):
        self.drawn[name(key)] += 1

    def fold(self, key, number):
        if isinstance(number, jax.core.Tracer) or int(number) < 2**31:
            self.parents.add(name(key))


def name(key):
    return tuple(np.asarray(jax.random.key_data(key)).reshape(-1).tolist())


@pytest.fixture
def uses(monkeypatch):
    """Records what madjax asks of jax.random, not what samplers do inside."""
    found, random = Uses(), jax.random
    fold_in, split = random.fold_in, random.split

    def recorded(function, record):
        def call(key, *args, **options):
            if not isinstance(key, jax.core.Tracer):
                record(key, *args)
            return function(key, *args, **options)

        return call

    monkeypatch.setattr(random, "fold_in", recorded(fold_in, lambda key, n: found.fold(key, n)))
    monkeypatch.setattr(random, "split", recorded(split, lambda key, *_: found.fold(key, 0)))
    for sampler in SAMPLERS:
        own = recorded(getattr(random, sampler), lambda key, *_: found.draw(key))
        monkeypatch.setattr(random, sampler, own)
    return found


IMAGES = jax.random.randint(jax.random.key(5), (20, 6, 6, 1), 0, 256).astype(jnp.uint8)
NETWORK = Classifier(Dropped(3), MNIST_FAMILY.preprocess, (6, 6, 1))
SMALL = {"budget": 12, "recipe": RECIPE}
NOISY = Custom(function=lambda key, x, y, strength: y + jax.random.uniform(key))
ATTACKS = [
    Knockoff(repeats=2, augment=lambda k, x: crop_and_flip(k, x, 1), **SMALL),
    AdaptiveKnockoff(online=RECIPE, **SMALL),
    jbda(seeds=3, substitute=RECIPE, **SMALL),
]


@pytest.mark.parametrize(
    "attack",
    [ATTACKS[0], *(pytest.param(attack, marks=pytest.mark.slow) for attack in ATTACKS[1:])],
    ids=lambda attack: attack.title,
)
@pytest.mark.parametrize("fresh", [True, False])
def test_no_key_is_drawn_from_twice_or_drawn_from_and_divided(uses, attack, fresh):
    """Dividing what a sampler divides inside would give two purposes one key."""
    key, noisy = keys(3), replace(NOISY, fresh=fresh)

    def respond(numbers, images):
        y = jnp.full((len(images), 3), 1 / 3)
        return answers(noisy, key["defense"], images, y, y, 1.0, numbers)

    with jax.disable_jit():
        own = IMAGES, jnp.arange(20) % 3, 3, 3
        world = World(respond, attack.budget, *own, NETWORK, MNIST_FAMILY, key["draw"])
        transfer = attack.begin(world)
        for r in range(attack.rounds):
            transfer = attack.proceed(r, transfer, world)
        answers(noisy, stream(key["defense"], "tests"), IMAGES, IMAGES[:, 0, 0], IMAGES, 1.0)
        state = start(NETWORK, RECIPE, 12, key["train"])
        for _ in range(2):
            take = lambda i: transfer.take(IMAGES, i)  # noqa: E731
            state = epoch(NETWORK, RECIPE, state, take, 12, IMAGES, jnp.zeros(20, int))
    assert len(uses.drawn) > 3
    assert len(uses.parents) > 3
    if not fresh:  # each time the same draw, by which queries are told apart
        assert uses.drawn.pop(name(stream(key["defense"], "fingerprints")))
    assert max(uses.drawn.values()) == 1
    assert not uses.parents & set(uses.drawn)


def test_streams_have_numbers_of_their_own():
    """Above those of queries, and one for each name."""
    key = jax.random.key(0)
    names = ("steps", "augment", "rounds", "bandit", "tests", "fingerprints", "private steps")
    found = {name(stream(key, each)) for each in names}
    found |= {name(jax.random.fold_in(key, i)) for i in range(1000)}
    assert len(found) == len(names) + 1000
