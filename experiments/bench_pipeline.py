"""The whole of an 8-epsilon MNIST grid, against the authors' procedure in plain PyTorch.

Claim: answering 50,000 queries at eight epsilons, training an attacker on each, judging it after
every epoch, and judging the defended victim takes a fifth of the time or less on the same CPU, with
gradients of all parameters (Eq. 5). With those of the last layer, as in the authors' code, it does
not: there most of the time is training, which is bound to its matrix products on both sides.
Command: pip install -e ".[bench]" && python experiments/bench_pipeline.py --devices 2 --out OUT
Cost: about 8 minutes on 2 CPU cores.

Both sides do a slice of each stage, in turns, and each stage is scaled to the size of the paper by
its own cost, which is linear: 50,000 queries, 10,000 test images, 30 epochs of LeNet at batch 64. A
victim is needed by both and counted by neither. madjax runs as `madjax sweep` does; what it spends
compiling, and on all that is no stage (data, checkpoints, rows), is added once, unscaled. Answers
by all parameters are made in a second run, with attackers of next to no cost.

PyTorch works as the authors' code does. A query is one image: it is made a tensor and normalised,
the victim answers, K backward passes make G of the surrogate, H of K vertices is computed from G in
a Python loop, and each epsilon does all of that anew (0 asks the victim alone). The test set goes
through the defence in the same way. The attacker's images come from a data set that makes each a
tensor and normalises it again in every epoch, by a data loader without workers. Its log of
distances, which it computes from the first query on after each 1,000, is left out. The transforms
are written after torchvision's, which is not needed.
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
from bench_training import lenet
from measuring import HAS_TORCH, markdown, parse, ratios, seconds, spread, use_devices, write

from madjax import MAD, MLP, Defended, Knockoff, Recipe, Sweep, Task, open_dataset, sweep
from madjax.sweep import rates

EPSILONS = (0.0, 0.1, 0.3, 0.5, 0.8, 0.99, 1.1, 1.5)
QUERIES, TESTS, EPOCHS = 50_000, 10_000, 30
MEAN, STD = 0.1307, 0.3081
SETS = "embedded:mnist[:600,:{tests}]", "embedded:fashion_mnist[:{queries}]"
"""Of the slice; what the images show does not change the time."""


def ours(queries, tests, epochs):
    """Seconds of each stage at the paper's size, from runs of a slice."""
    tiny = Knockoff(budget=queries, architecture=partial(MLP, hidden=(1,)), recipe=Recipe(epochs=1))
    attack = Knockoff(budget=queries, recipe=Recipe(epochs=epochs, learning_rate=0.01))
    with tempfile.TemporaryDirectory() as folder:
        os.environ["MADJAX_CACHE"] = folder
        last, compiling, rest = noted(Path(folder), "last", attack, queries, tests)
        every, more, _ = noted(Path(folder), "all", tiny, queries, tests)
    asked = (QUERIES + TESTS) / (queries + tests)
    return {
        LAST: asked * (last["posteriors"] + last["answers"]),
        ALL: asked * (last["posteriors"] + every["answers"]),
        TRAINING: last["stolen"] * QUERIES / queries * EPOCHS / epochs,
        COMPILING: compiling,
        f"{COMPILING}, all parameters": compiling + more,
        "all else": rest,
    }


def noted(folder, layers, attack, queries, tests):
    """Of a run: seconds of each stage, of compiling, and the rest."""
    names = (each.format(queries=queries, tests=tests) for each in SETS)
    config = Sweep(
        layers,
        (Task(*names, victim=Recipe(epochs=1)),),
        (Defended(MAD(layers=layers), EPSILONS),),
        (attack,),
    )
    notes = folder / rates.FILE
    notes.unlink(missing_ok=True)
    jax.clear_caches()
    before = sweep.Compiled.so_far()
    whole = seconds(lambda: sweep.run(config, folder / f"run-{layers}", log=None))
    compiling = sweep.Compiled.so_far().since(before).seconds
    took = Counter()
    for note in map(json.loads, notes.read_text().splitlines()):
        took[note["kind"].split()[0]] += note["seconds"]
    return took, compiling, whole - compiling - sum(took.values())


def transform(image):
    """A tensor [1, 28, 28] of a PIL image, normalised, by the steps of torchvision."""
    import torch

    pixels = torch.from_numpy(np.array(image, np.uint8, copy=True))
    pixels = pixels.view(*pixels.shape[:2], 1).permute(2, 0, 1).contiguous().float().div(255)
    mean, std = (torch.as_tensor([each]).view(-1, 1, 1) for each in (MEAN, STD))
    return pixels.clone().sub_(mean).div_(std)


class Images:
    """A data set that makes each image anew whenever it is read."""

    def __init__(self, images, targets):
        self.images, self.targets = images[..., 0], targets

    def __len__(self):
        return len(self.images)

    def __getitem__(self, i):
        from PIL import Image

        return transform(Image.fromarray(self.images[i])), self.targets[i]


def answered(images, epsilon, victim, surrogate, weights):
    """The defended answers to images, one by one; G is of these weights of the surrogate."""
    import torch

    answers = []
    for i in range(len(images)):
        x = images[i][0][None]
        with torch.no_grad():
            y = torch.softmax(victim(x), -1)[0]
        if not epsilon:
            answers.append(y)
            continue
        log_p = torch.log_softmax(surrogate(x), -1)[0]
        count = len(log_p)
        rows = []
        for k in range(count):
            parts = torch.autograd.grad(-log_p[k], weights, retain_graph=k < count - 1)
            rows.append(torch.cat([part.flatten() for part in parts]))
        g = torch.stack(rows)
        true = g.T @ y
        true = true / true.norm()
        found, y_star = -1.0, None
        for k in range(count):
            vertex = torch.zeros(count)
            vertex[k] = 1
            told = g.T @ vertex
            value = float(((told / told.norm() - true) ** 2).sum())
            if value > found:
                found, y_star = value, vertex
        step = torch.clamp(epsilon / ((y - y_star).abs().sum() + 1e-7), 0, 1)
        answers.append((1 - step) * y + step * y_star)
    return torch.stack(answers)


def trained(images, tests):
    """One epoch of an attacker, then its accuracy: the seconds of both."""
    import torch
    from torch.utils.data import DataLoader

    network = lenet()
    optimizer = torch.optim.SGD(network.parameters(), 0.01, 0.5)

    def learn():
        for x, y in DataLoader(images, 64, shuffle=True):
            optimizer.zero_grad()
            loss = -(y * torch.log_softmax(network(x), -1)).sum(-1).mean()
            loss.backward()
            optimizer.step()

    def judge():
        with torch.no_grad():
            return sum(int((network(x).argmax(-1) == y).sum()) for x, y in DataLoader(tests, 64))

    return seconds(learn), seconds(judge)


def theirs(images, labels, asked):
    """Seconds of each stage at the paper's size, from a slice of each; so many are asked."""
    import torch

    victim, surrogate = lenet().eval(), lenet()
    targets = torch.softmax(torch.randn(len(images), 10), -1)
    each, weights = Images(images, targets), list(surrogate.parameters())

    def a_query(epsilon, weights, count):
        few = Images(images[:count], targets[:count])
        return seconds(lambda: answered(few, epsilon, victim, surrogate, weights)) / count

    plain = a_query(0.0, weights, asked)
    by_last = a_query(0.5, [surrogate[-1].weight], asked)
    by_all = a_query(0.5, weights, max(asked // 5, 1))
    learning, judging = trained(each, Images(images, labels))
    an_epoch = learning / len(images) * QUERIES + judging / len(images) * TESTS
    clean = EPSILONS.count(0.0)
    return {
        **{
            name: (QUERIES + TESTS) * ((len(EPSILONS) - clean) * defended + clean * plain)
            for name, defended in ((LAST, by_last), (ALL, by_all))
        },
        TRAINING: len(EPSILONS) * EPOCHS * an_epoch,
    }


LAST, ALL = "queries and MAD, last layer", "queries and MAD, all parameters"
TRAINING, COMPILING = "training and tests", "compiling"


def whole(took, layers):
    """Seconds of all stages, by those of each."""
    other, compiling = {LAST: (ALL, f"{COMPILING}, all parameters"), ALL: (LAST, COMPILING)}[layers]
    return sum(seconds for stage, seconds in took.items() if stage not in (other, compiling))


def table(results):
    """Markdown: a line for each stage."""
    lines = []
    for each in results:
        known = [f"{each[side][0] / 60:.1f} min" if each[side] else "" for side in SIDES]
        ratio = "{} ({} to {})".format(*each["ratio"]) if each["ratio"] else ""
        lines.append((each["stage"], *known, ratio))
    return markdown(("stage", *SIDES, "ratio"), lines)


SIDES = "PyTorch", "madjax"


def main():
    """Measure both sides in turns, print a table, and write it where --out says."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--queries", type=int, default=5000, help="of the slice")
    parser.add_argument("--tests", type=int, default=1000, help="test images of the slice")
    parser.add_argument("--epochs", type=int, default=2, help="of the slice")
    parser.add_argument("--asked", type=int, default=300, help="queries to PyTorch an epsilon")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--devices", type=int, help="CPU devices")
    parser.add_argument("--threads", type=int, default=2, help="PyTorch's threads")
    parser.add_argument("--out", type=Path, help="without suffix: OUT.json and OUT.md")
    options = parse(parser, queries=128, tests=50, epochs=1, asked=4, rounds=1)
    use_devices(options.devices)
    images = open_dataset(SETS[1].format(queries=options.queries)).x_train
    labels = np.arange(len(images)) % 10
    sides = {"PyTorch": [], "madjax": []}
    for _ in range(options.rounds):
        if HAS_TORCH:
            import torch

            torch.set_num_threads(options.threads)
            sides["PyTorch"].append(theirs(images, labels, options.asked))
        sides["madjax"].append(ours(options.queries, options.tests, options.epochs))
    results = []
    for rounds in sides.values():
        for each in rounds:
            each |= {
                layers.replace("queries and MAD", "whole"): whole(each, layers)
                for layers in (LAST, ALL)
            }
    for stage in sides["madjax"][0]:
        took = {
            side: [each[stage] for each in rounds]
            for side, rounds in sides.items()
            if rounds and stage in rounds[0]
        }
        both = len(took) == len(SIDES)
        results.append(
            {
                "stage": stage,
                **{side: spread(took[side], 1) if side in took else None for side in SIDES},
                "ratio": ratios(took["PyTorch"], took["madjax"], 1) if both else None,
            }
        )
    print(table(results))
    if options.out:
        write(options.out, options, {"results": results}, table(results))


if __name__ == "__main__":
    main()
