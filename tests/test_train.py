"""The training loop against a plain Python loop, PyTorch's rules, and itself after a stop."""

from dataclasses import replace
from functools import partial

import chex
import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from madjax import VGG16, AdaptiveKnockoff, Classifier, InputError, Online, Recipe, fit, jbda
from madjax.attacks import crop_and_flip
from madjax.augment import random_resized_crop
from madjax.datasets import IMAGENET_FAMILY, MNIST_FAMILY
from madjax.private import PrivateGradient
from madjax.recipe import adagrad, adam, order
from madjax.streams import stream
from madjax.train import start


class Linear(nn.Module):
    classes: int = 3

    @nn.compact
    def __call__(self, x):
        return nn.Dense(self.classes)(x.reshape(x.shape[0], -1))


CLASSIFIER = Classifier(Linear(), MNIST_FAMILY.preprocess, (4, 4, 1))
RECIPE = Recipe(
    epochs=3, batch_size=8, learning_rate=0.05, weight_decay=0.01, decay=0.5, decay_epochs=2
)


@pytest.fixture(scope="module")
def data():
    """21 images: the last batch of eight holds five."""
    keys = jax.random.split(jax.random.key(7), 2)
    x = jax.random.randint(keys[0], (21, 4, 4, 1), 0, 256).astype(jnp.uint8)
    y = jax.nn.softmax(3 * jax.random.normal(keys[1], (21, 3)))
    return (x, y), (x[:10], y[:10].argmax(-1))


def darker(key, x):
    """Images divided by a whole number from 1 to 4, each by its own."""
    return x // jax.random.randint(key, (len(x), 1, 1, 1), 1, 5).astype(x.dtype)


def plain_loop(recipe, key, data, test):
    """SGD as PyTorch writes it: g += wd w; v = m v + g; w -= lr v; a smaller last batch."""
    (x, y), (x_test, labels) = data, test
    state = start(CLASSIFIER, recipe, len(y), key)
    params, accuracies = state.params, []
    velocity = jax.tree.map(jnp.zeros_like, params)

    def loss(params, x, y):
        log_p = jax.nn.log_softmax(CLASSIFIER.apply(params, x))
        return -jnp.mean(jnp.sum(y * log_p, axis=-1))

    for e in range(recipe.epochs):
        rate = recipe.learning_rate * recipe.decay ** (e // recipe.decay_epochs)
        run_key = jax.random.wrap_key_data(state.key)
        visit = order(run_key, e, len(y))
        step_key = stream(jax.random.fold_in(run_key, e), "steps")
        for at in range(0, len(y), recipe.batch_size):
            i = visit[at : at + recipe.batch_size]
            seen = x[i]
            if recipe.augment is not None:  # of the whole batch, which is filled up from the front
                batch = x[visit[(at + np.arange(recipe.batch_size)) % len(y)]]
                key = jax.random.fold_in(step_key, at // recipe.batch_size)
                seen = recipe.augment(stream(key, "augment"), batch)[: len(i)]
            g = jax.grad(loss)(params, seen, y[i])
            g = jax.tree.map(lambda g, w: g + recipe.weight_decay * w, g, params)
            velocity = jax.tree.map(lambda v, g: recipe.momentum * v + g, velocity, g)
            params = jax.tree.map(lambda w, v, rate=rate: w - rate * v, params, velocity)
        hits = CLASSIFIER.apply(params, x_test).argmax(-1) == labels
        accuracies.append(100 * hits.mean())
    return params, accuracies


@pytest.mark.parametrize("augment", [None, darker])
def test_fit_is_a_plain_python_loop(data, augment):
    key, recipe = jax.random.key(0), replace(RECIPE, augment=augment)
    state = fit(CLASSIFIER, recipe, key, *data)
    params, accuracies = plain_loop(recipe, key, *data)
    chex.assert_trees_all_close(state.params, params, atol=1e-6)
    np.testing.assert_allclose(state.accuracy, accuracies)


def test_order_is_a_permutation_by_key_and_epoch():
    key = jax.random.key(3)
    first, second = order(key, 0, 50), order(key, 1, 50)
    np.testing.assert_array_equal(np.sort(first), np.arange(50))
    assert np.any(first != second)
    np.testing.assert_array_equal(first, order(key, 0, 50))
    assert np.any(first != order(jax.random.key(4), 0, 50))


def test_a_stopped_run_goes_on_as_if_it_had_not_stopped(data):
    states = []
    whole = fit(CLASSIFIER, RECIPE, jax.random.key(1), *data, after_epoch=states.append)
    again = fit(CLASSIFIER, RECIPE, jax.random.key(1), *data, state=states[0])
    chex.assert_trees_all_equal(whole, again)
    assert [int(s.epoch) for s in states] == [1, 2, 3]
    assert np.isneginf(states[0].accuracy).tolist() == [False, True, True]


def test_labels_are_one_hot_posteriors(data):
    (x, y), test = data
    labels = y.argmax(-1)
    hard = fit(CLASSIFIER, RECIPE, jax.random.key(1), (x, labels), test)
    soft = fit(CLASSIFIER, RECIPE, jax.random.key(1), (x, jax.nn.one_hot(labels, 3)), test)
    chex.assert_trees_all_equal(hard, soft)


def test_any_optax_optimiser_serves(data):
    def adam(learning_rate, momentum, weight_decay):
        return optax.adam(learning_rate)

    recipe = Recipe(epochs=40, batch_size=8, learning_rate=0.05, optimizer=adam)
    state = fit(CLASSIFIER, recipe, jax.random.key(1), *data)
    assert state.loss[-1] < 0.8 * state.loss[0]
    assert state.accuracy.max() > state.accuracy[0]


@pytest.mark.parametrize("size", [1.0, 1e-6])
def test_adam_and_adagrad_take_their_published_steps(size):
    """Three steps on one parameter, by hand; momentum is not used."""
    gradients = size * np.array([1.0, -2.0, 0.5])
    w = {"adam": 0.0, "adagrad": 0.0}
    m = v = total = 0.0
    for t, g in enumerate(gradients, 1):
        m, v, total = 0.9 * m + 0.1 * g, 0.999 * v + 0.001 * g * g, total + g * g
        w["adam"] -= 0.01 * (m / (1 - 0.9**t)) / (np.sqrt(v / (1 - 0.999**t)) + 1e-8)
        w["adagrad"] -= 0.01 * g / (np.sqrt(total) + 1e-10)
    for make in (adam, adagrad):
        recipe = Recipe(learning_rate=0.01, momentum=0.9, optimizer=make)
        optimizer, params = recipe.transformation(10), jnp.zeros(())
        state = optimizer.init(params)
        for g in gradients:
            updates, state = optimizer.update(jnp.float32(g), state, params)
            params = optax.apply_updates(params, updates)
        np.testing.assert_allclose(params, w[make.__name__], rtol=1e-3)


@pytest.mark.parametrize(
    ("name", "value"),
    [("epochs", 0), ("batch_size", 0), ("decay_epochs", -1), ("learning_rate", float("nan"))],
)
def test_a_recipe_that_cannot_be_followed_is_named(name, value):
    with pytest.raises(InputError, match=f"{name} is {value}"):
        Recipe(**{name: value})


def test_an_optimiser_that_would_misread_the_recipe_is_refused():
    with pytest.raises(InputError, match="does not take learning_rate, momentum"):
        Recipe(optimizer=optax.adam)
    for gradient in (PrivateGradient, 3):
        with pytest.raises(InputError, match="give a function, or an object that is called"):
            Recipe(gradient=gradient)


@pytest.mark.parametrize(
    ("targets", "words"),
    [
        (jnp.zeros(20, int), r"targets of shape \(20,\)"),
        (jnp.ones((21, 1)), r"targets of shape \(21, 1\)"),
        (jnp.full(21, 3), "labels run from 3 to 3"),
        (jnp.full(21, -1), "labels run from -1"),
    ],
)
def test_targets_that_do_not_fit_are_named(data, targets, words):
    (x, _), test = data
    with pytest.raises(InputError, match=words):
        fit(CLASSIFIER, RECIPE, jax.random.key(0), (x, targets), test)


def test_every_visit_of_an_image_is_augmented_anew(data):
    """What a step sees, by a network whose loss is of no weight but that of the pixels."""
    seen = []

    def spy(key, x):
        x = darker(key, x)
        jax.debug.callback(lambda x: seen.append(np.asarray(x)), x)
        return x

    recipe = Recipe(epochs=2, batch_size=7, augment=spy)
    fit(CLASSIFIER, recipe, jax.random.key(0), *data)
    jax.effects_barrier()
    (x, _), _ = data
    found = np.concatenate(seen).reshape(2, 21, 16).astype(int)
    ways = np.stack([np.asarray(x).reshape(21, 16).astype(int) // d for d in range(1, 5)])
    factors = []
    for epoch in found:
        equal = (epoch[:, None, None] == ways.swapaxes(0, 1)[None]).all(-1)  # [seen, image, factor]
        assert (equal.any(-1).sum(0) == 1).all()  # each image once
        factors.append(equal.any(0).argmax(-1))
    assert np.any(factors[0] != factors[1])
    assert len(set(factors[0])) > 1


def test_an_augment_that_does_not_go_with_the_network_is_named():
    """Crops of 224 pixels do go with a network that sees the middle of 256."""
    network = Classifier(VGG16(3, width=1 / 64), IMAGENET_FAMILY.inputs, (256, 256, 3))
    crops = partial(random_resized_crop, side=224)
    Recipe(augment=crops).check(network, 10)
    with pytest.raises(InputError, match=r"augment .* makes images that VGG16 cannot take \("):
        Recipe(augment=lambda key, x: x[:, :20, :20]).check(network, 10)
    with pytest.raises(InputError, match=r"TypeError: .*float32.* of uint8 and of float32$"):
        Recipe(augment=lambda key, x: (x >> 4) << 4).check(network, 10)
    with pytest.raises(InputError, match="makes 1 images of 2: give one that keeps their number"):
        Recipe(augment=lambda key, x: x[:1]).check(network, 10)
    with pytest.raises(InputError, match="cannot be cropped at random after padding by 400"):
        Recipe(augment=partial(crop_and_flip, pad=400)).check(network, 10)


@pytest.mark.parametrize(
    "make",
    [
        lambda recipe: Online(recipe=replace(recipe, batch_size=1, momentum=0.0)),
        lambda recipe: jbda(substitute=recipe),
        lambda recipe: AdaptiveKnockoff(online=recipe),
    ],
)
def test_where_images_are_learned_as_they_are_augment_is_refused(make):
    with pytest.raises(InputError, match=r"has the augment .* leave augment out"):
        make(Recipe(augment=crop_and_flip))
