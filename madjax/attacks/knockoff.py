"""Knockoff Nets (Orekondy et al., 2019) with the random strategy, as in the paper.

Draw images without replacement from a set of natural images that need not resemble the victim's,
ask the defended victim for each one's posterior, and train a fresh network on the pairs.
"""

from collections.abc import Callable
from dataclasses import dataclass

import jax
import jax.numpy as jnp

from madjax.attacks.attack import Attack, Transfer, World, check_budget, draw
from madjax.errors import InputError
from madjax.streams import stream

Array = jax.Array
Augment = Callable[[Array, Array], Array]
"""(key, images [B, H, W, C]) -> images of the same shape, with pixels in [0, 255]."""


def unchanged(key: Array, images: Array) -> Array:
    """The images as they are."""
    del key
    return images


def crop_and_flip(key: Array, images: Array, pad: int = 4) -> Array:
    """A random crop of each image, padded with black by `pad`, and a horizontal flip of half.

    Images [B, H, W, C] -> the same shape; as the training transform of the paper's CIFAR family.

    Raises:
        InputError: images no larger than the padding, which a crop might miss altogether.
    """
    n, height, width, channels = images.shape
    if min(height, width) <= pad:
        raise InputError(
            f"images of {height}x{width} pixels cannot be cropped at random after padding by "
            f"{pad}: use images larger than that, or augment=madjax.attacks.unchanged"
        )
    crop_key, flip_key = jax.random.split(key)
    padded = jnp.pad(images, ((0, 0), (pad, pad), (pad, pad), (0, 0)))
    corners = jax.random.randint(crop_key, (n, 2), 0, 2 * pad + 1)

    def crop(image: Array, corner: Array) -> Array:
        return jax.lax.dynamic_slice(image, (*corner, 0), (height, width, channels))

    cropped = jax.vmap(crop)(padded, corners)
    flip = jax.random.bernoulli(flip_key, shape=(n, 1, 1, 1))
    return jnp.where(flip, cropped[:, :, ::-1], cropped)


@dataclass(frozen=True)
class Knockoff(Attack):
    """The random strategy: budget / repeats images drawn without replacement.

    repeats: how often each image is sent; its answers are averaged (the paper's `nquery`), and
    every one counts against the budget. augment: applied to the images anew at each query
    (`nquery+aug`); the stolen model trains on the image as drawn.
    """

    name: str = "knockoff"
    repeats: int = 1
    augment: Augment = unchanged

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.repeats < 1:
            raise InputError(f"repeats is {self.repeats}: give a whole number >= 1")
        self.examples(self.budget)

    def examples(self, budget: int) -> int:
        """See `Attack.examples`: images, not queries."""
        if budget % self.repeats:
            raise InputError(
                f"budget is {budget} with repeats = {self.repeats}: give a multiple of that, so "
                "that all of it is spent"
            )
        return super().examples(budget) // self.repeats

    def check(self, num_images: int, num_classes: int, image_shape: tuple[int, ...]) -> None:
        """See `Attack.check`: every image is sent `repeats` times, and augment keeps its shape."""
        check_budget(self.budget, num_images, self.repeats)
        blank = jax.ShapeDtypeStruct((2, *image_shape), jnp.uint8)
        shape = jax.eval_shape(self.augment, jax.random.key(0), blank).shape
        if shape != blank.shape:
            raise InputError(
                f"augment makes images of shape {shape[1:]} of {tuple(image_shape)}: give a "
                "function that keeps the shape"
            )

    def foreseen(self, key: Array, num_images: int) -> Array | None:
        """The drawn images, once for each repetition, where they are sent as they are."""
        if self.augment is not unchanged:
            return None
        return jnp.tile(draw(key, num_images, self.examples(self.budget)), self.repeats)

    def begin(self, world: World) -> Transfer:
        """All queries; those of a later repetition come after all of an earlier one."""
        size = self.examples(self.budget)
        drawn = draw(world.key, len(world.images), size)
        key = stream(world.key, "augment")

        def queries(r: Array) -> Array:
            if self.augment is unchanged:
                return drawn
            return self.augment(jax.random.fold_in(key, r), world.images[drawn])

        def repeat(r: Array, carry: tuple[Array, Array]) -> tuple[Array, Array]:
            total, asked = carry
            answers, asked = world.ask(asked, queries(r))
            return total + answers, asked

        total = jnp.zeros((size, world.num_classes)), jnp.zeros((), jnp.int32)
        total, asked = jax.lax.fori_loop(0, self.repeats, repeat, total)
        return Transfer(drawn, self.targets(total / self.repeats), asked)
