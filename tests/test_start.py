"""Networks that start from others: all layers but the last, for victims and for stolen models."""

from dataclasses import replace
from functools import partial

import flax.linen as nn
import jax
import numpy as np
import pytest
from safetensors.flax import save_file

from madjax import (
    MLP,
    AdaptiveKnockoff,
    Classifier,
    Defended,
    InputError,
    Knockoff,
    NoDefense,
    Online,
    Recipe,
    Sweep,
    Task,
    Trained,
    config,
    fit,
    jbda,
    open_dataset,
    steal,
    store,
    sweep,
)
from madjax.attacks import keys
from madjax.defenses import prediction_api
from madjax.sweep.victim import VICTIM

SMALL = partial(MLP, hidden=(5,))
RECIPE = Recipe(epochs=2, batch_size=16, learning_rate=0.3)


def scaled(x):
    return x / 255


def network(classes):
    return Classifier(SMALL(classes), scaled, (6, 6, 1))


@pytest.fixture(scope="module")
def data_dir(tmp_path_factory):
    folder = tmp_path_factory.mktemp("data")
    for at, name in enumerate(("victims", "queries")):
        rng = np.random.default_rng(at)
        y = rng.integers(0, 4, 200)
        x = rng.integers(0, 200, (200, 6, 6)) + 30 * (np.arange(6) == y[:, None])[:, None]
        x = x.astype(np.uint8)
        np.savez(folder / name, x_train=x[:80], y_train=y[:80], x_test=x[80:], y_test=y[80:])
    return folder


@pytest.fixture(scope="module")
def other(tmp_path_factory):
    """The variables of a network of nine classes, and a checkpoint of it."""
    folder = tmp_path_factory.mktemp("other")
    variables = jax.jit(network(9).init)(jax.random.key(77))
    store.save(folder, "nine", 3, {"params": variables, "opt_state": ()})
    store.wait(folder)
    return variables["params"], Trained(folder / "checkpoints" / "nine")


@pytest.fixture(scope="module")
def data(data_dir):
    return open_dataset("victims", data_dir)


def as_torch(params, path):
    """A file of PyTorch's layout; images have one channel."""
    weights = {}
    for layer, name in (("Dense_0", "one"), ("Dense_1", "two")):
        weights[f"{name}.weight"] = params[layer]["kernel"].T
        weights[f"{name}.bias"] = params[layer]["bias"]
    save_file(weights, path)
    return Trained(path)


class Named(MLP):
    def torch_names(self):
        return {"Dense_0": "one", "Dense_1": "two"}


def test_all_but_the_last_layer_is_the_others(other, data, tmp_path):
    """At a rate of 0 nothing moves: what there is in the end is what there was."""
    params, given = other
    train, test = (data.x_train, data.y_train), (data.x_test, data.y_test)
    key = jax.random.key(5)
    drawn = jax.jit(network(4).init)(jax.random.split(key)[0])["params"]
    named = Classifier(Named(4, hidden=(5,)), scaled, (6, 6, 1))
    in_torch = as_torch(params, tmp_path / "nine.safetensors")
    for classifier, start in ((network(4), given), (named, in_torch)):
        recipe = Recipe(epochs=1, learning_rate=0.0, start=start)
        found = fit(classifier, recipe, key, train, test).params["params"]
        jax.tree.map(np.testing.assert_array_equal, found["Dense_0"], params["Dense_0"])
        jax.tree.map(np.testing.assert_array_equal, found["Dense_1"], drawn["Dense_1"])
    moved = fit(network(4), replace(recipe, learning_rate=0.1, start=given), key, train, test)
    assert np.any(moved.params["params"]["Dense_0"]["kernel"] != params["Dense_0"]["kernel"])


def test_as_many_classes_do_not_make_the_last_layer_the_others(other):
    _, given = other
    assert given.body(network(9)).keys() == {"params/Dense_0/kernel", "params/Dense_0/bias"}


def test_a_sweep_is_the_public_functions(other, data, data_dir, tmp_path):
    """Victim and stolen model; another attacker begins with random parameters."""
    _, given = other
    recipe = replace(RECIPE, start=given)
    task = Task("victims", "queries", architecture=SMALL, victim=recipe)
    attack = Knockoff(budget=40, architecture=SMALL, recipe=recipe)
    plain = replace(attack, recipe=RECIPE, variant="random")
    grid = Sweep("start", (task,), (Defended(NoDefense()),), (attack, plain), seeds=(1,))
    rows = sweep.run(grid, tmp_path / "out", data_dir=data_dir, log=lambda line: None)
    classifier = Classifier(SMALL(4), data.family.inputs, data.image_shape)
    train, test = (data.x_train, data.y_train), (data.x_test, data.y_test)
    victim = fit(classifier, recipe, jax.random.fold_in(jax.random.key(0), VICTIM), train, test)
    queries, key = open_dataset("queries", data_dir), keys(1)["defense"]
    respond = prediction_api(NoDefense(), classifier, victim.params, (), key, 0.0)
    own = queries.x_train, queries.y_train, classifier, data.family, test
    losses = []
    for row, each in zip(rows, (attack, plain), strict=True):
        _, state = steal(each, 1, respond, *own)
        np.testing.assert_allclose(row["attacker_losses"], state.loss, rtol=1e-5)
        np.testing.assert_allclose(row["victim_accuracy"], victim.accuracy[-1])
        losses.append(state.loss)
    assert np.all(losses[0] != losses[1])
    assert rows[0]["start"] == rows[0]["victim_start"] == given.path
    assert rows[1]["start"] is None


def test_digests_are_as_before_without_a_start_and_of_its_arrays_with_one(other):
    _, given = other
    assert "start" not in config.describe(RECIPE)
    assert config.describe(replace(RECIPE, start=given))["start"]["digest"] == given.digest


class Grouped(nn.Module):
    """A network whose layers PyTorch's names do not list in their order, and with two heads."""

    num_classes: int

    def torch_names(self):
        return {"Dense_0": "one", "Dense_1": "two", "Dense_2": "three", "BatchNorm_0": "norm"}

    @nn.compact
    def __call__(self, x, *, train=False):
        x = nn.Dense(5)(x.reshape(len(x), -1))
        x = nn.BatchNorm(use_running_average=not train)(x)
        return nn.Dense(self.num_classes)(x) + nn.Dense(self.num_classes)(x)


def test_the_last_layer_is_what_depends_on_the_classes(tmp_path):
    """Not what a list of names ends with; all of it may be of other classes."""
    rng = np.random.default_rng(0)
    weights = {"one.weight": rng.normal(size=(5, 36)), "one.bias": rng.normal(size=5)}
    for name in ("two", "three"):
        weights |= {f"{name}.weight": rng.normal(size=(9, 5)), f"{name}.bias": rng.normal(size=9)}
    for name in ("weight", "bias", "running_mean", "running_var"):
        weights[f"norm.{name}"] = rng.uniform(1, 2, size=5)
    path = tmp_path / "grouped.safetensors"
    save_file({name: jax.numpy.float32(each) for name, each in weights.items()}, path)
    body = Trained(path).body(Classifier(Grouped(4), scaled, (6, 6, 1)))
    assert len(body) == 2 + 4
    np.testing.assert_allclose(body["params/Dense_0/kernel"], weights["one.weight"].T, rtol=1e-6)
    np.testing.assert_allclose(body["batch_stats/BatchNorm_0/mean"], weights["norm.running_mean"])


def test_a_path_may_be_set(other):
    _, given = other
    task = Task("victims", "queries", architecture=SMALL, victim=RECIPE)
    attack = Knockoff(budget=40, architecture=SMALL, recipe=RECIPE)
    grid = Sweep("start", (task,), (Defended(NoDefense()),), (attack,))
    started = config.override(grid, f"attacks.recipe.start={given.path}")
    assert started.attacks[0].recipe == replace(RECIPE, start=given)
    assert config.override(started, "attacks.recipe.start=None") == grid
    whole = config.override(grid, f"tasks.victim={given.path}")
    assert whole.tasks[0].victim == given
    assert config.override(whole, f"tasks.victim.path={given.path}") == whole
    assert config.override(grid, "tasks.victim=madjax.Recipe").tasks[0].victim == Recipe()
    with pytest.raises(InputError, match=r"nowhere\.pth is no file"):
        config.override(grid, "attacks.recipe.start=nowhere.pth")


def test_nothing_is_asked_of_a_victim_before_the_recipe_is_known_to_fit(other, data):
    asked = []

    def respond(numbers, x):
        jax.debug.callback(lambda: asked.append(1))
        return jax.numpy.full((len(x), 4), 0.25)

    wide = Classifier(MLP(4, hidden=(6,)), data.family.inputs, data.image_shape)
    own = data.x_train, data.y_train, wide, data.family, (data.x_test, data.y_test)
    for change in ({"start": other[1]}, {"augment": lambda key, x: x[:1]}):
        attack = Knockoff(budget=8, recipe=replace(RECIPE, **change))
        with pytest.raises(InputError):
            steal(attack, 0, respond, *own)
    assert not asked


class Unnamed(nn.Module):
    classes: int

    @nn.compact
    def __call__(self, x):
        return nn.Dense(self.classes)(x.reshape(len(x), -1))


def test_what_cannot_be_started_from_is_one_line(other, data_dir, tmp_path):
    _, given = other
    with pytest.raises(InputError, match=r"start is 'nine': give a madjax\.Trained\(path\)"):
        Recipe(start="nine")
    task = Task("victims", "queries", architecture=SMALL, victim=RECIPE)
    attack = Knockoff(budget=40, architecture=SMALL, recipe=RECIPE)
    grid = Sweep("start", (task,), (Defended(NoDefense()),), (attack,))
    wide, recipe = partial(MLP, hidden=(6,)), replace(RECIPE, start=given)
    for changed in (
        {"tasks": (replace(task, architecture=wide, victim=recipe),)},
        {"attacks": (replace(attack, architecture=wide, recipe=recipe),)},
    ):
        with pytest.raises(InputError, match=r"Dense_0/\w+ has shape .* where MLP for these"):
            sweep.run(replace(grid, **changed), tmp_path / "out", data_dir=data_dir)
    unnamed = replace(grid, tasks=(replace(task, architecture=Unnamed, victim=recipe),))
    with pytest.raises(InputError, match="Unnamed has no field num_classes, by which its last"):
        sweep.run(unnamed, tmp_path / "out", data_dir=data_dir)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    "make",
    [
        lambda recipe: Online(recipe=replace(recipe, batch_size=1, momentum=0.0)),
        lambda recipe: jbda(substitute=recipe),
        lambda recipe: AdaptiveKnockoff(online=recipe),
    ],
)
def test_where_networks_begin_at_random_a_start_is_refused(make, other):
    with pytest.raises(InputError, match=r"has the start .* leave start out"):
        make(replace(RECIPE, start=other[1]))
