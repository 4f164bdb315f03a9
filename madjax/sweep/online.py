"""Cells of the white-box study: an attacker trained online, its evaluations and its trace."""

from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from madjax import store
from madjax.attacks import keys
from madjax.attacks.online import Training, begin, lap
from madjax.batching import map_chunks
from madjax.config import digest
from madjax.constraints import l1
from madjax.defenses import answers
from madjax.evaluate import utility
from madjax.linear import dot
from madjax.streams import stream
from madjax.sweep.campaign import Campaign, Place, check_answers
from madjax.sweep.cells import Point, Program, Shared
from madjax.sweep.clock import Stopwatch
from madjax.sweep.rows import after, number, numbers
from madjax.train import cross_entropy, finite, percent

Array = jax.Array

BINS = 180
"""Of the histogram of angles in rows: one degree each."""
QUANTILES = (5, 25, 50, 75, 95)
"""Percent; rows have the angle at each."""


@dataclass(frozen=True)
class OnlineProgram(Program):
    """The functions of one cell of the white-box study."""

    @property
    def laps(self) -> int:
        """See `Program.laps`."""
        return self.attack.laps

    def rehearse(self, cell: Point, shared: Shared) -> None:
        """See `Program.rehearse`."""
        training = self.advance((cell, self.start(cell, shared)), shared)
        self.judge((cell, training), shared)

    def start(self, cell: Point, shared: Shared) -> Training:
        """A fresh attacker, with its images and the victim's posteriors of them."""

        def posterior(images: Array) -> Array:
            return map_chunks(lambda x: self.network.posterior(shared.victim, x), images, 250)

        return begin(self.attack, self.stolen, keys(cell.seed), shared.images, posterior)

    def advance(self, cell: tuple[Point, Training], shared: Shared) -> Training:
        """The steps up to the next evaluation."""
        cell, training = cell
        key = keys(cell.seed)["defense"]

        def respond(attacker: Any, numbers: Array, x: Array, y: Array) -> Array:
            evidence = self._evidence(cell, attacker, shared, x)
            return answers(self.defense, key, y, evidence, cell.strength, numbers)

        distance = getattr(self.defense, "distance", l1)
        return lap(self.attack, self.stolen, training, shared.images, respond, distance)

    def judge(self, cell: tuple[Point, Training], shared: Shared) -> dict[str, Array]:
        """The attacker on the test set, and the defence's utility on the first of its images."""
        cell, training = cell

        def test(example: tuple[Array, Array]) -> tuple[Array, Array]:
            x, labels = example
            logits = self.stolen.apply(training.params, x)
            one_hot = jax.nn.one_hot(labels, self.num_classes)
            return logits.argmax(-1) == labels, cross_entropy(logits, one_hot)

        losses = training.trace.loss
        done = jnp.arange(losses.size) < training.step
        sound = finite((training.params, jnp.where(done, losses, 0)))

        hits, test_losses = map_chunks(test, (shared.test_images, shared.test_labels), 250)
        few = slice(self.attack.judged)
        y = shared.test_posteriors[few]
        handed = training.surrogate if self.attack.refresh > 1 else training.params
        told = answers(
            self.defense,
            stream(keys(cell.seed)["defense"], "tests"),
            y,
            self._evidence(cell, handed, shared, shared.test_images[few]),
            cell.strength,
        )
        return utility(y, told, shared.test_labels[few]) | {
            # From where it diverges on; the top class of NaN would be class 0.
            "attacker_accuracy": jnp.where(sound, percent(hits), jnp.nan),
            "test_loss": test_losses.mean(),
        }

    def _evidence(self, cell: Point, attacker: Any, shared: Shared, x: Array) -> Any:
        """What the defence makes of queries: of the attacker's own network where it has it."""
        if self.defense.has_surrogate and self.attack.refresh:
            return self.defense.evidence(self.stolen.apply, attacker, x)
        known = jax.tree.map(lambda a: a[cell.at], shared.known)
        return self.defense.evidence(self.network.apply, known, x)


class OnlineCampaign(Campaign):
    """Waves of online attackers, evaluated and checkpointed after each lap."""

    def __init__(self, program: OnlineProgram, *rest: Any):
        super().__init__(program, *rest)
        self.start, self.advance, self.judge = (
            self.over(f) for f in (program.start, program.advance, program.judge)
        )

    def run(self, wave: list[Place], stacked: Point) -> None:
        """Train the attackers of a wave together; their rows and their trace."""
        missing = self.missing(self.attack.budget, wave)
        name = f"{self.name}-wave-{digest(wave)}-of-{stacked.seed.size}-cells"
        training = self.start(stacked, self.shared)
        origin = training.params
        judged = jax.eval_shape(self.judge, (stacked, training), self.shared)
        laps = {
            field: np.full((self.attack.laps, len(stacked.seed)), np.nan, np.float32)
            for field in (*judged, "direction_kept")
        }
        watch, first = Stopwatch(), 0
        saved = store.restore(self.directory, name, (training, laps, np.zeros(())))
        if saved is not None:
            training = jax.device_put(saved[0], self.sharding)
            laps, watch.running = saved[1], float(saved[2])
            first = -(-int(training.step[0]) // self.attack.every)
        self.bar.update(len(missing) * first)
        for at in range(first, self.attack.laps):
            with watch:
                training = self.advance((stacked, training), self.shared)
                results = self.judge((stacked, training), self.shared)
                for place, distance in zip(wave, np.asarray(results["l1_mean"]), strict=False):
                    check_answers(self.program.defense, *place, distance)
                results["direction_kept"] = direction_kept(
                    stacked, np.asarray(_products(origin, training.params))
                )
                for field, values in results.items():
                    laps[field][at] = values
            store.save(self.directory, name, at + 1, (training, laps, np.asarray(watch.running)))
            self.bar.update(len(missing))
        self._write(wave, missing, training, laps, watch)
        store.discard(self.directory, name)

    def _write(
        self,
        wave: list[Place],
        missing: list[int],
        training: Training,
        laps: dict[str, np.ndarray],
        watch: Stopwatch,
    ) -> None:
        """The trace of a wave, then its rows."""
        trace = {
            field: np.asarray(values)[: len(wave)]
            for field, values in training.trace._asdict().items()
        }
        said = self.program.defense.describe() | self.attack.describe()
        store.save_trace(
            self.directory,
            self.name,  # of all cells; where the grid has grown, in place of an older one
            trace
            | {"strength": np.array([s for s, _ in wave]), "seed": np.array([s for _, s in wave])}
            | {field: np.array(value) for field, value in said.items()},
        )
        rows = {}
        for i in missing:
            course = {field: values[:, i] for field, values in laps.items()}
            row = _settings(self.attack) | _evaluated(course)
            row |= _summary(self.attack, {k: v[i] for k, v in trace.items()})
            losses = np.array(row["train_losses"], float)
            row |= after(course["attacker_accuracy"], losses, self.program.num_classes)
            rows[wave[i]] = row | {
                "seconds": round(watch.running / len(wave), 3),
                "seconds_compiling": round(watch.compiling / len(wave), 3),
            }
        self.finish(self.attack.budget, rows)


@jax.jit
def _products(origin: Any, params: Any) -> Array:
    """Inner products [cells, cells] of the cells' ways from their first parameters."""
    total = jnp.zeros(())
    for old, new in zip(*map(jax.tree.leaves, (origin, params)), strict=True):
        way = (new - old).reshape(len(new), -1)
        total += dot(way, way.T)
    return total


def direction_kept(cells: Point, products: np.ndarray) -> np.ndarray:
    """Cosine between a cell's way and the undefended one's of its seed; NaN where there is none."""
    lengths = np.sqrt(np.diagonal(products))
    clean = (cells.strength == 0)[None, :] & (cells.seed[:, None] == cells.seed[None, :])
    twin = clean.argmax(1)
    cosine = np.full(len(lengths), np.nan, np.float32)
    size = lengths * lengths[twin]
    known = clean.any(1) & (size > 0)
    cosine[known] = (products[np.arange(len(twin)), twin] / np.where(size > 0, size, 1))[known]
    return np.clip(cosine, -1, 1)


def _settings(attack: Any) -> dict[str, Any]:
    """The fields of a row that say how the attacker trained."""
    return {
        "queries": attack.budget,
        "steps": attack.steps,
        "batch_size": attack.recipe.batch_size,
        "learning_rate": attack.recipe.learning_rate,
        "refresh": attack.refresh,
        "n_judged": attack.judged,
    }


def _evaluated(laps: dict[str, np.ndarray]) -> dict[str, Any]:
    """The fields of a row from its evaluations: the last of each, and the course of some."""
    row = {field: number(values[-1]) for field, values in laps.items()}
    courses = {
        "test_losses": "test_loss",
        "defender_accuracies": "defender_accuracy",
        "directions_kept": "direction_kept",
    }
    return row | {name: numbers(laps[field]) for name, field in courses.items()}


def _summary(attack: Any, trace: dict[str, np.ndarray]) -> dict[str, Any]:
    """The fields of a row from its trace; `steps_at` are the steps of the evaluations."""
    angle = trace["angle"]
    ends = [min((i + 1) * attack.every, attack.steps) for i in range(attack.laps)]
    pieces = [slice(i * attack.every, end) for i, end in enumerate(ends)]
    counts, _ = np.histogram(np.clip(angle, 0, 180), BINS, (0, 180))
    return {
        "angle_mean": number(angle.mean(dtype=np.float64)),
        "angle_std": number(angle.std(dtype=np.float64)),
        "angle_max": number(angle.max()),
        **{f"angle_p{q:02}": number(np.percentile(angle, q)) for q in QUANTILES},
        "angle_histogram": counts.tolist(),
        "distance_used_mean": number(trace["distance_used"].mean(dtype=np.float64)),
        "unchanged": number(100 * np.mean(trace["distance_used"] == 0)),
        "steps_at": ends,
        "angle_means": [number(angle[piece].mean(dtype=np.float64)) for piece in pieces],
        "train_losses": [number(trace["loss"][piece].mean(dtype=np.float64)) for piece in pieces],
    }
