"""How rows came about, beside the paper's protocol, and where the paper and its code disagree."""

import json
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

from madjax import config, store
from madjax.errors import InputError
from madjax.report.found import curves_of, interval, mad, percent, whole
from madjax.report.names import name
from madjax.report.pairs import pairs
from madjax.report.points import is_sound
from madjax.report.readings import undefended
from madjax.report.rows import read_rows


class Protocol(NamedTuple):
    """One thing that an experiment fixes: what the paper has, and what the rows have."""

    what: str
    paper: str
    ours: str


def protocol(rows: list[dict]) -> list[Protocol]:
    """What was done, beside what the paper says that it did."""

    def of(*fields: str, sign: str = " ") -> str:
        said = dict.fromkeys(sign.join(_said(row.get(f)) for f in fields) for row in rows)
        return "; ".join(filter(str.strip, said)) or "not recorded"

    return [
        Protocol(
            "victims",
            "LeNet on MNIST and FashionMNIST; VGG16 on CIFAR10, CIFAR100, CUB200 and Caltech256",
            of("victim", "dataset", sign=" on "),
        ),
        Protocol(
            "their training",
            "SGD, rate 0.1, momentum 0.5; 30 epochs (LeNet) or 100; a tenth of the rate every 50",
            of("victim_optimizer", "victim_learning_rate", "victim_momentum", "victim_epochs")
            + " epochs; the rate drops after "
            + of("victim_decay_epochs"),
        ),
        Protocol(
            "queries of knockoff",
            "MNIST: EMNIST letters; FashionMNIST: EMNIST; CIFAR10 and CIFAR100: each other; CUB200 "
            "and Caltech256: ImageNet",
            of("dataset", "queryset", sign=" from "),
        ),
        Protocol("query budget", "50,000", of("budget")),
        Protocol(
            "training of stolen models",
            "SGD, learning rate 0.1, momentum 0.5; 30 epochs (LeNet) or 100",
            of("optimizer", "learning_rate", "momentum", "epochs") + " epochs",
        ),
        Protocol("gradients G", "of all parameters (Eq. 5)", of("layers")),
        Protocol("surrogate", "random parameters", of("surrogate")),
        Protocol("seeds", "not said", of("seed")),
        Protocol(
            "accuracy of stolen models",
            "of which epoch is not said",
            "of the last; the best beside",
        ),
    ]


def _said(value) -> str:
    if value is None or value == "none":
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
    for pair in pairs(list(filter(is_sound, rows))):
        if pair.curve.layers == "all" and pair.curve.oracle == "extreme" and pair.strength >= 0.9:
            yield _beside(pair, "all parameters")


def _unnormalised(rows: list[dict]) -> Iterable[str]:
    for pair in pairs(list(filter(is_sound, rows))):
        if pair.curve.oracle == "extreme_unnormalised":
            yield _beside(pair, "un-normalised, all parameters")


def _beside(pair, said: str) -> str:
    return (
        f"{said}: {interval(pair.difference)} points for the attacker beside the last layer at "
        f"epsilon {pair.strength:g} ({name(pair.curve.dataset)}, n = {pair.difference.n})"
    )


def _epochs(rows: list[dict]) -> Iterable[str]:
    own = whole(list(filter(is_sound, rows)))
    for dataset in dict.fromkeys(row["dataset"] for row in own):
        curves = curves_of([row for row in own if row["dataset"] == dataset])
        curve = mad(curves)
        for point in curves.get(curve, []):
            if 0.9 <= point.strength < 1:
                yield (
                    f"last {percent(point.attacker_accuracy)}, best "
                    f"{percent(point.attacker_accuracy_best)} at epsilon {point.strength:g} "
                    f"({name(dataset)}, n = {point.n})"
                )


def _as_published(rows: list[dict]) -> Iterable[str]:
    for dataset in dict.fromkeys(row["dataset"] for row in rows):
        for attack in ("jbda", "jbself", "jbtop3"):
            own = [r for r in rows if (r["dataset"], r["attack"]) == (dataset, attack)]
            code = [r | {"variant": ""} for r in own if r["variant"]]
            plain = [r for r in own if not r["variant"]]
            both = [undefended(attack)(each) for each in (code, plain) if each]
            if len(both) == 2 and all(both):
                yield (
                    f"{attack}: {both[0].ours} with the defects, {both[1].ours} without "
                    f"({name(dataset)}, n = {both[0].n} and {both[1].n})"
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
        "as published; the code's with as_published_code=True",
        _as_published,
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
        "the paper's",
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
    """Where numbers come from: the rows of one directory."""

    directory: str
    config: str
    command: str
    cells: int
    seeds: str
    commits: str
    devices: str
    versions: str


def runs(*directories: str | Path) -> list[Run]:
    """The provenance of the rows in each directory."""
    return [_run(Path(directory)) for directory in directories]


def _run(directory: Path) -> Run:
    rows = read_rows(directory)

    def each(values: Iterable) -> str:
        return ", ".join(dict.fromkeys(str(value) for value in values if value))

    return Run(
        directory.name,
        each(row.get("config") for row in rows),
        _command(directory),
        len(rows),
        each(str(seed) for seed in sorted({row["seed"] for row in rows})),
        each(row.get("git_commit") for row in rows),
        each(row.get("device") for row in rows),
        each(f"JAX {row['versions']['jax']}" for row in rows if "versions" in row),
    )


def _command(directory: Path) -> str:
    """The command that makes the rows, where their config is one that comes with madjax."""
    if not (directory / store.CONFIG).is_file():
        return ""
    try:
        said = store.read_config(directory)
    except InputError:  # of a damaged file; the rows say what they are
        return ""
    found: dict[bool, str] = {}
    for form in config.forms():
        try:
            chosen = config.load(form)
        except InputError:  # such as weights that are not there
            continue
        study = isinstance(chosen, config.AngleStudy)
        chosen = chosen.sweep() if study else chosen
        if chosen.name == said.get("name"):
            own = json.loads(json.dumps(config.describe(chosen)))  # as a file has it
            same = own == {field: value for field, value in said.items() if field in own}
            found[same] = found.get(same, f"madjax {'angle' if study else 'sweep'} {form}")
    near = f"{found[False]}, another form of it: see its config.json" if False in found else ""
    return found.get(True, near)
