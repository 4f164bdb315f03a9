"""The compiled grid is a Python loop over single cells, on any number of devices."""

from dataclasses import replace

import chex
import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from madjax import MAD, Classifier, InputError, Knockoff, LeNet, Recipe, Sweep, store, sweep
from madjax.attacks import knockoff
from madjax.datasets import MNIST_FAMILY
from madjax.defenses import as_function
from madjax.report import read_rows

RECIPE = Recipe(epochs=2, batch_size=16, learning_rate=0.05)
BUDGET = 40


class Small(nn.Module):
    """A convolution and a dense layer: every kind of parameter the sweep meets, zeros included."""

    num_classes: int

    @nn.compact
    def __call__(self, x):
        x = nn.relu(nn.Conv(3, (3, 3), strides=2)(x))
        return nn.Dense(self.num_classes)(x.reshape(x.shape[0], -1))


class Headless(Small):
    """Its logits are scaled after the last dense layer: no head for layers="last"."""

    def __call__(self, x):
        return 2 * super().__call__(x)


class Setting:
    """A victim, a surrogate for each of three seeds, and what the cells share."""

    def __init__(self):
        self.classifier = Classifier(Small(4), MNIST_FAMILY.preprocess, (6, 6, 1))
        keys = jax.random.split(jax.random.key(0), 4)
        self.victim = jax.jit(self.classifier.init)(keys[0])
        self.images = jax.random.randint(keys[1], (60, 6, 6, 1), 0, 256).astype(jnp.uint8)
        x_test = jax.random.randint(keys[2], (300, 6, 6, 1), 0, 256).astype(jnp.uint8)
        self.labels = jax.random.randint(keys[3], (300,), 0, 4)
        self.x_test = x_test
        self.defense = MAD(layers="all")
        self.seeds = (0, 1, 2)
        evidence = []
        for seed in self.seeds:
            drawn = knockoff.draw(knockoff.keys(seed)["draw"], 60, BUDGET)
            evidence.append(
                [
                    self.defense.evidence(self.classifier.apply, self.surrogate(seed), x)
                    for x in (self.images[drawn], x_test)
                ]
            )
        queries, tests = (jnp.stack(each) for each in zip(*evidence, strict=True))
        self.shared = sweep.Shared(
            self.images,
            self.posterior(self.images),
            queries,
            x_test,
            self.labels,
            self.posterior(x_test),
            tests,
        )

    def surrogate(self, seed):
        return jax.jit(self.classifier.init)(knockoff.keys(seed)["surrogate"])

    def posterior(self, x):
        return self.classifier.posterior(self.victim, x)

    def query(self, seed, epsilon):
        """The defended victim as one attacker meets it, with nothing shared."""
        defend = as_function(self.defense, self.classifier.apply, self.surrogate(seed), epsilon)
        return lambda key, x: defend(key, x, self.posterior(x))


@pytest.fixture(scope="module")
def setting():
    return Setting()


@pytest.fixture(scope="module")
def singly(setting):
    """Every cell on its own by the plain attack: {(epsilon, seed): (state, answers)}."""
    results = {}
    for epsilon in (0.0, 0.4, 1.2):
        for seed in setting.seeds:
            query = setting.query(seed, epsilon)
            state = knockoff.knockoff(
                seed,
                query,
                setting.images,
                BUDGET,
                setting.classifier,
                RECIPE,
                (setting.x_test, setting.labels),
            )
            results[epsilon, seed] = state, query(jax.random.key(0), setting.x_test)
    return results


def run_grid(setting, identities, devices, mapping):
    """The grid through the compiled program: [(state, utility)] in the order of the cells."""
    mesh = sweep.make_mesh(jax.devices()[:devices])
    program = sweep.Program(setting.classifier, RECIPE, setting.defense, BUDGET)
    cells = [sweep.Cell(np.float32(e), np.uint32(s), np.int32(s)) for e, s in identities]
    size = devices * -(-len(cells) // devices)
    ((wave, stacked),) = sweep.waves(cells, size)
    attackers, utility = sweep.over_cells(program.begin, mesh, mapping)(stacked, setting.shared)
    advance = sweep.over_cells(program.advance, mesh, mapping)
    for _ in range(RECIPE.epochs):
        attackers = advance(attackers, setting.shared)
    results = jax.device_get((attackers.state, utility))
    return [jax.tree.map(lambda a, i=i: a[i], results) for i in range(len(wave))]


GRIDS = {
    1: [(0.4, 1)],
    6: [(e, s) for s in (0, 1) for e in (0.0, 0.4, 1.2)],
    8: [(e, s) for s in (0, 1, 2) for e in (0.0, 0.4, 1.2)][:8],
}


@pytest.mark.parametrize("mapping", [sweep.serially, sweep.together], ids=["serially", "together"])
@pytest.mark.parametrize("devices", [1, 4])
@pytest.mark.parametrize("count", GRIDS)
def test_grid_is_a_loop_over_cells(setting, singly, count, devices, mapping):
    results = run_grid(setting, GRIDS[count], devices, mapping)
    for identity, (state, utility) in zip(GRIDS[count], results, strict=True):
        want, answers = singly[identity]
        chex.assert_trees_all_close(state.params, want.params, atol=2e-5)
        np.testing.assert_allclose(state.accuracy, want.accuracy, atol=0.34)
        top = 100 * (answers.argmax(-1) == setting.labels).mean()
        np.testing.assert_allclose(utility["defender_accuracy"], top, atol=0.34)
        distances = jnp.abs(answers - setting.posterior(setting.x_test)).sum(-1)
        np.testing.assert_allclose(utility["l1_mean"], distances.mean(), atol=1e-5)
        assert int(state.epoch) == RECIPE.epochs


@pytest.mark.parametrize("mapping", [sweep.serially, sweep.together], ids=["serially", "together"])
def test_no_device_talks_to_another(setting, mapping):
    mesh = sweep.make_mesh()
    assert mesh.size == 4
    program = sweep.Program(setting.classifier, RECIPE, setting.defense, BUDGET)
    cells = [sweep.Cell(np.float32(0.4), np.uint32(s), np.int32(s)) for s in (0, 1, 2)]
    ((_, stacked),) = sweep.waves(cells, 4)
    begin = sweep.over_cells(program.begin, mesh, mapping)
    advance = sweep.over_cells(program.advance, mesh, mapping)
    attackers, _ = begin(stacked, setting.shared)
    for compiled in (
        begin.lower(stacked, setting.shared).compile(),
        advance.lower(attackers, setting.shared).compile(),
    ):
        text = compiled.as_text()
        assert "fusion" in text
        for word in ("all-reduce", "all-gather", "all-to-all", "collective", "reduce-scatter"):
            assert word not in text


def test_waves_cover_the_grid_once_and_have_one_size():
    cells = [sweep.Cell(np.float32(i), np.uint32(0), np.int32(0)) for i in range(7)]
    cut = list(sweep.waves(cells, 3))
    assert [len(wave) for wave, _ in cut] == [3, 3, 1]
    assert [stacked.epsilon.tolist() for _, stacked in cut] == [[0, 1, 2], [3, 4, 5], [6, 6, 6]]


def write_data(folder, images=(60, 30), shape=(6, 6), classes=4):
    rng = np.random.default_rng(0)
    train, test = images
    np.savez(
        folder / "tiny.npz",
        x_train=rng.integers(0, 256, (train, *shape), dtype=np.uint8),
        y_train=np.arange(train) % classes,
        x_test=rng.integers(0, 256, (test, *shape), dtype=np.uint8),
        y_test=np.arange(test) % classes,
    )
    return folder


CONFIG = Sweep(
    name="tiny",
    dataset="tiny",
    queryset="tiny",
    architecture=Small,
    victim=Recipe(epochs=2, batch_size=16),
    epsilons=(0.0, 0.99),
    seeds=(0, 1, 2),
    attack=Knockoff(budget=BUDGET, architecture=Small, recipe=Recipe(epochs=3, batch_size=16)),
)


def results_of(rows):
    timing = ("seconds", "git_commit")
    return sorted(
        ({k: v for k, v in row.items() if k not in timing} for row in rows),
        key=lambda row: (row["epsilon"], row["seed"]),
    )


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    data = write_data(tmp_path_factory.mktemp("data"))
    out = tmp_path_factory.mktemp("runs") / "whole"
    return data, out, sweep.run(CONFIG, out, data_dir=data, log=lambda line: None)


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


@pytest.mark.parametrize("saves", [1, 3, 6])
def test_resume_after_an_interrupt_gives_the_same_rows(finished, tmp_path, monkeypatch, saves):
    """Stop after so many checkpoints: in the victim, in the first wave, in the second."""
    data, _, want = finished
    stopped_run(tmp_path / "out", data, monkeypatch, "save", saves)
    rows = sweep.run(CONFIG, tmp_path / "out", data_dir=data, resume=True, log=lambda line: None)
    assert results_of(rows) == results_of(want)
    assert results_of(read_rows(tmp_path / "out")) == results_of(want)


def test_resume_on_other_devices_finishes_the_run(finished, tmp_path, monkeypatch):
    """Stopped in a wave of four cells, gone on in waves of three."""
    data, _, want = finished
    stopped_run(tmp_path / "out", data, monkeypatch, "save", 4)
    three = sweep.make_mesh(jax.devices()[:3])
    monkeypatch.setattr("madjax.sweep.pipeline.make_mesh", lambda: three)
    rows = sweep.run(CONFIG, tmp_path / "out", data_dir=data, resume=True, log=lambda line: None)
    for row, same in zip(results_of(rows), results_of(want), strict=True):
        assert row["device"] != same["device"]
        np.testing.assert_allclose(row["attacker_accuracies"], same["attacker_accuracies"])


def test_a_stop_between_the_rows_of_a_wave_doubles_none(finished, tmp_path, monkeypatch):
    data, _, want = finished
    stopped_run(tmp_path / "out", data, monkeypatch, "append_row", 3)
    assert len(read_rows(tmp_path / "out")) == 3
    sweep.run(CONFIG, tmp_path / "out", data_dir=data, resume=True, log=lambda line: None)
    assert results_of(read_rows(tmp_path / "out")) == results_of(want)


def test_resume_refuses_other_data_of_the_same_name(finished, tmp_path):
    _, out, _ = finished
    other = write_data(tmp_path, images=(60, 31))
    with pytest.raises(InputError, match=r"data\.dataset"):
        sweep.run(CONFIG, out, data_dir=other, resume=True)


def test_resume_of_a_finished_run_does_nothing(finished):
    data, out, rows = finished
    before = (out / "rows.jsonl").read_bytes()
    again = sweep.run(CONFIG, out, data_dir=data, resume=True, log=lambda line: None)
    assert again == rows
    assert (out / "rows.jsonl").read_bytes() == before


def test_adding_cells_changes_no_other(finished, tmp_path):
    data, _, want = finished
    fewer = replace(CONFIG, epsilons=(0.99,), seeds=(2,))
    (row,) = sweep.run(fewer, tmp_path / "out", data_dir=data, log=lambda line: None)
    (same,) = [r for r in want if (r["epsilon"], r["seed"]) == (0.99, 2)]
    for name in ("attacker_accuracies", "defender_accuracy", "l1_mean"):
        np.testing.assert_allclose(row[name], same[name], atol=1e-3)


def broken_oracle(y, gram):
    return y + jnp.ones(99)


def test_a_defence_that_cannot_work_fails_before_the_victim_is_trained(tmp_path):
    data = write_data(tmp_path)

    for change, words in (
        ({"defense": MAD(oracle=broken_oracle)}, "the defence MAD.*fails on these data"),
        ({"architecture": Headless}, "layers='last' needs"),
    ):
        with pytest.raises(InputError, match=words):
            sweep.run(replace(CONFIG, **change), tmp_path / "out", data_dir=data)
        assert not (tmp_path / "out").exists()


def test_an_architecture_that_does_not_fit_is_named(tmp_path):
    data = write_data(tmp_path)
    with pytest.raises(InputError, match="victim's LeNet cannot take images of shape"):
        sweep.run(replace(CONFIG, architecture=LeNet), tmp_path / "out", data_dir=data)

    def wrong(classes):
        return Small(classes + 1)

    attack = replace(CONFIG.attack, architecture=wrong)
    with pytest.raises(InputError, match="attacker's wrong gives outputs"):
        sweep.run(replace(CONFIG, attack=attack), tmp_path / "out", data_dir=data)
    assert not (tmp_path / "out").exists()
