"""Rows to tables and figures, against numbers worked out by hand."""

import ast
import json
import math
import sys
from pathlib import Path

import numpy as np
import pytest

from madjax import report
from madjax.errors import InputError
from madjax.report.points import curve_of


def row(**changes):
    base = {
        "dataset": "mnist",
        "victim": "lenet",
        "queryset": "emnist",
        "defense": "mad",
        "layers": "last",
        "oracle": "extreme",
        "distance": "l1",
        "epsilon": 0.0,
        "attack": "knockoff",
        "budget": 5000,
        "seed": 0,
        "victim_accuracy": 99.0,
        "defender_accuracy": 99.0,
        "attacker_accuracy": 98.0,
        "attacker_accuracy_best": 98.5,
        "l1_mean": 0.0,
        "l2_mean": 0.0,
        "kl_mean": 0.0,
        "l1_std": 0.0,
        "fidelity": 97.0,
        "epochs": 5,
        "seconds": 1.5,
        "device": "cpu",
        "versions": {"jax": "0.10.2", "numpy": "2.3"},
        "git_commit": "abc1234",
        "config_hash": "f00d",
        "config": "default",
        "n_test": 1797,
    }
    made = base | changes
    return {"strength": made["epsilon"]} | made


def save(directory, *lines):
    texts = [line if isinstance(line, str) else json.dumps(line) + "\n" for line in lines]
    (directory / "rows.jsonl").write_text("".join(texts))
    return directory


def grid():
    """Two data sets, two attacks, two layers; attacker falls, seeds differ by two points."""
    return [
        row(
            dataset=dataset,
            attack=attack,
            layers=layers,
            epsilon=epsilon,
            seed=seed,
            num_classes=10,
            attacker_accuracy=98.0 - slope * epsilon + 2 * seed - shift,
            defender_accuracy=99.0 - 3 * epsilon**2 - seed,
        )
        for dataset, shift in (("mnist", 0), ("cifar10", 10))
        for attack, slope in (("knockoff", 20), ("jbda", 30))
        for layers in ("last", "all")
        for epsilon in (1.0, 0.0, 0.5, 2.0)
        for seed in (0, 1)
    ]


def other(defense, epsilon, **changes):
    """A row of a defence that is not MAD."""
    free = {"layers": "none", "oracle": "none", "distance": "none"}
    return row(**(free | {"defense": defense, "epsilon": epsilon} | changes))


def several():
    """Defences and ablations against the attacker with posteriors and the one with labels."""
    argmax = {"defense": "mad_argmax", "layers": "all", "oracle": "argmax_preserving"}
    cells = [other("none", 0.0), other("reverse_sigmoid", 0.3, defense_variant="gamma 0.2")]
    cells += [row(epsilon=e, defense_variant="", l1_mean=e) for e in (0.0, 0.5, 1.0)]
    cells += [row(epsilon=e, defense_variant="", **argmax) for e in (0.0, 1.0)]
    cells += [other("random_noise", 50.0, defense_variant="uniform, l1 ball")]
    cells += [other("dp_sgd", e, defense_variant="clip 1", dp_epsilon=8 / e) for e in (0.7, 2.0)]
    cells += [other("top_label", 1.0), other("rounding", 0.1), other("my_own", 3.0)]
    cells += [row(epsilon=1.0, layers="identity"), row(epsilon=1.0, oracle="random_vertex")]
    cells += [row(epsilon=1.0, oracle="extreme_unnormalised"), row(epsilon=1.0, oracle="argmin")]
    cells += [row(epsilon=1.0, defense_variant="surrogate of 1 epoch")]
    shared = {"num_classes": 10, "entropy_mean": 1.5}
    return [
        {**cell, **shared, "attack": attack, "variant": variant, "attacker_accuracy": start - i}
        for attack, variant, start in (("knockoff", "", 98.0), ("knockoff", "argmax", 90.0))
        for i, cell in enumerate(cells)
    ]


def drawn(ax):
    """Label -> points [n, 2] of the curves in a panel."""
    return {line.get_label(): line.get_xydata() for line in curve_lines(ax)}


def curve_lines(ax):
    return [line for line in ax.get_lines() if line.get_gid() == "curve"]


def marked(ax, label):
    return next(line for line in ax.get_lines() if line.get_label() == label)


def test_mean_and_sample_std_over_seeds():
    rows = [
        row(seed=s, attacker_accuracy=a, defender_accuracy=d, l1_mean=m, fidelity=f)
        for s, a, d, m, f in (
            (0, 90.0, 98.0, 0.5, 80.0),
            (1, 92.0, 98.0, 0.6, 81.0),
            (2, 97.0, 98.0, 0.7, 85.0),
        )
    ]
    (point,) = report.summarise(rows)
    assert point.n == 3
    assert point.attacker_accuracy.mean == pytest.approx(93.0)
    # Deviations -3, -1, 4: squares sum to 26, over n - 1 = 2.
    assert point.attacker_accuracy.std == pytest.approx(math.sqrt(13.0))
    assert point.defender_accuracy == (98.0, 0.0)
    assert point.attacker_accuracy_best.mean == pytest.approx(98.5)
    assert point.l1_mean.mean == pytest.approx(0.6)
    # Deviations -2, -1, 3: squares sum to 14.
    assert point.fidelity == pytest.approx((82.0, math.sqrt(7.0)))
    assert "93.00 ± 3.61" in report.table(rows)


def test_one_seed_has_no_std():
    (point,) = report.summarise([row()])
    assert point.n == 1
    assert point.attacker_accuracy == (98.0, None)
    assert "98.00 ± -" in report.table([row()])


def test_metric_that_a_seed_lacks_is_undefined_not_averaged_over_the_rest():
    rows = [row(seed=0, l1_mean=0.4), row(seed=1, l1_mean=None)]
    del rows[0]["fidelity"]
    (point,) = report.summarise(rows)
    assert point.l1_mean == (None, None)
    assert point.fidelity == (None, None)
    assert point.attacker_accuracy.mean == 98.0


def test_curves_are_apart_and_epsilons_are_in_numeric_order():
    rows = [row(epsilon=e) for e in (10.0, 2.0, 0.5, 0)]
    rows += [row(dataset="cifar10"), row(layers="all"), row(oracle=None), row(budget=500)]
    rows += [row(variant="as published code")]
    points = report.summarise(rows)
    assert [p.curve.dataset for p in points] == ["cifar10"] + 8 * ["mnist"]
    assert len({p.curve for p in points}) == 6
    main = report.Curve(*(row().get(name, "") for name in report.Curve._fields))
    assert [p.strength for p in points if p.curve == main] == [0.0, 0.5, 2.0, 10.0]
    budgets = [p.curve.budget for p in points if p.curve._replace(budget=5000) == main]
    assert budgets == [500, 5000, 5000, 5000, 5000]


def test_two_rows_of_one_cell_are_refused():
    with pytest.raises(InputError, match=r"2 rows for the cell mnist .* strength 0\.5 seed 3"):
        report.summarise([row(epsilon=0.5, seed=3), row(epsilon=0.5, seed=3), row(seed=1)])


def test_seeds_of_several_victims_are_points_of_one_curve():
    rows = [
        row(seed=s, victim_seed=v, attacker_accuracy=90.0 + v) for s in (0, 1) for v in (0, 1, 2)
    ]
    (point,) = report.summarise(rows)
    assert (point.n, point.victims) == (6, 3)
    assert point.attacker_accuracy.mean == pytest.approx(91.0)
    assert "### mnist (lenet, 3 victims) <- emnist" in report.table(rows)
    (one,) = report.summarise([r for r in rows if r["victim_seed"] == 2])
    assert (one.n, one.victims) == (2, 1)
    (unknown,) = report.summarise([row(seed=0), row(seed=1)])
    assert unknown.victims is None
    elsewhere = [{**r, "victim_accuracy": 98.0 + (r["seed"] == 1)} for r in rows]
    assert report.summarise(elsewhere)[0].victims == 6  # each was trained twice
    older = [{**r, "victim_accuracy": None if r["seed"] == 1 else 98.0} for r in rows]
    assert report.summarise(older)[0].victims == 3
    assert report.summarise([{**r, "victim_accuracy": None} for r in rows])[0].victims == 3


def test_the_agreement_with_the_victim_has_a_column_where_rows_have_it():
    rows = [row(attacker_fidelity=70.0 + s, seed=s) for s in (0, 1)]
    head, _, line = report.table(rows).splitlines()[-3:]
    titles, values = (list(map(str.strip, each.split("|"))) for each in (head, line))
    assert values[titles.index("attacker fidelity %")] == "70.50"
    assert "attacker fidelity" not in report.table([row()])


def test_tasks_that_differ_in_what_lies_behind_a_name_are_curves_of_their_own():
    rows = [row(dataset_source=name) for name in ("mnist", "mnist[:5000]")]
    rows += [row(dataset_source="mnist", query_splits=["train", "test"])]
    assert len({p.curve for p in report.summarise(rows)}) == 3


def recipes(**changes):
    """Rows of one name, each with a recipe of its own, and all that a row says of it."""
    base = {"victim_learning_rate": 0.1, "victim_epochs": 9, "targets": "posteriors"}
    return row(**(base | {"task_settings": str(changes)} | changes))


def test_cells_that_differ_in_their_settings_alone_are_curves_of_their_own():
    """As two victims of one data set that were trained differently."""
    slow = {"victim_learning_rate": 0.01, "victim_epochs": 99}
    rows = [recipes(), recipes(**slow)]
    assert len(report.summarise(rows)) == 2
    (ax,) = report.figure(rows).get_axes()
    # A figure says what is enough, a table all that differs.
    label = "MAD, last layer (knockoff), victim_epochs"
    assert set(drawn(ax)) == {f"{label} 9", f"{label} 99"}
    heads = [line.split("l1), ")[1] for line in report.table(rows).split("\n") if "###" in line]
    assert heads == [
        "victim_epochs 9, victim_learning_rate 0.1",
        "victim_epochs 99, victim_learning_rate 0.01",
    ]
    three = [*rows, recipes(**slow, targets="top_label")]
    (ax,) = report.figure(three).get_axes()
    assert set(drawn(ax)) == {
        f"{label} 9, targets posteriors",
        f"{label} 99, targets posteriors",
        f"{label} 99, targets top label",
    }


def test_what_no_field_names_is_told_apart_by_the_digests_of_all_settings():
    rows = [recipes(task_settings="aa"), recipes(task_settings="bb")]
    (ax,) = report.figure(rows).get_axes()
    label = "MAD, last layer (knockoff), task_settings"
    assert set(drawn(ax)) == {f"{label} aa", f"{label} bb"}
    # Older rows say neither, and what they lack is said only where nothing else tells.
    (ax,) = report.figure([row(), recipes(budget=100)]).get_axes()
    label = "MAD, last layer (knockoff)"
    assert set(drawn(ax)) == {f"{label}, budget 5000", f"{label}, budget 100"}
    (ax,) = report.figure([row(), recipes()]).get_axes()
    assert set(drawn(ax)) == {f"{label}, victim_epochs {epochs}" for epochs in "-9"}


def test_a_curve_starts_undefended_at_that_of_its_own_task():
    slow = {"victim_learning_rate": 0.01, "task_settings": "slow", "defense_settings": "x"}
    rows = [recipes(epsilon=0.5), recipes(epsilon=0.5, **slow)]
    rows += [{**r, **other("none", 0.0, attacker_accuracy=90 + i)} for i, r in enumerate(rows)]
    curves = drawn(report.figure(rows).get_axes()[0])
    starts = {label[-4:].strip(): points[0, 0] for label, points in curves.items()}
    assert starts == {"0.1": 90.0, "0.01": 91.0}


def test_one_report_of_several_directories(tmp_path):
    """A cell that two of them hold is read once."""
    first = [row(id="a"), row(id="b", epsilon=0.5)]
    second = [row(id="b", epsilon=0.5, device="gpu"), other("rounding", 0.1, id="c")]
    folders = []
    for name, rows in (("one", first), ("two", second)):
        (tmp_path / name).mkdir()
        folders.append(save(tmp_path / name, *rows))
    rows = [*first, second[1]]
    assert report.read_rows(*folders) == rows
    text = report.write_report(*folders, out=tmp_path / "both" / "here")
    assert text == report.table(rows)
    written = {"report.md", "report.html", "tradeoff.png", "defenses.png"}
    assert {path.name for path in (tmp_path / "both" / "here").iterdir()} == written
    with pytest.raises(InputError, match="of 2 directories has no place of its own: give --out"):
        report.write_report(*folders)
    # In one directory, twice is a fault.
    with pytest.raises(InputError, match="2 rows for the cell"):
        report.table(report.read_rows(save(tmp_path / "one", *first, first[0])))


def test_older_rows_are_read_as_they_would_be_written_now(tmp_path):
    """They had every defence's strength as `epsilon`."""
    old = [row(epsilon=0.5), other("reverse_sigmoid", 0.3)]
    save(tmp_path, *({k: v for k, v in each.items() if k != "strength"} for each in old))
    mad, reverse = report.read_rows(tmp_path)
    assert (mad["strength"], mad["epsilon"]) == (0.5, 0.5)
    assert (reverse["strength"], reverse["epsilon"]) == (0.3, None)
    heads = [
        line.split("|")[1].strip()
        for line in report.table([mad, reverse]).splitlines()
        if "attacker acc" in line
    ]
    assert heads == ["epsilon", "strength"]


@pytest.mark.parametrize("tail", ['{"dataset": "mni', '{"dataset": "mni\n', "\udce2"])
def test_half_written_last_line_is_skipped(tmp_path, tail):
    save(tmp_path, row(), row(seed=1))
    with (tmp_path / "rows.jsonl").open("ab") as file:
        file.write(tail.encode("utf-8", "surrogateescape"))
    assert report.read_rows(tmp_path) == [row(), row(seed=1)]


def test_rows_survive_the_file_unchanged_with_blank_lines_and_null_kl(tmp_path):
    save(tmp_path, row(kl_mean=None), "\n", row(seed=1))
    rows = report.read_rows(tmp_path)
    assert rows == [row(kl_mean=None), row(seed=1)]
    assert report.table(rows) == report.table([row(), row(seed=1)])


@pytest.mark.parametrize(
    ("line", "says"),
    [
        ('{"dataset": "mni\n', "not JSON"),
        ("[1, 2]\n", "not a JSON object"),
        ({"dataset": "mnist"}, "no field 'victim'"),
        (row(attacker_accuracy=math.nan), "attacker_accuracy is nan"),
        (row(epsilon="0.5"), "strength is '0.5'"),
    ],
)
def test_bad_line_names_file_and_line(tmp_path, line, says):
    save(tmp_path, row(), line, row(seed=1))
    with pytest.raises(InputError, match=rf"rows\.jsonl:2: .*{says}") as caught:
        report.read_rows(tmp_path)
    assert "\n" not in str(caught.value)


def test_missing_directory_file_and_rows_are_told_apart(tmp_path):
    with pytest.raises(InputError, match="nowhere: no such directory"):
        report.read_rows(tmp_path / "nowhere")
    with pytest.raises(InputError, match=r"rows\.jsonl: no such file"):
        report.read_rows(tmp_path)
    for text in ("", "\n", '{"half'):
        with pytest.raises(InputError, match=r"rows\.jsonl: no rows"):
            report.read_rows(save(tmp_path, text))
    for reader in (report.table, report.figure):
        with pytest.raises(InputError, match="no rows"):
            reader([])


def test_table_is_aligned_markdown_with_a_heading_a_curve():
    blocks = report.table(grid()).rstrip("\n").split("\n\n")
    assert len(blocks) == 1 + 2 * 8
    headings, tables = blocks[1::2], blocks[2::2]
    assert len(set(headings)) == 8
    assert all(heading.startswith("### ") for heading in headings)
    assert "### mnist (lenet) <- emnist, knockoff, budget 5000, MAD, last layer" in headings[-1]
    for text in tables:
        head, rule, *body = text.split("\n")
        assert {len(line) for line in text.split("\n")} == {len(head)}
        assert {line.count("|") for line in text.split("\n")} == {7}
        assert all(set(cell.strip()) == {"-", ":"} for cell in rule.strip("|").split("|"))
        assert [line.split("|")[1].strip() for line in body] == ["0", "0.5", "1", "2"]
    # mnist, knockoff: seeds 98 and 100 less 20 epsilon, std sqrt(2); defender 99 and 98 less 3.
    cells = [cell.strip() for cell in tables[-1].split("\n")[4].strip("|").split("|")]
    assert cells == ["1", "2", "95.50 ± 0.71", "79.00 ± 1.41", "98.50", "0.000"]


def test_provenance_is_of_all_rows():
    rows = [
        row(seed=10),
        row(seed=9, device="TPU v4", n_test=10000, config_hash="beef"),
        row(seed=1, versions=None, git_commit=None),
    ]
    first = report.table(rows).split("\n")[0]
    for text in (
        "3 rows",
        "seeds: 1, 9, 10;",
        "device: cpu, TPU v4",
        "config: default",
        "config hash: beef, f00d",
        "commit: abc1234",
        "jax: 0.10.2",
        "test examples: 1797, 10000",
    ):
        assert text in first
    assert "of the defender" not in first
    assert "jax: not recorded" in report.table([row(versions=None)])
    assert "; test examples of the defender: 500." in report.table([row(n_judged=500)])


def test_columns_appear_only_in_the_tables_of_curves_that_have_them():
    old, new, dp = "MAD, last layer (oracle", "rounding", "DP-SGD (clip 1)"
    rows = [row(), other("rounding", 0.1, entropy_mean=1.25, fidelity=98.5)]
    rows += [
        other("dp_sgd", e, defense_variant="clip 1", entropy_mean=2.0, dp_epsilon=d)
        for e, d in ((0.0, None), (2.0, 3.456))
    ]
    blocks = report.table(rows).split("\n\n")[1:]
    tables = dict(zip(blocks[::2], (b.rstrip("\n").split("\n") for b in blocks[1::2]), strict=True))

    def cells(name):
        (lines,) = [lines for heading, lines in tables.items() if f"5000, {name}" in heading]
        return [[cell.strip() for cell in line.strip("|").split("|")] for line in lines]

    assert cells(old)[0][-1] == "L1"  # has fidelity, as all old rows, but no entropy
    assert cells(new)[0][-3:] == ["L1", "fidelity %", "entropy, bits"]
    assert cells(new)[2][-2:] == ["98.50", "1.25"]
    assert cells(dp)[0][-4:] == ["L1", "fidelity %", "entropy, bits", "DP epsilon"]
    assert [line[-1] for line in cells(dp)[2:]] == ["-", "3.46"]


def test_headings_say_what_a_defence_has():
    rows = [
        other("reverse_sigmoid", 0.3, defense_variant="gamma 0.2"),
        other("top_label", 1.0),
        row(defense_variant="surrogate of 1 epoch"),
        row(layers="identity", oracle=None),
        row(defense_variant="ascend", oracle="none"),
    ]
    heads = [line.split("5000, ")[1] for line in report.table(rows).split("\n") if "###" in line]
    assert heads == [
        "MAD, G = I (oracle -, distance l1)",
        "MAD, last layer (ascend; distance l1)",
        "MAD, last layer (surrogate of 1 epoch; oracle extreme, distance l1)",
        "reverse sigmoid (gamma 0.2)",
        "top label",
    ]


def test_a_metric_that_is_not_finite_is_undefined():
    (point,) = report.summarise([row(seed=s, dp_epsilon=math.inf) for s in (0, 1)])
    assert point.dp_epsilon == (None, None)


def test_rows_from_before_variants_are_of_the_same_curve(tmp_path):
    old, new = row(epsilon=0.5), row(epsilon=1.0, defense_variant="", variant="")
    (curve,) = {point.curve for point in report.summarise([old, new])}
    assert curve.defense_variant == ""
    assert report.read_rows(save(tmp_path, old, new)) == [old, new]


def test_figure_plots_the_summary():
    rows = grid()
    panels = report.figure(rows).get_axes()
    assert [ax.get_title(loc="left") for ax in panels] == ["CIFAR10", "MNIST"]
    points = report.summarise(rows)
    for ax, dataset in zip(panels, ("cifar10", "mnist"), strict=True):
        lines = curve_lines(ax)
        curves = list(dict.fromkeys(p.curve for p in points if p.curve.dataset == dataset))
        assert len(lines) == len(curves) == 4
        for line, curve in zip(lines, curves, strict=True):
            mine = [p for p in points if p.curve == curve]
            assert [p.strength for p in mine] == [0.0, 0.5, 1.0, 2.0]
            np.testing.assert_array_equal(
                line.get_xdata(), [p.attacker_accuracy.mean for p in mine]
            )
            np.testing.assert_array_equal(
                line.get_ydata(), [p.defender_accuracy.mean for p in mine]
            )
            assert line.get_markevery() == [1, 2, 3]  # epsilon = 0 has the circle instead
            assert report.NAMES[curve.layers] in line.get_label()
            assert curve.attack in line.get_label()
        assert len({(line.get_color(), str(line.get_linestyle())) for line in lines}) == 4


def test_figure_marks_undefended_ideal_and_diagonal():
    ax = report.figure(grid()).get_axes()[1]  # mnist
    circle, ideal = marked(ax, "undefended (ε = 0)"), marked(ax, "ideal defence")
    np.testing.assert_array_equal(circle.get_xydata(), 4 * [[99.0, 98.5]])
    np.testing.assert_allclose(ideal.get_xydata(), [[10.0, 98.5]])
    diagonal = marked(ax, "attacker = defender")
    assert diagonal.get_xy1() == (0, 0)
    assert diagonal.get_slope() == 1
    (low, high), (bottom, top) = ax.get_xlim(), ax.get_ylim()
    for line in (circle, ideal, *curve_lines(ax)):
        assert np.all((line.get_xdata() > low) & (line.get_xdata() < high))
        assert np.all((line.get_ydata() > bottom) & (line.get_ydata() < top))


def test_error_bars_are_the_std_both_ways():
    rows = [r for r in grid() if r["dataset"] == "mnist"]
    ax = report.figure(rows).get_axes()[0]
    point = report.summarise(rows)[0]
    bars = ax.containers[0].lines[2]
    first = [bar.get_segments()[0] for bar in bars]
    lengths = [np.ptp(segment, axis=0) for segment in first]
    np.testing.assert_allclose(lengths[0], [2 * point.attacker_accuracy.std, 0], atol=1e-9)
    np.testing.assert_allclose(lengths[1], [0, 2 * point.defender_accuracy.std], atol=1e-9)


def test_no_ideal_without_the_number_of_classes_and_none_without_an_undefended_run():
    for rows in ([row(), row(epsilon=1.0)], [row(epsilon=1.0, num_classes=10)]):
        (ax,) = report.figure(rows).get_axes()
        assert "ideal defence" not in {line.get_label() for line in ax.get_lines()}


def test_epsilon_labels_do_not_crowd():
    near = [row(epsilon=e, attacker_accuracy=98 - 20 * e) for e in (0.0, 1.0, 1.01, 2.0)]
    (ax,) = report.figure(near).get_axes()
    texts = {text.get_text() for text in ax.texts}
    assert texts in ({"1", "ε = 2"}, {"1.01", "ε = 2"})
    (ax,) = report.figure([row(epsilon=0.25)]).get_axes()
    assert [text.get_text() for text in ax.texts] == ["ε = 0.25"]


def test_strengths_that_are_no_budget_are_not_called_epsilon_and_none_stands_in_the_title():
    rows = [other("rounding", e, attacker_accuracy=98 - 20 * e) for e in (0.5, 1.0)]
    (ax,) = report.figure([{**r, "epsilon": None} for r in rows]).get_axes()
    assert {text.get_text() for text in ax.texts} == {"0.5", "1"}
    assert all(text.get_position()[1] < 1 for text in ax.texts)
    best = {"defender_accuracy": 100.0, "attacker_accuracy": 99.9}
    (ax,) = report.figure([rows[0] | best, rows[1]]).get_axes()
    assert len(ax.texts) == 2
    assert all(np.all(np.array(text.get_position()) < 1) for text in ax.texts)


def test_legend_names_are_readable_and_distinct():
    rows = [
        row(),
        row(layers="all"),
        row(defense="mad_argmax", oracle="argmax_preserving"),
        row(distance="l2"),
    ]
    (ax,) = report.figure(rows).get_axes()
    assert {line.get_label() for line in curve_lines(ax)} == {
        "MAD, last layer (knockoff), distance l1",
        "MAD, last layer (knockoff), distance l2",
        "MAD, all parameters (knockoff)",
        "MAD-argmax, last layer (knockoff)",
    }
    (ax,) = report.figure([other("my_own", 0.5, defense_variant="soft")]).get_axes()
    assert [line.get_label() for line in curve_lines(ax)] == ["my_own (soft; knockoff)"]


def test_labels_in_a_figure_of_defences_say_no_attack_and_differ_in_every_panel():
    rows = several()
    rows += [row(epsilon=0.5, attack="jbda"), row(epsilon=0.5, attack="jbda", epochs=9)]
    panels = report.defenses_figure(rows).get_axes()
    assert {line.get_label() for line in curve_lines(panels[0])} == {
        "MAD, last layer, epochs 5",
        "MAD, last layer, epochs 9",
    }
    assert {line.get_label() for line in curve_lines(panels[2])} == {
        "MAD, last layer",
        "MAD-argmax, all parameters",
        "reverse sigmoid (gamma 0.2)",
        "random noise (uniform, l1 ball)",
        "DP-SGD (clip 1)",
        "top label",
        "rounding",
        "my_own",
    }


def test_a_curve_without_an_undefended_point_starts_at_that_of_its_attack():
    rows = several()
    _, label_free, _, label_only = report.defenses_figure(rows).get_axes()
    for ax, top in ((label_free, 98.0), (label_only, 90.0)):
        curves = drawn(ax)
        # Undefended: the first row. The others follow in the order of the rows, 1 point less each.
        np.testing.assert_array_equal(curves["DP-SGD (clip 1)"][:, 0], np.subtract(top, [0, 8, 9]))
        np.testing.assert_array_equal(curves["top label"][:, 0], np.subtract(top, [0, 10]))
        # Its own point at epsilon 0 is kept.
        np.testing.assert_array_equal(curves["MAD, last layer"][:, 0], np.subtract(top, [2, 3, 4]))
        np.testing.assert_array_equal(
            marked(ax, "undefended (ε = 0)").get_xdata(), [top - 2, top - 5, top]
        )
    lines = {line.get_label(): line for line in curve_lines(label_free)}
    assert lines["DP-SGD (clip 1)"].get_markevery() == [1, 2]
    # Tables and points are of the rows alone.
    dp = [p.strength for p in report.summarise(rows) if p.curve.defense == "dp_sgd"]
    assert dp == 2 * [0.7, 2.0]


def test_the_start_is_of_another_defence_where_none_was_not_run_and_of_the_largest_budget():
    """Whatever there is at smaller ones is left to the figure of budgets."""
    rows = [
        row(attacker_accuracy=97.0),
        row(epsilon=0.5, attacker_accuracy=80.0),
        other("rounding", 0.1, attacker_accuracy=95.0),
        other("rounding", 0.1, attacker_accuracy=60.0, budget=100),
        other("none", 0.0, attacker_accuracy=66.0, budget=100),
        other("top_label", 1.0, attacker_accuracy=50.0, budget=100),
        row(epsilon=0.5, attack="jbda", budget=100, attacker_accuracy=70.0),
    ]
    jbda, _, knockoff, _ = report.defenses_figure(rows).get_axes()
    assert list(drawn(jbda)) == ["MAD, last layer"]  # at 100, which is the largest of that attack
    assert list(drawn(knockoff)) == ["MAD, last layer", "rounding"]
    np.testing.assert_array_equal(drawn(knockoff)["rounding"][:, 0], [97.0, 95.0])


def budgeted():
    """An attack and its top-label twin at three budgets, on two victims, and one without."""
    return [
        change(epsilon, budget, seed)
        for budget in (1000, 100, 10)
        for seed in (0, 1)
        for change, epsilon in (
            (lambda e, b, s: row(epsilon=e, budget=b, seed=s, attacker_accuracy=b / 20 + s), 0.0),
            (lambda e, b, s: row(epsilon=e, budget=b, seed=s, attacker_accuracy=b / 40 + s), 0.9),
            (lambda e, b, s: other("none", e, budget=b, seed=s, attacker_accuracy=9.0), 0.0),
            (lambda e, b, s: row(epsilon=e, budget=b, seed=s, variant="top label"), 0.0),
            (lambda e, b, s: row(epsilon=e, budget=b, seed=s, dataset="cifar10"), 0.9),
        )
    ] + [row(attack="jbda", budget=100)]


def test_the_figure_of_budgets_has_a_curve_for_each_strength_and_attack():
    """Undefended attacks are one curve; what was measured at one budget is left out."""
    fig = report.budgets_figure(budgeted())
    cifar, mnist = fig.get_axes()
    curves = drawn(mnist)
    texts = [text.get_text() for text in fig.legends[0].get_texts()]
    assert texts == [
        "knockoff, undefended",
        "knockoff (top label), undefended",
        "knockoff, MAD, last layer, ε = 0.9",
        "accuracy of the answers",
    ]
    assert len(curves) == 3
    assert len(drawn(cifar)) == 1
    lines = [curves[text] for text in texts[:-1] if text in curves]
    np.testing.assert_allclose(lines[0], [[10, 1.0], [100, 5.5], [1000, 50.5]])  # rows of MAD's 0
    np.testing.assert_allclose(lines[2][:, 1], [0.75, 3.0, 25.5])
    looks = [(line.get_color(), line.get_linestyle()) for line in curve_lines(mnist)]
    assert len(set(looks)) == 3
    with pytest.raises(InputError, match="several budgets"):
        report.budgets_figure([row(), row(epsilon=0.5)])


def test_undefended_rows_are_a_circle_and_no_curve():
    (ax,) = report.figure([other("none", 0.0), other("none", 0.0, seed=1)]).get_axes()
    assert curve_lines(ax) == []
    np.testing.assert_array_equal(marked(ax, "undefended (ε = 0)").get_xydata(), [[98.0, 99.0]])


def test_figure_has_a_curve_for_each_defence_and_attack_but_no_ablation():
    rows = several()
    defenses = {
        "MAD, last layer ({})",
        "MAD-argmax, all parameters ({})",
        "reverse sigmoid (gamma 0.2; {})",
        "random noise (uniform, l1 ball; {})",
        "DP-SGD (clip 1; {})",
        "top label ({})",
        "rounding ({})",
        "my_own ({})",
    }
    (ax,) = report.figure(rows).get_axes()
    curves = drawn(ax)
    attacks = ("knockoff", "knockoff (argmax)")
    assert set(curves) == {each.format(attack) for each in defenses for attack in attacks}
    rounding = [r for r in rows if r["defense"] in ("none", "rounding") and r["variant"]]
    np.testing.assert_array_equal(
        curves["rounding (knockoff (argmax))"],
        [(r["attacker_accuracy"], r["defender_accuracy"]) for r in rounding],
    )
    ablation = [row(layers="identity", epsilon=1.0, variant="")]
    (ax,) = report.figure(ablation).get_axes()
    assert set(drawn(ax)) == {"MAD, G = I (knockoff)"}


def test_a_report_of_any_mix_has_a_panel_for_each_data_set():
    """Data sets need not have the same defences and attacks."""
    rows = [r for r in grid() if r["dataset"] == "cifar10" and r["attack"] == "jbda"]
    rows += [{**r, "dataset": "fashion_mnist"} for r in several()]
    rows += [other("rounding", 0.1, attack="jbself")]
    panels = report.figure(rows).get_axes()
    names = ["CIFAR10", "FashionMNIST", "MNIST"]
    assert sorted(ax.get_title(loc="left") for ax in panels) == names
    labels = {ax.get_title(loc="left"): set(drawn(ax)) for ax in panels}
    assert labels["MNIST"] == {"rounding (jbself)"}
    assert labels["CIFAR10"] == {"MAD, last layer (jbda)", "MAD, all parameters (jbda)"}
    assert len(labels["FashionMNIST"]) == 16
    assert set.union(*labels.values()) <= {
        text.get_text() for text in report.figure(rows).legends[0].get_texts()
    }


def test_colours_and_dashes_tell_defences_and_attacks_apart():
    (ax,) = report.figure(several()).get_axes()
    looks = {line.get_label(): (line.get_color(), line._dash_pattern) for line in curve_lines(ax)}
    assert len(set(map(str, looks.values()))) == len(looks) == 16
    # Eight defences, the more, have colours; two attacks have dashes.
    assert looks["rounding (knockoff)"][0] == looks["rounding (knockoff (argmax))"][0]
    assert looks["rounding (knockoff)"][1] == looks["top label (knockoff)"][1]
    assert len({colour for colour, _ in looks.values()}) == 8
    # Where the attacks are more, they have the colours.
    rows = [{**r, "attack": attack} for attack in "abc" for r in grid()[:16]]
    looks = {line.get_label(): line for line in curve_lines(report.figure(rows).get_axes()[0])}
    assert len({line.get_color() for line in looks.values()}) == 3
    same = looks["MAD, last layer (a)"], looks["MAD, all parameters (a)"]
    assert same[0].get_color() == same[1].get_color()
    assert same[1].get_linestyle() == "-" != same[0].get_linestyle()
    # Epochs are neither: all colours differ.
    rows = [{**r, "epochs": epochs} for epochs in (1, 2) for r in several()]
    lines = curve_lines(report.figure(rows).get_axes()[0])
    assert len({line.get_color() for line in lines}) == len(lines) == 32


def test_figure_of_defences_is_laid_out_as_the_papers_fourth():
    rows = several()
    panels = report.defenses_figure(rows).get_axes()
    where = [(ax.get_subplotspec().rowspan[0], ax.get_subplotspec().colspan[0]) for ax in panels]
    assert where == [(0, 0), (1, 0), (0, 1), (1, 1)]
    titles = [ax.get_title(loc="left").strip() for ax in panels]
    assert titles == ["MNIST, knockoff", "", "MNIST, knockoff (argmax)", ""]
    measures = ("l1_mean", "defender_accuracy")
    dp = [r for r in rows if r["defense"] in ("none", "dp_sgd")]
    for i, ax in enumerate(panels):
        curves = drawn(ax)
        assert len(curves) == 8
        assert not any("G = I" in label or "y*" in label or "epoch" in label for label in curves)
        own = [r for r in dp if r["variant"] == ("", "argmax")[i // 2]]
        np.testing.assert_array_equal(
            curves["DP-SGD (clip 1)"], [(r["attacker_accuracy"], r[measures[i % 2]]) for r in own]
        )
        diagonals = [line for line in ax.get_lines() if line.get_label() == "attacker = defender"]
        assert len(diagonals) == i % 2
        # Chance, at the utility of the undefended.
        ideal = marked(ax, "ideal defence").get_xydata()
        np.testing.assert_array_equal(ideal, [[10.0, (0.0, 99.0)[i % 2]]])


def test_figure_of_ablations_is_laid_out_as_the_papers_eighth():
    panels = report.ablations_figure(several()).get_axes()
    where = [(ax.get_subplotspec().rowspan[0], ax.get_subplotspec().colspan[0]) for ax in panels]
    assert where == [(0, 0), (0, 1), (1, 0), (1, 1)]
    for ax in panels:
        assert set(drawn(ax)) == {
            "MAD, last layer",
            "MAD-argmax, all parameters",
            "MAD, G = I",
            "MAD, last layer, y* = random",
            "MAD, last layer, y* = argmin",
            "MAD, last layer, un-normalised",
            "MAD, last layer (surrogate of 1 epoch)",
        }
    assert panels[0].get_ylabel() == panels[2].get_ylabel() != panels[1].get_ylabel()


def test_many_attacks_go_to_another_line_of_groups():
    rows = [{**r, "attack": attack} for attack in "abc" for r in several()]
    panels = report.defenses_figure(rows).get_axes()
    where = [(ax.get_subplotspec().rowspan[0], ax.get_subplotspec().colspan[0]) for ax in panels]
    assert where == [(u + 2 * (i // 4), i % 4) for i in range(6) for u in (0, 1)]


def test_a_point_without_the_utility_is_left_out_of_that_panel_alone():
    rows = [row(l1_mean=None, epsilon=e, attacker_accuracy=90 - e) for e in (0.0, 1.0)]
    rows += [other("rounding", 0.1), other("rounding", 0.2, l1_mean=math.nan)]
    top, bottom = report.defenses_figure(rows).get_axes()
    np.testing.assert_array_equal(np.isnan(drawn(top)["rounding"][:, 1]), [True, False, True])
    assert np.isnan(drawn(top)["MAD, last layer"][:, 1]).all()
    assert all(np.isfinite(points).all() for points in drawn(bottom).values())
    assert top.get_xlim() == bottom.get_xlim()


def test_curves_of_one_panel_look_different_and_mad_alone_is_solid():
    for make in (report.defenses_figure, report.ablations_figure):
        lines = curve_lines(make(several()).get_axes()[0])
        assert len({(line.get_color(), str(line._dash_pattern)) for line in lines}) == len(lines)
        solid = {line.get_label() for line in lines if line.get_linestyle() == "-"}
        assert solid == {"MAD, last layer", "MAD-argmax, all parameters"}
        # What is dashed lies above it.
        assert {line.get_label() for line in lines[:2]} == solid


def test_no_two_curves_of_a_figure_have_one_colour():
    rows = [{**r, "attack": f"attack {i}"} for i in range(21) for r in grid()[:8]]
    legend = report.figure(rows).legends[0]
    curves = legend.get_lines()[:-3]  # the last are marks and the diagonal
    assert len(curves) >= 21
    assert len({line.get_color() for line in curves}) == len(curves)
    assert len({text.get_text() for text in legend.get_texts()}) == len(legend.get_texts())


def test_no_axis_shows_more_than_100_percent():
    best = {"defender_accuracy": 99.9, "attacker_accuracy": 99.8}
    rows = [row(epsilon=0.0, **best), row(epsilon=0.5, **best | {"attacker_accuracy": 20.0})]
    rows += [other("rounding", 0.1, **best)]
    for make in (report.figure, report.defenses_figure):
        for ax in make(rows).get_axes():
            assert ax.get_xlim()[1] == 100
            assert ax.get_ylim()[1] == 100 or "L1" in ax.get_ylabel()


@pytest.mark.parametrize("attacks", ["a", "abc"])
@pytest.mark.parametrize("make", [report.defenses_figure, report.ablations_figure])
def test_legend_lies_inside_the_figure_and_outside_the_panels(make, attacks):
    from matplotlib.backends.backend_agg import FigureCanvasAgg

    fig = make([{**r, "attack": attack} for attack in attacks for r in several()])
    renderer = FigureCanvasAgg(fig).get_renderer()
    fig.draw(renderer)
    legend = fig.legends[0].get_window_extent(renderer)
    assert legend.x0 >= 0
    assert legend.y0 >= 0
    assert legend.x1 <= fig.bbox.x1
    boxes = [ax.get_tightbbox(renderer) for ax in fig.get_axes()]
    for i, box in enumerate(boxes):
        assert not box.overlaps(legend)
        assert not any(box.overlaps(later) for later in boxes[i + 1 :])


@pytest.mark.parametrize("make", [report.figure, report.budgets_figure])
@pytest.mark.parametrize("columns", [1, 2, 3])
@pytest.mark.parametrize("dataset", ["mnist", "fashion_mnist", "a_data_set_of_a_long_name"])
def test_the_titles_of_a_panel_are_beside_each_other(dataset, columns, make):
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.text import Text

    names = [dataset, *"xy"][:columns]
    rows = [{**r, "dataset": name, "queryset": name} for name in names for r in grid()[:8]]
    rows += [{**r, "queryset": "kassel_letters"} for r in rows]
    fig = make(rows + [{**r, "budget": 3} for r in rows])
    renderer = FigureCanvasAgg(fig).get_renderer()
    fig.draw(renderer)
    for ax in fig.get_axes():
        large, small = (ax.get_title(loc=side) for side in ("left", "right"))
        boxes = {t.get_text(): t.get_window_extent(renderer) for t in ax.findobj(Text)}
        assert large.endswith("\n") or not boxes[large].overlaps(boxes[small])
        assert large != "MNIST\n"  # there is room


@pytest.mark.parametrize(
    ("rows", "said"),
    [
        ([row()], "1 seed"),
        ([row(seed=4), row(seed=5), row(seed=5, victim_seed=1)], "2 seeds"),
        ([row(seed=s) for s in range(3)] + [row(strength=0.9, seed=9)], "1 to 3 seeds"),
        ([row(seed=1), row(seed=2, layers="all")], "1 seed"),
    ],
)
def test_a_panel_says_how_many_seeds_its_points_have(rows, said):
    (ax,) = report.figure(rows).get_axes()
    assert ax.get_title(loc="right").endswith(f"· {said}")


def test_png_has_the_same_bytes_twice_and_no_version(tmp_path):
    paths = [tmp_path / "a.png", tmp_path / "b.png"]
    for path in paths:
        report.tradeoff_figure(grid(), path)
    first, second = (path.read_bytes() for path in paths)
    assert first.startswith(b"\x89PNG\r\n\x1a\n")
    assert first.endswith(b"IEND\xaeB`\x82")
    assert first == second
    assert b"Software" not in first
    report.tradeoff_figure([row()], paths[1])
    assert int.from_bytes(paths[1].read_bytes()[16:20]) == 6.4 * 160  # pixels across
    assert paths[1].read_bytes() != first


def learners():
    """Attackers of whole answers and their twins that keep the top label, before five defences."""
    return [
        {**cell, "attacker_accuracy": start - 10 * cell["l1_mean"] + seed, "seed": seed}
        | {"targets": targets, "variant": variant, "attack_settings": targets}
        for targets, variant, start in (("posteriors", "", 97.0), ("top_label", "label", 90.0))
        for seed in (0, 2)
        for cell in (
            other("none", 0.0),
            row(epsilon=0.0),
            row(epsilon=0.5, l1_mean=0.5),
            other("reverse_sigmoid", 0.3, l1_mean=0.7),
            row(epsilon=1.0, l1_mean=1.0, layers="identity"),
        )
    ]


def test_the_figure_of_the_top_label_draws_both_attackers_of_a_defence_in_one_panel():
    rows = learners()
    panels = report.top_label_figure(rows).get_axes()
    titles = [ax.get_title(loc="left") for ax in panels]
    assert titles == ["MAD, last layer", "reverse sigmoid"], "neither ablations nor none"
    for ax, distance in zip(panels, (0.5, 0.7), strict=True):
        whole, label = (line.get_xydata() for line in curve_lines(ax))
        np.testing.assert_allclose(whole, [(0, 98), (distance, 98 - 10 * distance)])
        np.testing.assert_allclose(label, [(0, 91), (distance, 91 - 10 * distance)])
        assert len({line.get_color() for line in curve_lines(ax)}) == 2
    assert "top_label.png" in report.figures_for(rows)


def test_attackers_without_one_twin_are_in_no_figure_of_the_top_label():
    rows = learners()
    alone = [r for r in rows if r["targets"] == "posteriors"]
    assert "top_label.png" not in report.figures_for(alone)
    jbda = [r | {"attack": "jbda"} for r in alone]
    third = [r | {"variant": "third", "attack_settings": "third"} for r in alone]
    titles = [ax.get_title(loc="left") for ax in report.top_label_figure(rows + jbda).get_axes()]
    assert titles == ["MAD, last layer", "reverse sigmoid"]
    assert "top_label.png" not in report.figures_for(rows + third)
    lost = [r | {"status": "diverged"} for r in rows]
    assert report.figures_for(lost) == {}
    with pytest.raises(InputError, match="no defence was attacked twice"):
        report.top_label_figure(alone)


def test_a_strength_of_0_that_changes_answers_is_a_point_as_any_other():
    """Rounding to no decimals; a curve goes from the answers that are changed least."""
    rows = [
        other("none", 0.0, attacker_accuracy=97.0, undefended_share=1.0),
        other("rounding", 0.0, attacker_accuracy=90.0, undefended_share=0.3, l1_mean=0.4),
        other("rounding", 2.0, attacker_accuracy=96.0, undefended_share=0.4, l1_mean=0.1),
    ]
    ax = report.defenses_figure(rows).get_axes()[0]
    (line,) = curve_lines(ax)
    np.testing.assert_array_equal(line.get_xydata(), [(97, 0), (96, 0.1), (90, 0.4)])
    assert line.get_markevery() == [1, 2]
    np.testing.assert_array_equal(marked(ax, "undefended (ε = 0)").get_xydata(), [(97, 0)])
    (line,) = curve_lines(report.defenses_figure(rows[1:]).get_axes()[0])
    np.testing.assert_array_equal(line.get_xydata(), [(96, 0.1), (90, 0.4)])
    assert "undefended %" in report.table(rows[1:])
    assert "undefended %" not in report.table(rows[:1])


def test_write_report_of_one_defence_writes_both_files_and_leaves_no_others(tmp_path):
    rows = [r for r in grid() if r["layers"] == "last"]
    save(tmp_path, *rows, '{"half')
    text = report.write_report(tmp_path)
    assert text == report.table(rows)
    assert (tmp_path / "report.md").read_text(encoding="utf-8") == text
    assert (tmp_path / "tradeoff.png").read_bytes().startswith(b"\x89PNG")
    names = {path.name for path in tmp_path.iterdir()}
    assert names == set(report.files(tmp_path))
    assert names == {"rows.jsonl", "report.md", "report.html", "tradeoff.png"}


@pytest.mark.parametrize(
    ("defenses", "written"),
    [
        (["none", "top_label"], []),
        (["none", "top_label", "rounding"], ["defenses.png"]),
        (["none", "identity"], ["ablations.png"]),
        (["top_label", "identity", "random_vertex"], ["ablations.png"]),
        (["none", "top_label", "rounding", "identity"], ["defenses.png", "ablations.png"]),
    ],
)
def test_figures_are_those_that_the_defences_call_for(tmp_path, defenses, written):
    def called(r):
        return {r["layers"], r["oracle"]} if r["defense"] == "mad" else {r["defense"]}

    save(tmp_path, *(r for r in several() if called(r) & {*defenses}))
    report.write_report(tmp_path)
    files = ["rows.jsonl", "report.md", "report.html", "tradeoff.png", *written]
    assert report.files(tmp_path) == files
    assert {path.name for path in tmp_path.iterdir()} == {*files}


def test_every_figure_of_a_report_has_the_same_bytes_twice(tmp_path):
    for name, make in report.figures_for(several()).items():
        for folder in ("a", "b"):
            (tmp_path / folder).mkdir(exist_ok=True)
            report.save_png(make(several()), tmp_path / folder / name)
        assert (tmp_path / "a" / name).read_bytes() == (tmp_path / "b" / name).read_bytes()


def test_failed_write_keeps_the_old_file(tmp_path, monkeypatch):
    path = tmp_path / "tradeoff.png"
    path.write_bytes(b"old")

    def crash(self, part, **options):
        Path(part).write_bytes(b"half")
        raise OSError("disk full")

    monkeypatch.setattr("matplotlib.figure.Figure.savefig", crash)
    with pytest.raises(InputError, match=r"tradeoff\.png cannot be written \(disk full\)"):
        report.tradeoff_figure([row()], path)
    assert path.read_bytes() == b"old"
    assert list(tmp_path.iterdir()) == [path]


def test_imports_are_light_and_pyplot_is_not_used():
    sources = [p.read_text(encoding="utf-8") for p in Path(report.__file__).parent.glob("*.py")]
    trees = [ast.parse(source) for source in sources]
    nodes = [node for tree in trees for node in ast.walk(tree)]
    names = {node.module for node in nodes if isinstance(node, ast.ImportFrom)}
    names |= {a.name for node in nodes if isinstance(node, ast.Import) for a in node.names}
    third_party = {name.split(".")[0] for name in names} - set(sys.stdlib_module_names)
    # pyarrow only where a trace is read, jinja2 and scipy where a page is written
    assert third_party == {"numpy", "matplotlib", "madjax", "pyarrow", "jinja2", "scipy"}
    inside = {name for name in names if name.startswith("madjax")}
    assert {name for name in inside if not f"{name}.".startswith("madjax.report.")} == {
        "madjax",  # config and store, by which a run's command is known
        "madjax.errors",
        "madjax.files",
    }
    top = {node.module for tree in trees for node in tree.body if isinstance(node, ast.ImportFrom)}
    assert not any(name.startswith(("matplotlib", "jinja2", "scipy")) for name in top)
    assert not any("pyplot" in source for source in sources)


def test_rows_of_before_a_field_came_are_of_one_curve_with_those_that_have_none_of_it():
    """A run may go on with a newer madjax."""
    before = {"dataset": "mnist", "defense": "mad", "epochs": 3}
    after = before | {"augment": None, "victim_augment": None, "start": None}
    assert curve_of(before) == curve_of(after)
    assert curve_of(before) != curve_of(after | {"augment": "crop_and_flip"})
    assert curve_of(before) != curve_of(after | {"epochs": 0})
