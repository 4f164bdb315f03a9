"""Signals end a run where nothing that is done is lost, with a status of their own."""

import pickle
import signal
from dataclasses import replace

import jax
import pytest

from madjax import MAD, Defended, Knockoff, Recipe, Sweep, Task, processes, stopping, store, sweep
from madjax.cli import main
from madjax.report import read_rows
from madjax.sweep import passes, stock
from tests.networks import Linear

pytestmark = pytest.mark.smoke

ENDING = [signal.SIGINT, signal.SIGTERM]


@pytest.fixture(autouse=True)
def _as_from_a_terminal():
    """Those who run tests side by side let the processes ignore an interrupt."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


def test_a_signal_that_is_ignored_stays_so():
    """As by nohup, and by a shell for what runs behind it."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    with stopping.by_signal():
        signal.raise_signal(signal.SIGINT)
        with stopping.deferred():
            signal.raise_signal(signal.SIGINT)


@pytest.mark.parametrize("number", ENDING)
def test_a_signal_stops_at_once_what_is_not_deferred(number):
    before = [signal.getsignal(each) for each in ENDING]
    with pytest.raises(stopping.Stopped, match=number.name) as stopped, stopping.by_signal():
        signal.raise_signal(number)
    assert stopped.value.number == number
    assert pickle.loads(pickle.dumps(stopped.value)).number == number  # as others are told
    assert isinstance(stopped.value, KeyboardInterrupt)  # which nobody takes for an error
    assert [signal.getsignal(each) for each in ENDING] == before


def deferring(number, then=lambda: None, reached=None):
    reached = [] if reached is None else reached
    with stopping.by_signal(), stopping.deferred(), stopping.deferred():
        signal.raise_signal(number)
        reached.append("saved")
        then()
        reached.append("the end")


@pytest.mark.parametrize("number", ENDING)
@pytest.mark.parametrize(
    ("then", "wanted"),
    [
        (stopping.check, ["saved"]),
        (lambda: None, ["saved", "the end"]),
        (lambda: signal.raise_signal(signal.SIGINT), ["saved"]),
    ],
    ids=["check", "end", "twice"],
)
def test_a_signal_waits_for_a_check_or_for_the_end_or_for_a_second(number, then, wanted, capfd):
    reached = []
    with pytest.raises(stopping.Stopped):
        deferring(number, then, reached)
    assert reached == wanted
    (line,) = capfd.readouterr().err.splitlines()
    assert line.startswith(f"madjax: {number.name}: stopping after what is under way; once more")


def test_a_signal_that_comes_while_processes_agree_waits_for_their_next_check(monkeypatch):
    """Else this one would stop alone, as the others have not heard of it."""
    monkeypatch.setattr(processes, "several", lambda: True)
    monkeypatch.setattr(processes, "is_preempted", lambda step: False)

    def agreed(flag):
        if not flag:
            signal.raise_signal(signal.SIGINT)
        return flag

    monkeypatch.setattr(processes, "any_of", agreed)
    with stopping.by_signal():
        stopping.check()
        with pytest.raises(stopping.Stopped, match="SIGINT"):
            stopping.check()


def test_without_signals_nothing_stops():
    stopping.check()
    with stopping.deferred():
        stopping.check()
    with stopping.by_signal(), stopping.deferred():
        stopping.check()


def test_who_listens_to_no_signal_has_pythons_own():
    """As in a notebook: an interrupt is at once, and nothing is left behind."""
    with pytest.raises(KeyboardInterrupt) as stopped, stopping.deferred():
        signal.raise_signal(signal.SIGINT)
    assert not isinstance(stopped.value, stopping.Stopped)
    stopping.check()


RECIPE = Recipe(epochs=4, batch_size=16)


def config():
    attack = Knockoff(budget=20, architecture=Linear, recipe=RECIPE)
    task = Task("tiny", "tiny", architecture=Linear, victim=RECIPE)
    return Sweep("stopped", (task,), (Defended(MAD(layers="last"), (0.0, 0.9)),), (attack,))


@pytest.mark.parametrize("number", ENDING)
@pytest.mark.parametrize(("during", "at"), [("victim", 3), ("victim", 4), ("attack", 3)])
def test_a_stopped_sweep_has_its_last_epoch_and_goes_on(
    folder, tmp_path, monkeypatch, capfd, number, during, at
):
    file, out, save, steps = tmp_path / "config.py", tmp_path / "out", store.save, []
    file.write_text("from tests.test_stopping import config\n")
    words = ["sweep", str(file), "--data-dir", str(folder), "--out", str(out)]

    def saving(directory, name, step, tree):
        if name.startswith(during):
            steps.append(step)
            if step == at:
                signal.raise_signal(number)
        save(directory, name, step, tree)

    with monkeypatch.context() as patch:
        patch.setattr(store, "save", saving)
        assert main(words) == 128 + number
    assert steps == list(range(1, at + 1))
    if at == RECIPE.epochs:  # what made it is known, though the run ended there
        (path,) = (out / "checkpoints").glob("victim-*")
        assert store.maker_of(out, path.name)["device"]
    said = capfd.readouterr().err.splitlines()
    assert said[-1] == (
        f"madjax: stopped by {number.name}; nothing finished is lost, go on with --resume"
    )
    with monkeypatch.context() as patch:
        patch.setattr(store, "save", lambda *a: (steps.append(a[2]), save(*a)))
        assert main([*words, "--resume"]) == 0
    assert steps[at] == (at + 1 if at < RECIPE.epochs else 1)
    wanted = sweep.run(config(), tmp_path / "whole", data_dir=folder, log=lambda line: None)
    fields = "id", "attacker_losses", "attacker_accuracies", "l1_mean"
    found = [[row[field] for field in fields] for row in read_rows(out)]
    assert found == [[row[field] for field in fields] for row in wanted]


@pytest.mark.parametrize("cached", [False, True])
@pytest.mark.parametrize("stop", [2, 6, 7])
def test_a_pass_over_queries_goes_on_where_it_was_stopped(
    folder, tmp_path, monkeypatch, stop, cached
):
    """Here 30 images of the test set, 10 at a time, and 40 queries.

    A pass that is done is kept for the run where it is not kept in the cache.
    """
    monkeypatch.setattr(passes, "INTERVAL", 0)
    monkeypatch.setattr(passes, "PATIENCE", 0)
    monkeypatch.setattr(stock, "QUERIES", 10)
    attack = replace(config().attacks[0], budget=40)
    grid, asked = replace(config(), attacks=(attack,)), []
    ways = {"data_dir": folder, "devices": jax.devices()[:1], "log": lambda line: None}
    wanted = sweep.run(grid, tmp_path / "whole", **ways)
    monkeypatch.setenv("MADJAX_CACHE", str(tmp_path / "cache") if cached else "")
    after_chunk = passes.Pass.after_chunk

    def noting(self, done):
        after_chunk(self, done)
        asked.append(done)
        if len(asked) == stop:
            raise KeyboardInterrupt

    monkeypatch.setattr(passes.Pass, "after_chunk", noting)
    with pytest.raises(KeyboardInterrupt):
        sweep.run(grid, tmp_path / "out", **ways)
    tests, queries = [10, 20, 30], [10, 20, 30, 40]
    whole = [*queries, *tests] if cached else [*tests, *queries]  # known cells are looked for first
    assert asked == whole[:stop]
    kept = list((tmp_path / "out" / "checkpoints").glob("answers-*"))
    assert len(kept) == (2 if stop > 3 and not cached else 1)
    rows = sweep.run(grid, tmp_path / "out", resume=True, **ways)
    assert asked[stop:] == whole[stop:]
    fields = "id", "attacker_losses", "attacker_accuracies", "l1_mean"
    found = [[row[field] for field in fields] for row in rows]
    assert found == [[row[field] for field in fields] for row in wanted]
    assert not list((tmp_path / "out" / "checkpoints").glob("answers-*"))


# --- one process alone ----------------------------------------------------------------------------


def test_one_process_is_what_it_would_be_without():
    assert not processes.several()
    assert processes.is_first()
    assert processes.by_first(lambda a, b: (a, b))(1, b=2) == (1, 2)
    assert processes.together(lambda a: a + 1)(1) == 2
    assert [processes.any_of(each) for each in (True, False)] == [True, False]
    processes.check_same("data", "whatever")
    with pytest.raises(ZeroDivisionError):
        processes.by_first(lambda: 1 / 0)()


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["--coordinator", "localhost:1"], "add --distributed"),
        (["--processes", "2"], "add --distributed"),
        (["--process", "0"], "add --distributed"),
        (["--distributed"], "give --coordinator HOST:PORT, --processes N and --process I"),
    ],
)
def test_processes_that_cannot_be_connected_are_one_line(tmp_path, capfd, words, said):
    for command in ("sweep", "angle"):
        assert main([command, "--out", str(tmp_path / "out"), *words]) == 2
        (line,) = capfd.readouterr().err.splitlines()
        assert line.startswith("madjax: error: ")
        assert said in line
    assert not (tmp_path / "out").exists()
