"""The command line: `madjax sweep`, `plan`, `angle`, `report`, `export` and `cache`."""

import argparse
import importlib.metadata
import os
import sys
import warnings
from collections.abc import Callable
from functools import reduce
from pathlib import Path
from typing import Any

from madjax import config, report, serving, sweep
from madjax.errors import InputError
from madjax.files import check_can_write
from madjax.sweep import cache


def main(arguments: list[str] | None = None) -> int:
    """Run one command. Exit status 0; 2 for bad input, with one line; 130 for an interrupt.

    With --traceback, bad input raises instead: what caused it is above it.
    """
    options = _parser().parse_args(arguments)
    if os.getcwd() not in sys.path:  # where --set finds the user's own modules
        sys.path.append(os.getcwd())
    python, warnings.formatwarning = warnings.formatwarning, _warning
    try:
        options.command(options)
    except (InputError, OSError) as error:
        if options.traceback:
            raise
        print(f"madjax: error: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("madjax: interrupted; nothing finished is lost, go on with --resume", file=sys.stderr)
        return 130
    finally:
        warnings.formatwarning = python
    return 0


def _warning(message: Warning | str, *_: object, **__: object) -> str:
    """A warning as one line, without the place in madjax that gave it."""
    return f"madjax: warning: {message}\n"


def _chosen(options: argparse.Namespace, command: str | None = None) -> tuple[config.Sweep, Path]:
    """The grid of the config with what --set replaces, and the directory of its run.

    command: of `sweep` and `angle` the one that runs it, where it is to be run.
    """
    chosen = reduce(config.override, options.set, config.load(options.config))
    study = isinstance(chosen, config.AngleStudy)
    kind, runs = type(chosen).__name__, "angle" if study else "sweep"
    if command not in (None, runs):
        raise InputError(f"config {options.config!r} is a madjax.{kind}: run it by madjax {runs}")
    return chosen.sweep() if study else chosen, options.out or Path("runs") / chosen.name


def _sweep(options: argparse.Namespace) -> None:
    ways = {"devices_per_cell": options.devices_per_cell, "memory": _memory(options)}
    _run(options, *_chosen(options, "sweep"), **ways)


def _angle(options: argparse.Namespace) -> None:
    _run(options, *_chosen(options, "angle"))


def _plan(options: argparse.Namespace) -> None:
    chosen, out = _chosen(options)
    _split_cpu(chosen, options.devices_per_cell)
    ways = {"data_dir": options.data_dir, "devices_per_cell": options.devices_per_cell}
    machine = _machine(options)
    ways |= {"machine": machine} if machine else {"memory": _memory(options)}
    found = sweep.plan(chosen, out, **ways)
    print(found.as_json() if options.json else found.table())


def _machine(options: argparse.Namespace) -> sweep.Machine | None:
    count, tflops = options.accelerators, options.tflops
    if count is None and tflops is None:
        return None
    if None in (count, tflops, options.memory):
        raise InputError(
            "a plan for another machine takes --accelerators N, --memory GB and --tflops T: give "
            "all three, or neither the first nor the last"
        )
    return sweep.Machine(count, _memory(options), tflops * 1e12)


def _memory(options: argparse.Namespace) -> float | None:
    return None if options.memory is None else options.memory * 1e9


def _split_cpu(chosen: config.Sweep, per_cell: int | None) -> None:
    strengths = max(len(each.strengths) for each in chosen.defenses)
    cells, per_cell = len(chosen.tasks) * strengths * len(chosen.seeds), per_cell or 1
    sweep.split_cpu(cells * per_cell, per_cell)


def _run(
    options: argparse.Namespace,
    chosen: config.Sweep,
    out: Path,
    **ways: Any,
) -> None:
    _split_cpu(chosen, ways.get("devices_per_cell"))
    sweep.run(chosen, out, data_dir=options.data_dir, resume=options.resume, **ways)
    print(report.write_report(out))
    print(f"rows, table and figures: {out}/{', '.join(report.files(out))}")


def _report(options: argparse.Namespace) -> None:
    if options.trace:
        if len(options.directories) > 1:
            raise InputError("--trace is of one run: give one DIR with it")
        report.write_trace(options.directories[0], options.trace)
    print(report.table(report.read_rows(*options.directories)))
    if options.out or len(options.directories) == 1:
        report.write_report(*options.directories, out=options.out)


def _export(options: argparse.Namespace) -> None:
    chosen, out = _chosen(options)
    path = options.file or out / "predict.jaxexport"
    if out.is_dir():  # else there is no run, which is said first
        check_can_write(path)
    platforms = tuple(options.platforms.split(","))
    victim, predict = sweep.defended(
        chosen,
        out,
        strength=options.epsilon,
        task=options.task,
        defense=options.defense,
        seed=options.seed,
        data_dir=options.data_dir,
        any_platform=platforms != ("cpu",),
    )
    serving.export(predict, path, shape=victim.image_shape, platforms=platforms)
    shape = ", ".join(map(str, victim.image_shape))
    print(f"{path}: uint8 images [B, {shape}] -> posteriors, on {', '.join(platforms)}")
    print(f"run it: madjax.load({str(path)!r})(images)")


def _cache(options: argparse.Namespace) -> None:
    where = cache.folder()
    if where is None:
        print(f"{cache.VARIABLE} is empty: nothing is kept")
        return
    if options.prune is not None:
        gone = cache.prune(where, options.prune)
        print(f"{where}: {len(gone)} results removed, {_total(gone)}")
        return
    found = cache.entries(where)
    for entry in found:
        made = entry.made
        if entry.maker:  # decoded images are of any
            made += f" by {entry.maker.get('git_commit')} on {entry.maker.get('device')}"
        size = cache.in_bytes(entry.size)
        print(
            f"{entry.path.stem}  {size}, last used {entry.idle:.0f} days ago, {entry.what}, {made}"
        )
    print(f"{where}: {len(found)} results, {_total(found)}")


def _total(entries: list[cache.Entry]) -> str:
    return cache.in_bytes(sum(entry.size for entry in entries))


def _at_least_zero(what: str) -> Callable[[str], float]:
    """The type of an option that is a number from 0."""
    return _number(what, lambda value: value >= 0, "a number >= 0")


def _above_zero(what: str) -> Callable[[str], float]:
    """The type of an option that is a number above 0, and finite."""
    return _number(what, lambda value: 0 < value < float("inf"), "a number above 0")


def _number(what: str, fits: Callable[[float], bool], wanted: str) -> Callable[[str], float]:
    def read(text: str) -> float:
        value = float(text)
        if not fits(value):
            raise argparse.ArgumentTypeError(f"{text} is not a {what}: give {wanted}")
        return value

    read.__name__ = what  # as argparse calls what is no number
    return read


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="madjax",
        description="Prediction poisoning (MAD): defend prediction APIs against model stealing.",
    )
    version = f"madjax {importlib.metadata.version('madjax')}"
    parser.add_argument("--version", action="version", version=version)
    commands = parser.add_subparsers(required=True, metavar="COMMAND")

    command = commands.add_parser(
        "sweep", help="run a grid of defences, attacks, epsilons and seeds, then report it"
    )
    _name_a_run(command)
    _resume(command)
    _share(command)
    command.set_defaults(command=_sweep)

    command = commands.add_parser(
        "plan", help="what a sweep would do, and how long that takes; nothing is computed"
    )
    _name_a_run(command)
    _share(command)
    command.add_argument("--json", action="store_true", help="as one JSON object")
    command.add_argument(
        "--accelerators",
        type=int,
        metavar="N",
        help="plan for so many accelerators in place of what is here, with --memory and --tflops",
    )
    command.add_argument(
        "--tflops",
        type=_above_zero("rate in TFLOP/s"),
        metavar="T",
        help="that training reaches on each of them, a share of what its maker states",
    )
    command.set_defaults(command=_plan)

    command = commands.add_parser(
        "angle", help="white-box mode: train attackers online and trace the angle of each step"
    )
    _name_a_run(command, default="angle")
    _resume(command)
    command.set_defaults(command=_angle)

    command = commands.add_parser(
        "export", help="write the defended victim of a run to a file that needs no model code"
    )
    _name_a_run(command)
    command.add_argument(
        "--epsilon",
        type=_at_least_zero("strength"),
        required=True,
        help="a strength of the defence: epsilon for MAD",
    )
    for what in ("task", "defense"):
        command.add_argument(
            f"--{what}",
            metavar="LABEL",
            help=f"which {what}, by its label or position, where the config has several",
        )
    command.add_argument(
        "--seed", type=int, help="the surrogate of which seed; default: the run's first"
    )
    command.add_argument(
        "--platforms",
        default=",".join(serving.PLATFORMS),
        metavar="LIST",
        help="what the file runs on: of cpu,cuda,tpu,rocm; default cpu,cuda,tpu; cpu alone is the "
        "faster there",
    )
    command.add_argument("--file", type=Path, metavar="FILE", help="default: DIR/predict.jaxexport")
    command.set_defaults(command=_export)

    command = commands.add_parser("report", help="table and figures from the rows of runs")
    command.add_argument("directories", type=Path, nargs="+", metavar="DIR")
    command.add_argument(
        "--out",
        type=Path,
        metavar="DIR",
        help="where to write it with its figures (default: in a single DIR; of several, nowhere)",
    )
    command.add_argument(
        "--trace",
        type=Path,
        metavar="FILE",
        help="also write every step of the run's online attackers to FILE.npz or FILE.parquet",
    )
    command.set_defaults(command=_report)

    command = commands.add_parser(
        "cache", help=f"what runs share, in ${cache.VARIABLE} or the user's cache directory"
    )
    command.add_argument(
        "--prune",
        type=_at_least_zero("number of days"),
        metavar="DAYS",
        help="remove what was not used for so many days; 0 removes all",
    )
    command.set_defaults(command=_cache)
    for command in commands.choices.values():
        command.add_argument(
            "--traceback", action="store_true", help="show where an error comes from, in full"
        )
    return parser


def _resume(command: argparse.ArgumentParser) -> None:
    command.add_argument(
        "--resume", action="store_true", help="go on with the run in DIR where it stopped"
    )


def _share(command: argparse.ArgumentParser) -> None:
    command.add_argument(
        "--devices-per-cell",
        type=int,
        metavar="N",
        help="let N devices train each network together (default: 1, but for wide networks on an "
        "accelerator as many as let all cells run at once)",
    )
    command.add_argument(
        "--memory",
        type=_above_zero("size in GB"),
        metavar="GB",
        help="that each device may take (default: all it has); images that have no room there stay "
        "on the host and come in parts",
    )


def _name_a_run(command: argparse.ArgumentParser, default: str = "quickstart") -> None:
    """The options by which a run is described and found."""
    command.add_argument(
        "config",
        nargs="?",
        default=default,
        metavar="CONFIG",
        help=f"a config file, or one of {', '.join(config.shipped_configs())}; default {default}; "
        "NAME:FUNCTION is what another function of the file returns",
    )
    command.add_argument(
        "--set",
        action="append",
        default=[],
        metavar="FIELD=VALUE",
        help="replace one field of the config, e.g. defenses.strengths=0,0.5 or "
        "attacks.jbda.budget=500; several go in order, and each must leave a config that can be "
        "followed",
    )
    command.add_argument("--out", type=Path, metavar="DIR", help="default: runs/CONFIG")
    command.add_argument(
        "--data-dir",
        type=Path,
        metavar="DIR",
        help="where bare data set names and TFDS sets are found (default: $MADJAX_DATA)",
    )


if __name__ == "__main__":
    sys.exit(main())
