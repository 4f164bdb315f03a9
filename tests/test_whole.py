"""Whole commands: the grid of two tasks, killed at random and run twice at once."""

import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path
from tempfile import gettempdir

import jax
import numpy as np
import pytest

from madjax import (
    MAD,
    Classifier,
    Defended,
    Knockoff,
    LeNet,
    NoDefense,
    Recipe,
    Sweep,
    Task,
    fit,
    jbda,
    open_dataset,
    steal,
)
from madjax.attacks import keys
from madjax.defenses import Owner, as_function, prediction_api
from madjax.report import read_rows
from madjax.sweep.victim import VICTIM

pytestmark = [pytest.mark.slow, pytest.mark.timeout(1800)]

RECIPE = Recipe(epochs=2, batch_size=32)


def whole():
    """Two tasks x three defences at strengths of their own x two attacks x two seeds."""
    mnist, settings = "embedded:mnist[:600,:1000]", {"budget": 120, "recipe": RECIPE}
    return Sweep(
        "whole",
        (
            Task(mnist, "embedded:fashion_mnist[:600]", victim=RECIPE),
            Task(mnist, "embedded:mnist[:600]", victim=RECIPE, victim_seed=1),
        ),
        (
            Defended(NoDefense()),
            Defended(MAD(layers="last"), (0.5, 0.99, 1.5)),
            Defended(MAD(layers="all"), (0.99,)),
        ),
        (
            Knockoff(**settings),
            jbda(seeds=30, substitute=RECIPE, **settings),
        ),
        seeds=(0, 1),
    )


def few():
    """The same with less of everything, for what is run many times."""
    config = whole()
    return Sweep(
        "few",
        config.tasks,
        (Defended(MAD(layers="last"), (0.5, 0.99)),),
        config.attacks,
        budgets=(60,),
        seeds=(0,),
    )


def command(config, out, cache, *options, devices=2):
    """A `madjax sweep` under way."""
    file = out.with_name(f"{config}.py")
    file.write_text(f"from tests.test_whole import {config} as config\n")
    words = ["-m", "madjax", "sweep", str(file), "--out", str(out), *options]
    settings = {
        "MADJAX_CACHE": str(cache),
        "JAX_NUM_CPU_DEVICES": str(devices),
        # Else a command that is soon killed does little but compile.
        "JAX_COMPILATION_CACHE_DIR": str(Path(gettempdir()) / f"madjax-compiled-{os.getuid()}"),
        "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
    }
    with open(f"{out}.log", "a") as log:
        return subprocess.Popen(
            [sys.executable, *words],
            cwd=Path(__file__).parents[1],
            env=os.environ | settings,
            stdout=log,
            stderr=log,
        )


def rows_of(out):
    """By id; none twice."""
    rows = read_rows(out)
    by_id = {row["id"]: row for row in rows}
    assert len(by_id) == len(rows)
    return by_id


def assert_same(found, want):
    """The same cells with the same results, to rounding errors of other devices."""
    assert set(found) == set(want)
    for name, row in want.items():
        for field in ("attacker_accuracy", "attacker_fidelity", "defender_accuracy"):
            np.testing.assert_allclose(found[name][field], row[field], atol=0.11, err_msg=name)
        assert found[name]["queries"] == row["queries"]


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory):
    out = tmp_path_factory.mktemp("runs") / "few"
    assert command("few", out, "").wait() == 0
    return rows_of(out)


def took(*run):
    """Seconds of a whole command."""
    began = time.monotonic()
    assert command(*run).wait() == 0
    return time.monotonic() - began


@pytest.mark.parametrize("cached", [True, False], ids=["cache", "no cache"])
def test_six_kills_at_random_moments_lose_no_row_and_double_none(undisturbed, tmp_path, cached):
    out, kept, rng = tmp_path / "few", tmp_path / "cache" if cached else "", random.Random(cached)
    whole_time = took("few", tmp_path / "timed", "")
    start = took("few", tmp_path / "timed", "", "--resume")  # what a command takes that has no work
    kills, resume = [], []
    while len(kills) < 6:
        under_way = command("few", out, kept, *resume)
        try:
            under_way.wait(start + rng.uniform(0, 0.8) * (whole_time - start))
        except subprocess.TimeoutExpired:
            under_way.kill()
            assert under_way.wait() == -signal.SIGKILL
            resume = ["--resume"] if (out / "config.json").is_file() else []
            kills.append(len(rows_of(out)) if (out / "rows.jsonl").is_file() else 0)
        else:
            break
    print(f"rows at each kill, of {len(undisturbed)}: {kills}")
    assert kills
    if resume:
        assert command("few", out, kept, *resume).wait() == 0
    assert_same(rows_of(out), undisturbed)
    assert not list((out / "checkpoints").glob("attack-*"))


def test_two_commands_at_once_in_one_directory(undisturbed, tmp_path):
    """One does all of it, and the other is refused in one line."""
    out = tmp_path / "few"
    both = [command("few", out, tmp_path / "cache") for _ in range(2)]
    assert sorted(each.wait() for each in both) == [0, 2]
    said = (tmp_path / "few.log").read_text()
    assert "another command is at work in" in said or "already holds a run" in said
    assert_same(rows_of(out), undisturbed)


def test_two_commands_at_once_with_one_cache(undisturbed, tmp_path):
    """What both need is made by one of them."""
    both = [command("few", tmp_path / name, tmp_path / "cache") for name in ("a", "b")]
    assert [each.wait() for each in both] == [0, 0]
    said = "".join((tmp_path / f"{name}.log").read_text() for name in ("a", "b"))
    assert said.count("victim: LeNet") == 2  # one for each task
    for name in ("a", "b"):
        assert_same(rows_of(tmp_path / name), undisturbed)


def plain(config):
    """The rows of a config by a loop over public functions, nothing shared: {what: row}."""
    found = {}
    for task in config.tasks:
        data, queries = open_dataset(task.dataset), open_dataset(task.queryset)
        network = Classifier(LeNet(10), data.family.preprocess, data.image_shape)
        key = jax.random.fold_in(jax.random.key(task.victim_seed), VICTIM)
        train, test = (data.x_train, data.y_train), (data.x_test, data.y_test)
        victim = fit(network, task.victim, key, train, test).params
        own = {"queryset": (queries.x_train, queries.y_train), "dataset": train}
        y = network.posterior(victim, data.x_test)
        for rule, strength, seed in (
            (each.rule, strength, seed)
            for each in config.defenses
            for strength in each.strengths
            for seed in config.seeds
        ):
            drawn = keys(seed)
            known = rule.prepare(Owner(network, task.victim, key, train, test), drawn["surrogate"])
            defended = as_function(rule, network.apply, known, strength)
            y_tilde = defended(drawn["defense"], data.x_test, y)
            respond = prediction_api(rule, network, victim, known, drawn["defense"], strength)
            for attack in config.attacks:
                to = own[attack.source]
                _, state = steal(attack, seed, respond, *to, network, data.family, test)
                agree = network.apply(state.params, data.x_test).argmax(1) == y.argmax(1)
                layers = rule.describe()["layers"]
                found[task.victim_seed, rule.name, layers, strength, attack.name, seed] = {
                    "attacker_accuracy": float(state.accuracy[-1]),
                    "attacker_fidelity": 100 * float(agree.mean()),
                    "defender_accuracy": 100 * float((y_tilde.argmax(1) == data.y_test).mean()),
                    "queries": attack.budget,
                }
    return found


def test_the_grid_of_two_tasks_in_one_command_is_a_plain_loop(tmp_path):
    """On one device and on four; an image in a thousand may lie on a border."""
    want = plain(whole())
    assert len(want) == 2 * 5 * 2 * 2
    for devices in (1, 4):
        out = tmp_path / str(devices)
        assert command("whole", out, "", devices=devices).wait() == 0
        fields = "victim_seed", "defense", "layers", "strength", "attack", "seed"
        found = {tuple(row[f] for f in fields): row for row in rows_of(out).values()}
        assert_same(found, want)
