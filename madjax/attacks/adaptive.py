"""Knockoff Nets with the adaptive strategy: a gradient bandit over the classes of the query set.

Each step draws a batch of images from classes z ~ pi = softmax(preferences), asks for them, takes
one training step of a scratch network on the answers, and rewards the classes (Orekondy et al.,
2019, Sec. 4.1.2; "step" is a batch here, a single image there):

    preference(c) += (1 / N(z_i)) (r_i - baseline) (1[z_i = c] - pi(c))     for each image i

with N(z) the times class z was drawn, and the baseline the mean reward of the last 25 steps. No
class is drawn once its images are used up.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple

import jax
import jax.numpy as jnp

from madjax.attacks.attack import Attack, Transfer, World, check_budget
from madjax.errors import InputError
from madjax.recipe import Recipe, check_bare, cross_entropy
from madjax.streams import stream
from madjax.train import one_pass, start

Array = jax.Array

STEPS = 100
"""Of a round, after which a sweep writes a checkpoint."""
_RECENT = 25
"""Steps whose rewards and answers count as recent, the paper's Delta."""

Reward = Callable[[Array, Array, Array], Array]
"""(targets [B, K], logits [B, K] of the scratch network, mean targets so far [K]) -> [B].

What an attacker likes of an answer, larger for better, in any unit: finite for finite arguments.
"""


def certainty(targets: Array, logits: Array, mean: Array) -> Array:
    """The margin between the two largest posteriors, in [0, 1]."""
    del logits, mean
    top = jax.lax.top_k(targets, 2)[0]
    return top[:, 0] - top[:, 1]


def diversity(targets: Array, logits: Array, mean: Array) -> Array:
    """How much mass the answer has where the answers of the last 25 steps had less, in [0, 1]."""
    del logits
    return jnp.maximum(targets - mean[None], 0).sum(-1)


def disagreement(targets: Array, logits: Array, mean: Array) -> Array:
    """The cross-entropy of the scratch network on the answer, before it trains on it.

    The paper's loss reward.
    """
    del mean
    return cross_entropy(logits, targets)


class _Bandit(NamedTuple):
    preference: Array  # [C]
    drawn: Array  # times each class was drawn, int32 [C]
    low: Array  # of each reward so far [R]
    high: Array
    rewards: Array  # mean reward of each of the last steps [25], -inf where none
    means: Array  # mean targets of each of the last steps [25, K], -inf where none


@dataclass(frozen=True)
class AdaptiveKnockoff(Attack):
    """The adaptive strategy, with any rewards.

    rewards: those of the paper are certainty, diversity and its loss (`disagreement`). Each is
    rescaled to [0, 1] by its least and greatest value so far, and they are
    averaged; all three together are the paper's "all". online: how the scratch network trains; a
    step is one batch of it, and counts as an epoch for its `decay_epochs`; `epochs` says nothing.
    """

    name: str = "knockoff_adaptive"
    rewards: tuple[Reward, ...] = (certainty, diversity, disagreement)
    online: Recipe = Recipe(epochs=1, learning_rate=0.01, decay_epochs=0)

    def __post_init__(self) -> None:
        super().__post_init__()
        check_bare(f"online of {self.title}", self.online)
        if not self.rewards:
            raise InputError("rewards is empty: give madjax.attacks.certainty or another")

    @property
    def passes(self) -> float:
        """See `Attack.passes`: the scratch network rates each answer, and learns from it."""
        return 4.0 * self.budget

    def check(self, num_images: int, num_classes: int, image_shape: tuple[int, ...]) -> None:
        """See `Attack.check`: no image is sent twice."""
        del num_classes, image_shape
        check_budget(self.budget, num_images)

    @property
    def _steps(self) -> int:
        return -(-self.budget // self.online.batch_size)

    @property
    def rounds(self) -> int:
        """Rounds of `STEPS` steps; that there are rounds changes nothing but how often it stops."""
        return -(-self._steps // STEPS)

    def begin(self, world: World) -> Transfer:
        """Nothing asked, and no class preferred."""
        bandit = _Bandit(
            jnp.zeros(world.num_labels),
            jnp.zeros(world.num_labels, jnp.int32),
            jnp.full(len(self.rewards), jnp.inf),
            jnp.full(len(self.rewards), -jnp.inf),
            jnp.full(_RECENT, -jnp.inf),
            jnp.full((_RECENT, world.num_classes), -jnp.inf),
        )
        scratch = start(world.classifier, self.online, self.online.batch_size, _keys(world)[1])
        return Transfer(
            jnp.zeros(self.budget, jnp.int32),
            jnp.full((self.budget, world.num_classes), -jnp.inf),
            jnp.zeros((), jnp.int32),
            (bandit, scratch),
        )

    def proceed(self, r: Array, transfer: Transfer, world: World) -> Transfer:
        """The queries of the next steps, a batch at a time."""
        keys, batch = _keys(world), self.online.batch_size
        line, first, size = _by_class(keys[0], world.labels, world.num_labels)

        def step(t: Array, transfer: Transfer) -> Transfer:
            bandit, scratch = transfer.memory
            at = t * batch + jnp.arange(batch)
            wanted = at < self.budget
            key = jax.random.fold_in(keys[2], t)
            classes, ranks, drawn = _choose(key, bandit, size, wanted)
            chosen = line[first[classes] + ranks]
            x = world.images[chosen]
            answers, asked = world.ask(transfer.asked, chosen, wanted)
            targets = self.targets(answers)
            known = jnp.where(wanted[:, None], targets, 0)
            logits = world.classifier.apply(scratch.params, x)
            bandit = self._reward(bandit._replace(drawn=drawn), t, classes, known, logits, wanted)
            scratch = one_pass(
                world.classifier,
                self.online,
                scratch,
                lambda i: (x[i], known[i]),
                batch,
                wanted.sum(),
            )
            into = jnp.where(wanted, at, self.budget)  # which is dropped
            return Transfer(
                transfer.x.at[into].set(chosen, mode="drop"),
                transfer.targets.at[into].set(targets, mode="drop"),
                asked,
                (bandit, scratch),
            )

        last = jnp.minimum((r + 1) * STEPS, self._steps)
        return jax.lax.fori_loop(r * STEPS, last, step, transfer)

    def _reward(
        self,
        bandit: _Bandit,
        t: Array,
        classes: Array,
        targets: Array,
        logits: Array,
        wanted: Array,
    ) -> _Bandit:
        """The bandit after the answers of one step."""
        count = jnp.maximum(wanted.sum(), 1)
        mean = jnp.nan_to_num(_mean_of_known(bandit.means))
        raw = jnp.stack([reward(targets, logits, mean) for reward in self.rewards], -1)
        raw = jnp.nan_to_num(raw, nan=0.0, posinf=1e6, neginf=-1e6)  # of a network that diverged
        low = jnp.minimum(bandit.low, jnp.where(wanted[:, None], raw, jnp.inf).min(0))
        high = jnp.maximum(bandit.high, jnp.where(wanted[:, None], raw, -jnp.inf).max(0))
        # A spread of rounding errors is none: it is not to be blown up.
        spread = jnp.where(high - low > 1e-6, high - low, jnp.inf)
        scaled = (raw - low[None]) / spread[None]
        reward = jnp.where(wanted, scaled.mean(-1), 0)
        now = reward.sum() / count
        baseline = _mean_of_known(bandit.rewards)
        advantage = jnp.where(wanted, reward - jnp.where(jnp.isnan(baseline), now, baseline), 0)
        rate = advantage / jnp.maximum(bandit.drawn[classes], 1)
        share = jax.nn.softmax(bandit.preference)
        gained = jnp.zeros_like(bandit.preference).at[classes].add(rate)
        slot = t % len(bandit.rewards)
        return _Bandit(
            bandit.preference + gained - rate.sum() * share,
            bandit.drawn,
            low,
            high,
            bandit.rewards.at[slot].set(now),
            bandit.means.at[slot].set(targets.sum(0) / count),
        )


def _keys(world: World) -> Array:
    """Of the order within classes, of the scratch network, and of the choices."""
    return jax.random.split(stream(world.key, "bandit"), 3)


def _mean_of_known(a: Array) -> Array:
    """The mean over the first axis of what is finite; NaN where nothing is."""
    known = jnp.isfinite(a)
    count = known.sum(0)
    total = jnp.where(known, a, 0).sum(0)
    return jnp.where(count > 0, total / jnp.maximum(count, 1), jnp.nan)


def _by_class(key: Array, labels: Array, num_labels: int) -> tuple[Array, Array, Array]:
    """The images in random order within each class: (indices [N], first [C], size [C])."""
    visit = jax.random.permutation(key, len(labels))
    line = visit[jnp.argsort(labels[visit], stable=True)]
    size = jnp.bincount(labels, length=num_labels)
    return line, jnp.cumsum(size) - size, size


def _choose(key: Array, bandit: _Bandit, size: Array, wanted: Array) -> tuple[Array, Array, Array]:
    """A class for every wanted query, the rank of its image there, and the new count of draws.

    One after another, so that a class whose images end within the batch is not drawn beyond them.
    """

    def one(drawn: Array, query: tuple[Array, Array]) -> tuple[Array, tuple[Array, Array]]:
        key, wanted = query
        open_to = jnp.where(drawn < size, bandit.preference, -jnp.inf)
        label = jax.random.categorical(key, open_to)
        return drawn.at[label].add(wanted.astype(drawn.dtype)), (label, drawn[label])

    keys = jax.random.split(key, len(wanted))
    drawn, (classes, ranks) = jax.lax.scan(one, bandit.drawn, (keys, wanted))
    return classes, ranks, drawn
