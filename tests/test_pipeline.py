"""The rows of a sweep, against the same attacks one by one through the public functions."""

from dataclasses import replace
from functools import partial

import jax
import numpy as np
import pytest

from madjax import (
    MAD,
    AdaptiveKnockoff,
    Classifier,
    Defended,
    Knockoff,
    RandomNoise,
    Recipe,
    Sweep,
    Task,
    fit,
    jbtop,
    open_dataset,
    steal,
    sweep,
    top_label,
)
from madjax.attacks import crop_and_flip, keys
from madjax.defenses import Owner, as_function, prediction_api
from madjax.sweep.victim import VICTIM
from tests.networks import Linear

RECIPE = Recipe(epochs=2, batch_size=16, learning_rate=0.3)
SETTINGS = {"budget": 30, "architecture": Linear, "recipe": RECIPE}
JACOBIAN = SETTINGS | {"seeds": 10, "substitute": replace(RECIPE, epochs=1)}
CROPPED = {"repeats": 3, "augment": partial(crop_and_flip, pad=2)}
FORESEEN = (Knockoff(**SETTINGS), Knockoff(variant="nquery", repeats=3, **SETTINGS))
ASKING = (
    Knockoff(variant="nquery+aug", targets=top_label, **CROPPED, **SETTINGS),
    AdaptiveKnockoff(online=replace(RECIPE, epochs=1, decay_epochs=0), **SETTINGS),
    jbtop(2, kappa=5, sigma=0, **JACOBIAN),
)
TASK = Task(
    "victims",
    "queries",
    query_splits=("test", "train"),
    architecture=Linear,
    victim=replace(RECIPE, epochs=3),
)
DEFENSES = {
    "MAD": (Defended(MAD(), (0.9,)), ASKING),
    # Its answers depend on the number of the query, so that the order of queries shows.
    "noise": (Defended(RandomNoise(), (4.0,)), FORESEEN),
}


@pytest.fixture(scope="module")
def data_dir(tmp_path_factory):
    """Two sets of different images and sizes, with labels that a linear network can learn."""
    folder = tmp_path_factory.mktemp("data")
    for at, (name, train) in enumerate((("victims", 80), ("queries", 70))):
        rng = np.random.default_rng(at)
        y = rng.integers(0, 4, train + 400)
        x = rng.integers(0, 200, (len(y), 6, 6)) + 30 * (np.arange(6) == y[:, None])[:, None]
        parts = {"train": slice(train), "test": slice(train, None)}
        arrays = {f"x_{part}": x[at].astype(np.uint8) for part, at in parts.items()}
        np.savez(folder / f"{name}.npz", **arrays, **{f"y_{p}": y[at] for p, at in parts.items()})
    return folder


@pytest.fixture(scope="module", params=DEFENSES)
def swept(request, data_dir, tmp_path_factory):
    """A defence, its attacks and the rows of their sweep."""
    defended, attacks = DEFENSES[request.param]
    config = Sweep("pipeline", (TASK,), (defended,), attacks, seeds=(0, 1))
    out = tmp_path_factory.mktemp("runs") / "out"
    return defended, attacks, sweep.run(config, out, data_dir=data_dir, log=lambda line: None)


@pytest.mark.smoke
def test_rows_are_those_of_single_attacks(swept, data_dir):
    """Every image, answer and label of the compiled grid is where it belongs."""
    defended, attacks, rows = swept
    defense, (strength,) = defended.rule, defended.strengths
    data, queries = (open_dataset(name, data_dir) for name in (TASK.dataset, TASK.queryset))
    network = Classifier(Linear(4), data.family.preprocess, data.image_shape)
    victim_key = jax.random.fold_in(jax.random.key(TASK.victim_seed), VICTIM)
    train, test = (data.x_train, data.y_train), (data.x_test, data.y_test)
    victim = fit(network, TASK.victim, victim_key, train, test).params
    drawn = (queries.x_test, queries.x_train), (queries.y_test, queries.y_train)
    own = {"queryset": tuple(map(np.concatenate, drawn)), "dataset": train}
    said = {"queryset": ("queries", ["test", "train"]), "dataset": ("victims", ["train"])}
    seed = 1
    key = keys(seed)
    known = defense.prepare(Owner(network, TASK.victim, victim_key, train, test), key["surrogate"])
    respond = prediction_api(defense, network, victim, known, key["defense"], strength)
    y = network.posterior(victim, data.x_test)
    defend = as_function(defense, network.apply, known, strength)
    y_tilde = defend(key["defense"], data.x_test, y)
    for attack in attacks:
        label = attack.label, defense.name
        transfer, state = steal(
            attack, seed, respond, *own[attack.source], network, data.family, test
        )
        (row,) = (
            r
            for r in rows
            if (r["attack"], r["variant"]) == tuple(attack.describe().values())[:2]
            and r["seed"] == seed
        )
        np.testing.assert_allclose(row["attacker_losses"], state.loss, rtol=1e-4, err_msg=label)
        # One test image of 400 may lie on the border between two classes.
        np.testing.assert_allclose(row["attacker_accuracies"], state.accuracy, atol=0.26)
        assert row["queries"] == int(transfer.asked) == attack.budget
        assert row["examples"] == len(transfer.targets)
        assert (row["queryset"], row["query_splits"]) == said[attack.source]
        top = 100 * np.mean(y_tilde.argmax(1) == data.y_test)
        np.testing.assert_allclose(row["defender_accuracy"], top, atol=0.26)
        np.testing.assert_allclose(row["l1_mean"], abs(y_tilde - y).sum(1).mean(), rtol=1e-4)
        assert row["l1_mean"] > 0.1
