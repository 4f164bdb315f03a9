"""What the scripts for the paper's tables and figures share: the runs they read, and `main`.

A script selects rows of one study, and says what is made of them. Scripts of one study share its
runs, which lie in OUT/CONFIG, so that none is computed twice; what is made of them lies in OUT.
"""

import argparse
import contextlib
import json
import os
import shlex
import signal
import sys
import threading
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from measuring import RESULTS

from madjax import cli, config, report, stopping
from madjax.errors import InputError
from madjax.files import write_atomically

SCALES = ("smoke", "reduced", "paper")
VGG = ("cifar10", "cifar100", "cub200", "caltech256")


@dataclass(frozen=True)
class Study:
    """Configs, by their names for `madjax sweep` or `madjax angle`, at each scale."""

    smoke: tuple[str, ...]
    reduced: tuple[str, ...]
    paper: tuple[str, ...]


def _study(name: str, *, reduced: Sequence[str] = (), paper: Sequence[str]) -> Study:
    """A study of configs/NAME.py; the other functions of that file at each scale, by name."""
    others = (f"{name}:{function}" for function in reduced)
    return Study((f"{name}:smoke",), (name, *others), tuple(paper))


ATTACKS = _study(
    "mnist_attacks",
    reduced=["fashion_mnist", "as_published", "fashion_as_published"],
    paper=["mnist_attacks:paper", *VGG],
)
KNOCKOFF = _study("mnist_knockoff", reduced=["fashion_mnist"], paper=["mnist_knockoff:paper"])
BUDGETS = _study(
    "mnist_budgets",
    reduced=["fashion_mnist"],
    paper=["mnist_budgets:paper", "mnist_budgets:cifar10"],
)
DEFENSES = _study(
    "mnist_defenses",
    reduced=["more_seeds", "fashion_mnist"],
    paper=["mnist_defenses:paper", "mnist_defenses:paper_fashion", "mnist_defenses:cifar10"],
)
SUBVERSION = _study(
    "mnist_subversion", paper=["mnist_subversion:paper", "mnist_subversion:cifar10"]
)
ANGLE = _study(
    "mnist_angle",
    reduced=["fashion_mnist"],
    paper=["mnist_angle:paper", "mnist_angle:cifar10"],
)


def where(wanted: Callable[[dict], bool]) -> Callable[[list[dict]], list[dict]]:
    """The rows of which something holds."""
    return lambda rows: list(filter(wanted, rows))


@dataclass(frozen=True)
class Exhibit:
    """A table or a figure of the paper: its file, its studies, and which of their rows it shows.

    draw makes a figure of these rows (OUT/FILE.png), and table a text (OUT/FILE.md).
    """

    file: str
    title: str
    studies: tuple[Study, ...]
    chosen: Callable[[list[dict]], list[dict]] = list
    draw: Callable[[list[dict]], object] | None = None
    table: Callable[[list[dict]], str] = report.table

    def configs(self, scale: str) -> list[str]:
        """The names of its configs at a scale."""
        return [name for study in self.studies for name in getattr(study, scale)]

    def section(self, scale: str, out: Path) -> report.Section:
        """What was made of it in OUT, for a page."""
        picture, command = out / f"{self.file}.png", f"experiments/{self.file}.py --scale {scale}"
        return report.Section(
            self.title,
            f"python {command}",
            picture.read_bytes() if self.draw else None,
            (out / f"{self.file}.md").read_text(encoding="utf-8"),
        )


def main(*exhibits: Exhibit) -> int:
    """Run what the exhibits read at the scale that the user names, and make them of its rows.

    The exit status is that of the first command which fails, or 0.
    """
    parser = argparse.ArgumentParser(
        description="; ".join(exhibit.title for exhibit in exhibits),
        epilog="Given again, the command goes on where it stopped.",
    )
    parser.add_argument("--scale", choices=SCALES, required=True, help="of data, networks, epochs")
    parser.add_argument("--data-dir", help="where data sets are found (default: $MADJAX_DATA)")
    parser.add_argument("--out", type=Path, metavar="OUT", help="default: runs/SCALE")
    parser.add_argument(
        "--limit",
        type=float,
        metavar="MINUTES",
        help="stop after so long, at the end of the epoch under way; nothing finished is lost",
    )
    parser.add_argument("--quiet", action="store_true", help="print no progress and no tables")
    either = parser.add_mutually_exclusive_group()
    either.add_argument(
        "--runs", nargs="+", metavar="CONFIG", help="of the runs at that scale these alone"
    )
    either.add_argument(
        "--rows", action="store_true", help="run nothing: of the rows that are in OUT already"
    )
    options = parser.parse_args()
    out = options.out or Path("runs") / options.scale
    names = dict.fromkeys(name for each in exhibits for name in each.configs(options.scale))
    asked = names if options.runs is None else dict.fromkeys(options.runs)
    try:
        runs = {} if options.rows else _loaded(asked, names)
    except InputError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    status = _run(runs, options, out)
    if status > 128:
        print(f"stopped: the same command goes on from {out}", file=sys.stderr)
    sections = []
    for exhibit in exhibits:
        try:
            section = _make(exhibit, options.scale, out)
        except InputError as error:
            if not asked.keys().isdisjoint(exhibit.configs(options.scale)):
                print(f"{exhibit.title}: {error}", file=sys.stderr)
                status = status or 2
        else:
            sections.append(section)
    if len(exhibits) > 1 and sections:
        there = _there(names, out)
        title = f"Prediction Poisoning, reproduced: {options.scale} scale"
        of_page = {"title": title, "sections": sections, "costs": costs()}
        report.write_page(out / "report.html", *there, **of_page)
        rows = report.read_rows(*there, of_each_config=True)
        _write(out / "claims.md", report.claims_table(rows))
        _write(out / "runs.md", report.runs_table(*there))
        print(f"what holds, and all on one page: {out / 'claims.md'}, {out / 'report.html'}")
    return status


def _loaded(asked: Iterable[str], names: Iterable[str]) -> dict[str, Any]:
    """The configs that are asked for, all of them before any work; InputError for another."""
    for name in asked:
        if name not in names:
            has = ", ".join(names)
            raise InputError(f"--runs {name} is no run of this script; at this scale it has {has}")
    try:
        return {name: config.load(name) for name in asked}
    except InputError as error:  # such as weights that are not there
        raise InputError(f"{error}; --runs CONFIG... runs those alone that it names") from None


def _run(runs: Mapping[str, Any], options: argparse.Namespace, out: Path) -> int:
    """Each run once, in order; those after one that fails or is stopped are left."""
    given = ["--data-dir", options.data_dir] if options.data_dir else []
    given += ["--quiet"] if options.quiet else []
    try:
        with stopping.by_signal(), ending_after(options.limit):
            for name, chosen in runs.items():
                kind = "angle" if isinstance(chosen, config.AngleStudy) else "sweep"
                words = [kind, name, "--out", str(directory(name, out)), "--resume", *given]
                print(f"madjax {shlex.join(words)}", flush=True)
                if status := cli.main(words):
                    return status
    except stopping.Stopped as stop:  # between two of them
        return 128 + stop.number
    return 0


@contextlib.contextmanager
def ending_after(minutes: float | None) -> Iterator[None]:
    """Inside, SIGTERM comes after so many minutes, at which a run saves its state and stops."""
    timer = threading.Timer(60 * (minutes or 0), os.kill, (os.getpid(), signal.SIGTERM))
    timer.daemon = True
    if minutes is not None:
        timer.start()
    try:
        yield
    finally:
        timer.cancel()


def directory(name: str, out: Path) -> Path:
    """Where the run of a config lies: "mnist_defenses:smoke" in OUT/mnist_defenses-smoke."""
    return out / name.replace(":", "-")


def costs() -> report.Costs:
    """What experiments/bench_mad.py measured of MAD."""
    facts = json.loads((RESULTS / "bench_mad.json").read_text())
    found = {
        (row["network"].lower(), row["num_classes"], row["layers"], row["oracle"]): 1e3
        * row["madjax"]["seconds"]
        for row in facts["rows"]
        if row["network"] == "LeNet"  # a VGG16 of another width has that name too
    }
    source = f"experiments/bench_mad.py on {facts['device']} (commit {facts['commit']})"
    return report.Costs(found, source)


def _there(names: Iterable[str], out: Path) -> list[Path]:
    """The directories of these configs' runs that have rows."""
    runs = [directory(name, out) for name in names]
    return [run for run in runs if (run / "rows.jsonl").is_file()]


def _make(exhibit: Exhibit, scale: str, out: Path) -> report.Section:
    """Write what is made of the rows that are there, say where, and return it for the page."""
    rows = report.read_rows(*_there(exhibit.configs(scale), out))
    rows = exhibit.chosen(rows) if rows else []
    if not rows:
        raise InputError(f"no rows of {', '.join(exhibit.configs(scale))}: run it without --rows")
    text, picture = out / f"{exhibit.file}.md", out / f"{exhibit.file}.png"
    if exhibit.draw is not None:
        report.save_png(exhibit.draw(rows), picture)
    _write(text, exhibit.table(rows))
    section = exhibit.section(scale, out)
    print(f"{exhibit.title}: {text}" + (f", {picture}" if section.picture else ""))
    return section


def _write(path: Path, text: str) -> None:
    write_atomically(path, lambda draft: draft.write_text(text, encoding="utf-8"))
