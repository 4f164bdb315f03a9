"""Seconds of one JBDA attack on a LeNet: the published procedure in PyTorch, and madjax.

Claim: madjax is the faster, and more so behind MAD (goal: 5 times; measured 1.6 undefended and 4.0
behind MAD). Nearly all of an attack on an undefended victim is the training of LeNets, 354,000
examples at 10,000 queries, which both sides do at about the speed of the cores.
Command: pip install -e ".[bench]" && python experiments/bench_jbda.py --out OUT
Cost: about 10 minutes on 2 CPU cores.

The attack, after Papernot et al. (2017), with the step of MAD's authors: 100 seed images, labelled
by the victim's posteriors, are D.
A round trains a fresh substitute on D for 20 epochs, moves every image of D by 0.1 sign(gradient of
the substitute's loss at the victim's top label), asks the victim for the new images, and adds them:
D doubles, until the budget is spent. A fresh network trained on all of D is the stolen model.

PyTorch works as the reference implementation does, one query at a time; as nothing but habit asks
for that of an undefended victim, a second variant sends its queries in batches. Behind MAD it
forms the Jacobian with one backward pass a class, and loops over candidates. Images are float
tensors in memory and batches are gathered from them: no data loader. The victim is trained by
madjax and is the same on both sides. Variants run in turn, `--rounds` times, so that a busy machine
slows them alike; figures are medians over the rounds, with the smallest and largest. The first run
of madjax, which compiles, is timed apart. The conversion of the victim's weights is outside every
phase; PyTorch tests the stolen model once, madjax after every epoch, inside the last phase.
"""

import argparse
import statistics
import time
from collections import defaultdict
from contextlib import contextmanager
from functools import cache, partial
from pathlib import Path

import jax
import numpy as np
from measuring import HAS_TORCH, parse, ratios, spread, write

import madjax
from madjax import sweep
from madjax.datasets import MNIST_FAMILY
from madjax.sweep import stages

if HAS_TORCH:
    import torch
    from torch import nn

SEEDS = 100
STEP = 0.1
"""The length of a move, in normalised units."""
BATCH = 64
SUBSTITUTE_EPOCHS = 20
SUBSTITUTE_RATE = 0.1
FINAL_RATE = 0.01
PHASES = ("query", "substitute", "augment", "collect", "final")


def normalised(images):
    """Images uint8 [N, H, W, 1], or any values in [0, 255], as PyTorch takes them."""
    x = torch.tensor(np.asarray(images), dtype=torch.float32).permute(0, 3, 1, 2)
    return ((x / 255 - MNIST_FAMILY.mean[0]) / MNIST_FAMILY.std[0]).contiguous()


def lenet(classes):
    """`madjax.LeNet`, freshly initialised."""
    return nn.Sequential(
        nn.Conv2d(1, 20, 5),
        nn.ReLU(),
        nn.MaxPool2d(2),
        nn.Conv2d(20, 50, 5),
        nn.ReLU(),
        nn.MaxPool2d(2),
        nn.Flatten(),
        nn.Linear(800, 500),
        nn.ReLU(),
        nn.Linear(500, classes),
    )


def converted(weights):
    """The PyTorch twin of `madjax.LeNet` with these weights, as `madjax.fit` leaves them."""
    layers = jax.tree.map(np.asarray, weights["params"])
    kernels = {name: layer["kernel"] for name, layer in layers.items()}
    # Flax flattens [4, 4, 50] images with channels last, PyTorch [50, 4, 4].
    first = kernels["Dense_0"].reshape(4, 4, 50, 500).transpose(2, 0, 1, 3).reshape(800, 500)
    network = lenet(kernels["Dense_1"].shape[1])
    places = {
        "Conv_0": (0, kernels["Conv_0"].transpose(3, 2, 0, 1)),
        "Conv_1": (3, kernels["Conv_1"].transpose(3, 2, 0, 1)),
        "Dense_0": (7, first.T),
        "Dense_1": (9, kernels["Dense_1"].T),
    }
    with torch.no_grad():
        for name, (place, kernel) in places.items():
            network[place].weight.copy_(torch.tensor(kernel))
            network[place].bias.copy_(torch.tensor(layers[name]["bias"]))
    return network.eval()


def disagreement(classifier, weights, images):
    """The largest difference between the posteriors of the two victims."""
    with torch.no_grad():
        theirs = torch.softmax(converted(weights)(normalised(images)), dim=-1).numpy()
    return float(np.abs(theirs - np.asarray(classifier.posterior(weights, images))).max())


def undefended(victim):
    """The victim's posteriors: images [B, 1, 28, 28] -> [B, K]."""

    def respond(x):
        with torch.no_grad():
            return torch.softmax(victim(x), dim=-1)

    return respond


def behind_mad(victim, surrogate, epsilon=0.5):
    """The victim behind MAD with all parameters and the L1 distance, one image at a time."""
    weights = list(surrogate.parameters())

    def respond(x):
        (y,) = undefended(victim)(x)
        log_p = torch.log_softmax(surrogate(x), dim=-1)[0]
        rows = [torch.autograd.grad(value, weights, retain_graph=True) for value in log_p]
        g = torch.stack([torch.cat([part.flatten() for part in row]) for row in rows])
        u = g.T @ y

        def objective(vertex):
            a = g.T @ vertex
            return float(((a / a.norm() - u / u.norm()) ** 2).sum())

        y_star = max(torch.eye(len(y)), key=objective)
        step = torch.clamp(epsilon / (y - y_star).abs().sum(), max=1)
        return ((1 - step) * y + step * y_star)[None]

    return respond


def ask(respond, x, query_batch):
    """The victim's answers, `query_batch` images at a time."""
    return torch.cat([respond(part) for part in x.split(query_batch)])


def train(x, y, epochs, learning_rate):
    """A fresh network trained on images x and posteriors y."""
    network = lenet(y.shape[1])
    optimizer = torch.optim.SGD(
        network.parameters(), learning_rate, momentum=0.9, weight_decay=5e-4
    )
    for _ in range(epochs):
        for batch in torch.randperm(len(x)).split(BATCH):
            optimizer.zero_grad()
            nn.functional.cross_entropy(network(x[batch]), y[batch]).backward()
            optimizer.step()
    return network.eval()


def augment(network, x, y):
    """Every image, moved to where the network doubts the victim's top label more."""
    lowest, highest = normalised([[[[0]]], [[[255]]]]).flatten().tolist()
    moved = []
    for images, labels in zip(x.split(BATCH), y.argmax(-1).split(BATCH), strict=True):
        images = images.clone().requires_grad_()
        loss = nn.functional.cross_entropy(network(images), labels, reduction="sum")
        (gradient,) = torch.autograd.grad(loss, images)
        moved.append((images.detach() + STEP * gradient.sign()).clamp(lowest, highest))
    return torch.cat(moved)


def pytorch(weights, surrogate, seeds, test, budget, final_epochs, threads, query_batch=1):
    """The attack in PyTorch: its accuracy in percent, and the seconds of every phase.

    weights and surrogate: of a `madjax.LeNet`, as `madjax.fit` leaves them; surrogate None for an
    undefended victim. seeds: images uint8 [N, 28, 28, 1]. test: (images, labels).
    """
    torch.set_num_threads(threads)
    seconds = defaultdict(float)

    @contextmanager
    def phase(name):
        began = time.perf_counter()
        yield
        seconds[name] += time.perf_counter() - began

    victim = converted(weights)
    respond = behind_mad(victim, converted(surrogate)) if surrogate else undefended(victim)
    x, x_test = normalised(seeds), normalised(test[0])
    labels = torch.tensor(np.asarray(test[1]))
    with phase("query"):
        y = ask(respond, x, query_batch)
    while len(x) < budget:
        with phase("substitute"):
            substitute = train(x, y, SUBSTITUTE_EPOCHS, SUBSTITUTE_RATE)
        with phase("augment"):
            left = budget - len(x)
            new = augment(substitute, x[:left], y[:left])
        with phase("query"):
            answers = ask(respond, new, query_batch)
        x, y = torch.cat([x, new]), torch.cat([y, answers])
    with phase("final"):
        stolen = train(x, y, final_epochs, FINAL_RATE)
        with torch.no_grad():
            found = torch.cat([stolen(part).argmax(-1) for part in x_test.split(250)])
    return 100 * (found == labels).double().mean().item(), dict(seconds)


# ------------------------------------------------------------------------------------------------


def ours(weights, surrogate, seeds, test, budget, final_epochs, threads):
    """The attack in madjax; takes and returns what `pytorch` does, but uses all cores."""
    del threads
    # Undefended is MAD at an epsilon of 0, so the surrogate's forward pass is paid for.
    epsilon, params, layers = (0.5, surrogate, "all") if surrogate else (0.0, weights, "last")
    begin, advance, start, learn, attack = compiled(budget, final_epochs, seeds.shape[1:], layers)
    cell = sweep.stack([sweep.Point(np.float32(epsilon), np.uint32(0))], 1)
    own = sweep.Own(seeds[None], np.zeros((1, len(seeds)), np.int32))
    api = sweep.Api(*(jax.tree.map(lambda a: a[None], each) for each in (weights, params)))
    tests = sweep.Tests(*(each[None] for each in test), None)
    own, api, tests, cell = jax.device_put((own, api, tests, cell))
    seconds = {}
    began = time.perf_counter()
    transfer = begin(cell, (own, api))
    for r in range(attack.rounds):
        transfer = advance((cell, transfer), (own, api, np.int32(r)))
    jax.block_until_ready(transfer)
    seconds["collect"] = time.perf_counter() - began
    began = time.perf_counter()
    state = start(cell, None)
    for _ in range(final_epochs):
        state = learn((cell, transfer, state), (own.images, tests, np.int32(budget)))
    accuracy = float(state.accuracy[0, -1])
    seconds["final"] = time.perf_counter() - began
    return accuracy, seconds


@cache
def compiled(budget, final_epochs, shape, layers):
    """The functions of a sweep's cell, on one device, and the attack."""
    final = madjax.Recipe(
        epochs=final_epochs, learning_rate=FINAL_RATE, momentum=0.9, weight_decay=5e-4
    )
    attack = madjax.jbda(budget=budget, recipe=final)
    network = madjax.Classifier(madjax.LeNet(10), MNIST_FAMILY.preprocess, shape)
    defense = madjax.MAD(layers=layers)
    asking = sweep.Parties(network, network, MNIST_FAMILY, 10, 10), attack, defense
    learning = network, final, budget
    over = partial(sweep.over_cells, mesh=sweep.make_mesh(jax.devices()[:1]))
    begin, advance = (over(stage, *asking) for stage in (stages.begin, stages.proceed))
    start, learn = (over(stage, *learning) for stage in (stages.start, stages.advance))
    return begin, advance, start, learn, attack


# ------------------------------------------------------------------------------------------------


def measure(variants, rounds, *arguments):
    """Every round's (accuracy, phase seconds, all seconds), for each variant in turn."""
    found = {name: [] for name in variants}
    for _ in range(rounds):
        for name, attack in variants.items():
            began = time.perf_counter()
            accuracy, phases = attack(*arguments)
            found[name].append((accuracy, phases, time.perf_counter() - began))
            print(f"{name}: {found[name][-1][2]:.1f} s, {accuracy:.2f} %", flush=True)
    return found


def summary(name, runs, baseline):
    """One entry of the results; baseline: the runs that its ratios are to, or None."""
    totals = [run[2] for run in runs]
    speeds, theirs = ([1 / run[2] for run in each] for each in (runs, baseline or ()))
    phases = {
        phase: round(statistics.median(run[1][phase] for run in runs), 2)
        for phase in PHASES
        if phase in runs[0][1]
    }
    return {
        "variant": name,
        "seconds": spread(totals),
        "ratio": ratios(speeds, theirs or None),
        "accuracy": [round(run[0], 2) for run in runs],
        "phases": phases,
    }


def table(results):
    """The results as README has them."""
    lines = ["| victim | attack | seconds | ratio | where |", "| --- | --- | --: | --: | --- |"]
    for r in results:
        middle, low, high = r["seconds"]
        took = f"{middle:.0f}" + (f" ({low:.0f} to {high:.0f})" if low < high else "")
        phases = ", ".join(f"{phase} {value:.0f}" for phase, value in r["phases"].items())
        ratio = str(r["ratio"][0]) if r["ratio"] else ""
        cells = r["victim"], r["variant"], took, ratio, phases
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines) + "\n"


def main():
    """Measure, print a table, and write it as JSON and Markdown where --out says."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--budget", type=int, default=10000, help=f"queries, with {SEEDS} seeds")
    parser.add_argument("--mad-budget", type=int, default=2000, help="the same, behind MAD")
    parser.add_argument("--only-mad", action="store_true", help="no undefended victim")
    parser.add_argument("--final-epochs", type=int, default=10)
    parser.add_argument("--victim-epochs", type=int, default=2)
    parser.add_argument("--rounds", type=int, default=1, help="how often every variant runs")
    parser.add_argument("--threads", type=int, default=2, help="PyTorch's threads")
    parser.add_argument("--dataset", default="embedded:mnist")
    parser.add_argument("--out", type=Path, help="without suffix: OUT.json and OUT.md")
    options = parse(
        parser,
        only_mad=True,
        mad_budget=2 * SEEDS,
        final_epochs=1,
        victim_epochs=1,
        dataset="embedded:mnist[:200,:50]",
    )
    data = madjax.open_dataset(options.dataset)
    if data.image_shape != (28, 28, 1) or len(data.x_train) < SEEDS:
        parser.error(f"{options.dataset}: give at least {SEEDS} images of 28x28x1")
    if min(options.budget, options.mad_budget) < SEEDS:
        parser.error(f"give budgets of at least the {SEEDS} seeds")

    test = data.x_test, data.y_test
    classifier = madjax.Classifier(
        madjax.LeNet(data.num_classes), MNIST_FAMILY.preprocess, data.image_shape
    )
    recipe = madjax.Recipe(epochs=options.victim_epochs)
    victim = madjax.fit(classifier, recipe, jax.random.key(0), (data.x_train, data.y_train), test)
    weights = jax.tree.map(np.asarray, victim.params)
    print(f"victim: {victim.accuracy[-1]:.2f} %")
    if HAS_TORCH:
        torch.manual_seed(0)
        difference = disagreement(classifier, weights, data.x_test[:100])
        if difference > 1e-4:
            raise RuntimeError(f"the posteriors of the two victims differ by {difference}")
        print(f"posteriors within {difference:.0e} on both sides")

    surrogate = jax.tree.map(np.asarray, classifier.init(jax.random.key(1)))
    seeds = data.x_train[:SEEDS]
    baseline, batched = "PyTorch, one query at a time", "PyTorch, 64 queries at a time"
    groups = {
        f"undefended, {options.budget:,} queries": (
            options.budget,
            {
                baseline: partial(pytorch, weights, None),
                batched: partial(pytorch, weights, None, query_batch=64),
                "madjax": partial(ours, weights, None),
            },
        ),
        f"MAD of all parameters, {options.mad_budget:,} queries": (
            options.mad_budget,
            {
                baseline: partial(pytorch, weights, surrogate),
                "madjax": partial(ours, weights, surrogate),
            },
        ),
    }
    if options.only_mad:
        del groups[next(iter(groups))]
    if HAS_TORCH:
        # PyTorch compiles nothing, but its first optimiser imports for two seconds.
        pytorch(weights, None, seeds, test, 2 * SEEDS, 1, options.threads)
    else:
        for _, variants in groups.values():
            variants.pop(baseline)
            variants.pop(batched, None)
    results, first = [], {}
    for victim_is, (budget, variants) in groups.items():
        settings = seeds, test, budget, options.final_epochs, options.threads
        began = time.perf_counter()
        variants["madjax"](*settings)
        first[victim_is] = round(time.perf_counter() - began, 2)
        print(f"{victim_is}: madjax, first run {first[victim_is]} s")
        found = measure(variants, options.rounds, *settings)
        for name, runs in found.items():
            results.append({"victim": victim_is} | summary(name, runs, found.get(baseline)))
    print(table(results))
    if options.out:
        facts = {
            "victim_accuracy": round(float(victim.accuracy[-1]), 2),
            "first_run_seconds": first,
            "results": results,
        }
        write(options.out, options, facts, table(results))


if __name__ == "__main__":
    main()
