"""Random crops against Pillow's, their boxes against what they should be, and what networks see."""

import jax
import numpy as np
import pytest
from PIL import Image

from madjax import VGG16, Classifier, InputError
from madjax.augment import _box, random_resized_crop
from madjax.datasets import CIFAR_FAMILY, IMAGENET_FAMILY


def photo(h, w, channels=3):
    """Smooth, as photographs are, with edges."""
    y, x = np.mgrid[:h, :w]
    waves = [np.sin(x / (5 + c) + y / 7) + np.cos(y / (4 + c)) for c in range(channels)]
    image = np.stack(waves, axis=-1) * 60 + 120
    image[h // 3 : h // 2, w // 4 : w // 2] = (10, 250, 60)[:channels]
    return image.astype(np.uint8)


@pytest.mark.parametrize(("h", "w", "side"), [(40, 40, 28), (60, 36, 28), (20, 30, 48)])
def test_crops_are_pillows(h, w, side):
    """The same boxes, cut and scaled by Pillow's antialiased bilinear filter: within a level."""
    images = np.stack([photo(h, w)] * 32)
    key = jax.random.key(0)
    found = np.asarray(jax.jit(random_resized_crop, static_argnums=2)(key, images, side))
    assert found.dtype == np.uint8
    keys = jax.random.split(jax.random.split(key)[0], 32)
    boxes = jax.vmap(lambda key: _box(key, h, w, (0.08, 1.0), (3 / 4, 4 / 3)))(keys)
    flipped = 0
    for image, crop, (top, left, high, wide) in zip(images, found, np.asarray(boxes), strict=True):
        box = (left, top, left + wide, top + high)
        wanted = Image.fromarray(image).crop(box).resize((side, side), Image.Resampling.BILINEAR)
        wanted = np.asarray(wanted).astype(int)
        gaps = [abs(crop - each).max() for each in (wanted, wanted[:, ::-1])]
        assert min(gaps) <= 1
        flipped += gaps[1] < gaps[0]
    assert 5 < flipped < 27


def test_boxes_are_as_they_should_be():
    """Shares of the area uniform in [0.08, 1] where all fit, sides' ratios within 3/4 and 4/3."""
    keys = jax.random.split(jax.random.key(1), 4000)
    boxes = jax.vmap(lambda key: _box(key, 300, 200, (0.08, 1.0), (3 / 4, 4 / 3)))
    top, left, h, w = np.asarray(boxes(keys)).T
    assert (top >= 0).all()
    assert (top + h <= 300).all()
    assert (left >= 0).all()
    assert (left + w <= 200).all()
    np.testing.assert_array_equal(np.stack([top, left, h, w]), np.round([top, left, h, w]))
    assert ((w / h > 0.74) & (w / h < 1.35)).all()
    # By those that fit: a share below 0.5 always does, as 1.155 sqrt(.5 300 200) < 200.
    share = h * w / (300 * 200)
    counts = np.histogram(share, np.linspace(0.08, 0.5, 8))[0]
    assert (abs(counts - counts.mean()) < 5 * np.sqrt(counts.mean())).all()
    assert share.min() < 0.1
    room = h < 150  # where they lie is uniform: the mean is in the middle
    middle = (top[room] / (300 - h[room])).mean()
    assert abs(middle - 0.5) < 5 * 0.3 / np.sqrt(room.sum())


def test_an_image_that_no_box_fits_is_taken_whole():
    image = photo(4, 90)
    found = random_resized_crop(jax.random.key(0), image[None], 8, scale=(0.9, 1.0))[0]
    wanted = np.asarray(Image.fromarray(image).resize((8, 8), Image.Resampling.BILINEAR))
    gaps = [abs(np.asarray(found).astype(int) - each).max() for each in (wanted, wanted[:, ::-1])]
    assert min(gaps) <= 1


def test_the_whole_of_a_square_is_itself():
    images = np.stack([photo(12, 12, 1), photo(12, 12, 1)[::-1]]).astype(np.float32)
    found = random_resized_crop(jax.random.key(2), images, 12, scale=(1, 1), ratio=(1, 1))
    assert found.dtype == np.float32
    for crop, image in zip(found, images, strict=True):
        gaps = [abs(crop - each).max() for each in (image, image[:, ::-1])]
        assert min(gaps) < 1e-3


@pytest.mark.parametrize(
    "settings", [{"scale": (0, 1)}, {"scale": (0.5, 0.1)}, {"scale": (0.5, 2)}, {"ratio": (2, 1)}]
)
def test_settings_that_are_none(settings):
    with pytest.raises(InputError, match="give shares of the area up to 1 and sides' ratios"):
        random_resized_crop(jax.random.key(0), photo(8, 8)[None], 4, **settings)


def test_networks_see_the_middle_of_large_images():
    image = photo(256, 300)
    middle = image[16:240, 38:262]
    np.testing.assert_array_equal(
        IMAGENET_FAMILY.inputs(image[None]), IMAGENET_FAMILY.preprocess(middle)[None]
    )
    for family, shape in ((IMAGENET_FAMILY, (224, 224)), (CIFAR_FAMILY, (300, 260))):
        whole = photo(*shape)
        np.testing.assert_array_equal(family.inputs(whole), family.preprocess(whole))
    network = Classifier(VGG16(5, hidden=(3,), width=1 / 32), IMAGENET_FAMILY.inputs, (256, 256, 3))
    variables = jax.eval_shape(network.init, jax.random.key(0))
    assert variables["params"]["Dense_0"]["kernel"].shape == (7 * 7 * 16, 3)
