"""A random change of images that leaves their class as it is: a pure function of a key.

The training transform of the paper's ImageNet family; that of its CIFAR family is
`madjax.attacks.crop_and_flip`.
"""

import math

import jax
import jax.numpy as jnp

from madjax.errors import InputError

Array = jax.Array


def random_resized_crop(
    key: Array,
    images: Array,
    side: int = 224,
    scale: tuple[float, float] = (0.08, 1.0),
    ratio: tuple[float, float] = (3 / 4, 4 / 3),
) -> Array:
    """A random box of each image, scaled to a square, and a horizontal flip of half.

    Images [B, H, W, C] -> [B, side, side, C] of their type, rounded if that is of whole numbers. A
    box has a share of the image's area that is uniform in `scale`, and a width / height that is
    uniform in `ratio` on a logarithmic scale; of ten such the first that lies in the image, or else
    the whole image. It is scaled with a triangle filter (Inception's crop, Szegedy et al. 2015, as
    torchvision has it for the paper's ImageNet family).

    Raises:
        InputError: a scale or ratio that is none.
    """
    if not 0 < scale[0] <= scale[1] <= 1 or not 0 < ratio[0] <= ratio[1]:
        raise InputError(
            f"scale is {scale} and ratio is {ratio}: give shares of the area up to 1 and sides' "
            "ratios above 0, the smaller first"
        )
    n, height, width, _ = images.shape
    box_key, flip_key = jax.random.split(key)
    boxes = jax.vmap(lambda key: _box(key, height, width, scale, ratio))(
        jax.random.split(box_key, n)
    )
    flip = jax.random.bernoulli(flip_key, shape=(n,))

    def crop(image: Array, box: Array, flip: Array) -> Array:
        top, left, h, w = box
        rows, columns = _weights(top, h, height, side), _weights(left, w, width, side)
        found = jnp.einsum(
            "oi,pj,ijc->opc", rows, columns, image.astype(jnp.float32), precision="highest"
        )
        return jnp.where(flip, found[:, ::-1], found)

    found = jax.vmap(crop)(images, boxes, flip)
    if jnp.issubdtype(images.dtype, jnp.integer):
        found = jnp.clip(jnp.round(found), 0, 255)
    return found.astype(images.dtype)


def _weights(start: Array, size: Array, pixels: int, side: int) -> Array:
    """What each of `side` new pixels takes of the old ones [start, start + size): [side, pixels].

    A triangle as wide as a new pixel, or as an old one where that is wider. (JAX's
    `scale_and_translate` would reach beyond the box.)
    """
    step = size / side
    centre = start + (jnp.arange(side) + 0.5) * step - 0.5
    old = jnp.arange(pixels)
    distance = jnp.abs(old[None, :] - centre[:, None]) / jnp.maximum(step, 1)
    inside = (old >= start) & (old < start + size)
    weight = jnp.maximum(1 - distance, 0) * inside[None, :]
    return weight / weight.sum(axis=1, keepdims=True)


_TRIES = 10


def _box(
    key: Array, height: int, width: int, scale: tuple[float, float], ratio: tuple[float, float]
) -> Array:
    """Top, left, height and width of a random box in whole pixels, float32 [4]."""
    keys = jax.random.split(key, 4)
    area = height * width * jax.random.uniform(keys[0], _TRIES, minval=scale[0], maxval=scale[1])
    logs = [math.log(each) for each in ratio]
    wide = jnp.exp(jax.random.uniform(keys[1], _TRIES, minval=logs[0], maxval=logs[1]))
    w, h = jnp.round(jnp.sqrt(area * wide)), jnp.round(jnp.sqrt(area / wide))
    fits = (w >= 1) & (w <= width) & (h >= 1) & (h <= height)
    first = fits.argmax()
    h, w = (jnp.where(fits.any(), each[first], whole) for each, whole in ((h, height), (w, width)))
    top, left = (
        jnp.floor(jax.random.uniform(key) * (whole - each + 1))
        for key, whole, each in ((keys[2], height, h), (keys[3], width, w))
    )
    return jnp.stack([jnp.minimum(top, height - h), jnp.minimum(left, width - w), h, w])
