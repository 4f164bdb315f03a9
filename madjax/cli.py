"""The command line: `madjax sweep` and `madjax report`."""

import argparse
import os
import sys
from functools import reduce
from pathlib import Path

from madjax import config, report, sweep
from madjax.errors import InputError


def main(arguments: list[str] | None = None) -> int:
    """Run one command. Exit status 0; 2 for bad input, with one line; 130 for an interrupt."""
    options = _parser().parse_args(arguments)
    if os.getcwd() not in sys.path:  # where --set finds the user's own modules
        sys.path.append(os.getcwd())
    try:
        options.command(options)
    except InputError as error:
        print(f"madjax: error: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("madjax: interrupted; nothing finished is lost, go on with --resume", file=sys.stderr)
        return 130
    return 0


def _sweep(options: argparse.Namespace) -> None:
    chosen = reduce(config.override, options.set, config.load(options.config))
    sweep.split_cpu(len(chosen.epsilons) * len(chosen.seeds))
    out = options.out or Path("runs") / chosen.name
    sweep.run(chosen, out, data_dir=options.data_dir, resume=options.resume)
    print(report.write_report(out))
    print(f"rows, table and figure: {out}/rows.jsonl, report.md, tradeoff.png")


def _report(options: argparse.Namespace) -> None:
    print(report.write_report(options.directory))


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="madjax",
        description="Prediction poisoning (MAD): defend prediction APIs against model stealing.",
    )
    commands = parser.add_subparsers(required=True, metavar="COMMAND")

    command = commands.add_parser("sweep", help="run a grid of epsilons and seeds, then report it")
    command.add_argument(
        "config",
        nargs="?",
        default="quickstart",
        metavar="CONFIG",
        help=f"a config file, or one of {', '.join(config.shipped_configs())}; default quickstart",
    )
    command.add_argument(
        "--set",
        action="append",
        default=[],
        metavar="FIELD=VALUE",
        help="replace one field of the config, e.g. epsilons=0,0.5 or attack.recipe.epochs=5",
    )
    command.add_argument("--out", type=Path, metavar="DIR", help="default: runs/CONFIG")
    command.add_argument(
        "--resume", action="store_true", help="go on with the run in DIR where it stopped"
    )
    command.add_argument(
        "--data-dir",
        type=Path,
        metavar="DIR",
        help="where bare data set names and TFDS sets are found (default: $MADJAX_DATA)",
    )
    command.set_defaults(command=_sweep)

    command = commands.add_parser("report", help="table and figure from the rows of a run")
    command.add_argument("directory", type=Path, metavar="DIR")
    command.set_defaults(command=_report)
    return parser


if __name__ == "__main__":
    sys.exit(main())
