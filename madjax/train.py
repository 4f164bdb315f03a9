"""The one training loop, for victims and attackers: pure functions of a key.

`start` makes a state, `epoch` advances it by one pass over the data; both are jit-able and map
over keys, labels or data with `vmap` or `lax.map`. `fit` is the loop around them.
"""

from collections.abc import Callable, Iterator
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
from madjax.recipe import Lesson, Recipe, Take, mean_gradient, order, trainable
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
    """Mean training loss of each epoch, float32 [recipe.epochs], -inf where not yet run; of one
    that is under way (`part_of_pass`) the sum over its steps so far."""


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
    window: tuple[Array, Array] | None = None,
) -> State:
    """One epoch: a step of the optimiser for each gradient that the recipe makes of it.

    count: how many of the examples there are so far, when that is traced; num_examples then is the
    most there can be. window: the first of its steps that are taken and the one after the last, by
    default all; an epoch in several windows, in order, is done after the last.
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

    first, stop = (0, steps) if window is None else window
    so_far = jnp.zeros((), jnp.float32)
    if window is not None:
        so_far = jnp.where(first == 0, so_far, state.loss[state.epoch])
    begin = (state.params, state.opt_state, so_far)
    params, opt_state, total = jax.lax.fori_loop(first, stop, step, begin)
    loss, done = total / steps, 1
    if window is not None:
        loss, done = jnp.where(stop == steps, loss, total), jnp.int32(stop == steps)
    return state._replace(
        params=params,
        opt_state=opt_state,
        epoch=state.epoch + done,
        loss=state.loss.at[state.epoch].set(loss),
    )


class Part(NamedTuple):
    """Some steps of an epoch, and the images for them: what a device holds of a large set."""

    images: Array
    """[R, H, W, C], in the order of the epoch, from the first that these steps take."""
    first: Array
    """Of the steps, int32."""
    stop: Array
    """The step after the last, int32."""


def part_of_pass(
    classifier: Classifier,
    recipe: Recipe,
    state: State,
    part: Part,
    targets: Array,
    count: Array | None = None,
) -> State:
    """The steps of one part of `one_pass`, of a recipe with `mean_gradient`; targets [N, K]."""
    num_examples = len(targets)
    visit = order(jax.random.wrap_key_data(state.key), state.epoch, num_examples, count)
    rank, size = jnp.argsort(visit), num_examples if count is None else count

    def take(i: Array) -> tuple[Array, Array]:
        # After the last image of an epoch its first follow, by which a last batch is filled up.
        return part.images[(rank[i] - part.first * recipe.batch_size) % size], targets[i]

    window = part.first, part.stop
    return one_pass(classifier, recipe, state, take, num_examples, count, window)


def parts(
    images: Callable[[np.ndarray], Any],
    visit: np.ndarray,
    batch_size: int,
    at_once: int,
) -> Iterator[Part]:
    """The parts of an epoch that visits images in an order, each of `at_once` of them.

    images(numbers [R]) puts these on the device, where two parts are at a time: the next one is
    fetched as soon as steps of this one have been asked for. at_once is rounded to whole batches.
    """
    size = max(at_once // batch_size, 1) * batch_size
    steps = -(-len(visit) // batch_size)

    def fetch(first: int) -> Part:
        numbers = visit[(first * batch_size + np.arange(size)) % len(visit)]
        stop = min(first + size // batch_size, steps)
        return Part(images(numbers), np.int32(first), np.int32(stop))

    following = fetch(0)
    while following.stop < steps:
        yield following
        following = fetch(int(following.stop))
    yield following


def check_parts(recipe: Recipe, at_once: int, num_images: int) -> None:
    """Refuse what cannot be trained on parts of a set.

    Raises:
        InputError: a gradient that does not visit images in the order of `madjax.recipe.order`; no
            number of images.
    """
    if type(at_once) is not int or at_once < 1:
        raise InputError(f"at_once is {at_once!r}: give a whole number of images >= 1, or None")
    if at_once < num_images and recipe.gradient is not mean_gradient:
        raise InputError(
            f"a device has room for {at_once} of the {num_images} images, and the gradient "
            f"{recipe.gradient!r} may draw any of them at each step: give fewer images, or a "
            "device with more memory"
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
    at_once: int | None = None,
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
        at_once: how many of the images the device holds at a time, twice, as the next are fetched
            meanwhile; None: all of them, once. It changes no result.

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
            cannot train, or not on parts of the images.

    Example:
        >>> import jax, jax.numpy as jnp, madjax
        >>> network = madjax.Classifier(madjax.MLP(2, (3,)), lambda x: x / 255, (2, 2, 1))
        >>> data = jnp.zeros((4, 2, 2, 1), jnp.uint8), jnp.ones(4, jnp.int32)
        >>> madjax.fit(network, madjax.Recipe(epochs=2), jax.random.key(0), data, data).accuracy
        Array([100., 100.], dtype=float32)
    """
    recipe.check(classifier, len(data[0]))
    images, targets = data[0], jnp.asarray(data[1])
    shape = jax.ShapeDtypeStruct(images.shape, images.dtype)
    n, classes = jax.eval_shape(
        lambda k, x: classifier.apply(classifier.init(k), x), key, shape
    ).shape
    if at_once is not None:
        check_parts(recipe, at_once, n)
    whole = at_once is None or at_once >= n
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
    test = tuple(map(jnp.asarray, test))
    if whole:
        images = jnp.asarray(images)
    for _ in range(int(state.epoch), recipe.epochs):
        if whole:
            state = _advance(classifier, recipe, state, images, targets, *test)
        else:
            visit = np.asarray(_order(jax.random.wrap_key_data(state.key), state.epoch, n))
            some = parts(lambda i: jnp.asarray(images[i]), visit, recipe.batch_size, at_once)
            for part in some:
                # The part before is done and let go, while the next one was fetched.
                jax.block_until_ready(state)
                state = _advance_part(classifier, recipe, state, part, targets)
            state = _judge(classifier, state, *test)
        after_epoch(jax.block_until_ready(state))
    return state


# Compiled once for all runs of one network, recipe and size.
_start = jax.jit(start, static_argnums=(0, 1, 2))
_advance_part = jax.jit(part_of_pass, static_argnums=(0, 1))
_judge = jax.jit(judge, static_argnums=0)
_order = jax.jit(order, static_argnums=2)


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
