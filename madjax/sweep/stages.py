"""What a sweep computes, stage by stage: functions of what they read, without files or devices.

    victim -> posteriors -> answers -> transfer set -> stolen model

`victim_posteriors` and `answers` belong to a victim and its defence, and many cells share them.
Answers at all strengths are made in one pass over the queries; what the defence needs to know of a
query (for MAD: its Gram matrix) lives as long as its chunk of queries. The others are of a single
cell: `begin` and `proceed` make its transfer set, `start` and `advance` its stolen model, and
`fidelity` judges that. Settings come first, then what the cell is, then what many cells read:
`mesh.over_cells` compiles each for a wave of cells.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import lru_cache, partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from madjax import defenses, evaluate
from madjax import train as training
from madjax.attacks import Attack, Transfer, World, keys
from madjax.batching import QUERIES, map_chunks
from madjax.datasets import Family
from madjax.defenses import Defense, prediction_api
from madjax.models import Classifier
from madjax.recipe import Recipe, order
from madjax.sharing import shared_out
from madjax.streams import stream
from madjax.train import State, percent

Array = jax.Array


@dataclass(frozen=True)
class Parties:
    """The networks of victim and attacker, and what their images are; hashable, without arrays.

    network is the victim's and the surrogate's, stolen the attacker's, both with num_classes
    outputs; the attacker's own images have num_labels classes.
    """

    network: Classifier
    stolen: Classifier
    family: Family
    num_classes: int
    num_labels: int

    @property
    def networks(self) -> tuple[Classifier, Classifier]:
        """Both."""
        return self.network, self.stolen


class Point(NamedTuple):
    """The numbers in which the cells of a wave differ; with a leading axis, those of a wave."""

    strength: Array
    """Of the defence."""
    seed: Array
    task: Array = np.int32(0)
    """Position of the cell's task in the tables `Api.victim`, `Own` and `Tests`."""
    known: Array = np.int32(0)
    """Position of task and seed in `Api.known`."""
    told: Array | None = None
    """The answers [Q, K] to the queries of the attack, in order, if they were foreseen."""


class Api(NamedTuple):
    """What stands behind the defended prediction APIs of a group of cells."""

    victim: Any
    """The victims' parameters, with a leading axis of tasks."""
    known: Any
    """What the defence has prepared (for MAD: surrogates), with one of tasks and seeds."""


@jax.tree_util.register_static
@dataclass(frozen=True)
class Unseen:
    """Images that stay on the host; an attack that looks at one of them fails as it is traced."""

    shape: tuple[int, ...]


class Own(NamedTuple):
    """The attackers' own images [T, N, H, W, C] of T tasks, and their classes [T, N]."""

    images: Array | Unseen
    labels: Array


class Tests(NamedTuple):
    """The test sets of T tasks, by which stolen models are judged."""

    images: Array
    labels: Array
    posteriors: Array
    """The victim's, undefended."""


def entry(table: Any, at: Array) -> Any:
    """One entry of a table, or the only one, which all cells then share without a copy each."""
    return jax.tree.map(lambda a: a[0] if len(a) == 1 else a[at], table)


Over = Callable[..., Callable[[Any, Any], Any]]
"""over(function, *settings) -> compiled(rows, shared): function(*settings, rows, shared), by rows.

The function takes many rows, each with a result of its own, which may so be made anywhere.
"""


@lru_cache(maxsize=128)
def on_one_device(function: Callable[..., Any], *settings: Any) -> Callable[[Any, Any], Any]:
    """The `Over` that spreads nothing; equal settings share a program."""

    def run(rows: Any, shared: Any) -> Any:
        return function(*settings, rows, shared)

    run.__name__ = function.__name__  # as the compiler's log says
    return jax.jit(run)


def victim_posteriors(
    network: Classifier,
    params: Any,
    images: np.ndarray,
    *,
    over: Over = on_one_device,
    chunk: int = QUERIES,
) -> np.ndarray:
    """The victim's posteriors y [N, K] of images [N, H, W, C], made for `chunk` at a time."""
    ask, count = over(posterior, network), len(images)
    found = [np.asarray(ask(images[some], params)) for some in _chunks(count, chunk)]
    return np.concatenate(found)[:count]


def _chunks(count: int, size: int, first: int = 0) -> Iterator[np.ndarray]:
    """Rows in chunks; the last is filled up with copies, so that one program serves all."""
    size = min(count, size)
    for at in range(first, count, size):
        yield np.minimum(np.arange(at, at + size), count - 1)


def posterior(network: Classifier, images: Array, params: Any) -> Array:
    """`victim_posteriors` of the images of one device."""
    return map_chunks(partial(network.posterior, params), images, 250)


def answers(
    rule: Defense,
    network: Classifier,
    known: Any,
    key: Array,
    images: np.ndarray,
    y: np.ndarray,
    strengths: tuple[float, ...],
    *,
    sent: np.ndarray | None = None,
    over: Over = on_one_device,
    chunk: int = QUERIES,
    told: np.ndarray | None = None,
    done: int = 0,
    after_chunk: Callable[[int], None] = lambda done: None,
) -> np.ndarray:
    """The answers to Q queries at each of E strengths: float32 [E, Q, K].

    Query i sends images[sent[i]]; by default each image is sent once, in order. images [N, H, W, C]
    are all sent at least once, and y [N, K] are the victim's posteriors of them; known is what the
    rule has prepared, and its randomness a function of key and a query's content, or of its number.
    What the rule has to know of an image is made once, for `chunk` images at a time. told is the
    array to write to, where the queries of the first `done` images are answered; after_chunk(done)
    is called after each chunk.
    """
    count = len(y)
    numbers = _senders(np.arange(count) if sent is None else sent)
    if told is None:
        told = np.empty((len(strengths), int(numbers.max()) + 1, y.shape[1]), np.float32)
    answer = over(at_strengths, rule, network)
    for some in _chunks(count, chunk, done):
        rows = numbers[some], images[some], y[some]
        found = np.asarray(answer(rows, (known, key, np.float32(strengths))))
        asked = numbers[some] >= 0
        told[:, numbers[some][asked]] = np.moveaxis(found[asked], 1, 0)
        after_chunk(int(some[-1]) + 1)
    return told


def _senders(sent: np.ndarray) -> np.ndarray:
    """The numbers of the queries that send each image, int32 [N, most]; -1 fills up."""
    times = np.bincount(sent)
    order = np.argsort(sent, kind="stable")
    first = np.cumsum(times) - times
    numbers = np.full((len(times), times.max()), -1, np.int32)
    numbers[sent[order], np.arange(len(sent)) - first[sent[order]]] = order
    return numbers


def at_strengths(
    rule: Defense,
    network: Classifier,
    rows: tuple[Array, Array, Array],
    shared: tuple[Any, Array, Array],
) -> Array:
    """`answers` to queries (numbers [B, R], images [B, H, W, C], y [B, K]): [B, R, E, K].

    shared = (known, key, strengths [E]). Each of B images is sent by R queries.
    """
    numbers, images, y = rows
    known, key, strengths = shared
    evidence = rule.evidence(network.apply, known, images)

    def at(strength: Array) -> Array:
        def of(numbers: Array) -> Array:
            return defenses.answers(rule, key, images, y, evidence, strength, numbers)

        # Queries that send one image are told the same, unless each is answered anew.
        return jax.lax.map(of, numbers.T if rule.is_fresh else numbers.T[:1])

    told = jnp.transpose(jax.lax.map(at, strengths), (2, 1, 0, 3))
    return jnp.broadcast_to(told, (*numbers.shape, *told.shape[2:]))


def tests_key(rule: Defense, seed: Array | int) -> Array:
    """The key of the answers to test images: that of queries, unless noise goes by number."""
    key = keys(seed)["defense"]
    return stream(key, "tests") if rule.is_fresh else key


@jax.jit
def utility(y: Array, y_tilde: Array, labels: Array) -> dict[str, Array]:
    """`madjax.evaluate.utility` at each of E strengths: y [T, K], y_tilde [E, T, K] -> [E] each."""
    return jax.lax.map(lambda told: evaluate.utility(y, told, labels), y_tilde)


def begin(
    parties: Parties,
    attack: Attack,
    rule: Defense | None,
    cell: Point,
    shared: tuple[Own, Api | None],
) -> Transfer:
    """The attack's first queries. With `Point.told` the rule and what is behind it are not used."""
    return attack.begin(_world(parties, attack, rule, cell, *shared))


def proceed(
    parties: Parties,
    attack: Attack,
    rule: Defense | None,
    cell: tuple[Point, Transfer],
    shared: tuple[Own, Api | None, Array],
) -> Transfer:
    """Round r of the attack's queries; shared ends with r."""
    point, transfer = cell
    own, api, r = shared
    return attack.proceed(r, transfer, _world(parties, attack, rule, point, own, api))


def _world(
    parties: Parties,
    attack: Attack,
    rule: Defense | None,
    cell: Point,
    own: Own,
    api: Api | None,
) -> World:
    """What the attacker of a cell knows, its prediction API included."""
    key = keys(cell.seed)
    if cell.told is None:
        victim, known = entry(api.victim, cell.task), entry(api.known, cell.known)
        respond = prediction_api(
            rule, parties.network, victim, known, key["defense"], cell.strength
        )
        told = None
    else:
        respond = unanswered(parties.num_classes)

        def told(numbers: Array, index: Array) -> Array:
            del index  # those of the queries of these numbers, which was tried (`foreseen`)
            return cell.told[numbers]

    if isinstance(own.images, Unseen):
        images = jax.ShapeDtypeStruct(own.images.shape[1:], jnp.uint8)
    else:
        images = entry(own.images, cell.task)
    return World(
        respond,
        attack.budget,
        images,
        entry(own.labels, cell.task),
        parties.num_labels,
        parties.num_classes,
        parties.stolen,
        parties.family,
        key["draw"],
        told,
    )


def unanswered(num_classes: int) -> Callable[[Array, Array], Array]:
    """A victim that answers NaN: for attacks whose every answer is known before."""

    def respond(numbers: Array, images: Array) -> Array:
        del images
        return jnp.full((len(numbers), num_classes), jnp.nan)

    return respond


def start(
    stolen: Classifier, recipe: Recipe, size: int, cell: Point, shared: dict[str, Array] | None
) -> State:
    """A fresh stolen model, to be trained on a transfer set of `size` examples.

    shared: what of it is there (`Recipe.initial`).
    """
    return training.start(stolen, recipe, size, keys(cell.seed)["train"], shared)


def advance(
    stolen: Classifier,
    recipe: Recipe,
    size: int,
    cell: tuple[Point, Transfer, State],
    shared: tuple[Array, Tests, Array],
) -> State:
    """One epoch of the stolen model, and its accuracy after it; whatever the defence was.

    shared = (own images [T, N, H, W, C], tests, count): of the transfer set the first `count`
    examples are trained on, so that one program serves all budgets.
    """
    point, transfer, state = cell
    own, tests, count = shared
    if transfer.x.ndim == 1 and len(own) > 1:  # read where they are, without a copy for each cell
        transfer = transfer._replace(x=transfer.x + point.task * own.shape[1])
    images = own.reshape(-1, *own.shape[2:])
    judged = entry(tests, point.task)
    return training.epoch(
        stolen,
        recipe,
        state,
        lambda i: transfer.take(images, i),
        size,
        judged.images,
        judged.labels,
        count,
    )


def visited(size: int, cell: State, count: Array) -> Array:
    """The order in which the next epoch of `advance` visits a transfer set, int32 [size].

    Its first `count` are all examples that are trained on.
    """
    return order(jax.random.wrap_key_data(cell.key), cell.epoch, size, count)


def advance_part(
    stolen: Classifier,
    recipe: Recipe,
    cell: tuple[Transfer, State, Array],
    shared: tuple[Array, Array, Array],
) -> State:
    """Some steps of `advance` on images of the cell's own [R, H, W, C] (`madjax.train.Part`).

    shared = (count, first, stop). `judged` follows the last steps of an epoch.
    """
    transfer, state, images = cell
    count, first, stop = shared
    part = training.Part(images, first, stop)
    return training.part_of_pass(stolen, recipe, state, part, transfer.targets, count)


def judged(stolen: Classifier, cell: tuple[Point, State], tests: Tests) -> State:
    """The state after an epoch, with the accuracy on the test set."""
    point, state = cell
    own = entry(tests, point.task)
    return training.judge(stolen, state, own.images, own.labels)


def fidelity(stolen: Classifier, cell: tuple[Point, State], tests: Tests) -> Array:
    """The share of test images with the victim's own top class, in percent; NaN if diverged."""
    point, state = cell
    judged = entry(tests, point.task)
    logits = map_chunks(lambda x: stolen.apply(state.params, shared_out(x)), judged.images, 250)
    agree = percent(logits.argmax(-1) == judged.posteriors.argmax(-1))
    return jnp.where(jnp.isfinite(state.accuracy[-1]), agree, jnp.nan)
