"""Numbers in the sentences of experiments/README.md: each is made anew from the rows it is about.

The tables there have tests of their own (test_experiments.py, test_paper.py).
"""

import json
from functools import partial
from pathlib import Path

import numpy as np
import pytest

from madjax.report.found import TABLE_1

EXPERIMENTS = Path(__file__).parents[1] / "experiments"
RESULTS = EXPERIMENTS / "results"
TEXT = " ".join((EXPERIMENTS / "README.md").read_text().split())
UNALTERED = {"oracle": "extreme", "objective": "none", "defense_variant": ""}
LAST = {"defense": "mad", "layers": "last", **UNALTERED}
ALL = {"defense": "mad", "layers": "all", **UNALTERED}
WHOLE, LABELS = {"targets": "posteriors"}, {"targets": "top_label"}


def rows_of(name, **fields):
    """The rows of a run in which the fields have these values."""
    lines = (RESULTS / name / "rows.jsonl").read_text().splitlines()
    return [r for r in map(json.loads, lines) if all(r[f] == v for f, v in fields.items())]


def defended(**fields):
    """The rows of mnist_defenses in which the fields have these values."""
    return rows_of("mnist_defenses", **fields)


def values(rows, field="attacker_accuracy"):
    """A field by seed, of one row a seed."""
    rows = sorted(rows, key=lambda row: row["seed"])
    assert rows
    assert len({row["seed"] for row in rows}) == len(rows)
    return np.array([row[field] for row in rows])


def said(numbers, digits=1):
    """Mean ± sample standard deviation."""
    return f"{np.mean(numbers):.{digits}f} ± {np.std(numbers, ddof=1):.{digits}f}"


def accuracy(rows):
    return said(values(rows))


def test_where_dp_sgd_has_the_attacker():
    """On straight lines between measured strengths, seed by seed."""
    far, low = [], []
    for seed in range(3):
        own = defended(defense="dp_sgd", seed=seed, **WHOLE)
        own = sorted(own + defended(defense="none", seed=seed, **WHOLE), key=lambda r: r["l1_mean"])
        l1, accuracies = ([r[f] for r in own] for f in ("l1_mean", "attacker_accuracy"))
        assert accuracies == sorted(accuracies, reverse=True)
        far.append(np.interp(-80, np.negative(accuracies), l1))
        low.append(np.interp(0.5, l1, accuracies))
    assert f"the attacker has 80 % at L1 {np.mean(far):.2f} and {said(low)} % at 0.5" in TEXT


def test_the_defences_that_keep_the_top_label():
    sigmoid = {"defense": "reverse_sigmoid", "strength": 1}
    assert f"and has the attacker at {accuracy(defended(**sigmoid, **WHOLE))}" in TEXT
    assert f"undoes it ({accuracy(defended(**sigmoid, **LABELS))}; Fig. 5" in TEXT
    (kept,) = {r["defender_accuracy"] for r in defended(**sigmoid)}
    assert {kept} == {r["defender_accuracy"] for r in defended(defense="none")}
    assert f"MNIST victim of {kept:.2f} %, knockoff attacker with 10,000 queries" in TEXT
    assert f"[{len(defended())} rows, report](results/mnist_defenses/report.md)" in TEXT


def test_what_mad_takes_from_the_attacker_of_top_labels():
    bare, before = defended(defense="none", **LABELS), defended(**LAST, strength=0.99, **LABELS)
    few = np.mean(values(bare) - values(before))
    most = rows_of("mnist_budgets", budget=50_000, **LABELS)
    bare, before = ([r for r in most if r["strength"] == s] for s in (0, 0.99))
    many = np.mean(values(bare) - values(before))
    assert f"MAD takes {few:.0f} points, and {many:.1f} where it has 50,000 queries" in TEXT


def test_the_surrogate_that_was_trained():
    own = defended(defense_variant="surrogate of 15 epochs", strength=0.99, **WHOLE)
    more = values(own) - values(defended(**LAST, strength=0.99, **WHOLE))
    assert f"One of 15 epochs leaves the attacker {said(more)} points more" in TEXT
    own = defended(defense_variant="the victim as surrogate", **WHOLE)
    assert {row["undefended_share"] for row in own} == {1.0}


def test_the_ablations():
    mad = {e: values(defended(**LAST, strength=e, **WHOLE)) for e in (0.8, 0.99)}
    every = {e: values(defended(**ALL, strength=e, **WHOLE)) for e in (0.8, 0.99)}
    least = values(defended(oracle="argmin", strength=0.99, **WHOLE))
    told = f"({said(least - mad[0.99])} points behind the last layer)"
    assert f"which the authors' code has too {told}" in TEXT
    long = {"oracle": "extreme_unnormalised", **WHOLE}
    by = [said(values(defended(strength=e, **long)) - every[e]) for e in (0.8, 0.99)]
    assert f"by {by[0]} points at 0.8 and {by[1]} at 0.99 (all parameters, in pairs)" in TEXT


def test_the_ablations_over_ten_seeds():
    rows = defended(**WHOLE) + rows_of("mnist_defenses-more_seeds")

    def at(layers, strength):
        wanted = {**LAST, "layers": layers, "strength": strength}
        return values([row for row in rows if wanted.items() <= row.items()])

    layers, strengths = ("identity", "all"), (0.99, 0.8)
    behind = [at(each, e) - at("last", e) for each in layers for e in strengths]
    assert {len(own) for own in behind} == {10}
    told = [said(own) for own in behind]
    assert f"G = I is {told[0]} behind the last layer at 0.99 and {told[1]} at 0.8" in TEXT
    assert f"at 0.8, all parameters {told[2]} and {told[3]}." in TEXT
    half = [2.262 * own.std(ddof=1) / np.sqrt(10) for own in behind]  # Student's, n = 10
    lows = [own.mean() - each for own, each in zip(behind, half, strict=True)]
    assert max(lows[:3]) < 0 < min(own.mean() for own in behind)
    assert f"the last is told from 0 ({lows[3]:.1f} to {behind[3].mean() + half[3]:.1f})" in TEXT
    (victim,) = {row["victim_accuracy"] for row in rows_of("mnist_defenses-more_seeds")}
    assert f"that was trained alike ({victim:.2f} %)" in TEXT


def test_the_defences_before_fashion_mnist():
    whole, labels = (partial(rows_of, "mnist_defenses-fashion_mnist", **t) for t in (WHOLE, LABELS))
    bare, bare_labels = (values(own(defense="none")) for own in (whole, labels))
    at = {(own, e): own(**LAST, strength=e) for own in (whole, labels) for e in (0.5, 0.99)}
    sigmoid = {"defense": "reverse_sigmoid", "strength": 1}
    (victim,) = {r["victim_accuracy"] for r in whole() if r["defense"] != "dp_sgd"}
    assert f"Before a Fashion-MNIST victim of {victim:.2f} % the same attackers learn" in TEXT
    assert f"letters ({said(bare)} % undefended)" in TEXT
    told = f"at {accuracy(whole(**sigmoid))}, and at {accuracy(labels(**sigmoid))} where that keeps"
    assert f"it has the attacker {told} the top label alone." in TEXT
    taken = said(bare - values(at[whole, 0.5]))
    assert f"MAD at 0.5 takes {taken} points, and costs the defender nothing." in TEXT
    assert {r["defender_accuracy"] for r in at[whole, 0.5]} == {victim}
    assert f"An attacker of top labels has {said(bare_labels)} % undefended." in TEXT
    few, many = (np.mean(bare_labels - values(at[labels, e])) for e in (0.5, 0.99))
    cost = victim - np.mean(values(at[labels, 0.99], "defender_accuracy"))
    told = f"{few:.1f} points from it at 0.5, and {many:.1f} at 0.99, for {cost:.1f} of the"
    assert f"MAD takes {told} defender's." in TEXT
    every = values(whole(**ALL, strength=0.99))
    long = values(whole(oracle="extreme_unnormalised", strength=0.99)) - every
    identity = values(whole(**{**LAST, "layers": "identity"}, strength=0.99))
    rest = (identity, values(whole(oracle="random_vertex", strength=0.99)), every)
    apart = [long, *(own - values(at[whole, 0.99]) for own in rest)]
    halves = [4.303 * own.std(ddof=1) / np.sqrt(3) for own in apart]  # Student's, n = 3
    assert all(abs(own.mean()) < half for own, half in zip(apart, halves, strict=True))
    assert "Three seeds tell no ablation from MAD" in TEXT


def test_dp_sgd():
    for strength in (0.7, 2, 8):
        own = defended(defense="dp_sgd", strength=strength, **WHOLE)
        (epsilon,) = {f"{row['dp_epsilon']:.2f}" for row in own}
        victim, l1 = said(values(own, "defender_accuracy")), np.mean(values(own, "l1_mean"))
        told = f"{strength:g} | {victim} | {accuracy(own)} | {l1:.2f} | {epsilon}"
        assert f"| {told} |" in TEXT


def test_the_largest_entropy_at_a_distance_of_one():
    """Half of the mass stays, the other half is spread over nine classes."""
    largest = np.array([0.5, *9 * [0.5 / 9]])
    nats = -np.sum(largest * np.log(largest))
    bits = nats / np.log(2)
    assert bits == pytest.approx(1 / 2 + np.log2(18) / 2)
    assert f"1/2 + log2(18)/2 = {bits:.2f} bits, or {nats:.2f} nats" in TEXT
    assert f"for MAD-argmax the paper has {nats:.2f} too, but in bits" in TEXT
    for defense in ("mad_argmax", "reverse_sigmoid"):  # nothing measured is beyond it
        near = [r for r in defended(defense=defense) if r["l1_mean"] <= 1]
        assert max(r["entropy_mean"] for r in near) <= bits


def test_the_solvers():
    """The table of attackers before each solver, and the sentence below it."""
    epsilons, ours = (0.5, 0.99), rows_of("mnist_optimum")

    def line(rows, *layers):
        cells = []
        for each in layers:
            own = [[r for r in rows if (r["layers"], r["epsilon"]) == (each, e)] for e in epsilons]
            cells.append(", ".join(map(accuracy, own)))
        last = [r for r in rows if r["epsilon"] == 0.99]
        kept = (
            values([r for r in last if r["layers"] == each], "defender_accuracy") for each in layers
        )
        blank = [""] * (2 - len(layers))
        cells = [*cells, *blank, ", ".join(f"{own.mean():.1f}" for own in kept)]
        return " | ".join(cells).replace("|  |", "| |")

    plain = [r for r in ours if r["constraints"] == "none"]
    ascend = [r for r in plain if r["solver"] == "ascend"]
    vertices = [r for r in plain if r["oracle"] == "extreme_at_budget"]
    kept = [r for r in ours if "keep_label" in r["constraints"]]
    search = [r for rule in (LAST, ALL) for r in defended(**rule, **WHOLE)]
    assert f"| line search | {line(search, 'last', 'all')} |" in TEXT
    assert f"| extreme_at_budget | {line(vertices, 'last', 'all')} |" in TEXT
    assert f"| ascend | {line(ascend, 'last', 'all')} |" in TEXT
    assert f"| ascend, `keep_label` | {line(kept, 'last')} |" in TEXT
    (own,), (theirs,) = ({r["victim_accuracy"] for r in rows} for rows in (search, ours))
    assert f"{own:.2f} % in place of {theirs:.2f}" in TEXT
    argmax = defended(defense="mad_argmax", strength=1, **WHOLE)
    at_099 = [r for r in kept if r["epsilon"] == 0.99]
    assert f"{accuracy(at_099)} % against {accuracy(argmax)} for MAD-argmax" in TEXT


def test_no_solver_leaves_the_budget():
    lines = (RESULTS / "optimum" / "study.jsonl").read_text().splitlines()
    excess = max(
        row["excess"] for row in map(json.loads, lines) if row["queries"] == "kassel_letters"
    )
    assert f"every answer is within the budget to {excess:.0e}.".replace("e-0", "e-") in TEXT


def test_the_ways_around_mad():
    def around(variant, strength):
        return rows_of("mnist_subversion", variant=variant, strength=strength)

    plain = {e: values(around("", e)) for e in (0, 0.9, 0.99)}
    for strength, same in plain.items():
        assert list(values(around("nquery", strength))) == list(same)
    cropped, labels = around("nquery+aug", 0), around("argmax", 0.9)
    assert f"harm the attacker undefended already ({accuracy(cropped)})" in TEXT
    assert f"best at 0.9 ({accuracy(labels)}, where whole answers give {said(plain[0.9])})" in TEXT
    assert f"a network twice as wide is ({accuracy(around('arch-larger', 0.99))})" in TEXT
    names = {row["variant"] for row in rows_of("mnist_subversion")}
    for strength, best in ((0.9, "argmax"), (0.99, "arch-larger")):
        means = {name: values(around(name, strength)).mean() for name in names}
        assert max(means, key=means.get) == best
    most = rows_of("mnist_budgets", budget=50_000, strength=0.99)
    labels, whole = ([r for r in most if r["targets"] == t] for t in ("top_label", "posteriors"))
    told = f"{accuracy(labels)} there, where whole answers give {accuracy(whole)}; others were not"
    assert f"With 50,000 queries top labels give {told}" in TEXT


def test_the_attacks_on_fashion_mnist():
    def bare(name):
        return rows_of("mnist_attacks-fashion_mnist", strength=0, budget=10_000, attack=name)

    paper = TABLE_1["fashion_mnist"]
    few = bare("knockoff")
    many = rows_of("mnist_knockoff-fashion_mnist", strength=0, layers="last")
    (short, long), epochs = map(accuracy, (few, many)), [r[0]["epochs"] for r in (few, many)]
    told = f"{short} with 10,000 queries and {epochs[0]} epochs, {long} with 50,000 and {epochs[1]}"
    assert f"knockoff is below ({told})" in TEXT
    assert max(values(few).max(), values(many).max()) < paper["knockoff"]
    for name in ("jbda", "jbself", "jbtop3"):
        assert values(bare(name)).min() > max(paper[name], values(many).max())
    digits = rows_of("mnist_knockoff-fashion_digits")
    assert {row["budget"] for row in digits} == {50_000}
    assert f"{accuracy(many)} with letters and {accuracy(digits)} with as many" in TEXT


def test_the_jacobian_attacks_as_published_code_on_fashion_mnist():
    paper = TABLE_1["fashion_mnist"]
    code, described = (
        {attack: rows_of(name, attack=attack) for attack in ("jbself", "jbda", "jbtop3")}
        for name in ("mnist_attacks-fashion_as_published", "fashion_training")
    )
    had = [f"({accuracy(own)}; {paper[attack]})" for attack, own in code.items()]
    near = had[0].replace(";", " %, the paper")
    assert f"jbself ends at the paper's number {near}, jbda on the way to it {had[1]}" in TEXT
    assert f"and jbtop3 where it was {had[2]}" in TEXT
    best = [said(values(code[a], "attacker_accuracy_best")) for a in ("jbself", "jbda")]
    assert f"the best epoch, in which jbself has {best[0]} and jbda {best[1]}." in TEXT
    told = [accuracy(described[attack]) for attack in ("jbself", "jbda")]
    assert f"it gives jbself {told[0]} and jbda {told[1]} (" in TEXT
    for attack in ("jbself", "jbda"):
        assert values(code[attack]).max() < values(described[attack]).min() - 10
    recipe = ("learning_rate", "momentum", "weight_decay", "epochs")
    own, others = (
        {tuple(r[f] for f in recipe) for rows in each.values() for r in rows}
        for each in (code, described)
    )
    assert own == others


def test_the_substitutes_that_diverge():
    rows = rows_of("fashion_momentum", budget=1_000)
    told = {a: [r["status"] for r in rows if r["attack"] == a] for a in ("jbda", "jbself")}
    assert told == {"jbda": ["diverged", "diverged", "ok"], "jbself": ["diverged", "diverged"]}
    assert "diverge for two of three seeds of jbda and for both of jbself that were run" in TEXT


def test_mad_on_fashion_mnist():
    def own(strength, field="attacker_accuracy", layers="last"):
        rows = rows_of("mnist_knockoff-fashion_mnist", strength=strength, layers=layers)
        assert len(rows) == 3
        return values(rows, field)

    half, more = ((own(0) - own(e)).mean() for e in (0.5, 0.9))
    free, cost = (
        (own(0, "defender_accuracy") - own(e, "defender_accuracy")).mean() for e in (0.5, 0.9)
    )
    assert free == 0
    told = f"{half:.1f} points at epsilon 0.5, for nothing, and {more:.1f} at 0.9, for {cost:.1f}"
    assert told in TEXT
    taken = (own(0) - own(e, layers="all") for e in (0.5, 0.9))
    assert "MAD of all parameters takes {:.1f} and {:.1f}; at".format(*map(np.mean, taken)) in TEXT
    for epsilon in (0.1, 0.3, 0.5, 0.8, 0.9, 0.99, 1.1, 1.5):
        more = own(epsilon, layers="all") - own(epsilon)
        assert abs(more.mean()) < 4.303 * more.std(ddof=1) / np.sqrt(3)  # Student's, n = 3

    def taken(strength):
        for attack in ("knockoff", "jbda", "jbself", "jbtop3"):
            of = {"attack": attack, "budget": 10_000}
            bare, before = (
                values(rows_of("mnist_attacks-fashion_mnist", strength=s, **of))
                for s in (0, strength)
            )
            yield (bare - before).mean()

    half, more = ("{:.1f}, {:.1f}, {:.1f} and {:.1f}".format(*taken(e)) for e in (0.5, 0.9))
    told = f"that of the last layer takes {half} points at 0.5, and {more} at 0.9 ("
    assert f"From knockoff, jbda, jbself and jbtop3 with 10,000 queries {told}" in TEXT
    (unsure,) = set(own(0, "entropy_mean"))
    assert unsure > rows_of("mnist_budgets", epsilon=0)[0]["entropy_mean"]


def test_top_labels_on_fashion_mnist():
    def own(name, targets, strength, field="attacker_accuracy"):
        fields = {"targets": targets, "strength": strength, "budget": 50_000}
        return values(rows_of(name, **fields), field)

    both = ("mnist_budgets-fashion_mnist", "mnist_budgets")
    lost = [(own(n, "posteriors", 0) - own(n, "top_label", 0)).mean() for n in both]
    told = f"{lost[0]:.1f} points with 50,000 queries, and {lost[1]:.1f} on MNIST"
    assert f"undefended they cost it {told}" in TEXT
    whole, labels = (
        (own(both[0], t, 0) - own(both[0], t, 0.99)).mean() for t in ("posteriors", "top_label")
    )
    kept = [own(both[0], "posteriors", e, "defender_accuracy") for e in (0, 0.99)]
    told = f"{whole:.1f} points from whole answers and {labels:.1f} from top labels"
    assert f"At 0.99 MAD takes {told}, for {(kept[0] - kept[1]).mean():.1f} of" in TEXT


def test_the_angles():
    half = [row["angle_means"] for row in rows_of("mnist_angle", epsilon=0.5)]
    first, *_, last = np.mean(half, axis=0)
    steps = rows_of("mnist_angle")[0]["steps_at"]
    assert (steps[0], steps[-2]) == (1_000, 9_000)
    told = f"from {first:.0f} degrees in the first 1,000 steps to {last:.0f} in the last"
    assert told in TEXT
    counts = np.sum([r["angle_histogram"] for r in rows_of("mnist_angle", epsilon=2)], axis=0)
    width = 180 / len(counts)
    assert 2 % width == 0
    share = 100 * counts[-int(2 / width) :].sum() / counts.sum()
    assert f"At epsilon 2, {share:.0f} % of the angles are above 178 degrees" in TEXT
    ((few, many),) = {(row["n_judged"], row["n_test"]) for row in rows_of("mnist_angle")}
    assert f"is judged on {few:,} test images, the attacker on all {many:,}" in TEXT


def test_the_angles_on_fashion_mnist():
    def own(epsilon, field="angle_mean"):
        return values(rows_of("mnist_angle-fashion_mnist", epsilon=epsilon), field)

    low, high, flipped = (own(e).mean() for e in (0.95, 0.99, 2))
    told = f"{low:.1f} to {high:.1f} degrees at 0.95 to 0.99, and {flipped:.1f} at 2."
    assert f"the angles are alike: {told}" in TEXT
    bare, before = (said(own(e, "attacker_accuracy")) for e in (0, 0.95))
    steps = {f"{row['steps']:,}" for row in rows_of("mnist_angle-fashion_mnist")}
    told = f"{bare} % after its {steps.pop()} steps, before an epsilon of 0.95 {before}."
    assert f"undefended it has {told[:-1]}, which is chance." in TEXT


def test_the_attackers_that_learn_otherwise():
    adam = rows_of("mnist_angle_variants", defense="mad_argmax", variant="Adam", epsilon=2)
    turned = np.mean(values(adam, "update_angle_mean"))
    assert f"at 2 it turns Adam's updates by {turned:.1f} degrees" in TEXT
    (queries,) = {r["queries"] for r in rows_of("mnist_angle_variants") if r["batch_size"] == 16}
    assert f"A batch of 16 sends {queries:,} queries" in TEXT


def test_cifar10():
    bare, half, most = sorted(rows_of("cifar10_reduced"), key=lambda row: row["epsilon"])
    victim, own = bare["victim_accuracy"], bare["attacker_accuracy"]
    assert f"the attacker reaches {own / victim:.2f} of the victim's {victim:.1f} %" in TEXT
    taken, cost = own - half["attacker_accuracy"], victim - half["defender_accuracy"]
    best = bare["attacker_accuracy_best"] - half["attacker_accuracy_best"]
    told = f"takes {taken:.1f} points from the attacker and costs {cost:.1f}. The attacker's best"
    assert f"{told} epoch loses {best:.1f}." in TEXT
    assert f"0.99 the defender falls to {most['defender_accuracy']:.0f} %" in TEXT
    (sure,) = {f"{r['entropy_mean']:.2f}" for r in rows_of("mnist_budgets", epsilon=0)}
    assert (
        f"have {bare['entropy_mean']:.2f} bits of entropy, those of the MNIST victim {sure}" in TEXT
    )


def test_the_surrogates_by_width():
    lines = (RESULTS / "last_vs_all" / "study.jsonl").read_text().splitlines()
    rows = list(map(json.loads, lines))
    (accuracy,) = {row["victim_accuracy"] for row in rows}
    assert f"MNIST victim of {accuracy:.2f} % after {rows[0]['victim_epochs']} epochs" in TEXT
    narrow = np.mean([row["agreement"] for row in rows if row["width"] == 1])
    assert round(narrow / 25) == 1
    assert "they choose the same y* for a quarter of the queries" in TEXT
    widths = sorted({row["width"] for row in rows})
    far = [np.mean([r["distance"] for r in rows if r["width"] == w]) for w in widths]
    slope, _ = np.polyfit(np.log(widths), np.log(far), 1)
    assert slope == pytest.approx(-0.5, abs=0.05)


def facts_of(name):
    """What a benchmark left, and its results by what they are called."""
    facts = json.loads((RESULTS / f"{name}.json").read_text())
    return facts, {next(iter(each.values())): each for each in facts.get("results", [])}


def test_the_speed_of_the_defence():
    facts, _ = facts_of("bench_mad")
    large, count = facts["largest"], 135_317_824
    assert f"all {count:,} parameters, one query: {large['seconds']:.0f} s in" in TEXT
    alone = 256 * count * 4 / 1e9  # G is float32
    assert f"in {large['peak_gb']:.1f} GB, where G alone would be {alone:.0f} GB" in TEXT
    (many,) = [each for each in facts["curves"]["epsilons"] if each["x"] == 21]
    assert f"21 budgets in one call cost {many['ratio_to_one']:.2f} times one" in TEXT


def test_the_speed_of_white_box_steps():
    _, results = facts_of("bench_angle")
    queries = 7  # of a step of the grid
    ms = {name: 1e3 / queries / each["steps_per_second"][0] for name, each in results.items()}
    slow, lean, ours, _ = ms.values()
    assert f"a query takes the first loop {slow:.0f} ms here, the second {lean:.0f} ms" in TEXT
    assert f"and madjax {ours:.1f} ms" in TEXT


def test_the_speed_of_training_and_of_the_pipeline():
    _, parts = facts_of("bench_step")
    products, whole = parts["matrix products"]["madjax"][0], parts["and shuffled batches"]
    share, times = 100 * products / whole["madjax"][0], whole["PyTorch"][0] / products
    told = f"take {share:.0f} % of our step, and PyTorch's whole step {times:.2f} times as long"
    assert told in TEXT
    _, stages = facts_of("bench_pipeline")
    answers = stages["queries and MAD, last layer"]["ratio"][0]
    assert f"answers are made {answers:.0f} times as fast" in TEXT
    training, (_, variants) = stages["training and tests"]["ratio"][0], facts_of("bench_training")
    itself = variants["grid of 8, lax.map"]["ratio"][0]
    assert f"Of the factor {training} in training about {itself:.1f} is the training" in TEXT


def test_the_cost_of_the_reduced_run_of_cifar10():
    lines = (RESULTS / "cifar10_reduced" / "rates.jsonl").read_text().splitlines()
    spent = [(rate["kind"], rate["seconds"] / 60) for rate in map(json.loads, lines)]
    stolen = sum(minutes for kind, minutes in spent if kind.startswith("stolen"))
    whole = sum(minutes for _, minutes in spent)
    told = f"The run took {stolen:.0f} and {whole:.0f}, part of them beside other work"
    assert f"{told}: {71 / stolen:.2f} and {92 / whole:.2f}." in TEXT
