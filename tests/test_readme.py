"""What README says can be done as it says it."""

import json
import re
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
    code, *_ = re.findall(r"```python\n(.*?)```", README, re.DOTALL)
    assert len([line for line in code.splitlines() if line.strip()]) <= 12
    exec(compile(code, "README.md", "exec"), {})
    degrees = float(capsys.readouterr().out.split()[0])
    assert 0 < degrees < 180


@pytest.mark.parametrize("which", [1, 2])
def test_the_serving_examples_run(tmp_path, monkeypatch, which):
    code = re.findall(r"```python\n(.*?)```", README, re.DOTALL)[which]
    assert len([line for line in code.splitlines() if line.strip()]) <= 10
    network = madjax.Classifier(madjax.LeNet(10), lambda x: x / 255, (28, 28, 1))
    victim, surrogate = (network.init(jax.random.key(i)) for i in (0, 1))
    images = np.zeros((3, 28, 28, 1), np.uint8)
    names = {"jax": jax, "madjax": madjax, "partial": partial, "network": network}
    names |= {"victim": victim, "surrogate": surrogate, "images": images}
    names |= {"y": np.full((3, 10), 0.1)}
    monkeypatch.chdir(tmp_path)
    exec(compile(code, "README.md", "exec"), names)
    assert names["y_tilde"].shape == (3, 10)


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
    yes, partly, no = (sum(f"| {h} |" in line for line in lines) for h in ("yes", "partly", "no"))
    assert yes + partly + no == len(lines)
    said = f"Of {len(lines)} claims that our rows answer, {yes} hold, {partly} hold partly and {no}"
    assert said in " ".join(README.split())


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
