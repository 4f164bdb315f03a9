"""Training speed of stolen models: one attacker, a grid of 8, and in-memory PyTorch, in one run.

Claim: on a CPU the grid trains more examples a second than PyTorch's in-memory loop does for the
same network (LeNet, batch 64, SGD with momentum; goal: 1.3 times, measured 1.19), and convolutions
as patches beat XLA's own inside `lax.scan` many times.
Command: pip install -e ".[bench]" && python experiments/bench_training.py --devices 2 --out OUT
Cost: about 4 minutes on 2 CPU cores.

All variants run in turn, `--rounds` times, so that a busy machine slows them alike; the figures are
medians over the rounds, with the smallest and largest, and the ratio is the median of the ratios
within a round. Compilation is timed apart. PyTorch gets its images as float tensors in memory, ours
are uint8 and are normalised in every step; both gather shuffled batches. `--devices 2` splits a CPU
into two devices, one for each core.
"""

import argparse
from functools import partial
from pathlib import Path

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from measuring import HAS_TORCH, in_turns, parse, ratios, spread, use_devices, write

from madjax import Classifier, LeNet, Recipe, sweep
from madjax.attacks import Transfer
from madjax.datasets import MNIST_FAMILY
from madjax.sweep import stages
from madjax.train import epoch, start

CELLS = 8
RECIPE = Recipe(epochs=1, learning_rate=0.01)


def window_pool(x):
    """Flax's pooling: a window reduction, whose gradient is a select-and-scatter."""
    return nn.max_pool(x, (2, 2), (2, 2))


def attacker(module, x, y):
    """One attacker's epoch, outside any grid: a function without arguments, and its examples."""
    classifier = Classifier(module, MNIST_FAMILY.preprocess, (28, 28, 1))
    state = jax.jit(partial(start, classifier, RECIPE, len(x)))(jax.random.key(0))

    @jax.jit
    def advance(state, x, y):
        few = x[:64], y[:64].argmax(-1)
        return epoch(classifier, RECIPE, state, lambda i: (x[i], y[i]), len(x), *few)

    return lambda: jax.block_until_ready(advance(state, x, y)), len(x)


def grid(mapping, x, y):
    """One epoch of `CELLS` attackers as the sweep runs them, over all devices."""
    classifier = Classifier(LeNet(10), MNIST_FAMILY.preprocess, (28, 28, 1))
    n = len(x)
    settings = classifier, RECIPE, n
    tests = sweep.Tests(x[None, :64], y[None, :64].argmax(-1), y[None, :64])
    lesson = x[None], tests, np.int32(n)
    cells = [sweep.Point(np.float32(e / 10), np.uint32(0)) for e in range(CELLS)]
    stacked = sweep.stack(cells, CELLS)
    bought = Transfer(jnp.arange(n), y, jnp.int32(n))
    transfers = jax.tree.map(lambda a: jnp.stack([a] * CELLS), bought)
    over = partial(sweep.over_cells, mesh=sweep.make_mesh(), mapping=mapping)
    advance = over(stages.advance, *settings)
    state = over(stages.start, *settings)(stacked, None)
    return lambda: jax.block_until_ready(advance((stacked, transfers, state), lesson)), CELLS * n


def pytorch(x, y, threads):
    """The same network and recipe in PyTorch, everything in memory as float tensors."""
    import torch
    from torch import nn as tnn

    torch.set_num_threads(threads)
    torch.manual_seed(0)
    network = tnn.Sequential(
        tnn.Conv2d(1, 20, 5),
        tnn.ReLU(),
        tnn.MaxPool2d(2),
        tnn.Conv2d(20, 50, 5),
        tnn.ReLU(),
        tnn.MaxPool2d(2),
        tnn.Flatten(),
        tnn.Linear(800, 500),
        tnn.ReLU(),
        tnn.Linear(500, 10),
    )
    images = torch.tensor(np.asarray(MNIST_FAMILY.preprocess(np.asarray(x)))).permute(0, 3, 1, 2)
    images, targets = images.contiguous(), torch.tensor(np.asarray(y))
    optimizer = torch.optim.SGD(network.parameters(), RECIPE.learning_rate, RECIPE.momentum)

    def run():
        for batch in torch.randperm(len(images)).split(RECIPE.batch_size):
            optimizer.zero_grad()
            log_p = torch.log_softmax(network(images[batch]), dim=-1)
            (-(targets[batch] * log_p).sum(-1).mean()).backward()
            optimizer.step()

    return run, len(images)


def table(results):
    """Markdown: a line for every variant."""
    lines = [
        "| variant | examples/s | ratio to PyTorch | first call |",
        "| --- | --: | --: | --: |",
    ]
    for r in results:
        rate = "{:,} ({:,} to {:,})".format(*r["examples_per_second"])
        ratio = "{} ({} to {})".format(*r["ratio"]) if r["ratio"] else ""
        lines.append(f"| {r['variant']} | {rate} | {ratio} | {r['first_call_seconds']} s |")
    return "\n".join(lines)


def main():
    """Measure, print a table, and write it as JSON and Markdown where --out says."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--examples", type=int, default=3200, help="a cell and epoch")
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--devices", type=int, help="CPU devices")
    parser.add_argument("--threads", type=int, default=2, help="PyTorch's threads")
    parser.add_argument("--out", type=Path, help="without suffix: OUT.json and OUT.md")
    options = parse(parser, examples=64, rounds=1)
    use_devices(options.devices)

    keys = jax.random.split(jax.random.key(0), 2)
    x = jax.random.randint(keys[0], (options.examples, 28, 28, 1), 0, 256).astype(jnp.uint8)
    y = jax.nn.softmax(jax.random.normal(keys[1], (options.examples, 10)))
    lax_conv = lax.conv_general_dilated
    baseline = "PyTorch, one attacker"
    variants = {baseline: pytorch(x, y, options.threads)} if HAS_TORCH else {}
    variants |= {
        "one attacker": attacker(LeNet(10), x, y),
        f"grid of {CELLS}, lax.map": grid(sweep.map_cells, x, y),
        f"grid of {CELLS}, vmap": grid(sweep.vmap_cells, x, y),
        "one attacker, XLA convolution": attacker(LeNet(10, convolution=lax_conv), x, y),
        "one attacker, window pooling": attacker(LeNet(10, pool=window_pool), x, y),
    }
    first, rates = in_turns(variants, options.rounds)
    results = [
        {
            "variant": name,
            "first_call_seconds": round(first[name], 1),
            "examples_per_second": spread(values, None),
            "ratio": ratios(values, rates.get(baseline)),
        }
        for name, values in rates.items()
    ]
    print(table(results))
    if options.out:
        write(options.out, options, {"results": results}, table(results))


if __name__ == "__main__":
    main()
