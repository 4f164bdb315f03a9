"""What `madjax plan` says against what the run then takes: seconds of each stage, and bytes.

Claim: the plan of a grid is within 30 % of what the grid takes, by the rates of a smaller run on
the same machine (measured 13 % above) and by operations at the rate of that run's victim (27 %
below); a cell takes as many bytes as XLA reserves for its program, within 30 % (5 % below).
Command: python experiments/bench_plan.py --devices 2 --out OUT
Cost: 12 minutes on 2 CPU cores, two thirds of them for compiling.

Two grids of one kind are run, on images of noise: VGG16 of a quarter of its width at 32x32, MAD at
two strengths, knockoff and jbtop3. The first is the smaller by a factor of three in examples and
queries. Seconds are those of the second's stages without what is compiled; bytes are those of the
program of one epoch of its stolen models on one device.
"""

import argparse
import json
import os
import tempfile
from collections import Counter
from functools import partial
from pathlib import Path

import jax
import numpy as np
from measuring import markdown, parse, use_devices, write

from madjax import MAD, MLP, VGG16, Dataset, Defended, Knockoff, Recipe, Sweep, Task, jbtop, sweep
from madjax.attacks import Transfer
from madjax.sweep import load, rates, stages
from madjax.sweep.trial import tried

STAGES = {
    "training": "networks",
    "posteriors": "posteriors",
    "answers": "answers",
    "queries": "transfer sets",
    "stolen": "stolen models",
}
"""The first word of a kind of work, see `madjax.sweep.rates` -> its stage in a plan."""


def noise(name, count, tests, seed):
    """A data set of noise in ten classes."""
    rng = np.random.default_rng(seed)
    x = rng.integers(0, 256, (count + tests, 32, 32, 3), np.uint8)
    y = np.arange(count + tests, dtype=np.int32) % 10
    return Dataset(name, x[:count], y[:count], x[count:], y[count:], tuple("0123456789"))


def grid(name, examples, network):
    """A sweep of so many training images, queries and half as many synthetic ones."""
    recipe = Recipe(epochs=2)
    attack = {"architecture": network, "recipe": recipe}
    return Sweep(
        name,
        (Task(f"victim {examples}", f"queries {examples}", architecture=network, victim=recipe),),
        (Defended(MAD(layers="last"), (0.5, 0.99)),),
        (
            Knockoff(budget=examples, **attack),
            jbtop(budget=examples // 2, seeds=examples // 8, substitute=recipe, **attack),
        ),
    )


def data(examples):
    """The data sets of a grid."""
    made = noise("victim", examples, examples // 2, 0), noise("queries", examples, 1, 1)
    return {f"{each.name} {examples}": each for each in made}


def noted(folder):
    """Seconds and amounts of work in a cache, by kind."""
    took, done = Counter(), Counter()
    for line in (Path(folder) / rates.FILE).read_text().splitlines():
        note = json.loads(line)
        took[note["kind"]] += note["seconds"]
        done[note["kind"]] += note["amount"]
    return took, done


def reserved(config, datasets):
    """Bytes of an epoch's program for one cell: what the plan says, and what XLA takes."""
    opened = sweep.tasks.open_tasks(config.tasks, None, None, datasets)
    cells = {str(i): cell for i, cell in enumerate(sweep.expand(config))}
    group = sweep.work.grouped(cells, config, tried(config, opened))[0]
    mesh = sweep.make_mesh(jax.devices()[:1])
    attack, stolen, n = group.attack, group.parties.stolen, group.attack.budget
    each = opened[config.tasks[0]]
    count, classes = len(each.data.x_test), each.data.num_classes

    def shape(dtype, *sizes):
        return jax.ShapeDtypeStruct(sizes, dtype)

    settings = stolen, attack.recipe, attack.examples(n)
    points = sweep.stack([group.point(group.places[0])], 1)
    state = jax.eval_shape(sweep.over_cells(stages.start, *settings, mesh=mesh), points, None)
    transfer = Transfer(shape(np.int32, 1, n), shape(np.float32, 1, n, classes), shape(np.int32, 1))
    tests = sweep.Tests(
        shape(np.uint8, 1, *each.data.x_test.shape),
        shape(np.int32, 1, count),
        shape(np.float32, 1, count, classes),
    )
    own = shape(np.uint8, 1, *each.sources[attack.source].images.shape)
    program = sweep.over_cells(stages.advance, *settings, mesh=mesh)
    lowered = program.lower((points, transfer, state), (own, tests, np.int32(n)))
    took = lowered.compile().memory_analysis()
    said = load.space(group, opened, mesh).of(1, together=False)
    return said, took.argument_size_in_bytes + took.temp_size_in_bytes


def table(results):
    """Markdown: a line for every stage."""
    lines = []
    for each in results:
        unit = "MB" if each["unit"] == "bytes" else "s"
        said, took = (each[name] / (1e6 if unit == "MB" else 1) for name in ("plan", "run"))
        lines.append(
            (each["what"], f"{said:.1f} {unit}", f"{took:.1f} {unit}", f"{said / took:.2f}")
        )
    return markdown(("what", "plan", "run", "ratio"), lines)


def main():
    """Run a small grid, plan a larger one, run that, and compare."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--examples", type=int, default=3000, help="of the larger grid")
    parser.add_argument("--width", type=float, default=1 / 4, help="of VGG16")
    parser.add_argument("--devices", type=int, help="CPU devices")
    parser.add_argument("--out", type=Path, help="without suffix: OUT.json and OUT.md")
    options = parse(parser, examples=180)
    use_devices(options.devices)
    network = partial(MLP, hidden=(8,)) if options.smoke else partial(VGG16, width=options.width)
    few, many = options.examples // 3, options.examples
    with tempfile.TemporaryDirectory() as folder:
        os.environ["MADJAX_CACHE"] = folder
        first, second = (grid(f"of {n}", n, network) for n in (few, many))
        sweep.run(first, Path(folder, "few"), datasets=data(few))
        took, done = noted(folder)
        (training,) = (kind for kind in took if STAGES[kind.split()[0]] == "networks")
        victim = sweep.tasks.open_tasks(first.tasks, None, None, data(few))[first.tasks[0]].network
        flops = load.learning(victim) * done[training] / took[training]
        mesh = sweep.make_mesh()
        machine = sweep.Machine(mesh.size, sweep.mesh.memory_of(mesh), flops, "cpu", "CPU core")
        where, ways = Path(folder, "many"), {"datasets": data(many)}
        by_rates = sweep.plan(second, where, **ways)
        by_operations = sweep.plan(second, where, **ways, machine=machine)
        sweep.run(second, where, **ways)
        after, _ = noted(folder)
        said, reserves = reserved(second, data(many))
    run = Counter()
    for kind, seconds in (after - took).items():
        run[STAGES[kind.split()[0]]] += seconds
    results = []
    for how, plan in (("rates", by_rates), ("operations", by_operations)):
        found = {stage.name: stage.seconds for stage in plan.stages}
        for name, seconds in (found | {"all": plan.seconds}).items():
            measured = run[name] if name != "all" else run.total()
            results.append(
                {"what": f"{name}, by {how}", "unit": "s", "plan": seconds, "run": measured}
            )
    results.append({"what": "one cell", "unit": "bytes", "plan": said, "run": reserves})
    print(table(results))
    if options.out:
        write(options.out, options, {"flops": flops, "results": results}, table(results))


if __name__ == "__main__":
    main()
