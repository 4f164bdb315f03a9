"""How far the line search is from the best answer within the budget, on real queries.

Claim: Algorithm 1's line search towards a vertex leaves much of the angle that its budget allows;
comparing the vertices where the budget ends gets little of it back, ascending in all K dimensions
most.
Command: MADJAX_DATA=DIR python experiments/optimum.py --out DIR2     (MNIST, Kassel letters)
         python experiments/optimum.py --embedded                      (without any data files)
Cost: about 8 minutes on 2 CPU cores, of which the victim takes three.

A victim (LeNet, `--epochs` epochs) answers `--queries` images; for last-layer and all-parameter
gradients of one random surrogate, and each budget, the mean of H and of the angle under each
method, the share of queries turned past 90 degrees, the largest excess over the ball and off the
simplex, and queries a second of the solver alone (median of `--rounds`, compiled before). Written
as `study.jsonl` and a table.
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
    Classifier,
    LeNet,
    Recipe,
    angle,
    extreme,
    extreme_at_budget,
    fit,
    gram,
    l1,
    open_dataset,
    solution,
)
from madjax.batching import map_chunks

EPSILONS = (0.1, 0.5, 0.99, 1.5)
METHODS = {
    "line_search": {"oracle": extreme},
    "extreme_at_budget": {"oracle": extreme_at_budget},
    "ascend": {"method": "ascend"},
}


@partial(jax.jit, static_argnames="name")
def answer(name, y, m, epsilon):
    """The solutions of one method for queries y [B, K], m [B, K, K]."""
    solver = partial(solution, epsilon=epsilon, **METHODS[name])
    return map_chunks(jax.vmap(lambda q: solver(*q)), (y, m), 1000)


def measure(name, y, m, epsilon, rounds):
    """The row of one method at one budget."""
    found = jax.block_until_ready(answer(name, y, m, epsilon))
    took = [
        seconds(lambda: jax.block_until_ready(answer(name, y, m, epsilon))) for _ in range(rounds)
    ]
    degrees = jax.jit(jax.vmap(angle))(found.y_tilde, y, m)
    off = jnp.maximum(jnp.abs(found.y_tilde.sum(1) - 1).max(), -found.y_tilde.min())
    return {
        "method": name,
        "epsilon": epsilon,
        "mean_h": float(found.value.mean()),
        "mean_angle": float(degrees.mean()),
        "past_90": 100 * float((degrees > 90).mean()),
        "excess": float((jax.vmap(l1)(found.y_tilde, y) - epsilon).max()),
        "off_simplex": float(off),
        "queries_per_second": round(len(y) / statistics.median(took)),
        "queries_per_second_range": [round(len(y) / f(took)) for f in (max, min)],
    }


def table(rows):
    """Markdown: a line for each gradient and budget."""
    lines = [
        "| gradients | epsilon | "
        + " | ".join(f"{name}: H, degrees, past 90°, queries/s" for name in METHODS)
        + " |",
        "| --- | --: |" + " --: |" * len(METHODS),
    ]
    for layers, epsilon in dict.fromkeys((r["layers"], r["epsilon"]) for r in rows):
        cells = [
            f"{r['mean_h']:.3f}, {r['mean_angle']:.1f}, {r['past_90']:.0f} %, "
            f"{r['queries_per_second']:,}"
            for r in rows
            if (r["layers"], r["epsilon"]) == (layers, epsilon)
        ]
        lines.append(f"| {layers} | {epsilon:g} | " + " | ".join(cells) + " |")
    return "\n".join(lines) + "\n"


def main():
    """Train the victim, take both Gram matrices, measure every method."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument(
        "--embedded", dest="sets", action="store_const", const="embedded", default="full"
    )
    parser.add_argument("--epochs", type=int, default=5)
    parser.add_argument("--queries", type=int, default=10_000)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--out", type=Path, default=Path("runs/optimum"))
    options = parse(parser, sets="smoke", epochs=1, queries=20, rounds=1)
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
    facts = {
        "victim_accuracy": round(float(victim.accuracy[-1]), 2),
        "queries": query_data.name,
        "n": len(x),
        **source(),
    }
    options.out.mkdir(parents=True, exist_ok=True)
    rows = []
    with (options.out / "study.jsonl").open("w") as file:
        for layers in ("all", "last"):
            m = gram(network.apply, surrogate, x, layers=layers)
            for epsilon in EPSILONS:
                for name in METHODS:
                    row = facts | {"layers": layers} | measure(name, y, m, epsilon, options.rounds)
                    rows.append(row)
                    file.write(json.dumps(row) + "\n")
                    file.flush()
    (options.out / "report.md").write_text(table(rows))
    print(table(rows))


if __name__ == "__main__":
    main()
