"""Every stage is lowered for accelerators that are not here: what it would be there.

No device talks to another along the axis `cells`, and no convolution is a grouped one, which is
what `vmap` over its weights would make it. VGG16 is narrow, but its last convolutions are wide.
"""

import re
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from madjax import MAD, VGG16, Classifier, Knockoff, LeNet, Recipe, backend, jbda, sweep, train
from madjax.attacks import Online
from madjax.datasets import CIFAR_FAMILY, MNIST_FAMILY
from madjax.sweep import mesh, online, stages
from madjax.sweep.mesh import at_once

PLATFORMS = {"gpu": "cuda", "tpu": "tpu"}
"""As `madjax.backend` has them: as `jax.export` has them."""
RECIPE = Recipe(epochs=2, batch_size=8)
CELLS, IMAGES = 8, 24
TALK = "all_reduce", "all_gather", "all_to_all", "collective", "reduce_scatter"


class Grid:
    """A wave of cells over four devices, as shapes; two tasks of two seeds."""

    def __init__(self, network, family):
        self.network = network
        self.parties = sweep.Parties(network, network, family, 10, 10)
        self.rule = MAD(layers="all")
        params = jax.eval_shape(network.init, jax.random.key(0))
        two, four = (
            jax.tree.map(lambda a, n=n: shape((n, *a.shape), a.dtype), params) for n in (2, 4)
        )
        images = shape((2, IMAGES, *network.image_shape), jnp.uint8)
        labels = shape((2, IMAGES), jnp.int32)
        self.params, self.own, self.api = params, sweep.Own(images, labels), sweep.Api(two, four)
        self.tests = sweep.Tests(images, labels, shape((2, IMAGES, 10)))
        each = (shape((CELLS,), t) for t in (jnp.float32, jnp.uint32, jnp.int32, jnp.int32))
        self.points = sweep.Point(*each)
        self.mesh = sweep.make_mesh()
        self.over = partial(sweep.over_cells, mesh=self.mesh, networks=self.parties.networks)

    def of_answers(self):
        """The stages that many cells share: of rows, spread over all devices."""

        def over(function, *settings):
            return mesh._compiled(function, settings, self.mesh, at_once, self.mesh.axis_names)

        image, key = self.own.images.shape[2:], jax.eval_shape(lambda: jax.random.key(0))
        rows = shape((IMAGES, 1), jnp.int32), shape((IMAGES, *image), jnp.uint8)
        rows = (*rows, shape((IMAGES, 10)))
        yield over(stages.posterior, self.network), rows[1], self.params
        yield (
            over(stages.at_strengths, self.rule, self.network),
            rows,
            (self.params, key, shape((3,))),
        )

    def of_cells(self, attack, rule, own, api, told=None):
        """The stages of a cell's own."""
        asking, learning = (
            (self.parties, attack, rule),
            (self.network, attack.recipe, attack.budget),
        )
        points = self.points._replace(told=told)
        begin = self.over(stages.begin, *asking)
        transfer = jax.eval_shape(begin, points, (own, api))
        yield begin, points, (own, api)
        if attack.rounds:
            proceed = self.over(stages.proceed, *asking)
            yield proceed, (points, transfer), (own, api, np.int32(0))
        initial = self.over(stages.start, *learning)
        state = jax.eval_shape(initial, self.points, None)
        yield initial, self.points, None
        lesson = self.own.images, self.tests, np.int32(attack.budget)
        yield self.over(stages.advance, *learning), (self.points, transfer, state), lesson
        yield self.over(stages.fidelity, self.network), (self.points, state), self.tests
        yield self.over(stages.visited, attack.budget), state, np.int32(attack.budget)
        part = shape((CELLS, 8, *self.network.image_shape), jnp.uint8)
        some = self.over(stages.advance_part, self.network, attack.recipe)
        yield some, (transfer, state, part), (np.int32(attack.budget), np.int32(0), np.int32(1))
        yield self.over(stages.judged, self.network), (self.points, state), self.tests

    def of_online(self, attack):
        """The stages of an online attacker."""
        ground = online.Ground(self.own, self.api, self.tests)
        start, advance, judge = (
            self.over(stage, self.parties, attack, self.rule)
            for stage in (online.start, online.advance, online.judge)
        )
        training = jax.eval_shape(start, self.points, ground)
        yield start, self.points, ground
        yield advance, (self.points, training), ground
        yield judge, (self.points, training), ground

    def of_owners(self):
        """What trains victims, on one device or on some that share each batch."""
        key = jax.eval_shape(lambda: jax.random.key(0))
        settings = self.network, RECIPE
        state = jax.eval_shape(partial(train.start, *settings, IMAGES), key)
        images, labels = (shape(each.shape[1:], each.dtype) for each in self.own)
        yield partial(train._start, *settings, IMAGES), key
        yield partial(train._advance, *settings), state, images, shape((IMAGES, 10)), images, labels


def shape(of, dtype=jnp.float32):
    return jax.ShapeDtypeStruct(of, dtype)


LENET = Classifier(LeNet(10), MNIST_FAMILY.inputs, (28, 28, 1))
VGG = Classifier(VGG16(10, width=1 / 8), CIFAR_FAMILY.inputs, (32, 32, 3))
EACH = {"budget": 16, "recipe": RECIPE}
STAGES = {
    "answers": lambda grid: grid.of_answers(),
    "knockoff, foreseen": lambda grid: grid.of_cells(
        Knockoff(**EACH),
        None,
        sweep.Own(stages.Unseen(grid.own.images.shape), grid.own.labels),
        None,
        shape((CELLS, 16, 10)),
    ),
    "jbda": lambda grid: grid.of_cells(
        jbda(seeds=8, substitute=RECIPE, **EACH), grid.rule, grid.own, grid.api
    ),
    "online": lambda grid: grid.of_online(Online(images=24, every=2, judged=8, **EACH)),
    "owners": lambda grid: grid.of_owners(),
}


def lowered(function, *arguments, platform="gpu"):
    """A function for accelerators, as the text of its program."""
    compiled = function if hasattr(function, "lower") else jax.jit(function)
    made = jax.export.export(compiled, platforms=[PLATFORMS[platform]])(*arguments)
    assert made.platforms == (PLATFORMS[platform],)
    return made.mlir_module()


def groups(text):
    """Into how many groups the convolutions of a program are split."""
    return {int(count) for count in re.findall(r"(?:feature|batch)_group_count = (\d+)", text)}


def talk(text):
    """What of a program sends from device to device."""
    return [word for word in TALK if f"stablehlo.{word}" in text]


FAST = [(LENET, name, platform) for name in STAGES for platform in PLATFORMS]
FAST += [(VGG, "answers", "gpu"), (VGG, "jbda", "gpu")]
REST = [(VGG, name, platform) for name in STAGES for platform in PLATFORMS]


@pytest.mark.parametrize(
    ("network", "name", "platform"),
    [
        *FAST,
        *(pytest.param(*each, marks=pytest.mark.slow) for each in REST if each not in FAST),
    ],
    ids=lambda value: type(value.module).__name__ if isinstance(value, Classifier) else value,
)
def test_every_stage_is_lowered_for_accelerators(network, name, platform):
    family = MNIST_FAMILY if network is LENET else CIFAR_FAMILY
    with backend.traced_for(platform):
        for function, *arguments in STAGES[name](Grid(network, family)):
            text = lowered(function, *arguments, platform=platform)
            assert talk(text) == []
            assert groups(text) <= {1}


def test_grouped_convolutions_would_be_seen():
    """Those of wide networks side by side, which therefore go one after another."""
    found = []
    with backend.traced_for("gpu"):
        grid = Grid(VGG, CIFAR_FAMILY)
        states = jax.eval_shape(grid.over(stages.start, VGG, RECIPE, IMAGES), grid.points, None)
        for mapping in (sweep.vmap_cells, sweep.default_mapping([VGG])):
            over = partial(grid.over, mapping=mapping)
            text = lowered(over(stages.fidelity, VGG), (grid.points, states), grid.tests)
            found.append(groups(text))
    assert found == [{1, CELLS // 4}, {1}]


def test_talk_between_devices_would_be_seen():
    def mean(cell, shared):
        return jax.lax.pmean(cell.strength, "cells") + shared

    grid = Grid(LENET, MNIST_FAMILY)
    assert talk(lowered(grid.over(mean), grid.points, jnp.float32(0))) == ["all_reduce"]
