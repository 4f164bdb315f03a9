"""Images that come to the device in parts of an epoch: the training of those that are all there."""

from dataclasses import replace
from typing import ClassVar

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
    jbda,
    open_dataset,
    store,
    sweep,
)
from madjax.datasets import Dataset
from madjax.private import PrivateGradient
from madjax.sweep import load
from madjax.sweep.mesh import arranged
from madjax.train import fit, parts
from tests.networks import Linear
from tests.test_sharing import CLASSIFIER, darker

N = 50
RNG = np.random.default_rng(3)
IMAGES = RNG.integers(0, 256, (N, 6, 6, 1), np.uint8)
TARGETS = RNG.dirichlet(np.ones(4), N).astype(np.float32)
TESTS = IMAGES[:20], np.arange(20) % 4
RECIPE = Recipe(epochs=3, batch_size=16, augment=darker)


class Recorded(np.ndarray):
    """Images that note how many of them are asked for."""

    asked: ClassVar[list[np.ndarray]] = []

    def __getitem__(self, i):
        if isinstance(i, np.ndarray):
            Recorded.asked.append(i)
        return np.asarray(super().__getitem__(i))


@pytest.fixture(scope="module")
def whole():
    """The network that had all images on the device."""
    return fit(CLASSIFIER, RECIPE, jax.random.key(5), (IMAGES, TARGETS), TESTS)


@pytest.mark.parametrize("at_once", [1, 16, 31, 32, 48, 49])
def test_training_on_parts_is_training_on_all_of_them(whole, at_once):
    """BatchNorm's statistics too, which see the images that fill up the last batch."""
    Recorded.asked = []
    images = IMAGES.view(Recorded)
    found = fit(CLASSIFIER, RECIPE, jax.random.key(5), (images, TARGETS), TESTS, at_once=at_once)
    jax.tree.map(np.testing.assert_array_equal, found, whole)
    size = max(at_once // 16, 1) * 16
    assert {len(numbers) for numbers in Recorded.asked} == {size}
    assert len(Recorded.asked) == 3 * -(-64 // size)
    for epoch in np.array_split(np.array(Recorded.asked), 3):
        assert set(epoch.ravel()) == set(range(N))


@pytest.mark.parametrize("at_once", [N, N + 1, 1000, None])
def test_sets_that_have_room_are_there_at_once(whole, at_once):
    Recorded.asked = []
    images = IMAGES.view(Recorded)
    found = fit(CLASSIFIER, RECIPE, jax.random.key(5), (images, TARGETS), TESTS, at_once=at_once)
    jax.tree.map(np.testing.assert_array_equal, found, whole)
    assert Recorded.asked == []


def test_training_on_parts_goes_on_from_a_whole_epoch(whole):
    states = []
    ways = {"at_once": 16, "after_epoch": states.append}
    data = CLASSIFIER, RECIPE, jax.random.key(5), (IMAGES, TARGETS), TESTS
    fit(*data, **ways)
    assert [int(state.epoch) for state in states] == [1, 2, 3]
    jax.tree.map(np.testing.assert_array_equal, fit(*data, state=states[0], **ways), whole)


@pytest.mark.parametrize("count", [17, 32, 48])
def test_the_first_of_a_transfer_set_are_visited_in_parts_too(count):
    """As where one program serves all budgets."""
    recipe = replace(RECIPE, epochs=1)
    key = jax.random.key(8)
    state = madjax.train.start(CLASSIFIER, recipe, N, key)

    def take(i):
        return jnp.asarray(IMAGES)[i], jnp.asarray(TARGETS)[i]

    wanted = madjax.train.one_pass(CLASSIFIER, recipe, state, take, N, jnp.int32(count))
    visit = madjax.recipe.order(jax.random.wrap_key_data(state.key), 0, N, count)[:count]
    for part in parts(lambda i: jnp.asarray(IMAGES[i]), np.asarray(visit), 16, 16):
        state = madjax.train.part_of_pass(
            CLASSIFIER, recipe, state, part, jnp.asarray(TARGETS), jnp.int32(count)
        )
    assert int(state.epoch) == 1
    for found, want in zip(*map(jax.tree.leaves, (state, wanted)), strict=True):
        np.testing.assert_allclose(found, want, rtol=1e-5, atol=1e-6)


def test_the_next_part_is_fetched_while_a_part_is_at_work():
    events = []
    for part in parts(lambda i: events.append(f"fetch {i[0]}"), np.arange(64), 16, 16):
        events.append(f"work on {int(part.first) * 16}")
    assert events == [
        *("fetch 0", "work on 0", "fetch 16", "work on 16"),
        *("fetch 32", "work on 32", "fetch 48", "work on 48"),
    ]


@pytest.mark.parametrize("at_once", [16, 49])
def test_a_gradient_that_draws_any_image_is_refused(at_once):
    recipe = replace(RECIPE, gradient=PrivateGradient(1.0), augment=None)
    network = Classifier(Linear(4), lambda x: x / 255, (6, 6, 1))
    data = network, recipe, jax.random.key(0), (IMAGES, TARGETS), TESTS
    with pytest.raises(InputError, match=f"room for {at_once} of the 50 images, and the gradient"):
        fit(*data, at_once=at_once)


def test_a_private_victim_whose_images_have_no_room_is_refused_before_any_work(folder, tmp_path):
    private = Defended(madjax.DPSGD(), (1.0,))
    task = Task("tiny", "tiny", architecture=Linear, victim=Recipe(epochs=1, batch_size=16))
    attack = Knockoff(budget=20, architecture=Linear, recipe=Recipe(epochs=1))
    config = Sweep("private", (task,), (private,), (attack,))
    opened = sweep.tasks.open_tasks(config.tasks, folder, None)
    group, _ = group_of(config, {"tiny": opened[task].data})
    mesh = sweep.make_mesh(jax.devices()[:1])
    takes, network = load.space(group, opened, mesh), opened[task].network
    state = jax.eval_shape(lambda: madjax.train.start(network, task.victim, 60, jax.random.key(0)))
    states = 2 * sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(state))
    memory = takes.shared + states + 60 * 4 * 4 + 60 * 36 - 1
    load.check_fits(group, opened, mesh, memory)
    load.check_fits_alone(task, config.defenses, opened[task], mesh, memory + 1)
    with pytest.raises(InputError, match="of the 60 images, and the gradient"):
        sweep.run(config, tmp_path / "out", data_dir=folder, memory=memory)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("at_once", [0, -16, 16.0, True])
def test_what_is_no_number_of_images_is_refused(at_once):
    data = CLASSIFIER, RECIPE, jax.random.key(5), (IMAGES, TARGETS), TESTS
    with pytest.raises(InputError, match=f"at_once is {at_once}: give a whole number of images"):
        fit(*data, at_once=at_once)


# --- in a sweep -----------------------------------------------------------------------------------


ATTACK = Knockoff(budget=40, architecture=type(CLASSIFIER.module), recipe=replace(RECIPE, epochs=2))
TASK = Task("tiny", "tiny", architecture=type(CLASSIFIER.module), victim=RECIPE)
CONFIG = Sweep(
    "parts",
    (TASK, Task("other", "other", architecture=type(CLASSIFIER.module), victim=RECIPE)),
    (Defended(NoDefense()), Defended(MAD(layers="last", surrogate_epochs=1), (0.9,))),
    (ATTACK, replace(ATTACK, variant="nquery", repeats=2)),
    budgets=(20,),
    seeds=(0, 1),
)


@pytest.fixture
def datasets(folder):
    """The data set "tiny", and another of its shapes."""
    tiny = open_dataset("tiny", folder)
    arrays = (tiny.x_train[::-1].copy(), tiny.y_train, tiny.x_test, tiny.y_test)
    return {"tiny": tiny, "other": Dataset("other", *arrays, tiny.classes)}


def least_memory(config, datasets, mesh, spare):
    """Bytes of a device that has room for all but the images, and `spare` bytes of these."""
    takes = load.space(*group_of(config, datasets), mesh)
    return takes.shared + takes.each + takes.at_work + spare


def group_of(config, datasets):
    opened = sweep.tasks.open_tasks(config.tasks, None, None, datasets)
    cells = {str(i): cell for i, cell in enumerate(sweep.expand(config))}
    return sweep.work.grouped(cells, config, sweep.trial.tried(config, opened))[0], opened


def check_same(found, wanted):
    """Two runs have the same rows, up to rounding."""
    assert len(found) == len(wanted) > 0
    for one, other in zip(found, wanted, strict=True):
        assert one["id"] == other["id"]
        for name in ("l1_mean", "attacker_losses", "attacker_accuracies", "attacker_fidelity"):
            np.testing.assert_allclose(one[name], other[name], rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(
    ("devices", "ways"),
    [
        (3, {}),  # where the last wave has a copy
        (2, {"cells_per_device": 3}),
        (4, {"devices_per_cell": 2}),
    ],
    ids=["alone", "several", "shared"],
)
def test_parts_go_to_the_devices_of_each_cell(datasets, tmp_path, monkeypatch, devices, ways):
    monkeypatch.setenv("MADJAX_CACHE", str(tmp_path / "cache"))
    config = replace(CONFIG, attacks=CONFIG.attacks[:1], budgets=(), seeds=(0, 1))
    quiet = {"datasets": datasets, "devices": jax.devices()[:devices], "log": lambda line: None}
    per_cell = ways.get("devices_per_cell")
    mesh = arranged(sweep.make_mesh(jax.devices()[:devices]), 1, per_cell)
    memory = least_memory(config, datasets, mesh, 2 * 16 * 36)
    sweep.programs.clear()
    found = sweep.run(config, tmp_path / "parts", **quiet, **ways, memory=memory)
    assert sweep.programs["advance_part"] >= 1
    monkeypatch.setenv("MADJAX_CACHE", "")
    check_same(found, sweep.run(config, tmp_path / "whole", **quiet, **ways))


def test_a_run_in_parts_goes_on_from_its_last_whole_epoch(datasets, tmp_path, monkeypatch):
    config = replace(CONFIG, tasks=(TASK,), attacks=CONFIG.attacks[:1], budgets=(), seeds=(0,))
    quiet = {"datasets": datasets, "devices": jax.devices()[:1], "log": lambda line: None}
    mesh = sweep.make_mesh(jax.devices()[:1])
    memory = least_memory(config, datasets, mesh, 2 * 16 * 36)
    wanted = sweep.run(config, tmp_path / "whole", **quiet, memory=memory)
    save, saved = madjax.store.save, []

    def stop(directory, name, *rest):
        save(directory, name, *rest)
        saved.append(name)
        if name.startswith("attack"):
            raise KeyboardInterrupt

    monkeypatch.setattr(madjax.store, "save", stop)
    with pytest.raises(KeyboardInterrupt):
        sweep.run(config, tmp_path / "parts", **quiet, memory=memory)
    monkeypatch.setattr(madjax.store, "save", save)
    found = sweep.run(config, tmp_path / "parts", **quiet, memory=memory, resume=True)
    assert saved[-1].startswith("attack")
    for one, other in zip(found, wanted, strict=True):
        assert one["attacker_losses"] == other["attacker_losses"]


def test_a_sweep_whose_images_have_no_room_has_the_rows_of_one_whose_have(datasets, tmp_path):
    """Victims, trained surrogates and stolen models, of two tasks, at two budgets."""
    quiet = {"datasets": datasets, "devices": jax.devices()[:2], "log": lambda line: None}
    wanted = sweep.run(CONFIG, tmp_path / "whole", **quiet)
    mesh = sweep.make_mesh(jax.devices()[:2])
    memory = least_memory(CONFIG, datasets, mesh, 2 * 16 * 36)
    plan = sweep.plan(CONFIG, tmp_path / "parts", datasets=datasets, memory=memory)
    assert plan.device_bytes <= memory
    jax.clear_caches()
    sweep.programs.clear()
    # Victims have no transfer set, so that their images have room for longer.
    found = sweep.run(CONFIG, tmp_path / "parts", **quiet, memory=memory - 600)
    assert sweep.programs["judged"] == 1
    assert sweep.programs["advance_part"] == 2  # of transfer sets of 40 images, and of 20
    assert sweep.programs["part_of_pass"] == 2  # of victims, and of surrogates
    assert not sweep.programs["advance"] + sweep.programs["_advance"]
    assert len(found) == 2 * 2 * 2 * 2 * 2
    check_same(found, wanted)


def test_cells_have_parts_of_as_many_images_as_fit_twice(datasets):
    config = replace(CONFIG, tasks=(TASK,))
    group, opened = group_of(config, datasets)
    mesh = sweep.make_mesh(jax.devices()[:1])

    def rows(spare, cells=1):
        memory = least_memory(config, datasets, mesh, spare)
        takes = load.space(group, opened, mesh)
        memory += (cells - 1) * takes.each
        return load.at_once(group, opened, mesh, cells, memory)

    images = 60 * (36 + 4)
    assert rows(images) is None
    assert rows(images - 1) == 32  # 2,399 bytes have room for 33 images, twice
    assert rows(2 * 36 * 32) == 32
    assert rows(2 * 36 * 32 - 1) == 16
    assert rows(1) == 16  # at least a batch
    assert load.at_once(group, opened, mesh, 1, None) is None


PRIVATE = Recipe(epochs=1, batch_size=16, gradient=PrivateGradient(1.0))
"""It draws any of the images at each step."""


def looks(world):
    """Sends its darkest images."""
    shade = world.images.astype(jnp.float32).mean((1, 2, 3))
    sent = jnp.argsort(shade)[: world.budget]
    answers, asked = world.ask(jnp.int32(0), sent)
    return madjax.attacks.Transfer(sent, answers, asked)


@pytest.mark.parametrize(
    "attack",
    [
        jbda(budget=30, seeds=10, substitute=replace(RECIPE, augment=None), architecture=Linear),
        madjax.attacks.Custom(budget=30, collect=looks, architecture=Linear),
        Knockoff(budget=40, architecture=Linear, recipe=PRIVATE),
    ],
    ids=["jbda", "custom", "private"],
)
def test_an_attack_that_needs_all_images_has_them_or_is_refused(datasets, tmp_path, attack):
    config = replace(CONFIG, tasks=(TASK,), attacks=(attack,), budgets=(), seeds=(0,))
    group, opened = group_of(config, datasets)
    mesh = sweep.make_mesh(jax.devices()[:1])
    takes = load.space(group, opened, mesh)
    enough = takes.images + takes.shared + takes.each
    assert load.at_once(group, opened, mesh, 1, enough) is None
    load.check_fits(group, opened, mesh, enough)
    with pytest.raises(
        InputError, match=r"images and what else all cells share take .* on a device"
    ):
        sweep.run(config, tmp_path / "out", datasets=datasets, memory=enough - 1)


class Sends(Knockoff):
    """Its transfer set has the images themselves, which have to be there."""

    def begin(self, world):
        made = super().begin(world)
        return made._replace(x=world.images[made.x].astype(jnp.float32))


class Weighs(Knockoff):
    """Its transfer set has numbers, and targets that go by the images."""

    def begin(self, world):
        made = super().begin(world)
        shade = world.images[made.x].astype(jnp.float32).mean((1, 2, 3)) / 255
        return made._replace(targets=made.targets * shade[:, None])


class Draws(Knockoff):
    """Its transfer set has images of its own making, whatever it has sent."""

    def begin(self, world):
        made = super().begin(world)
        shape = (self.budget, *world.images.shape[1:])
        return made._replace(x=255 * jax.random.uniform(world.key, shape))


@pytest.mark.parametrize("kind", [Knockoff, Sends, Weighs, Draws])
def test_a_foreseen_attack_that_looks_at_images_is_given_them(
    datasets, tmp_path, monkeypatch, kind
):
    """Where the cache looks for its stolen models too."""
    monkeypatch.setenv("MADJAX_CACHE", str(tmp_path / "cache"))
    attack = kind(budget=40, architecture=Linear, recipe=Recipe(epochs=2, batch_size=16))
    config = replace(CONFIG, tasks=(TASK,), attacks=(attack,), budgets=(), seeds=(0,))
    group, opened = group_of(config, datasets)
    assert group.drawn is not None
    assert load.sends_numbers(group, opened) == (kind is Knockoff)
    ways = {"datasets": datasets, "log": lambda line: None}
    rows = sweep.run(config, tmp_path / "first", **ways)
    sweep.programs.clear()
    again = sweep.run(config, tmp_path / "again", **ways)
    assert not sweep.programs["advance"]
    for one, other in zip(rows, again, strict=True):
        assert one["attacker_losses"] == other["attacker_losses"]
    if kind is Weighs:
        plain = replace(config, attacks=(Knockoff(**vars(attack)),))
        others = sweep.run(plain, tmp_path / "plain", **ways)
        assert others[0]["attacker_losses"][0] > 1.2 * rows[0]["attacker_losses"][0] > 0


def test_small_images_are_all_there_whatever_has_no_room(datasets):
    config = replace(CONFIG, tasks=(TASK,))
    group, opened = group_of(config, datasets)
    mesh = sweep.make_mesh(jax.devices()[:1])
    takes = load.space(group, opened, mesh)
    large = takes._replace(at_work=100 * takes.images)
    assert load._by_parts(group, opened, takes, takes.of(1, together=False) - 1)
    assert not load._by_parts(group, opened, large, large.of(1, together=False) - 1)


def test_a_transfer_set_is_made_in_place():
    """Of images at 256x256 it is half of a device's memory."""

    def grown(cell, shared):
        step, values = cell
        return values + step * shared

    mesh = sweep.make_mesh(jax.devices()[:2])
    steps, values = np.ones(4, np.float32), np.arange(4, dtype=np.float32)
    given = sweep.mesh.spread(values, mesh)
    program = sweep.over_cells(grown, mesh=mesh, in_place=True)
    found = program((steps, given), np.float32(3))
    np.testing.assert_array_equal(found, values + 3)
    assert given.is_deleted()
    given = sweep.mesh.spread(values, mesh)
    sweep.over_cells(grown, mesh=mesh)((steps, given), np.float32(3))
    assert not given.is_deleted()


def test_rounds_of_large_transfer_sets_are_not_checkpointed(datasets, tmp_path, monkeypatch):
    attack = jbda(
        budget=30, seeds=10, substitute=replace(RECIPE, augment=None), architecture=Linear
    )
    config = replace(CONFIG, tasks=(TASK,), attacks=(attack,), budgets=(), seeds=(0,))
    config = replace(config, defenses=CONFIG.defenses[:1])
    saved, save = [], store.save

    def noting(directory, name, *args):
        saved.append(name)
        save(directory, name, *args)

    monkeypatch.setattr("madjax.store.save", noting)
    rows = [sweep.run(config, tmp_path / "small", datasets=datasets)]
    of_rounds = [name for name in saved if name.endswith("-transfer")]
    assert len(of_rounds) == 1 + attack.rounds
    saved.clear()
    monkeypatch.setattr("madjax.sweep.steal.LARGEST_ROUND", 4 * 30 * (36 + 4) - 1)
    rows.append(sweep.run(config, tmp_path / "large", datasets=datasets))
    assert saved
    assert not [name for name in saved if name.endswith("-transfer")]
    check_same(*rows)


@pytest.mark.parametrize("memory", [0, -1, float("nan"), float("inf")])
def test_memory_that_is_no_number_of_bytes_is_refused(datasets, tmp_path, memory):
    with pytest.raises(InputError, match=f"memory is {memory}: give the bytes"):
        sweep.run(CONFIG, tmp_path / "out", datasets=datasets, memory=memory)
    assert not (tmp_path / "out").exists()
