"""How rows came about, beside the paper's protocol, and where the paper and its code disagree."""

import json
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

from madjax import config, store
from madjax.errors import InputError
from madjax.report.angles import is_traced
from madjax.report.found import interval, percent, unspoiled, whole
from madjax.report.names import is_plain_mad, name
from madjax.report.pairs import Pair, grouped, pair_of, pairs
from madjax.report.points import curve_of, is_sound, stat
from madjax.report.rows import read_rows


class Protocol(NamedTuple):
    """One thing that an experiment fixes: what the paper has, and what the rows have."""

    what: str
    paper: str
    ours: str


def protocol(rows: list[dict]) -> list[Protocol]:
    """What was done, beside what the paper says that it did; online attackers are left out."""
    offline = [row for row in rows if not is_traced(row)]
    drawn = [row for row in offline if row["attack"].startswith("knockoff")]

    def of(*fields: str, sign: str = " ", own: list[dict] = offline) -> str:
        said = [[_said(row.get(field)) for field in fields] for row in own]
        return "; ".join(dict.fromkeys(sign.join(each) for each in said if all(each))) or "-"

    rate = ("learning_rate", "momentum", "epochs")
    return [
        Protocol(
            "victims",
            "LeNet on MNIST and FashionMNIST; VGG16 on CIFAR10, CIFAR100, CUB200 and Caltech256",
            of("victim", "dataset", sign=" on ", own=rows),
        ),
        Protocol(
            "their training: SGD, with learning rate, momentum, epochs, epochs to a tenth",
            "0.1, 0.5, 30 (LeNet) or 100, 50",
            of(*(f"victim_{field}" for field in (*rate, "decay_epochs")), sign=", ", own=rows),
        ),
        Protocol(
            "queries of knockoff",
            "MNIST: EMNIST letters; FashionMNIST: EMNIST; CIFAR10 and CIFAR100: each other; CUB200 "
            "and Caltech256: ImageNet",
            of("dataset", "queryset", sign=": ", own=drawn),
        ),
        Protocol("query budget", "50,000", of("budget")),
        Protocol(
            "training of stolen models: learning rate, momentum, epochs",
            "0.1, 0.5, 30 (LeNet) or 100",
            of(*rate, sign=", "),
        ),
        Protocol("gradients G", "of all parameters (Eq. 5)", of("layers", own=rows)),
        Protocol("surrogate", "random parameters", of("surrogate", own=rows)),
        Protocol("seeds", "not said", of("seed", own=rows)),
        Protocol(
            "accuracy of stolen models", "epoch not said", "of the last epoch; the best beside it"
        ),
    ]


def _said(value) -> str:
    if value is None or value in ("none", ""):
        return ""
    return f"{value:,}" if isinstance(value, int) and value > 9999 else name(str(value))


@dataclass(frozen=True)
class Disagreement:
    """Where the paper's text and its authors' code differ, what is done here, what it makes."""

    what: str
    paper: str
    code: str
    here: str
    measured: Callable[[list[dict]], Iterable[str]] = lambda rows: ()


def _layers(rows: list[dict]) -> Iterable[str]:
    for pair in _of_answers(rows):
        plain = is_plain_mad(pair.curve) and pair.curve.layers == "all"
        if plain and 0.9 <= pair.strength < 1:
            yield _beside(pair, "all parameters", "the last layer")


def _unnormalised(rows: list[dict]) -> Iterable[str]:
    for pair in _of_answers(rows):
        if pair.curve.oracle == "extreme_unnormalised":
            yield _beside(pair, "un-normalised", f"H, {name(pair.reference.layers)}")


def _of_answers(rows: list[dict]) -> list[Pair]:
    """Pairs before attackers, as described, that learn from whole answers."""
    return pairs([row for row in whole(rows) if is_sound(row) and not is_traced(row)])


def _beside(pair: Pair, said: str, reference: str) -> str:
    return (
        f"{said}: {interval(pair.difference)} points for the attacker beside {reference}, epsilon "
        f"{pair.strength:g} ({name(pair.curve.dataset)}, {pair.curve.attack}, "
        f"{pair.curve.budget:,} queries, n = {pair.difference.n})"
    )


def _epochs(rows: list[dict]) -> Iterable[str]:
    own = [row for row in whole(rows) if is_sound(row) and not is_traced(row)]
    for (curve, strength), at in grouped(own).items():
        final = stat([row["attacker_accuracy"] for row in at])
        best = stat([row.get("attacker_accuracy_best") for row in at])
        last = is_plain_mad(curve) and (curve.defense, curve.layers) == ("mad", "last")
        if best.mean is not None and last and curve.attack == "knockoff" and 0.9 <= strength < 1:
            where = f"{name(curve.dataset)}, {curve.budget:,} queries, n = {len(at)}"
            runs = dict.fromkeys(row["config"] for row in at if row.get("config"))
            yield (
                f"last {percent(final)}, best {percent(best)}, epsilon {strength:g} "
                f"({', '.join((where, *runs))})"
            )


def _as_published(rows: list[dict]) -> Iterable[str]:
    for dataset in dict.fromkeys(row["dataset"] for row in rows):
        for attack in ("jbda", "jbself", "jbtop3"):
            own = [r for r in rows if (r["dataset"], r["attack"]) == (dataset, attack)]
            code = [r | {"variant": ""} for r in own if r.get("variant") == "as published code"]
            both = [unspoiled(each, attack) for each in (code, whole(own))]
            if all(both):
                first, second = (stat([r["attacker_accuracy"] for r in each]) for each in both)
                yield (
                    f"{attack}: {percent(first)} as that code, {percent(second)} as published "
                    f"({name(dataset)}, n = {len(both[0])} and {len(both[1])})"
                )


DISAGREEMENTS = (
    Disagreement(
        "gradients",
        "G of all parameters (Eq. 5)",
        "the weight of the last layer alone",
        "either; rows say which",
        _layers,
    ),
    Disagreement(
        "objective",
        "the normalised H (Eq. 4)",
        "un-normalised by default; README turns H on",
        "H; the other as an ablation",
        _unnormalised,
    ),
    Disagreement(
        "Jacobian attacks",
        "as published",
        "clips normalised pixels, overwrites seeds, trains jbself on images it did not ask for",
        "as published; with as_published_code=True as the code has them, its training too",
        _as_published,
    ),
    Disagreement(
        "substitutes",
        "momentum 0.5, if they train as all models do",
        "momentum 0.9",
        "0.9 by default and on MNIST; 0.5 on FashionMNIST, where some diverge with 0.9",
    ),
    Disagreement(
        "which epoch",
        "not said",
        "keeps the epoch that is best on the test set",
        "the last; an attacker without the test set cannot tell its best",
        _epochs,
    ),
    Disagreement(
        "stolen models",
        "learning rate 0.1, 30 epochs for LeNet",
        "learning rate 0.01, a tenth after 60 epochs, 50 epochs in its README",
        "the paper's rate; epochs as the protocol above says",
    ),
    Disagreement(
        "budgets",
        "not said",
        "each budget goes on from the weights of the one before",
        "each from scratch",
    ),
    Disagreement(
        "MAD-argmax",
        "all vertices of the label-preserving simplex",
        "all for up to 10 classes, none for 11 to 45 (it stops with an error), greedy beyond",
        "exact to 10 classes, searched beyond",
    ),
    Disagreement(
        "surrogate",
        "fixed, random",
        "in training mode: BatchNorm of the one query; at 224x224 ImageNet's weights",
        "fixed, random, in inference mode",
    ),
    Disagreement(
        "deviations",
        "over all parameters, learning rate 0.001",
        "of the last layer, learning rate 0.1 / 64; no angles are written",
        "the paper's",
    ),
    Disagreement("step", "alpha = max{eps / |y - y*|, 1}, a misprint", "min", "min"),
    Disagreement("DP-SGD", "a baseline", "absent", "built; its noise is not said in the paper"),
)


class Run(NamedTuple):
    """Where numbers come from: the rows of one directory.

    minutes is what its attackers took, without victims, answers and compiling; it is shorter by
    those that a cache or another run had.
    """

    directory: str
    config: str
    command: str
    cells: int
    seeds: str
    minutes: float
    commits: str
    devices: str
    versions: str


def runs(*directories: str | Path) -> list[Run]:
    """The provenance of the rows in each directory."""
    shipped = _shipped()
    return [_run(Path(directory), shipped) for directory in directories]


def runs_table(*directories: str | Path) -> str:
    """`runs` in Markdown."""
    lines = [
        "| rows of | command | rows | seeds | minutes | device |",
        "| --- | --- | --: | --- | --: | --- |",
    ]
    for run in runs(*directories):
        command = f"`{run.command}`" if run.command else ""
        said = (run.directory, command, f"{run.cells}", run.seeds)
        lines.append("| " + " | ".join((*said, f"{run.minutes:.0f}", run.devices)) + " |")
    return "\n".join(lines) + "\n"


def _run(directory: Path, shipped: list[tuple[str, dict]]) -> Run:
    rows = read_rows(directory)

    def each(values: Iterable, sign: str = ", ") -> str:
        return sign.join(dict.fromkeys(str(value) for value in values if value))

    return Run(
        directory.name,
        each(row.get("config") for row in rows),
        _command(directory, shipped),
        len(rows),
        each(str(seed) for seed in sorted({row["seed"] for row in rows})),
        _seconds(rows) / 60,
        each(row.get("git_commit") for row in rows),
        each((row.get("device") for row in rows), "; "),
        each(f"JAX {row['versions']['jax']}" for row in rows if row.get("versions")),
    )


def _seconds(rows: list[dict]) -> float:
    """What stolen models took, and their transfer sets, each of which may have several budgets."""
    learning, collecting = 0.0, dict[tuple, float]()
    for row in rows:
        told = row.get("seconds_collecting") or 0
        learning += (row.get("seconds") or 0) - told
        of = (curve_of(row)._replace(budget=None), row["strength"], *pair_of(row))
        collecting[of] = max(told, collecting.get(of, 0))
    return learning + sum(collecting.values())


def _shipped() -> list[tuple[str, dict]]:
    """The configs that come with madjax: the command that runs each, and what its file says."""
    found = []
    for form in config.forms():
        try:
            chosen = config.load(form)
        except InputError:  # such as weights that are not there
            continue
        study = isinstance(chosen, config.AngleStudy)
        described = config.describe(chosen.sweep() if study else chosen)
        own = json.loads(json.dumps(described))  # as a file has it
        found.append((f"madjax {'angle' if study else 'sweep'} {form}", own))
    return found


def _command(directory: Path, shipped: list[tuple[str, dict]]) -> str:
    """The command that makes the rows, where their config is one that comes with madjax."""
    if not (directory / store.CONFIG).is_file():
        return ""
    try:
        said = store.read_config(directory)
    except InputError:  # of a damaged file; the rows say what they are
        return ""
    found: dict[bool, str] = {}
    for command, own in shipped:
        if own["name"] == said.get("name"):
            same = own == {field: value for field, value in said.items() if field in own}
            found.setdefault(same, command)
    near = f"{found[False]}, another form of it: see its config.json" if False in found else ""
    return found.get(True, near)
