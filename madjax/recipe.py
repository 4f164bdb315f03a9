"""How a network is trained: a recipe, its optimiser, and the gradients that it learns by.

Both are values of the recipe: any optax transformation, and any function that makes the gradients
of an epoch. `madjax.train` holds the loop around them.
"""

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from madjax.errors import InputError, in_one_line
from madjax.models import Classifier
from madjax.sharing import shared_out
from madjax.streams import stream
from madjax.weights import Trained

Array = jax.Array


def sgd(
    learning_rate: optax.Schedule, momentum: float, weight_decay: float
) -> optax.GradientTransformation:
    """SGD with heavy-ball momentum; weight decay is added to the gradient, as PyTorch does.

    v <- momentum v + g + weight_decay w;  w <- w - learning_rate(t) v.
    """
    return optax.chain(_decay(weight_decay), optax.sgd(learning_rate, momentum=momentum or None))


def adam(
    learning_rate: optax.Schedule, momentum: float, weight_decay: float
) -> optax.GradientTransformation:
    """Adam (Kingma and Ba 2015); the published learning rate is 0.001. It takes no momentum.

    The recipe's momentum is not used: Adam's own averages take its place (0.9 and 0.999).
    """
    del momentum
    return optax.chain(_decay(weight_decay), optax.adam(learning_rate))


def adagrad(
    learning_rate: optax.Schedule, momentum: float, weight_decay: float
) -> optax.GradientTransformation:
    """Adagrad (Duchi et al. 2011) from an empty accumulator, as PyTorch has it; its rate is 0.01.

    w <- w - learning_rate(t) g / sqrt(sum of g^2 so far). The recipe's momentum is not used.
    PyTorch adds its 1e-10 outside the root, optax inside it: hence the square.
    """
    del momentum
    empty = optax.adagrad(learning_rate, initial_accumulator_value=0.0, eps=1e-20)
    return optax.chain(_decay(weight_decay), empty)


def _decay(weight_decay: float) -> optax.GradientTransformation:
    return optax.add_decayed_weights(weight_decay) if weight_decay else optax.identity()


Take = Callable[[Array], tuple[Array, Array]]
"""Reads a training set: indices [B] -> (images [B, H, W, C], targets [B, K]).

So examples may be shared between runs or made on the fly. Targets are any distribution over
classes: posteriors, or one-hot labels.
"""

Augment = Callable[[Array, Array], Array]
"""(key, images [B, H, W, C]) -> images of the same classes, of any size that the network takes.

Pixels are in [0, 255]: uint8, or float32 where an attack has made the images.
"""


class Lesson(NamedTuple):
    """What one epoch learns from."""

    take: Take
    num_examples: int
    """The most examples that there can be."""
    count: Array | None
    """How many there are, where that is traced; else None: all."""
    batch_size: int
    key: Array
    """Of the run: what an epoch draws is a function of (key, epoch)."""
    epoch: Array
    augment: Augment | None = None
    """Changes the images of a batch before they are learned from, by `augmented`, which is called
    by who makes the gradients; None: they are as they are."""

    @property
    def size(self) -> Array | int:
        """How many examples there are."""
        return self.num_examples if self.count is None else self.count


Step = Callable[[Any, Array], tuple[Array, Any, Any]]
"""(variables, i) -> (mean loss, gradient of what is trained, variables) of step i of an epoch."""


def mean_gradient(classifier: Classifier, lesson: Lesson) -> Step:
    """The mean gradient of shuffled batches, each example once an epoch: what a recipe does.

    The last batch may hold fewer examples, as PyTorch's loader has it: it is filled up with others,
    which weigh nothing in the loss (BatchNorm's statistics see them).
    """
    n = lesson.size
    visit = order(lesson.key, lesson.epoch, lesson.num_examples, lesson.count)
    step_key = stream(jax.random.fold_in(lesson.key, lesson.epoch), "steps")

    def loss(trained: Any, params: Any, i: Array) -> tuple[Array, Any]:
        at = i * lesson.batch_size + jnp.arange(lesson.batch_size)
        x, targets = shared_out(lesson.take(visit[at % n]))
        key = jax.random.fold_in(step_key, i)
        x = augmented(lesson.augment, key, x)
        weight = (at < n).astype(jnp.float32)
        logits, params = classifier.learn(params | trained, x, key)
        return jnp.sum(weight * cross_entropy(logits, targets)) / jnp.sum(weight), params

    def step(params: Any, i: Array) -> tuple[Array, Any, Any]:
        value_of = jax.value_and_grad(loss, has_aux=True)
        (value, params), gradient = value_of(trainable(params), params, i)
        return value, gradient, params

    return step


def augmented(augment: Augment | None, key: Array, x: Array) -> Array:
    """Images as a recipe's augment makes them; it shares no randomness with other uses of key."""
    return x if augment is None else augment(stream(key, "augment"), x)


@dataclass(frozen=True)
class Recipe:
    """How a network is trained; the defaults are the paper's for LeNet victims and attackers.

    The learning rate is multiplied by `decay` every `decay_epochs` epochs (0: never).
    `optimizer(learning_rate=, momentum=, weight_decay=)` returns any optax transformation;
    learning_rate is a schedule, from the count of steps to a rate. `gradient(classifier, lesson)`
    returns the function that makes the gradient of each of an epoch's ceil(N / batch_size) steps:
    `mean_gradient`, or `madjax.private.PrivateGradient` for DP-SGD. It may have a method
    check(classifier, recipe, num_examples), which raises InputError for what it cannot train.
    `augment(key, images)` changes the images of a batch before each step, such as
    `madjax.attacks.crop_and_flip` and `madjax.augment.random_resized_crop`. `start` is a network
    that training starts from, but for its last layer, in place of random parameters.
    """

    epochs: int = 30
    batch_size: int = 64
    learning_rate: float = 0.1
    momentum: float = 0.5
    weight_decay: float = 0.0
    decay: float = 0.1
    decay_epochs: int = 50
    optimizer: Callable[..., optax.GradientTransformation] = sgd
    gradient: Callable[[Classifier, Lesson], Step] = mean_gradient
    augment: Augment | None = field(default=None, metadata={"described": "changed"})
    start: Trained | None = field(default=None, metadata={"described": "changed"})

    def __post_init__(self) -> None:
        for name in ("epochs", "batch_size"):
            if getattr(self, name) < 1:
                raise InputError(f"{name} is {getattr(self, name)}: give a whole number >= 1")
        for name in ("learning_rate", "momentum", "weight_decay", "decay", "decay_epochs"):
            if not 0 <= getattr(self, name) < float("inf"):
                raise InputError(f"{name} is {getattr(self, name)}: give a number >= 0")
        if isinstance(self.gradient, type) or not callable(self.gradient):
            raise InputError(
                f"gradient is {self.gradient!r}: give a function, or an object that is called as "
                "one, such as madjax.private.PrivateGradient(noise_multiplier=1.0)"
            )
        if not isinstance(self.start, Trained | None):
            raise InputError(f"start is {self.start!r}: give a madjax.Trained(path), or None")
        try:
            self.transformation(1)
        except TypeError as error:
            raise InputError(
                f"optimizer {self.optimizer} does not take learning_rate, momentum and "
                f"weight_decay ({error}): wrap it in a function that does"
            ) from error

    @property
    def is_plain(self) -> bool:
        """Whether an update is the gradient times a negative number: SGD and nothing more."""
        plain = self.optimizer is sgd and self.gradient is mean_gradient
        return plain and not self.momentum and not self.weight_decay

    def transformation(self, num_examples: Array | int) -> optax.GradientTransformation:
        """The optax transformation for a data set of this many examples, which may be traced."""
        steps = -(-num_examples // self.batch_size)

        def schedule(count: Array) -> Array:
            drops = count // (self.decay_epochs * steps) if self.decay_epochs else 0
            return self.learning_rate * self.decay**drops

        return self.optimizer(
            learning_rate=schedule, momentum=self.momentum, weight_decay=self.weight_decay
        )

    def check(self, classifier: Classifier, num_examples: int) -> None:
        """Refuse a `gradient`, `augment` or `start` that does not go with the network.

        Raises:
            InputError: with the value and what to give in its place.
        """
        if hasattr(self.gradient, "check"):
            self.gradient.check(classifier, self, num_examples)
        if self.augment is not None:
            _check_augment(self.augment, classifier)
        self.initial(classifier)

    def initial(self, classifier: Classifier) -> dict[str, Array] | None:
        """What of a network is there when training starts, by path; None: all of it is random.

        Raises:
            InputError: see `madjax.Trained.body`.
        """
        return None if self.start is None else self.start.body(classifier)


def _check_augment(augment: Augment, classifier: Classifier) -> None:
    """Refuse what makes images that a network cannot take, or other numbers of them."""

    def learn(key: Array) -> list[Array]:
        blank = jnp.zeros((2, *classifier.image_shape))
        made = [augment(key, blank.astype(dtype)) for dtype in (jnp.uint8, jnp.float32)]
        return [classifier.learn(classifier.init(key), images, key)[0] for images in made]

    try:
        logits, _ = jax.eval_shape(learn, jax.random.key(0))
    except InputError:
        raise
    except Exception as error:
        raise InputError(
            f"augment {augment!r} makes images that {type(classifier.module).__name__} cannot take "
            f"({in_one_line(error)}): give another, (key, images) -> images, of uint8 and of "
            "float32"
        ) from error
    if len(logits) != 2:
        raise InputError(
            f"augment {augment!r} makes {len(logits)} images of 2: give one that keeps their number"
        )


def check_bare(name: str, recipe: Recipe) -> None:
    """Refuse a recipe with gradients, images or a start of its own, where none is looked at.

    Raises:
        InputError: with the name of the recipe's field.
    """
    if recipe.gradient is not mean_gradient:
        raise InputError(
            f"{name} has the gradient {recipe.gradient!r}: it is trained by the mean gradient "
            "alone, leave gradient out"
        )
    if recipe.augment is not None:
        raise InputError(
            f"{name} has the augment {recipe.augment!r}: it is trained on images as they are, "
            "leave augment out"
        )
    if recipe.start is not None:
        raise InputError(
            f"{name} has the start {recipe.start.path}: it begins with random parameters, leave "
            "start out"
        )


def trainable(params: Any) -> Any:
    """What gradients change: not the statistics of BatchNorm."""
    return {"params": params["params"]}


def order(key: Array, epoch: Array | int, num_examples: int, count: Any = None) -> Array:
    """The order in which an epoch visits the examples: a permutation of num_examples, int32.

    With a count, which may be traced, of which the first `count` are one of 0..count-1.
    """
    visit = jax.random.permutation(jax.random.fold_in(key, epoch), num_examples)
    return visit if count is None else visit[jnp.argsort(visit >= count, stable=True)]


def cross_entropy(logits: Array, targets: Array) -> Array:
    """-sum_k y~_k log softmax(logits)_k for every example: [B, K], [B, K] -> float32 [B]."""
    log_p = jax.nn.log_softmax(logits.astype(jnp.float32))
    return -jnp.sum(targets.astype(jnp.float32) * log_p, axis=-1)
