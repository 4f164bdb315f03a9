"""What determines a result finds it again, in any run; nothing else does."""

import os
import subprocess
import sys
import threading
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from filelock import FileLock

from madjax import (
    MAD,
    MLP,
    Defended,
    InputError,
    Knockoff,
    LineSearch,
    NoDefense,
    Recipe,
    Sweep,
    Task,
    argmax_preserving,
    jbda,
    open_dataset,
    sweep,
    top_label,
)
from madjax.cli import main
from madjax.config import describe
from madjax.defenses.defense import Training
from madjax.private import PrivateGradient
from madjax.recipe import mean_gradient
from madjax.sweep import cache, stages, steal
from madjax.sweep.victim import identified
from tests.networks import Linear

TREE = {"w": jnp.arange(6, dtype=jnp.bfloat16).reshape(2, 3), "b": np.int32(7)}
LIKE = jax.eval_shape(lambda: TREE)
MAKER = {"device": "1 x this", "git_commit": "abc"}


@pytest.fixture
def kept(tmp_path, monkeypatch):
    monkeypatch.setenv("MADJAX_CACHE", str(tmp_path / "cache"))
    return cache.open_cache(MAKER)


@pytest.mark.smoke
def test_a_result_comes_back_as_it_was_with_what_made_it(kept):
    key = cache.key("network", "mnist, victim", seed=1)
    assert kept.get(key, LIKE) is None
    kept.put(key, TREE)
    tree, maker = replace(kept, maker={}).get(key, LIKE)
    assert maker == MAKER
    for name, value in TREE.items():
        assert tree[name].dtype == value.dtype
        np.testing.assert_array_equal(tree[name], value)


@pytest.mark.smoke
def test_a_key_changes_with_all_that_it_is_made_of(monkeypatch):
    def key(stage="answers", seed=1, strength=0.5):
        return cache.key(
            stage, "one", victim=cache.key("network", "v", seed=seed), strength=strength
        )

    first = key()
    others = [key(seed=2), key(strength=0.6), key(stage="transfer")]
    changes = (
        ("madjax.sweep.cache.version", lambda package: "0"),
        ("jax.default_backend", lambda: "gpu"),
        ("madjax.sweep.cache.VERSIONS", cache.VERSIONS | {"network": 99}),
    )
    for target, value in changes:
        with monkeypatch.context() as patch:
            patch.setattr(target, value)
            others.append(key())
    with jax.default_matmul_precision("bfloat16"):
        others.append(key())
    assert len({first.digest, *(other.digest for other in others)}) == 8
    same = cache.key("answers", "two", victim=cache.key("network", "u", seed=1), strength=0.5)
    assert same.digest == first.digest  # what people read is no part of it


@pytest.mark.smoke
def test_what_has_no_source_is_not_kept(kept):
    """A function of which only the path is known may be another one tomorrow."""
    names = {"__name__": "anywhere"}
    exec("def oracle(y, gram): return y", names)
    unknown = cache.key("answers", "x", rule=describe(MAD(solver=LineSearch(names["oracle"]))))
    after = cache.key("transfer", "x", answers=unknown)
    assert (unknown.digest, after.digest) == (None, None)
    kept.put(unknown, TREE)
    assert kept.get(unknown, LIKE) is None
    with kept.alone(unknown, print):
        pass
    assert cache.entries(kept.folder) == []


class Scaled:
    """A gradient whose attribute decides how it learns."""

    def __init__(self, scale):
        self.scale = scale

    def __call__(self, classifier, lesson):
        raise NotImplementedError


@pytest.mark.smoke
def test_a_network_is_told_by_its_data_its_recipe_its_key_and_how_it_is_trained(folder):
    data, key = open_dataset("tiny", folder), jax.random.key(0)

    def name(task=TASK, data=data, recipe=RECIPE, key=key, gradient=mean_gradient, owned=None):
        owned, recipe = owned or (data.x_train, data.y_train), replace(recipe, gradient=gradient)
        train = Training(None, recipe, key, owned, (data.x_test, data.y_test))
        return identified("one", task, data, train)

    found = [
        name(),
        name(task=replace(TASK, architecture=MLP)),
        name(data=replace(data, x_train=data.x_train + 1)),
        name(owned=(data.x_train[:30], data.y_train[:30])),
        name(recipe=replace(RECIPE, learning_rate=0.2)),
        name(key=jax.random.key(1)),
        name(gradient=PrivateGradient(0.5)),
        name(gradient=PrivateGradient(0.5000001)),
        name(gradient=PrivateGradient(0.5, clip=2.0)),
        name(gradient=Scaled(0.1)),
        name(gradient=Scaled(0.9)),
        name(gradient=partial(Scaled, 0.9)),
    ]
    names, keys = zip(*found, strict=True)
    assert len({key.digest for key in keys}) == len(set(names)) == len(found)
    assert name(task=replace(TASK, queryset="other")) == found[0]
    with pytest.raises(InputError, match="no import path"):
        name(gradient=lambda *_: None)


@pytest.mark.smoke
@pytest.mark.parametrize("damage", ["cut", "bytes", "shape", "facts"])
def test_a_damaged_result_is_named_and_made_anew(kept, damage):
    key = cache.key("network", "mnist, victim")
    kept.put(key, TREE)
    (entry,) = cache.entries(kept.folder)
    data = bytearray(entry.path.read_bytes())
    if damage == "cut":
        entry.path.write_bytes(data[:-40])
    elif damage == "bytes":
        at = data.index(np.asarray(TREE["w"]).tobytes())
        data[at + 2] ^= 1
        entry.path.write_bytes(data)
    elif damage == "shape":
        kept.put(key, TREE | {"b": np.zeros(3, np.int32)})
    else:
        np.savez(entry.path, leaf0=1)
    with pytest.warns(UserWarning, match=rf"{entry.path.name} is damaged \(.*made anew"):
        assert kept.get(key, LIKE) is None
    kept.put(key, TREE)
    assert kept.get(key, LIKE) is not None


@pytest.mark.smoke
def test_a_place_that_cannot_be_written_is_done_without(tmp_path, monkeypatch):
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("MADJAX_CACHE", str(tmp_path / "file" / "cache"))
    with pytest.warns(UserWarning, match="set MADJAX_CACHE to another folder"):
        kept = cache.open_cache(MAKER)
    assert kept.folder is None
    monkeypatch.setenv("MADJAX_CACHE", str(tmp_path / "cache"))
    kept, key = cache.open_cache(MAKER), cache.key("network", "x")

    def refuse(*_, **__):
        raise PermissionError

    monkeypatch.setattr("madjax.sweep.cache.FileLock.acquire", refuse)
    with kept.alone(key, print):
        assert kept.get(key, LIKE) is None
    (kept.folder / f"{key.name}.npz").mkdir()
    with pytest.warns(UserWarning, match="a result is not kept for other runs"):
        kept.put(key, TREE)


@pytest.mark.smoke
def test_who_wants_what_another_makes_waits_for_it(kept):
    key, lines, order = cache.key("network", "mnist, victim"), [], []
    begun, told = threading.Event(), threading.Event()

    def log(line):
        lines.append(line)
        told.set()

    def first():
        with kept.alone(key, print):
            begun.set()
            assert told.wait(20)
            order.append("made")
            kept.put(key, TREE)

    def second():
        assert begun.wait(20)
        with kept.alone(key, log):
            order.append("found" if kept.get(key, LIKE) else "lost")

    threads = [threading.Thread(target=each) for each in (first, second)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(20)
    assert order == ["made", "found"]
    assert lines == ["network of mnist, victim: another command makes it, waiting"]


PROGRAM = """
import sys
import jax
from madjax.sweep import Compiled, cache
before = Compiled.so_far()
cache.keep_programs()
jax.jit(lambda x: x * 3 + 1)(2.0)
print(jax.config.jax_compilation_cache_dir, Compiled.so_far().since(before).found)
"""


def compiles(**settings):
    """The folder of programs of a fresh process, which warns of nothing, and what it found."""
    known = {"JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0"}
    inherited = {name: v for name, v in os.environ.items() if not name.startswith("JAX_")}
    words = [sys.executable, "-W", "error", "-c", PROGRAM]
    ways = {"env": inherited | known | settings, "text": True, "cwd": Path(__file__).parents[1]}
    return subprocess.check_output(words, **ways).split()


@pytest.mark.smoke
def test_compiled_programs_are_kept_for_other_processes(tmp_path, monkeypatch, capsys):
    mine, theirs = {"MADJAX_CACHE": str(tmp_path / "cache")}, str(tmp_path / "jax")
    first, found = compiles(**mine)
    assert Path(first).parent == tmp_path / "cache"
    assert found == "0"
    again, found = compiles(**mine)
    assert again == first
    assert int(found) >= 1
    # One that a command was killed at is made anew; it would keep others out.
    stamp = min(Path(first).glob("*-atime"))
    stamp.unlink()
    stamp.with_name(stamp.name.replace("atime", "cache")).write_bytes(b"half")
    assert compiles(**mine) == [first, str(int(found) - 1)]
    assert compiles(**mine) == [first, found]
    assert compiles(**mine, JAX_COMPILATION_CACHE_DIR=theirs)[0] == theirs
    assert compiles(MADJAX_CACHE="") == ["None", "0"]
    size = {"JAX_COMPILATION_CACHE_MAX_SIZE": "1"}  # in which no program has room
    with pytest.raises(subprocess.CalledProcessError):
        compiles(MADJAX_CACHE=str(tmp_path / "small"), **size)
    (tmp_path / "file").write_text("")
    assert compiles(MADJAX_CACHE=str(tmp_path / "file")) == ["None", "0"]
    monkeypatch.setenv("MADJAX_CACHE", mine["MADJAX_CACHE"])
    main(["cache"])
    line, total = capsys.readouterr().out.splitlines()
    assert line.startswith(f"{Path(first).name}  0.0 MB, last used 0 days ago, ")
    assert " compiled programs, 20" in line
    assert "1 results" in total
    main(["cache", "--prune", "1"])
    assert Path(first).is_dir()
    main(["cache", "--prune", "0"])
    assert not Path(first).exists()


@pytest.mark.smoke
def test_programs_of_other_cpus_are_others(monkeypatch):
    mine = cache._instructions()
    assert cache._instructions() == mine
    monkeypatch.setattr(Path, "read_text", lambda self: "model name: x\nflags : sse avx\n")
    assert cache._instructions() != mine


@pytest.mark.smoke
def test_the_command_lists_and_prunes(kept, capsys, monkeypatch):
    for i in range(2):
        kept.put(cache.key("network", "mnist, victim", seed=i), TREE)
    old = max(entry.path for entry in cache.entries(kept.folder))
    os.utime(old, (0, 0))
    assert main(["cache"]) == 0
    said = capsys.readouterr().out.splitlines()
    assert "mnist, victim" in said[0]
    assert "by abc on 1 x this" in said[0]
    assert "last used 0 days ago" in said[0]
    assert said[-1].endswith("2 results, 0.0 MB")
    draft = old.with_name(f".{old.name}.part")
    draft.write_text("of who was killed")
    os.utime(draft, (0, 0))
    assert main(["cache", "--prune", "30"]) == 0
    assert not draft.exists()
    assert "1 results removed" in capsys.readouterr().out
    assert not old.exists()
    assert len(cache.entries(kept.folder)) == 1
    main(["cache", "--prune", "0"])
    assert cache.entries(kept.folder) == []
    monkeypatch.setenv("MADJAX_CACHE", "")
    capsys.readouterr()
    assert main(["cache"]) == 0
    assert "MADJAX_CACHE is empty" in capsys.readouterr().out


# --- in a sweep -----------------------------------------------------------------------------------


@dataclass(frozen=True)
class Mine(MAD):
    """A rule of the user's, with nothing changed."""


RECIPE = Recipe(epochs=2, batch_size=16)
TASK = Task("tiny", "tiny", architecture=Linear, victim=RECIPE)
CONFIG = Sweep(
    "cached",
    (TASK,),
    (Defended(MAD(surrogate_epochs=1), (0.5, 0.99)),),
    (Knockoff(budget=40, architecture=Linear, recipe=RECIPE),),
    seeds=(0, 1),
)
JBDA = jbda(budget=30, architecture=Linear, recipe=RECIPE, seeds=10, substitute=RECIPE)


@pytest.fixture
def counted(monkeypatch):
    """How many strengths were answered, and how many networks the owner trained."""
    made, answers = {"answers": 0, "posteriors": 0}, stages.answers
    posteriors = stages.victim_posteriors

    def count_answers(*args, **options):
        told = answers(*args, **options)
        made["answers"] += len(told)
        return told

    def count_posteriors(*args, **options):
        made["posteriors"] += 1
        return posteriors(*args, **options)

    monkeypatch.setattr(stages, "answers", count_answers)
    monkeypatch.setattr(stages, "victim_posteriors", count_posteriors)
    return made


@pytest.fixture
def learned(monkeypatch):
    """The places at which stolen models were trained."""
    places, learn = [], steal._learn

    def count(wave, *args):
        places.extend(wave.places)
        return learn(wave, *args)

    monkeypatch.setattr(steal, "_learn", count)
    return places


def run(config, out, folder, **options):
    """The rows without their times, and how many networks the victim's owner trained."""
    lines = []
    rows = sweep.run(config, out, data_dir=folder, log=lines.append, **options)
    timing = ("seconds", "seconds_collecting", "seconds_compiling")
    trained = sum("% of the test images" in line for line in lines)
    return [{k: v for k, v in row.items() if k not in timing} for row in rows], trained


def test_another_run_makes_nothing_twice(kept, folder, tmp_path, monkeypatch, counted, learned):
    rows, trained = run(CONFIG, tmp_path / "one", folder)
    assert trained == 3  # a victim and two surrogates
    # Two seeds at two strengths, on the test set and on the queries.
    assert counted == {"answers": 8, "posteriors": 3}
    assert all(row["made_elsewhere"] == {} for row in rows)
    assert len(learned) == 4
    learned.clear()
    more = replace(CONFIG, defenses=(Defended(MAD(surrogate_epochs=1), (0.3, 0.5, 0.99)),))
    monkeypatch.setattr("madjax.sweep.rows.git_commit", lambda: "later")
    again, trained = run(more, tmp_path / "two", folder)
    assert (trained, counted) == (0, {"answers": 12, "posteriors": 3})
    assert {place.strength for place in learned} == {0.3}
    first = {row["id"]: row for row in rows}
    said = {"made_elsewhere", "git_commit", "config_hash"}
    for row in again:
        elsewhere = {stage: maker["git_commit"] for stage, maker in row["made_elsewhere"].items()}
        assert row["git_commit"] == "later"
        before = rows[0]["git_commit"]
        if row["strength"] == 0.3:
            # The answers are this run's own; what they were made with is not.
            stages = "victim", "surrogate", "posteriors", "test posteriors"
            assert elsewhere == dict.fromkeys(stages, before)
            continue
        same = first[row["id"]]
        assert {k: row[k] for k in row if k not in said} == {
            k: same[k] for k in same if k not in said
        }
        assert set(elsewhere) > {"victim", "answers", "test answers", "stolen model"}
    monkeypatch.setenv("MADJAX_CACHE", "")
    without, trained = run(more, tmp_path / "three", folder)
    assert trained == 3
    losses = {row["id"]: row["attacker_losses"] for row in again}
    for row in without:
        assert row["attacker_losses"] == losses[row["id"]]
        assert row["made_elsewhere"] == {}


@pytest.mark.parametrize("attack", [CONFIG.attacks[0], JBDA], ids=lambda attack: attack.title)
def test_a_stolen_model_is_known_by_its_transfer_set_and_its_training(
    kept, folder, tmp_path, learned, attack
):
    """At every budget; one that is asked as the defence answers is not even asked again."""
    few = replace(CONFIG, attacks=(attack,), seeds=(0,), budgets=(20,))
    first, _ = run(few, tmp_path / "first", folder)
    assert [place.strength for place in learned] == 2 * [0.5, 0.99], "both budgets"
    learned.clear()
    recipe = replace(RECIPE, learning_rate=0.2)
    for at, (change, trained) in enumerate(
        (
            ({}, 0),
            ({"budgets": (20, 25)}, 2),
            ({"seeds": (0, 1)}, 4),
            ({"attacks": (replace(attack, recipe=recipe),)}, 4),
            ({"attacks": (replace(attack, architecture=MLP),)}, 4),
            ({"tasks": (replace(TASK, victim=recipe),)}, 4),
        )
    ):
        rows, _ = run(replace(few, **change), tmp_path / str(at), folder)
        assert len(learned) == trained
        learned.clear()
        if not trained:
            assert rows == first


def test_defences_of_equal_answers_share_their_stolen_models(kept, folder, tmp_path, learned):
    """None and MAD at epsilon 0; the top label of both, and of an answer that keeps it."""
    knockoff = CONFIG.attacks[0]
    labels = replace(knockoff, targets=top_label, variant="top label")
    rules = (
        Defended(NoDefense()),
        Defended(MAD(layers="last"), (0.0, 0.9)),
        Defended(MAD(layers="last", solver=LineSearch(argmax_preserving)), (0.9,)),
    )
    config = replace(CONFIG, defenses=rules, attacks=(knockoff, labels), seeds=(0,))
    rows, _ = run(config, tmp_path / "out", folder)
    where = [place.strength for place in learned]
    # Answers: none, both of MAD's, of which one is known; labels of none and of MAD at 0.9.
    assert sorted(where) == [0.0, 0.0, 0.9, 0.9, 0.9]
    course = {
        (row["defense"], row["strength"], row["variant"]): row["attacker_losses"] for row in rows
    }
    assert course["none", 0.0, ""] == course["mad", 0.0, ""] != course["mad", 0.9, ""]
    label = course["none", 0.0, "top label"]
    assert label == course["mad", 0.0, "top label"] == course["mad_argmax", 0.9, "top label"]
    assert len(rows) == 8
    assert {row["defense"]: row["l1_mean"] > 0 for row in rows if row["strength"]} == {
        "mad": True,
        "mad_argmax": True,
    }


@pytest.mark.parametrize("known", [True, False])
def test_a_network_that_lies_in_the_runs_directory_keeps_what_made_it(
    kept, folder, tmp_path, monkeypatch, known
):
    """One that an earlier command left there, which had no cache."""
    few = replace(CONFIG, seeds=(0,), defenses=(Defended(MAD(), (0.5,)),))
    monkeypatch.setenv("MADJAX_CACHE", "")
    ((first,), _) = run(few, tmp_path / "one", folder)
    monkeypatch.setattr("madjax.sweep.rows.git_commit", lambda: "later")
    if not known:  # the command was killed before it wrote that down
        (written,) = (tmp_path / "one").rglob("made.json")
        written.unlink()
    more = replace(few, seeds=(0, 1))
    rows, trained = run(more, tmp_path / "one", folder, resume=True)
    assert trained == 0
    (victim,) = [row["made_elsewhere"] for row in rows if row["seed"] == 1]
    commits = {stage: maker["git_commit"] for stage, maker in victim.items()}
    assert commits == ({"victim": first["git_commit"]} if known else {})
    # Nor does the cache take what is not known.
    monkeypatch.setenv("MADJAX_CACHE", str(kept.folder))
    run(replace(few, seeds=(0, 1, 2)), tmp_path / "one", folder, resume=True)
    found = {entry.path.name.partition("-")[0]: entry for entry in cache.entries(kept.folder)}
    assert set(found) == {"posteriors", "answers", "stolen"} | ({"network"} if known else set())
    if known:
        assert found["network"].maker["git_commit"] == first["git_commit"]
        # A directory that gets it from there knows too.
        run(few, tmp_path / "two", folder)
        monkeypatch.setenv("MADJAX_CACHE", "")
        rows, _ = run(more, tmp_path / "two", folder, resume=True)
        (victim,) = [row["made_elsewhere"] for row in rows if row["seed"] == 1]
        assert victim["victim"]["git_commit"] == first["git_commit"]


@pytest.mark.slow
def test_what_made_a_result_is_said_of_the_cells_that_it_is_behind(
    kept, folder, tmp_path, monkeypatch
):
    """Not of those of another attack on the same victim, whose own results are made here."""
    (knockoff,), rule = CONFIG.attacks, MAD(surrogate_epochs=1)
    few = {"seeds": (0,), "defenses": (Defended(rule, (0.5,)),)}
    run(replace(CONFIG, attacks=(JBDA, knockoff), **few), tmp_path / "one", folder)
    monkeypatch.setattr("madjax.sweep.rows.git_commit", lambda: "later")
    new = replace(JBDA, variant="new", step=0.2), replace(knockoff, variant="new", repeats=2)
    more = few | {"defenses": (Defended(rule, (0.5, 0.99)),), "attacks": (JBDA, knockoff, *new)}
    one_by_one = {"devices": jax.devices()[:1]}  # as a wave takes all of its transfer sets, or none
    rows, _ = run(replace(CONFIG, **more), tmp_path / "two", folder, **one_by_one)
    assert len(rows) == 8
    for row in rows:
        asked, old = row["attack"] == "jbda", "new" not in row["variant"]
        same = old and row["strength"] == 0.5
        assert ("stolen model" in row["made_elsewhere"]) == same
        assert ("answers" in row["made_elsewhere"]) == (same and not asked)
        # The new answers to the old queries are made of the posteriors that there were.
        assert ("posteriors" in row["made_elsewhere"]) == (old and not asked)


def test_tasks_that_share_a_transfer_set_share_a_wave(kept, folder, tmp_path):
    """jbda draws from the victim's data, whatever the query set."""
    tasks = (TASK, replace(TASK, queryset="tiny[:50]"))
    config = replace(CONFIG, tasks=tasks, attacks=(JBDA,), seeds=(0,))
    rows, _ = run(config, tmp_path / "one", folder, cells_per_device=4)
    losses = [(row["strength"], *row["attacker_losses"]) for row in rows]
    assert len(losses) == 4
    assert len(set(losses)) == 2


def test_a_run_that_has_another_victim_than_the_cache_goes_on_with_its_own(
    kept, folder, tmp_path, monkeypatch
):
    """As one that was begun on a machine that rounds otherwise."""
    few = replace(CONFIG, seeds=(0,))
    run(few, tmp_path / "here", folder)
    monkeypatch.setenv("MADJAX_CACHE", "")
    alone, _ = run(replace(few, seeds=(0, 1)), tmp_path / "alone", folder)
    monkeypatch.setenv("MADJAX_CACHE", str(kept.folder))
    (entry,) = [e for e in cache.entries(kept.folder) if e.what == "tiny, victim"]
    with np.load(entry.path) as held:
        arrays = dict(held)
    for name, array in arrays.items():
        if array.dtype == np.float32 and array.ndim == 2:
            arrays[name] = -array
    np.savez(entry.path, **arrays)
    lines = []
    more = {"data_dir": folder, "resume": True, "log": lines.append}
    rows = sweep.run(replace(few, seeds=(0, 1)), tmp_path / "here", **more)
    assert any(line.endswith("here: not used") for line in lines)
    assert [r["attacker_losses"] for r in rows] == [r["attacker_losses"] for r in alone]


def test_two_commands_do_not_collect_the_same_transfer_set(kept, folder, tmp_path):
    """The second waits until the first has it."""
    config = replace(CONFIG, attacks=(JBDA,), seeds=(0,))
    want, _ = run(config, tmp_path / "one", folder)
    for stolen in kept.folder.glob("stolen-*.npz"):
        stolen.unlink()
    (last,) = [e.path for e in cache.entries(kept.folder) if "transfer-" in e.path.name][-1:]
    hidden, lines, waiting = last.rename(tmp_path / "hidden"), [], threading.Event()

    def log(line):
        lines.append(line)
        if line.startswith("transfer of") and line.endswith("another command makes it, waiting"):
            waiting.set()

    rows = []
    with FileLock(kept.folder / "locks" / f"{last.stem}.lock"):
        options = {"data_dir": folder, "log": log}
        second = threading.Thread(
            target=lambda: rows.extend(sweep.run(config, tmp_path / "two", **options))
        )
        second.start()
        assert waiting.wait(60)
        hidden.rename(last)
    second.join(60)
    assert not any("round" in line for line in lines)
    found = {row["id"]: row["attacker_losses"] for row in rows}
    assert found == {row["id"]: row["attacker_losses"] for row in want}


def test_a_result_that_is_damaged_changes_no_row(kept, folder, tmp_path):
    rows, _ = run(CONFIG, tmp_path / "one", folder)
    for entry in cache.entries(kept.folder):
        entry.path.write_bytes(entry.path.read_bytes()[:100])
    with pytest.warns(UserWarning, match="is damaged") as warned:
        again, trained = run(CONFIG, tmp_path / "two", folder)
    assert trained == 3
    assert again == rows
    assert len(warned) == len(cache.entries(kept.folder)) == 3 + 3 + 8 + 4


def test_rules_and_fields_that_differ_share_nothing(kept, folder, tmp_path, counted):
    run(CONFIG, tmp_path / "one", folder)
    for rule in (Mine(surrogate_epochs=1), MAD(layers="last", surrogate_epochs=1)):
        before = counted["answers"]
        other = replace(CONFIG, defenses=(Defended(rule, (0.5,)),), seeds=(0,))
        _, trained = run(other, tmp_path / str(before), folder)
        assert trained == 0  # the surrogate is the same
        assert counted["answers"] == before + 2


def test_a_transfer_set_that_was_asked_for_is_not_asked_for_again(kept, folder, tmp_path):
    """More budgets of an attack, whose rounds are all in the cache."""
    config = replace(CONFIG, attacks=(JBDA,), seeds=(0,))
    rows, _ = run(config, tmp_path / "one", folder)
    more, lines = replace(config, budgets=(20,)), []
    again = sweep.run(more, tmp_path / "two", data_dir=folder, log=lines.append)
    assert not any("round" in line for line in lines)
    for row in (row for row in again if row["budget"] == 30):
        (same,) = (each for each in rows if each["id"] == row["id"])
        assert row["attacker_losses"] == same["attacker_losses"]
        assert row["queries"] == 30
    other, lines = replace(more, attacks=(replace(JBDA, step=0.2),)), []
    sweep.run(other, tmp_path / "three", data_dir=folder, log=lines.append)
    assert any("round" in line for line in lines)


def test_large_transfer_sets_are_not_kept(kept, folder, tmp_path, monkeypatch):
    monkeypatch.setattr("madjax.sweep.stock.LARGEST_TRANSFER", 30 * 6 * 6 * 4)
    run(replace(CONFIG, attacks=(JBDA,), seeds=(0,)), tmp_path / "one", folder)
    assert not any(entry.path.name.startswith("transfer") for entry in cache.entries(kept.folder))


def test_two_runs_at_once_train_one_victim(kept, folder, tmp_path):
    found = {}

    def one(name):
        found[name] = run(replace(CONFIG, seeds=(0,)), tmp_path / name, folder)

    threads = [threading.Thread(target=one, args=(name,)) for name in ("a", "b")]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert found["a"][0] == found["b"][0]
    assert found["a"][1] + found["b"][1] == 2  # a victim and a surrogate
