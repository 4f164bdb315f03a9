"""The one training loop, for victims and attackers: pure functions of a key.

`start` makes a state, `epoch` advances it by one pass over the data; both are jit-able and map
over keys, labels or data with `vmap` or `lax.map`. `fit` is the loop around them.
"""

from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax.traverse_util import flatten_dict, unflatten_dict

from madjax.batching import map_chunks
from madjax.errors import InputError
from madjax.models import Classifier
from madjax.recipe import Lesson, Recipe, Take, trainable
from madjax.sharing import shared_out

Array = jax.Array


class State(NamedTuple):
    """A training run between two epochs: everything that `epoch` needs to go on."""

    params: Any
    opt_state: Any
    key: Array
    """uint32 key data; the order of epoch e is a function of (key, e) alone."""
    epoch: Array
    """Epochs done, int32."""
    accuracy: Array
    """Percent on the test set after each epoch, float32 [recipe.epochs]: NaN from the epoch on in
    which training diverged, -inf where not yet run."""
    loss: Array
    """Mean training loss of each epoch, float32 [recipe.epochs], -inf where not yet run."""


def start(
    classifier: Classifier,
    recipe: Recipe,
    num_examples: int,
    key: Array,
    initial: dict[str, Array] | None = None,
) -> State:
    """A fresh network and optimiser, functions of the key and of what is there (`Recipe.initial`).

    That is an argument, as a program would otherwise hold it as constants.
    """
    init_key, order_key = jax.random.split(key)
    params = classifier.init(init_key)
    if initial is not None:
        params = unflatten_dict(flatten_dict(params, sep="/") | initial, sep="/")
    unknown = jnp.full(recipe.epochs, -jnp.inf, jnp.float32)
    return State(
        params,
        recipe.transformation(num_examples).init(trainable(params)),
        jax.random.key_data(order_key),
        jnp.zeros((), jnp.int32),
        unknown,
        unknown,
    )


def one_pass(
    classifier: Classifier,
    recipe: Recipe,
    state: State,
    take: Take,
    num_examples: int,
    count: Array | None = None,
) -> State:
    """One epoch: a step of the optimiser for each gradient that the recipe makes of it.

    count: how many of the examples there are so far, when that is traced; num_examples then is the
    most there can be.
    """
    key = jax.random.wrap_key_data(state.key)
    drawn = recipe.batch_size, key, state.epoch, recipe.augment
    lesson = Lesson(take, num_examples, count, *drawn)
    optimizer, gradient_of = recipe.transformation(lesson.size), recipe.gradient(classifier, lesson)
    steps = -(-lesson.size // recipe.batch_size)

    def step(i: Array, carry: tuple[Any, Any, Array]) -> tuple[Any, Any, Array]:
        params, opt_state, total = carry
        trained = trainable(params)
        value, gradient, params = gradient_of(params, i)
        updates, opt_state = optimizer.update(gradient, opt_state, trained)
        return params | optax.apply_updates(trained, updates), opt_state, total + value

    begin = (state.params, state.opt_state, jnp.zeros((), jnp.float32))
    params, opt_state, total = jax.lax.fori_loop(0, steps, step, begin)
    return state._replace(
        params=params,
        opt_state=opt_state,
        epoch=state.epoch + 1,
        loss=state.loss.at[state.epoch].set(total / steps),
    )


def epoch(
    classifier: Classifier,
    recipe: Recipe,
    state: State,
    take: Take,
    num_examples: int,
    x_test: Array,
    labels_test: Array,
    count: Array | None = None,
) -> State:
    """One pass over the training set (`one_pass`), then the accuracy on the test set (`judge`)."""
    state = one_pass(classifier, recipe, state, take, num_examples, count)
    return judge(classifier, state, x_test, labels_test)


def train(
    classifier: Classifier,
    recipe: Recipe,
    key: Array,
    take: Take,
    num_examples: int,
    count: Array | None = None,
) -> Any:
    """The parameters of a fresh network after all epochs of the recipe, without any test.

    For networks that are a means, inside other compiled loops; see `one_pass` for count. They begin
    with random parameters: a recipe with a `start` is refused.
    """
    if recipe.start is not None:
        raise InputError(
            f"recipe has the start {recipe.start.path}: train begins with random parameters, leave "
            "start out, or use madjax.fit"
        )
    state = start(classifier, recipe, num_examples, key)

    def one(_: Array, state: State) -> State:
        return one_pass(classifier, recipe, state, take, num_examples, count)

    return jax.lax.fori_loop(0, recipe.epochs, one, state).params


def judge(classifier: Classifier, state: State, x_test: Array, labels_test: Array) -> State:
    """Write down the accuracy after the epoch that was done last, in percent.

    The lowest of equal classes counts as top. The accuracy is NaN from the epoch on in which a
    loss, a parameter or a logit is not finite: the top class of NaN would be class 0.
    """
    logits = map_chunks(lambda x: classifier.apply(state.params, shared_out(x)), x_test, 250)
    done = jnp.arange(state.loss.size) < state.epoch
    sound = finite((state.params, jnp.where(done, state.loss, 0))) & ~jnp.isnan(logits).any()
    accuracy = jnp.where(sound, percent(logits.argmax(-1) == labels_test), jnp.nan)
    return state._replace(accuracy=state.accuracy.at[state.epoch - 1].set(accuracy))


@partial(jax.jit, static_argnums=0)
def found(classifier: Classifier, variables: Any, x_test: Array, labels_test: Array) -> State:
    """A network that was trained elsewhere, as what came of no epochs; with its accuracy."""
    unknown = jnp.full(1, -jnp.inf, jnp.float32)
    untrained = State(variables, (), jnp.zeros(2, jnp.uint32), jnp.int32(0), unknown, unknown)
    return judge(classifier, untrained, x_test, labels_test)


def finite(tree: Any) -> Array:
    """Whether every number in a pytree of arrays is finite, bool."""
    return jnp.stack([jnp.isfinite(leaf).all() for leaf in jax.tree.leaves(tree)]).all()


def percent(hits: Array) -> Array:
    """The share of bool [N] that holds, in percent, float32 in [0, 100]."""
    # XLA multiplies by 1 / N where it knows N, which made 100.00001 % of some N.
    count = jax.lax.optimization_barrier(jnp.float32(hits.size))
    share = 100 * hits.sum(dtype=jnp.int32).astype(jnp.float32) / count
    return jnp.where(hits.all(), 100, share)


def check_converges(name: str, recipe: Recipe, state: State) -> None:
    """Refuse what a defence cannot stand on: a network of the victim's owner that diverged.

    Raises:
        InputError: it did; the error names the learning rate.
    """
    done = int(state.epoch)
    if not np.isfinite(np.asarray([state.accuracy[:done], state.loss[:done]])).all():
        raise InputError(
            f"training of the {name} diverged within {done} of {recipe.epochs} epochs "
            "(a loss or a parameter is not finite): its learning_rate is "
            f"{recipe.learning_rate:g}, give a smaller one"
        )


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
    """Train a network from a key, or go on from a state.

    It minimises L = - mean_i sum_k t_ik log F(x_i; w)_k, the L of Eq. 2 with targets t, by the
    recipe's optimiser on the gradients that the recipe makes, of shuffled batches by default.

    Args:
        classifier: the network.
        recipe: how it is trained.
        key: a `jax.random` key; the first parameters, but those of `recipe.start`, and the order
            are functions of it alone.
        data: (images uint8 [N, H, W, C], targets): posteriors [N, K], or labels [N] in 0 .. K-1.
        test: (images uint8 [T, H, W, C], labels [T]), on which it is judged after every epoch.
        state: where an earlier call stopped; without one training starts.
        after_epoch: called with the state after every epoch.

    Returns:
        The last state: its params, accuracy and loss float32 [epochs], in percent and in nats. The
        last accuracy is `state.accuracy[-1]`, the best `state.accuracy.max()`.

    Edge cases:
        labels: the same as one-hot posteriors.
        fewer images than a batch: one batch of all of them a step.
        a state that has done all epochs: it comes back, and nothing is trained.
        a stop between two epochs: going on from the state ends where no stop would have.
        a loss or a parameter that is not finite: the accuracy is NaN from that epoch on.

    Raises:
        InputError: targets that do not fit the images or the network; what `recipe.gradient`
            cannot train.

    Example:
        >>> import jax, jax.numpy as jnp, madjax
        >>> network = madjax.Classifier(madjax.MLP(2, (3,)), lambda x: x / 255, (2, 2, 1))
        >>> data = jnp.zeros((4, 2, 2, 1), jnp.uint8), jnp.ones(4, jnp.int32)
        >>> madjax.fit(network, madjax.Recipe(epochs=2), jax.random.key(0), data, data).accuracy
        Array([100., 100.], dtype=float32)
    """
    recipe.check(classifier, len(data[0]))
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
        targets = jax.nn.one_hot(targets, classes, dtype=jnp.float32)
    targets = targets.astype(jnp.float32)
    if state is None:
        state = _start(classifier, recipe, n, key, recipe.initial(classifier))
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
