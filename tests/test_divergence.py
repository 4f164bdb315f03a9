"""A network that diverged is never taken for a result: its top class would be class 0, always."""

import json
import math
from dataclasses import replace
from pathlib import Path

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from madjax import (
    MAD,
    AdaptiveKnockoff,
    Classifier,
    Defended,
    InputError,
    Knockoff,
    Online,
    Recipe,
    Sweep,
    Task,
    fit,
    jbda,
    report,
    steal,
    sweep,
)
from madjax.attacks import Transfer, check_transfer
from madjax.datasets import MNIST_FAMILY
from madjax.defenses import Custom, Owner
from madjax.objectives import angle_between
from madjax.private import PrivateGradient
from madjax.recipe import mean_gradient
from madjax.report import read_rows
from madjax.sweep.rows import after
from madjax.train import judge, percent, start


class Linear(nn.Module):
    num_classes: int

    @nn.compact
    def __call__(self, x):
        return nn.Dense(self.num_classes)(x.reshape(x.shape[0], -1))


WILD = 1e38
"""A learning rate at which two steps leave float32."""
FLAT = 7
"""The grey of one test image of `folder`."""
CLASSIFIER = Classifier(Linear(4), MNIST_FAMILY.preprocess, (6, 6, 1))
RECIPE = Recipe(epochs=3, batch_size=16)
BROKEN = replace(RECIPE, learning_rate=WILD)


def late(learning_rate, momentum, weight_decay):
    """SGD that goes well for four steps, which is one epoch of 64 images, and no longer."""
    del learning_rate, momentum, weight_decay
    return optax.sgd(lambda count: jnp.where(count < 4, 0.05, WILD))


@pytest.fixture(scope="module")
def images():
    rng = np.random.default_rng(0)
    return rng.integers(0, 256, (64, 6, 6, 1), dtype=np.uint8), np.arange(64) % 4


@pytest.fixture(scope="module")
def test(images):
    """All of class 0, which a network of NaN would hit each time."""
    return images[0], np.zeros(64, int)


KNOCKOFF = Knockoff(budget=40, architecture=Linear, recipe=RECIPE)
TASK = Task("tiny", "tiny", architecture=Linear, victim=RECIPE)
CONFIG = Sweep(
    name="tiny",
    tasks=(TASK,),
    defenses=(Defended(MAD(), (0.0, 0.99)),),
    seeds=(0, 1),
    attacks=(KNOCKOFF,),
)


def run(config, out, folder, **options):
    return sweep.run(config, out, data_dir=folder, log=lambda line: None, **options)


# --- one network ----------------------------------------------------------------------------------


@pytest.mark.parametrize("gradient", [mean_gradient, PrivateGradient(0.0, clip=1e9)])
def test_the_accuracy_of_a_diverged_network_is_none(images, test, gradient):
    recipe = replace(BROKEN, epochs=2, gradient=gradient)
    state = fit(CLASSIFIER, recipe, jax.random.key(0), images, test)
    assert np.isnan(state.accuracy).all()


def test_the_accuracy_is_lost_from_the_epoch_on_that_diverges(images, test):
    recipe = replace(RECIPE, optimizer=late)
    states = []
    fit(CLASSIFIER, recipe, jax.random.key(0), images, test, after_epoch=states.append)
    assert np.isfinite(states[0].accuracy).tolist() == [True, False, False]
    assert np.isneginf(states[0].accuracy).tolist() == [False, True, True], "not yet run"
    assert np.isnan(states[-1].accuracy).tolist() == [False, True, True]


@pytest.mark.parametrize("loss", [math.inf, math.nan])
def test_a_loss_that_was_not_finite_once_stays_so(images, loss):
    """The parameters are finite again, or still."""
    state = start(CLASSIFIER, RECIPE, 64, jax.random.key(0))
    state = state._replace(epoch=jnp.int32(2), loss=jnp.array([loss, 1.0, -jnp.inf]))
    assert np.isnan(judge(CLASSIFIER, state, *images).accuracy[1])
    sound = judge(CLASSIFIER, state._replace(loss=jnp.array([1.0, 1.0, -jnp.inf])), *images)
    assert np.isfinite(sound.accuracy[1])


def test_a_network_whose_logits_are_nan_on_the_test_set_alone_has_no_accuracy(images):
    def preprocess(x):  # a normalisation that fails for one image
        return jnp.where((x == 255).all((1, 2, 3), keepdims=True), jnp.nan, x / 255)

    x_test = images[0].copy()
    x_test[3] = 255
    classifier = Classifier(Linear(4), preprocess, (6, 6, 1))
    state = fit(classifier, RECIPE, jax.random.key(0), images, (x_test, images[1]))
    assert np.isfinite(state.loss).all()
    assert np.isnan(state.accuracy).all()


@pytest.mark.parametrize("n", [3, 30, 41, 300, 2_000, 10_000, 123_457])
def test_all_hits_are_exactly_100_percent(n):
    assert jax.jit(lambda: percent(jnp.ones(n, bool)))() == 100
    assert percent(jnp.ones(n, bool)) == 100
    np.testing.assert_allclose(percent(jnp.arange(n) % 3 == 0), 100 * -(-n // 3) / n, rtol=1e-6)


@pytest.mark.parametrize("bad", [jnp.nan, jnp.inf])
def test_the_angle_to_a_gradient_that_is_not_finite_is_none(bad):
    good, broken = {"w": jnp.ones(3)}, {"w": jnp.array([1.0, bad, 0.0])}
    assert np.isnan(angle_between(good, broken))
    assert np.isnan(angle_between(broken, good))


# --- what the owner trains ------------------------------------------------------------------------


def test_a_victim_that_diverges_is_an_error_that_names_the_learning_rate(folder, tmp_path):
    config = replace(CONFIG, tasks=(replace(TASK, victim=BROKEN),))
    for resume in (False, True):
        with pytest.raises(InputError, match=r"the victim diverged .*learning_rate is 1e\+38"):
            run(config, tmp_path / "out", folder, resume=resume)
    assert not list(tmp_path.glob("out/checkpoints/*")), "what is broken is not kept"
    assert not (tmp_path / "out" / "rows.jsonl").exists()


def test_a_victim_that_diverges_late_is_an_error_at_that_epoch(folder, tmp_path):
    config = replace(CONFIG, tasks=(replace(TASK, victim=replace(RECIPE, optimizer=late)),))
    with pytest.raises(InputError, match="the victim diverged within 2 of 3 epochs"):
        run(config, tmp_path, folder)


def test_any_network_that_a_defence_trains_must_converge(images):
    owner = Owner(CLASSIFIER, BROKEN, jax.random.key(0), images, images)
    with pytest.raises(InputError, match="the surrogate diverged"):
        MAD(surrogate_epochs=1).prepare(owner, jax.random.key(1))


# --- stolen models --------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def mixed(folder, tmp_path_factory):
    """Two attacks on one victim: the second's stolen models diverge in their second epoch."""
    wild = replace(
        KNOCKOFF, variant="wild", budget=60, recipe=replace(RECIPE, epochs=2, optimizer=late)
    )
    out = tmp_path_factory.mktemp("runs") / "mixed"
    lines = []
    config = replace(CONFIG, attacks=(KNOCKOFF, wild))
    rows = sweep.run(config, out, data_dir=folder, log=lines.append)
    return out, rows, lines


def test_a_stolen_model_that_diverges_has_no_accuracy_and_says_so(mixed):
    out, rows, lines = mixed
    assert read_rows(out) == rows
    for row in rows:
        wild = row["variant"] == "wild"
        assert row["status"] == ("diverged" if wild else "ok")
        known = [value is not None for value in row["attacker_accuracies"]]
        assert known == ([True, False] if wild else [True] * 3)
        assert (row["attacker_accuracy"] is None) == wild
        best = max(value for value in row["attacker_accuracies"] if value is not None)
        assert row["attacker_accuracy_best"] == best
        assert len(row["attacker_losses"]) == row["epochs"]
        assert row["defender_accuracy"] is not None
    assert sum("attacker diverged" in line for line in lines) == 4


def test_the_report_leaves_out_what_diverged_and_counts_it(mixed):
    out, rows, _ = mixed
    text = report.write_report(out)
    assert "4 of 8 cells diverged" in text
    wild = text.split("(wild)")[1]
    assert "| 0 (2 diverged) |" in wild
    assert "- ± -" in wild.splitlines()[4]
    sound = [row for row in rows if row["status"] == "ok"]
    assert report.table(sound).split("###")[1].strip() == text.split("###")[1].strip()
    assert (out / "tradeoff.png").exists()


def test_a_stolen_model_that_diverges_at_once_has_no_best_epoch(folder, tmp_path):
    config = replace(CONFIG, seeds=(0,), attacks=(replace(KNOCKOFF, recipe=BROKEN),))
    rows = run(config, tmp_path, folder)
    for row in rows:
        assert row["status"] == "diverged"
        assert row["attacker_accuracies"] == [None] * 3
        assert row["attacker_losses"][-1] is None
        assert row["attacker_accuracy"] is None
        assert row["attacker_accuracy_best"] is None
    assert "2 of 2 cells diverged" in report.write_report(tmp_path)
    assert not list(tmp_path.glob("*.png")), "there is nothing to draw"
    with pytest.raises(InputError, match="all 2 stolen models diverged"):
        report.figure(rows)


@pytest.mark.parametrize(
    ("accuracy", "loss", "status", "best"),
    [
        ([50.0, 60.0], [1.0, 0.5], "ok", 60),
        ([50.0, 60.0], [13.8, 13.8], "ok", 60),  # 10 log 4 is 13.86
        ([50.0, 60.0], [1.0, 14.0], "diverged", 50),
        ([90.0, 60.0], [1e9, 0.5], "ok", 60),
        ([50.0, math.nan], [1.0, math.nan], "diverged", 50),
        ([math.nan, math.nan], [math.inf, 1.0], "diverged", None),
    ],
)
def test_a_loss_far_above_that_of_a_uniform_answer_is_no_training(accuracy, loss, status, best):
    """Weights of 1e30 are finite, and such a model answers one class."""
    row = after(np.array(accuracy), np.array(loss), 4)
    assert row["status"] == status
    assert row["attacker_accuracy_best"] == best
    lost = [not (a > 0 and x <= 13.86) for a, x in zip(accuracy, loss, strict=True)]
    assert [value is None for value in row["attacker_accuracies"]] == lost


def test_a_finite_model_that_learnt_nothing_of_a_wild_step_has_diverged(folder, tmp_path):
    config = replace(CONFIG, seeds=(0,), attacks=(replace(KNOCKOFF, recipe=BLOWN),))
    rows = run(config, tmp_path, folder)
    for row in rows:
        assert row["attacker_losses"][-1] > 1e6
        assert row["status"] == "diverged"
        assert row["attacker_accuracy"] is None


BLOWN = replace(RECIPE, learning_rate=1e8)


def test_steal_gives_a_diverged_model_no_accuracy(images):
    def victim(numbers, x):
        return jnp.full((len(x), 4), 0.25) + 0.1 * jax.nn.one_hot(numbers % 4, 4)

    attack = replace(KNOCKOFF, recipe=BROKEN)
    _, state = steal(attack, 0, victim, *images, CLASSIFIER, MNIST_FAMILY, images)
    assert np.isnan(state.accuracy).all()


SUBSTITUTE = {"budget": 30, "architecture": Linear, "recipe": RECIPE}


@pytest.mark.slow
def test_a_substitute_that_diverges_loses_its_own_cells_alone(folder, tmp_path):
    """Its queries are NaN: no other attack of the grid is stopped by that."""
    broken = jbda(seeds=10, substitute=replace(BROKEN, epochs=1), **SUBSTITUTE)
    config = replace(CONFIG, seeds=(0,), attacks=(broken, KNOCKOFF))
    rows = run(config, tmp_path, folder)
    by_attack = {(row["attack"], row["status"]) for row in rows}
    assert by_attack == {("jbda", "diverged"), ("knockoff", "ok")}
    assert all(row["attacker_accuracy"] is None for row in rows if row["attack"] == "jbda")


@pytest.mark.slow
def test_a_scratch_network_that_diverges_costs_a_bandit_its_rewards_only(folder, tmp_path):
    """The adaptive attacker chooses badly, and trains a sound model on what it chose."""
    broken = AdaptiveKnockoff(online=replace(BROKEN, epochs=1), **SUBSTITUTE)
    rows = run(replace(CONFIG, seeds=(0,), attacks=(broken,)), tmp_path, folder)
    assert {row["status"] for row in rows} == {"ok"}


def test_an_online_attacker_that_diverges_has_no_accuracy(folder, tmp_path):
    online = Online(
        budget=64, images=20, every=32, judged=20, architecture=Linear, recipe=Recipe(batch_size=1)
    )
    wild = replace(online, variant="wild", recipe=Recipe(batch_size=1, learning_rate=WILD))
    config = replace(CONFIG, seeds=(0,), attacks=(online, wild))
    rows = run(config, tmp_path, folder)
    for row in rows:
        lost = row["variant"] == "wild"
        assert row["status"] == ("diverged" if lost else "ok")
        assert [value is None for value in row["attacker_accuracies"]] == [lost] * 2
        assert (row["angle_mean"] is None) == (row["test_loss"] is None) == lost
    text = report.write_report(tmp_path)
    assert "2 of 4 cells diverged" in text
    assert (tmp_path / "angles.png").exists()
    assert (tmp_path / "course.png").exists()


# --- defences -------------------------------------------------------------------------------------


def rotten(key, x, y, strength):
    return jnp.where(strength < 0.5, y, jnp.nan)


def odd(key, x, y, strength):
    return jnp.where((x == FLAT).all(), jnp.nan, y)


def test_a_defence_that_answers_nan_is_an_error_that_names_it(folder, tmp_path):
    defended = Defended(Custom(rotten, title="rotten"), (0.0, 0.2, 0.99))
    config = replace(CONFIG, defenses=(defended,))
    with pytest.raises(InputError, match=r"rotten answers NaN .* strength 0\.99, seed 0"):
        run(config, tmp_path / "asked", folder)
    online = Online(budget=8, images=20, every=8, judged=20, architecture=Linear)
    with pytest.raises(InputError, match="rotten answers NaN on the test set at strength"):
        run(replace(config, attacks=(online,)), tmp_path / "online", folder)
    config = replace(CONFIG, defenses=(Defended(Custom(odd, title="odd"), (0.99,)),))
    with pytest.raises(InputError, match=r"odd answers NaN .* strength 0\.99, seed 0"):
        run(config, tmp_path / "judged", folder)


def test_unanswered_examples_are_the_attacks_fault_and_nan_the_victims():
    x, asked = jnp.zeros((40, 2, 2, 1)), jnp.int32(40)
    good = jnp.full((40, 4), 0.25)
    check_transfer(KNOCKOFF, Transfer(x, good, asked))
    with pytest.raises(InputError, match="examples without an answer"):
        check_transfer(KNOCKOFF, Transfer(x, good.at[3].set(-jnp.inf), asked))
    nan = good.at[3].set(jnp.nan)
    with pytest.raises(InputError, match="the defended victim answers NaN"):
        check_transfer(KNOCKOFF, Transfer(x, nan, asked))
    check_transfer(KNOCKOFF, Transfer(x.at[3].set(jnp.nan), nan, asked))
    with pytest.raises(InputError, match="the defended victim answers NaN"):
        check_transfer(KNOCKOFF, Transfer(jnp.arange(40), nan, asked))


# --- reports --------------------------------------------------------------------------------------


ROWS = Path(__file__).parents[1] / "experiments" / "results" / "quickstart" / "rows.jsonl"


def test_one_diverged_seed_is_in_no_mean():
    base = read_rows(ROWS.parent)[0]
    rows = [
        base | {"seed": 0, "attacker_accuracy": 90.0, "status": "ok"},
        base | {"seed": 1, "attacker_accuracy": 80.0},
        base | {"seed": 2, "attacker_accuracy": None, "status": "diverged"},
    ]
    (point,) = report.summarise(rows)
    assert (point.n, point.diverged) == (2, 1)
    assert point.attacker_accuracy.mean == 85.0
    title = report.figure(rows).axes[0].get_title(loc="right")
    assert "1 diverged" in title


def test_a_null_accuracy_needs_a_reason(tmp_path):
    line = ROWS.read_text().splitlines()[0]
    row = json.loads(line) | {"attacker_accuracy": None}
    (tmp_path / "rows.jsonl").write_text(json.dumps(row) + "\n")
    with pytest.raises(InputError, match="attacker_accuracy is None"):
        read_rows(tmp_path)
    (tmp_path / "rows.jsonl").write_text(json.dumps(row | {"status": "diverged"}) + "\n")
    assert len(read_rows(tmp_path)) == 1
