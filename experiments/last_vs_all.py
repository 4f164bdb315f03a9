"""Last-layer against all-parameter gradients: do they choose the same y*, and do they meet?

Claim: the authors' code (the last layer's weight) and the paper (Eq. 5, all parameters) are two
different defences on LeNet. In the limit of infinite width the tangent kernel over logits of a
random network is a multiple of the identity, so that M ~ (I - 1 p')(I - 1 p')', the last layer's M:
the two meet as the surrogate is widened.
Command: MADJAX_DATA=DIR python experiments/last_vs_all.py --out DIR2     (MNIST, Kassel letters)
         python experiments/last_vs_all.py --embedded                      (without any data files)
Cost: about 6 minutes on 2 CPU cores, most of it the surrogate of width 8.

A victim (LeNet, `--epochs` epochs) answers `--queries` test images of its own kind and as many
query images. For every width of the random surrogate, and every seed: how often both kinds of
gradients choose the same vertex, the share of the most frequent vertex and the entropy in bits of
the chosen ones, and the distance |A - B| / |A + B|, in [0, 1], of the two Gram matrices over their
traces, in Frobenius norm, mean over the queries. Written as `study.jsonl`, a table and a curve.
"""

import argparse
import json
import statistics
from functools import partial
from pathlib import Path

import jax
import jax.numpy as jnp
import matplotlib
import numpy as np
from measuring import SETS, parse, source

from madjax import Classifier, LeNet, Recipe, extreme, fit, gram, open_dataset
from madjax.batching import map_chunks

CHOSEN = jax.jit(jax.vmap(lambda y, m: extreme(y, m).argmax()))


@jax.jit
def distance(a, b):
    """|A - B| / |A + B| of Gram matrices [B, K, K] over their traces, mean over the queries."""
    a, b = (m / jnp.trace(m, axis1=1, axis2=2)[:, None, None] for m in (a, b))
    norm = partial(jnp.linalg.norm, axis=(1, 2))
    return (norm(a - b) / norm(a + b)).mean()


def concentration(labels, k):
    """The share in percent of the most frequent label, and the entropy of all in bits."""
    share = np.bincount(np.asarray(labels), minlength=k) / len(labels)
    known = share[share > 0]
    return 100 * float(share.max()), float(-(known * np.log2(known)).sum())


def compare(surrogate, params, images, y):
    """One surrogate on one set of queries."""
    grams = {kind: gram(surrogate.apply, params, images, layers=kind) for kind in ("last", "all")}
    chosen = {kind: CHOSEN(y, m) for kind, m in grams.items()}
    row = {
        "agreement": 100 * float((chosen["last"] == chosen["all"]).mean()),
        "distance": float(distance(grams["last"], grams["all"])),
    }
    for kind, labels in chosen.items():
        share, entropy = concentration(labels, y.shape[1])
        row |= {f"largest_share_{kind}": share, f"entropy_{kind}": entropy}
    return row


def table(rows):
    """Markdown: mean and sample standard deviation over the seeds."""
    fields = ("distance", "agreement", "largest_share_last", "largest_share_all")
    fields += ("entropy_last", "entropy_all")
    lines = [
        "| queries | width | n | distance | same y* % | top vertex % (last) | top vertex % (all) "
        "| entropy, bits (last) | entropy, bits (all) |",
        "| --- | --: | --: | --: | --: | --: | --: | --: | --: |",
    ]
    for queries, width in dict.fromkeys((r["queries"], r["width"]) for r in rows):
        same = [r for r in rows if (r["queries"], r["width"]) == (queries, width)]
        cells = []
        for field in fields:
            values = [r[field] for r in same]
            std = statistics.stdev(values) if len(values) > 1 else 0.0
            digits = 3 if field == "distance" else 2 if field.startswith("entropy") else 1
            cells.append(f"{statistics.mean(values):.{digits}f} ± {std:.{digits}f}")
        lines.append(f"| {queries} | {width} | {len(same)} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def figure(rows, path):
    """The distance and the agreement against the width."""
    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    fig, axes = plt.subplots(1, 2, figsize=(8, 3.2), layout="constrained")
    for axis, field, title in (
        (axes[0], "distance", "distance of the two Gram matrices"),
        (axes[1], "agreement", "queries with the same y*, %"),
    ):
        for queries in dict.fromkeys(r["queries"] for r in rows):
            widths = sorted({r["width"] for r in rows})
            values = [
                [r[field] for r in rows if (r["queries"], r["width"]) == (queries, width)]
                for width in widths
            ]
            mean = np.array([np.mean(v) for v in values])
            std = np.array([np.std(v, ddof=1) if len(v) > 1 else 0 for v in values])
            axis.errorbar(widths, mean, yerr=std, marker="o", capsize=3, label=queries)
        axis.set(xscale="log", xlabel="width of the random LeNet", title=title, ylim=(0, None))
        axis.set_xticks(widths, [f"{w}x" for w in widths])
        axis.minorticks_off()
        axis.legend()
    fig.savefig(path, dpi=150)


def main():
    """Train the victim, compare, write."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument(
        "--embedded", dest="sets", action="store_const", const="embedded", default="full"
    )
    parser.add_argument("--data-dir", type=Path)
    parser.add_argument("--epochs", type=int, default=5, help="of the victim")
    parser.add_argument("--queries", type=int, default=500)
    parser.add_argument("--widths", type=int, nargs="+", default=[1, 2, 4, 8])
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--out", type=Path, default=Path("runs/last_vs_all"))
    options = parse(parser, sets="smoke", epochs=1, queries=8, widths=[1], seeds=2)
    victim_set, query_set = (open_dataset(name, options.data_dir) for name in SETS[options.sets])

    classifier = Classifier(LeNet(10), victim_set.family.preprocess, victim_set.image_shape)
    train, test = (
        (victim_set.x_train, victim_set.y_train),
        (victim_set.x_test, victim_set.y_test),
    )
    recipe = Recipe(epochs=options.epochs, learning_rate=0.1)
    victim = fit(classifier, recipe, jax.random.key(0), train, test)
    accuracy = float(victim.accuracy[-1])
    print(f"victim: {accuracy:.2f} % after {options.epochs} epochs")

    rng = np.random.default_rng(0)
    images = {}
    for name, pool in ((victim_set.name, test[0]), (query_set.name, query_set.x_train)):
        images[name] = pool[rng.choice(len(pool), options.queries, replace=False)]
    posterior = jax.jit(lambda x: map_chunks(partial(classifier.posterior, victim.params), x, 250))
    rows = []
    for width in options.widths:
        wide = Classifier(
            LeNet(10, width=width), victim_set.family.preprocess, victim_set.image_shape
        )
        for seed in range(options.seeds):
            params = jax.jit(wide.init)(jax.random.key(1000 + seed))
            for name, x in images.items():
                row = {
                    "queries": name,
                    "width": width,
                    "seed": seed,
                    "parameters": sum(a.size for a in jax.tree.leaves(params)),
                    "victim_accuracy": accuracy,
                    "victim_epochs": options.epochs,
                    "n_queries": len(x),
                    **source(),
                    **compare(wide, params, x, posterior(jnp.asarray(x))),
                }
                rows.append(row)
                print(json.dumps(row), flush=True)
    options.out.mkdir(parents=True, exist_ok=True)
    (options.out / "study.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (options.out / "report.md").write_text(table(rows) + "\n")
    figure(rows, options.out / "width.png")
    print(table(rows))


if __name__ == "__main__":
    main()
