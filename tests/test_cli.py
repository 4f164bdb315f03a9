"""The command line as a user meets it: the main job, and one clear line for every mistake."""

import importlib.metadata
import json
import os
import shutil
import subprocess
import sys
from functools import reduce
from pathlib import Path

import jax
import numpy as np
import pytest
from PIL import Image

import madjax
from madjax import InputError, config, sweep
from madjax.cli import main
from madjax.datasets import base_name

QUICK = (
    "tasks.dataset=embedded:mnist[:200,:100]",
    "tasks.queryset=embedded:fashion_mnist[:200]",
    "tasks.victim.epochs=1",
    "attacks.recipe.epochs=1",
    "attacks.budget=150",
    "defenses.strengths=0,0.99",
    "seeds=0",
)


def sets(*assignments):
    return [word for each in assignments for word in ("--set", each)]


def on(dataset, queryset):
    return f"tasks.dataset={dataset}", f"tasks.queryset={queryset}"


def test_the_main_job_and_its_report_from_any_directory(tmp_path, monkeypatch, capsys):
    """`madjax sweep` in a fresh process and a strange directory, cut to seconds by --set."""
    for name in ("jax_compilation_cache_dir", "jax_disable_most_optimizations"):
        if jax.config.values[name] is not None:
            monkeypatch.setenv(name.upper(), str(jax.config.values[name]))
    done = subprocess.run(
        [sys.executable, "-m", "madjax", "sweep", *sets(*QUICK)],
        cwd=tmp_path,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    monkeypatch.chdir(tmp_path)
    out = Path("runs/quickstart")
    rows = [json.loads(line) for line in (out / "rows.jsonl").read_text().splitlines()]
    assert [(row["strength"], row["seed"]) for row in rows] == [(0.0, 0), (0.99, 0)]
    assert rows[0]["victim"] == "lenet"
    assert (rows[0]["dataset"], rows[0]["queryset"]) == ("mnist", "fashion_mnist")
    np.testing.assert_allclose(rows[1]["l1_mean"], 0.99, atol=1e-5)
    assert (out / "tradeoff.png").read_bytes().startswith(b"\x89PNG")
    table = (out / "report.md").read_text()
    assert table.strip() in done.stdout
    assert main(["report", str(out)]) == 0
    assert table.strip() in capsys.readouterr().out
    assert main(["export", *sets(*QUICK), "--epsilon", "0.5"]) == 0
    said = capsys.readouterr().out
    assert "runs/quickstart/predict.jaxexport: uint8 images [B, 28, 28, 1]" in said
    images = madjax.open_dataset("embedded:mnist").x_test[:20]
    y_tilde = madjax.load(out / "predict.jaxexport")(images)
    chosen = reduce(config.override, QUICK, config.load("quickstart"))
    _, predict = sweep.defended(chosen, out, strength=0.0)  # exported was epsilon 0.5
    np.testing.assert_allclose(abs(predict(images) - y_tilde).sum(axis=1), 0.5, atol=1e-5)
    assert main(["sweep", *sets(*QUICK)]) == 2
    assert "already holds a run: add --resume" in capsys.readouterr().err


@pytest.mark.smoke
def test_version_and_help(capsys):
    for word in ("--version", "--help"):
        with pytest.raises(SystemExit) as ended:
            main([word])
        assert ended.value.code == 0
    said = capsys.readouterr().out
    assert said.startswith(f"madjax {importlib.metadata.version('madjax')}\n")
    assert "sweep" in said


@pytest.fixture
def data(tmp_path):
    """Small sets that do and do not fit each other."""
    folder = tmp_path / "data"
    folder.mkdir()

    def write(name, shape, tests=4):
        pixels = np.zeros((12, *shape), np.uint8)
        pixels[:, 0, 0] = np.arange(12).reshape(12, *[1] * (len(shape) - 2))
        labels = np.arange(12) % 2
        np.savez(
            folder / f"{name}.npz",
            x_train=pixels[:8],
            y_train=labels[:8],
            x_test=pixels[8 : 8 + tests],
            y_test=labels[8 : 8 + tests],
        )

    write("grey", (28, 28))
    write("colour", (28, 28, 3))
    write("tiny", (4, 4))
    write("untested", (28, 28), tests=0)
    (folder / "broken.npz").write_bytes(b"PK nothing")
    return folder


@pytest.mark.smoke
@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["no_such_config"], "config 'no_such_config' does not exist"),
        (sets("tasks.dataset=no_such_set"), "no data set 'no_such_set'"),
        (sets("tasks.dataset=npz:absent.npz"), "absent.npz"),
        (sets("tasks.dataset=embedded:mnits"), "mnits"),
        (sets("tasks.dataset=broken"), "broken.npz"),
        (sets("tasks.queryset=colour", "tasks.dataset=grey"), "colour"),
        (sets("tasks.queryset=tiny", "tasks.dataset=grey"), "tiny"),
        (
            sets("tasks.queryset=tiny", "tasks.dataset=tiny", "attacks.budget=2"),
            "cannot take images",
        ),
        (
            sets("tasks.dataset=untested", "tasks.queryset=grey", "attacks.budget=2"),
            "no test images",
        ),
        (sets(*on("grey", "grey"), "attacks.budget=9"), "budget is 9"),
        (sets(*on("grey", "grey"), "attacks.budget=0"), "budget is 0"),
        (sets("defenses.strengths=-0.5"), "strength is -0.5"),
        (sets("defenses.strengths"), "write it as field=value"),
        (sets("nonsense=1"), "no field 'nonsense'"),
        (sets("defenses.rule.layers=middle"), "layers is 'middle'"),
        (sets("attacks=madjax.jbda", "attacks.budget=99"), "jbda needs at least its 100 seeds"),
        (
            sets(
                "tasks.dataset=grey",
                "tasks.queryset=grey",
                "attacks=madjax.jbtop",
                "attacks.seeds=4",
            ),
            "aims at 3 classes besides the top one of 2",
        ),
        (
            sets(
                "tasks.dataset=tiny",
                "tasks.queryset=tiny",
                "tasks.architecture=madjax.MLP",
                "attacks.architecture=madjax.MLP",
                "attacks.budget=2",
                "attacks.augment=madjax.attacks.crop_and_flip",
            ),
            "images of 4x4 pixels cannot be cropped",
        ),
        (
            sets("attacks.recipe.optimizer=madjax.train.rmsprop"),
            "give an import path such as madjax.recipe.sgd",
        ),
        (
            sets("attacks=jbda"),
            "import path of a class that makes one, such as madjax.attacks.jbda",
        ),
        (sets("budgets=20000"), "budgets holds 20000: knockoff spends 10000"),
        (sets("tasks.victim=madjax.MAD"), "makes MAD, which is no Recipe: give what makes one"),
        (sets("attacks.recipe=madjax.MAD"), "makes MAD, which is no Recipe"),
        (sets("defenses=madjax.Recipe"), "makes Recipe, which is no Defended"),
        (sets("attacks=madjax.MAD"), "makes MAD, which is no Attack"),
        (sets("tasks.dataset=pets]"), "malformed subset rule"),
    ],
    ids=lambda value: value if isinstance(value, str) else None,
)
def test_bad_input_is_one_line_and_nothing_is_written(
    arguments, words, data, tmp_path, capsys, monkeypatch
):
    monkeypatch.delenv("MADJAX_DATA", raising=False)
    out = tmp_path / "out"
    status = main(["sweep", *arguments, "--out", str(out), "--data-dir", str(data)])
    error = capsys.readouterr().err
    assert status == 2
    assert error.startswith("madjax: error: ")
    assert words in error
    assert error.count("\n") == 1
    assert not out.exists()


def test_report_of_nothing_is_one_line(tmp_path, capsys):
    assert main(["report", str(tmp_path / "absent")]) == 2
    error = capsys.readouterr().err
    assert "absent" in error
    assert error.count("\n") == 1


def test_report_of_two_runs_is_one(small_run, tmp_path, capsys):
    out, _ = small_run
    row = json.loads((out / "rows.jsonl").read_text().splitlines()[0])
    second = tmp_path / "second"
    second.mkdir()
    (second / "rows.jsonl").write_text(json.dumps(row | {"id": "b", "dataset": "other"}) + "\n")
    assert main(["report", str(out), str(second), "--out", str(tmp_path / "both")]) == 0
    said = capsys.readouterr().out
    assert "### mnist" in said
    assert "### other" in said
    assert (tmp_path / "both" / "report.md").read_text().strip() in said
    before = set(tmp_path.rglob("*"))
    assert main(["report", str(out), str(second)]) == 0
    assert capsys.readouterr().out == said
    assert main(["report", str(out), str(second), "--trace", str(tmp_path / "t.npz")]) == 2
    error = capsys.readouterr().err
    assert error.count("\n") == 1
    assert "--trace is of one run" in error
    assert set(tmp_path.rglob("*")) == before


THEIRS = {
    "oracle": """import jax.numpy as jnp


def oracle(y, gram):
    z = jnp.ones(3)
    return undefined_name + z
""",
    "zero": "import jax\nx = 1 / 0\n\n\ndef oracle(y, gram):\n    return y\n",
    "net": """import flax.linen as nn


class Net(nn.Module):
    num_classes: int

    @nn.compact
    def __call__(self, x):
        return nn.Dense(self.num_classes)(x.flattened())
""",
    "unfinished": "def oracle(y, gram:\n    return y\n",
}
CONFIG_OF_THEIRS = """import madjax


def helper():
    return madjax.Sweep(name="a", colour=1)


def config():
    return helper()
"""


@pytest.mark.parametrize(
    ("assignment", "cause"),
    [
        ("defenses.rule.solver.oracle=theirs_oracle.oracle", "NameError: name 'undefined_name'"),
        ("defenses.rule.solver.oracle=theirs_zero.oracle", "ZeroDivisionError: division by zero"),
        (
            "defenses.rule.solver.oracle=theirs_unfinished.oracle",
            "SyntaxError: '(' was never closed",
        ),
        ("tasks.architecture=theirs_net.Net", "AttributeError: "),
        ("config", "TypeError: Sweep.__init__() got an unexpected keyword argument 'colour'"),
    ],
)
def test_an_error_of_the_users_code_keeps_its_cause_and_place(
    assignment, cause, data, tmp_path, capsys, monkeypatch
):
    for name, code in THEIRS.items():
        (tmp_path / f"theirs_{name}.py").write_text(code)
        monkeypatch.delitem(sys.modules, f"theirs_{name}", raising=False)
    (tmp_path / "theirs.py").write_text(CONFIG_OF_THEIRS)
    monkeypatch.syspath_prepend(tmp_path)
    line = {"oracle": 6, "zero": 2, "net": 9, "unfinished": 1, "config": 5}
    which = assignment.split("theirs_")[-1].split(".")[0]
    file = tmp_path / ("theirs.py" if which == "config" else f"theirs_{which}.py")
    words = [str(file)] if which == "config" else sets(assignment)
    grey = sets(*on("grey", "grey"), "attacks.budget=2")
    words = ["sweep", *words, *(grey if which != "config" else [])]
    words += ["--data-dir", str(data), "--out", str(tmp_path / "out")]
    assert main(words) == 2
    error = capsys.readouterr().err
    assert error.count("\n") == 1
    assert cause in error
    assert f"{file}:{line[which]}" in error
    assert not (tmp_path / "out").exists()
    with pytest.raises(InputError) as caught:
        main([*words, "--traceback"])
    assert type(caught.value.__cause__).__name__ == cause.split(":")[0]


@pytest.fixture(scope="module")
def small_run(tmp_path_factory):
    out = tmp_path_factory.mktemp("runs") / "small"
    words = sets(*QUICK, "defenses.strengths=0.99", "tasks.architecture=madjax.MLP")
    assert main(["sweep", *words, "--out", str(out)]) == 0
    return out, words


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["--epsilon", "inf"], "strength is inf: the strength of mad is a number from 0"),
        (["--epsilon", "0.5", "--seed", "7"], "seed is 7: the run has 0, choose one of them"),
        (["--epsilon", "0.5", "--file", "{out}/none/a.jx"], "there is no directory"),
        (["--epsilon", "0.5", "--file", "{out}"], "is a directory: give the name of a file"),
        (["--epsilon", "0.5", "--defense", "shield"], "choose one by its label"),
    ],
)
def test_a_bad_export_is_one_line(small_run, words, said, capsys):
    out, same = small_run
    words = [word.format(out=out) for word in words]
    assert main(["export", *same, "--out", str(out), *words]) == 2
    error = capsys.readouterr().err
    assert said in error
    assert error.count("\n") == 1


def test_a_directory_that_cannot_be_written_is_one_line(small_run, capsys, monkeypatch):
    """The modes of a file do not stop root, who runs these tests perhaps."""
    out, same = small_run

    def refuse(self, *_):
        raise PermissionError(13, "Permission denied", str(self))

    monkeypatch.setattr(Path, "replace", refuse)
    before = sorted(out.iterdir())
    assert main(["report", str(out)]) == 2
    said = capsys.readouterr()
    assert "### mnist" in said.out, "the table is shown all the same"
    assert said.err.count("\n") == 1
    assert "cannot be written (Permission denied)" in said.err
    assert main(["export", *same, "--out", str(out), "--epsilon", "0.5"]) == 2
    error = capsys.readouterr().err
    assert "predict.jaxexport cannot be written (Permission denied)" in error
    assert error.count("\n") == 1
    assert sorted(out.iterdir()) == before


def test_a_damaged_victim_is_trained_again(small_run, tmp_path, capsys):
    """On resume; an export says that there is none."""
    out, same = small_run
    copy = tmp_path / "copy"
    shutil.copytree(out, copy)
    rows = [json.loads(line) for line in (copy / "rows.jsonl").read_text().splitlines()]
    (copy / "rows.jsonl").unlink()
    for path in copy.glob("checkpoints/victim-*/**/*"):
        if path.is_file() and path.stat().st_size > 500:
            os.truncate(path, path.stat().st_size // 2)
    with pytest.warns(UserWarning, match="victim-.* is damaged"):
        assert main(["export", *same, "--out", str(copy), "--epsilon", "0.5"]) == 2
    assert "holds no victim trained for 1 epochs" in capsys.readouterr().err
    with pytest.warns(UserWarning, match="victim-.* is damaged"):
        assert main(["sweep", *same, "--out", str(copy), "--resume"]) == 0
    again = [json.loads(line) for line in (copy / "rows.jsonl").read_text().splitlines()]
    field = "attacker_accuracies"
    assert [row[field] for row in again] == [row[field] for row in rows]


def test_the_command_runs_after_jax_has_computed(data, tmp_path):
    """As in a notebook: the number of devices is fixed by then."""
    code = """
import sys, jax
jax.numpy.zeros(1)
from madjax.cli import main
sys.exit(main(["sweep", "--set", "attacks.budget=0", "--out", sys.argv[1]]))
"""
    words = [sys.executable, "-c", code, str(tmp_path / "out")]
    done = subprocess.run(words, capture_output=True, text=True, check=False)
    assert done.returncode == 2
    assert "budget is 0" in done.stderr
    assert "Traceback" not in done.stderr


@pytest.mark.skipif(not hasattr(os, "sched_getaffinity"), reason="the system has no affinity")
@pytest.mark.parametrize("most", [1, 12])
def test_a_process_of_one_core_has_one_device(most):
    code = f"""
import os, jax
os.sched_setaffinity(0, {{min(os.sched_getaffinity(0))}})
from madjax import sweep
sweep.split_cpu({most})
print(jax.device_count())
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout == "1\n"


def test_cores_that_share_a_cell_are_a_multiple_of_its_devices():
    code = """
import jax
from madjax.sweep import mesh
mesh._cores = lambda: 6
mesh.split_cpu(20, 4)
print(jax.device_count())
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout == "4\n"


def test_devices_may_share_a_cell(monkeypatch, tmp_path):
    """As many cores become devices as all cells can use, and the number reaches run and plan."""
    split, asked = [], []
    monkeypatch.setattr("madjax.sweep.split_cpu", lambda *given: split.append(given))

    def refuse(*args, devices_per_cell, **kwargs):
        asked.append(devices_per_cell)
        raise InputError("enough")

    for name in ("run", "plan"):
        monkeypatch.setattr(f"madjax.sweep.{name}", refuse)
    few = ["--set", "defenses.strengths=0.5", "--set", "seeds=0", "--out", str(tmp_path)]
    for command in ("sweep", "plan"):
        assert main([command, *few]) == main([command, *few, "--devices-per-cell", "3"]) == 2
    assert split == [(1, 1), (3, 3), (1, 1), (3, 3)]
    assert asked == [None, 3, None, 3]


def test_an_interrupt_says_how_to_go_on(monkeypatch, capsys, tmp_path):
    def stop(*args, **kwargs):
        raise KeyboardInterrupt

    monkeypatch.setattr("madjax.sweep.run", stop)
    assert main(["sweep", "--out", str(tmp_path / "out")]) == 130
    assert "--resume" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("name", "want"),
    [
        ("mnist", "mnist"),
        ("embedded:mnist[:10]", "mnist"),
        ("npz:some/where/letters.npz[:1,:2]", "letters"),
        ("folder:birds.zip", "birds"),
        ("tfds:mnist", "mnist"),
    ],
)
def test_rows_call_a_data_set_by_its_plain_name(name, want):
    assert base_name(name) == want


def test_a_warning_is_one_line(data, tmp_path):
    (data / "pets" / "train" / "a").mkdir(parents=True)
    for name in ("0.txt", "1.txt"):
        (data / "pets" / "train" / "a" / name).write_text("no image")
    Image.fromarray(np.zeros((9, 9), np.uint8)).save(data / "pets" / "train" / "a" / "0.png")
    words = sets("tasks.dataset=grey", "tasks.queryset=pets", "attacks.budget=2")
    words = [sys.executable, "-m", "madjax", "sweep", *words, "--data-dir", str(data)]
    done = subprocess.run(words, cwd=tmp_path, capture_output=True, text=True, check=False)
    warned, error = done.stderr.splitlines()
    assert warned.startswith("madjax: warning: ")
    assert warned.endswith("2 files are no images that Pillow reads, and are left out: 2 with .txt")
    assert error.startswith("madjax: error: query set 'pets' has 9x9x1 images")
