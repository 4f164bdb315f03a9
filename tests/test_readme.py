"""What README says can be done as it says it."""

import json
import re
import runpy
from functools import partial
from pathlib import Path

import jax
import numpy as np
import pytest

import madjax

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text()
TABLES = (ROOT / "experiments" / "README.md").read_text()
RESULTS = ROOT / "experiments" / "results"


@pytest.mark.smoke
def test_the_python_example_runs_and_is_short(capsys):
    code, _ = re.findall(r"```python\n(.*?)```", README, re.DOTALL)
    assert len([line for line in code.splitlines() if line.strip()]) <= 12
    exec(compile(code, "README.md", "exec"), {})
    degrees = float(capsys.readouterr().out.split()[0])
    assert 0 < degrees < 180


def test_the_serving_example_runs(tmp_path, monkeypatch):
    _, code = re.findall(r"```python\n(.*?)```", README, re.DOTALL)
    network = madjax.Classifier(madjax.LeNet(10), lambda x: x / 255, (28, 28, 1))
    victim, surrogate = (network.init(jax.random.key(i)) for i in (0, 1))
    images = np.zeros((3, 28, 28, 1), np.uint8)
    names = {"jax": jax, "madjax": madjax, "partial": partial, "network": network}
    names |= {"victim": victim, "surrogate": surrogate, "images": images}
    monkeypatch.chdir(tmp_path)
    exec(compile(code, "README.md", "exec"), names)
    assert names["y_tilde"].shape == (3, 10)


def test_the_extension_in_one_file_runs_and_obeys_its_constraint(capsys):
    path = ROOT / "experiments" / "new_constraint.py"
    assert len(path.read_text().splitlines()) < 40
    runpy.run_path(str(path))
    free, kept = capsys.readouterr().out.splitlines()
    degrees, moved = zip(*(re.findall(r"([\d.]+)", line)[1:] for line in (free, kept)), strict=True)
    assert float(degrees[0]) > float(degrees[1]) > 10
    assert float(moved[0]) > 0.2
    assert float(moved[1]) <= 0.1


def test_every_link_to_a_file_leads_somewhere():
    for text, folder in ((README, ROOT), (TABLES, ROOT / "experiments")):
        for target in re.findall(r"\]\(([^)#]+)\)", text):
            assert target.startswith("https://") or (folder / target).exists(), target


@pytest.mark.smoke
def test_the_main_page_can_be_read_whole():
    assert len(README.splitlines()) <= 150


def test_the_table_of_results_is_that_of_the_committed_report():
    report = (RESULTS / "mnist_knockoff" / "report.md").read_text()
    lines = [line for line in report.splitlines() if line.startswith("|")]
    assert len(lines) >= 10
    assert "\n".join(lines) in README


@pytest.mark.smoke
def test_every_cell_of_the_main_table_follows_from_the_rows():
    lines = (RESULTS / "mnist_knockoff" / "rows.jsonl").read_text().splitlines()
    rows = [json.loads(line) for line in lines]
    table = [line for line in README.splitlines() if re.match(r"\| +[\d.]+ \|", line)]
    cells = [[cell.strip() for cell in line.strip("|").split("|")] for line in table]
    epsilons = sorted({row["epsilon"] for row in rows})
    assert [cell[0] for cell in cells] == [f"{epsilon:g}" for epsilon in epsilons]
    for epsilon, (_, n, defender, attacker, best, far) in zip(epsilons, cells, strict=True):
        own = [row for row in rows if row["epsilon"] == epsilon]

        def said(field, own=own):
            values = [row[field] for row in own]
            return f"{np.mean(values):.2f} ± {np.std(values, ddof=1):.2f}"

        assert n == str(len(own))
        assert (defender, attacker) == (said("defender_accuracy"), said("attacker_accuracy"))
        assert best == said("attacker_accuracy_best").partition(" ")[0]
        assert far == f"{np.mean([row['l1_mean'] for row in own]):.3f}"


def test_committed_reports_are_made_from_their_rows():
    from madjax.report import read_rows, table

    folders = [path.parent for path in RESULTS.glob("*/rows.jsonl")]
    assert folders
    for folder in folders:
        assert (folder / "report.md").read_text() == table(read_rows(folder))
        assert (folder / "tradeoff.png").is_file()


@pytest.mark.parametrize("field", ["examples_per_second", "ratio_to_pytorch"])
def test_the_benchmark_table_is_that_of_the_committed_file(field):
    results = json.loads((RESULTS / "bench_training.json").read_text())["results"]
    for result in results:
        (line,) = [x for x in TABLES.splitlines() if x.startswith(f"| {result['variant']} |")]
        assert str(result[field]) in line


def test_the_table_of_mad_is_that_of_the_committed_benchmark():
    assert (RESULTS / "bench_mad.md").read_text().strip() in TABLES


def test_the_attacks_beside_table_1_are_quoted_as_committed():
    assert (RESULTS / "mnist_attacks" / "table1.md").read_text().strip() in TABLES


@pytest.mark.parametrize("run", ["mnist_defenses", "mnist_top_label"])
def test_the_summaries_of_defences_are_quoted_as_committed(run):
    assert (RESULTS / run / "summary.md").read_text().strip() in TABLES


@pytest.mark.parametrize("run", ["mnist_angle", "mnist_angle_variants"])
def test_the_white_box_study_is_quoted_as_committed(run):
    assert (RESULTS / run / "summary.md").read_text().strip() in TABLES


@pytest.mark.parametrize("file", ["bench_angle.md", "optimum/report.md"])
def test_what_the_experiments_wrote_is_quoted_as_committed(file):
    assert (RESULTS / file).read_text().strip() in TABLES


def test_the_benchmark_of_an_attack_is_quoted_as_committed():
    assert (RESULTS / "bench_jbda.md").read_text().strip() in TABLES


def test_the_study_of_gradients_is_quoted_as_committed():
    lines = (RESULTS / "last_vs_all" / "report.md").read_text().strip()
    assert lines in TABLES
