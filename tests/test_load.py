"""Operations and bytes that are told from shapes, against closed forms and what XLA takes."""

from dataclasses import replace
from functools import partial
from itertools import pairwise

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import madjax
from madjax import (
    MAD,
    Classifier,
    Defended,
    InputError,
    Knockoff,
    NoDefense,
    Recipe,
    Sweep,
    Task,
    backend,
    jbda,
    jbself,
    jbtop,
    sweep,
    train,
)
from madjax.attacks import AdaptiveKnockoff
from madjax.datasets import CIFAR_FAMILY, MNIST_FAMILY
from madjax.sweep import load
from madjax.sweep.load import Space
from tests.networks import Linear

RECIPE = Recipe(epochs=2, batch_size=16)
DENSE = Classifier(madjax.MLP(10, (30, 20)), MNIST_FAMILY.preprocess, (6, 6, 1))
SIZES = (36, 30, 20, 10)
VGG = Classifier(madjax.VGG16(10, width=1 / 4), CIFAR_FAMILY.inputs, (32, 32, 3))


def products(sizes):
    return sum(a * b for a, b in pairwise(sizes))


def test_operations_of_dense_layers_are_those_of_their_products():
    """Two for each weight forwards, two for its gradient, and two for that of what it reads."""
    forward = 2 * products(SIZES)
    assert load.knowing(DENSE) == pytest.approx(forward, rel=0.15)  # and those of the rest
    assert load.learning(DENSE) == pytest.approx(2 * forward + 2 * products(SIZES[1:]), rel=0.15)


def test_operations_of_a_convolution_are_those_of_its_products():
    lenet = Classifier(madjax.LeNet(10), MNIST_FAMILY.preprocess, (28, 28, 1))
    products_ = 24 * 24 * 25 * 20 + 8 * 8 * 25 * 20 * 50 + 800 * 500 + 500 * 10
    assert load.knowing(lenet) == pytest.approx(2 * products_, rel=0.1)


def test_a_defence_that_asks_no_network_needs_no_operations():
    known = jax.eval_shape(DENSE.init, jax.random.key(0))
    assert load.answering(NoDefense(), DENSE, ()) == 0
    last, every = (load.answering(MAD(layers=layers), DENSE, known) for layers in ("last", "all"))
    assert 2 * products(SIZES) < last < every


def test_loops_count_as_often_as_they_run(monkeypatch):
    """Queries in chunks, and classes in chunks: the same products."""
    known = jax.eval_shape(VGG.init, jax.random.key(0))
    whole = load.answering(MAD(layers="all"), VGG, known)
    monkeypatch.setattr("madjax.structured._comfortable", lambda: 1)
    assert load.answering(MAD(layers="all"), VGG, known) == pytest.approx(whole, rel=0.2)

    def twice(x):
        def step(i, x):
            return jax.lax.cond(i > 1, lambda x: x @ x, lambda x: x, x)

        return jax.lax.fori_loop(0, 3, step, x)

    assert load._operations(twice, jnp.ones((8, 8))) == 3 * 2 * 8**3 / 8


@pytest.mark.parametrize(
    ("make", "spent"),
    [
        # 10 seeds, then 10, 20 and 20 new images; each substitute learns from those before.
        (jbda, 3 * 2 * (10 + 20 + 40) + 2 * 50),
        (jbself, 3 * 2 * (10 + 20 + 40) + 2 * 50),
        # Of three copies: 30 and 20 new images, by eight gradients and a look at the ranks.
        (jbtop, 3 * 2 * (10 + 40) + 17 * 50),
    ],
)
def test_passes_of_an_attacker_that_trains_substitutes(make, spent):
    attack = make(budget=60, seeds=10, substitute=RECIPE, architecture=Linear, recipe=RECIPE)
    assert attack.passes == spent
    assert load.collecting(attack, DENSE) == pytest.approx(load.knowing(DENSE) * spent / 60)


def test_passes_of_other_attackers():
    assert Knockoff(budget=60).passes == 0
    assert AdaptiveKnockoff(budget=60).passes == 4 * 60


@pytest.mark.parametrize(
    ("network", "batch", "most"),
    [
        (Classifier(madjax.LeNet(10), MNIST_FAMILY.preprocess, (28, 28, 1)), 64, 1.5),
        (VGG, 32, 2.0),
    ],
    ids=["LeNet", "VGG16"],
)
def test_a_step_holds_at_most_what_is_said(network, batch, most):
    """Against what XLA takes for the program of an epoch, which frees and fuses as it likes."""
    recipe = replace(RECIPE, batch_size=batch)
    state = jax.eval_shape(partial(train.start, network, recipe, batch), jax.random.key(0))
    images = jax.ShapeDtypeStruct((batch, *network.image_shape), jnp.uint8)
    targets = jax.ShapeDtypeStruct((batch, 10), jnp.float32)

    def epoch(state, images, targets):
        return train.one_pass(network, recipe, state, lambda i: (images[i], targets[i]), batch)

    taken = jax.jit(epoch).lower(state, images, targets).compile().memory_analysis()
    assert 1 / most < taken.temp_size_in_bytes / load.held(network, batch) < most


def test_an_accelerator_holds_half_as_much_in_bfloat16():
    here = load.held(VGG, 16)
    with backend.traced_for("gpu"):
        there = load.held(VGG, 16)
        assert backend.platform() == "gpu"
    assert there < 0.6 * here
    assert load.held(VGG, 16) == here
    with pytest.raises(ZeroDivisionError), backend.traced_for("tpu"):
        1 / 0  # noqa: B018
    assert backend.platform() == jax.default_backend()


def test_cells_take_their_steps_together_or_one_after_another():
    takes = Space(images=700, shared=300, each=10, at_work=100)
    assert takes.of(5, together=True) == 1000 + 5 * 10 + 5 * 100
    assert takes.of(5, together=False) == 1000 + 5 * 10 + 100


CONFIG = Sweep(
    "loaded",
    (Task("tiny", "tiny", architecture=Linear, victim=RECIPE),),
    (Defended(MAD(), (0.1, 0.3, 0.5, 0.7, 0.9)),),
    (Knockoff(budget=40, architecture=Linear, recipe=RECIPE),),
)


@pytest.fixture
def group(folder):
    """The one group of that config, and its data."""
    opened = sweep.tasks.open_tasks(CONFIG.tasks, folder, None)
    ahead = sweep.trial.tried(CONFIG, opened)
    cells = {str(i): cell for i, cell in enumerate(sweep.expand(CONFIG))}
    (found,) = sweep.work.grouped(cells, CONFIG, ahead)
    return found, opened


@pytest.mark.parametrize(
    ("platform", "room", "asked", "found"),
    [
        ("cpu", 9, None, 1),  # where rows are to come early
        ("cpu", 1, 4, 4),  # as asked for
        ("gpu", 9, None, 5),
        ("gpu", 5, None, 5),
        ("gpu", 4, None, 3),  # and the other two, in place of four and one
        ("gpu", 3, None, 3),
        ("gpu", 0, None, 1),
        ("gpu", 3, 5, 5),
        ("gpu", None, None, 5),
    ],
)
def test_a_wave_is_of_as_many_cells_as_fit(group, platform, room, asked, found):
    found_group, opened = group
    mesh = sweep.make_mesh(jax.devices()[:1])
    with backend.traced_for(platform):
        takes = load.space(found_group, opened, mesh)
        memory = None if room is None else takes.of(room, together=True)
        assert load.wave_of(found_group, opened, mesh, asked, memory) == found


def test_a_wave_fills_all_devices_alike(group):
    """Five cells on two of them are one wave of six, or waves of four, as even as can be."""
    found_group, opened = group
    mesh = sweep.make_mesh(jax.devices()[:2])
    with backend.traced_for("gpu"):
        takes = load.space(found_group, opened, mesh)
        for room, size in ((3, 6), (2, 4), (1, 2)):
            memory = takes.of(room, together=True)
            assert load.wave_of(found_group, opened, mesh, None, memory) == size


def test_cells_that_have_no_room_are_refused_before_any_work(folder, tmp_path):
    takes = "take 0.0 MB, and a transfer set with its stolen model 0.0 MB, on a device that has 0.0"
    with pytest.raises(InputError, match=takes):
        sweep.run(CONFIG, tmp_path / "out", data_dir=folder, memory=1000, log=lambda line: None)
    assert not (tmp_path / "out").exists()


def test_a_device_has_the_memory_that_it_says_or_its_share_of_the_machine():
    one, two = (sweep.mesh.memory_of(sweep.make_mesh(jax.devices()[:n])) for n in (1, 2))
    assert one == 2 * two
    assert two > 2**28

    class Said:
        platform = "gpu"

        def __init__(self, said):
            self.said = said

        def memory_stats(self):
            return self.said

    class Of:
        size = 1

        def __init__(self, said):
            self.devices = np.array([Said(said)], object)

    assert sweep.mesh.memory_of(Of({"bytes_limit": 7})) == 7
    assert sweep.mesh.memory_of(Of({})) is None
    assert sweep.mesh.memory_of(Of(None)) is None
