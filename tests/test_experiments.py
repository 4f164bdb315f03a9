"""Every script in experiments/ runs through at its smallest size, and tables follow from rows."""

import json
import re
import runpy
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import jax
import pytest

from madjax.cli.parser import make_parser
from madjax.report import read_rows, table

EXPERIMENTS = Path(__file__).parents[1] / "experiments"
RESULTS = EXPERIMENTS / "results"
TABLES = (EXPERIMENTS / "README.md").read_text()
OTHERS = {"measuring", "paper", "new_constraint", "reproduce", "lift_rows", "table1"}
"""Modules, those with tests of their own below, and those of tests/test_paper.py."""
SCRIPTS = sorted(
    path.stem
    for path in EXPERIMENTS.glob("*.py")
    if path.stem not in OTHERS and not path.stem.startswith("fig")
)


@pytest.fixture
def run(monkeypatch, tmp_path):
    """Runs a script as `python experiments/NAME.py WORDS` does, in an empty directory.

    Its exit status has to be 0.
    """
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(EXPERIMENTS)

    def run(name, *words):
        monkeypatch.setattr(sys, "argv", [name, *map(str, words)])
        try:
            runpy.run_path(str(EXPERIMENTS / f"{name}.py"), run_name="__main__")
        except SystemExit as ended:
            if ended.code:
                raise

    return run


@pytest.fixture
def functions(monkeypatch):
    """The functions of a script, which does not run."""
    monkeypatch.syspath_prepend(EXPERIMENTS)
    return lambda name: runpy.run_path(str(EXPERIMENTS / f"{name}.py"), run_name=name)


@pytest.mark.slow
@pytest.mark.parametrize("name", SCRIPTS)
def test_it_runs_through_at_its_smallest_size(run, name, tmp_path, capsys):
    """PyTorch is left out where it is not installed. CI runs these too."""
    words = ("--out", "out/it") if name.startswith(("bench_", "plan_")) else ()
    run(name, "--smoke", *words)
    assert capsys.readouterr().out.strip()
    if words:
        facts = json.loads((tmp_path / "out" / "it.json").read_text())
        assert facts["commit"]
        assert ("CPU" in facts["device"]) == (jax.default_backend() == "cpu")
        assert facts["options"]["smoke"]
        assert (tmp_path / "out" / "it.md").read_text().startswith("| ")


@pytest.mark.slow
def test_the_extension_in_one_file_runs_and_obeys_its_constraint(run, capsys):
    assert len((EXPERIMENTS / "new_constraint.py").read_text().splitlines()) < 40
    run("new_constraint", "--smoke")
    lines = capsys.readouterr().out.splitlines()
    numbers = [map(float, re.findall(r"[\d.]+", line)) for line in lines]
    (free, long, kept), lengths, odd = zip(*numbers, strict=True)
    assert free > max(long, kept) > 10
    assert lengths[1] > lengths[0]
    assert odd[0] > 0.2
    assert odd[2] <= 0.1


# --- committed tables -----------------------------------------------------------------------------


def test_committed_reports_are_made_from_their_rows():
    folders = [path.parent for path in RESULTS.glob("*/rows.jsonl")]
    assert folders
    for folder in folders:
        assert (folder / "report.md").read_text() == table(read_rows(folder))
        assert (folder / "tradeoff.png").is_file()


@pytest.mark.parametrize(
    ("name", "folders", "file"),
    [
        ("defenses_summary", ["mnist_defenses"], "summary.md"),
        ("defenses_summary", ["mnist_defenses-fashion_mnist"], "summary.md"),
        ("angle_summary", ["mnist_angle", "mnist_angle_variants", "mnist_angle_age"], "summary.md"),
    ],
)
def test_a_summary_is_made_from_its_rows_and_quoted(run, tmp_path, name, folders, file):
    for folder in folders:
        (tmp_path / folder).mkdir()
        shutil.copy(RESULTS / folder / "rows.jsonl", tmp_path / folder)
    run(name, *folders)
    for folder in folders:
        made = (tmp_path / folder / file).read_text()
        assert made == (RESULTS / folder / file).read_text()
        assert made.strip() in TABLES


@pytest.mark.parametrize(
    "name",
    [
        "bench_angle",
        "bench_jbda",
        "bench_pipeline",
        "bench_plan",
        "bench_scaling",
        "bench_step",
        "bench_training",
        "fault_test",
        "plan_paper",
    ],
)
def test_the_table_of_a_benchmark_is_made_from_its_figures_and_quoted(functions, name):
    facts = json.loads((RESULTS / f"{name}.json").read_text())
    made = functions(name)["table"](facts["results"])
    assert made.strip() == (RESULTS / f"{name}.md").read_text().strip()
    assert made.strip() in TABLES
    assert not facts["options"]["smoke"]


def test_the_table_of_mad_is_made_from_its_figures_and_quoted(functions):
    facts = json.loads((RESULTS / "bench_mad.json").read_text())
    made = functions("bench_mad")["table"](facts["rows"])
    assert made.strip() == (RESULTS / "bench_mad.md").read_text().strip()
    assert made.strip() in TABLES


@pytest.mark.parametrize("name", ["last_vs_all", "optimum"])
def test_the_table_of_a_study_is_made_from_its_rows_and_quoted(functions, name):
    lines = (RESULTS / name / "study.jsonl").read_text().splitlines()
    made = functions(name)["table"]([json.loads(line) for line in lines])
    assert made.strip() == (RESULTS / name / "report.md").read_text().strip()
    assert made.strip() in TABLES


@pytest.mark.parametrize("path", sorted(RESULTS.glob("*.json")), ids=lambda path: path.stem)
def test_a_committed_benchmark_says_where_it_ran(path):
    facts = json.loads(path.read_text())
    assert facts["device"]
    assert re.fullmatch(r"[0-9a-f]{7,40}", facts["commit"])


@pytest.mark.parametrize("name", ["slurm", "tpu_pod"])
def test_the_examples_for_clusters_are_commands(name):
    """As far as can be told without a cluster: bash and madjax understand them."""
    file = EXPERIMENTS / "launch" / f"{name}.sh"
    subprocess.run(["bash", "-n", file], check=True)
    (command,) = re.findall(r"madjax (sweep .* --resume)", file.read_text())
    options = make_parser().parse_args(shlex.split(command))
    assert options.distributed
    assert options.resume
