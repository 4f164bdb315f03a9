"""What README says can be done as it says it."""

import json
import re
from pathlib import Path

import numpy as np
import pytest

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text()
TABLES = (ROOT / "experiments" / "README.md").read_text()
RESULTS = ROOT / "experiments" / "results"


@pytest.mark.smoke
def test_the_python_example_runs_and_is_short(capsys):
    code, *_ = re.findall(r"```python\n(.*?)```", README, re.DOTALL)
    assert len([line for line in code.splitlines() if line.strip()]) <= 12
    exec(compile(code, "README.md", "exec"), {})
    degrees = float(capsys.readouterr().out.split()[0])
    assert 0 < degrees < 180


def test_the_serving_examples_run_after_it(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    names = {}
    for code in re.findall(r"```python\n(.*?)```", README, re.DOTALL):
        assert len([line for line in code.splitlines() if line.strip()]) <= 12
        exec(compile(code, "README.md", "exec"), names)
        assert names["y_tilde"].shape == (100, 10)
    assert sorted(path.name for path in tmp_path.iterdir()) == [
        "poison.jaxexport",
        "predict.jaxexport",
    ]


def test_every_link_to_a_file_leads_somewhere():
    for text, folder in ((README, ROOT), (TABLES, ROOT / "experiments")):
        for target in re.findall(r"\]\(([^)#]+)\)", text):
            assert target.startswith("https://") or (folder / target).exists(), target


@pytest.mark.smoke
def test_the_main_page_can_be_read_whole():
    assert len(README.splitlines()) <= 150


def test_the_table_of_results_is_that_of_the_committed_report():
    report = (RESULTS / "mnist_knockoff" / "report.md").read_text()
    _, last = report.split("MAD, last layer")
    lines = [line for line in last.splitlines() if line.startswith("|")]
    assert len(lines) >= 10
    assert "\n".join(lines) in README


def test_the_claims_are_counted():
    lines = (RESULTS / "claims.md").read_text().splitlines()[2:]
    cells = [[cell.strip() for cell in line.strip("|").split(" | ")] for line in lines]
    holds = [own[5] for own in cells]
    best = [own[6].partition(":")[0] or own[5] for own in cells]
    assert {*holds, *best} <= {"yes", "partly", "no"}
    claims = len({own[0] for own in cells})
    ours, others = ([h.count(v) for v in ("yes", "partly", "no")] for h in (holds, best))
    said = f"Of {len(lines)} answers to {claims} claims of the paper "
    said += "{} hold, {} partly and {} not; by best epochs {}, {} and {} ("
    assert said.format(*ours, *others) in " ".join(README.split())


def test_what_the_attacker_of_top_labels_has_follows_from_the_rows():
    lines = (RESULTS / "mnist_budgets" / "rows.jsonl").read_text().splitlines()
    rows = [row for row in map(json.loads, lines) if row["targets"] == "top_label"]
    own = [r["attacker_accuracy"] for r in rows if (r["strength"], r["budget"]) == (0.99, 50_000)]
    assert len(own) == 3
    said = f"{np.mean(own):.1f} ± {np.std(own, ddof=1):.1f} % at 0.99"
    assert f"An attacker of top labels alone has {said}" in README


@pytest.mark.smoke
def test_every_cell_of_the_main_table_follows_from_the_rows():
    lines = (RESULTS / "mnist_knockoff" / "rows.jsonl").read_text().splitlines()
    rows = [row for row in map(json.loads, lines) if row["layers"] == "last"]
    table = [line for line in README.splitlines() if re.match(r"\| +[\d.]+ \|", line)]
    cells = [[cell.strip() for cell in line.strip("|").split("|")] for line in table]
    epsilons = sorted({row["epsilon"] for row in rows})
    assert [cell[0] for cell in cells] == [f"{epsilon:g}" for epsilon in epsilons]
    for epsilon, (_, n, defender, attacker, best, *rest) in zip(epsilons, cells, strict=True):
        own = [row for row in rows if row["epsilon"] == epsilon]

        def said(field, own=own):
            values = [row[field] for row in own]
            return f"{np.mean(values):.2f} ± {np.std(values, ddof=1):.2f}"

        assert n == str(len(own))
        assert (defender, attacker) == (said("defender_accuracy"), said("attacker_accuracy"))
        assert best == said("attacker_accuracy_best").partition(" ")[0]
        assert rest == [f"{np.mean([row['l1_mean'] for row in own]):.3f}"]
