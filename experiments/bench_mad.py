"""Seconds a query and memory of MAD, against a plain PyTorch version of the authors' procedure.

Claim: on the same CPU the exact defence is 3 to 1,300 times faster than one backward pass a class
and a loop over candidate answers with the Jacobian in memory, and no K x D array is in its memory.
Command: pip install -e ".[bench]" && python experiments/bench_mad.py --out OUT
Cost: about 15 minutes on 2 CPU cores, most of it PyTorch's VGG16 rows (`--quick` leaves them out).
Where PyTorch is not installed, or with `--no-torch`, only madjax is measured. JAX takes a GPU where
there is one, PyTorch's side always the CPU: ratios are for machines without a GPU.

Both sides get equal random weights' distributions, random images and random posteriors, and give
the answers to the same budget, L1 0.5. PyTorch works as the authors' code does: batch 1, G from K
backward passes, H of every candidate from G in memory (two products with G), candidates in a Python
loop: K vertices, or for MAD-argmax all 2^(K-1) subsets for K <= 10 and the greedy of at most 1,024
candidates above. The victim's forward pass is left out on both sides; the surrogate's is in. madjax
answers `queries` at a time. Each side of a row has a process of its own and they take turns, one
measurement each, so that a busy machine slows both; medians over the rounds, and the median of the
ratios within a round. Compilation is timed apart. Peak memory is that of the whole process, with
its libraries.
"""

import argparse
import json
import multiprocessing
import resource
import statistics
import time
from dataclasses import asdict, dataclass
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
from measuring import HAS_TORCH, parse, seconds, write

from madjax import LeNet, LineSearch, argmax_preserving, extreme, perturb
from madjax.models import VGG16

EPSILON = 0.5


@dataclass(frozen=True)
class Row:
    """One line of the table."""

    network: str
    num_classes: int
    layers: str
    oracle: str
    queries: int
    """How many madjax answers in one call."""
    rounds: int = 5
    torch_queries: int = 20
    """How many PyTorch answers in one round; 0 where it cannot."""


ROWS = (
    Row("LeNet", 10, "last", "extreme", 2048, torch_queries=100),
    Row("LeNet", 10, "last", "argmax_preserving", 2048, torch_queries=10),
    Row("LeNet", 10, "all", "extreme", 512),
    Row("LeNet", 10, "all", "argmax_preserving", 512, torch_queries=1),
    Row("VGG16", 10, "last", "extreme", 32),
    Row("VGG16", 10, "last", "argmax_preserving", 32, torch_queries=3),
    Row("VGG16", 10, "all", "extreme", 16, torch_queries=1),
    Row("VGG16", 10, "all", "argmax_preserving", 16, rounds=1, torch_queries=1),
    Row("VGG16", 100, "last", "extreme", 32, torch_queries=3),
    Row("VGG16", 100, "last", "argmax_preserving", 32, torch_queries=1),
    Row("VGG16", 100, "all", "extreme", 2, rounds=2, torch_queries=1),
    Row("VGG16", 100, "all", "argmax_preserving", 2, rounds=3, torch_queries=0),
)
SMOKE = (Row("LeNet", 2, "last", "extreme", 4, rounds=1, torch_queries=1),)
ORACLES = {"extreme": extreme, "argmax_preserving": argmax_preserving}
SHAPES = {"LeNet": (28, 28, 1), "VGG16": (32, 32, 3), "VGG16 at 224": (224, 224, 3)}


def network(row):
    """The madjax module of a row."""
    if row.network == "LeNet":
        return LeNet(row.num_classes)
    return VGG16(row.num_classes, (4096, 4096) if row.network == "VGG16 at 224" else ())


def madjax_side(row, memory=None):
    """A function that answers `row.queries` queries, and how many that is."""
    module = network(row)
    keys = jax.random.split(jax.random.key(0), 3)
    x = jax.random.normal(keys[0], (row.queries, *SHAPES[row.network]))
    params = jax.jit(module.init)(keys[1], x[:1])
    y = jax.nn.softmax(3 * jax.random.normal(keys[2], (row.queries, row.num_classes)))

    def run():
        answers = perturb(
            module.apply,
            params,
            x,
            y,
            epsilon=EPSILON,
            layers=row.layers,
            solver=LineSearch(ORACLES[row.oracle]),
            memory=memory,
        )
        jax.block_until_ready(answers)
        return {}

    return run, row.queries


def torch_side(row):
    """The same in PyTorch, query by query; the time of G and of the oracle apart."""
    import torch
    from torch import nn

    torch.set_num_threads(2)
    torch.manual_seed(0)
    k = row.num_classes
    if row.network == "LeNet":
        stack = [nn.Conv2d(1, 20, 5), nn.ReLU(), nn.MaxPool2d(2)]
        stack += [nn.Conv2d(20, 50, 5), nn.ReLU(), nn.MaxPool2d(2), nn.Flatten()]
        stack += [nn.Linear(800, 500), nn.ReLU(), nn.Linear(500, k)]
    else:
        stack, channels = [], 3
        for block in ((64,) * 2, (128,) * 2, (256,) * 3, (512,) * 3, (512,) * 3):
            for features in block:
                stack += [nn.Conv2d(channels, features, 3, padding=1)]
                stack += [nn.BatchNorm2d(features), nn.ReLU()]
                channels = features
            stack.append(nn.MaxPool2d(2))
        stack += [nn.Flatten(), nn.Linear(512, k)]
    net = nn.Sequential(*stack).eval()
    weights = list(net.parameters()) if row.layers == "all" else [net[-1].weight]
    h, w, c = SHAPES[row.network]

    def jacobian(x):
        log_p = torch.log_softmax(net(x), dim=-1)[0]
        rows = []
        for i in range(k):
            g = torch.autograd.grad(log_p[i], weights, retain_graph=i < k - 1)
            rows.append(torch.cat([part.flatten() for part in g]))
        return torch.stack(rows)

    def objective(g, y_tilde, y):
        a, u = g.T @ y_tilde, g.T @ y
        return float(((a / a.norm() - u / u.norm()) ** 2).sum())

    def vertex(members):
        v = torch.zeros(k)
        v[list(members)] = 1
        return v / v.sum()

    def best(g, y):
        top = int(y.argmax())
        others = [i for i in range(k) if i != top]
        if row.oracle == "extreme":
            candidates = [(i,) for i in range(k)]
        elif k <= 10:
            candidates = [
                (top, *(o for j, o in enumerate(others) if code >> j & 1))
                for code in range(2 ** (k - 1))
            ]
        else:
            return greedy(g, y, top, others)
        return vertex(max(candidates, key=lambda s: objective(g, vertex(s), y)))

    def greedy(g, y, top, others):
        members, kept, found, seen = (top,), None, -1.0, 0
        while others and seen < 1024:
            values = {o: objective(g, vertex((*members, o)), y) for o in others}
            seen += len(values)
            o = max(values, key=values.get)
            members = (*members, o)
            others.remove(o)
            if values[o] > found:
                kept, found = members, values[o]
        return vertex(kept)

    def run():
        apart = {"jacobian": 0.0, "oracle": 0.0}
        for _ in range(row.torch_queries):
            x, y = torch.randn(1, c, h, w), torch.softmax(3 * torch.randn(k), 0)
            began = time.perf_counter()
            g = jacobian(x)
            middle = time.perf_counter()
            y_star = best(g, y)
            step = torch.clamp(EPSILON / (y - y_star).abs().sum(), max=1)
            (1 - step) * y + step * y_star
            apart["jacobian"] += middle - began
            apart["oracle"] += time.perf_counter() - middle
        return apart

    return run, row.torch_queries


SIDES = {"madjax": madjax_side, "torch": torch_side}


def serve(side, row, connection):
    """A process: set up, warm up, then one measurement for every request."""
    run, queries = SIDES[side](row)
    began = time.perf_counter()
    if side == "madjax" or row.rounds > 2:
        run()  # PyTorch has nothing to compile: its slowest rows go without
    first = time.perf_counter() - began
    connection.send(first)
    while connection.recv():
        began = time.perf_counter()
        apart = run()
        took = time.perf_counter() - began
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1e6
        connection.send((took / queries, {k: v / queries for k, v in apart.items()}, peak))


def measure(row, torch_too):
    """One row of the results."""
    context = multiprocessing.get_context("spawn")
    sides = ("madjax", "torch") if torch_too and row.torch_queries else ("madjax",)
    ends, processes = {}, []
    for side in sides:
        ends[side], other = context.Pipe()
        processes.append(context.Process(target=serve, args=(side, row, other), daemon=True))
        processes[-1].start()
    first = {side: end.recv() for side, end in ends.items()}
    samples = {side: [] for side in sides}
    for _ in range(row.rounds):
        for side, end in ends.items():
            end.send(True)
            samples[side].append(end.recv())
    for end in ends.values():
        end.send(False)
    for process in processes:
        process.join()
    result = asdict(row) | {"first_call_seconds": round(first["madjax"], 2)}
    for side, values in samples.items():
        took = [value[0] for value in values]
        result[side] = {
            "seconds": statistics.median(took),
            "min": min(took),
            "max": max(took),
            "peak_gb": round(max(value[2] for value in values), 2),
        }
        for part in values[0][1]:
            result[side][part] = statistics.median(value[1][part] for value in values)
    if "torch" in samples:
        pairs = zip(samples["torch"], samples["madjax"], strict=True)
        ratios = [torch[0] / ours[0] for torch, ours in pairs]
        result |= {"ratio": statistics.median(ratios), "ratio_min": min(ratios)}
        result["ratio_max"] = max(ratios)
    return result


def timed(run, rounds=5):
    """The median time of a call, after one that compiles."""
    jax.block_until_ready(run())
    return statistics.median(seconds(lambda: jax.block_until_ready(run())) for _ in range(rounds))


def curves(n, classes, widths, budgets):
    """Seconds a query against K, against D and against the number of budgets, LeNet, all layers.

    n queries at a time; classes, widths, budgets: the K, multiples of LeNet's width, and counts.
    """
    found = {}

    def problem(k, width):
        module = LeNet(k, width=width)
        keys = jax.random.split(jax.random.key(k + width), 3)
        x = jax.random.normal(keys[0], (n, 28, 28, 1))
        params = jax.jit(module.init)(keys[1], x[:1])
        y = jax.nn.softmax(3 * jax.random.normal(keys[2], (n, k)))
        return module, params, x, y

    def once(k, width, oracle, epsilons=EPSILON):
        module, params, x, y = problem(k, width)
        options = {"epsilon": jnp.asarray(epsilons), "solver": LineSearch(ORACLES[oracle])}
        return lambda: perturb(module.apply, params, x, y, **options)

    for oracle in ORACLES:
        found[f"classes, {oracle}"] = [
            {"x": k, "seconds": timed(once(k, 1, oracle)) / n} for k in classes
        ]
    found["parameters"] = [
        {
            "x": sum(a.size for a in jax.tree.leaves(problem(10, width)[1])),
            "seconds": timed(once(10, width, "extreme")) / n,
        }
        for width in widths
    ]
    # In turns, for a ratio that noise does not make.
    grids = {count: once(10, 1, "extreme", np.linspace(0, 2, count)) for count in budgets}
    rounds = [{count: timed(run, 1) for count, run in grids.items()} for _ in range(7)]
    found["epsilons"] = [
        {
            "x": count,
            "seconds": statistics.median(each[count] for each in rounds) / n,
            "ratio_to_one": statistics.median(each[count] / each[budgets[0]] for each in rounds),
        }
        for count in grids
    ]
    return found


def largest():
    """One query of VGG16 at 224x224 with 256 classes and all its 135 million parameters."""
    row = Row("VGG16 at 224", 256, "all", "extreme", 1)
    run, _ = madjax_side(row, memory=12 * 10**9)
    first, second = (seconds(run) for _ in range(2))
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1e6
    return {"first_call_seconds": first, "seconds": second, "peak_gb": round(peak, 2)}


def describe(result):
    """A line of the table."""
    torch = result.get("torch")
    line = (
        f"{result['network']:6} K={result['num_classes']:<4} {result['layers']:5} "
        f"{result['oracle']:18} {result['madjax']['seconds']:10.6f} s "
        f"{result['madjax']['peak_gb']:5.2f} GB"
    )
    if torch:
        line += (
            f"   PyTorch {torch['seconds']:9.4f} s {torch['peak_gb']:5.2f} GB   ratio "
            f"{result['ratio']:.1f} ({result['ratio_min']:.1f}-{result['ratio_max']:.1f})"
        )
    return line


def readable(value):
    """Seconds in three digits with a unit."""
    for factor, unit in ((1, "s"), (1e3, "ms"), (1e6, "µs")):
        if value * factor >= 1:
            return f"{value * factor:.3g} {unit}"
    return f"{value * 1e6:.2g} µs"


def table(rows):
    """The table of README."""
    lines = [
        "| network, K, gradients, oracle | madjax | peak | PyTorch, one by one | peak | ratio |",
        "| --- | --: | --: | --: | --: | --: |",
    ]
    for r in rows:
        name = f"{r['network']}, {r['num_classes']}, {r['layers']}, {r['oracle']}"
        ours = f"{readable(r['madjax']['seconds'])} | {r['madjax']['peak_gb']} GB"
        theirs = "not run | |"
        if "torch" in r:
            middle, low, high = (
                f"{r[name]:.{0 if r[name] >= 100 else 1}f}"
                for name in ("ratio", "ratio_min", "ratio_max")
            )
            theirs = f"{readable(r['torch']['seconds'])} | {r['torch']['peak_gb']} GB | "
            theirs += middle if r["rounds"] == 1 else f"{middle} ({low} to {high})"
        lines.append(f"| {name} | {ours} | {theirs} |")
    return "\n".join(lines)


def figure(curves, path):
    """The curves: seconds a query against K, D and the number of budgets."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    fig, axes = plt.subplots(1, 3, figsize=(10, 3.2), layout="constrained")
    groups = (
        ("classes K", [n for n in curves if n.startswith("classes")]),
        ("parameters D", ["parameters"]),
        ("budgets in one call", ["epsilons"]),
    )
    for axis, (label, names) in zip(axes, groups, strict=True):
        for name in names:
            x, y = zip(*((p["x"], 1e3 * p["seconds"]) for p in curves[name]), strict=True)
            axis.plot(x, y, marker="o", label=name.partition(", ")[2] or None)
            axis.set(xscale="log", xlabel=label, ylabel="ms a query", ylim=(0, 1.1 * max(y)))
            axis.set_xticks(x, [f"{v / 1e6:.1f}M" if v > 1e5 else str(v) for v in x])
        axis.minorticks_off()
    axes[0].set(yscale="log", ylim=(0.1, 100))
    axes[0].legend()
    fig.suptitle("LeNet, all parameters")
    fig.savefig(path, dpi=150)


def main():
    """Measure, print, and write what was asked for as JSON where --out says."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="LeNet's rows alone")
    parser.add_argument("--no-torch", action="store_true")
    parser.add_argument("--no-curves", action="store_true")
    parser.add_argument("--largest", action="store_true", help="VGG16 at 224, K = 256: 5 minutes")
    parser.add_argument("--out", type=Path, help="without suffix: OUT.json, OUT.md, OUT.png")
    parser.add_argument("--redraw", action="store_true", help="table and figure of --out alone")
    options = parse(parser)
    if options.redraw:
        facts = json.loads(options.out.with_suffix(".json").read_text())
        options.out.with_suffix(".md").write_text(table(facts["rows"]) + "\n")
        figure(facts["curves"], options.out.with_suffix(".png"))
        return
    torch_too = HAS_TORCH and not options.no_torch
    facts = {"epsilon": EPSILON, "rows": []}
    for row in SMOKE if options.smoke else ROWS:
        if options.quick and row.network != "LeNet":
            continue
        facts["rows"].append(measure(row, torch_too))
        print(describe(facts["rows"][-1]), flush=True)
    # From here on this process takes the device, which before its workers had.
    if not options.no_curves:
        sizes = (128, (2, 5, 10, 16, 30, 100), (1, 2, 4), (1, 21, 101))
        facts["curves"] = curves(*((2, (3,), (1,), (1, 3)) if options.smoke else sizes))
        print(json.dumps(facts["curves"], indent=1))
    if options.largest:
        facts["largest"] = largest()
        print(facts["largest"])
    print(table(facts["rows"]))
    if options.out:
        write(options.out, options, facts, table(facts["rows"]))
        if "curves" in facts:
            figure(facts["curves"], options.out.with_suffix(".png"))


if __name__ == "__main__":
    main()
