"""How far the line search is from the best answer within the budget, and `Ascend` from a bound.

Claim: Algorithm 1's line search towards a vertex leaves much of the angle that its budget allows;
comparing the vertices where the budget ends gets little of it back, ascending gets all of it for up
to 10 classes.
Command: MADJAX_DATA=DIR python experiments/optimum.py --out DIR2     (MNIST, Kassel letters)
         python experiments/optimum.py --embedded                      (without any data files)
Cost: about 10 minutes on 2 CPU cores, of which the victim takes three.

A victim (LeNet, `--epochs` epochs) answers `--queries` images; for last-layer and all-parameter
gradients of one random surrogate, and each budget in L1, under each solver: the mean of H and of
the angle, the share of queries turned past 90 degrees, the mean length |G'y~| / |G'y|, the share of
queries on which H is above the line search's by more than 1e-3, quantiles of the distance from H to
the bound that `report` gives, the largest excess over the ball and off the simplex, and queries a
second of the solver alone (median of `--rounds`, compiled before). Then the same on random
problems, `--problems` for each of several K: half of them with fewer parameters than classes.
Written as `study.jsonl` and two tables.
"""

import argparse
import json
import statistics
from functools import partial
from pathlib import Path

import jax
import jax.numpy as jnp
from measuring import SETS, parse, seconds, source

from madjax import (
    Ascend,
    Classifier,
    LeNet,
    LineSearch,
    Recipe,
    angle,
    extreme_at_budget,
    fit,
    gram,
    l1,
    open_dataset,
)
from madjax.batching import map_chunks

EPSILONS = (0.1, 0.5, 0.99, 1.5)
CLASSES = (3, 4, 5, 6, 10, 100)
SOLVERS = {
    "line_search": LineSearch(),
    "extreme_at_budget": LineSearch(extreme_at_budget),
    "ascend": Ascend(),
}
CHUNK = 100


@partial(jax.jit, static_argnums=0)
def answer(solver, y, m, epsilon):
    """The answers of one solver for queries y [B, K], m [B, K, K]."""
    solve = jax.vmap(partial(solver, epsilon=epsilon))
    return map_chunks(lambda q: solve(*q), (y, m), CHUNK)


@partial(jax.jit, static_argnums=0)
def report(solver, y, m, epsilon):
    """The same, with what the solver says of them."""
    solve = jax.vmap(partial(solver.report, epsilon=epsilon))
    return map_chunks(lambda q: solve(*q), (y, m), CHUNK)


def measure(y, m, epsilon, rounds):
    """The rows of all solvers at one budget."""
    reports = {name: report(solver, y, m, epsilon) for name, solver in SOLVERS.items()}
    line = reports["line_search"][1].deviation
    for name, (y_tilde, info) in reports.items():
        went = partial(answer, SOLVERS[name], y, m, epsilon)
        jax.block_until_ready(went())
        took = [seconds(lambda went=went: jax.block_until_ready(went())) for _ in range(rounds)]
        degrees = jax.jit(jax.vmap(angle))(y_tilde, y, m)
        off = jnp.maximum(jnp.abs(y_tilde.sum(1) - 1).max(), -y_tilde.min())
        gap = jnp.quantile(info.bound - info.deviation, jnp.array([0.5, 0.9, 0.99, 1]))
        yield {
            "solver": name,
            "epsilon": epsilon,
            "mean_h": float(info.deviation.mean()),
            "mean_angle": float(degrees.mean()),
            "past_90": 100 * float((degrees > 90).mean()),
            "mean_length": float(info.length.mean()),
            "better": 100 * float((info.deviation > line + 1e-3).mean()),
            "gap": [round(float(q), 4) for q in gap],
            "defended": 100 * float(info.defended.mean()),
            "excess": float((jax.vmap(l1)(y_tilde, y) - epsilon).max()),
            "off_simplex": float(off),
            "queries_per_second": round(len(y) / statistics.median(took)),
            "queries_per_second_range": [round(len(y) / f(took)) for f in (max, min)],
        }


@partial(jax.jit, static_argnums=(0, 1))
def problems(n, k):
    """Posteriors [n, K] of several confidences, and M of networks whose own posterior is p."""

    def problem(key, sharp, parameters):
        of_g, of_p, of_y = jax.random.split(key, 3)
        g = jax.random.normal(of_g, (k, 4 * k)) * (jnp.arange(4 * k) < parameters)[None]
        p = jax.nn.softmax(0.3 * jax.random.normal(of_p, (k,)))
        g -= (p[:, None] * g).sum(0, keepdims=True)
        y = jax.nn.softmax(sharp * jax.random.normal(of_y, (k,)))
        return y, jnp.matmul(g, g.T, precision="highest")

    sharp = jnp.array([0.5, 3.0, 8.0])[jnp.arange(n) % 3]
    parameters = jnp.where(jnp.arange(n) % 2 == 0, 4 * k, max(k - 2, 2))
    return jax.vmap(problem)(jax.random.split(jax.random.key(k), n), sharp, parameters)


def real_queries(options):
    """Facts, the victim's posteriors of real queries, and Gram matrices by the layers they have."""
    victim_data, query_data = map(open_dataset, SETS[options.sets])
    network = Classifier(LeNet(10), victim_data.family.preprocess, victim_data.image_shape)
    keys = jax.random.split(jax.random.key(0), 3)
    test = (victim_data.x_test, victim_data.y_test)
    recipe = Recipe(epochs=options.epochs, weight_decay=5e-4)
    victim = fit(network, recipe, keys[0], (victim_data.x_train, victim_data.y_train), test)
    drawn = jax.random.permutation(keys[1], len(query_data.x_train))[: options.queries]
    x = jnp.asarray(query_data.x_train)[drawn]
    y = jax.jit(lambda x: map_chunks(partial(network.posterior, victim.params), x, 250))(x)
    surrogate = jax.jit(network.init)(keys[2])
    facts = {"victim_accuracy": round(float(victim.accuracy[-1]), 2), "queries": query_data.name}
    grams = {layers: gram(network.apply, surrogate, x, layers=layers) for layers in ("all", "last")}
    return facts, y, grams


def table(rows):
    """Markdown: the table of real queries, and that of random problems."""
    return "\n".join(part(rows, field) for field in ("layers", "classes"))


def part(rows, field):
    """A line for each value of the field and each budget."""
    rows = [row for row in rows if field in row]
    lines = [
        f"| {field} | epsilon | "
        + " | ".join(f"{name}: H, degrees, past 90°, length, queries/s" for name in SOLVERS)
        + " | H above line search | bound - H: median, 90 %, 99 %, most |",
        "| --- | --: |" + " --: |" * (len(SOLVERS) + 2),
    ]
    for value, epsilon in dict.fromkeys((r[field], r["epsilon"]) for r in rows):
        own = [r for r in rows if (r[field], r["epsilon"]) == (value, epsilon)]
        cells = [
            f"{r['mean_h']:.3f}, {r['mean_angle']:.1f}, {r['past_90']:.0f} %, "
            f"{r['mean_length']:.2f}, {r['queries_per_second']:,}"
            for r in own
        ]
        best = own[-1]
        gaps = ", ".join(f"{gap:.4f}" for gap in best["gap"])
        cells += [f"{best['better']:.0f} %", gaps]
        lines.append(f"| {value} | {epsilon:g} | " + " | ".join(cells) + " |")
    return "\n".join(lines) + "\n"


def main():
    """Train the victim, take both Gram matrices, measure every solver; then random problems."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument(
        "--embedded", dest="sets", action="store_const", const="embedded", default="full"
    )
    parser.add_argument("--epochs", type=int, default=5)
    parser.add_argument("--queries", type=int, default=10_000)
    parser.add_argument("--problems", type=int, default=1000)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--out", type=Path, default=Path("runs/optimum"))
    options = parse(parser, sets="smoke", epochs=1, queries=20, problems=6, rounds=1)
    options.out.mkdir(parents=True, exist_ok=True)
    facts, y, grams = real_queries(options)
    jobs = [(facts | {"layers": layers}, y, m) for layers, m in grams.items()]
    for k in CLASSES:
        few = options.problems if k < 100 else -(-options.problems // 5)
        jobs.append(({"queries": "random problems", "classes": k}, *problems(few, k)))
    rows = []
    with (options.out / "study.jsonl").open("w") as file:
        for facts, y, m in jobs:
            for epsilon in EPSILONS:
                for found in measure(y, m, epsilon, options.rounds):
                    row = facts | {"n": len(y), **source()} | found
                    rows.append(row)
                    file.write(json.dumps(row) + "\n")
                    file.flush()
    (options.out / "report.md").write_text(table(rows))
    print(table(rows))


if __name__ == "__main__":
    main()
