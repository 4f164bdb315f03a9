"""The scripts of the paper's tables and figures: what they run, and what they make of its rows."""

import json
import runpy
import shutil
import signal
import sys
from functools import partial
from importlib import import_module
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import save_file

from madjax import AngleStudy, InputError, cli, config, report
from madjax.report import read_rows
from madjax.sweep import expand

EXPERIMENTS = Path(__file__).parents[1] / "experiments"
RESULTS = EXPERIMENTS / "results"
SCALES = ("smoke", "reduced", "paper")


def script(patch, name, *words):
    """The exit status of `python experiments/NAME.py WORDS`."""
    patch.syspath_prepend(EXPERIMENTS)
    patch.setattr(sys, "argv", [name, *map(str, words)])
    with pytest.raises(SystemExit) as ended:
        runpy.run_path(str(EXPERIMENTS / f"{name}.py"), run_name="__main__")
    return ended.value.code


@pytest.fixture
def run(monkeypatch):
    return partial(script, monkeypatch)


@pytest.fixture
def functions(monkeypatch):
    """The functions of a script, which does not run."""
    monkeypatch.syspath_prepend(EXPERIMENTS)
    return lambda name: runpy.run_path(str(EXPERIMENTS / f"{name}.py"), run_name=name)


def exhibits():
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(EXPERIMENTS)
        return [import_module(name).EXHIBIT for name in import_module("reproduce").SCRIPTS]


def directory(name, out):
    return out / name.replace(":", "-")


def shown(exhibit, out, scale="smoke"):
    """The rows of what a script shows."""
    runs = [directory(name, out) for name in exhibit.configs(scale)]
    there = [run for run in runs if run.is_dir()]
    return exhibit.chosen(read_rows(*there)) if there else []


def test_every_table_and_figure_of_the_paper_has_a_script_that_reproduce_runs():
    scripts = {path.stem for path in EXPERIMENTS.glob("*.py") if path.stem.startswith("fig")}
    named = [exhibit.file for exhibit in exhibits()]
    assert set(named) == scripts | {"table1"}
    assert len(named) == 15
    for exhibit in exhibits():
        text = (EXPERIMENTS / f"{exhibit.file}.py").read_text()
        assert text.startswith(f'"""{exhibit.title}: ')
        for word in ("Claim:", f"Command: python experiments/{exhibit.file}.py", "Cost"):
            assert word in text


@pytest.mark.parametrize("scale", SCALES)
def test_its_runs_are_configs_each_in_a_directory_of_its_own(scale, tmp_path, monkeypatch):
    (tmp_path / "weights").mkdir()
    save_file({"a": np.zeros(1)}, tmp_path / "weights/vgg16_bn.safetensors")  # of two configs
    monkeypatch.chdir(tmp_path)
    names = {name for exhibit in exhibits() for name in exhibit.configs(scale)}
    chosen = [config.load(name) for name in sorted(names)]
    assert len({directory(name, tmp_path) for name in names}) == len(names) >= 6
    for each in chosen:
        cells = expand(each.sweep() if isinstance(each, AngleStudy) else each)
        assert cells
        if scale == "smoke":
            assert {cell.task.dataset.split("[")[0] for cell in cells} == {"embedded:mnist"}


@pytest.fixture(scope="module")
def smoke(tmp_path_factory):
    """The directory of all of them at the smallest scale, by the one command that makes them."""
    out = tmp_path_factory.mktemp("paper") / "smoke"
    with pytest.MonkeyPatch.context() as patch:
        assert script(patch, "reproduce", "--scale", "smoke", "--out", out, "--quiet") == 0
    return out


def test_one_command_makes_all_of_them(smoke):
    made = {path.name for path in smoke.iterdir() if path.is_file()}
    figures = {f"{each.file}.png" for each in exhibits() if each.draw}
    assert made == {f"{each.file}.md" for each in exhibits()} | figures | {
        "claims.md",
        "runs.md",
        "report.html",
    }
    assert len(figures) == 14
    assert {path for path in smoke.iterdir() if path.is_dir()} == {
        directory(name, smoke) for each in exhibits() for name in each.configs("smoke")
    }


def test_a_script_shows_the_rows_that_it_is_about(smoke):
    """Each as its claim has it, told here in other words."""
    lines = (smoke / "table1.md").read_text().splitlines()
    assert [line.split(" | ")[1] for line in lines[2:]] == [
        *("(victim)", "jbda", "jbself", "jbtop3", "knockoff", "knockoff")
    ]
    rows = {each.file: shown(each, smoke) for each in exhibits()}
    assert {r["attack"] for r in rows["fig3"]} == {"knockoff", "jbda", "jbself", "jbtop3"}
    assert {r["budget"] for r in rows["fig3"] if r["attack"] == "knockoff"} == {200}
    assert {r["layers"] for r in rows["fig3"]} == {"last"}
    assert {r["targets"] for r in rows["fig4"]} == {"posteriors"}
    assert {r["targets"] for r in rows["figa4"]} == {"top_label"}
    assert {r["strength"] for r in rows["figa1"]} == {r["strength"] for r in rows["figa2"]} == {0}
    assert {r["targets"] for r in rows["figa2"]} == {"posteriors", "top_label"}
    assert len({r["attack"] for r in rows["figa1"]}) == 4
    assert max(r["strength"] for r in rows["figa3"]) == 0.99
    assert {(r["targets"], r["strength"]) for r in rows["fig1"]} == {
        ("posteriors", 0),
        ("top_label", 0),
        ("posteriors", 0.99),
    }
    assert {"dp_sgd", "random_noise", "reverse_sigmoid"} <= {r["defense"] for r in rows["fig4"]}
    assert len({r["variant"] for r in rows["fig9"]}) == 9
    for figure in ("fig6", "fig7", "figa5"):
        assert {r["attack"] for r in rows[figure]} == {"online"}


def test_given_again_it_computes_nothing_and_of_rows_alone_it_runs_nothing(
    smoke, run, capsys, monkeypatch
):
    assert run("fig6", "--scale", "smoke", "--out", smoke) == 0
    assert "all cells are done" in capsys.readouterr().out
    monkeypatch.setattr("madjax.cli.main", None)  # which runs would call
    (smoke / "fig6.png").unlink()
    assert run("fig6", "--scale", "smoke", "--out", smoke, "--rows") == 0
    assert (smoke / "fig6.png").is_file()


def test_a_limit_stops_it_and_loses_nothing(run, tmp_path, capsys):
    """It comes while a run is at work, as a signal would; what is there is shown."""
    words = ("--scale", "smoke", "--out", tmp_path / "out")
    before = signal.getsignal(signal.SIGTERM)
    assert run("fig6", *words, "--limit", "0.00001") == 128 + signal.SIGTERM
    assert signal.getsignal(signal.SIGTERM) is before
    said = capsys.readouterr()
    assert f"the same command goes on from {tmp_path}" in said.err
    assert "Fig. 6: no rows of mnist_angle:smoke" in said.err
    assert run("fig6", *words, "--limit", "100") == 0
    assert (tmp_path / "out" / "fig6.png").is_file()


def test_a_config_that_cannot_be_followed_is_said_before_anything_runs(run, tmp_path, capsys):
    """Two of the paper's victims start from weights that the user has to bring."""
    status = run("table1", "--scale", "paper", "--out", tmp_path / "out")
    assert status == 2
    said = capsys.readouterr().err
    assert "vgg16_bn.safetensors is no file" in said
    assert "; --runs CONFIG... runs those alone that it names" in said
    assert not (tmp_path / "out").exists()


def test_some_of_the_runs_alone(run, tmp_path, capsys):
    """What is not asked for is no failure; a name that is none of its runs is refused."""
    out, words = tmp_path / "out", ("--scale", "smoke", "--out", tmp_path / "out", "--quiet")
    assert run("reproduce", *words, "--runs", "mnist_angle:smoke", "cub200") == 2
    assert "error: --runs cub200 is no run of this script; " in capsys.readouterr().err
    assert run("reproduce", *words, "--rows", "--runs", "mnist_angle:smoke") == 2
    assert "argument --runs: not allowed with argument --rows" in capsys.readouterr().err
    assert not out.exists()
    assert run("reproduce", *words, "--runs", "mnist_angle:smoke") == 0
    assert [path.name for path in out.iterdir() if path.is_dir()] == ["mnist_angle-smoke"]
    assert {path.stem for path in out.glob("*.png")} == {"fig6", "fig7", "figa5"}
    assert capsys.readouterr().err == ""


def test_without_rows_it_says_what_to_do(run, tmp_path, capsys):
    assert run("fig4", "--scale", "reduced", "--rows", "--out", tmp_path) == 2
    assert "run it without --rows" in capsys.readouterr().err


@pytest.mark.parametrize("exhibit", exhibits(), ids=lambda exhibit: exhibit.file)
def test_what_is_committed_is_made_of_the_committed_rows(exhibit):
    rows = shown(exhibit, RESULTS, "reduced")
    text = RESULTS / f"{exhibit.file}.md"
    if rows and not text.is_file():
        with pytest.raises(InputError):  # they have nothing to draw
            exhibit.draw(rows)
    elif rows:
        assert text.read_text() == exhibit.table(rows)
        assert (RESULTS / f"{exhibit.file}.png").is_file() == bool(exhibit.draw)


def test_the_committed_page_and_claims_are_made_of_the_committed_rows():
    """Every number of either: rows are read anew, and figures are those that lie there."""
    names = dict.fromkeys(n for each in exhibits() for n in each.configs("reduced"))
    runs = [directory(name, RESULTS) for name in names]
    runs = [run for run in runs if (run / "rows.jsonl").is_file()]
    made = [each for each in exhibits() if (RESULTS / f"{each.file}.md").is_file()]
    sections = [each.section("reduced", RESULTS) for each in made]
    title = "Prediction Poisoning, reproduced: reduced scale"
    costs = import_module("paper").costs()
    page = report.page(*runs, title=title, sections=sections, costs=costs)
    assert page == (RESULTS / "report.html").read_text()
    claims = report.claims_table(read_rows(*runs, of_each_config=True))
    assert claims == (RESULTS / "claims.md").read_text()
    assert (RESULTS / "runs.md").read_text() == report.runs_table(*runs)
    assert (RESULTS / "runs.md").read_text() in (EXPERIMENTS / "README.md").read_text()
    assert claims in (EXPERIMENTS / "README.md").read_text()
    assert (RESULTS / "table1.md").read_text() in (EXPERIMENTS / "README.md").read_text()


# --- rows of an older madjax ----------------------------------------------------------------------


def older(row):
    """A row without what came later."""
    later = {"status", "solver", "surrogate", "constraints", "task_settings", "attack_settings"}
    return {name: value for name, value in row.items() if name not in later}


def test_older_rows_are_said_anew_and_their_run_goes_on(smoke, functions, tmp_path, capsys):
    """What was measured stays; what tells cells apart is as it would be written now."""
    rows = read_rows(smoke / "mnist_knockoff-smoke")
    before = tmp_path / "before"
    before.mkdir()
    shutil.copy(smoke / "mnist_knockoff-smoke" / "config.json", before)
    lines = [json.dumps(older(row) | {"id": f"old{i}"}) for i, row in enumerate(rows[:-1])]
    lines.append(json.dumps(older(rows[0]) | {"id": "of another", "strength": 0.123}))
    (before / "rows.jsonl").write_text("\n".join(lines) + "\n")
    chosen, out = config.load("mnist_knockoff:smoke"), tmp_path / "out"
    assert functions("lift_rows")["lift"](chosen, [before], out, None) == (len(rows) - 1, 1)
    assert read_rows(out) == rows[:-1]
    words = ["sweep", "mnist_knockoff:smoke", "--out", str(out), "--resume"]
    assert cli.main(words) == 0
    assert read_rows(out)[-1]["attacker_accuracies"] == rows[-1]["attacker_accuracies"]
    assert "1 of 12 cells to run" in capsys.readouterr().out


def test_a_row_that_says_something_else_of_its_cell_is_not_lifted(smoke, functions, tmp_path):
    before = tmp_path / "before"
    before.mkdir()
    shutil.copy(smoke / "mnist_knockoff-smoke" / "config.json", before)
    row = older(read_rows(smoke / "mnist_knockoff-smoke")[0]) | {"epochs": 7}
    (before / "rows.jsonl").write_text(json.dumps(row) + "\n")
    chosen, lift = config.load("mnist_knockoff:smoke"), functions("lift_rows")["lift"]
    with pytest.raises(InputError, match="says epochs = 7, not 1"):
        lift(chosen, [before], tmp_path / "out", None)
    said = json.loads((before / "config.json").read_text())
    said["data"][0]["dataset"] += 1
    (before / "config.json").write_text(json.dumps(said))
    with pytest.raises(InputError, match="other images in its dataset"):
        lift(chosen, [before], tmp_path / "out", None)
