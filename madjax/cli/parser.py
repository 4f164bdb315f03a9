"""What the command line takes."""

import argparse
import importlib.metadata
from collections.abc import Callable
from pathlib import Path

from madjax import config, serving
from madjax.cli import commands
from madjax.sweep import cache


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


def make_parser() -> argparse.ArgumentParser:
    """All commands, each with the function of commands.py that runs it."""
    parser = argparse.ArgumentParser(
        prog="madjax",
        description="Prediction poisoning (MAD): defend prediction APIs against model stealing.",
    )
    version = f"madjax {importlib.metadata.version('madjax')}"
    parser.add_argument("--version", action="version", version=version)
    kinds = parser.add_subparsers(required=True, metavar="COMMAND")

    command = kinds.add_parser(
        "sweep", help="run a grid of defences, attacks, epsilons and seeds, then report it"
    )
    _name_a_run(command)
    _resume(command)
    _distribute(command)
    _share(command)
    _show(command)
    command.set_defaults(command=commands.run_sweep)

    command = kinds.add_parser(
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
    command.set_defaults(command=commands.show_plan)

    command = kinds.add_parser(
        "angle", help="white-box mode: train attackers online and trace the angle of each step"
    )
    _name_a_run(command, default="angle")
    _resume(command)
    _distribute(command)
    _show(command)
    command.set_defaults(command=commands.run_angle)

    command = kinds.add_parser(
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
    command.set_defaults(command=commands.write_export)

    command = kinds.add_parser("status", help="how far runs are, asked from another shell")
    command.add_argument("directories", type=Path, nargs="+", metavar="DIR")
    command.add_argument("--json", action="store_true", help="as one JSON object for each DIR")
    command.set_defaults(command=commands.show_status)

    command = kinds.add_parser("report", help="table and figures from the rows of runs")
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
        help="also write every query of the run's online attackers to FILE.npz or FILE.parquet",
    )
    command.set_defaults(command=commands.show_report)

    command = kinds.add_parser(
        "cache", help=f"what runs share, in ${cache.VARIABLE} or the user's cache directory"
    )
    command.add_argument(
        "--prune",
        type=_at_least_zero("number of days"),
        metavar="DAYS",
        help="remove what was not used for so many days; 0 removes all",
    )
    command.set_defaults(command=commands.show_cache)
    for command in kinds.choices.values():
        command.add_argument(
            "--traceback", action="store_true", help="show where an error comes from, in full"
        )
    return parser


def _resume(command: argparse.ArgumentParser) -> None:
    command.add_argument(
        "--resume", action="store_true", help="go on with the run in DIR where it stopped"
    )


def _show(command: argparse.ArgumentParser) -> None:
    command.add_argument(
        "--quiet",
        action="store_true",
        help="print nothing but warnings and errors; madjax status says how far it is",
    )
    command.add_argument(
        "--tensorboard",
        action="store_true",
        help="write curves of all networks to DIR/tensorboard; takes madjax[tensorboard]",
    )


def _distribute(command: argparse.ArgumentParser) -> None:
    command.add_argument(
        "--distributed",
        action="store_true",
        help="this is one of several processes that run the same command, one a machine, or in "
        "Slurm one a GPU; Slurm, Kubernetes and Cloud TPU say which",
    )
    command.add_argument(
        "--coordinator", metavar="HOST:PORT", help="where the first process is, if nobody says so"
    )
    command.add_argument("--processes", type=int, metavar="N", help="how many there are")
    command.add_argument("--process", type=int, metavar="I", help="which this is, from 0")


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
