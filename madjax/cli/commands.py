"""What each command does with its options."""

import argparse
from functools import reduce
from pathlib import Path
from typing import Any

from madjax import config, processes, report, serving, stopping, sweep
from madjax.errors import InputError
from madjax.files import check_can_write
from madjax.sweep import cache
from madjax.tensorboard import TensorBoard


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


def run_sweep(options: argparse.Namespace) -> None:
    """Run a grid, and report it."""
    _connect(options)
    ways = {"devices_per_cell": options.devices_per_cell, "memory": _memory(options)}
    _run(options, *_chosen(options, "sweep"), **ways)


def run_angle(options: argparse.Namespace) -> None:
    """Run a white-box study, and report it."""
    _connect(options)
    _run(options, *_chosen(options, "angle"))


def _connect(options: argparse.Namespace) -> None:
    """Before the config is read, which may compute something."""
    where = options.coordinator, options.processes, options.process
    if options.distributed:
        processes.connect(*where)
    elif any(each is not None for each in where):
        raise InputError(
            "--coordinator, --processes and --process are of several processes: add --distributed, "
            "or leave them out"
        )


def show_plan(options: argparse.Namespace) -> None:
    """Print what a run would do."""
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
    ways |= {"data_dir": options.data_dir, "resume": options.resume}
    ways |= {"log": None} if options.quiet else {}
    if options.tensorboard:
        board = processes.by_first(TensorBoard)(out)
        ways |= {"on_epoch": board.on_epoch, "on_row": board.on_row}
    with stopping.by_signal():
        sweep.run(chosen, out, **ways)
    table = processes.by_first(report.write_report)(out)
    if processes.is_first() and not options.quiet:
        print(table)
        print(f"rows, table and figures: {out}/{', '.join(report.files(out))}")


def show_status(options: argparse.Namespace) -> None:
    """Print what runs are at."""
    found = [sweep.status(directory) for directory in options.directories]
    print("\n\n".join(each.as_json() if options.json else each.text() for each in found))


def show_report(options: argparse.Namespace) -> None:
    """Print the table of runs, and write it with its figures."""
    if options.trace:
        if len(options.directories) > 1:
            raise InputError("--trace is of one run: give one DIR with it")
        report.write_trace(options.directories[0], options.trace)
    print(report.table(report.read_rows(*options.directories)))
    if options.out or len(options.directories) == 1:
        report.write_report(*options.directories, out=options.out)


def write_export(options: argparse.Namespace) -> None:
    """Write the defended victim of a run to a file."""
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


def show_cache(options: argparse.Namespace) -> None:
    """List what runs share, or remove what was not used for a while."""
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
