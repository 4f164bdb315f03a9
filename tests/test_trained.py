"""Victims that are given: the same rows as of the run that trained them, and nothing trained."""

import shutil
from dataclasses import replace

import jax
import numpy as np
import pytest
from safetensors.flax import save_file

import madjax
from madjax import (
    DPSGD,
    MAD,
    AngleStudy,
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
    open_dataset,
    report,
    store,
    sweep,
)
from madjax.sweep import plan
from tests.networks import Linear

RECIPE = Recipe(epochs=2, batch_size=16, learning_rate=0.3)
TASK = Task("victims", "queries", architecture=Linear, victim=RECIPE)
SWEEP = Sweep(
    "trained",
    (TASK,),
    (
        Defended(MAD(layers="last"), (0.0, 0.9)),
        Defended(MAD(surrogate_epochs=None), (0.9,)),
    ),
    (Knockoff(budget=30, architecture=Linear, recipe=RECIPE),),
)


class Named(Linear):
    """The same network, with a name in PyTorch."""

    def torch_names(self):
        return {"Dense_0": "fc"}


def quiet(line):
    del line


def with_victim(victim, **changed):
    return replace(SWEEP, tasks=(replace(TASK, victim=victim, **changed),))


@pytest.fixture(scope="module")
def data_dir(tmp_path_factory):
    folder = tmp_path_factory.mktemp("data")
    for at, (name, classes) in enumerate((("victims", 4), ("queries", 4), ("others", 5))):
        rng = np.random.default_rng(at)
        y = rng.integers(0, classes, 200)
        x = rng.integers(0, 200, (200, 6, 6)) + 30 * (np.arange(6) == y[:, None])[:, None]
        x = x.astype(np.uint8)
        np.savez(folder / name, x_train=x[:80], y_train=y[:80], x_test=x[80:], y_test=y[80:])
    return folder


@pytest.fixture(scope="module")
def trained(data_dir, tmp_path_factory):
    """The rows of a run that trains its victim, and the victim's checkpoint."""
    out = tmp_path_factory.mktemp("runs") / "trained"
    rows = sweep.run(SWEEP, out, data_dir=data_dir, log=quiet)
    (checkpoint,) = (out / "checkpoints").glob("victim-*")
    return rows, checkpoint


def test_a_given_victim_has_the_rows_of_the_one_that_was_trained(trained, data_dir, tmp_path):
    rows, checkpoint = trained
    given = Trained(checkpoint)
    found = sweep.run(with_victim(given), tmp_path / "out", data_dir=data_dir, log=quiet)
    assert len(found) == len(rows) == 3
    kept = ("strength", "surrogate", "attacker_accuracies", "attacker_losses", "l1_mean")
    kept += ("victim_accuracy", "defender_accuracy", "undefended_share", "status")
    for row, wanted in zip(found, rows, strict=True):
        assert {name: row[name] for name in kept} == {name: wanted[name] for name in kept}
        assert row["id"] != wanted["id"]
        assert (row["victim_path"], row["victim_digest"]) == (str(checkpoint), given.digest)
        assert "victim_epochs" not in row
    assert not list((tmp_path / "out" / "checkpoints").glob("victim-*"))
    assert " 0.9 |" in report.write_report(tmp_path / "out")


def test_a_file_of_pytorch_is_a_victim_too(trained, data_dir, tmp_path):
    """A dense layer on images of one channel: its kernel is the transpose of PyTorch's weight."""
    rows, checkpoint = trained
    network = madjax.Classifier(Linear(4), lambda x: x, (6, 6, 1))
    dense = Trained(checkpoint).variables(network)["params"]["Dense_0"]
    path = tmp_path / "victim.safetensors"
    save_file({"fc.weight": dense["kernel"].T, "fc.bias": dense["bias"]}, path)
    task = with_victim(Trained(path), architecture=Named)
    (found, *_) = sweep.run(task, tmp_path / "out", data_dir=data_dir, log=quiet)
    assert found["attacker_accuracies"] == rows[0]["attacker_accuracies"]
    with pytest.raises(InputError, match="Linear has no torch_names"):
        sweep.run(with_victim(Trained(path)), tmp_path / "two", data_dir=data_dir, log=quiet)
    assert not (tmp_path / "two").exists()


def saved(directory, name, step, tree):
    """A checkpoint that is there."""
    store.save(directory, name, step, tree)
    assert store.holds(directory, name, step)


def test_what_it_is_are_its_arrays(trained, tmp_path):
    """Neither where it lies nor how it was saved; one number more tells it from another."""
    _, checkpoint = trained
    moved = shutil.copytree(checkpoint, tmp_path / "moved")
    assert Trained(moved) == Trained(checkpoint)
    assert hash(Trained(moved)) == hash(Trained(checkpoint))
    assert config.describe(Trained(moved)) == config.describe(Trained(checkpoint))
    (step,) = (p for p in checkpoint.iterdir() if p.is_dir())
    assert Trained(step) == Trained(checkpoint)
    network = madjax.Classifier(Linear(4), lambda x: x, (6, 6, 1))
    variables = Trained(checkpoint).variables(network)
    state = {"params": variables, "opt_state": (), "epoch": np.zeros(())}
    saved(tmp_path, "again", 7, state)
    assert Trained(tmp_path / "checkpoints" / "again") == Trained(checkpoint)
    for step, leaf in enumerate(("kernel", "bias"), 8):  # of several steps the last is taken
        other = jax.tree.map(np.array, variables)
        other["params"]["Dense_0"][leaf][-1] += 1e-3
        saved(tmp_path, "again", step, state | {"params": other})
        assert Trained(tmp_path / "checkpoints" / "again") != Trained(checkpoint)
    saved(tmp_path, "alone", 1, variables)
    assert Trained(tmp_path / "checkpoints" / "alone") == Trained(checkpoint)


def test_victims_of_one_sweep_are_told_apart(trained, data_dir, tmp_path, monkeypatch):
    """Also in the cache: posteriors of one are not taken for those of another."""
    monkeypatch.setenv("MADJAX_CACHE", str(tmp_path / "cache"))
    _, checkpoint = trained
    network = madjax.Classifier(Linear(4), lambda x: x, (6, 6, 1))
    flipped = jax.tree.map(lambda a: a[..., ::-1], Trained(checkpoint).variables(network))
    saved(tmp_path, "flipped", 1, flipped)
    victims = Trained(checkpoint), Trained(tmp_path / "checkpoints" / "flipped")
    tasks = tuple(replace(TASK, victim=victim) for victim in victims)
    both = replace(SWEEP, tasks=tasks, defenses=(Defended(NoDefense()),))
    one, two = sweep.run(both, tmp_path / "out", data_dir=data_dir, log=quiet)
    data = open_dataset("victims", data_dir)
    for row, variables in ((one, victims[0].variables(network)), (two, flipped)):
        kernel, bias = (np.asarray(variables["params"]["Dense_0"][n]) for n in ("kernel", "bias"))
        x = np.asarray(data.family.preprocess(data.x_test)).reshape(-1, 36)
        top = 100 * np.mean((x @ kernel + bias).argmax(1) == data.y_test)
        np.testing.assert_allclose(row["victim_accuracy"], top, rtol=1e-6)
        np.testing.assert_allclose(row["defender_accuracy"], top, rtol=1e-6)
    assert one["task_settings"] != two["task_settings"]
    again = sweep.run(both, tmp_path / "again", data_dir=data_dir, log=quiet)
    assert [row["attacker_losses"] for row in again] == [
        row["attacker_losses"] for row in (one, two)
    ]


def test_a_plan_has_no_network_to_train(trained, data_dir, tmp_path):
    _, checkpoint = trained
    for victim, networks in ((RECIPE, 1), (Trained(checkpoint), 0)):
        found = plan(with_victim(victim), tmp_path / "out", data_dir=data_dir)
        needed = {stage.name: stage.needed for stage in found.stages}
        assert needed.get("networks", 0) == networks


def test_it_is_exported_behind_its_defence(trained, data_dir, tmp_path):
    _, checkpoint = trained
    given = with_victim(Trained(checkpoint))
    sweep.run(given, tmp_path / "out", data_dir=data_dir, log=quiet)
    x = open_dataset("victims", data_dir).x_test
    told = [
        sweep.defended(each, where, strength=0.9, defense="0", data_dir=data_dir)[1](x)
        for each, where in ((SWEEP, checkpoint.parents[1]), (given, tmp_path / "out"))
    ]
    np.testing.assert_array_equal(*told)
    with pytest.raises(InputError, match=r"the victim in .* is not that of the run in .*: give"):
        sweep.defended(given, checkpoint.parents[1], strength=0.9, defense="0", data_dir=data_dir)
    (tmp_path / "out" / "config.json").write_text("{")
    with pytest.raises(InputError, match=r"config\.json is damaged .*: make the run anew"):
        sweep.defended(given, tmp_path / "out", strength=0.9, defense="0", data_dir=data_dir)


def test_a_run_goes_on_with_it(trained, data_dir, tmp_path):
    _, checkpoint = trained
    given, out = with_victim(Trained(checkpoint)), tmp_path / "out"
    fewer = replace(given, defenses=given.defenses[:1])
    first = sweep.run(fewer, out, data_dir=data_dir, log=quiet)
    moved = with_victim(Trained(shutil.copytree(checkpoint, tmp_path / "moved")))
    rows = sweep.run(moved, out, data_dir=data_dir, resume=True, log=quiet)
    assert rows[:2] == first
    assert len(rows) == 3


def test_the_white_box_study_takes_it(trained, data_dir, tmp_path):
    rows, checkpoint = trained
    recipe = Recipe(epochs=1, batch_size=1, learning_rate=0.1)
    online = Online(recipe=recipe, architecture=Linear, images=80)
    study = AngleStudy(
        with_victim(Trained(checkpoint)).tasks[0], (0.9,), steps=5, attackers=(online,)
    )
    (row,) = sweep.run(study.sweep(), tmp_path / "out", data_dir=data_dir, log=quiet)
    assert row["victim_accuracy"] == rows[0]["victim_accuracy"]
    assert row["angle_mean"] > 0


@pytest.mark.parametrize(
    ("rule", "strength"), [(DPSGD(), 1.0), (MAD(layers="last", surrogate_epochs=1), 0.9)]
)
def test_a_defence_that_trains_as_the_victim_was_trained_is_refused(rule, strength, trained):
    _, checkpoint = trained
    with pytest.raises(
        InputError, match=r"trains networks by the victim's recipe, and the victim of victims <- "
    ):
        replace(with_victim(Trained(checkpoint)), defenses=(Defended(rule, (strength,)),))


def test_a_defence_with_a_recipe_of_its_own_is_not(trained, data_dir, tmp_path):
    _, checkpoint = trained
    private = Defended(DPSGD(recipe=replace(RECIPE, epochs=1)), (1.0,))
    given = replace(with_victim(Trained(checkpoint)), defenses=(private,))
    (row,) = sweep.run(given, tmp_path / "out", data_dir=data_dir, log=quiet)
    assert row["dp_epochs"] == 1


def test_bad_victims_are_one_clear_line(trained, data_dir, tmp_path):
    _, checkpoint = trained
    given = Trained(checkpoint)
    with pytest.raises(InputError, match=r"victim is 'here': give a madjax\.Recipe\(\)"):
        replace(TASK, victim="here")
    with pytest.raises(InputError, match=r"victim_seed is 3, and the victim is that of .*, which"):
        replace(TASK, victim=given, victim_seed=3)
    with pytest.raises(InputError, match=r"cannot be read as a checkpoint \("):
        Trained(checkpoint.parents[1])
    with pytest.raises(InputError, match=r"there is no field 'digest'; choose one of path$"):
        config.override(with_victim(given), "tasks.victim.digest=1")
    with pytest.raises(InputError, match="is no file"):
        config.override(with_victim(given), "tasks.victim.path=nowhere.pth")
    out = tmp_path / "out"
    digits = {"dataset": "embedded:mnist[:9,:9]", "queryset": "embedded:mnist[:9]"}
    for changed, message in (
        ({"dataset": "others"}, r"Dense_0/\w+ has shape \(.*4,?\), where Linear for these classes"),
        (
            digits | {"architecture": madjax.LeNet},
            r"not fit LeNet: it lacks params/Conv_0/bias and",
        ),
    ):
        with pytest.raises(InputError, match=message):
            sweep.run(with_victim(given, **changed), out, data_dir=data_dir, log=quiet)
    assert not out.exists()


def test_a_victim_that_changed_or_answers_nan_is_none(trained, data_dir, tmp_path):
    _, checkpoint = trained
    network = madjax.Classifier(Linear(4), lambda x: x, (6, 6, 1))
    variables = Trained(checkpoint).variables(network)
    signs = (-1.0) ** np.arange(36)[:, None]  # so that sums are infinity less infinity
    huge = jax.tree.map(lambda a: (signs * np.full((36, 4), 3e38))[: len(a)], variables)
    huge["params"]["Dense_0"]["bias"] = variables["params"]["Dense_0"]["bias"]
    saved(tmp_path, "victim", 1, huge)
    given = Trained(tmp_path / "checkpoints" / "victim")
    with pytest.raises(InputError, match=r"victim of victims <- queries answers NaN: give another"):
        sweep.run(with_victim(given), tmp_path / "out", data_dir=data_dir, log=quiet)
    saved(tmp_path, "other", 1, variables)
    given = Trained(tmp_path / "checkpoints" / "other")
    saved(tmp_path, "other", 2, huge)
    with pytest.raises(InputError, match="was changed after its config was read"):
        sweep.run(with_victim(given), tmp_path / "two", data_dir=data_dir, log=quiet)
