"""White-box mode: an attacker that trains online, before a defence that knows its parameters.

The study of the paper's section 5.2.3 (Fig. 6, 7 and A5): at every step the attacker sends a query,
the defence perturbs the answer with the attacker's own gradients in place of a surrogate's, and
the angle between the poisoned and the true gradient, over all parameters, is recorded.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from madjax.attacks.attack import Attack, Transfer, World, draw
from madjax.errors import InputError
from madjax.models import Classifier
from madjax.objectives import angle_between
from madjax.train import Recipe, trainable

Array = jax.Array


@dataclass(frozen=True)
class Online(Attack):
    """SGD on one query at a time (section 5.2.3): learning rate 0.001, batch 1, plain SGD.

    budget: N, queries in all; a step takes `recipe.batch_size` of them, drawn uniformly from
    `images` distinct images (B). Of the recipe `epochs` is not used, and a pass over the images is
    its epoch for `decay_epochs`. refresh: the defence is handed the attacker's parameters every
    so many steps: 1 is white-box, more a surrogate that grows stale, 0 black-box: a defence keeps
    the surrogate of its own. A defence without a surrogate has nothing to be handed. Every `every`
    steps attacker and defender are evaluated, the defender on the first `judged` test images.
    BatchNorm keeps the statistics of the initial network: there are none in a batch of one.
    """

    budget: int = 10_000
    recipe: Recipe = Recipe(epochs=1, batch_size=1, learning_rate=0.001, momentum=0.0)
    name: str = "online"
    images: int = 5_000
    refresh: int = 1
    every: int = 500
    judged: int = 1_000

    def __post_init__(self) -> None:
        super().__post_init__()
        for name, least in (("images", 1), ("every", 1), ("judged", 1), ("refresh", 0)):
            if getattr(self, name) < least:
                raise InputError(
                    f"{name} of Online is {getattr(self, name)}: give a whole number >= {least}"
                )
        if self.budget < 1 or self.budget % self.recipe.batch_size:
            raise InputError(
                f"budget is {self.budget} with batches of {self.recipe.batch_size}: give a "
                "positive multiple of that, so that all of it is spent"
            )

    @property
    def steps(self) -> int:
        """N / batch size."""
        return self.budget // self.recipe.batch_size

    @property
    def laps(self) -> int:
        """How often it is evaluated: after each `every` steps, and after the last."""
        return -(-self.steps // self.every)

    def examples(self, budget: int) -> int:
        """See `Attack.examples`: it trains as it asks, so there is one budget."""
        if budget != self.budget:
            raise InputError(
                f"budgets holds {budget}: {self.title} trains as it asks and has one budget, "
                f"{self.budget}; leave budgets empty"
            )
        return self.images

    def check(self, num_images: int, num_classes: int, image_shape: tuple[int, ...]) -> None:
        """See `Attack.check`: there must be that many images."""
        del num_classes, image_shape
        if self.images > num_images:
            raise InputError(
                f"images of Online is {self.images}: the query set holds {num_images}, give a "
                "number from 1 to that"
            )

    def begin(self, world: World) -> Transfer:
        """Not for this attack: it leaves no transfer set."""
        raise InputError(
            "the online attack has no transfer set: run it by madjax angle, or a sweep of it"
        )

    def describe(self) -> dict[str, Any]:
        """The fields of a row that say which attack this was."""
        known = {0: "black-box", 1: ""}.get(self.refresh, f"surrogate every {self.refresh} steps")
        batch = self.recipe.batch_size
        parts = (known, f"batch {batch}" if batch > 1 else "", self.variant)
        return super().describe() | {"variant": ", ".join(filter(None, parts))}


class Trace(NamedTuple):
    """What is recorded of every step, float32 [steps], -inf where not yet done."""

    angle: Array
    """Degrees between the gradients of the batch's loss on the answers and on the posteriors."""
    distance_used: Array
    """Between answers and posteriors, mean over the batch."""
    loss: Array
    """-sum_k y~_k log F_k(x) on the answers, mean over the batch, before the step."""


class Training(NamedTuple):
    """An online attacker between two steps."""

    params: Any
    opt_state: Any
    surrogate: Any
    """The parameters that the defence was last handed; empty where that is at every step."""
    drawn: Array
    """The distinct images, int32 [images], and the victim's posteriors for them."""
    posteriors: Array
    key: Array
    step: Array
    trace: Trace


Respond = Callable[[Any, Array, Array, Array], Array]
"""A defence: (attacker's parameters, numbers [B], images [B, ...], y [B, K]) -> y_tilde [B, K]."""


def begin(
    attack: Online,
    classifier: Classifier,
    key: dict[str, Array],
    images: Array,
    posterior: Callable[[Array], Array],
) -> Training:
    """A fresh attacker with its images and their undefended posteriors, a function of the keys.

    key: `madjax.attacks.keys` of the seed, so that the first parameters are those of the other
    attacks' stolen models. posterior(images [B, ...]) -> y [B, K] is the victim.
    """
    init_key, order_key = jax.random.split(key["train"])
    params = classifier.init(init_key)
    drawn = draw(key["draw"], len(images), attack.images)
    optimizer = attack.recipe.transformation(attack.images)
    unknown = jnp.full(attack.steps, -jnp.inf, jnp.float32)
    return Training(
        params,
        optimizer.init(trainable(params)),
        params if attack.refresh > 1 else (),
        drawn,
        posterior(images[drawn]),
        jax.random.key_data(order_key),
        jnp.zeros((), jnp.int32),
        Trace(unknown, unknown, unknown),
    )


def lap(
    attack: Online,
    classifier: Classifier,
    training: Training,
    images: Array,
    respond: Respond,
    distance: Callable[[Array, Array], Array],
) -> Training:
    """`attack.every` steps, or as many as are left, as one `lax.scan`.

    The gradient of the batch's loss on targets t is -(1/B) sum_i G_i' t_i, with G_i the attacker's
    d log F(x_i; w) / dw: the step takes it at the answers, and the angle recorded is that to the
    one at the posteriors.
    """
    optimizer = attack.recipe.transformation(attack.images)
    batch = attack.recipe.batch_size
    key = jax.random.wrap_key_data(training.key)

    def step(now: Training, t: Array) -> tuple[Training, Trace]:
        at = jax.random.randint(jax.random.fold_in(key, t), (batch,), 0, attack.images)
        x, y = images[now.drawn[at]], now.posteriors[at]
        if attack.refresh > 1:
            handed = jax.lax.cond(
                t % attack.refresh == 0, lambda: now.params, lambda: now.surrogate
            )
            now = now._replace(surrogate=handed)
        else:
            handed = now.params
        y_tilde = respond(handed, t * batch + jnp.arange(batch), x, y)
        targets = attack.targets(y_tilde)
        trained = trainable(now.params)

        def log_likelihoods(trained: Any) -> Array:
            logits = classifier.apply(now.params | trained, x)
            return jax.nn.log_softmax(logits.astype(jnp.float32))

        log_p, pull_back = jax.vjp(log_likelihoods, trained)
        (both,) = jax.vmap(pull_back)(-jnp.stack([targets, y]) / batch)
        poisoned, true = (jax.tree.map(lambda g, i=i: g[i], both) for i in (0, 1))
        updates, opt_state = optimizer.update(poisoned, now.opt_state, trained)
        moved = jax.tree.map(jnp.add, trained, updates)
        seen = Trace(
            angle_between(poisoned, true),
            jax.vmap(distance)(y_tilde, y).mean(),
            -(targets * log_p).sum(-1).mean(),
        )
        return now._replace(params=now.params | moved, opt_state=opt_state), seen

    def within(now: Training, t: Array) -> tuple[Training, Trace]:
        # The last lap may be shorter; the program is the same.
        idle = Trace(*[jnp.full((), -jnp.inf, jnp.float32)] * 3)
        return jax.lax.cond(t < attack.steps, step, lambda now, t: (now, idle), now, t)

    whole = attack.steps % attack.every == 0
    steps = training.step + jnp.arange(attack.every)
    with jax.default_matmul_precision("highest"):  # angles are what this is run for
        after, seen = jax.lax.scan(step if whole else within, training, steps)
    return after._replace(
        step=jnp.minimum(training.step + attack.every, attack.steps),
        trace=jax.tree.map(
            lambda old, new: old.at[steps].set(new, mode="drop"), training.trace, seen
        ),
    )
