"""What the paper's four VGG16 rows would take, at their whole size, on 1 and on 8 accelerators.

Claim: time and memory for configs cifar10, cifar100, cub200 and caltech256 as `madjax plan` says
them, for accelerators that are not here. Times are operations at a supposed rate, so they are as
good as that rate: at half of it everything takes twice as long.
Command: python experiments/plan_paper.py --out OUT
Cost: 10 minutes on a CPU core; it reads 13 GB of holes in a file.

Blank images stand in for the data sets, in the paper's numbers and sizes: nothing is downloaded.
By default an accelerator has 80 GB, as an H100, and reaches 80 TFLOP/s, a twelfth of what its maker
states for bfloat16: an epoch of 50,000 32x32 images in one second. Networks of cub200 and
caltech256 start from random parameters here; with ImageNet's weights they take as long.
"""

import argparse
import tempfile
from dataclasses import replace
from pathlib import Path

import numpy as np
from measuring import markdown, parse, write

from madjax import Dataset, sweep
from madjax.config import load
from madjax.sweep.cache import in_bytes

PLANS = "cifar10", "cifar100", "cub200:scratch", "caltech256:scratch"
SIZES = {
    "tfds:cifar10": (50_000, 10_000, 32, 10),
    "tfds:cifar100": (50_000, 10_000, 32, 100),
    "tfds:caltech_birds2011@256": (5_994, 5_794, 256, 200),
    "caltech256@256[heldout:25]": (23_380, 6_400, 256, 256),
    "tfds:imagenet2012@256[random:50000,:1]": (50_000, 1, 256, 1000),
}
"""Training and test images, side and classes of each data set, by its name in the configs."""


def blank(name, folder):
    """A data set of its size. Its file has holes where images are black, and takes no room."""
    train, test, side, classes = SIZES[name]

    def images(count):
        path = Path(folder) / f"images-{len(list(Path(folder).iterdir()))}"
        return np.memmap(path, np.uint8, mode="w+", shape=(count, side, side, 3))

    def labels(count):
        return np.arange(count, dtype=np.int32) % classes

    x_train, x_test = images(train), images(test)
    x_test[:, 0, 0, 0] = 255  # no test image may be a query
    names = tuple(map(str, range(classes)))
    return Dataset(name, x_train, labels(train), x_test, labels(test), names)


def duration(seconds):
    """In minutes, or hours, or days where they are many."""
    minutes = seconds / 60
    if minutes < 120:
        return f"{minutes:.1f} min"
    return f"{minutes / 60:.1f} h" if minutes < 72 * 60 else f"{minutes / 1440:.1f} days"


def planned(config, datasets, machine, folder):
    """What a plan says."""
    plan = sweep.plan(config, Path(folder) / "run", datasets=datasets, machine=machine)
    print(plan.table(), flush=True)
    return {
        "config": plan.name,
        "accelerators": machine.count,
        "cells": plan.missing,
        "seconds": {stage.name: stage.seconds for stage in plan.stages} | {"all": plan.seconds},
        "device_bytes": plan.device_bytes,
        "host_bytes": plan.host_bytes,
        "disk_bytes": plan.disk_bytes,
    }


def table(results):
    """Markdown: a line for every plan."""
    stages = "networks", "transfer sets", "stolen models", "all"
    head = "config", "accelerators", "cells", "victim", *stages[1:3], "all of it"
    lines = [
        (
            each["config"],
            str(each["accelerators"]),
            str(each["cells"]),
            *(duration(each["seconds"].get(stage, 0)) for stage in stages),
            *(in_bytes(each[f"{where}_bytes"]) for where in ("device", "host", "disk")),
        )
        for each in results
    ]
    return markdown((*head, "on each device", "in memory", "on disk"), lines)


def main():
    """Plan, print a table, and write it as JSON and Markdown where --out says."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--accelerators", type=int, nargs="+", default=[1, 8], help="how many")
    parser.add_argument("--memory", type=float, default=80, help="GB of each")
    parser.add_argument("--tflops", type=float, default=80, help="that training reaches on each")
    parser.add_argument("--out", type=Path, help="without suffix: OUT.json and OUT.md")
    options = parse(parser, accelerators=[8])
    results = []
    for name in PLANS[: 1 if options.smoke else None]:
        config = load(name)
        if options.smoke:
            config = replace(config, attacks=config.attacks[:1])
        with tempfile.TemporaryDirectory() as folder:
            sets = config.tasks[0].dataset, config.tasks[0].queryset
            datasets = {each: blank(each, folder) for each in sets}
            for count in options.accelerators:
                machine = sweep.Machine(count, options.memory * 1e9, options.tflops * 1e12)
                results.append(planned(config, datasets, machine, folder))
    print(table(results))
    if options.out:
        write(options.out, options, {"results": results}, table(results))


if __name__ == "__main__":
    main()
