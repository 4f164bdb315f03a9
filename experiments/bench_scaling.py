"""What a grid costs as it grows: seconds to run and to compile, against cells, epsilons and seeds.

Claim: compiling is the same from 1 cell to 64; a cell of a large grid costs half of a lone one
or less.
Command: python experiments/bench_scaling.py --devices 2 --out OUT
Cost: about 30 minutes on 2 CPU cores, most of it compiling.
On an accelerator (64 cells x 50,000 queries x 30 epochs, goal 25 s to run):
python experiments/bench_scaling.py --curves cells --largest 64 --only-largest --rounds 3
--queryset DATASET --queries 50000 --epochs 30 --out OUT

Each grid is a run of its own: MNIST, LeNet, MAD of the last layer, knockoff. The victim is given,
so that nothing is counted but what a grid makes: answers, stolen models, rows. It grows by epsilons
at one seed, by seeds at one epsilon, or, for `cells`, by as many of both. Compiled programs are
dropped before each grid, and none is found on disk. Grids are run in turns; medians over the
rounds, with the smallest and largest. Compiling is what JAX reports of tracing, of lowering and of
XLA; the rest is running.
"""

import argparse
import math
import os
import tempfile
from pathlib import Path

import jax
import matplotlib.pyplot as plt
import numpy as np
from measuring import markdown, parse, seconds, spread, use_devices, write

from madjax import MAD, Defended, Knockoff, Recipe, Sweep, Task, Trained, sweep

CURVES = {
    "epsilons": lambda cells: (cells, 1),
    "seeds": lambda cells: (1, cells),
    "cells": lambda cells: (math.isqrt(cells), math.isqrt(cells)),
}
"""How many epsilons and seeds a grid of so many cells has."""
DATASET = "embedded:mnist[:1000,:500]"


def grid(options, victim, epsilons, seeds):
    """A sweep of so many epsilons and seeds."""
    recipe = Recipe(epochs=options.epochs)
    return Sweep(
        f"{epsilons} x {seeds}",
        (Task(DATASET, options.queryset, victim=victim),),
        (Defended(MAD(layers="last"), tuple(np.linspace(0, 1.5, epsilons).tolist())),),
        (Knockoff(budget=options.queries, recipe=recipe),),
        seeds=tuple(range(seeds)),
    )


def victim_of(options, folder):
    """The checkpoint of a victim that was trained for an epoch."""
    config = grid(options, Recipe(epochs=1), 1, 1)
    sweep.run(config, folder / "first", data_dir=options.data_dir, log=None)
    (path,) = (folder / "first" / "checkpoints").glob("victim-*")
    return Trained(str(path))


def measured(options, config, folder):
    """Seconds of a grid: to run, to compile; and how many programs that were."""
    jax.clear_caches()
    before = sweep.Compiled.so_far()
    with tempfile.TemporaryDirectory(dir=folder) as out:
        ways = {"data_dir": options.data_dir, "log": None}
        whole = seconds(lambda: sweep.run(config, Path(out, "run"), **ways))
    compiled = sweep.Compiled.so_far().since(before)
    return whole - compiled.seconds, compiled.seconds, compiled.programs


def curves(options, folder):
    """Curve -> cells -> the measurements of each round."""
    victim = victim_of(options, folder)
    counts = [2**i for i in range(options.largest.bit_length())]
    if options.only_largest:
        counts = [options.largest]
    found = {
        name: {n: [] for n in counts if name != "cells" or math.isqrt(n) ** 2 == n}
        for name in options.curves
    }
    for _ in range(options.rounds):
        for name, points in found.items():
            for cells, rounds in points.items():
                config = grid(options, victim, *CURVES[name](cells))
                rounds.append(measured(options, config, folder))
    return found


def facts(found):
    """A line for each point of a curve."""
    results = []
    for name, points in found.items():
        for cells, rounds in points.items():
            running, compiling, programs = zip(*rounds, strict=True)
            results.append(
                {
                    "curve": name,
                    "cells": cells,
                    "running": spread(running),
                    "compiling": spread(compiling),
                    "running_a_cell": spread([each / cells for each in running], 3),
                    "programs": max(programs),
                }
            )
    return results


def table(results):
    """Markdown: a line for each point."""
    lines = []
    for each in results:
        running, compiling, one = (
            f"{each[part][0]:g} s ({each[part][1]:g} to {each[part][2]:g})"
            for part in ("running", "compiling", "running_a_cell")
        )
        share = each["compiling"][0] / (each["compiling"][0] + each["running"][0])
        lines.append(
            (
                f"{each['cells']} by {each['curve']}"
                if each["curve"] != "cells"
                else f"{each['cells']} by both",
                running,
                compiling,
                f"{100 * share:.0f} %",
                one,
                str(each["programs"]),
            )
        )
    head = "cells", "running", "compiling", "its share", "running, a cell", "programs"
    return markdown(head, lines)


def draw(results, path):
    """The curves: running and compiling against cells."""
    figure, axes = plt.subplots(figsize=(6, 4))
    for i, name in enumerate(dict.fromkeys(each["curve"] for each in results)):
        points = [each for each in results if each["curve"] == name]
        for part, style in (("running", "o-"), ("compiling", "s:")):
            middle, low, high = zip(*(each[part] for each in points), strict=True)
            bars = np.subtract(middle, low), np.subtract(high, middle)
            label = f"{part}, by {'both' if name == 'cells' else name}"
            cells = [each["cells"] for each in points]
            axes.errorbar(cells, middle, bars, fmt=style, color=f"C{i}", label=label, capsize=2)
    axes.set(xscale="log", yscale="log", xlabel="cells", ylabel="seconds")
    axes.set_xticks([each["cells"] for each in results], minor=False)
    axes.get_xaxis().set_major_formatter("{x:.0f}")
    axes.legend(fontsize=8)
    figure.tight_layout()
    figure.savefig(path, dpi=150)


def main():
    """Measure the curves, print a table, and write and draw them where --out says."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--curves", nargs="+", choices=CURVES, default=list(CURVES))
    parser.add_argument("--largest", type=int, default=64, help="cells, a power of 2")
    parser.add_argument("--only-largest", action="store_true", help="leave out smaller grids")
    parser.add_argument("--queryset", default="embedded:fashion_mnist[:1000]")
    parser.add_argument("--data-dir", type=Path)
    parser.add_argument("--queries", type=int, default=1000)
    parser.add_argument("--epochs", type=int, default=2)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--devices", type=int, help="CPU devices")
    parser.add_argument("--out", type=Path, help="without suffix: OUT.json, OUT.md and OUT.png")
    options = parse(parser, largest=1, queries=16, epochs=1, rounds=1, curves=["seeds"])
    use_devices(options.devices)
    os.environ["MADJAX_CACHE"] = ""
    with tempfile.TemporaryDirectory() as folder:
        results = facts(curves(options, Path(folder)))
    print(table(results))
    if options.out:
        write(options.out, options, {"results": results}, table(results))
        draw(results, options.out.with_suffix(".png"))


if __name__ == "__main__":
    main()
