"""What a plan says is what the sweep then does."""

import contextlib
import json
import time
from dataclasses import replace

import jax
import numpy as np
import pytest

from madjax import (
    MAD,
    VGG16,
    AdaptiveKnockoff,
    Classifier,
    Defended,
    InputError,
    Knockoff,
    LeNet,
    Online,
    Recipe,
    ReverseSigmoid,
    Sweep,
    Task,
    jbda,
    open_dataset,
    store,
    sweep,
)
from madjax.cli import main
from madjax.datasets import MNIST_FAMILY
from madjax.sweep import cache, clock, load, rates
from madjax.sweep.load import held
from madjax.sweep.rates import Rates
from madjax.train import start
from tests.networks import Linear

RECIPE = Recipe(epochs=2, batch_size=16)
SETTINGS = {"architecture": Linear, "recipe": RECIPE}
TASK = Task("tiny", "tiny", architecture=Linear, victim=replace(RECIPE, epochs=3))
KNOCKOFF = Knockoff(budget=40, **SETTINGS)
CONFIG = Sweep(
    "planned",
    (TASK, replace(TASK, victim_seed=1)),
    (Defended(MAD(surrogate_epochs=1), (0.5, 0.99)),),
    (
        KNOCKOFF,
        replace(KNOCKOFF, variant="nquery", repeats=2),
        jbda(budget=30, seeds=10, substitute=RECIPE, **SETTINGS),
    ),
    budgets=(20,),
    seeds=(0, 1),
)


@pytest.fixture(scope="module")
def made(folder, tmp_path_factory):
    """A plan, the run of the same config after it, what that logged and what it compiled."""
    base = tmp_path_factory.mktemp("planned")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("MADJAX_CACHE", str(base / "cache"))
        jax.clear_caches()
        plan = sweep.plan(CONFIG, base / "out", data_dir=folder)
        assert not (base / "out").exists()
        assert cache.entries(base / "cache") == []
        jax.clear_caches()
        sweep.programs.clear()
        _, lines = run(CONFIG, base / "out", folder)
    return base, plan, lines, dict(sweep.programs)


@pytest.fixture
def kept(made, monkeypatch):
    """The cache of that run."""
    monkeypatch.setenv("MADJAX_CACHE", str(made[0] / "cache"))
    return made[0] / "cache"


def stages_of(plan):
    return {stage.name: (stage.needed, stage.held, stage.amount) for stage in plan.stages}


def run(config, out, folder):
    lines = []
    return sweep.run(config, out, data_dir=folder, log=lines.append), lines


def test_a_plan_counts_what_the_sweep_then_makes(made, kept):
    _, plan, lines, programs = made
    cells = 2 * 2 * 3 * 2 * 2  # tasks, strengths, attacks, seeds, budgets
    assert (plan.cells, plan.missing) == (cells, cells)
    places = 2 * 2 * 2
    trained = (40 + 20) + (20 + 10) + (30 + 20)  # examples at both budgets, of each attack
    assert stages_of(plan) == {
        # Two victims; a surrogate a seed, which both tasks share, as their images are the same.
        "networks": (4, 0, 60 * (2 * 3 + 2)),
        # Of the test set; of each seed's queries, 40 images and 20 that are sent twice.
        "posteriors": (2 + 2 * 2 * 2, 0, 2 * 30 + 4 * 40 + 4 * 20),
        "answers": (3 * places, 0, places * (30 + 40 + 40)),
        "transfer sets": (places, 0, places * 30),
        "stolen models": (cells, 0, places * trained * 2),
    }
    assert plan.seconds is None
    assert "not measured" in plan.table()
    assert "time not known" in plan.summary()
    assert lines[0] == plan.summary()
    names = "posterior", "at_strengths", "begin", "proceed", "start", "advance", "fidelity"
    # Trainings of victims and of surrogates have a start of their own.
    assert sum(programs[name] for name in names) - 2 == plan.programs
    found = [entry.path.name.partition("-")[0] for entry in cache.entries(kept)]
    kinds = ("network", "networks"), ("posteriors",) * 2, ("answers",) * 2
    for kind, stage in (*kinds, ("transfer", "transfer sets")):
        assert found.count(kind) == stages_of(plan)[stage][0], kind
    held = sum(_bytes_in(entry.path) for entry in cache.entries(kept))
    in_directory = sum(
        _bytes_in(entry.path) for entry in cache.entries(kept) if "network" in entry.path.name
    )
    counts = 4 * places  # of queries asked, in transfer sets
    assert plan.disk_bytes == held + in_directory - counts


def test_the_host_holds_the_data_and_the_answers_of_one_defence(folder, tmp_path):
    def planned(*defenses, tasks=(TASK,), attacks=CONFIG.attacks):
        config = replace(CONFIG, tasks=tasks, attacks=attacks, defenses=defenses)
        return sweep.plan(config, tmp_path / "out", data_dir=folder).host_bytes

    data = open_dataset("tiny", folder)
    images = sum(a.nbytes for a in (data.x_train, data.y_train, data.x_test, data.y_test))
    answers = 4 * 4 * 40  # of 4 classes to 40 queries, at a strength and for a seed
    one, two = Defended(MAD(), (0.5,)), Defended(MAD(layers="last"), (0.5, 0.9))
    # Two attacks of three are foreseen; two seeds; two victims share their images.
    assert planned(one) == images + 2 * 2 * answers
    assert planned(one, two) == planned(two) == images + 2 * 2 * 2 * answers
    assert planned(one, tasks=CONFIG.tasks) == images + 2 * 2 * 2 * answers
    assert planned(one, attacks=CONFIG.attacks[2:]) == images
    # Another query set is held beside it.
    owned = open_dataset("tiny[:50,:20]", folder)
    more = owned.x_train.nbytes + owned.y_train.nbytes
    few = (replace(TASK, queryset="tiny[:50,:20]"),)
    assert planned(one, tasks=few) == images + more + 2 * 2 * answers


def _bytes_in(path):
    """Of the arrays of a result."""
    with np.load(path) as held:
        return sum(held[name].nbytes for name in held.files if name != "facts")


def test_a_device_holds_more_for_each_cell_by_its_transfer_set_and_its_model(folder, tmp_path):
    attack = CONFIG.attacks[2]
    few = replace(CONFIG, attacks=(attack,), budgets=())
    one, two = (
        sweep.plan(
            few,
            tmp_path / "out",
            data_dir=folder,
            cells_per_device=cells,
            devices=jax.devices()[:1],
        ).device_bytes
        for cells in (1, 2)
    )
    network = Classifier(Linear(4), MNIST_FAMILY.preprocess, (6, 6, 1))
    state = jax.eval_shape(lambda: start(network, RECIPE, 30, jax.random.key(0)))
    model = sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(state))
    assert two - one == 2 * model + 4 * 30 * (6 * 6 + 4)  # a model before a step, and after it
    data = open_dataset("tiny", folder)
    images = data.x_train.nbytes + data.y_train.nbytes
    tests = data.x_test.nbytes + 30 * 4 * (1 + 4)
    # Of two tasks that share their images: two victims, and a surrogate for each with each seed.
    weights = 4 * (36 * 4 + 4) * (2 + 2 * 2)
    # Cells take their steps one after another.
    assert one - (two - one) == images + 2 * tests + weights + held(network, RECIPE.batch_size)


def test_a_plan_knows_what_is_there(made, kept, folder, tmp_path):
    out = made[0] / "out"
    done = sweep.plan(CONFIG, out, data_dir=folder)
    assert (done.missing, done.stages, done.seconds) == (0, (), None)
    assert done.summary() == f"planned: all {done.cells} cells have their row in {out}"
    more = Defended(MAD(surrogate_epochs=1), (0.3, 0.5, 0.99))
    larger = replace(CONFIG, defenses=(more,))
    plan = sweep.plan(larger, out, data_dir=folder)
    assert plan.missing == 2 * 3 * 2 * 2
    found = stages_of(plan)
    assert found["networks"] == (4, 4, 0)
    assert found["posteriors"] == (10, 10, 0)
    assert found["answers"] == (12, 0, 4 * (30 + 40 + 40))
    assert found["transfer sets"] == (4, 0, 4 * 30)
    assert plan.seconds > 0
    assert "and compiling" in plan.summary()
    # The same cells in another directory: all but the stolen models is there. Of those the plan
    # knows the ones that are asked for as the defence answers.
    other = sweep.plan(CONFIG, tmp_path / "other", data_dir=folder)
    assert {name: needed == held for name, (needed, held, _) in stages_of(other).items()} == {
        "networks": True,
        "posteriors": True,
        "answers": True,
        "transfer sets": True,
        "stolen models": False,
    }
    assert stages_of(other)["stolen models"][:2] == (other.cells, other.cells // 3)


def test_a_plan_finds_networks_in_the_directory_too(folder, tmp_path):
    """Where nothing is cached."""
    few = replace(CONFIG, attacks=(KNOCKOFF,), tasks=(TASK,), budgets=())
    run(few, tmp_path / "out", folder)
    more = replace(few, seeds=(0, 1, 2))
    found = stages_of(sweep.plan(more, tmp_path / "out", data_dir=folder))
    assert found["networks"] == (2, 1, 60)  # the victim, and a surrogate for the new seed
    assert found["answers"] == (4, 0, 2 * (30 + 40))


def test_other_attacks_have_stages_of_their_own(folder, tmp_path):
    online = Online(
        budget=24,
        images=15,
        every=10,
        judged=20,
        architecture=Linear,
        recipe=replace(RECIPE, batch_size=1),
    )
    adaptive = AdaptiveKnockoff(budget=40, online=replace(RECIPE, decay_epochs=0), **SETTINGS)
    config = replace(CONFIG, attacks=(online, adaptive), budgets=(), tasks=(TASK,), seeds=(7, 8))
    found = stages_of(sweep.plan(config, tmp_path / "out", data_dir=folder))
    assert found["online attackers"] == (4, 0, 4 * 24)
    assert found["transfer sets"] == (4, 0, 4 * 40)
    assert found["stolen models"] == (4, 0, 4 * 40 * 2)


@pytest.mark.smoke
def test_the_file_of_rates_does_not_grow_for_ever(tmp_path, monkeypatch):
    monkeypatch.setattr("madjax.sweep.rates.LARGEST", 4000)
    sizes = []
    for i in range(300):
        for device in ("this", "that"):
            Rates(tmp_path, device).note("stolen LeNet", 1, i)
        sizes.append((tmp_path / "rates.jsonl").stat().st_size)
    assert max(sizes) < 4000
    # The latest nine are all there is to know.
    assert Rates(tmp_path, "this").seconds("stolen LeNet", 1) == 295
    assert Rates(tmp_path, "that").seconds("stolen LeNet", 1) == 295


@pytest.mark.smoke
def test_time_is_the_median_of_what_this_device_took(tmp_path):
    assert Rates(tmp_path, "this").seconds("stolen LeNet", 10) is None
    for device, seconds in (("this", 1), ("this", 2), ("this", 30), ("that", 100)):
        Rates(tmp_path, device).note("stolen LeNet", 10, seconds)
    with (tmp_path / "rates.jsonl").open("a") as file:
        file.write('{"kind": "stolen LeN')
    here = Rates(tmp_path, "this")
    assert here.seconds("stolen LeNet", 100) == 20
    assert Rates(tmp_path, "that").seconds("stolen LeNet", 100) == 1000
    assert here.seconds("stolen VGG16", 100) is None
    assert here.seconds("stolen VGG16", 0) == 0
    Rates(None, "this").note("stolen LeNet", 10, 1)
    assert Rates(None, "this").seconds("stolen LeNet", 10) is None


def test_writing_checkpoints_is_no_training(folder, tmp_path, monkeypatch):
    monkeypatch.setenv("MADJAX_CACHE", str(tmp_path / "cache"))
    save = store.save

    def slow(*args):
        time.sleep(1)
        save(*args)

    monkeypatch.setattr("madjax.store.save", slow)
    config = replace(CONFIG, attacks=(KNOCKOFF,), budgets=(), tasks=(TASK,), seeds=(0,))
    run(replace(config, defenses=(Defended(ReverseSigmoid(), (0.5,)),)), tmp_path / "out", folder)
    text = (tmp_path / "cache" / rates.FILE).read_text()
    notes = [json.loads(line) for line in text.splitlines()]
    took = {note["kind"].partition(" ")[0]: note["seconds"] for note in notes}
    assert took["training"] < 2  # of three epochs
    assert took["stolen"] < 2  # of two


MACHINE = sweep.Machine(count=4, memory=1e9, flops=1e6)


def test_a_plan_for_another_machine_goes_by_operations(folder, tmp_path):
    """Each stage as a closed form of its work, and of the devices that are busy with it."""
    ways = {"data_dir": folder, "machine": MACHINE}
    config = replace(CONFIG, budgets=(), defenses=(Defended(MAD(), (0.5, 0.9)),))
    plan = sweep.plan(config, tmp_path / "out", **ways)
    assert plan.device == "4 x accelerator at 1e-06 TFLOP/s"
    network = Classifier(Linear(4), MNIST_FAMILY.preprocess, (6, 6, 1))
    forward, backward = load.knowing(network), load.learning(network)
    knows = load.answering(MAD(), network, jax.eval_shape(network.init, jax.random.key(0)))
    amounts = {stage.name: stage.amount for stage in plan.stages}
    jacobian = CONFIG.attacks[2]
    wanted = {
        "networks": amounts["networks"] * backward / 1,  # small networks are trained on one device
        "posteriors": amounts["posteriors"] * forward / 4,
        # Once for both strengths, and for images that are sent twice.
        "answers": 2 * 2 * (30 + 40 + 40 / 2) * knows / 4,
        # Eight cells of each attack, two a device.
        "transfer sets": 8 * (30 * (forward + knows) + jacobian.passes * forward) / 4,
        "stolen models": amounts["stolen models"] * backward / 4,
    }
    assert jacobian.passes == 3 * 2 * (10 + 20) + 2 * 20
    for stage in plan.stages:
        assert stage.seconds == pytest.approx(wanted[stage.name] / 1e6), stage.name
    assert plan.seconds == pytest.approx(sum(wanted.values()) / 1e6)
    with pytest.raises(InputError, match="memory is 5: the machine says its own"):
        sweep.plan(config, tmp_path / "out", **ways, memory=5)
    few = replace(config, seeds=(0,), tasks=(TASK,), attacks=(KNOCKOFF,))
    (stolen,) = (s for s in sweep.plan(few, tmp_path / "out", **ways).stages if "model" in s.name)
    assert stolen.seconds == pytest.approx(stolen.amount * backward / 1e6 / 2)  # two are idle
    online = replace(few, attacks=(Online(budget=32, images=20, every=1, **SETTINGS),))
    assert sweep.plan(online, tmp_path / "out", **ways).stages[-1].seconds is None


def test_devices_that_share_a_network_are_busy_with_it(folder, tmp_path):
    config = replace(CONFIG, attacks=(KNOCKOFF,), budgets=())
    ways = {"data_dir": folder, "machine": MACHINE}

    def networks(**more):
        return sweep.plan(config, tmp_path / "out", **ways, **more).stages[0].seconds

    assert networks() == pytest.approx(4 * networks(devices_per_cell=4))


@pytest.mark.parametrize("name", ["count", "memory", "flops"])
@pytest.mark.parametrize("value", [0, -1, float("nan"), float("inf")])
def test_a_machine_without_size_is_refused(name, value):
    with pytest.raises(InputError, match=f"{name} of the machine is {value}: give a number >= 1"):
        replace(MACHINE, **{name: value})


def test_a_plan_says_where_a_device_has_no_room(folder, tmp_path):
    ways = {"data_dir": folder, "cells_per_device": 1}
    plan = sweep.plan(CONFIG, tmp_path / "out", **ways)
    assert " on a device, " in plan.summary()
    less = sweep.plan(CONFIG, tmp_path / "out", **ways, memory=plan.device_bytes - 1)
    assert " on a device (which has 0.0 MB), " in less.summary()


def test_the_machine_has_nothing_of_this_ones_cache(made, kept, folder, tmp_path):
    held = sweep.plan(CONFIG, tmp_path / "out", data_dir=folder)
    assert sum(stage.held for stage in held.stages) > 0
    there = sweep.plan(CONFIG, tmp_path / "out", data_dir=folder, machine=MACHINE)
    assert sum(stage.held for stage in there.stages) == 0


def test_data_sets_that_are_at_hand_are_not_looked_for(folder, tmp_path):
    config = replace(CONFIG, attacks=(KNOCKOFF,), budgets=(), seeds=(0,))
    called = tuple(replace(task, dataset="mine", queryset="mine") for task in config.tasks)
    mine = replace(config, tasks=called)
    datasets = {"mine": open_dataset("tiny", folder)}
    with pytest.raises(InputError, match="mine"):
        sweep.plan(mine, tmp_path / "out", data_dir=folder)
    plan = sweep.plan(mine, tmp_path / "out", datasets=datasets)
    assert plan.missing == plan.cells == 4
    rows = sweep.run(mine, tmp_path / "mine", datasets=datasets, log=lambda line: None)
    named, _ = run(config, tmp_path / "named", folder)
    results = "attacker_accuracy", "defender_accuracy", "l1_mean", "dataset_checksum"
    assert len(rows) == len(named) == 4
    for name in results:
        assert [row.get(name) for row in rows] == [row.get(name) for row in named], name


@pytest.mark.smoke
def test_a_stopwatch_tells_compiling_from_running():
    @jax.jit
    def inner(x):
        time.sleep(0.2)
        return x + 1

    @jax.jit
    def outer(x):
        time.sleep(0.2)
        return inner(x)

    watch = sweep.Stopwatch()
    with watch:
        outer(1.0)
        time.sleep(0.2)
    assert watch.compiling >= 0.4
    assert watch.running >= 0.2


@pytest.mark.smoke
@pytest.mark.parametrize("ends", [contextlib.nullcontext(), pytest.raises(OSError, match="full")])
def test_a_stopwatch_can_pause(ends):
    watch = sweep.Stopwatch()
    with ends as error, watch:
        time.sleep(0.1)
        with watch.paused():
            time.sleep(1)
            if error:
                raise OSError("full")
    assert 0.1 <= watch.running < 0.6


@pytest.mark.smoke
def test_a_trace_inside_another_counts_once():
    event, before = clock._COMPILING[0], clock._spent["seconds"]
    time.sleep(0.06)
    clock._listen(event, 0.02)
    clock._listen(event, 0.05)
    assert clock._spent["seconds"] - before == pytest.approx(0.05)


@pytest.mark.smoke
def test_networks_of_other_widths_have_rates_of_their_own():
    def of(module, shape=(32, 32, 3)):
        return rates.knowing(Classifier(module, MNIST_FAMILY.preprocess, shape))

    assert of(VGG16(10)) == of(VGG16(100)) == "posteriors of VGG16 on 32x32x3"
    assert of(VGG16(10, width=0.25)) == "posteriors of VGG16(width=0.25) on 32x32x3"
    own = LeNet(10, convolution=jax.lax.conv_general_dilated)
    said = "posteriors of LeNet(convolution=conv_general_dilated) on 28x28x1"
    assert of(own, (28, 28, 1)) == said


def test_a_plan_refuses_what_the_sweep_would(folder, tmp_path):
    config = replace(CONFIG, attacks=(replace(KNOCKOFF, budget=61),))
    with pytest.raises(InputError, match="budget is 61"):
        sweep.plan(config, tmp_path / "out", data_dir=folder)


def test_the_command_prints_a_table_or_json(tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    changes = (
        "tasks.dataset=embedded:mnist[:200,:60]",
        "tasks.queryset=embedded:fashion_mnist[:50]",
        "tasks.architecture=madjax.MLP",
        "attacks.budget=50",
        "attacks.architecture=madjax.MLP",
    )
    words = [word for each in changes for word in ("--set", each)]
    assert main(["plan", *words]) == 0
    said = capsys.readouterr().out.splitlines()
    assert [line.split("  ")[0] for line in said[:5]] == [
        "stage",
        "networks",
        "posteriors",
        "answers",
        "stolen models",
    ]
    assert said[-1].startswith("quickstart: 12 of 12 cells to run on")
    assert main(["plan", "--json", *words]) == 0
    found = json.loads(capsys.readouterr().out)
    assert (found["cells"], found["missing"], found["seconds"]) == (12, 12, None)
    assert found["stages"][0]["unit"] == "examples"
    assert not (tmp_path / "runs").exists()
    other = "--accelerators", "8", "--memory", "80", "--tflops", "80"
    assert main(["plan", *other, *words]) == 0
    said = capsys.readouterr().out.splitlines()[-1]
    assert "on 8 x accelerator at 80 TFLOP/s" in said
    assert "about 0 s and compiling" in said
    assert main(["plan", *other[:4], *words]) == 2
    assert "--tflops T: give all three" in capsys.readouterr().err
    for option in ("--memory", "--tflops"):
        for value in ("0", "-1", "inf", "nan"):
            with pytest.raises(SystemExit):
                main(["plan", option, value, *words])
            assert f"argument {option}: {value} is not a" in capsys.readouterr().err
    assert main(["plan", "--memory", "1e-4", *words]) == 0
    assert "on a device (which has 0.1 MB)" in capsys.readouterr().out
