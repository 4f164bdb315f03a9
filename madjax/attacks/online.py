"""The online attacker of white-box mode, as an attack of a sweep; see `madjax.white_box`."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from madjax.attacks.attack import Attack, Transfer, World, draw
from madjax.errors import InputError
from madjax.models import Classifier
from madjax.recipe import Recipe, check_bare
from madjax.white_box import Attacker, fresh, handed, step

Array = jax.Array


@dataclass(frozen=True)
class Online(Attack):
    """SGD on one query at a time (section 5.2.3): learning rate 0.001, batch 1, plain SGD.

    budget: N, queries in all; a step takes `recipe.batch_size` of them, drawn uniformly from
    `images` distinct images (B). A `madjax.AngleStudy` sets it by its steps, and a `madjax.Sweep`
    needs one. Of the recipe `epochs` and `gradient` are not used, and a pass over the images is its
    epoch for `decay_epochs`. refresh: the defence is handed the attacker's parameters every so many
    steps: 1 is white-box, more a surrogate that grows stale, 0 black-box: a defence keeps the
    surrogate of its own. A defence without a surrogate has nothing to be handed. Every `every`
    steps attacker and defender are evaluated, the defender on the first `judged` test images.
    BatchNorm keeps the statistics of the initial network: there are none in a batch of one.
    """

    budget: int | None = None
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
        check_bare("recipe of Online", self.recipe)
        if self.budget is None:
            return
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
        if budget is None:
            raise InputError(
                f"budget of {self.title} is None: give the number of queries that it sends, or run "
                "it by a madjax.AngleStudy, whose steps say it"
            )
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
    """What is recorded of queries and steps, float32, -inf where not yet done.

    See `madjax.white_box.Trace`; where the attacker trains on something else than the answer, its
    gradient and its loss are those of that.
    """

    angle: Array
    """[budget]."""
    distance_used: Array
    """[budget], between answer and posterior."""
    loss: Array
    """[budget]."""
    batch_angle: Array
    """[steps]."""
    update_angle: Array
    """[steps]."""


class Training(NamedTuple):
    """An online attacker between two steps."""

    attacker: Attacker
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
    by_query, by_step = (jnp.full(n, -jnp.inf, jnp.float32) for n in (attack.budget, attack.steps))
    return Training(
        fresh(optimizer, params),
        params if attack.refresh > 1 else (),
        drawn,
        posterior(images[drawn]),
        jax.random.key_data(order_key),
        jnp.zeros((), jnp.int32),
        Trace(by_query, by_query, by_query, by_step, by_step),
    )


def lap(
    attack: Online,
    classifier: Classifier,
    training: Training,
    images: Array,
    respond: Respond,
    distance: Callable[[Array, Array], Array],
) -> Training:
    """`attack.every` steps, or as many as are left: one `lax.scan` of `madjax.white_box.step`."""
    optimizer = attack.recipe.transformation(attack.images)
    batch, is_plain = attack.recipe.batch_size, attack.recipe.is_plain
    key = jax.random.wrap_key_data(training.key)

    def one(now: Training, t: Array) -> tuple[Training, Trace]:
        at = jax.random.randint(jax.random.fold_in(key, t), (batch,), 0, attack.images)
        x, y = images[now.drawn[at]], now.posteriors[at]
        known = now.attacker.params
        if attack.refresh > 1:
            known = handed(attack.refresh, t, known, now.surrogate)
            now = now._replace(surrogate=known)
        y_tilde = respond(known, t * batch + jnp.arange(batch), x, y)
        targets = attack.targets(y_tilde)
        attacker, seen = step(
            classifier.apply, optimizer, now.attacker, x, y, targets, is_plain=is_plain
        )
        far = jax.vmap(distance)(y_tilde, y)
        seen = Trace(seen.angle, far, seen.loss, seen.batch_angle, seen.update_angle)
        return now._replace(attacker=attacker), seen

    def within(now: Training, t: Array) -> tuple[Training, Trace]:
        # The last lap may be shorter; the program is the same.
        shapes = jax.eval_shape(one, now, t)[1]
        idle = jax.tree.map(lambda a: jnp.full(a.shape, -jnp.inf, a.dtype), shapes)
        return jax.lax.cond(t < attack.steps, one, lambda now, t: (now, idle), now, t)

    whole = attack.steps % attack.every == 0
    steps = training.step + jnp.arange(attack.every)
    with jax.default_matmul_precision("highest"):  # angles are what this is run for
        after, seen = jax.lax.scan(one if whole else within, training, steps)

    def written(old: Array, new: Array) -> Array:
        rows = old.reshape(attack.steps, -1)  # of one number, or one a query
        return rows.at[steps].set(new.reshape(attack.every, -1), mode="drop").reshape(-1)

    return after._replace(
        step=jnp.minimum(training.step + attack.every, attack.steps),
        trace=jax.tree.map(written, training.trace, seen),
    )
