"""Who looks on sees what a run is at, and disturbs nothing."""

import json
import re
import shutil
import struct
import sys
from dataclasses import replace

import numpy as np
import pytest

from madjax import MAD, Defended, InputError, Knockoff, Recipe, Sweep, Task, jbda, store, sweep
from madjax.attacks import Online
from madjax.cli import main
from madjax.report import read_rows
from madjax.sweep import progress
from madjax.sweep.progress import Progress
from madjax.tensorboard import TensorBoard
from tests.networks import Linear

pytestmark = pytest.mark.smoke
module = sys.modules[sweep.run.__module__]

RECIPE = Recipe(epochs=3, batch_size=16)


def config(seeds=(0,)):
    """Surrogates are trained for an epoch; cells of a seed are 2 strengths x 2 budgets, and 2."""
    each = {"architecture": Linear, "recipe": RECIPE}
    return Sweep(
        "seen",
        (Task("tiny", "tiny", architecture=Linear, victim=RECIPE),),
        (Defended(MAD(layers="last", surrogate_epochs=1), (0.0, 0.9)),),
        (
            Knockoff(budget=40, **each),
            jbda(budget=20, seeds=10, substitute=RECIPE, **each),
        ),
        budgets=(20,),
        seeds=seeds,
    )


STOLEN = 2 * 3 * (20 + 40 + 20)
"""Examples that its attackers train on, each as often as there are epochs."""


class Seen:
    """Callbacks that remember, and look at the run's directory meanwhile."""

    def __init__(self, out):
        self.out, self.epochs, self.rows, self.looks = out, [], [], []

    def on_epoch(self, epoch):
        self.epochs.append(epoch)
        self.looks.append(sweep.status(self.out))

    def on_row(self, row):
        assert row["id"] in store.ids(self.out)
        self.rows.append(row)


@pytest.fixture(scope="module")
def seen(folder, tmp_path_factory):
    """A run that was looked at all the time, and its rows."""
    out = tmp_path_factory.mktemp("runs") / "out"
    seen = Seen(out)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(progress, "INTERVAL", 0)
        calls = {"on_row": seen.on_row, "on_epoch": seen.on_epoch}
        rows = sweep.run(config(), out, data_dir=folder, log=None, **calls)
    return seen, rows


def test_callbacks_hear_of_every_row_that_is_on_disk(seen):
    seen, rows = seen
    assert [{k: v for k, v in row.items() if k != "label"} for row in seen.rows] == rows
    assert seen.rows[0]["label"] == (
        "tiny <- tiny, mad, last, extreme, l1, surrogate of 1 epoch against knockoff, budget 20, "
        "strength 0, seed 0"
    )


def test_callbacks_hear_of_every_epoch_of_every_network(seen):
    seen, rows = seen
    numbers = [(epoch.networks[0], epoch.epoch, epoch.epochs) for epoch in seen.epochs[:4]]
    assert numbers == [*(("tiny, victim", e, 3) for e in (1, 2, 3)), ("tiny, surrogate", 1, 1)]
    checkpoints = {path.name for path in (seen.out / "checkpoints").iterdir()}
    assert {each for epoch in seen.epochs[:4] for each in epoch.ids} == checkpoints
    courses, labels = {}, {row["id"]: row["label"] for row in seen.rows}
    for epoch in seen.epochs[4:]:
        assert epoch.networks == tuple(labels[each] for each in epoch.ids)
        for name, *values in zip(epoch.ids, epoch.accuracy, epoch.loss, strict=True):
            courses.setdefault(name, []).append((epoch.epoch, epoch.epochs, *values))
    assert len(rows) == 6
    assert {*courses} == {*labels}
    for row in rows:
        wanted = zip(row["attacker_accuracies"], row["attacker_losses"], strict=True)
        found = courses[row["id"]]
        assert [each[:2] for each in found] == [(e, 3) for e in (1, 2, 3)]
        np.testing.assert_allclose([each[2:] for each in found], [*wanted], rtol=1e-6)


def test_the_status_of_a_run_at_work_says_how_far_it_is(seen):
    seen, _ = seen
    assert {(look.at_work, look.cells, look.name) for look in seen.looks} == {(True, 6, "seen")}
    done = [look.done for look in seen.looks]
    assert done == sorted(done)
    assert done[0] == 0
    assert done[-1] == 4
    stages = [look.progress["stage"] for look in seen.looks]
    assert stages[1] == "tiny, victim, epoch 2 of 3"
    assert stages[-1].endswith("against jbda, 2 stolen models, epoch 3 of 3")
    trained = [look.progress["examples"] for look in seen.looks[4:]]
    assert trained == [*range(40, 121, 40), *range(200, 361, 80), *range(400, STOLEN + 1, 40)]
    last = seen.looks[-1]
    assert last.progress["examples_total"] == STOLEN
    assert last.progress["examples_per_second"] > 0
    assert last.seconds_left == 0
    assert "at work (process " in last.text()
    assert "cells     4 of 6 have their row\n" in last.text()


def test_the_status_of_a_finished_run(seen, capsys):
    seen, _ = seen
    assert main(["status", str(seen.out)]) == 0
    first, *others = capsys.readouterr().out.splitlines()
    assert first == f"{seen.out}: seen, finished"
    assert others[0] == "cells     6 of 6 have their row"
    assert others[1] == "stage     ended"
    assert others[2].startswith(f"trained   {STOLEN} of {STOLEN} examples, ")
    assert others[3].startswith("programs  ")
    assert main(["status", str(seen.out), str(seen.out), "--json"]) == 0
    one, two = capsys.readouterr().out.split("\n\n")
    assert json.loads(one) == json.loads(two)
    assert json.loads(one)["progress"]["state"] == "finished"


def test_a_callback_that_raises_ends_the_run_which_goes_on(seen, folder, tmp_path):
    _, wanted = seen
    rows, out = [], tmp_path / "out"

    def fail(row):
        rows.append(row)
        raise ZeroDivisionError("no")

    with pytest.raises(ZeroDivisionError):
        sweep.run(config(), out, data_dir=folder, log=None, on_row=fail)
    assert len(rows) == 1
    look = sweep.status(out)
    assert (look.at_work, look.done) == (False, 2)  # the wave's rows are written at once
    said = (
        r"failed \(ZeroDivisionError: no, \S+test_progress.py:\d+\) \d+ s ago: go on with --resume"
    )
    assert re.search(said, look.text())
    again = sweep.run(config(), out, data_dir=folder, log=None, resume=True)
    assert [row["attacker_losses"] for row in again] == [row["attacker_losses"] for row in wanted]
    left = sweep.status(out).progress
    assert left["examples"] == left["examples_total"] == STOLEN - 2 * 3 * 20


def test_epochs_of_an_earlier_command_are_not_left_to_train(folder, tmp_path):
    """A run that was stopped in the middle of a wave."""
    out = tmp_path / "out"

    def stop(epoch):
        if (len(epoch.networks), epoch.epoch) == (2, 2):
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        sweep.run(config(), out, data_dir=folder, log=None, on_epoch=stop)
    assert re.search(r": seen, stopped by SIGINT \d+ s ago: go on", sweep.status(out).text())
    sweep.run(config(), out, data_dir=folder, log=None, resume=True)
    left = sweep.status(out).progress
    assert left["examples"] == left["examples_total"] == STOLEN - 2 * 2 * 20


def test_the_status_is_of_this_run_from_its_beginning(seen, folder, tmp_path, monkeypatch):
    """Not of an earlier command, though a plan is made first; a new stage is told at once."""
    looks, out, planned = [], tmp_path / "out", module.planned
    stop = {"on_row": lambda row: 1 / 0}
    with pytest.raises(ZeroDivisionError):
        sweep.run(config(), out, data_dir=folder, log=None, **stop)

    def look(*arguments):
        looks.append(sweep.status(out))
        return planned(*arguments)

    def heard(epoch):
        looks.append(sweep.status(out))

    monkeypatch.setattr(module, "planned", look)
    sweep.run(config(), out, data_dir=folder, log=None, resume=True, on_epoch=heard)
    first, second = looks[:2]
    assert (first.progress["stage"], first.progress["examples_per_second"]) == ("begins", None)
    assert "\nstage     begins (" in first.text()
    assert second.progress["stage"].startswith(
        "mad, last, extreme, l1, surrogate of 1 epoch against knockoff, 2 stolen models, epoch"
    )


def test_a_run_on_another_machine_may_be_at_work(seen, tmp_path):
    """Whose locks are not always seen here."""
    seen, _ = seen
    shutil.copytree(seen.out, tmp_path / "out")
    (tmp_path / "out" / store.ROWS).unlink()
    said = store.read_progress(seen.out) | {"state": "at work", "host": "another"}
    store.save_progress(tmp_path / "out", said)
    text = sweep.status(tmp_path / "out").text()
    assert re.search(r": seen, killed, or at work on another, last seen \d+ s ago\n", text)


def test_what_was_killed_says_so(folder, tmp_path, monkeypatch):
    """It leaves no word of its end, and the lock is free."""
    out, saved = tmp_path / "out", []
    monkeypatch.setattr(store, "save_progress", lambda directory, said: saved.append(said))
    sweep.run(replace(config(), name="k"), out, data_dir=folder, log=None)
    (out / store.ROWS).unlink()
    assert sweep.status(
        out
    ).text() == f"{out}: k, killed: go on with --resume\ncells     0 of 6" + (" have their row")
    monkeypatch.undo()
    store.save_progress(out, saved[0] | {"at": "2026-01-01T00:00:00Z"})
    assert sweep.status(out).text().startswith(f"{out}: k, killed, last seen ")


def test_the_status_of_a_run_of_an_older_madjax_counts_its_rows(tmp_path):
    (tmp_path / store.CONFIG).write_text('{"name": "old"}')
    (tmp_path / store.ROWS).write_text('{"epsilon": 0.5}\n{"epsilon": 0.9}\n{"epsi')
    wanted = f"{tmp_path}: old, finished\ncells     2 of 2 have their row"
    assert sweep.status(tmp_path).text() == wanted


def test_a_status_is_of_a_run(tmp_path, capsys):
    assert main(["status", str(tmp_path)]) == 2
    assert "holds no run: give the --out of madjax sweep" in capsys.readouterr().err


def test_a_quiet_command_prints_nothing(folder, tmp_path, capfd):
    file, out = tmp_path / "config.py", tmp_path / "out"
    file.write_text("from tests.test_progress import config\n")
    words = ["sweep", str(file), "--data-dir", str(folder), "--out", str(out)]
    assert main([*words, "--quiet"]) == 0
    assert capfd.readouterr() == ("", "")
    assert len(read_rows(out)) == 6
    assert (out / "report.md").exists()
    assert main([*words, "--quiet", "--resume"]) == 0
    assert capfd.readouterr() == ("", "")
    assert main([*words, "--quiet"]) == 2
    assert "add --resume" in capfd.readouterr().err


def test_the_pace_is_that_of_training(tmp_path, monkeypatch):
    """What passes between two waves, as queries, is no part of it."""
    now = [0.0]
    monkeypatch.setattr(progress.time, "monotonic", lambda: now[0])
    monkeypatch.setattr(progress, "INTERVAL", 0)
    lines = []
    watch = Progress(lines.append)

    def trained(seconds, examples):
        now[0] += seconds
        none = np.zeros(0)
        watch.trained("a", examples, lambda: progress.Epoch((), (), 1, 2, none, none))
        return store.read_progress(tmp_path)["examples_per_second"]

    with watch.of_run(tmp_path, 2, 0, 1000):
        watch.trains("a", 0, 2)
        assert trained(2, 100) == 50
        assert trained(2, 300) == 100
        now[0] += 1000
        watch.trains("a", 0, 2)
        assert store.read_progress(tmp_path)["examples_per_second"] == 100
        assert trained(1, 200) == 200
    assert lines[-1].startswith("programs: 0 compiled in 0.0 s")


def test_online_attackers_are_heard_at_each_evaluation(folder, tmp_path):
    attack = Online(budget=48, images=60, every=2, judged=8, architecture=Linear, recipe=RECIPE)
    chosen, heard = replace(config(), attacks=(attack,), budgets=()), []
    rows = sweep.run(chosen, tmp_path / "out", data_dir=folder, log=None, on_epoch=heard.append)
    heard = [epoch for epoch in heard if len(epoch.networks) == 2]
    assert [(epoch.epoch, epoch.epochs) for epoch in heard] == [(1, 2), (2, 2)]
    for i, row in enumerate(rows):
        assert [epoch.accuracy[i] for epoch in heard] == pytest.approx(row["attacker_accuracies"])
        assert [epoch.loss[i] for epoch in heard] == pytest.approx(row["test_losses"])
    said = sweep.status(tmp_path / "out").progress
    assert said["examples"] == said["examples_total"] == 2 * 48

    def stop(epoch):
        if len(epoch.networks) == 2:
            raise KeyboardInterrupt

    ways = {"data_dir": folder, "log": None}
    with pytest.raises(KeyboardInterrupt):
        sweep.run(chosen, tmp_path / "stopped", on_epoch=stop, **ways)
    assert sweep.run(chosen, tmp_path / "stopped", resume=True, **ways)
    left = sweep.status(tmp_path / "stopped").progress
    assert left["examples"] == left["examples_total"] == 2 * 16


# --- TensorBoard ----------------------------------------------------------------------------------


def events(folder):
    """Tag -> values of the event files in a folder, in order; with the number of other entries."""
    from tensorboardX.proto.event_pb2 import Event

    found, others = {}, 0
    for file in sorted(folder.iterdir()):
        data, at = file.read_bytes(), 0
        while at < len(data):
            (size,) = struct.unpack("<Q", data[at : at + 8])
            for value in Event.FromString(data[at + 12 : at + 12 + size]).summary.value:
                if value.HasField("simple_value"):
                    found.setdefault(value.tag, []).append(value.simple_value)
                else:
                    others += 1
            at += size + 16
    return found, others


def several():
    """The same at two seeds."""
    return config(seeds=(0, 1))


def test_tensorboard_has_the_curves_and_results_of_every_network(folder, tmp_path, capfd):
    file, out = tmp_path / "config.py", tmp_path / "out"
    file.write_text("from tests.test_progress import several as config\n")
    words = ["sweep", str(file), "--data-dir", str(folder), "--out", str(out)]
    assert main([*words, "--quiet", "--tensorboard"]) == 0
    assert capfd.readouterr() == ("", "")
    rows, board = read_rows(out), out / "tensorboard"
    owners = [path.name for path in (out / "checkpoints").iterdir()]
    assert len(owners) == 3  # a victim, and a surrogate for each seed
    assert len(list(board.iterdir())) == 3 + len(rows) == 15
    for name in owners:
        kind = name.split("-")[0]
        curve = events(board / f"tiny, {kind}, {name}")[0]
        assert len(curve["loss"]) == len(curve["accuracy"]) == {"victim": 3, "surrogate": 1}[kind]
    for row in rows:
        (mine,) = board.glob(f"*, {row['id']}")
        assert f", strength {row['strength']:g}, seed {row['seed']}, " in mine.name
        found, others = events(mine)
        assert found["accuracy"] == pytest.approx(row["attacker_accuracies"])
        assert found["loss"] == pytest.approx(row["attacker_losses"])
        assert found["defender_accuracy"] == pytest.approx([row["defender_accuracy"]])
        assert others == 3  # the settings, their beginning and their end


def test_event_files_are_those_of_tensorboardx(tmp_path):
    from tensorboardX import SummaryWriter

    values = np.full(1, 0.5)
    TensorBoard(tmp_path).on_epoch(sweep.Epoch(("a",), ("b",), 7, 9, values, values))
    with SummaryWriter(str(tmp_path / "theirs")) as writer:
        writer.add_scalar("accuracy", 0.5, 7)
        writer.add_scalar("loss", 0.5, 7)
    (mine,) = (tmp_path / "tensorboard" / "a, b").iterdir()
    (theirs,) = (tmp_path / "theirs").iterdir()
    assert [*records(mine)] == [*records(theirs)]


def records(file):
    """The events of a file without their times; their checksums are right."""
    from tensorboardX.proto.event_pb2 import Event
    from tensorboardX.record_writer import masked_crc32c

    data, at = file.read_bytes(), 0
    while at < len(data):
        (size,) = struct.unpack("<Q", data[at : at + 8])
        body = data[at + 12 : at + 12 + size]
        assert struct.unpack("<I", data[at + 8 : at + 12])[0] == masked_crc32c(data[at : at + 8])
        assert struct.unpack("<I", data[at + 12 + size :][:4])[0] == masked_crc32c(body)
        event = Event.FromString(body)
        event.ClearField("wall_time")
        yield event
        at += size + 16


def test_tensorboard_takes_labels_of_any_length(tmp_path):
    values, board = np.ones(1), TensorBoard(tmp_path)
    for name in "ab":
        board.on_epoch(sweep.Epoch((f"a/b: {'c' * 300}",), (name,), 1, 1, values, values))
    assert len(list((tmp_path / "tensorboard").iterdir())) == 2


def test_tensorboard_that_cannot_be_written_ends_the_run_in_one_line(
    folder, tmp_path, monkeypatch, capsys
):
    file, out = tmp_path / "config.py", tmp_path / "out"
    file.write_text("from tests.test_progress import config\n")
    words = ["sweep", str(file), "--data-dir", str(folder), "--out", str(out), "--tensorboard"]
    write = TensorBoard.on_row

    def full(self, row):
        (out / "tensorboard").rename(out / "moved")
        (out / "tensorboard").write_text("")
        write(self, row)

    monkeypatch.setattr(TensorBoard, "on_row", full)
    assert main([*words, "--quiet"]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("madjax: error: ")
    assert "tensorboard" in line


@pytest.mark.parametrize("module", ["tensorboardX", "tensorboardX.summary"])
def test_tensorboard_that_is_not_installed_is_named_before_any_work(
    folder, tmp_path, monkeypatch, capsys, module
):
    file, out = tmp_path / "config.py", tmp_path / "out"
    file.write_text("from tests.test_progress import config\n")
    monkeypatch.setitem(sys.modules, module, None)
    words = ["sweep", str(file), "--data-dir", str(folder), "--out", str(out), "--tensorboard"]
    assert main(words) == 2
    assert 'pip install "madjax[tensorboard]", or leave out' in capsys.readouterr().err
    assert not out.exists()
    with pytest.raises(InputError, match="tensorboardX cannot be used"):
        TensorBoard(tmp_path)
