"""Training speed of stolen models: one attacker, a grid of 8, and in-memory PyTorch, in one run.

Claim: on a CPU the grid trains more examples a second than PyTorch's in-memory loop does for the
same network (LeNet, batch 64, SGD with momentum; goal: 1.3 times, measured 1.19), and convolutions
as patches beat XLA's own inside `lax.scan` many times.
Command: pip install -e ".[bench]" && python experiments/bench_training.py --devices 2 --out OUT
Cost: about 4 minutes on 2 CPU cores.
On an accelerator: python experiments/bench_training.py --width 1 --out OUT, which is VGG16 on
32x32 images (goals: an epoch of 50,000 images in a second, the grid at 4 times PyTorch).

All variants run in turn, `--rounds` times, so that a busy machine slows them alike; the figures are
medians over the rounds, with the smallest and largest, and the ratio is the median of the ratios
within a round. Compilation is timed apart. PyTorch gets its images as float tensors in memory, ours
are uint8 and are normalised in every step; both gather shuffled batches. Both compute on the
accelerator where they find one, ours in the type that networks have there by default.
`--devices 2` splits a CPU into two devices, one for each core.
"""

import argparse
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from measuring import HAS_TORCH, in_turns, parse, ratios, spread, use_devices, write

from madjax import VGG16, Classifier, LeNet, Recipe, sweep
from madjax.attacks import Transfer
from madjax.datasets import CIFAR_FAMILY, MNIST_FAMILY, Family
from madjax.models import scaled
from madjax.sweep import stages
from madjax.train import epoch, start

CELLS = 8
RECIPE = Recipe(epochs=1, learning_rate=0.01)


def window_pool(x):
    """Flax's pooling: a window reduction, whose gradient is a select-and-scatter."""
    return nn.max_pool(x, (2, 2), (2, 2))


@dataclass(frozen=True)
class Network:
    """A network, its twin in PyTorch, and its images."""

    module: Callable[..., Any]
    twin: Callable[[], Any]
    family: Family
    shape: tuple[int, int, int]

    def classifier(self, **ways):
        """The network with settings of its module."""
        return Classifier(self.module(10, **ways), self.family.preprocess, self.shape)


def lenet():
    """LeNet in PyTorch."""
    from torch import nn as tnn

    return tnn.Sequential(
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


def vgg16(width):
    """VGG16 with BatchNorm for 32x32 images in PyTorch, its features times width."""
    from torch import nn as tnn

    layers, before = [], 3
    for block in ((64,) * 2, (128,) * 2, (256,) * 3, (512,) * 3, (512,) * 3):
        for features in block:
            now = scaled(width, features)
            layers += [tnn.Conv2d(before, now, 3, padding=1), tnn.BatchNorm2d(now), tnn.ReLU()]
            before = now
        layers.append(tnn.MaxPool2d(2))
    return tnn.Sequential(*layers, tnn.Flatten(), tnn.Linear(before, 10))


def attacker(classifier, x, y):
    """One attacker's epoch, outside any grid: a function without arguments, and its examples."""
    state = jax.jit(partial(start, classifier, RECIPE, len(x)))(jax.random.key(0))

    @jax.jit
    def advance(state, x, y):
        few = x[:64], y[:64].argmax(-1)
        return epoch(classifier, RECIPE, state, lambda i: (x[i], y[i]), len(x), *few)

    return lambda: jax.block_until_ready(advance(state, x, y)), len(x)


def grid(classifier, mapping, x, y):
    """One epoch of `CELLS` attackers as the sweep runs them, over all devices."""
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


def pytorch(each, x, y, threads):
    """The same network and recipe in PyTorch, everything in memory as float tensors."""
    import torch

    torch.set_num_threads(threads)
    torch.manual_seed(0)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    network = each.twin().to(device)
    images = torch.tensor(np.asarray(each.family.preprocess(np.asarray(x)))).permute(0, 3, 1, 2)
    images, targets = images.contiguous().to(device), torch.tensor(np.asarray(y)).to(device)
    optimizer = torch.optim.SGD(network.parameters(), RECIPE.learning_rate, RECIPE.momentum)

    def run():
        for batch in torch.randperm(len(images), device=device).split(RECIPE.batch_size):
            optimizer.zero_grad()
            log_p = torch.log_softmax(network(images[batch]), dim=-1)
            (-(targets[batch] * log_p).sum(-1).mean()).backward()
            optimizer.step()
        if device.type == "cuda":
            torch.cuda.synchronize()

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
    parser.add_argument("--width", type=float, help="VGG16 with so much of its width, not LeNet")
    parser.add_argument("--devices", type=int, help="CPU devices")
    parser.add_argument("--threads", type=int, default=2, help="PyTorch's threads")
    parser.add_argument("--out", type=Path, help="without suffix: OUT.json and OUT.md")
    options = parse(parser, examples=64, rounds=1)
    use_devices(options.devices)

    each = Network(LeNet, lenet, MNIST_FAMILY, (28, 28, 1))
    if options.width:
        module = partial(VGG16, width=options.width)
        each = Network(module, partial(vgg16, options.width), CIFAR_FAMILY, (32, 32, 3))
    own = each.classifier()
    keys = jax.random.split(jax.random.key(0), 2)
    x = jax.random.randint(keys[0], (options.examples, *each.shape), 0, 256).astype(jnp.uint8)
    y = jax.nn.softmax(jax.random.normal(keys[1], (options.examples, 10)))
    lax_conv = lax.conv_general_dilated
    baseline = "PyTorch, one attacker"
    variants = {baseline: pytorch(each, x, y, options.threads)} if HAS_TORCH else {}
    variants |= {
        "one attacker": attacker(own, x, y),
        f"grid of {CELLS}, lax.map": grid(own, sweep.map_cells, x, y),
        f"grid of {CELLS}, vmap": grid(own, sweep.vmap_cells, x, y),
    }
    others = {"XLA convolution": {"convolution": lax_conv}, "window pooling": {"pool": window_pool}}
    if options.width:
        others = {"float32": {"dtype": "float32"}}
    variants |= {
        f"one attacker, {name}": attacker(each.classifier(**settings), x, y)
        for name, settings in others.items()
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
