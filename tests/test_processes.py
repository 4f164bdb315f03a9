"""Several processes against one: the same rows, and one that stops or fails stops all."""

import json
import os
import signal
import socket
import subprocess
import sys
import time
from dataclasses import replace
from functools import partial
from pathlib import Path
from tempfile import gettempdir

import jax
import numpy as np
import pytest

from madjax import (
    MAD,
    Defended,
    InputError,
    Knockoff,
    Online,
    Recipe,
    Sweep,
    Task,
    Trained,
    jbda,
    processes,
    stopping,
    store,
    sweep,
)
from madjax.report import read_rows
from tests.networks import Linear

RECIPE = Recipe(epochs=3, batch_size=8)
SMALL = {"budget": 24, "architecture": Linear, "recipe": RECIPE}
GRID = Sweep(
    name="grid",
    tasks=(Task("tiny", "tiny", architecture=Linear, victim=RECIPE),),
    defenses=(Defended(MAD(layers="last"), (0.5, 0.9)),),
    attacks=(Knockoff(**SMALL),),
    budgets=(12,),
    seeds=(0, 1, 2),
)


def others(seed):
    """Cells of which none is in the cache."""
    (task,) = GRID.tasks
    return replace(GRID, tasks=(replace(task, victim_seed=seed),), seeds=(seed, seed + 1))


ONLINE = Online(budget=24, images=24, architecture=Linear, every=8, judged=20)
RUNS = {
    "grid": GRID,
    "shared": others(7),
    "parts": others(5),
    "jbda": replace(GRID, attacks=(jbda(seeds=8, **SMALL),), seeds=(0,)),
    "online": replace(
        GRID, defenses=(Defended(MAD(layers="last"), (0.0, 0.9)),), attacks=(ONLINE,), budgets=()
    ),
}


def chosen(name, out):
    """A config by its name; "given" has a victim from the directory of the first process."""
    if name != "given":
        return RUNS[name]
    (path,) = (out.parent / "0" / "grid" / "checkpoints").glob("victim-*")
    return replace(others(3), tasks=(replace(GRID.tasks[0], victim=Trained(str(path))),))


NAMES = [*RUNS, "given"]
WAYS = {"shared": {"devices_per_cell": 2}}
DEVICES = {"grid": (1, 2, 4), "jbda": (4,), "online": (4,)}


def long():
    """A grid that takes a few seconds."""
    attack = Knockoff(**SMALL | {"recipe": replace(RECIPE, epochs=40)})
    return replace(GRID, attacks=(attack,), seeds=(0, 1))


def launch(words, cache):
    """One of two processes, under way."""
    settings = {
        "MADJAX_CACHE": str(cache),
        "JAX_NUM_CPU_DEVICES": "2",
        "JAX_DISABLE_MOST_OPTIMIZATIONS": "1",
        "JAX_COMPILATION_CACHE_DIR": str(Path(gettempdir()) / f"madjax-compiled-{os.getuid()}"),
        "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
    }
    return subprocess.Popen(
        [sys.executable, *map(str, words)],
        cwd=Path(__file__).parents[1],
        env=os.environ | settings,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )


def free_port():
    with socket.socket() as found:
        found.bind(("localhost", 0))
        return found.getsockname()[1]


def said(pair):
    """What processes print until they end, and their statuses."""
    try:
        texts = [each.communicate(timeout=240)[0] for each in pair]
    finally:
        for each in pair:
            each.kill()
    return texts, [each.returncode for each in pair]


def work(data, out, address, index):
    """What each of two processes does: all runs, of which it writes down the rows that it got."""
    signal.signal(signal.SIGINT, signal.default_int_handler)  # which some that start others ignore
    processes.connect(address, 2, int(index))
    assert (jax.device_count(), jax.local_device_count()) == (4, 2)
    for name in NAMES:
        config = chosen(name, Path(out))
        run = partial(sweep.run, config, Path(out) / name, data_dir=data, **WAYS.get(name, {}))
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr("madjax.sweep.passes.INTERVAL", 0)
            patch.setattr("madjax.sweep.stock.QUERIES", 2)
            if name == "parts":
                patch.setattr("madjax.sweep.steal.at_once", lambda *_: 16)
                patch.setattr("madjax.sweep.stock.at_once_alone", lambda *_, **__: 16)
                stop_in_the_middle(run)
                run = partial(run, resume=True)
            (Path(out) / f"{name}.json").write_text(json.dumps(run()))
    assert sweep.programs["advance_part"]
    with pytest.raises(InputError, match="already holds a run"):  # which one of them finds
        sweep.run(config, Path(out) / name, data_dir=data)
    with pytest.raises(InputError, match="process 1 has other data, config, options or versions"):
        sweep.run(replace(config, seeds=(jax.process_index(),)), Path(out) / "n", data_dir=data)
    heard = []

    def fail(row):
        heard.append(row)
        raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        sweep.run(config, Path(out) / "heard", data_dir=data, on_row=fail)
    assert bool(heard) == processes.is_first()
    with pytest.raises(SystemExit):
        sweep.run(config, Path(out) / "left", data_dir=data, on_row=lambda row: sys.exit(3))
    with pytest.raises(InputError, match="process 1: .*tiny" if processes.is_first() else "tiny"):
        sweep.run(config, Path(out) / "n", data_dir=data if processes.is_first() else out)


def stop_in_the_middle(run):
    """One of two processes gets a Ctrl-C while it trains stolen models; both stop."""
    save, saved = store.save, []

    def interrupted(directory, name, step, tree):
        save(directory, name, step, tree)
        saved.append(step)
        if name.startswith("attack") and step == 2 and not processes.is_first():
            signal.raise_signal(signal.SIGINT)

    with pytest.MonkeyPatch.context() as patch, stopping.by_signal():
        patch.setattr(store, "save", interrupted)
        with pytest.raises(stopping.Stopped, match="SIGINT"):
            run()
    assert saved[-1] == 2


@pytest.fixture(scope="module")
def both(folder, tmp_path_factory):
    """The rows of all runs as each of two processes has them; only the first has a directory."""
    out, port = tmp_path_factory.mktemp("both"), free_port()
    pair = []
    for i in range(2):
        (out / str(i)).mkdir()
        call = "import sys; from tests.test_processes import work; work(*sys.argv[1:])"
        words = ["-c", call, folder, out / str(i), f"localhost:{port}", i]
        pair.append(launch(words, out / f"cache-{i}"))
    texts, statuses = said(pair)
    assert statuses == [0, 0], "\n".join(texts)
    for name in NAMES:
        assert (out / "0" / name / "rows.jsonl").is_file()
        assert not (out / "1" / name).exists()
    assert (out / "cache-0").is_dir()
    assert not (out / "cache-1").exists()
    assert "against knockoff" in texts[0]
    assert "against knockoff" not in texts[1]
    return out


@pytest.mark.parametrize("name", NAMES)
def test_two_processes_have_the_rows_of_one(both, folder, tmp_path, name):
    """Of one, two and four devices."""
    first, second = (json.loads((both / str(i) / f"{name}.json").read_text()) for i in range(2))
    assert first == second == read_rows(both / "0" / name)
    for devices in DEVICES.get(name, (1,)):
        quiet = {"data_dir": folder, "log": lambda line: None}
        some = jax.devices()[:devices]
        rows = sweep.run(chosen(name, both / "1"), tmp_path / str(devices), devices=some, **quiet)
        check_same(rows, first)


def check_same(rows, wanted):
    by_id = {row["id"]: row for row in wanted}
    assert len(by_id) == len(wanted)
    assert {row["id"] for row in rows} == set(by_id)
    for row in rows:
        same = by_id[row["id"]]
        for field in ("victim_accuracy", "defender_accuracy", "attacker_accuracies"):
            np.testing.assert_allclose(row[field], same[field], atol=1e-4, err_msg=field)
        for field in ("l1_mean", "entropy_mean", "attacker_losses", "angle_means"):
            if field in row:
                np.testing.assert_allclose(row[field], same[field], rtol=1e-4, err_msg=field)


def commands(out, data, *options):
    """A pair of `madjax sweep` under way."""
    file, port = out.with_name("long.py"), free_port()
    file.write_text("from tests.test_processes import long as config\n")
    words = ["-m", "madjax", "sweep", file, "--out", out, "--data-dir", data, "--distributed"]
    where = "--coordinator", f"localhost:{port}", "--processes", 2, "--process"
    return [launch([*words, *options, *where, i], "") for i in range(2)]


def wait_for(out, pattern, pair):
    """Until there is a file."""
    while not list(out.glob(pattern)):
        assert [each.poll() for each in pair] == [None, None]
        time.sleep(0.01)


def test_what_stops_one_process_stops_both_and_nothing_is_lost(folder, tmp_path):
    """A SIGTERM, a kill, and then the end."""
    out = tmp_path / "long"
    pair = commands(out, folder)
    wait_for(out, "checkpoints/victim-*", pair)
    pair[1].send_signal(signal.SIGTERM)
    texts, statuses = said(pair)
    assert statuses == [143, 143], "\n".join(texts)
    for text in texts:
        assert text.splitlines()[-1].startswith("madjax: stopped by SIGTERM; nothing finished")

    pair = commands(out, folder, "--resume")
    wait_for(out, "checkpoints/attack-*/1?", pair)
    pair[1].kill()
    texts, statuses = said(pair)
    assert statuses == [1, -signal.SIGKILL], "\n".join(texts)
    last = texts[0].splitlines()[-1]
    assert last.startswith("madjax: error: another process has died, or this one (")
    assert last.endswith("start all of them again, with --resume")
    (before,) = (int(path.name) for path in out.glob("checkpoints/attack-*/[1-4]?"))

    texts, statuses = said(commands(out, folder, "--resume"))
    assert statuses == [0, 0], "\n".join(texts)
    assert before >= 10
    rows = sweep.run(long(), tmp_path / "one", data_dir=folder, log=lambda line: None)
    check_same(read_rows(out), rows)
