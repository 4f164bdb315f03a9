"""Where a training step of one attacker spends its time, beside PyTorch's: LeNet, batch 64.

Claim: most of a step (measured: 70 %) is its matrix products, as long as these are XLA's.
Command: pip install -e ".[bench]" && python experiments/bench_step.py --out OUT
Cost: about 2 minutes on 2 CPU cores.

Each line does what the one above does, and more; the last is an epoch as attackers are trained. The
products are those of the compiled step, of equal shapes, alone in a loop. Variants run in turns, on
one device with all cores, PyTorch with as many threads; medians over the rounds, with the smallest
and largest, in milliseconds a step.
"""

import argparse
from functools import partial
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import optax
from bench_training import lenet
from jax import lax
from measuring import HAS_TORCH, in_turns, markdown, parse, spread, write

from madjax import Classifier, LeNet, Recipe
from madjax.batching import nested
from madjax.datasets import MNIST_FAMILY
from madjax.recipe import cross_entropy
from madjax.train import one_pass, start

RECIPE = Recipe(epochs=1, learning_rate=0.01)
BATCH = RECIPE.batch_size
NETWORK = Classifier(LeNet(10), MNIST_FAMILY.preprocess, (28, 28, 1))


def products(jaxpr):
    """The matrix products of a program: shapes of both sides, and which axes meet."""
    return [
        (tuple(each.aval.shape for each in equation.invars), equation.params["dimension_numbers"])
        for program in nested(jaxpr)
        for equation in program.eqns
        if equation.primitive.name == "dot_general"
    ]


def loss(params, images, targets):
    """Of a batch of images that are tensors already."""
    logits = NETWORK.module.apply(params, images)
    return cross_entropy(logits, targets).mean()


def in_a_loop(body, carry, steps):
    """Calls a compiled loop of so many steps; body(i, carry) -> carry."""
    run = jax.jit(lambda carry: lax.fori_loop(0, steps, body, carry))
    return (lambda: jax.block_until_ready(run(carry))), steps


def touched(tree):
    """A number that takes every array of a tree to be there, and nothing of what is in them."""
    return sum(leaf.ravel()[0] for leaf in jax.tree.leaves(lax.optimization_barrier(tree)))


def ours(x, y, steps):
    """The parts of a step in JAX: name -> (run, steps)."""
    params = jax.jit(NETWORK.init)(jax.random.key(0))
    images = NETWORK.preprocess(x[: steps * BATCH]).reshape(steps, BATCH, *x.shape[1:])
    targets = y[: steps * BATCH].reshape(steps, BATCH, -1)
    gradient = jax.value_and_grad(loss)
    dots = products(jax.make_jaxpr(gradient)(params, images[0], targets[0]).jaxpr)
    rng = np.random.default_rng(0)
    sides = [
        tuple(jnp.asarray(rng.normal(size=of), jnp.float32) for of in shapes) for shapes, _ in dots
    ]

    def multiplied(_, total):
        for (_, axes), both in zip(dots, sides, strict=True):
            left, right, total = lax.optimization_barrier((*both, total))  # else it is done once
            total += 1e-9 * touched(lax.dot_general(left, right, axes))
        return total

    def forward(i, total):
        return total + touched(NETWORK.module.apply(params, images[i]))

    def backward(i, total):
        return total + touched(gradient(params, images[i], targets[i]))

    optimizer = RECIPE.transformation(steps * BATCH)

    def step(i, carry):
        params, state = carry
        _, found = gradient(params, images[i], targets[i])
        updates, state = optimizer.update(found, state, params)
        return optax.apply_updates(params, updates), state

    state = jax.jit(partial(start, NETWORK, RECIPE, steps * BATCH))(jax.random.key(0))
    epoch = jax.jit(
        lambda state: one_pass(NETWORK, RECIPE, state, lambda i: (x[i], y[i]), steps * BATCH)
    )
    zero = jnp.float32(0)
    return {
        "matrix products": in_a_loop(multiplied, zero, steps),
        "forward": in_a_loop(forward, zero, steps),
        "and backward": in_a_loop(backward, zero, steps),
        "and the update": in_a_loop(step, (params, optimizer.init(params)), steps),
        "and shuffled batches": ((lambda: jax.block_until_ready(epoch(state))), steps),
    }


def pytorch(x, y, steps, threads):
    """The same parts in PyTorch."""
    import torch

    torch.set_num_threads(threads)
    network = lenet()
    images = torch.tensor(np.asarray(NETWORK.preprocess(x))).permute(0, 3, 1, 2).contiguous()
    targets = torch.tensor(np.asarray(y))
    optimizer = torch.optim.SGD(network.parameters(), RECIPE.learning_rate, RECIPE.momentum)
    whole = [slice(i * BATCH, (i + 1) * BATCH) for i in range(steps)]

    def backward(batch):
        optimizer.zero_grad()
        log_p = torch.log_softmax(network(images[batch]), -1)
        (-(targets[batch] * log_p).sum(-1).mean()).backward()

    def forward(batch):
        with torch.no_grad():
            network(images[batch])

    def step(batch):
        backward(batch)
        optimizer.step()

    def over(batches, do):
        for batch in batches():
            do(batch)

    def shuffled():
        return torch.randperm(steps * BATCH).split(BATCH)

    parts = {
        "forward": (lambda: whole, forward),
        "and backward": (lambda: whole, backward),
        "and the update": (lambda: whole, step),
        "and shuffled batches": (shuffled, step),
    }
    return {name: (partial(over, *part), steps) for name, part in parts.items()}


def table(results):
    """Markdown: a line for each part."""
    lines = []
    for each in results:
        known = ["{} ({} to {}) ms".format(*each[side]) if each[side] else "" for side in SIDES]
        ratio = f"{each['PyTorch'][0] / each['madjax'][0]:.2f}" if each["PyTorch"] else ""
        lines.append((each["part"], *known, ratio))
    return markdown(("a step", *SIDES, "ratio"), lines)


SIDES = "PyTorch", "madjax"


def main():
    """Measure the parts in turns, print a table, and write it where --out says."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--steps", type=int, default=50, help="of a measurement")
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--threads", type=int, default=2, help="PyTorch's threads")
    parser.add_argument("--out", type=Path, help="without suffix: OUT.json and OUT.md")
    options = parse(parser, steps=1, rounds=1)
    keys = jax.random.split(jax.random.key(0), 2)
    count = options.steps * BATCH
    x = jax.random.randint(keys[0], (count, 28, 28, 1), 0, 256).astype(jnp.uint8)
    y = jax.nn.softmax(jax.random.normal(keys[1], (count, 10)))
    sides = {"madjax": ours(x, y, options.steps)}
    if HAS_TORCH:
        sides["PyTorch"] = pytorch(x, y, options.steps, options.threads)
    variants = {(side, part): run for side, parts in sides.items() for part, run in parts.items()}
    _, rates = in_turns(variants, options.rounds)
    took = {name: spread([1000 / each for each in values]) for name, values in rates.items()}
    results = [
        {"part": part, **{side: took.get((side, part)) for side in SIDES}}
        for part in sides["madjax"]
    ]
    print(table(results))
    if options.out:
        write(options.out, options, {"results": results}, table(results))


if __name__ == "__main__":
    main()
