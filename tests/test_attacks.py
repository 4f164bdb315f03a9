"""Attacks against plain Python loops and hand-computed cases, and the budget that none exceeds."""

from dataclasses import replace
from functools import partial

import chex
import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from jax.experimental import io_callback

from madjax import (
    AdaptiveKnockoff,
    Classifier,
    InputError,
    JacobianAugmentation,
    Knockoff,
    Recipe,
    jbda,
    jbself,
    jbtop,
    steal,
    top_label,
)
from madjax.attacks import (
    Custom,
    Transfer,
    World,
    adaptive,
    away_from_top,
    certainty,
    check_transfer,
    crop_and_flip,
    disagreement,
    diversity,
    draw,
    jacobian,
    keys,
    posteriors,
    towards_next,
    towards_top,
)
from madjax.datasets import MNIST_FAMILY
from madjax.private import PrivateGradient
from madjax.recipe import order
from madjax.streams import stream

SHAPE = (4, 4, 1)
CLASSES = 4
RECIPE = Recipe(epochs=1, batch_size=8, learning_rate=0.05)
SUBSTITUTE = Recipe(epochs=2, batch_size=8, learning_rate=0.5, momentum=0.9, weight_decay=0.01)


class Linear(nn.Module):
    classes: int = CLASSES

    @nn.compact
    def __call__(self, x):
        return nn.Dense(self.classes)(x.reshape(x.shape[0], -1))


NETWORK = Classifier(Linear(), MNIST_FAMILY.preprocess, SHAPE)
IMAGES = jax.random.randint(jax.random.key(5), (60, *SHAPE), 0, 256).astype(jnp.uint8)
LABELS = jnp.arange(60) % 3
VICTIM = NETWORK.init(jax.random.key(6))


def respond(numbers, images):
    """An undefended victim."""
    return NETWORK.posterior(VICTIM, images)


def noisy(numbers, images):
    """A victim whose answers depend on the query's number."""
    y = NETWORK.posterior(VICTIM, images) + 0.1 * (numbers % 7)[:, None]
    return y / y.sum(-1, keepdims=True)


def make_world(attack, respond=respond, seed=0):
    key = keys(seed)["draw"]
    return World(respond, attack.budget, IMAGES, LABELS, 3, CLASSES, NETWORK, MNIST_FAMILY, key)


def collect(attack, respond=respond, seed=0, world=None):
    """The transfer set of an attack."""
    world = world or make_world(attack, respond, seed)
    transfer = jax.jit(lambda: attack.begin(world))()
    advance = jax.jit(lambda r, transfer: attack.proceed(r, transfer, world))
    for r in range(attack.rounds):
        transfer = advance(r, transfer)
    return transfer


def own_attack(world):
    """A user's own: the first images, in order."""
    x = jnp.arange(world.budget)
    answers, asked = world.ask(jnp.int32(0), world.images[x])
    return Transfer(x, answers, asked)


SMALL = {"recipe": RECIPE, "substitute": SUBSTITUTE, "seeds": 5}
ATTACKS = {
    "knockoff": Knockoff(budget=33, recipe=RECIPE),
    "nquery": Knockoff(budget=36, recipe=RECIPE, repeats=3),
    "nquery+aug": Knockoff(
        budget=36, recipe=RECIPE, repeats=3, augment=lambda k, x: crop_and_flip(k, x, 1)
    ),
    "adaptive": AdaptiveKnockoff(budget=33, recipe=RECIPE, online=replace(RECIPE, decay_epochs=0)),
    "jbda": jbda(budget=33, **SMALL),
    "jbself": jbself(budget=33, **SMALL),
    "jbtop2": jbtop(2, budget=33, **SMALL),
    "reservoir": jbda(budget=33, kappa=4, sigma=2, tau=2, **SMALL),
    "jbda, code": jbda(budget=33, as_published_code=True, **SMALL),
    "jbself, code": jbself(budget=33, as_published_code=True, **SMALL),
    "jbtop2, code": jbtop(2, budget=33, as_published_code=True, **SMALL),
    "own": Custom(budget=33, recipe=RECIPE, collect=own_attack),
}


@pytest.mark.parametrize("name", ATTACKS)
def test_every_attack_spends_its_budget_exactly_and_learns_all_answers(name, monkeypatch):
    """Query numbers 0 .. budget-1 are answered, each once; nothing else is ever told."""
    monkeypatch.setattr(jacobian, "BLOCK", 4)  # so that rounds are of several blocks
    attack, told = ATTACKS[name], []

    class Watched(World):
        def ask(self, asked, images, wanted=None):
            answers, count = super().ask(asked, images, wanted)
            rows = jnp.isfinite(answers).all(-1)
            numbers = asked + jnp.cumsum(rows) - 1
            io_callback(lambda n, r: told.extend(n[r].tolist()), None, numbers, rows)
            return answers, count

    transfer = collect(attack, world=Watched(**vars(make_world(attack))))
    assert int(transfer.asked) == attack.budget
    assert sorted(told) == list(range(attack.budget))
    assert transfer.targets.shape == (attack.examples(attack.budget), CLASSES)
    assert np.all(np.isfinite(transfer.targets))


def test_the_victim_tells_nothing_that_is_not_paid_for():
    world = make_world(Knockoff(budget=5), noisy)
    wanted = jnp.array([True, False, True, True, False, True, True])
    answers, asked = world.ask(jnp.int32(2), IMAGES[:7], wanted)
    assert int(asked) == 5
    assert np.isneginf(answers).all(-1).tolist() == [False, True, False, False, True, True, True]
    want = noisy(jnp.array([2, 3, 4]), IMAGES[jnp.array([0, 2, 3])])
    np.testing.assert_allclose(answers[jnp.array([0, 2, 3])], want, atol=1e-6)


def test_images_are_drawn_once_each_and_by_the_key_alone():
    drawn = np.asarray(draw(jax.random.key(0), 100, 60))
    assert len(set(drawn)) == 60
    assert set(drawn) <= set(range(100))
    np.testing.assert_array_equal(drawn, draw(jax.random.key(0), 100, 60))
    assert np.any(drawn != draw(jax.random.key(1), 100, 60))


def test_a_larger_budget_extends_a_smaller_one():
    key = jax.random.key(3)
    np.testing.assert_array_equal(draw(key, 50, 50)[:20], draw(key, 50, 20))
    assert sorted(draw(key, 50, 50).tolist()) == list(range(50))


def test_keys_differ_by_use_and_seed():
    data = {
        (seed, use): tuple(jax.random.key_data(key).tolist())
        for seed in (0, 1)
        for use, key in keys(seed).items()
    }
    assert len(set(data.values())) == len(data) == 8


def test_repeated_queries_are_averaged_and_each_is_counted():
    attack = ATTACKS["nquery"]
    transfer = collect(attack, noisy)
    images = IMAGES[transfer.x]
    numbers = np.arange(36).reshape(3, 12)
    want = np.mean([noisy(jnp.asarray(row), images) for row in numbers], axis=0)
    np.testing.assert_allclose(transfer.targets, want, atol=1e-6)
    assert len(set(transfer.x.tolist())) == 12


def test_top_label_is_one_hot_and_keeps_what_is_not_known():
    y = jnp.array([[0.2, 0.5, 0.3], [0.4, 0.4, 0.2], [jnp.nan] * 3, [-jnp.inf] * 3])
    want = [[0, 1, 0], [1, 0, 0], [np.nan] * 3, [-np.inf] * 3]
    np.testing.assert_array_equal(top_label(y), want)
    np.testing.assert_array_equal(posteriors(y), y)
    transfer = collect(replace(ATTACKS["jbda"], targets=top_label))
    np.testing.assert_array_equal(np.sort(transfer.targets, -1), [[0, 0, 0, 1]] * 33)


@settings(deadline=None, max_examples=30)
@given(seed=st.integers(0, 2**32 - 1))
def test_a_crop_is_a_window_of_the_padded_image_or_its_mirror(seed):
    image = np.arange(1, 21, dtype=np.float32).reshape(1, 4, 5, 1)
    got = np.asarray(crop_and_flip(jax.random.key(seed), jnp.asarray(image), 2))[0]
    padded = np.pad(image[0], ((2, 2), (2, 2), (0, 0)))
    windows = [padded[i : i + 4, j : j + 5] for i in range(5) for j in range(5)]
    assert any(np.array_equal(got, w) or np.array_equal(got, w[:, ::-1]) for w in windows)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"targets": jnp.zeros((3, CLASSES))}, "returns 3 examples: a budget of 33"),
        ({"asked": jnp.int32(32)}, "has asked 32 times: spend its budget of 33"),
        ({"targets": jnp.full((33, CLASSES), -jnp.inf)}, "examples without an answer"),
    ],
)
def test_a_transfer_set_that_is_not_what_was_paid_for_is_refused(change, words):
    attack = ATTACKS["own"]
    transfer = collect(attack)
    check_transfer(attack, transfer)
    with pytest.raises(InputError, match=words):
        check_transfer(attack, transfer._replace(**change))


# Jacobian-based augmentation


@jax.jit
@jax.grad
def gradient_of_loss(params, x, y):
    return -jnp.mean(jnp.sum(y * jax.nn.log_softmax(NETWORK.apply(params, x)), axis=-1))


def plain_substitute(x, targets, capacity, key):
    """The substitute of one round, by a Python loop over batches."""
    init_key, order_key = jax.random.split(key)
    params = NETWORK.init(init_key)
    velocity = jax.tree.map(jnp.zeros_like, params)

    for epoch in range(SUBSTITUTE.epochs):
        visit = order(order_key, epoch, capacity, len(x))[: len(x)]
        for i in range(0, len(x), SUBSTITUTE.batch_size):
            at = visit[i : i + SUBSTITUTE.batch_size]
            g = gradient_of_loss(params, x[at], targets[at])
            g = jax.tree.map(lambda g, w: g + SUBSTITUTE.weight_decay * w, g, params)
            velocity = jax.tree.map(lambda v, g: SUBSTITUTE.momentum * v + g, velocity, g)
            params = jax.tree.map(lambda w, v: w - SUBSTITUTE.learning_rate * v, params, velocity)
    return params


def fgsm(params, x, target, step):
    """step sgn(dCE/dz) of one image in normalised pixels, for the linear network, by hand."""
    dense = params["params"]["Dense_0"]
    z = MNIST_FAMILY.preprocess(x)
    p = jax.nn.softmax(z.reshape(-1) @ dense["kernel"] + dense["bias"])
    gradient = dense["kernel"] @ (p - jax.nn.one_hot(target.argmax(), CLASSES))
    return z, step * jnp.sign(gradient).reshape(SHAPE)


def plain_jacobian(attack, sense):
    """jbda (sense 1) and jbself (-1) with lists, in the order of the published procedure."""
    key = keys(0)["draw"]
    drawn = draw(key, len(IMAGES), attack.seeds)
    x = IMAGES[drawn].astype(jnp.float32)
    targets = respond(None, x)
    r = 0
    while len(x) < attack.budget:
        train_key, base_key = jax.random.split(jax.random.fold_in(stream(key, "rounds"), r))
        params = plain_substitute(x, targets, attack.budget, train_key)
        if attack.as_published_code:
            step = attack.step * (-1) ** round(r / 5)
            count = min(len(x), attack.budget - len(x))
            asked, stored = [], []
            for base in range(count):
                z, d = fgsm(params, x[base], targets[base], step)
                d = jnp.clip(z + d, 0, 1) - z
                asked.append(MNIST_FAMILY.pixels(z + sense * d))
                stored.append(MNIST_FAMILY.pixels(z + d))
            answers = respond(None, jnp.stack(asked))
            x = x.at[:count].set(jnp.stack(stored))
            targets = targets.at[:count].set(answers)
        else:
            flips = r // attack.tau if attack.tau else 0
            reservoir = attack.kappa and r >= attack.sigma
            count = min(attack.kappa if reservoir else len(x), attack.budget - len(x))
            stored = []
            for base in order(base_key, 0, attack.budget, len(x))[:count]:
                z, d = fgsm(params, x[base], targets[base], attack.step * (-1) ** flips)
                new = MNIST_FAMILY.pixels(z + sense * d)
                stored.append(jnp.clip(new, 0, 255))
            answers = respond(None, jnp.stack(stored))
        x = jnp.concatenate([x, jnp.stack(stored)])
        targets = jnp.concatenate([targets, answers])
        r += 1
    return x, targets


@pytest.mark.parametrize(
    ("name", "sense"),
    [("jbda", 1), ("jbself", -1), ("reservoir", 1), ("jbda, code", 1), ("jbself, code", -1)],
)
def test_augmentation_is_a_plain_loop_over_images(name, sense, monkeypatch):
    monkeypatch.setattr(jacobian, "BLOCK", 3)
    transfer = collect(ATTACKS[name])
    x, targets = plain_jacobian(ATTACKS[name], sense)
    np.testing.assert_allclose(transfer.x, x, atol=2e-3)
    np.testing.assert_allclose(transfer.targets, targets, atol=1e-4)


@pytest.mark.parametrize("name", ["jbda", "jbself", "jbtop2", "reservoir"])
def test_images_are_perturbed_in_parts_where_they_have_no_room_at_once(name, monkeypatch):
    whole = collect(ATTACKS[name])
    monkeypatch.setattr(jacobian, "MEMORY", 1)
    at_once = []
    perturb = ATTACKS[name].perturb

    def noted(logits, z, *rest):
        at_once.append(len(z))
        return perturb(logits, z, *rest)

    apart = collect(replace(ATTACKS[name], perturb=noted))
    assert set(at_once) == {1}
    np.testing.assert_allclose(apart.x, whole.x, atol=1e-3)
    np.testing.assert_allclose(apart.targets, whole.targets, atol=1e-4)


@pytest.mark.parametrize("name", ["jbda", "jbself", "jbtop2", "reservoir"])
def test_new_images_stay_within_the_range_of_pixels_and_near_their_origin(name):
    transfer = collect(ATTACKS[name])
    assert np.all((transfer.x >= 0) & (transfer.x <= 255))
    seeds = transfer.x[:5]
    step = 0.1 * 255 * 0.3081
    distance = abs(transfer.x[:, None] - seeds[None]).max((2, 3, 4)).min(1)
    assert distance[5:10].max() <= step + 1e-3
    assert distance.max() <= 4 * step + 1e-3


@pytest.mark.parametrize("published", [False, True])
@pytest.mark.parametrize("make", [jbda, jbself, jbtop])
def test_a_round_needs_no_second_copy_of_the_transfer_set(make, published):
    """At 224x224 it is 39 GB: twice the set takes as much more as the set grows by."""
    images = jnp.zeros((60, 32, 32, 1), jnp.uint8)
    network = Classifier(Linear(), MNIST_FAMILY.preprocess, images.shape[1:])
    beside, size = [], []

    def flat(numbers, images):
        return jnp.full((len(images), CLASSES), 1 / CLASSES)

    for budget in (1000, 2000):
        attack = make(budget=budget, seeds=50, substitute=SUBSTITUTE, as_published_code=published)
        world = replace(make_world(attack, flat), images=images, classifier=network)

        def proceed(r, transfer, world=world, attack=attack):
            return attack.proceed(r, transfer, world)

        transfer = jax.eval_shape(partial(attack.begin, world))
        program = jax.jit(proceed, donate_argnums=1).lower(np.int32(0), transfer)
        took = program.compile().memory_analysis()
        beside.append(
            took.temp_size_in_bytes + took.output_size_in_bytes - took.alias_size_in_bytes
        )
        size.append(sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(transfer)))
    assert beside[1] - beside[0] < 0.1 * (size[1] - size[0])


def test_no_more_images_are_worked_out_than_the_largest_round_asks_for():
    asked = []

    def counting(numbers, images):
        asked.append(len(images))
        return respond(numbers, images)

    collect(jbda(budget=40, seeds=30, substitute=SUBSTITUTE), counting)
    assert sorted(set(asked)) == [10, 30]


def test_the_published_code_loses_its_seeds_and_asks_for_few_images():
    """Doubling in place: 5 seeds, then every image twice, so far fewer than 33 differ."""
    method = collect(ATTACKS["jbda"])
    code = collect(ATTACKS["jbda, code"])
    seeds = set(map(bytes, np.asarray(method.x[:5])))
    rows = list(map(bytes, np.asarray(code.x)))
    assert not seeds & set(rows)
    assert len(set(rows)) <= 10
    normalised = MNIST_FAMILY.preprocess(code.x)
    assert np.all((normalised >= -1e-5) & (normalised <= 1 + 1e-5))


def test_the_steps_of_the_published_code_turn_where_python_rounds():
    plan = jbda(budget=1200, seeds=1, kappa=100, sigma=0, as_published_code=True)._plan()
    signs = [int(np.sign(r.step)) for r in jbtop(1, budget=4096, seeds=1)._plan()]
    assert signs == [1] * 12
    assert [int(np.sign(r.step)) for r in plan[:12]] == [1, 1, 1, -1, -1, -1, -1, -1, 1, 1, 1, 1]
    steps = [r.step for r in jbda(budget=64, seeds=1, tau=2)._plan()]
    assert steps == [0.1, 0.1, -0.1, -0.1, 0.1, 0.1]


@pytest.mark.parametrize(
    ("attack", "new"),
    [
        (jbda(budget=1000), [100, 200, 400, 200]),
        (jbda(budget=100), []),
        (jbtop(3, budget=2000), [300, 1200, 400]),
        (jbda(budget=2100, kappa=400, sigma=3), [100, 200, 400, 400, 400, 400, 100]),
        (jbda(budget=800, rho=3), [100, 200, 400]),
    ],
)
def test_a_plan_spends_the_budget_round_by_round(attack, new):
    plan = attack._plan()
    assert [r.new for r in plan] == new
    assert attack.rounds == len(new)
    assert attack.seeds + sum(new) == attack.budget


def test_perturbations_of_a_linear_network_are_the_closed_forms():
    w = jax.random.normal(jax.random.key(0), (3, 5))

    def logits(z):
        return z @ w

    z = jax.random.normal(jax.random.key(1), (4, 3))
    y = jax.nn.softmax(jax.random.normal(jax.random.key(2), (4, 5)))
    step = jnp.float32(0.2)
    which = jnp.array([0, 1, 2, 3])
    up = away_from_top(logits, z, y, which, step)
    for i in range(4):
        p = jax.nn.softmax(z[i] @ w)
        want = 0.2 * jnp.sign(w @ (p - jax.nn.one_hot(y[i].argmax(), 5)))
        np.testing.assert_allclose(up[i], want)
        others = [k for k in np.argsort(-(z[i] @ w), stable=True) if k != y[i].argmax()]
        target = others[int(which[i])]
        got = towards_next(logits, z, y, which, step)[i]
        np.testing.assert_allclose(got, 0.16 * jnp.sign(w[:, target]), atol=1e-6)
    np.testing.assert_array_equal(towards_top(logits, z, y, which, step), -up)


def test_top_k_of_the_published_code_is_constant_where_its_step_is_negative():
    attack = jbtop(2, as_published_code=True)
    z = jax.random.normal(jax.random.key(0), (3, *SHAPE))
    delta = jax.random.uniform(jax.random.key(1), z.shape, minval=-0.08, maxval=0.08)
    sent, kept = attack._images(z, delta, jnp.float32(-0.1), MNIST_FAMILY)
    np.testing.assert_allclose(MNIST_FAMILY.preprocess(sent), z - 0.1, atol=1e-6)
    np.testing.assert_array_equal(sent, kept)
    sent, _ = attack._images(z, delta, jnp.float32(0.1), MNIST_FAMILY)
    np.testing.assert_allclose(MNIST_FAMILY.preprocess(sent), z + delta, atol=1e-6)


@pytest.mark.parametrize(
    ("make", "words"),
    [
        (lambda: jbda(budget=99), "budget is 99: jbda needs at least its 100 seeds"),
        (lambda: jbda(budget=1000, rho=2), r"rho is 2: .* give budget=400"),
        (lambda: jbda(seeds=0), "seeds of jbda is 0"),
        (lambda: jbtop(0), "copies of jbtop0 is 0"),
        (lambda: jbda(source="web"), "takes its images from 'web'"),
        (
            lambda: JacobianAugmentation(perturb=lambda *a: a[1], as_published_code=True),
            "as_published_code knows away_from_top",
        ),
        (lambda: jbtop(4, budget=10, seeds=5).check(60, 4, SHAPE), "4 classes besides the top one"),
        (lambda: jbda(budget=200).check(60, 4, SHAPE), "seeds of jbda is 100: there are 60"),
        (lambda: jbda(budget=1000).examples(50), "budget is 50: jbda needs"),
        (
            lambda: jbda(budget=1000, as_published_code=True).examples(500),
            "overwrites what it asked first",
        ),
        (lambda: Knockoff(budget=10).examples(11), "budgets holds 11: knockoff spends 10"),
        (lambda: Knockoff(budget=10, repeats=3), "budget is 10 with repeats = 3"),
        (lambda: Knockoff(budget=10, repeats=0), "repeats is 0"),
        (
            lambda: Knockoff(budget=122, repeats=2).check(60, 4, SHAPE),
            "holds 60 images, each sent 2 times, give a budget from 2 to 120",
        ),
        (
            lambda: Knockoff(budget=10, augment=crop_and_flip).check(60, 4, SHAPE),
            "images of 4x4 pixels cannot be cropped",
        ),
        (
            lambda: Knockoff(budget=10, augment=lambda k, x: x[:, 1:]).check(60, 4, SHAPE),
            r"augment makes images of shape \(3, 4, 1\) of \(4, 4, 1\)",
        ),
        (lambda: Knockoff(budget=0), "budget is 0: give a whole number"),
        (lambda: draw(jax.random.key(0), 50, 51), "budget is 51: the query set holds 50"),
        (lambda: AdaptiveKnockoff(rewards=()), "rewards is empty"),
        (
            lambda: AdaptiveKnockoff(online=Recipe(gradient=PrivateGradient(1.0))),
            "online of knockoff_adaptive has the gradient",
        ),
        (
            lambda: jbda(substitute=Recipe(gradient=PrivateGradient(1.0))),
            "substitute of jbda has the gradient PrivateGradient",
        ),
        (lambda: AdaptiveKnockoff(budget=61).check(60, 4, SHAPE), "budget is 61: the query set"),
    ],
)
def test_settings_that_cannot_be_followed_are_named(make, words):
    with pytest.raises(InputError, match=words) as caught:
        make()
    assert "\n" not in str(caught.value)


# The adaptive strategy


def test_rewards_by_hand():
    y = jnp.array([[0.7, 0.2, 0.1], [0.0, 0.0, 1.0]])
    mean = jnp.array([0.5, 0.5, 0.0])
    np.testing.assert_allclose(certainty(y, y, mean), [0.5, 1.0], atol=1e-6)
    np.testing.assert_allclose(diversity(y, y, mean), [0.3, 1.0], atol=1e-6)
    logits = jnp.log(jnp.array([[0.5, 0.25, 0.25], [0.25, 0.25, 0.5]]))
    want = [0.7 * np.log(2) + 0.3 * np.log(4), np.log(2)]
    np.testing.assert_allclose(disagreement(y, logits, mean), want, rtol=1e-6)


def bandit(preference, rewards=(1.0,), steps=0):
    classes = len(preference)
    return adaptive._Bandit(
        jnp.asarray(preference, jnp.float32),
        jnp.zeros(classes, jnp.int32),
        jnp.full(len(rewards), jnp.inf),
        jnp.full(len(rewards), -jnp.inf),
        jnp.full(25, -jnp.inf),
        jnp.full((25, 3), -jnp.inf),
    )


def test_the_bandit_moves_as_its_formula_says():
    attack = AdaptiveKnockoff(rewards=(certainty, diversity))
    state = bandit([0.3, -0.2, 0.0], attack.rewards)
    preference = np.array([0.3, -0.2, 0.0])
    drawn = np.zeros(3, int)
    seen, answers = [], []
    low, high = np.full(2, np.inf), np.full(2, -np.inf)
    rng = np.random.default_rng(0)
    for t in range(30):
        classes = rng.integers(0, 3, 4)
        y = rng.dirichlet(np.ones(3), 4).astype(np.float32)
        np.add.at(drawn, classes, 1)
        state = state._replace(drawn=jnp.array(drawn))
        ones = jnp.ones(4, bool)
        state = attack._reward(
            state, t, jnp.asarray(classes), jnp.asarray(y), jnp.zeros((4, 3)), ones
        )
        mean = np.mean(answers[-25:], axis=0) if answers else np.zeros(3)
        margin = np.sort(y)[:, -1] - np.sort(y)[:, -2]
        raw = np.stack([margin, np.maximum(y - mean, 0).sum(1)], 1)
        low, high = np.minimum(low, raw.min(0)), np.maximum(high, raw.max(0))
        spread = high - low
        reward = np.where(spread > 1e-6, (raw - low) / spread, 0).mean(1)  # at first all alike
        baseline = np.mean(seen[-25:]) if seen else reward.mean()
        pi = np.exp(preference) / np.exp(preference).sum()
        moved = sum(
            (r - baseline) / drawn[c] * (np.eye(3)[c] - pi)
            for r, c in zip(reward, classes, strict=True)
        )
        preference = preference + moved
        seen.append(reward.mean())
        answers.append(y.mean(0))
        np.testing.assert_allclose(state.preference, preference, atol=1e-4)


def test_the_bandit_is_sound_on_degenerate_answers():
    """One-hot answers, all the same, certain logits, a last batch that is nearly empty."""
    attack = AdaptiveKnockoff()
    state = bandit([0.0, 0.0, 0.0], attack.rewards)
    y = jnp.eye(3)[jnp.zeros(4, int)]
    batches = [[True] * 4, [True] * 4, [True, False, False, False]]
    for t, (wanted, size) in enumerate(zip(batches, (1e4, jnp.nan, 1), strict=True)):
        logits = size * jnp.eye(3)[jnp.array([1, 0, 0, 0])]
        state = attack._reward(
            state._replace(drawn=state.drawn + 2),
            t,
            jnp.array([0, 1, 2, 0]),
            y,
            logits,
            jnp.array(wanted),
        )
        assert all(np.all(np.isfinite(each)) for each in state[:4])


def test_classes_are_drawn_without_replacement_until_they_are_used_up():
    transfer = collect(AdaptiveKnockoff(budget=60, recipe=RECIPE, online=RECIPE))
    assert sorted(transfer.x.tolist()) == list(range(60))


@pytest.mark.parametrize("steps", [1, 3])
def test_rounds_change_nothing_but_where_the_adaptive_attacker_may_stop(monkeypatch, steps):
    attack = AdaptiveKnockoff(budget=45, recipe=RECIPE, online=replace(RECIPE, batch_size=8))
    assert attack.rounds == 1
    want = collect(attack, noisy)
    monkeypatch.setattr(adaptive, "STEPS", steps)
    assert attack.rounds == -(-6 // steps)
    assert int(attack.begin(make_world(attack)).asked) == 0
    chex.assert_trees_all_close(collect(attack, noisy), want, atol=1e-6)


def test_the_adaptive_attacker_prefers_classes_whose_answers_it_likes():
    """Class 2 of the attacker's images alone gets confident answers."""
    bright = jnp.where((LABELS == 2)[:, None, None, None], 255, 0).astype(jnp.uint8)
    images = jnp.tile(bright * jnp.ones(SHAPE, jnp.uint8)[None], (10, 1, 1, 1))
    labels = jnp.tile(LABELS, 10)

    def sure_of_bright(numbers, images):
        sure = images.mean((1, 2, 3))[:, None] > 100
        return jnp.where(sure, jnp.eye(CLASSES)[:1], jnp.full((1, CLASSES), 0.25))

    attack = AdaptiveKnockoff(
        budget=300, recipe=RECIPE, online=replace(RECIPE, batch_size=4), rewards=(certainty,)
    )
    test = images[:5], labels[:5]
    transfer, _ = steal(attack, 0, sure_of_bright, images, labels, NETWORK, MNIST_FAMILY, test)
    share = np.mean(np.asarray(labels)[transfer.x] == 2)
    assert share > 0.5  # of 200 such images in 600: a random attacker draws a third
