"""Cells of the grid: which there are, and what tells each from every other."""

import json
import math
from dataclasses import asdict, replace
from functools import partial

import numpy as np
import pytest

from madjax import (
    MAD,
    MLP,
    Ascend,
    Defended,
    Knockoff,
    LineSearch,
    NoDefense,
    Recipe,
    Sweep,
    Task,
    jbda,
    l2,
    sweep,
    top_label,
)
from madjax.constraints import keep_label
from madjax.private import PrivateGradient
from madjax.recipe import adam
from madjax.report.points import RECIPE, curve_of
from madjax.sweep.rows import plain, which

pytestmark = pytest.mark.smoke

TASK = Task("mnist", "letters")
CELL = sweep.Cell(TASK, MAD(), 0.5, Knockoff(budget=100), 100, 3)
SUMS = {"dataset": 1, "queryset": 2}


def test_the_grid_is_the_product_of_its_axes():
    other = replace(TASK, victim_seed=1)
    none, mad = NoDefense(), MAD()
    config = Sweep(
        "s",
        (TASK, other),
        (Defended(none), Defended(mad, (0.5, 0.9))),
        (replace(CELL.attack, budget=200), jbda(budget=300)),
        (150, 200),
        (0, 1),
    )
    cells = sweep.expand(config)
    want = {
        (task, rule, strength, attack, budget, seed)
        for task in (TASK, other)
        for rule, strength in ((none, 0.0), (mad, 0.5), (mad, 0.9))
        for attack, budgets in zip(config.attacks, ((150, 200), (150, 200, 300)), strict=True)
        for budget in budgets
        for seed in (0, 1)
    }
    found = [(c.task, c.rule, c.strength, c.attack, c.budget, c.seed) for c in cells]
    assert len(found) == len(set(found)) == len(want)
    assert set(found) == want


CHANGES = {
    "data set": {"task": replace(TASK, dataset="mnist[:5]")},
    "query set": {"task": replace(TASK, queryset="mnist")},
    "splits": {"task": replace(TASK, query_splits=("test",))},
    "network": {"task": replace(TASK, architecture=MLP)},
    "victim": {"task": replace(TASK, victim=Recipe(epochs=3))},
    "victim seed": {"task": replace(TASK, victim_seed=1)},
    "rule": {"rule": NoDefense()},
    "layers": {"rule": MAD(layers="last")},
    "solver": {"rule": MAD(solver=Ascend())},
    "distance": {"rule": MAD(solver=LineSearch(distance=l2))},
    "margin": {"rule": MAD(solver=Ascend(constraints=(partial(keep_label, margin=0.1),)))},
    "another margin": {"rule": MAD(solver=Ascend(constraints=(partial(keep_label, margin=0.2),)))},
    "surrogate": {"rule": MAD(surrogate_epochs=1)},
    "strength": {"strength": 0.5000001},
    "attack": {"attack": jbda(budget=100)},
    "targets": {"attack": replace(CELL.attack, targets=top_label)},
    "recipe": {"attack": replace(CELL.attack, recipe=Recipe(learning_rate=0.2))},
    "queries": {"attack": replace(CELL.attack, budget=200)},
    "budget": {"budget": 50},
    "seed": {"seed": 4},
}


def test_an_id_changes_with_all_that_determines_a_cell():
    cells = [CELL, *(replace(CELL, **change) for change in CHANGES.values())]
    ids = [sweep.cell_id(cell, SUMS) for cell in cells]
    ids += [sweep.cell_id(CELL, SUMS | {name: 9}) for name in SUMS]
    assert len(set(ids)) == len(CHANGES) + 3
    assert all(len(name) == 12 for name in ids)


DIGESTS = {f"{part}_settings" for part in ("task", "defense", "attack")}


@pytest.mark.parametrize("name", CHANGES)
def test_a_row_says_the_settings_in_which_its_cell_differs(name):
    """And so it is of a curve of its own, but where seed or strength differ."""
    old, new = which(CELL, SUMS), which(replace(CELL, **CHANGES[name]), SUMS)
    (part,) = CHANGES[name]
    kind = {"task": "task", "rule": "defense", "attack": "attack"}.get(part)
    changed = {field for field in DIGESTS if old[field] != new[field]}
    assert changed == ({f"{kind}_settings"} if kind and name != "victim seed" else set())
    one_curve = name in ("seed", "victim seed", "strength")
    assert (curve_of(old) == curve_of(new)) == one_curve
    assert old != new


def test_rows_of_other_data_of_one_name_are_of_another_curve():
    old, new = which(CELL, SUMS), which(CELL, SUMS | {"queryset": 9})
    assert {name for name in old if old[name] != new[name]} == {"task_settings"}
    assert curve_of(old) != curve_of(new)


def test_a_row_is_as_json_has_it():
    row = {"a": np.float32(0.5), "b": [np.int64(3), math.inf], "c": {"d": -math.inf}, "e": "x"}
    assert json.dumps(plain(row | {"f": None, "g": (1, True)}), allow_nan=False) == (
        '{"a": 0.5, "b": [3, null], "c": {"d": null}, "e": "x", "f": null, "g": [1, true]}'
    )


def test_a_row_holds_both_recipes():
    victim = Recipe(epochs=3, gradient=PrivateGradient(1.0))
    attacker = Recipe(learning_rate=0.2, decay_epochs=7, optimizer=adam)
    attack = replace(CELL.attack, recipe=attacker)
    row = which(replace(CELL, task=replace(TASK, victim=victim), attack=attack), SUMS)
    for prefix, recipe, named in (
        ("victim_", victim, {"optimizer": "sgd", "gradient": "PrivateGradient"}),
        ("", attacker, {"optimizer": "adam", "gradient": "mean_gradient"}),
    ):
        said = {name: row[prefix + name] for name in asdict(recipe)}
        assert said == asdict(recipe) | named
    json.dumps(row)
    assert set(RECIPE) == set(asdict(victim)), "fields by which reports tell curves apart"


def test_equal_cells_have_equal_ids_in_any_process():
    """The digits are pinned: where they change, runs of before cannot be gone on with."""
    made = sweep.Cell(Task("mnist", "letters"), MAD(), 0.5, Knockoff(budget=100), 100, 3)
    assert sweep.cell_id(made, SUMS) == sweep.cell_id(CELL, SUMS) == "c6c9780ef582"
