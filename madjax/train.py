"""The one training loop, for victims and attackers: pure functions of a key.

`start` makes a state, `epoch` advances it by one pass over the data; both are jit-able and map
over keys, labels or data with `vmap` or `lax.map`. `fit` is the loop around them.
"""

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from madjax.batching import map_chunks
from madjax.errors import InputError
from madjax.models import Classifier

Array = jax.Array


def sgd(
    learning_rate: optax.Schedule, momentum: float, weight_decay: float
) -> optax.GradientTransformation:
    """SGD with heavy-ball momentum; weight decay is added to the gradient, as PyTorch does.

    v <- momentum v + g + weight_decay w;  w <- w - learning_rate(t) v.
    """
    decay = optax.add_decayed_weights(weight_decay) if weight_decay else optax.identity()
    return optax.chain(decay, optax.sgd(learning_rate, momentum=momentum or None))


@dataclass(frozen=True)
class Recipe:
    """How a network is trained; the defaults are the paper's for LeNet victims and attackers.

    The learning rate is multiplied by `decay` every `decay_epochs` epochs (0: never).
    `optimizer(learning_rate=, momentum=, weight_decay=)` returns any optax transformation;
    learning_rate is a schedule, from the count of steps to a rate.
    """

    epochs: int = 30
    batch_size: int = 64
    learning_rate: float = 0.1
    momentum: float = 0.5
    weight_decay: float = 0.0
    decay: float = 0.1
    decay_epochs: int = 50
    optimizer: Callable[..., optax.GradientTransformation] = sgd

    def __post_init__(self) -> None:
        for name in ("epochs", "batch_size"):
            if getattr(self, name) < 1:
                raise InputError(f"{name} is {getattr(self, name)}: give a whole number >= 1")
        for name in ("learning_rate", "momentum", "weight_decay", "decay", "decay_epochs"):
            if not 0 <= getattr(self, name) < float("inf"):
                raise InputError(f"{name} is {getattr(self, name)}: give a number >= 0")
        try:
            self.transformation(1)
        except TypeError as error:
            raise InputError(
                f"optimizer {self.optimizer} does not take learning_rate, momentum and "
                f"weight_decay ({error}): wrap it in a function that does"
            ) from error

    def transformation(self, num_examples: int) -> optax.GradientTransformation:
        """The optax transformation for a data set of this many examples."""
        steps = -(-num_examples // self.batch_size)

        def schedule(count: Array) -> Array:
            drops = count // (self.decay_epochs * steps) if self.decay_epochs else 0
            return self.learning_rate * self.decay**drops

        return self.optimizer(
            learning_rate=schedule, momentum=self.momentum, weight_decay=self.weight_decay
        )


class State(NamedTuple):
    """A training run between two epochs: everything that `epoch` needs to go on."""

    params: Any
    opt_state: Any
    key: Array
    """uint32 key data; the order of epoch e is a function of (key, e) alone."""
    epoch: Array
    """Epochs done, int32."""
    accuracy: Array
    """Percent on the test set after each epoch, float32 [recipe.epochs], NaN where not yet run."""
    loss: Array
    """Mean training loss of each epoch, float32 [recipe.epochs]."""


def start(classifier: Classifier, recipe: Recipe, num_examples: int, key: Array) -> State:
    """A fresh network and optimiser, functions of the key alone."""
    init_key, order_key = jax.random.split(key)
    params = classifier.init(init_key)
    unknown = jnp.full(recipe.epochs, jnp.nan, jnp.float32)
    return State(
        params,
        recipe.transformation(num_examples).init(params),
        jax.random.key_data(order_key),
        jnp.zeros((), jnp.int32),
        unknown,
        unknown,
    )


def order(key: Array, epoch: Array | int, num_examples: int) -> Array:
    """The order in which an epoch visits the examples: a permutation of num_examples, int32."""
    return jax.random.permutation(jax.random.fold_in(key, epoch), num_examples)


def cross_entropy(logits: Array, targets: Array) -> Array:
    """-sum_k y~_k log softmax(logits)_k for every example: [B, K], [B, K] -> [B]."""
    return -jnp.sum(targets * jax.nn.log_softmax(logits), axis=-1)


def epoch(
    classifier: Classifier,
    recipe: Recipe,
    state: State,
    take: Callable[[Array], tuple[Array, Array]],
    num_examples: int,
    x_test: Array,
    labels_test: Array,
) -> State:
    """One pass over the training set in shuffled batches, then the accuracy on the test set.

    take(indices[B]) -> (images [B, H, W, C], targets [B, K]) reads the training set, so that
    examples may be shared between runs or made on the fly. Targets are any distribution over
    classes: posteriors, or one-hot labels. The last batch of an epoch may be smaller, as PyTorch's
    loader has it: its missing examples get weight 0.
    """
    optimizer = recipe.transformation(num_examples)
    steps = -(-num_examples // recipe.batch_size)
    visit = order(jax.random.wrap_key_data(state.key), state.epoch, num_examples)
    padded = jnp.pad(visit, (0, steps * recipe.batch_size - num_examples))
    weights = (jnp.arange(padded.size) < num_examples).astype(jnp.float32)
    batches = jax.tree.map(lambda a: a.reshape(steps, -1), (padded, weights))

    def loss(params: Any, indices: Array, weight: Array) -> Array:
        x, targets = take(indices)
        losses = cross_entropy(classifier.apply(params, x), targets)
        return jnp.sum(weight * losses) / jnp.sum(weight)

    def step(carry: tuple[Any, Any], batch: tuple[Array, Array]) -> tuple[tuple[Any, Any], Array]:
        params, opt_state = carry
        value, gradient = jax.value_and_grad(loss)(params, *batch)
        updates, opt_state = optimizer.update(gradient, opt_state, params)
        return (optax.apply_updates(params, updates), opt_state), value

    (params, opt_state), losses = jax.lax.scan(step, (state.params, state.opt_state), batches)
    accuracy = 100 * correct(classifier, params, x_test, labels_test).mean(dtype=jnp.float32)
    return State(
        params,
        opt_state,
        state.key,
        state.epoch + 1,
        state.accuracy.at[state.epoch].set(accuracy),
        state.loss.at[state.epoch].set(losses.mean()),
    )


def correct(classifier: Classifier, params: Any, x: Array, labels: Array) -> Array:
    """Whether the top class is the label, bool [N]; the lowest of equal classes counts as top."""
    return map_chunks(lambda x: classifier.apply(params, x).argmax(-1), x, 250) == labels


def fit(
    classifier: Classifier,
    recipe: Recipe,
    key: Array,
    data: tuple[Array, Array],
    test: tuple[Array, Array],
    *,
    state: State | None = None,
    after_epoch: Callable[[State], None] = lambda state: None,
) -> State:
    """Train from a key, or go on from a state, calling after_epoch(state) after every epoch.

    data = (images uint8 [N, H, W, C], targets [N, K]: posteriors, or labels [N]); test = (images,
    labels). The result holds the last parameters and the accuracy after each epoch: the last is
    `state.accuracy[-1]`, the best `state.accuracy.max()`.

    Raises:
        InputError: targets that do not fit the images or the network.
    """
    images, targets = data[0], jnp.asarray(data[1])
    n, classes = jax.eval_shape(
        lambda k, x: classifier.apply(classifier.init(k), x), key, jnp.asarray(images)
    ).shape
    if targets.shape not in ((n,), (n, classes)):
        raise InputError(
            f"{n} images have targets of shape {targets.shape}: give labels [{n}] or posteriors "
            f"[{n}, {classes}]"
        )
    if targets.ndim == 1:
        if n and not 0 <= int(targets.min()) <= int(targets.max()) < classes:
            raise InputError(
                f"labels run from {targets.min()} to {targets.max()}: the network has {classes} "
                "classes, from 0"
            )
        targets = jax.nn.one_hot(targets, classes)
    if state is None:
        state = _start(classifier, recipe, n, key)
    images, test = jnp.asarray(images), tuple(map(jnp.asarray, test))
    for _ in range(int(state.epoch), recipe.epochs):
        state = _advance(classifier, recipe, state, images, targets, *test)
        after_epoch(jax.block_until_ready(state))
    return state


# Compiled once for all runs of one network, recipe and size.
_start = jax.jit(start, static_argnums=(0, 1, 2))


@partial(jax.jit, static_argnums=(0, 1))
def _advance(
    classifier: Classifier,
    recipe: Recipe,
    state: State,
    images: Array,
    targets: Array,
    x_test: Array,
    labels_test: Array,
) -> State:
    def take(i: Array) -> tuple[Array, Array]:
        return images[i], targets[i]

    return epoch(classifier, recipe, state, take, len(targets), x_test, labels_test)
