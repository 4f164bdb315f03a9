"""White-box mode: every step of an online attacker against a plain Python loop."""

from dataclasses import replace
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import madjax
from madjax import (
    MAD,
    MLP,
    Classifier,
    Defended,
    InputError,
    Knockoff,
    LineSearch,
    Online,
    Recipe,
    ReverseSigmoid,
    Sweep,
    Task,
    argmax_preserving,
    report,
    sweep,
    top_label,
)
from madjax.attacks import keys
from madjax.attacks.online import begin, lap
from madjax.cli import main
from madjax.datasets import MNIST_FAMILY
from madjax.defenses import answers
from madjax.objectives import angle_between
from madjax.private import PrivateGradient
from madjax.recipe import adam, cross_entropy

# --- the angle ------------------------------------------------------------------------------------


@pytest.mark.parametrize("degrees", [0, 1e-3, 30, 90, 150, 179.999, 180])
def test_the_angle_between_two_pytrees_is_that_of_plane_geometry(degrees):
    turn = np.radians(degrees)
    a = {"w": jnp.array([[3.0, 0.0]]), "b": jnp.zeros(2)}
    u = {"w": jnp.array([[0.5 * np.cos(turn), 0.0]]), "b": jnp.array([0, 0.5 * np.sin(turn)])}
    u = jax.tree.map(lambda leaf: leaf.astype(jnp.float32), u)
    np.testing.assert_allclose(angle_between(a, u), degrees, atol=2e-5)


@pytest.mark.parametrize(("a", "u"), [(0, 1), (1, 0), (0, 0)])
def test_the_angle_to_a_vanishing_gradient_is_zero(a, u):
    assert angle_between(a * jnp.ones(3), u * jnp.ones(3)) == 0


@settings(deadline=None, max_examples=25)
@given(seed=st.integers(0, 2**31), scale=st.floats(1e-30, 1e30))
def test_the_angle_does_not_change_with_the_lengths(seed, scale):
    a, u = jax.random.normal(jax.random.key(seed), (2, 50))
    np.testing.assert_allclose(angle_between(a, u), angle_between(scale * a, u), atol=1e-3)


# --- the attacker ---------------------------------------------------------------------------------


CLASSIFIER = Classifier(MLP(4, (7,)), MNIST_FAMILY.preprocess, (3, 3, 1))


@jax.jit
def gradient(params, x, targets):
    return jax.value_and_grad(
        lambda params: cross_entropy(CLASSIFIER.apply(params, x), targets).mean()
    )(params)


@partial(jax.jit, static_argnums=(0, 1))
def one_lap(attack, defense, state, images, surrogate, key, epsilon):
    def respond(attacker, numbers, x, y):
        known = attacker if attack.refresh else surrogate
        evidence = defense.evidence(CLASSIFIER.apply, known, x)
        return answers(defense, key, x, y, evidence, epsilon, numbers)

    distance = getattr(defense, "distance", madjax.l1)
    return lap(attack, CLASSIFIER, state, images, respond, distance)


class World:
    """A victim, images, and an online attacker in two ways."""

    def __init__(self, attack, defense, epsilon):
        self.attack, self.defense, self.epsilon = attack, defense, epsilon
        self.key = keys(1)
        drawn = jax.random.split(jax.random.key(0), 3)
        self.victim, self.surrogate = (CLASSIFIER.init(k) for k in drawn[:2])
        self.images = jax.random.randint(drawn[2], (40, 3, 3, 1), 0, 256).astype(jnp.uint8)

    def posterior(self, x):
        return jax.nn.softmax(3 * CLASSIFIER.apply(self.victim, x))

    def scanned(self):
        """The state after all laps."""
        state = begin(self.attack, CLASSIFIER, self.key, self.images, self.posterior)
        told = self.images, self.surrogate, self.key["defense"], self.epsilon
        for _ in range(self.attack.laps):
            state = one_lap(self.attack, self.defense, state, *told)
        return state

    def alone(self):
        """The same by `madjax.white_box`, which is told the order of the queries."""
        attack, recipe = self.attack, self.attack.recipe
        init_key, order_key = jax.random.split(self.key["train"])
        own = self.images[jax.random.permutation(self.key["draw"], 40)[: attack.images]]
        shape = (recipe.batch_size,)
        order = jnp.concatenate(
            [
                jax.random.randint(jax.random.fold_in(order_key, t), shape, 0, attack.images)
                for t in range(attack.steps)
            ]
        )
        options = {"layers": self.defense.layers, "solver": self.defense.solver}
        if attack.refresh:
            options["refresh"] = attack.refresh
        else:
            options["surrogate"] = CLASSIFIER.apply, self.surrogate
        if not recipe.is_plain:
            options["optimizer"] = optax.adam(recipe.learning_rate)
        return madjax.white_box(
            CLASSIFIER.apply,
            CLASSIFIER.init(init_key),
            own[order],
            self.posterior(own[order]),
            epsilon=self.epsilon,
            learning_rate=recipe.learning_rate,
            batch=recipe.batch_size,
            **options,
        )


ONLINE = Online(
    budget=24,
    images=15,
    every=10,
    recipe=Recipe(epochs=1, batch_size=1, learning_rate=0.3, momentum=0.0),
)
STALE = replace(ONLINE, refresh=2, recipe=replace(ONLINE.recipe, batch_size=3, learning_rate=4.0))


@pytest.mark.parametrize(
    ("attack", "defense", "epsilon"),
    [
        (ONLINE, MAD(layers="all"), 0.0),
        (ONLINE, MAD(layers="last", solver=LineSearch(argmax_preserving)), 0.7),
        (
            replace(ONLINE, recipe=replace(ONLINE.recipe, optimizer=adam, learning_rate=0.05)),
            MAD(layers="all"),
            0.7,
        ),
        (STALE, MAD(layers="all"), 1.5),
        (replace(ONLINE, refresh=0), MAD(layers="all"), 0.7),
    ],
    ids=["clean", "argmax", "adam", "stale", "black-box"],
)
def test_it_is_white_box_on_queries_drawn_at_random(attack, defense, epsilon):
    world = World(attack, defense, epsilon)
    state, (params, trace) = world.scanned(), world.alone()
    assert state.step == attack.steps
    close = partial(np.testing.assert_allclose, atol=2e-5)
    jax.tree.map(close, state.attacker.params, params)
    close(state.trace.distance_used, trace.distance)
    close(state.trace.loss, trace.loss, atol=1e-4)
    for field in ("angle", "batch_angle", "update_angle"):
        close(getattr(state.trace, field), getattr(trace, field), atol=0.05)
    assert (state.trace.angle.max() > 20) == (epsilon > 0)
    if attack.refresh > 1:
        live = World(replace(attack, refresh=1), defense, epsilon).scanned()
        assert jnp.abs(live.trace.angle - state.trace.angle).max() > 1


def test_the_attacker_trains_on_its_targets():
    """On top labels, whose angle to the posteriors is not 0 where the defence does nothing."""
    world = World(replace(ONLINE, targets=top_label), MAD(), 0.0)
    state = world.scanned()
    init_key, order_key = jax.random.split(world.key["train"])
    params = CLASSIFIER.init(init_key)
    own = world.images[jax.random.permutation(world.key["draw"], 40)[:15]]
    for t in range(24):
        at = jax.random.randint(jax.random.fold_in(order_key, t), (1,), 0, 15)
        x, y = own[at], world.posterior(own[at])
        (loss, poisoned), (_, true) = (gradient(params, x, t) for t in (top_label(y), y))
        np.testing.assert_allclose(state.trace.loss[t], loss, atol=1e-4)
        np.testing.assert_allclose(state.trace.angle[t], angle_between(poisoned, true), atol=0.2)
        params = jax.tree.map(lambda w, g: w - 0.3 * g, params, poisoned)
    assert state.trace.angle.min() > 1
    assert state.trace.distance_used.max() == 0


@pytest.mark.parametrize("every", [7, 100])
def test_the_length_of_a_lap_changes_nothing(every):
    whole, cut = (
        World(replace(ONLINE, every=n), MAD(layers="all"), 0.7).scanned() for n in (12, every)
    )
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-5), whole, cut)


def test_a_defence_without_a_surrogate_is_traced_too():
    state = World(ONLINE, ReverseSigmoid(gamma=0.5), 1.0).scanned()
    assert np.isfinite(state.trace.angle).all()
    assert state.trace.angle.max() > 1


@pytest.mark.parametrize(
    ("settings", "wrong"),
    [
        ({"images": 0}, "images of Online is 0"),
        (
            {"recipe": Recipe(gradient=PrivateGradient(1.0))},
            "recipe of Online has the gradient PrivateGradient",
        ),
        ({"every": 0}, "every of Online is 0"),
        ({"judged": 0}, "judged of Online is 0"),
        ({"refresh": -1}, "refresh of Online is -1"),
        ({"budget": 0}, "budget is 0"),
        ({"budget": 20, "recipe": Recipe(batch_size=7)}, "batches of 7"),
    ],
)
def test_bad_settings_are_named(settings, wrong):
    with pytest.raises(InputError, match=wrong):
        Online(**settings)


def test_it_has_one_budget_and_no_transfer_set():
    assert ONLINE.examples(24) == 15
    with pytest.raises(InputError, match="leave budgets empty"):
        ONLINE.examples(10)
    with pytest.raises(InputError, match="no transfer set"):
        ONLINE.begin(None)
    with pytest.raises(InputError, match="the query set holds 14"):
        ONLINE.check(14, 4, (3, 3, 1))


# --- in a sweep -----------------------------------------------------------------------------------


def small(num_classes):
    return MLP(num_classes, (6,))


STUDY = Sweep(
    name="study",
    tasks=(
        Task(
            "mnist",
            "letters",
            architecture=small,
            victim=Recipe(epochs=2, batch_size=16, learning_rate=0.1),
        ),
    ),
    defenses=(Defended(MAD(layers="all"), (0.0, 0.7, 2.0)),),
    seeds=(0, 1),
    attacks=(replace(ONLINE, architecture=small, judged=20),),
)
NOT_MEASURED = ("seconds", "seconds_compiling", "device", "git_commit")


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    folder = tmp_path_factory.mktemp("data")
    rng = np.random.default_rng(0)
    for name, n in (("mnist", 60), ("letters", 30)):
        x = rng.integers(0, 256, (n + 30, 6, 6), dtype=np.uint8)
        y = np.arange(n + 30) % 4
        arrays = {"x_train": x[:n], "y_train": y[:n], "x_test": x[n:], "y_test": y[n:]}
        np.savez(folder / f"{name}.npz", **arrays)
    return folder


@pytest.fixture(scope="module")
def finished(data, tmp_path_factory):
    out = tmp_path_factory.mktemp("runs") / "study"
    return out, sweep.run(STUDY, out, data_dir=data, log=lambda _: None)


def results(rows):
    return [{k: v for k, v in row.items() if k not in NOT_MEASURED} for row in rows]


def test_rows_say_what_the_traces_say(finished):
    out, rows = finished
    trace = report.read_trace(out)
    assert [(r["seed"], r["strength"]) for r in rows] == [
        (s, e) for s in (0, 1) for e in (0.0, 0.7, 2.0)
    ]
    for row in rows:
        mine = (trace["seed"] == row["seed"]) & (trace["strength"] == row["strength"])
        angle = trace["angle"][mine]
        assert trace["step"][mine].tolist() == list(range(24))
        np.testing.assert_allclose(row["angle_mean"], angle.mean(), rtol=1e-5)
        np.testing.assert_allclose(row["angle_std"], angle.std(), rtol=1e-5, atol=1e-6)
        np.testing.assert_allclose(row["angle_p95"], np.percentile(angle, 95), rtol=1e-5)
        assert row["angle_max"] == pytest.approx(angle.max())
        assert sum(row["angle_histogram"]) == 24
        degrees = [np.floor(angle) == d for d in (0, 45)]
        assert [row["angle_histogram"][d] for d in (0, 45)] == [d.sum() for d in degrees]
        assert row["steps_at"] == [10, 20, 24]
        np.testing.assert_allclose(
            row["angle_means"],
            [angle[:10].mean(), angle[10:20].mean(), angle[20:].mean()],
            rtol=1e-5,
        )
        used = trace["distance_used"][mine]
        np.testing.assert_allclose(row["distance_used_mean"], used.mean(), rtol=1e-5)
        assert 0.3 * row["strength"] <= used.max() <= row["strength"] + 1e-6
        assert row["test_loss"] == row["test_losses"][-1]
        assert row["attacker_accuracy"] == row["attacker_accuracies"][-1]
        assert row["defender_accuracy"] == row["defender_accuracies"][-1]
        assert (row["attack"], row["variant"], row["budget"]) == ("online", "", 24)
        assert (row["layers"], row["oracle"], row["distance"]) == ("all", "extreme", "l1")
        assert row["unchanged"] == (100 if row["strength"] == 0 else 0)


def test_the_clean_path_is_kept_and_a_poisoned_one_is_not(finished):
    _, rows = finished
    for row in rows:
        if row["strength"] == 0:
            assert row["angle_max"] < 1e-4
            np.testing.assert_allclose(row["directions_kept"], 1, atol=1e-5)
        else:
            assert row["angle_mean"] > 5
            assert max(row["directions_kept"]) < 0.99


def test_the_direction_kept_is_the_cosine_between_the_ways():
    strength, seed, task = [0.5, 0, 0.5, 0, 0.5], [1, 1, 2, 1, 1], [0, 0, 0, 0, 1]
    cells = sweep.Point(np.float32(strength), np.uint32(seed), np.int32(task))
    ways = np.array([[1.0, 1, 0], [2, 0, 0], [1, 2, 3], [0, 0, 0], [1, 1, 1]])
    kept = sweep.direction_kept(cells, ways @ ways.T, 0.0)
    np.testing.assert_allclose(kept, [np.sqrt(0.5), 1, np.nan, np.nan, np.nan], atol=1e-6)
    # Of a defence whose neutral strength is another, and of one that has none.
    kept = sweep.direction_kept(cells, ways @ ways.T, 0.5)
    np.testing.assert_allclose(kept, [1, np.sqrt(0.5), 1, np.nan, 1], atol=1e-6)
    assert np.isnan(sweep.direction_kept(cells, ways @ ways.T, None)).all()


@pytest.mark.parametrize("devices", [1, 4])
def test_the_grid_is_its_single_cells_on_any_devices(finished, data, tmp_path, devices):
    """Seed 1 at epsilon 2 alone, on one device, and the whole grid again on four."""
    _, rows = finished
    two = (Defended(MAD(layers="all"), (0.0, 2.0)),)
    few = STUDY if devices == 4 else replace(STUDY, defenses=two, seeds=(1,))
    on = jax.devices()[:devices]
    again = sweep.run(few, tmp_path / "run", data_dir=data, devices=on, log=lambda _: None)
    for row in again:
        (old,) = [r for r in rows if (r["seed"], r["strength"]) == (row["seed"], row["strength"])]
        np.testing.assert_allclose(row["angle_means"], old["angle_means"], atol=1e-2)
        np.testing.assert_allclose(row["test_losses"], old["test_losses"], rtol=1e-4)
        np.testing.assert_allclose(row["directions_kept"], old["directions_kept"], atol=1e-4)


@pytest.mark.slow  # a sweep's cells at once are tested elsewhere
def test_all_cells_of_an_accelerator_at_once_are_the_same(finished, data, tmp_path, monkeypatch):
    _, rows = finished
    monkeypatch.setattr("madjax.sweep.mesh.default_mapping", lambda networks: sweep.vmap_cells)
    again = sweep.run(STUDY, tmp_path / "run", data_dir=data, log=lambda _: None)
    for row, old in zip(again, rows, strict=True):
        np.testing.assert_allclose(row["angle_means"], old["angle_means"], atol=1e-2)
        np.testing.assert_allclose(row["test_losses"], old["test_losses"], rtol=1e-4)


@pytest.mark.parametrize(
    "stop", [pytest.param(1, marks=pytest.mark.slow), 2, pytest.param(3, marks=pytest.mark.slow)]
)
def test_a_stopped_run_goes_on_to_the_same_rows(finished, data, tmp_path, monkeypatch, stop):
    out, rows = finished
    save, calls = madjax.store.save, []

    def interrupted(directory, name, *rest):
        save(directory, name, *rest)
        calls.extend([name] if name.startswith("attack") else [])
        if len(calls) == stop:
            raise KeyboardInterrupt

    monkeypatch.setattr(madjax.store, "save", interrupted)
    with pytest.raises(KeyboardInterrupt):
        sweep.run(STUDY, tmp_path / "run", data_dir=data, log=lambda _: None)
    monkeypatch.undo()
    again = sweep.run(STUDY, tmp_path / "run", data_dir=data, resume=True, log=lambda _: None)
    assert results(again) == results(rows)
    new, old = report.read_trace(tmp_path / "run"), report.read_trace(out)
    assert all((new[name] == old[name]).all() for name in old)
    assert not list((tmp_path / "run" / "checkpoints").glob("attack-*"))


def test_a_study_grows_by_tasks_and_seeds_and_keeps_its_traces(finished, data, tmp_path):
    """Two victims train their attackers side by side; a seed that comes later has its own file."""
    _, rows = finished
    (task,), run = STUDY.tasks, tmp_path / "run"
    two = replace(STUDY, tasks=(task, replace(task, victim_seed=1)), seeds=(1,))
    both = sweep.run(two, run, data_dir=data, log=lambda _: None)
    for row, old in zip(both[:3], rows[3:], strict=True):
        assert (row["id"], row["seed"]) == (old["id"], old["seed"])
        np.testing.assert_allclose(row["angle_means"], old["angle_means"], atol=1e-2)
        np.testing.assert_allclose(row["directions_kept"], old["directions_kept"], atol=1e-4)
    other = both[3]
    assert (other["victim_seed"], other["strength"]) == (1, 0)
    np.testing.assert_allclose(other["directions_kept"], 1, atol=1e-5)
    assert other["test_losses"] != both[0]["test_losses"]
    more = replace(two, seeds=(1, 2))
    sweep.run(more, run, data_dir=data, resume=True, log=lambda _: None)
    trace = report.read_trace(run)
    kinds = set(zip(trace["victim_seed"], trace["seed"], trace["strength"], strict=True))
    assert kinds == {(v, s, np.float64(e)) for v in (0, 1) for s in (1, 2) for e in (0, 0.7, 2)}
    assert len(trace["angle"]) == 12 * 24


def test_white_box_and_knockoff_share_a_sweep(data, tmp_path):
    attacks = (
        Knockoff(budget=20, architecture=small, recipe=Recipe(epochs=1, batch_size=10)),
        replace(STUDY.attacks[0], refresh=3, recipe=replace(ONLINE.recipe, batch_size=4)),
    )
    defenses = (
        Defended(MAD(layers="last"), (0.7,)),
        Defended(ReverseSigmoid(), (0.0, 1.0)),
    )
    config = replace(STUDY, defenses=defenses, attacks=attacks, seeds=(0,))
    rows = sweep.run(config, tmp_path / "run", data_dir=data, log=lambda _: None)
    said = [(r["defense"], r["attack"], r["variant"], r["strength"]) for r in rows]
    assert len(set(said)) == len(said) == 2 * 1 + 2 * 2
    assert {v for _, _, v, _ in said} == {"", "surrogate every 3 steps, batch 4"}
    trace = report.read_trace(tmp_path / "run")
    for row in (r for r in rows if r["attack"] == "online"):  # of six steps, ten in a lap
        names = {"defense": row["defense"], "strength": row["strength"]}
        mine = np.all([trace[name] == value for name, value in names.items()], axis=0)
        assert trace["step"][mine].tolist() == [t for t in range(6) for _ in range(4)]
        angle, of_batch = (trace[name][mine].reshape(6, 4) for name in ("angle", "batch_angle"))
        assert (of_batch == of_batch[:, :1]).all()
        assert (trace["update_angle"][mine] == of_batch.ravel()).all()
        np.testing.assert_allclose(row["angle_means"], [angle.mean()], rtol=1e-5)
        np.testing.assert_allclose(row["batch_angle_mean"], of_batch.mean(), rtol=1e-5, atol=1e-6)
        if row["strength"]:
            assert np.abs(of_batch - angle.mean(1, keepdims=True)).max() > 0.1
    report.write_report(tmp_path / "run")
    assert (tmp_path / "run" / "angles.png").is_file()
    # MAD has no clean twin here to be held to.
    kept = {r["defense"]: r["direction_kept"] for r in rows if r["attack"] == "online"}
    assert kept["mad"] is None
    assert 0 < kept["reverse_sigmoid"] < 1


def test_what_cannot_work_is_refused_before_any_work(data, tmp_path):
    few = replace(STUDY, attacks=(replace(STUDY.attacks[0], images=31),))
    with pytest.raises(InputError, match="images of Online is 31"):
        sweep.run(few, tmp_path / "run", data_dir=data)
    with pytest.raises(InputError, match="one budget"):
        replace(STUDY, budgets=(10,))
    with pytest.raises(InputError, match=r"budget of online is None: .* a madjax.AngleStudy"):
        replace(STUDY, attacks=(Online(),))
    assert not (tmp_path / "run").exists()


# --- files and the command line -------------------------------------------------------------------


@pytest.mark.parametrize("suffix", [".npz", ".parquet"])
def test_the_trace_is_written_as_one_table(finished, tmp_path, suffix):
    out, _ = finished
    path = tmp_path / f"trace{suffix}"
    report.write_trace(out, path)
    trace = report.read_trace(out)
    if suffix == ".npz":
        held = dict(np.load(path))
    else:
        from pyarrow import parquet

        held = parquet.read_table(path).to_pydict()
    assert set(held) == set(trace)
    cell = {"strength", "seed", "dataset", "queryset", "victim_seed", "defense", "attack"}
    assert {"step", "angle", "distance_used", "loss", *cell} < set(held)
    for name, values in trace.items():
        assert len(values) == 24 * 6
        assert (np.asarray(held[name]) == values).all()


def test_traces_of_defences_with_other_fields_are_one_table(tmp_path):
    """What a file lacks is empty, or no number."""
    (tmp_path / "traces").mkdir()
    common = {"angle": np.zeros((2, 3)), "strength": np.array([0.5, 1.0])}
    by_twos = np.array([[0, 0, 1]] * 2)
    np.savez(tmp_path / "traces" / "a.npz", **common, step=by_twos, defense=np.array("mad"))
    np.savez(tmp_path / "traces" / "b.npz", **common, mood=np.array("blue"), heat=np.ones(2))
    trace = report.read_trace(tmp_path)
    assert {len(values) for values in trace.values()} == {12}
    assert list(trace["mood"]) == 6 * [""] + 6 * ["blue"]
    assert list(trace["defense"]) == 6 * ["mad"] + 6 * [""]
    np.testing.assert_array_equal(trace["heat"], 6 * [np.nan] + 6 * [1])
    assert trace["step"].tolist() == 2 * [0, 0, 1] + 2 * [0, 1, 2]


def test_a_trace_that_cannot_be_written_says_why(finished, tmp_path):
    out, _ = finished
    with pytest.raises(InputError, match=r"neither of \.npz, \.parquet"):
        report.write_trace(out, tmp_path / "trace.csv")
    with pytest.raises(InputError, match="holds no traces"):
        report.write_trace(tmp_path, tmp_path / "trace.npz")


def test_the_table_and_the_figures_of_a_study(finished):
    out, rows = finished
    text = report.table(rows)
    assert "angle, degrees" in text
    assert report.files(out)[3:] == ["tradeoff.png", "angles.png", "course.png"]
    for make in (report.angles_figure, report.course_figure):
        _, bottom = make(rows).get_axes()
        lines = [line for line in bottom.get_lines() if line.get_gid() == "curve"]
        assert len(lines) == 3
        assert all(line.get_xdata().tolist() == [10, 20, 24] for line in lines)
    for epsilon, sign in ((0.5, "ε"), (None, "strength")):
        legend = report.angles_figure([{**row, "epsilon": epsilon} for row in rows]).legends[0]
        said = [text.get_text() for text in legend.get_texts()]
        assert said == [f"{sign} = {strength}" for strength in ("0", "0.7", "2")]
    course, _ = report.course_figure(rows).get_axes()
    curve = [line for line in course.get_lines() if line.get_gid() == "curve"][-1]
    wanted = np.mean([r["angle_means"] for r in rows if r["strength"] == 2.0], axis=0)
    np.testing.assert_allclose(curve.get_ydata(), wanted)


def test_angles_of_steps_are_shown_where_they_differ_from_those_of_queries(finished):
    _, rows = finished
    heads = {"batch_angle_mean": "of batches", "update_angle_mean": "of updates"}
    assert not any(head in report.table(rows) for head in heads.values())
    for field, head in heads.items():
        turned = [{**row, field: row[field] + 1} for row in rows]
        assert head in report.table(turned)
        older = [{k: v for k, v in row.items() if k not in heads} for row in rows]
        assert head not in report.table(older)


def test_the_figure_of_ages_shows_each_surrogate_once(finished):
    """From rows that say they are of other ages; two attackers of one age are not mixed."""
    _, rows = finished
    aged = [
        {**row, "refresh": m, "variant": f"every {m}", "attack_settings": str(m), "angle_mean": a}
        for row in rows
        for m, a in ((0, 10.0 + row["seed"]), (1, 30.0), (100, 20.0 + 2 * row["seed"]))
    ]
    assert "age.png" in report.figures_for(aged)
    unlike = [{**row, "direction_kept": None if row["strength"] < 2 else 0.0} for row in aged]
    gap = [row for row in aged if row["refresh"] != 1 or row["strength"] != 2]
    for some, points in ((unlike, [0, 3]), (gap, [3, 2])):
        _, kept = report.age_figure(some).get_axes()
        assert [len(each[0].get_ydata()) for each in kept.containers] == points
    assert "age.png" not in report.figures_for([row for row in aged if row["strength"] == 0])
    assert "age.png" not in report.figures_for(aged[::3] + aged[1::3])
    angle, kept = report.age_figure(aged).get_axes()
    for ax in (angle, kept):
        assert [label.get_text() for label in ax.get_xticklabels()] == ["1", "100", "black-box"]
        assert len(ax.containers) == 2  # epsilon 0 is no curve
    line, _, (bars,) = angle.containers[0]
    assert line.get_ydata().tolist() == [30, 21, 10.5]
    lengths = [segment[1, 1] - segment[0, 1] for segment in bars.get_segments()]
    np.testing.assert_allclose(lengths, [0, 2 * np.sqrt(2), np.sqrt(2)], atol=1e-6)
    other = {**aged[-1], "attack_settings": "other"}
    assert "age.png" not in report.figures_for([*aged, other])


def test_the_command_runs_the_study_and_refuses_what_is_none(data, tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    changes = (
        "task.dataset=embedded:mnist[:200,:60]",
        "task.queryset=embedded:fashion_mnist[:50]",
        "task.architecture=madjax.MLP",
    )
    changes += ("task.victim.epochs=1", "strengths=0,0.99", "attackers.images=40", "steps=6")
    changes += ("attackers.every=4", "attackers.judged=100", "rules.layers=last")
    changes += ("attackers.architecture=madjax.MLP",)
    words = [word for each in changes for word in ("--set", each)]
    assert main(["angle", *words]) == 0
    said = capsys.readouterr().out
    assert "angle, degrees" in said
    pictures = "tradeoff.png, angles.png, course.png"
    assert f"runs/angle/rows.jsonl, report.md, report.html, {pictures}" in said
    rows = report.read_rows("runs/angle")
    assert [row["steps_at"] for row in rows] == [[4, 6]] * 2
    assert {(row["layers"], row["n_judged"]) for row in rows} == {("last", 60)}
    assert main(["plan", "angle", *words]) == 0
    assert "all 2 cells have their row" in capsys.readouterr().out
    assert main(["report", "runs/angle", "--trace", "steps.parquet"]) == 0
    assert (tmp_path / "steps.parquet").stat().st_size > 0
    for words, says in (
        (["angle", "quickstart"], "'quickstart' is a madjax.Sweep: run it by madjax sweep"),
        (["sweep", "angle"], "'angle' is a madjax.AngleStudy: run it by madjax angle"),
    ):
        assert main(words) == 2
        assert says in capsys.readouterr().err
