"""Speed of the white-box study: a step of all 7 attackers, beside plain PyTorch loops, in one run.

Claim: the grid of 7 epsilons of configs/mnist_angle.py takes many times as many steps a second as
a plain PyTorch loop of the same study, one backward pass a class and step (goal: 20 times, measured
18.9 and, on another processor, 30.7).
Command: pip install -e ".[bench]" && python experiments/bench_angle.py --devices 2 --out OUT
Cost: about 5 minutes on 2 CPU cores.

All variants run in turn, `--rounds` times, so that a busy machine slows them alike; the figures are
medians over the rounds, with the smallest and largest, and the ratio is the median of the ratios
within a round. Compilation is timed apart. Two PyTorch loops: `objective per class` finds the
vertex as the authors' code does, two products with G a candidate; `one product` is as lean as a
plain loop gets: inner products of the rows of G once, and the step taken from G itself.
Neither side evaluates anything here. LeNet, K = 10, random images and posteriors.
"""

import argparse
from functools import partial
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
from measuring import HAS_TORCH, in_turns, parse, ratios, spread, use_devices, write

from madjax import MAD, Classifier, LeNet, Online, sweep
from madjax.datasets import MNIST_FAMILY
from madjax.sweep import online

EPSILONS = (0.1, 0.5, 0.95, 0.99, 1.1, 1.5, 2.0)
IMAGES = 500
RATE = 0.001


def grid(mapping, steps):
    """One lap of all attackers over all devices: a function without arguments."""
    attack = Online(budget=steps, images=IMAGES, every=steps)
    classifier = Classifier(LeNet(10), MNIST_FAMILY.preprocess, (28, 28, 1))
    defense = MAD(layers="all")
    settings = sweep.Parties(classifier, classifier, MNIST_FAMILY, 10, 10), attack, defense
    keys = jax.random.split(jax.random.key(0), 2)
    x = jax.random.randint(keys[0], (IMAGES, 28, 28, 1), 0, 256).astype(jnp.uint8)
    victim = jax.tree.map(lambda a: a[None], jax.jit(classifier.init)(keys[1]))
    own = sweep.Own(x[None], jnp.zeros((1, IMAGES), jnp.int32))
    ground = online.Ground(own, sweep.Api(victim, ()), None)
    over = partial(sweep.over_cells, mesh=sweep.make_mesh(), mapping=mapping)
    size = -(-len(EPSILONS) // jax.device_count()) * jax.device_count()
    cells = sweep.stack([sweep.Point(np.float32(e), np.uint32(0)) for e in EPSILONS], size)
    state = over(online.start, *settings)(cells, ground)
    advance = over(online.advance, *settings)
    return lambda: jax.block_until_ready(advance((cells, state), ground)), steps


def pytorch(lean, steps, threads):
    """The same study in a plain loop, one attacker after another."""
    import torch
    from torch import nn

    torch.set_num_threads(threads)
    torch.manual_seed(0)
    images = torch.randn(IMAGES, 1, 28, 28)
    posteriors = torch.softmax(3 * torch.randn(IMAGES, 10), -1)

    def attacker():
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
            nn.Linear(500, 10),
        )

    def jacobian(net, weights, x):
        log_p = torch.log_softmax(net(x), dim=-1)[0]
        rows = []
        for k in range(10):
            g = torch.autograd.grad(log_p[k], weights, retain_graph=k < 9)
            rows.append(torch.cat([part.flatten() for part in g]))
        return torch.stack(rows)

    def objective(g, y_tilde, y):
        a, u = g.T @ y_tilde, g.T @ y
        return float(((a / a.norm() - u / u.norm()) ** 2).sum())

    def vertex(g, y):
        if lean:
            return int((g @ (g.T @ y) / g.norm(dim=1)).argmin())
        return max(range(10), key=lambda k: objective(g, torch.eye(10)[k], y))

    nets = {epsilon: attacker() for epsilon in EPSILONS}

    def run():
        for epsilon, net in nets.items():
            weights = list(net.parameters())
            for at in torch.randint(IMAGES, (steps,)).tolist():
                x, y = images[at : at + 1], posteriors[at]
                g = jacobian(net, weights, x)
                y_star = torch.eye(10)[vertex(g, y)]
                move = min(epsilon / float((y - y_star).abs().sum()), 1)
                y_tilde = (1 - move) * y + move * y_star
                poisoned, true = g.T @ y_tilde, g.T @ y
                cosine = poisoned @ true / poisoned.norm() / true.norm()
                torch.rad2deg(torch.arccos(cosine.clamp(-1, 1))).item()
                with torch.no_grad():
                    for w, part in zip(
                        weights, poisoned.split([w.numel() for w in weights]), strict=True
                    ):
                        w += RATE * part.view_as(w)

    return run, steps


def table(results):
    """Markdown: a line for every variant."""
    lines = [
        "| variant | steps/s of the grid | ratio | ratio to one product |",
        "| --- | --: | --: | --: |",
    ]
    for result in results:
        said = [
            "{} ({} to {})".format(*result[field]) if result[field] else ""
            for field in ("steps_per_second", "ratio", "ratio_to_lean")
        ]
        lines.append(f"| {result['variant']} | " + " | ".join(said) + " |")
    return "\n".join(lines)


def main():
    """Measure, and write the rows as JSON and as a table where --out says."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--steps", type=int, default=200, help="of madjax, a round")
    parser.add_argument("--torch-steps", type=int, default=10, help="of PyTorch, a round")
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--devices", type=int, help="CPU devices")
    parser.add_argument("--threads", type=int, default=2, help="PyTorch's threads")
    parser.add_argument("--out", type=Path, help="without suffix: OUT.json and OUT.md")
    options = parse(parser, steps=2, torch_steps=1, rounds=1)
    use_devices(options.devices)
    plain, lean = "PyTorch, objective per class", "PyTorch, one product"
    variants = {}
    if HAS_TORCH:
        variants[plain] = pytorch(False, options.torch_steps, options.threads)
        variants[lean] = pytorch(True, options.torch_steps, options.threads)
    variants["madjax, lax.map"] = grid(sweep.map_cells, options.steps)
    variants["madjax, vmap"] = grid(sweep.vmap_cells, options.steps)
    first, rates = in_turns(variants, options.rounds)
    results = [
        {
            "variant": name,
            "first_call_seconds": round(first[name], 1),
            "steps_per_second": spread(values),
            "ratio": ratios(values, rates.get(plain)),
            "ratio_to_lean": ratios(values, rates.get(lean)),
        }
        for name, values in rates.items()
    ]
    print(table(results))
    if options.out:
        write(options.out, options, {"results": results}, table(results))


if __name__ == "__main__":
    main()
