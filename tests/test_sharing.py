"""Devices that share a cell: the training of one device, and no talk with those of other cells."""

import re
from functools import partial

import chex
import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType
from jax.sharding import PartitionSpec as P

import madjax
from madjax import MAD, Defended, InputError, Knockoff, NoDefense, Recipe, Sweep, Task, sweep
from madjax.recipe import Lesson, mean_gradient
from madjax.sharing import shared_out
from madjax.sweep.mesh import arranged, examples_shared
from madjax.train import epoch, start


class Normed(nn.Module):
    """Convolution, BatchNorm and dropout: all that looks at a batch as a whole."""

    num_classes: int = 4

    @nn.compact
    def __call__(self, x, train=False):
        x = nn.Conv(6, (3, 3))(x)
        x = nn.relu(nn.BatchNorm(use_running_average=not train, momentum=0.9)(x))
        x = nn.Dropout(0.3, deterministic=not train)(x.mean((1, 2)))
        return nn.Dense(self.num_classes)(x)


CLASSIFIER = madjax.Classifier(Normed(), lambda x: x / 255 - 0.5, (6, 6, 1))
IMAGES = jax.random.randint(jax.random.key(0), (64, 6, 6, 1), 0, 256).astype(jnp.uint8)
TARGETS = jax.nn.softmax(jax.random.normal(jax.random.key(1), (64, 4)))
LABELS = jnp.arange(64) % 4


def darker(key, images):
    """An augment that draws a number for each image."""
    return images * jax.random.uniform(key, (len(images), 1, 1, 1))


def cell(recipe, seed, data):
    """One epoch from a key, as a cell of a grid."""
    images, targets = data

    def take(i):
        return images[i], targets[i]

    state = start(CLASSIFIER, recipe, 64, jax.random.key(seed))
    return epoch(CLASSIFIER, recipe, state, take, 64, images, LABELS)


def program(recipe, per_cell, mapping=sweep.map_cells, devices=4):
    mesh = arranged(sweep.make_mesh(jax.devices()[:devices]), 1, per_cell)
    return sweep.over_cells(cell, recipe, mesh=mesh, mapping=mapping)


# Batches that two devices divide, batches that they do not, and a last one that is filled up.
RECIPES = {
    "whole": Recipe(epochs=1, batch_size=16, weight_decay=1e-3),
    "odd": Recipe(epochs=1, batch_size=15),
    "augmented": Recipe(epochs=1, batch_size=32, augment=darker),
}


@pytest.mark.parametrize("mapping", [sweep.map_cells, sweep.vmap_cells])
@pytest.mark.parametrize(("name", "per_cell"), [("whole", 2), ("odd", 2), ("augmented", 4)])
def test_devices_that_share_a_cell_train_as_one(name, per_cell, mapping):
    recipe, seeds = RECIPES[name], np.arange(4)
    state = program(recipe, per_cell, mapping)(seeds, (IMAGES, TARGETS))
    for i in (0, 3):
        want = jax.jit(partial(cell, recipe))(i, (IMAGES, TARGETS))
        got = jax.tree.map(lambda a, i=i: a[i], state)
        chex.assert_trees_all_close(got.params, want.params, atol=1e-5)
        np.testing.assert_allclose(got.loss, want.loss, rtol=1e-5)
        np.testing.assert_allclose(got.accuracy, want.accuracy, atol=1.6)


def test_one_step_of_vgg16_is_that_of_one_device():
    """Gradients and the statistics of BatchNorm, of the network that this is for."""
    network = madjax.Classifier(madjax.VGG16(4, width=1 / 64), lambda x: x / 255 - 0.5, (32, 32, 1))
    images = jax.random.randint(jax.random.key(2), (16, 32, 32, 1), 0, 256).astype(jnp.uint8)
    variables = jax.jit(network.init)(jax.random.key(3))

    def once(images, targets):
        lesson = Lesson(
            lambda i: (images[i], targets[i]), 16, None, 16, jax.random.key(4), jnp.int32(0)
        )
        value, gradient, moved = mean_gradient(network, lesson)(variables, 0)
        return value, gradient, moved["batch_stats"]

    want = jax.jit(once)(images, TARGETS[:16])
    with examples_shared(arranged(sweep.make_mesh(), 1, 4)):
        text = jax.jit(once).lower(images, TARGETS[:16]).compile().as_text()
        got = jax.jit(once)(images, TARGETS[:16])
    assert "all-reduce" in text
    chex.assert_trees_all_close(jax.device_get(got), jax.device_get(want), atol=1e-5, rtol=1e-4)


def groups_in(text):
    """The groups of devices that talk to each other in a compiled program."""
    found = set()
    for written in re.findall(r"replica_groups=(\{\{.*?\}\}|\[[^ ]*)", text):
        if written.startswith("{"):
            found |= {tuple(map(int, g.split(","))) for g in re.findall(r"\{([\d,]+)\}", written)}
        else:
            rows, columns, flat = re.fullmatch(r"\[(\d+),(\d+)\]<=\[(\d+)\],?", written).groups()
            held = np.arange(int(flat)).reshape(int(rows), int(columns))
            found |= set(map(tuple, held.tolist()))
    return found


def test_devices_talk_to_those_of_their_own_cell_alone():
    text = program(RECIPES["whole"], 2).lower(np.arange(2), (IMAGES, TARGETS)).compile().as_text()
    assert groups_in(text) == {(0, 1), (2, 3)}
    pairs = " ".join(re.findall(r"source_target_pairs=(\{.*?\}\})", text))
    for a, b in re.findall(r"\{(\d+),(\d+)\}", pairs):
        assert int(a) // 2 == int(b) // 2
    alone = program(RECIPES["whole"], 1).lower(np.arange(4), (IMAGES, TARGETS)).compile().as_text()
    assert "all-reduce" not in alone
    assert "collective" not in alone


def test_examples_are_shared_and_not_computed_twice():
    """Of 16 images in a batch each of two devices has 8 after the first convolution."""
    found = []
    for per_cell in (1, 2):
        lowered = program(RECIPES["whole"], per_cell, devices=2).lower(
            np.arange(2), (IMAGES, TARGETS)
        )
        text = lowered.compile().as_text()
        found.append([f"[{n},6,6,6]" in text for n in (16, 8)])
    assert found == [[True, False], [False, True]]


def test_without_a_mesh_nothing_is_shared_out():
    x = jnp.ones((5, 2))
    assert shared_out(x) is x
    with examples_shared(sweep.make_mesh()):
        assert shared_out(x) is x


@pytest.mark.parametrize(
    ("devices", "cells", "wanted", "found"),
    [(4, 1, None, 1), (4, 1, 4, 4), (4, 8, 2, 2), (4, 3, 1, 1), (3, 1, 3, 3)],
)
def test_devices_of_a_cell_on_a_cpu(devices, cells, wanted, found):
    mesh = arranged(sweep.make_mesh(jax.devices()[:devices]), cells, wanted)
    assert mesh.shape == {"cells": devices // found, "data": found}
    assert mesh.devices.ravel().tolist() == jax.devices()[:devices]


@pytest.mark.parametrize(
    ("devices", "cells", "found"),
    [(4, 1, 4), (4, 2, 2), (4, 3, 1), (4, 4, 1), (4, 9, 1), (3, 1, 3), (3, 2, 1), (1, 1, 1)],
)
def test_on_an_accelerator_all_cells_of_a_wide_network_run_at_once(
    monkeypatch, devices, cells, found
):
    monkeypatch.setattr("jax.default_backend", lambda: "gpu")
    mesh = sweep.make_mesh(jax.devices()[:devices])
    wide = madjax.Classifier(madjax.VGG16(4, width=1 / 8), lambda x: x / 255, (32, 32, 1))
    assert arranged(mesh, cells, None, [wide]).shape["data"] == found
    assert arranged(mesh, cells, None, [CLASSIFIER]).shape["data"] == 1


def test_a_users_own_axis_of_that_name_is_left_alone():
    """Where XLA is not to partition it."""
    x = jnp.arange(8.0)
    with jax.set_mesh(jax.make_mesh((4,), ("data",), (AxisType.Explicit,))):
        assert shared_out(x) is x
    mesh = jax.make_mesh((4,), ("data",), (AxisType.Auto,))
    own = jax.shard_map(
        lambda x: shared_out(x) + 1, mesh=mesh, in_specs=P("data"), out_specs=P("data")
    )
    np.testing.assert_array_equal(own(x), x + 1)


@pytest.mark.parametrize("wanted", [0, 3, 8])
def test_devices_that_a_number_does_not_divide(wanted):
    with pytest.raises(InputError, match=f"devices_per_cell is {wanted}: give .* the 4 devices"):
        arranged(sweep.make_mesh(), 1, wanted)


SEEN = []


def noted(key, images):
    """An augment that changes nothing, and notes how many devices share what is trained."""
    SEEN.append(jax.sharding.get_abstract_mesh().shape.get("data", 1))
    return images


RECIPE = Recipe(epochs=2, batch_size=16, augment=noted)
CONFIG = Sweep(
    name="shared",
    tasks=(Task("tiny", "tiny", architecture=Normed, victim=RECIPE),),
    defenses=(Defended(NoDefense()), Defended(MAD(layers="last", surrogate_epochs=1), (0.9,))),
    seeds=(0, 1),
    attacks=(Knockoff(budget=40, architecture=Normed, recipe=RECIPE),),
)


def test_a_sweep_whose_cells_are_shared_has_the_rows_of_one_that_shares_none(
    folder, tmp_path, monkeypatch
):
    """Of the victim, the trained surrogates and the stolen models alike."""
    networks, quiet = set(), {"data_dir": folder, "log": lambda line: None}

    def mapping(given):
        networks.update(type(network.module) for network in given)
        return sweep.map_cells

    monkeypatch.setattr("madjax.sweep.mesh.default_mapping", mapping)
    with pytest.raises(InputError, match="devices_per_cell is 3"):
        sweep.run(CONFIG, tmp_path / "three", devices_per_cell=3, **quiet)
    assert not (tmp_path / "three").exists()
    SEEN.clear()
    together = sweep.run(CONFIG, tmp_path / "together", devices_per_cell=2, **quiet)
    assert networks == {Normed}
    # All that is trained is shared; before it the sweep is tried on shapes, which are nobody's.
    assert set(SEEN) == {1, 2}
    assert sorted(SEEN) == SEEN
    SEEN.clear()
    plain = sweep.run(CONFIG, tmp_path / "plain", **quiet)
    assert set(SEEN) == {1}
    assert [row["id"] for row in plain] == [row["id"] for row in together]
    for row, same in zip(plain, together, strict=True):
        assert row["victim_accuracy"] == same["victim_accuracy"]
        np.testing.assert_allclose(row["l1_mean"], same["l1_mean"], atol=1e-4)
        np.testing.assert_allclose(row["attacker_losses"], same["attacker_losses"], rtol=1e-4)
