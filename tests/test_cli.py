"""The command line as a user meets it: the main job, and one clear line for every mistake."""

import importlib.metadata
import json
import subprocess
import sys
from functools import reduce
from pathlib import Path

import jax
import numpy as np
import pytest

import madjax
from madjax import config, sweep
from madjax.cli import main
from madjax.datasets import base_name

QUICK = (
    "dataset=embedded:mnist[:200,:100]",
    "queryset=embedded:fashion_mnist[:200]",
    "victim.epochs=1",
    "attacks.recipe.epochs=1",
    "attacks.budget=150",
    "epsilons=0,0.99",
    "seeds=0",
)


def sets(*assignments):
    return [word for each in assignments for word in ("--set", each)]


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
    assert [(row["epsilon"], row["seed"]) for row in rows] == [(0.0, 0), (0.99, 0)]
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
        pixels = np.zeros((8, *shape), np.uint8)
        labels = np.arange(8) % 2
        np.savez(
            folder / f"{name}.npz",
            x_train=pixels,
            y_train=labels,
            x_test=pixels[:tests],
            y_test=labels[:tests],
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
        (sets("dataset=no_such_set"), "no data set 'no_such_set'"),
        (sets("dataset=npz:absent.npz"), "absent.npz"),
        (sets("dataset=embedded:mnits"), "mnits"),
        (sets("dataset=broken"), "broken.npz"),
        (sets("queryset=colour", "dataset=grey"), "colour"),
        (sets("queryset=tiny", "dataset=grey"), "tiny"),
        (sets("queryset=tiny", "dataset=tiny", "attacks.budget=2"), "cannot take images"),
        (sets("dataset=untested", "queryset=grey", "attacks.budget=2"), "no test images"),
        (sets("dataset=grey", "queryset=grey", "attacks.budget=9"), "budget is 9"),
        (sets("dataset=grey", "queryset=grey", "attacks.budget=0"), "budget is 0"),
        (sets("epsilons=-0.5"), "epsilon is -0.5"),
        (sets("epsilons"), "write it as field=value"),
        (sets("nonsense=1"), "no field 'nonsense'"),
        (sets("defense.layers=middle"), "layers is 'middle'"),
        (sets("attacks=madjax.jbda", "attacks.budget=99"), "jbda needs at least its 100 seeds"),
        (
            sets("dataset=grey", "queryset=grey", "attacks=madjax.jbtop", "attacks.seeds=4"),
            "aims at 3 classes besides the top one of 2",
        ),
        (
            sets(
                "dataset=tiny",
                "queryset=tiny",
                "architecture=madjax.MLP",
                "attacks.architecture=madjax.MLP",
                "attacks.budget=2",
                "attacks.augment=madjax.attacks.crop_and_flip",
            ),
            "images of 4x4 pixels cannot be cropped",
        ),
        (
            sets("attacks.recipe.optimizer=madjax.train.rmsprop"),
            "give an import path such as madjax.train.sgd",
        ),
        (
            sets("attacks=jbda"),
            "import path of a class that makes one, such as madjax.attacks.jbda",
        ),
        (sets("budgets=20000"), "budgets holds 20000: knockoff spends 10000"),
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
