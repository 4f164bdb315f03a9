"""The compiled grid is a Python loop over single cells, on any number of devices."""

from dataclasses import dataclass, replace
from functools import partial

import chex
import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from madjax import (
    DPSGD,
    MAD,
    AdaptiveKnockoff,
    Classifier,
    Defended,
    InputError,
    Knockoff,
    LeNet,
    LineSearch,
    NoDefense,
    RandomNoise,
    Recipe,
    Sweep,
    Task,
    fit,
    jbda,
    jbself,
    jbtop,
    store,
    sweep,
    top_label,
)
from madjax.attacks import Custom, Transfer, World, crop_and_flip, keys
from madjax.datasets import MNIST_FAMILY
from madjax.defenses import prediction_api
from madjax.private import PrivateGradient, accounted_epsilon
from madjax.recipe import mean_gradient
from madjax.report import read_rows
from madjax.sweep import stages
from madjax.train import train
from tests.networks import Linear

RECIPE = Recipe(epochs=2, batch_size=16, learning_rate=0.05)
BUDGET = 40


class Small(nn.Module):
    """A convolution and a dense layer: every kind of parameter the sweep meets, zeros included."""

    num_classes: int

    @nn.compact
    def __call__(self, x):
        x = nn.relu(nn.Conv(3, (3, 3), strides=2)(x))
        return nn.Dense(self.num_classes)(x.reshape(x.shape[0], -1))


class Headless(nn.Module):
    """Its logits come from a convolution: no head for layers="last"."""

    num_classes: int

    @nn.compact
    def __call__(self, x):
        return nn.Conv(self.num_classes, (3, 3))(x).mean((1, 2))


class Setting:
    """A victim, a surrogate for each of three seeds, and what the cells share."""

    def __init__(self, defense):
        self.classifier = Classifier(Small(4), MNIST_FAMILY.preprocess, (6, 6, 1))
        drawn = jax.random.split(jax.random.key(0), 5)
        self.victim = jax.jit(self.classifier.init)(drawn[0])
        self.images = jax.random.randint(drawn[1], (60, 6, 6, 1), 0, 256).astype(jnp.uint8)
        self.x_test = jax.random.randint(drawn[2], (300, 6, 6, 1), 0, 256).astype(jnp.uint8)
        self.labels_test = jax.random.randint(drawn[3], (300,), 0, 4)
        self.labels = jnp.arange(60) % 3
        self.defense = defense
        self.seeds = (0, 1, 2)
        surrogates = [self.surrogate(seed) for seed in self.seeds]
        known = jax.tree.map(lambda *leaves: jnp.stack(leaves), *surrogates)
        victim = jax.tree.map(lambda a: a[None], self.victim)
        self.own, self.api = (
            sweep.Own(self.images[None], self.labels[None]),
            sweep.Api(victim, known),
        )
        tests = self.x_test, self.labels_test, self.posterior(self.x_test)
        self.tests = sweep.Tests(*(each[None] for each in tests))
        network = self.classifier
        self.parties = sweep.Parties(network, network, MNIST_FAMILY, 4, 3)

    def surrogate(self, seed):
        return jax.jit(self.classifier.init)(keys(seed)["surrogate"])

    def posterior(self, x):
        return self.classifier.posterior(self.victim, x)

    def told(self, attack, strength, seed):
        """The answers to an attack's queries, if they are foreseen."""
        drawn = attack.foreseen(keys(seed)["draw"], 60)
        if drawn is None:
            return None
        images = np.asarray(self.images[drawn])
        query = keys(seed)["defense"], images, self.posterior(images)
        network, surrogate = self.classifier, self.surrogate(seed)
        return stages.answers(self.defense, network, surrogate, *query, (strength,))[0]

    def lesson(self, count):
        return self.own.images, self.tests, np.int32(count)

    def singly(self, attack, cells):
        """Cells one by one in a Python loop, nothing shared: {(epsilon, seed): (transfer, state)}.

        Nothing is prepared here: every query goes through the victim, the surrogate and MAD.
        """

        @jax.jit
        def collect(epsilon, seed, surrogate):
            key = keys(seed)
            respond = prediction_api(
                self.defense, self.classifier, self.victim, surrogate, key["defense"], epsilon
            )
            images = self.images, self.labels, 3, 4
            world = World(
                respond, attack.budget, *images, self.classifier, MNIST_FAMILY, key["draw"]
            )
            transfer = attack.begin(world)
            for r in range(attack.rounds):
                transfer = attack.proceed(jnp.int32(r), transfer, world)
            return transfer

        results = {}
        for epsilon, seed in cells:
            transfer = collect(epsilon, seed, self.surrogate(seed))
            data = transfer.take(self.images, jnp.arange(attack.examples(attack.budget)))
            test = self.x_test, self.labels_test
            state = fit(self.classifier, attack.recipe, keys(seed)["train"], data, test)
            results[epsilon, seed] = transfer, state
        return results


@pytest.fixture(scope="module")
def setting():
    return Setting(MAD(layers="all"))


@pytest.fixture(scope="module")
def asked():
    """A setting whose queries are cheap to trace, for attacks that none can foresee."""
    return Setting(MAD(layers="last"))


KNOCKOFF = Knockoff(budget=BUDGET, recipe=RECIPE)


@pytest.fixture(scope="module")
def singly(setting):
    return setting.singly(KNOCKOFF, GRIDS[8])


def stack(identities, devices, told=lambda strength, seed: None):
    """One wave of cells over so many devices."""
    cells = [
        sweep.Point(np.float32(e), np.uint32(s), known=np.int32(s), told=told(e, s))
        for e, s in identities
    ]
    return sweep.stack(cells, devices * -(-len(cells) // devices))


def run_grid(setting, attack, identities, devices, mapping):
    """The grid through the compiled program: [(transfer, state)] in order."""
    over = partial(sweep.over_cells, mesh=sweep.make_mesh(jax.devices()[:devices]), mapping=mapping)
    stacked = stack(identities, devices, partial(setting.told, attack))
    rule, api = (setting.defense, setting.api) if stacked.told is None else (None, None)
    settings = setting.parties, attack, rule
    size = attack.examples(attack.budget)
    transfer = over(stages.begin, *settings)(stacked, (setting.own, api))
    proceed = over(stages.proceed, *settings)
    for r in range(attack.rounds):
        transfer = proceed((stacked, transfer), (setting.own, api, np.int32(r)))
    points, settings = stacked._replace(told=None), (setting.classifier, attack.recipe, size)
    state = over(stages.start, *settings)(points, None)
    advance = over(stages.advance, *settings)
    for _ in range(attack.recipe.epochs):
        state = advance((points, transfer, state), setting.lesson(size))
    results = jax.device_get((transfer, state))
    return [jax.tree.map(lambda a, i=i: a[i], results) for i in range(len(identities))]


GRIDS = {
    1: [(0.4, 1)],
    6: [(e, s) for s in (0, 1) for e in (0.0, 0.4, 1.2)],
    8: [(e, s) for s in (0, 1, 2) for e in (0.0, 0.4, 1.2)][:8],
}


@pytest.mark.parametrize(
    ("count", "devices", "mapping"),
    [
        (1, 4, sweep.map_cells),
        (6, 4, sweep.map_cells),
        (6, 4, sweep.vmap_cells),
        (8, 4, sweep.map_cells),
    ],
)
def test_grid_is_a_loop_over_cells(setting, singly, count, devices, mapping):
    results = run_grid(setting, KNOCKOFF, GRIDS[count], devices, mapping)
    for cell, (transfer, state) in zip(GRIDS[count], results, strict=True):
        want, trained = singly[cell]
        np.testing.assert_array_equal(transfer.x, want.x)
        np.testing.assert_allclose(transfer.targets, want.targets, atol=1e-5)
        chex.assert_trees_all_close(state.params, trained.params, atol=2e-5)
        np.testing.assert_allclose(state.accuracy, trained.accuracy, atol=0.34)
        assert int(state.epoch) == RECIPE.epochs


SUBSTITUTE = Recipe(epochs=1, batch_size=16, learning_rate=0.05)
SMALL = {"budget": 30, "recipe": RECIPE, "substitute": SUBSTITUTE, "seeds": 10}
ATTACKS = {
    "jbda": jbda(**SMALL),
    "jbself as published code": jbself(as_published_code=True, **SMALL),
    "jbtop2 with a reservoir": jbtop(2, kappa=5, sigma=0, targets=top_label, **SMALL),
    "knockoff, repeated and augmented": Knockoff(
        budget=40, recipe=RECIPE, repeats=2, augment=partial(crop_and_flip, pad=2)
    ),
    "adaptive": AdaptiveKnockoff(
        budget=40, recipe=RECIPE, online=Recipe(epochs=1, batch_size=16, decay_epochs=0)
    ),
}


@pytest.mark.slow  # test_pipeline has some of them at every run
@pytest.mark.parametrize(
    ("name", "mapping"),
    [
        ("jbda", sweep.map_cells),
        ("knockoff, repeated and augmented", sweep.map_cells),
        ("adaptive", sweep.map_cells),
        ("jbda", sweep.vmap_cells),
        ("jbself as published code", sweep.vmap_cells),
        ("jbtop2 with a reservoir", sweep.vmap_cells),
    ],
)
def test_the_grid_of_every_attack_is_a_loop_over_cells(asked, name, mapping):
    attack, cells = ATTACKS[name], [(0.0, 0), (0.9, 0), (0.9, 1)]
    singly = asked.singly(attack, cells)
    results = run_grid(asked, attack, cells, 2, mapping)
    for cell, (transfer, state) in zip(cells, results, strict=True):
        want, trained = singly[cell]
        assert int(transfer.asked) == attack.budget
        np.testing.assert_allclose(transfer.x, want.x, atol=2e-2)
        np.testing.assert_allclose(transfer.targets, want.targets, atol=1e-4)
        chex.assert_trees_all_close(state.params, trained.params, atol=1e-4)
        np.testing.assert_allclose(state.accuracy, trained.accuracy, atol=0.34)


@pytest.mark.parametrize(
    ("attack", "mapping"),
    [(ATTACKS["jbda"], sweep.vmap_cells), (KNOCKOFF, sweep.map_cells)],
    ids=["asking, vmap", "prepared, map"],
)
def test_no_device_talks_to_another(asked, attack, mapping):
    mesh = sweep.make_mesh()
    assert mesh.size == 4
    stacked = stack([(0.4, seed) for seed in (0, 1, 2)], 4, partial(asked.told, attack))
    assert (stacked.told is None) == (attack is not KNOCKOFF)
    points = stacked._replace(told=None)
    asking = asked.parties, attack, asked.defense
    learning = asked.classifier, attack.recipe, attack.examples(attack.budget)
    known = asked.own, asked.api
    over = partial(sweep.over_cells, mesh=mesh, mapping=mapping)
    like = jax.eval_shape(over(stages.begin, *asking), stacked, known)
    learner = jax.eval_shape(over(stages.start, *learning), points, None)
    for function, mine, common in (
        (over(stages.begin, *asking), stacked, known),
        (over(stages.proceed, *asking), (stacked, like), (*known, np.int32(0))),
        (over(stages.advance, *learning), (points, like, learner), asked.lesson(20)),
        (over(stages.fidelity, asked.classifier), (points, learner), asked.tests),
    ):
        text = function.lower(mine, common).compile().as_text()
        assert "HloModule" in text
        for word in ("all-reduce", "all-gather", "all-to-all", "collective", "reduce-scatter"):
            assert word not in text


@pytest.mark.smoke
def test_a_wave_that_devices_do_not_divide_is_filled_up():
    cells = [sweep.Point(np.float32(i), np.uint32(i)) for i in range(3)]
    stacked = sweep.stack(cells, 4)
    assert stacked.strength.tolist() == stacked.seed.tolist() == [0, 1, 2, 2]
    assert stacked.told is None


def write_data(folder, images=(60, 30), shape=(6, 6), classes=4, seed=0, name="tiny"):
    rng = np.random.default_rng(seed)
    train, test = images
    np.savez(
        folder / f"{name}.npz",
        x_train=rng.integers(0, 256, (train, *shape), dtype=np.uint8),
        y_train=np.arange(train) % classes,
        x_test=rng.integers(0, 256, (test, *shape), dtype=np.uint8),
        y_test=np.arange(test) % classes,
    )
    return folder


TASK = Task("tiny", "tiny", architecture=Linear, victim=Recipe(epochs=2, batch_size=16))
CONFIG = Sweep(
    name="tiny",
    tasks=(TASK,),
    defenses=(Defended(MAD(), (0.0, 0.99)),),
    seeds=(0, 1, 2),
    attacks=(Knockoff(budget=BUDGET, architecture=Linear, recipe=Recipe(epochs=3, batch_size=16)),),
)


def results_of(rows):
    timing = ("seconds", "seconds_collecting", "seconds_compiling", "git_commit")
    return sorted(
        ({k: v for k, v in row.items() if k not in timing} for row in rows),
        key=lambda row: (row["strength"], row["seed"]),
    )


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    data = write_data(tmp_path_factory.mktemp("data"))
    out = tmp_path_factory.mktemp("runs") / "whole"
    return data, out, sweep.run(CONFIG, out, data_dir=data, log=lambda line: None)


def test_one_program_of_each_stage_serves_three_attacks_at_two_budgets(tmp_path):
    """Of attacks with equal training, against two strengths of a defence."""
    data = write_data(tmp_path)
    knockoff = CONFIG.attacks[0]
    attacks = (
        knockoff,
        replace(knockoff, variant="argmax", targets=top_label),
        Knockoff(
            variant="nquery", repeats=2, budget=80, architecture=Linear, recipe=knockoff.recipe
        ),
    )
    defenses = (Defended(MAD(layers="last"), (0.1, 0.99)),)
    grid = replace(CONFIG, attacks=attacks, budgets=(20,), defenses=defenses, seeds=(0,))
    jax.clear_caches()
    sweep.programs.clear()
    rows = sweep.run(grid, tmp_path / "out", data_dir=data, log=lambda line: None)
    assert len(rows) == 3 * 2 * 2
    made = {name: sweep.programs[name] for name in ("start", "advance", "fidelity", "begin")}
    # The victim's training has a start too.
    assert made == {"start": 2, "advance": 1, "fidelity": 1, "begin": 3}
    assert sweep.programs["at_strengths"] == 3  # to the test set, to 40 queries, and to 80


def test_a_hundred_cells_compile_as_often_as_two(tmp_path, monkeypatch):
    data, found = write_data(tmp_path), []
    recipe, each = Recipe(epochs=1, batch_size=16), {"budget": 20, "architecture": Linear}
    attacks = (
        Knockoff(recipe=recipe, **each),
        jbda(seeds=10, substitute=recipe, recipe=recipe, **each),
    )
    few = replace(
        CONFIG,
        attacks=attacks,
        defenses=(Defended(MAD(layers="last"), (0.5,)),),
        budgets=(20,),
        seeds=(0,),
    )
    strengths = Defended(MAD(layers="last"), (0.0, 0.2, 0.5, 0.9, 1.2))
    many = replace(few, defenses=(strengths,), budgets=(10, 20), seeds=(0, 1, 2, 3, 4))
    for grid, cells in ((few, 2), (many, 100)):
        jax.clear_caches()
        sweep.programs.clear()
        rows = sweep.run(grid, tmp_path / str(cells), data_dir=data, log=None)
        assert len(rows) == cells
        found.append(dict(sweep.programs))
    two, hundred = found
    assert {"start", "advance", "fidelity", "begin", "proceed", "at_strengths", "_random"} <= {*two}
    # Surrogates of several seeds are put side by side.
    assert [n for n, count in hundred.items() if count > two.get(n, 0)] in ([], ["stack"])


@pytest.mark.smoke
def test_rows_are_written_as_returned(finished):
    _, out, rows = finished
    assert read_rows(out) == rows
    assert len(rows) == 6
    assert {(row["epsilon"], row["seed"]) for row in rows} == {
        (e, s) for e in (0.0, 0.99) for s in (0, 1, 2)
    }
    for row in rows:
        assert row["attacker_accuracy_best"] == max(row["attacker_accuracies"])
        assert row["attacker_accuracy"] == row["attacker_accuracies"][-1]
        assert row["dataset"] == "tiny"
        if row["epsilon"] == 0:
            assert row["defender_accuracy"] == row["victim_accuracy"]
            assert row["l1_max"] == 0


def interrupt_after(monkeypatch, name, calls):
    """Let a function of `store` work so many times, and then stop the run as Ctrl-C does."""
    function, count = getattr(store, name), 0

    def call_then_stop(*args):
        nonlocal count
        function(*args)
        count += 1
        if count == calls:
            raise KeyboardInterrupt

    monkeypatch.setattr(store, name, call_then_stop)


def stopped_run(out, data, monkeypatch, name, calls):
    """A run interrupted after so many calls of a function of `store`."""
    with monkeypatch.context() as patch:
        interrupt_after(patch, name, calls)
        with pytest.raises(KeyboardInterrupt):
            sweep.run(CONFIG, out, data_dir=data, log=lambda line: None)


@pytest.mark.parametrize("saves", [3, 6])
def test_resume_after_an_interrupt_gives_the_same_rows(finished, tmp_path, monkeypatch, saves):
    """Stop after so many checkpoints: in the first wave, in the second."""
    data, _, want = finished
    stopped_run(tmp_path / "out", data, monkeypatch, "save", saves)
    rows = sweep.run(CONFIG, tmp_path / "out", data_dir=data, resume=True, log=lambda line: None)
    assert results_of(rows) == results_of(want)
    assert results_of(read_rows(tmp_path / "out")) == results_of(want)


def test_resume_on_other_devices_finishes_the_run(finished, tmp_path, monkeypatch):
    """Stopped in a wave of four cells, gone on in waves of three."""
    data, _, want = finished
    stopped_run(tmp_path / "out", data, monkeypatch, "save", 4)
    three = {"devices": jax.devices()[:3], "resume": True}
    rows = sweep.run(CONFIG, tmp_path / "out", data_dir=data, log=lambda line: None, **three)
    for row, same in zip(results_of(rows), results_of(want), strict=True):
        assert row["device"] != same["device"]
        np.testing.assert_allclose(row["attacker_accuracies"], same["attacker_accuracies"])


def test_a_stop_between_two_waves_doubles_none(finished, tmp_path, monkeypatch):
    data, _, want = finished
    stopped_run(tmp_path / "out", data, monkeypatch, "append_rows", 1)
    assert len(read_rows(tmp_path / "out")) == 4
    sweep.run(CONFIG, tmp_path / "out", data_dir=data, resume=True, log=lambda line: None)
    assert results_of(read_rows(tmp_path / "out")) == results_of(want)


def test_attacks_and_budgets_share_a_run_and_resume_in_the_middle(tmp_path, monkeypatch):
    """Stop in a round of queries, and in the training at the second budget."""
    data = write_data(tmp_path)
    recipe = Recipe(epochs=2, batch_size=16)
    small = {"budget": 30, "architecture": Linear, "recipe": recipe}
    attacks = (
        jbda(seeds=10, substitute=replace(SUBSTITUTE, batch_size=8), **small),
        Knockoff(variant="argmax", targets=top_label, repeats=2, **small),
    )
    half = (Defended(MAD(), (0.5,)),)
    chosen = replace(CONFIG, defenses=half, seeds=(0,), attacks=attacks, budgets=(20,))
    for resume, saves in ((False, 4), (True, 4)):
        with monkeypatch.context() as patch:
            interrupt_after(patch, "save", saves)
            with pytest.raises(KeyboardInterrupt):
                sweep.run(
                    chosen, tmp_path / "out", data_dir=data, resume=resume, log=lambda line: None
                )
    assert [row["budget"] for row in read_rows(tmp_path / "out")] == [20]
    sweep.run(chosen, tmp_path / "out", data_dir=data, resume=True, log=lambda line: None)
    rows = read_rows(tmp_path / "out")
    want = sweep.run(chosen, tmp_path / "whole", data_dir=data, log=lambda line: None)
    untimed = dict.fromkeys(("seconds", "seconds_collecting", "seconds_compiling"), 0)
    assert [row | untimed for row in rows] == [row | untimed for row in want]
    assert [(r["attack"], r["variant"], r["budget"], r["examples"]) for r in rows] == [
        ("jbda", "", 20, 20),
        ("jbda", "", 30, 30),
        ("knockoff", "argmax", 20, 10),
        ("knockoff", "argmax", 30, 15),
    ]
    assert [row["queries"] for row in rows] == [20, 30, 20, 30]
    assert not list((tmp_path / "out" / "checkpoints").glob("attack-*"))


@pytest.mark.slow  # what the rounds of a bandit are is tested without a sweep
def test_an_attack_that_remembers_goes_on_in_the_middle(tmp_path, monkeypatch):
    """Stop between two rounds of a bandit, whose preferences and network are in the checkpoint."""
    data = write_data(tmp_path)
    monkeypatch.setattr("madjax.attacks.adaptive.STEPS", 1)
    online, recipe = Recipe(epochs=1, batch_size=16, decay_epochs=0), CONFIG.attacks[0].recipe
    attack = AdaptiveKnockoff(budget=48, online=online, architecture=Linear, recipe=recipe)
    chosen = replace(CONFIG, defenses=(Defended(NoDefense()),), seeds=(0,), attacks=(attack,))
    with monkeypatch.context() as patch:
        interrupt_after(patch, "save", 2 + 3)  # two of the victim's, none asked, and two rounds
        with pytest.raises(KeyboardInterrupt):
            sweep.run(chosen, tmp_path / "out", data_dir=data, log=lambda line: None)
    rows, lines = logged(chosen, tmp_path / "out", data, resume=True)
    assert [line.partition(": round ")[2][:6] for line in lines if "round" in line] == ["3 of 3"]
    want, _ = logged(chosen, tmp_path / "whole", data)
    assert results_of(rows) == results_of(want)
    assert rows[0]["queries"] == 48


MIXED = replace(
    CONFIG,
    seeds=(0, 1),
    defenses=(
        Defended(NoDefense()),
        Defended(MAD(), (0.4, 0.99)),
        Defended(RandomNoise(), (5.0,)),
        Defended(MAD(surrogate_epochs=2), (0.99,)),
        Defended(DPSGD(recipe=Recipe(epochs=2, batch_size=20, decay_epochs=0)), (0.5, 2.0)),
    ),
)


def who(row):
    return row["defense"], row["defense_variant"], row["strength"], row["seed"]


@pytest.fixture(scope="module")
def mixed(tmp_path_factory):
    data = write_data(tmp_path_factory.mktemp("data"))
    out = tmp_path_factory.mktemp("runs") / "mixed"
    return data, sweep.run(MIXED, out, data_dir=data, log=lambda line: None)


def test_a_sweep_of_several_defences_is_several_sweeps(mixed, tmp_path):
    data, rows = mixed
    assert [who(row)[:3] for row in rows if row["seed"] == 1] == [
        ("none", "", 0.0),
        ("mad", "", 0.4),
        ("mad", "", 0.99),
        ("random_noise", "uniform, l1 ball", 5.0),
        ("mad", "surrogate of 2 epochs", 0.99),
        ("dp_sgd", "clip 1", 0.5),
        ("dp_sgd", "clip 1", 2.0),
    ]
    assert len(rows) == 14
    alone = replace(MIXED, defenses=(Defended(MAD(), (0.0, 0.4, 0.99)),))
    alone = sweep.run(alone, tmp_path / "out", data_dir=data, log=lambda line: None)
    found = {who(row): row for row in rows}
    for row in alone:
        name = "mad" if row["strength"] else "none"
        same = found[name, "", row["strength"], row["seed"]]
        for field in ("defender_accuracy", "l1_mean", "entropy_mean", "attacker_accuracies"):
            np.testing.assert_allclose(same[field], row[field], atol=1e-4)


def test_rows_of_dp_sgd_have_the_privacy_they_cost(mixed):
    _, rows = mixed
    private = {row["strength"]: row for row in rows if row["defense"] == "dp_sgd"}
    want = accounted_epsilon(0.5, num_examples=60, batch_size=20, epochs=2, delta=1 / 60)
    np.testing.assert_allclose(private[0.5]["dp_epsilon"], want)
    assert private[2.0]["dp_epsilon"] < private[0.5]["dp_epsilon"]
    assert all(("dp_epsilon" in row) == (row["defense"] == "dp_sgd") for row in rows)
    for row in private.values():  # the answers are another victim's, the distance to the first one
        assert row["l1_mean"] > 0
        assert row["defender_accuracy"] != row["victim_accuracy"] or row["fidelity"] < 100


def test_what_defences_prepare_survives_a_stop(tmp_path, monkeypatch):
    """Stop in a surrogate's training, and in that of the second private victim."""
    data = write_data(tmp_path)
    chosen = replace(MIXED, seeds=(0,), defenses=MIXED.defenses[3:])
    kept = {}
    # 2 checkpoints of the victim, 1 or 2 of the surrogate, 4 of its wave, 3 of private victims.
    for saves, resume in ((3, False), (1 + 4 + 3, True)):
        with monkeypatch.context() as patch:
            interrupt_after(patch, "save", saves)
            with pytest.raises(KeyboardInterrupt):
                sweep.run(
                    chosen, tmp_path / "out", data_dir=data, resume=resume, log=lambda line: None
                )
        folders = (tmp_path / "out" / "checkpoints").iterdir()
        kept[saves] = {path.name.rpartition("-")[0]: path for path in folders}
    assert set(kept[3]) == {"victim", "surrogate"}
    assert {"victim", "surrogate", *(f"dp_sgd-{n}" for n in (0.5, 2))} == set(kept[8])
    rows = sweep.run(chosen, tmp_path / "out", data_dir=data, resume=True, log=lambda line: None)
    want = sweep.run(chosen, tmp_path / "whole", data_dir=data, log=lambda line: None)
    assert list(map(who, rows)) == list(map(who, want))
    for row, same in zip(rows, want, strict=True):
        np.testing.assert_array_equal(row["attacker_accuracies"], same["attacker_accuracies"])
        assert row["defender_accuracy"] == same["defender_accuracy"]


def test_the_victim_is_exported_behind_any_of_its_defences(tmp_path):
    data = write_data(tmp_path)
    private = Defended(MIXED.defenses[4].rule, (0.5,))
    other = replace(TASK, victim_seed=1)
    chosen = replace(MIXED, tasks=(TASK, other), defenses=(Defended(MAD(), (0.99,)), private))
    chosen = replace(chosen, seeds=(0,), attacks=(replace(CONFIG.attacks[0], budget=20),))
    out = tmp_path / "out"
    with pytest.raises(InputError, match="holds no run"):
        sweep.defended(chosen, out, strength=0.5, task="0", defense="0", data_dir=data)
    sweep.run(chosen, out, data_dir=data, log=lambda line: None)
    with pytest.raises(InputError, match="2 tasks, 2 of them meant: choose one by its label"):
        sweep.defended(chosen, out, strength=0.5, data_dir=data)
    with pytest.raises(InputError, match="2 defences, 2 of them meant: choose one by its label"):
        sweep.defended(chosen, out, strength=0.5, task="0", data_dir=data)
    where = {"task": other.label, "defense": "dp_sgd, clip 1", "data_dir": data}
    with pytest.raises(InputError, match=r"no dp_sgd-0\.4 trained for 2 epochs"):
        sweep.defended(chosen, out, strength=0.4, **where)
    with pytest.raises(InputError, match="strength is 0: that of dp_sgd is a noise multiplier"):
        sweep.defended(chosen, out, strength=0.0, **where)
    x = np.load(data / "tiny.npz")["x_test"][..., None]
    _, predict = sweep.defended(chosen, out, strength=0.5, **where)
    victims = [
        sweep.defended(chosen, out, strength=0.0, task=task, defense="0", data_dir=data)[1](x)
        for task in ("0", "1")
    ]
    assert all(np.abs(predict(x) - y).max() > 1e-3 for y in victims)
    assert np.abs(victims[0] - victims[1]).max() > 1e-3


def test_an_exported_random_defence_cannot_be_averaged_out(finished):
    """Its noise belongs to the image: not to the place in a batch, nor to the call."""
    data, out, _ = finished
    noisy = replace(CONFIG, defenses=(Defended(RandomNoise()),))
    x = np.load(data / "tiny.npz")["x_test"][..., None]
    _, predict = sweep.defended(noisy, out, strength=20.0, data_dir=data)
    _, plain = sweep.defended(noisy, out, strength=0.0, data_dir=data)
    many = predict(np.repeat(x[:1], 400, axis=0))
    assert np.all(many == many[:1])
    whole = predict(x)
    np.testing.assert_allclose(whole[::-1], predict(x[::-1]), atol=1e-6)
    noise = whole - plain(x)
    assert np.abs(noise).sum(-1).min() > 0.1
    assert len(np.unique(np.round(noise, 4), axis=0)) == len(x)
    fresh = replace(CONFIG, defenses=(Defended(RandomNoise(fresh=True)),))
    with pytest.raises(InputError, match="draws new noise for each query"):
        sweep.defended(fresh, out, strength=20.0, data_dir=data)
    _, other = sweep.defended(noisy, out, strength=20.0, seed=1, data_dir=data)
    assert np.abs(other(x) - whole).sum(-1).min() > 1e-3


def test_a_smaller_budget_trains_anew_on_the_first_examples(asked):
    attack, cell = ATTACKS["jbda"], (0.9, 1)
    transfer, _ = asked.singly(attack, [cell])[cell]
    points = stack([cell], 1)
    learning = asked.classifier, RECIPE, attack.budget
    over = partial(sweep.over_cells, mesh=sweep.make_mesh(jax.devices()[:1]))
    advance = over(stages.advance, *learning)
    state = over(stages.start, *learning)(points, None)
    transfers = jax.tree.map(lambda a: a[None], transfer)
    for _ in range(RECIPE.epochs):
        state = advance((points, transfers, state), asked.lesson(20))
    key, first = keys(cell[1])["train"], transfer._replace(targets=transfer.targets.at[20:].set(0))
    take = partial(first.take, asked.images)
    want = train(asked.classifier, RECIPE, key, take, attack.budget, jnp.int32(20))
    got = jax.tree.map(lambda a: a[0], state)
    chex.assert_trees_all_close(got.params, want, atol=1e-5)
    y = asked.posterior(asked.x_test).argmax(-1)
    agree = asked.classifier.apply(want, asked.x_test).argmax(-1) == y
    found = over(stages.fidelity, asked.classifier)((points, state), asked.tests)
    np.testing.assert_allclose(found, [100 * agree.mean()], atol=0.34)
    assert 0 < agree.mean() < 1


def logged(chosen, out, data, **options):
    """The rows of a run, and what it logged."""
    lines = []
    return sweep.run(chosen, out, data_dir=data, log=lines.append, **options), lines


def test_a_grid_grows_by_its_new_cells_alone(finished, tmp_path):
    """More strengths, seeds, budgets and attacks: old rows stay, and no victim is trained."""
    data, _, want = finished
    whole = replace(CONFIG, attacks=(*CONFIG.attacks, replace(CONFIG.attacks[0], variant="b")))
    whole = replace(whole, budgets=(20,))
    small = replace(CONFIG, defenses=(Defended(MAD(), (0.99,)),), seeds=(0, 2))
    out = tmp_path / "out"
    first, lines = logged(small, out, data)
    assert len(first) == 2
    assert any("victim:" in line for line in lines)
    text = (out / "rows.jsonl").read_text()
    rows, lines = logged(whole, out, data, resume=True)
    assert (out / "rows.jsonl").read_text().startswith(text)
    assert not any("victim:" in line for line in lines)
    assert len([line for line in lines if "defender" in line]) == len(rows) - 2
    assert len({row["id"] for row in rows}) == len(rows) == 2 * 3 * 2 * 2
    mine = [row for row in rows if row["variant"] == "" and row["budget"] == BUDGET]
    for row, same in zip(results_of(mine), results_of(want), strict=True):
        assert row["id"] == same["id"]
        np.testing.assert_allclose(row["attacker_accuracies"], same["attacker_accuracies"])
    with pytest.raises(InputError, match="tasks, defences, strengths, attacks, budgets and seeds"):
        logged(small, out, data, resume=True)


def test_a_sweep_of_several_tasks_is_several_sweeps(tmp_path):
    """Other images, another victim of the same images, and other shapes, in one run."""
    data = write_data(tmp_path)
    write_data(tmp_path, shape=(5, 5), name="small")
    write_data(tmp_path, seed=1, name="other")
    tasks = (
        TASK,
        replace(TASK, victim_seed=3),
        replace(TASK, queryset="other", query_splits=("train", "test")),
        replace(TASK, dataset="small", queryset="small"),
    )
    few = replace(CONFIG, seeds=(1,), tasks=tasks)
    rows, lines = logged(few, tmp_path / "out", data)
    # The third task has the victim of the first.
    assert sum("victim:" in line for line in lines) == 3
    assert [row["victim_seed"] for row in rows] == [0, 0, 3, 3, 0, 0, 0, 0]
    assert rows[4]["query_splits"] == ["train", "test"]
    for i, task in enumerate(tasks):
        alone = sweep.run(
            replace(few, tasks=(task,)), tmp_path / str(i), data_dir=data, log=lambda line: None
        )
        for row, same in zip(rows[2 * i : 2 * i + 2], alone, strict=True):
            assert row["id"] == same["id"]
            assert row["attacker_accuracies"] == same["attacker_accuracies"]
            assert row["defender_accuracy"] == same["defender_accuracy"]
    assert rows[0]["attacker_losses"] != rows[2]["attacker_losses"] != rows[4]["attacker_losses"]


ALIKE = (
    TASK,
    replace(TASK, dataset="other", victim_seed=3),
    replace(TASK, dataset="other", queryset="third"),
)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("mapping", "attack"),
    [
        (sweep.map_cells, CONFIG.attacks[0]),
        (sweep.vmap_cells, CONFIG.attacks[0]),
        (sweep.vmap_cells, replace(CONFIG.attacks[0], augment=partial(crop_and_flip, pad=2))),
    ],
    ids=["map", "vmap", "asking"],
)
def test_tasks_of_equal_shapes_are_one_axis_of_one_program(tmp_path, monkeypatch, mapping, attack):
    """Their cells share waves; each reads its own victim, images and test set."""
    data = write_data(tmp_path)
    for seed, name in ((1, "other"), (2, "third")):
        write_data(tmp_path, seed=seed, name=name)
    monkeypatch.setattr("madjax.sweep.mesh.default_mapping", lambda networks: mapping)
    known = Defended(MAD(surrogate_epochs=1), (0.0, 0.99))  # from the victim's own data
    grid = replace(CONFIG, tasks=ALIKE, defenses=(known,), attacks=(attack,), seeds=(0, 1))
    waves, written = [], store.append_rows

    def append_rows(directory, rows):
        waves.append(len(rows))
        written(directory, rows)

    monkeypatch.setattr(store, "append_rows", append_rows)
    jax.clear_caches()
    sweep.programs.clear()
    rows = sweep.run(
        grid, tmp_path / "out", data_dir=data, cells_per_device=2, log=lambda line: None
    )
    assert waves == [8, 4]
    made = {name: sweep.programs[name] for name in ("advance", "fidelity", "begin")}
    assert made == {"advance": 1, "fidelity": 1, "begin": 1}
    for i, task in enumerate(ALIKE):
        out = tmp_path / str(i)
        alone = sweep.run(replace(grid, tasks=(task,)), out, data_dir=data, log=lambda line: None)
        for row, same in zip(rows[4 * i : 4 * i + 4], alone, strict=True):
            assert row["id"] == same["id"]
            np.testing.assert_allclose(row["attacker_losses"], same["attacker_losses"], rtol=1e-4)
            for name in ("attacker_accuracy", "attacker_fidelity", "defender_accuracy"):
                np.testing.assert_allclose(row[name], same[name], atol=3.4)  # one image of 30
    losses = [row["attacker_losses"][-1] for row in rows]
    assert len(np.unique(np.round(losses, 4))) == 12


@pytest.mark.slow
def test_equal_queries_are_answered_once(tmp_path, monkeypatch):
    """By attacks that draw the same images, and at more budgets and targets."""
    data, calls, answers = write_data(tmp_path), [], stages.answers

    def counting(rule, network, known, key, images, *rest, **options):
        calls.append((rule.name, len(images)))
        return answers(rule, network, known, key, images, *rest, **options)

    monkeypatch.setattr(stages, "answers", counting)
    knockoff = CONFIG.attacks[0]
    attacks = (
        knockoff,
        replace(knockoff, variant="argmax", targets=top_label),
        replace(knockoff, variant="slow", recipe=RECIPE),
        replace(knockoff, variant="nquery", repeats=2),
    )
    defenses = (Defended(MAD(), (0.5, 0.99)), Defended(RandomNoise(), (1.0,)))
    grid = replace(CONFIG, attacks=attacks, defenses=defenses, budgets=(10,), seeds=(0,))
    sweep.run(grid, tmp_path / "out", data_dir=data, log=lambda line: None)
    each = [30, 40, 20]  # the test set, the queries, and half as many that are sent twice
    assert calls == [(name, n) for name in ("mad", "random_noise") for n in each]


def test_resume_refuses_other_data_of_the_same_name(finished, tmp_path):
    _, out, _ = finished
    other = write_data(tmp_path, images=(60, 31))
    with pytest.raises(InputError, match=r"data\.0\.dataset"):
        sweep.run(CONFIG, out, data_dir=other, resume=True)


def test_resume_of_a_finished_run_does_nothing(finished):
    data, out, rows = finished
    before = (out / "rows.jsonl").read_bytes()
    again = sweep.run(CONFIG, out, data_dir=data, resume=True, log=lambda line: None)
    assert again == rows
    assert (out / "rows.jsonl").read_bytes() == before


def test_adding_cells_changes_no_other(finished, tmp_path):
    data, _, want = finished
    fewer = replace(CONFIG, defenses=(Defended(MAD(), (0.99,)),), seeds=(2,))
    (row,) = sweep.run(fewer, tmp_path / "out", data_dir=data, log=lambda line: None)
    (same,) = [r for r in want if (r["strength"], r["seed"]) == (0.99, 2)]
    for name in ("attacker_accuracies", "defender_accuracy", "l1_mean"):
        np.testing.assert_allclose(row[name], same[name], atol=1e-3)


def broken_oracle(y, gram):
    return y + jnp.ones(99)


def too_few(world):
    x = jnp.arange(3)
    return Transfer(x, *world.ask(jnp.int32(0), world.images[x]))


class Broken(Knockoff):
    """An attack whose queries could be foreseen, if they were not in error."""

    def begin(self, world):
        raise KeyError("nothing")


class Normed(nn.Module):
    """A linear classifier that mixes the examples of a batch."""

    num_classes: int

    @nn.compact
    def __call__(self, x, train=False):
        x = nn.BatchNorm(use_running_average=not train)(x)
        return nn.Dense(self.num_classes)(x.reshape(x.shape[0], -1))


@dataclass(frozen=True)
class Told(NoDefense):
    """A rule that puts an array into rows."""

    def facts(self, strength, recipe, num_examples):
        return {"weights": np.ones(num_examples)}


PRIVATE = Recipe(epochs=1, batch_size=30, gradient=PrivateGradient(1.0))


def test_attackers_may_learn_by_private_gradients(tmp_path):
    """At each budget, with cells one after another and side by side."""
    data = write_data(tmp_path)
    attack = replace(CONFIG.attacks[0], budget=40, recipe=replace(PRIVATE, epochs=2))
    chosen = replace(CONFIG, attacks=(attack,), budgets=(30,), seeds=(0, 1, 2))
    found = []
    for devices in (1, 3):
        options = {"devices": jax.devices()[:devices], "cells_per_device": 3 // devices}
        out = tmp_path / str(devices)
        found.append(sweep.run(chosen, out, data_dir=data, log=lambda line: None, **options))
    for row, same in zip(*found, strict=True):
        assert row["gradient"] == "PrivateGradient"
        np.testing.assert_allclose(row["attacker_losses"], same["attacker_losses"], rtol=1e-4)
    losses = {tuple(row["attacker_losses"]) for row in found[0]}
    assert len(losses) == len(found[0]), "every strength, seed and budget is a training of its own"


@dataclass(frozen=True)
class Nameless(NoDefense):
    """A rule that trains by a function which nothing tells from another."""

    def prepare(self, owner, key, strengths=()):
        recipe = replace(owner.recipe, gradient=lambda *lesson: mean_gradient(*lesson))
        return owner.train("other", recipe, key)


def test_what_cannot_work_fails_before_the_victim_is_trained(tmp_path):
    data = write_data(tmp_path)

    last = (Defended(MAD(layers="last")),)
    for change, words in (
        (
            {"defenses": (Defended(MAD(solver=LineSearch(broken_oracle))),)},
            "the defence MAD.*fails on these data",
        ),
        (
            {"tasks": (replace(TASK, architecture=Headless),), "defenses": last},
            "layers='last' needs",
        ),
        ({"tasks": (replace(TASK, query_splits=("train", "test")),)}, "30 of the 30 test images"),
        ({"attacks": (Custom(collect=too_few, architecture=Linear),)}, "makes targets of shape"),
        ({"attacks": (Custom(architecture=Linear),)}, "the attack custom fails on these data"),
        ({"attacks": (Broken(budget=9, architecture=Linear),)}, "the attack knockoff fails on"),
        (
            {"defenses": (Defended(DPSGD(recipe=Recipe(batch_size=61)), (1.0,)),)},
            "batch_size is 61: DP-SGD draws that many of 60",
        ),
        (
            {"tasks": (replace(TASK, victim=replace(PRIVATE, batch_size=61)),)},
            "batch_size is 61: DP-SGD draws that many of 60",
        ),
        (
            {"attacks": (replace(CONFIG.attacks[0], budget=40, recipe=PRIVATE),), "budgets": (20,)},
            "batch_size is 30: DP-SGD draws that many of 20",
        ),
        (
            {
                "tasks": (replace(TASK, architecture=Normed),),
                "defenses": (Defended(DPSGD(recipe=Recipe(batch_size=9)), (1.0,)),),
            },
            "DP-SGD cannot train Normed",
        ),
        ({"defenses": (Defended(Told(), (1.0,)),)}, "Told.* fails .*not JSON serializable"),
        ({"defenses": (Defended(Nameless(), (1.0,)),)}, "has no import path"),
    ):
        with pytest.raises(InputError, match=words):
            sweep.run(replace(CONFIG, **change), tmp_path / "out", data_dir=data)
        assert not (tmp_path / "out").exists()


def test_numbers_of_numpy_and_infinite_ones_make_rows(tmp_path):
    """As of a budget from np.logspace, and of privacy that is none."""
    data = write_data(tmp_path)
    recipe = Recipe(epochs=np.int64(1), batch_size=16, learning_rate=np.float32(0.25))
    attack = replace(CONFIG.attacks[0], recipe=recipe)
    noise = Defended(DPSGD(recipe=Recipe(epochs=1, batch_size=16)), (1e-4,))
    budgets = tuple(np.array([10, 20]))
    config = replace(CONFIG, attacks=(attack,), budgets=budgets, defenses=(noise,), seeds=(0,))
    rows = sweep.run(config, tmp_path / "out", data_dir=data)
    assert rows == read_rows(tmp_path / "out")
    assert {row["budget"] for row in rows} >= {10, 20}
    assert {(row["learning_rate"], row["dp_epsilon"]) for row in rows} == {(0.25, None)}


def test_an_architecture_that_does_not_fit_is_named(tmp_path):
    data = write_data(tmp_path)
    tasks = (replace(TASK, architecture=LeNet),)
    with pytest.raises(InputError, match="victim's LeNet cannot take images of shape"):
        sweep.run(replace(CONFIG, tasks=tasks), tmp_path / "out", data_dir=data)

    def wrong(classes):
        return Linear(classes + 1)

    attack = replace(CONFIG.attacks[0], architecture=wrong)
    with pytest.raises(InputError, match="attacker's wrong gives outputs"):
        sweep.run(replace(CONFIG, attacks=(attack,)), tmp_path / "out", data_dir=data)
    assert not (tmp_path / "out").exists()
