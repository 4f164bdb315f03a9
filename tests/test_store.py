"""What a run leaves on disk survives a crash, and is never overwritten."""

import json
import multiprocessing
import os
import signal
import threading
import time

import jax.numpy as jnp
import numpy as np
import pytest

from madjax import InputError, checkpoints, store
from madjax.report import read_rows

pytestmark = pytest.mark.smoke

CONFIG = {"name": "a", "attack": {"budget": 10}, "seeds": [0]}
CELLS = ["a", "b"]


def reopened(*run, **options):
    """The rows of a run that is opened and closed."""
    with store.open_run(*run, **options) as rows:
        return rows


def test_two_commands_never_share_a_directory(tmp_path):
    """The second is refused at once; a command that ended, well or not, keeps none out."""
    with store.open_run(tmp_path / "run", CONFIG, CELLS, resume=False):
        for resume in (False, True):
            with pytest.raises(InputError, match=r"another command is at work in \S+run: wait"):
                reopened(tmp_path / "run", CONFIG, CELLS, resume=resume)
    with (
        pytest.raises(ZeroDivisionError),
        store.open_run(tmp_path / "run", CONFIG, CELLS, resume=True),
    ):
        1 / 0  # noqa: B018
    killed = multiprocessing.get_context("spawn").Process(target=die_in, args=(tmp_path / "run",))
    killed.start()
    killed.join()
    assert killed.exitcode == -signal.SIGKILL
    assert reopened(tmp_path / "run", CONFIG, CELLS, resume=True) == []


def die_in(directory):
    with store.open_run(directory, CONFIG, CELLS, resume=True):
        os.kill(os.getpid(), signal.SIGKILL)


def test_rows_are_whole_lines(tmp_path):
    reopened(tmp_path / "run", CONFIG, CELLS, resume=False)
    for i in range(3):
        store.append_rows(tmp_path / "run", [{"i": i}])
    lines = (tmp_path / "run" / "rows.jsonl").read_text().splitlines()
    assert [json.loads(line) for line in lines] == [{"i": 0}, {"i": 1}, {"i": 2}]


def test_a_half_written_row_is_cut_off_on_resume(tmp_path):
    reopened(tmp_path, CONFIG, CELLS, resume=False)
    store.append_rows(tmp_path, [{"i": 0}])
    with (tmp_path / "rows.jsonl").open("a") as file:
        file.write('{"i": 1, "accur')
    with pytest.warns(UserWarning, match=r"rows\.jsonl: the last row was half written and is cut"):
        assert reopened(tmp_path, CONFIG, CELLS, resume=True) == [{"i": 0}]
    store.append_rows(tmp_path, [{"i": 1}])
    assert reopened(tmp_path, CONFIG, CELLS, resume=True) == [{"i": 0}, {"i": 1}]


def test_a_row_that_json_cannot_hold_is_an_error_and_not_written(tmp_path):
    reopened(tmp_path, CONFIG, CELLS, resume=False)
    with pytest.raises(ValueError, match="JSON"):
        store.append_rows(tmp_path, [{"kl_mean": float("inf")}])
    assert not (tmp_path / "rows.jsonl").exists()


def test_a_write_cut_short_leaves_no_part_of_a_row(tmp_path, monkeypatch):
    reopened(tmp_path, CONFIG, CELLS, resume=False)
    store.append_rows(tmp_path, [{"i": 0}])
    write = store.os.write
    monkeypatch.setattr(store.os, "write", lambda handle, data: write(handle, data[:4]))
    with pytest.raises(OSError, match="disk is full"):
        store.append_rows(tmp_path, [{"i": 1}])
    monkeypatch.undo()
    store.append_rows(tmp_path, [{"i": 2}])
    assert reopened(tmp_path, CONFIG, CELLS, resume=True) == [{"i": 0}, {"i": 2}]


def test_damaged_files_are_named(tmp_path):
    reopened(tmp_path, CONFIG, CELLS, resume=False)
    (tmp_path / "rows.jsonl").write_text('{"i": 0}\n{"i": \n{"i": 2}\n')
    with pytest.raises(InputError, match=r"rows\.jsonl:2 is damaged"):
        reopened(tmp_path, CONFIG, CELLS, resume=True)
    with pytest.raises(InputError, match=r"rows\.jsonl:2 is damaged"):
        store.ids(tmp_path)
    (tmp_path / "config.json").write_text("{")
    with pytest.raises(InputError, match=r"config\.json is damaged"):
        reopened(tmp_path, CONFIG, CELLS, resume=True)


def test_another_run_is_never_touched(tmp_path):
    reopened(tmp_path, CONFIG, CELLS, resume=False)
    store.append_rows(tmp_path, [{"i": 0}])
    with pytest.raises(InputError, match="already holds a run: add --resume"):
        reopened(tmp_path, CONFIG, CELLS, resume=False)
    changed = {**CONFIG, "attack": {"budget": 20}}
    with pytest.raises(InputError, match=r"attack\.budget = 10, not 20"):
        reopened(tmp_path, changed, ["c"], resume=True)
    with pytest.raises(InputError, match="of the same config by another madjax"):
        reopened(tmp_path, CONFIG, ["c"], resume=True)
    with pytest.raises(InputError, match=r"with seeds = \[0\], not \[1\]"):
        reopened(tmp_path, {**CONFIG, "seeds": [1]}, ["c"], resume=True)
    both = {"attack": {"budget": 20}, "seeds": [1]}
    with pytest.raises(InputError, match=r"budget = 10, not 20; seeds = \[0\], not \[1\]: resume"):
        reopened(tmp_path, {**CONFIG, **both}, ["c"], resume=True)
    assert reopened(tmp_path, CONFIG, CELLS, resume=True) == [{"i": 0}]


def test_a_config_that_differs_in_all_is_refused_in_one_line(tmp_path):
    before, after = ({f"f{i}": i + j for i in range(20)} for j in (0, 1))
    reopened(tmp_path, before, CELLS, resume=False)
    with pytest.raises(InputError, match=r"f7 = 7, not 8; and 12 more: resume"):
        reopened(tmp_path, after, ["c"], resume=True)


def test_a_run_may_grow_and_not_shrink(tmp_path):
    reopened(tmp_path, CONFIG, CELLS, resume=False)
    store.append_rows(tmp_path, [{"i": 0}])
    larger = {**CONFIG, "seeds": [0, 1]}
    assert reopened(tmp_path, larger, [*CELLS, "c"], resume=True) == [{"i": 0}]
    with pytest.raises(
        InputError, match=r"with seeds = \[0, 1\], not \[0\]: resume with that config"
    ):
        reopened(tmp_path, CONFIG, CELLS, resume=True)


def test_a_run_of_before_there_were_ids_is_refused(tmp_path):
    (tmp_path / "config.json").write_text(json.dumps(CONFIG))
    with pytest.raises(InputError, match="holds a run of an older madjax"):
        reopened(tmp_path, CONFIG, CELLS, resume=True)


def test_a_directory_of_something_else_is_refused(tmp_path):
    (tmp_path / "thesis.tex").write_text("precious")
    with pytest.raises(InputError, match="holds no run"):
        reopened(tmp_path, CONFIG, CELLS, resume=False)
    with pytest.raises(InputError, match="holds no run"):
        reopened(tmp_path / "thesis.tex", CONFIG, CELLS, resume=True)
    assert (tmp_path / "thesis.tex").read_text() == "precious"


def test_resume_of_nothing_starts_a_run(tmp_path):
    assert reopened(tmp_path / "new", CONFIG, CELLS, resume=True) == []
    assert (tmp_path / "new" / "config.json").is_file()


def test_a_directory_that_cannot_be_made_is_named(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(InputError, match="cannot be written"):
        reopened(tmp_path / "file" / "run", CONFIG, CELLS, resume=False)


def test_checkpoints_come_back_as_they_were_and_only_the_newest_stays(tmp_path):
    tree = {"w": jnp.arange(6.0).reshape(2, 3), "n": (jnp.int32(4), None)}
    assert store.restore(tmp_path, "wave-0", tree) is None
    store.save(tmp_path, "wave-0", 1, {"w": tree["w"] * 0, "n": (jnp.int32(0), None)})
    store.save(tmp_path, "wave-0", 2, tree)
    back = store.restore(tmp_path, "wave-0", tree)
    np.testing.assert_array_equal(back["w"], tree["w"])
    assert isinstance(back["n"], tuple)
    assert back["n"][0] == 4
    assert back["n"][0].dtype == np.int32
    assert [p.name for p in (tmp_path / "checkpoints" / "wave-0").iterdir()] == ["2"]
    store.discard(tmp_path, "wave-0")
    store.discard(tmp_path, "wave-0")
    assert store.restore(tmp_path, "wave-0", tree) is None


def test_a_damaged_checkpoint_is_passed_over(tmp_path):
    """A shard cut short, as a full disk leaves it: the step before, else the stage runs again."""
    tree = {"w": jnp.arange(1000.0)}
    store.save(tmp_path, "victim", 2, tree)
    store.wait(tmp_path)
    (tmp_path / "checkpoints" / "victim" / "2").rename(tmp_path / "kept")
    store.save(tmp_path, "victim", 3, {"w": tree["w"] + 1})
    store.wait(tmp_path)
    cut_short(tmp_path / "checkpoints" / "victim" / "3")
    with pytest.warns(UserWarning, match=r"victim/3 is damaged \(.*\): what it held is computed"):
        assert store.restore(tmp_path, "victim", tree) is None
    (tmp_path / "kept").rename(tmp_path / "checkpoints" / "victim" / "2")
    with pytest.warns(UserWarning, match="victim/3 is damaged") as caught:
        back = store.restore(tmp_path, "victim", tree)
    assert len(caught) == 1
    assert "\n" not in str(caught[0].message)
    np.testing.assert_array_equal(back["w"], tree["w"])


def cut_short(folder):
    """Halve the largest file of a checkpoint, and every other above a kilobyte."""
    sizes = {path: path.stat().st_size for path in folder.rglob("*") if path.is_file()}
    for path, size in sizes.items():
        if size in (max(sizes.values()),) or size > 1000:
            os.truncate(path, size // 2)


def slow(monkeypatch, meanwhile=lambda: None):
    """Let the writing of checkpoints take a while."""
    write = checkpoints._checkpointer

    def take_a_while():
        meanwhile()
        time.sleep(0.2)
        return write()

    monkeypatch.setattr(checkpoints, "_checkpointer", take_a_while)


def test_a_run_that_is_stopped_leaves_its_last_checkpoint_whole(tmp_path, monkeypatch):
    slow(monkeypatch)
    tree = {"w": np.arange(6.0)}

    def run():
        with store.open_run(tmp_path, CONFIG, CELLS, resume=False):
            store.save(tmp_path, "wave", 1, tree)
            store.save(tmp_path, "wave", 2, {"w": tree["w"] + 1})
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        run()
    assert [p.name for p in (tmp_path / "checkpoints" / "wave").iterdir()] == ["2"]
    np.testing.assert_array_equal(store.restore(tmp_path, "wave", tree)["w"], tree["w"] + 1)


def test_what_is_written_is_what_was_there_when_it_was_saved(tmp_path, monkeypatch):
    """And nobody waits for it but who reads."""
    slow(monkeypatch)
    tree = {"w": np.arange(6.0)}
    began = time.monotonic()
    store.save(tmp_path, "wave", 1, tree)
    assert time.monotonic() - began < 0.1
    tree["w"][:] = 7
    assert store.holds(tmp_path, "wave", 1)
    np.testing.assert_array_equal(store.restore(tmp_path, "wave", tree)["w"], np.arange(6.0))


@pytest.mark.parametrize(
    "then",
    [
        lambda run: store.save(run, "wave", 2, {"w": np.arange(6.0)}),
        lambda run: store.restore(run, "wave", {"w": np.arange(6.0)}),
        lambda run: store.discard(run, "wave"),
        lambda run: None,
    ],
    ids=["save", "restore", "discard", "end"],
)
def test_a_checkpoint_that_cannot_be_written_is_said_by_what_comes_next(
    tmp_path, monkeypatch, then
):
    def fail():
        raise ValueError(
            "RESOURCE_EXHAUSTED: a/0 of many words [os_error_code='28']"
        )  # as TensorStore says it

    def run():
        with store.open_run(tmp_path, CONFIG, CELLS, resume=False):
            store.save(tmp_path, "wave", 1, {"w": np.arange(6.0)})
            then(tmp_path)

    slow(monkeypatch, fail)
    said = r"wave/1 cannot be written \(No space left on device\): .* go on with --resume"
    with pytest.raises(InputError, match=said):
        run()
    store.wait(tmp_path)  # it is said once


def test_a_run_that_fails_says_why_and_then_what_could_not_be_written(tmp_path, monkeypatch):
    def fail():
        raise ValueError("no space left on device")

    def run():
        with store.open_run(tmp_path, CONFIG, CELLS, resume=False):
            store.save(tmp_path, "wave", 1, {"w": np.arange(6.0)})
            raise KeyboardInterrupt

    slow(monkeypatch, fail)
    with pytest.warns(UserWarning, match="no space left"), pytest.raises(KeyboardInterrupt):
        run()
    assert reopened(tmp_path, CONFIG, CELLS, resume=True) == []


def test_what_a_crash_left_of_the_first_file_blocks_nothing(tmp_path):
    (tmp_path / ".config.json.part").write_text('{"na')
    assert reopened(tmp_path, CONFIG, CELLS, resume=False) == []
    assert sorted(path.name for path in tmp_path.iterdir()) == [".lock", "config.json"]


def test_rows_of_a_run_are_what_a_report_reads(tmp_path):
    reopened(tmp_path, CONFIG, CELLS, resume=False)
    with pytest.raises(InputError, match=r"rows\.jsonl"):
        read_rows(tmp_path)


def test_runs_in_threads_of_one_process_do_not_lose_checkpoints(tmp_path):
    """Each with a directory of its own."""
    lost = []

    def run(directory):
        try:
            for step in range(1, 21):
                store.save(directory, "part", step, {"a": np.full(3, step)})
            found = store.restore(directory, "part", {"a": np.zeros(3, int)})
            np.testing.assert_array_equal(found["a"], step)
        except Exception as error:
            lost.append(error)

    threads = [threading.Thread(target=run, args=(tmp_path / name,)) for name in "abcd"]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert lost == []
