"""Every kind of data set name, subset rules, validation and preprocessing."""

import gzip
import hashlib
import importlib.util
import io
import json
import logging
import os
import shutil
import subprocess
import sys
import tracemalloc
import zipfile
from itertools import pairwise
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tensorflow_datasets as tfds
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image, UnidentifiedImageError

from madjax import datasets
from madjax.datasets import (
    CIFAR_FAMILY,
    IMAGENET_FAMILY,
    MNIST_FAMILY,
    Dataset,
    base_name,
    check_compatible,
    family_for,
    list_names,
    open_dataset,
)
from madjax.errors import InputError

ROOT = Path(__file__).parents[1]
# Where the full files lie on a developer's machine; nothing here needs them.
FULL = Path(os.environ.get("MADJAX_DATA", ROOT.parent / "shared" / "data"))
CHANNELS = 3


@pytest.fixture(autouse=True)
def _no_data_environment(monkeypatch, tmp_path_factory):
    monkeypatch.delenv("MADJAX_DATA", raising=False)
    monkeypatch.setenv("TFDS_DATA_DIR", str(tmp_path_factory.getbasetemp() / "no_tfds"))


def pixels(seed, *shape):
    return np.random.default_rng(seed).integers(0, 256, shape, dtype=np.uint8)


def arrays(n=6, m=4, shape=(8, 8, 3), k=3):
    """Keyword arguments of `np.savez` for a small set whose labels hit every class."""
    return {
        "x_train": pixels(0, n, *shape),
        "y_train": (np.arange(n) % k).astype(np.uint8),
        "x_test": pixels(1, m, *shape),
        "y_test": (np.arange(m) % k).astype(np.uint8),
    }


def dataset(**changes):
    small = arrays()
    fields = {
        "name": "small",
        "classes": ("a", "b", "c"),
        **{key: v.astype(np.int32) if key[0] == "y" else v for key, v in small.items()},
    }
    return Dataset(**(fields | changes))


def message(name, data_dir=None):
    """The error of opening `name`: it must be one line."""
    with pytest.raises(InputError) as caught:
        open_dataset(name, data_dir)
    assert "\n" not in str(caught.value)
    return str(caught.value)


def png(image):
    buffer = io.BytesIO()
    Image.fromarray(image).save(buffer, "png")
    return buffer.getvalue()


def write_tree(root, files):
    for name, content in files.items():
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_bytes(content)
    return root


# Families


def test_preprocess_matches_hand_computed_numbers():
    black_white = np.array([0, 255], np.uint8).reshape(1, 1, 2, 1)
    got = MNIST_FAMILY.preprocess(black_white)
    assert got.dtype == np.float32
    np.testing.assert_allclose(got.ravel(), [-0.424212917, 2.821486530], rtol=1e-6)
    colour = np.array([51, 102, 204], np.uint8).reshape(1, 1, 3)
    np.testing.assert_allclose(
        CIFAR_FAMILY.preprocess(colour).ravel(),
        [-1.440434998, -0.412236710, 1.758706468],
        rtol=1e-5,
    )
    np.testing.assert_allclose(
        IMAGENET_FAMILY.preprocess(colour).ravel(), [-1.244541485, -0.25, 1.751111111], rtol=1e-5
    )


@pytest.mark.parametrize("lead", [(), (5,), (2, 3)])
@pytest.mark.parametrize("family", [MNIST_FAMILY, CIFAR_FAMILY, IMAGENET_FAMILY])
def test_preprocess_is_the_same_in_numpy_and_under_jit(family, lead):
    x = pixels(0, *lead, 4, 6, len(family.mean))
    plain = family.preprocess(x)
    jitted = jax.jit(family.preprocess)(jnp.asarray(x))
    assert isinstance(plain, np.ndarray)
    assert jitted.dtype == jnp.float32
    assert plain.shape == jitted.shape == x.shape
    np.testing.assert_allclose(plain, jitted, rtol=1e-6, atol=1e-6)


def test_float_pixels_are_the_same_pixels():
    x = np.arange(32, dtype=np.uint8).reshape(2, 4, 4, 1)
    floats = MNIST_FAMILY.preprocess(x.astype(np.float32))
    np.testing.assert_array_equal(floats, MNIST_FAMILY.preprocess(x))


def test_preprocess_refuses_wrong_channels():
    with pytest.raises(InputError, match=r"\(1, 4, 4, 3\) do not fit family mnist"):
        MNIST_FAMILY.preprocess(np.zeros((1, 4, 4, 3), np.uint8))


@pytest.mark.parametrize(
    ("shape", "family"),
    [
        ((28, 28, 1), MNIST_FAMILY),
        ((224, 224, 1), MNIST_FAMILY),
        ((32, 32, 3), CIFAR_FAMILY),
        ((64, 64, 3), CIFAR_FAMILY),
        ((64, 65, 3), IMAGENET_FAMILY),
        ((224, 224, 3), IMAGENET_FAMILY),
    ],
)
def test_family_for(shape, family):
    assert family_for(shape) is family


def test_family_for_names_odd_channel_counts():
    with pytest.raises(InputError, match="4 channels"):
        family_for((8, 8, 4))


# Dataset


def test_dataset_properties():
    small = dataset()
    assert small.num_classes == 3
    assert small.image_shape == (8, 8, 3)
    assert small.family is CIFAR_FAMILY
    assert dataset(family=IMAGENET_FAMILY).family is IMAGENET_FAMILY


@pytest.mark.parametrize(
    ("changes", "text"),
    [
        ({"x_train": pixels(0, 6, 8, 8, 3) / 255.0}, "x_train of data set 'small' is float64"),
        ({"x_train": pixels(0, 6, 8, 8)}, r"uint8 \[6, 8, 8\]"),
        ({"y_train": np.zeros(6, np.int64)}, "y_train of data set 'small' is int64"),
        ({"y_train": np.zeros((6, 3), np.int32)}, r"int32 \[6, 3\]"),
        ({"y_train": np.zeros(5, np.int32)}, "6 images but 5 labels"),
        ({"y_test": np.full(4, 3, np.int32)}, r"y_test .* spans 3\.\.3 but there are 3"),
        ({"y_train": np.arange(6, dtype=np.int32) % 3 - 1}, r"spans -1\.\.1"),
        ({"x_test": pixels(0, 4, 9, 8, 3)}, "8x8x3 train images but 9x8x3 test"),
        ({"x_train": pixels(0, 0, 8, 8, 3), "y_train": np.zeros(0, np.int32)}, "no train images"),
        ({"family": MNIST_FAMILY}, "family mnist does not fit the 8x8x3"),
    ],
)
def test_dataset_checks_its_arrays(changes, text):
    with pytest.raises(InputError, match=text) as caught:
        dataset(**changes)
    assert "\n" not in str(caught.value)


def test_dataset_may_have_no_test_part():
    empty = dataset(x_test=pixels(0, 0, 8, 8, 3), y_test=np.zeros(0, np.int32))
    assert len(empty.y_test) == 0


def test_check_compatible_names_both_sets_and_shapes():
    query = dataset(
        name="query",
        x_train=pixels(0, 6, 9, 8, 3),
        x_test=pixels(0, 4, 9, 8, 3),
        classes=tuple("abcd"),
    )
    check_compatible(dataset(), dataset(name="other", classes=tuple("abcdefg")))
    with pytest.raises(InputError, match=r"'query' has 9x8x3 .* 'small' has 8x8x3"):
        check_compatible(dataset(), query)


# Embedded sets


def digest(array):
    return hashlib.sha256(np.ascontiguousarray(array).tobytes()).hexdigest()[:16]


def test_embedded_mnist():
    mnist = open_dataset("embedded:mnist")
    assert mnist.x_train.shape == (10_000, 28, 28, 1)
    assert mnist.x_test.shape == (2_000, 28, 28, 1)
    assert mnist.y_train.dtype == mnist.y_test.dtype == np.int32
    assert mnist.classes == tuple("0123456789")
    assert mnist.family is MNIST_FAMILY
    assert np.bincount(mnist.y_train).tolist() == [
        1001, 1127, 991, 1032, 980, 863, 1014, 1070, 944, 978,
    ]  # fmt: skip
    assert digest(mnist.x_train) == "2f7182bf021ffc5c"
    assert digest(mnist.y_train.astype(np.uint8)) == "2f345bad07338ec5"
    assert digest(mnist.x_test) == "170ff6838184f9ec"
    assert digest(mnist.y_test.astype(np.uint8)) == "949a3782a9c308bf"


def test_embedded_fashion_mnist():
    fashion = open_dataset("embedded:fashion_mnist")
    assert fashion.x_train.shape == (12_000, 28, 28, 1)
    assert fashion.x_test.shape == (0, 28, 28, 1)
    assert fashion.classes[0] == "T-shirt/top"
    assert fashion.classes[9] == "Ankle boot"
    assert digest(fashion.x_train) == "04d01e31a4efd6ed"
    assert digest(fashion.y_train.astype(np.uint8)) == "d296805e35a4cabb"
    check_compatible(open_dataset("embedded:mnist[:10]"), fashion)


def test_embedded_files_stay_small():
    assert sum(path.stat().st_size for path in (ROOT / "madjax" / "data").iterdir()) < 8_000_000


def test_unknown_embedded_name_lists_the_known():
    assert "choose one of fashion_mnist, mnist" in message("embedded:cifar10")


@pytest.mark.skipif(not (FULL / "mnist.npz").is_file(), reason="full data files are not here")
def test_embedded_sets_are_the_heads_of_the_full_sets():
    full = open_dataset("mnist", FULL)
    assert np.bincount(full.y_train).tolist() == [
        5923, 6742, 5958, 6131, 5842, 5421, 5918, 6265, 5851, 5949,
    ]  # fmt: skip
    assert np.bincount(full.y_test).tolist() == [
        980, 1135, 1032, 1010, 982, 892, 958, 1028, 974, 1009,
    ]  # fmt: skip
    head = open_dataset("embedded:mnist")
    np.testing.assert_array_equal(full.x_train[:10_000], head.x_train)
    np.testing.assert_array_equal(full.y_test[:2_000], head.y_test)
    fashion = open_dataset("fashion_mnist", FULL)
    assert np.bincount(fashion.y_train).tolist() == [6000] * 10
    np.testing.assert_array_equal(
        fashion.x_train[:12_000], open_dataset("embedded:fashion_mnist").x_train
    )


def load_script(name):
    spec = importlib.util.spec_from_file_location(name, ROOT / "experiments" / f"{name}.py")
    script = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(script)
    return script


def test_embedding_script_is_deterministic_and_cuts_heads(tmp_path):
    script = load_script("make_embedded_data")
    np.savez(tmp_path / "full.npz", **arrays())
    for out in ("a.npz", "b.npz"):
        script.write_npz(tmp_path / out, script.cut(tmp_path / "full.npz", 4, 3, tuple("xyz")))
    assert (tmp_path / "a.npz").read_bytes() == (tmp_path / "b.npz").read_bytes()
    small = open_dataset(f"npz:{tmp_path / 'a.npz'}")
    np.testing.assert_array_equal(small.x_train, arrays()["x_train"][:4])
    np.testing.assert_array_equal(small.y_test, arrays()["y_test"][:3])
    assert small.classes == ("x", "y", "z")


def line_of(letter, fold, raster):
    pixels = "\t".join(map(str, np.ravel(raster).astype(int)))
    return f"1\t{letter}\t-1\t1\t1\t{fold}\t{pixels}\t\n"  # as in the file, a tab at its end


def test_the_letters_are_scaled_and_centred_and_parted_by_fold(tmp_path):
    """A block of all 16x8 pixels is 20 high and 14 wide; 4x4 pixels grow 2.2-fold alone."""
    script = load_script("make_kassel_letters")
    block, dot = np.ones((16, 8)), np.zeros((16, 8))
    dot[2:6, 4:] = 1
    lines = "".join(line_of(*each) for each in (("b", 0, block), ("b", 9, dot), ("a", 8, dot)))
    with gzip.open(tmp_path / "letter.data.gz", "wt") as file:
        file.write(lines)
    script.convert(tmp_path / "letter.data.gz", tmp_path / "letters.npz")
    made = open_dataset(f"npz:{tmp_path / 'letters.npz'}")
    assert (made.y_train.tolist(), made.y_test.tolist()) == ([1, 0], [1])
    image = made.x_train[0, ..., 0].astype(int)
    np.testing.assert_array_equal(image, image[::-1, ::-1])
    inside = image > 127
    assert (inside.any(axis=1).sum(), inside.any(axis=0).sum()) == (20, 14)
    spot = made.x_test[0, ..., 0] > 127
    rows, columns = map(np.flatnonzero, (spot.any(axis=1), spot.any(axis=0)))
    assert (len(rows), len(columns)) == (10, 12)  # 9.3, in 14 rows
    assert abs(rows.mean() - 13.5) <= 0.5
    assert abs(columns.mean() - 13.5) <= 0.5


@pytest.mark.parametrize(
    "line",
    [
        "",
        line_of("a", 0, np.ones((16, 7))),
        line_of("a", 0, np.zeros((16, 8))),
        line_of("a", 0, np.full((16, 8), 2)),
        line_of("A", 0, np.ones((16, 8))),
        line_of("a", "x", np.ones((16, 8))),
    ],
    ids=["empty", "short", "blank", "grey", "letter", "fold"],
)
def test_a_line_without_a_letter_is_refused(line, tmp_path, monkeypatch, capsys):
    script = load_script("make_kassel_letters")
    (tmp_path / "letter.data").write_text(line_of("a", 0, np.ones((16, 8))) + line + "\n")
    out = tmp_path / "letters.npz"
    words = ["make_kassel_letters", str(tmp_path / "letter.data"), "--out", str(out)]
    monkeypatch.setattr("sys.argv", words)
    assert script.main() == 2
    assert "line 2 has no letter of 16x8 pixels" in capsys.readouterr().err
    assert not out.exists()
    (tmp_path / "letter.data").write_text("")
    assert script.main() == 2
    assert "letter.data: the file is empty" in capsys.readouterr().err


def test_half_a_download_of_letters_is_refused(tmp_path, monkeypatch, capsys):
    script = load_script("make_kassel_letters")
    lines = "".join(line_of("a", 0, pixels(i, 16, 8) % 2) for i in range(50))
    packed, source = gzip.compress(lines.encode()), tmp_path / "letter.data.gz"
    monkeypatch.setattr("sys.argv", ["make_kassel_letters", str(source)])
    broken = packed[:200] + bytes([packed[200] ^ 255]) + packed[201:]
    for damaged in (packed[: len(packed) // 2], broken, lines.encode()):
        source.write_bytes(damaged)
        assert script.main() == 2
        assert f"error: {source}: " in capsys.readouterr().err


def test_letters_are_written_where_they_are_asked_for_or_not_made(tmp_path, monkeypatch, capsys):
    """The name is kept, whatever its suffix."""
    script = load_script("make_kassel_letters")
    source, out = tmp_path / "letter.data", tmp_path / "none" / "letters"
    monkeypatch.setattr("sys.argv", ["make_kassel_letters", str(source), "--out", str(out)])
    assert script.main() == 2
    assert f"there is no directory {out.parent}; make it" in capsys.readouterr().err
    out.parent.mkdir()
    assert script.main() == 2
    assert f"No such file or directory: '{source}'" in capsys.readouterr().err
    source.write_text(line_of("a", 0, np.ones((16, 8))))
    assert script.main() == 0
    assert capsys.readouterr().out == "letters: 1 train and 0 test images\n"
    assert [path.name for path in out.parent.iterdir()] == ["letters"]


@pytest.mark.skipif(not (FULL / "kassel_letters.npz").is_file(), reason="full data are not here")
def test_the_letters_are_those_of_the_runs():
    script = load_script("make_kassel_letters")
    with np.load(FULL / "kassel_letters.npz") as full:
        if "raw_test" not in full:
            pytest.skip("the rasters are not here")
        rasters = np.unpackbits(full["raw_test"], axis=1).reshape(-1, 16, 8)
        lines = [
            line_of(chr(ord("a") + y), 9, r) for y, r in zip(full["y_test"], rasters, strict=True)
        ]
        made = script.letters(lines[::9])
        np.testing.assert_array_equal(made["x_test"], full["x_test"][::9])
        np.testing.assert_array_equal(made["y_test"], full["y_test"][::9])


# .npz


def test_npz_with_all_keys(tmp_path):
    np.savez(tmp_path / "set.npz", **arrays(), classes=np.array(["cat", "dog", "eel"]))
    small = open_dataset(f"npz:{tmp_path / 'set.npz'}")
    assert small.name == f"npz:{tmp_path / 'set.npz'}"
    assert small.classes == ("cat", "dog", "eel")
    assert small.y_train.dtype == np.int32
    for key, value in arrays().items():
        np.testing.assert_array_equal(getattr(small, key), value)


def test_npz_grey_without_channel_axis_test_part_or_class_names(tmp_path):
    x = pixels(0, 5, 7, 6)
    np.savez(tmp_path / "grey.npz", x_train=x, y_train=np.array([0, 4, 1, 3, 2]))
    grey = open_dataset(f"npz:{tmp_path / 'grey.npz'}")
    np.testing.assert_array_equal(grey.x_train, x[..., None])
    assert grey.x_test.shape == (0, 7, 6, 1)
    assert grey.classes == ("0", "1", "2", "3", "4")


def test_class_names_cover_labels_seen_in_the_test_part_only(tmp_path):
    np.savez(tmp_path / "set.npz", **(arrays() | {"y_test": np.array([0, 1, 2, 7])}))
    with pytest.warns(UserWarning, match=r"5 of its 8 classes \(labels 3, 4, 5, 6, 7\)"):
        assert open_dataset(f"npz:{tmp_path / 'set.npz'}").num_classes == 8


def test_npz_mistakes(tmp_path):
    path = tmp_path / "set.npz"
    assert "check the path" in message(f"npz:{path}")
    np.savez(path, x=1, labels=2)
    assert "lacks x_train, y_train (it has labels, x)" in message(f"npz:{path}")
    np.savez(path, **{k: v for k, v in arrays().items() if k != "y_test"})
    assert "lacks y_test" in message(f"npz:{path}")
    np.savez(path, **(arrays() | {"x_train": np.array([{}], object)}))
    assert "cannot be read as .npz" in message(f"npz:{path}")
    np.savez(path, **(arrays() | {"y_train": np.eye(6)[:, :3]}))
    assert "give labels, int32 [N]" in message(f"npz:{path}")
    path.write_bytes(b"PK\x03\x04 cut off")
    assert "cannot be read as .npz" in message(f"npz:{path}")
    with path.open("wb") as file:
        np.save(file, np.arange(3))
    assert "cannot be read as .npz" in message(f"npz:{path}")


def test_npz_with_damaged_lzma_bytes(tmp_path):
    source = ROOT / "madjax" / "data" / "mnist.npz"
    damaged = bytearray(source.read_bytes())
    damaged[1000:1400] = bytes(400)
    (tmp_path / "mnist.npz").write_bytes(damaged)
    assert "cannot be read as .npz" in message("mnist", tmp_path)


# Sheets


def write_sheets(path, x, y, per_sheet=128, **extra):
    """The sheet format from its description: 64 images to a row, lossless WebP, joined bytes."""
    side, blobs = x.shape[1], []
    for start in range(0, len(x), per_sheet):
        part = x[start : start + per_sheet]
        rows = -(-len(part) // 64)
        sheet = np.zeros((rows * side, 64 * side, 3), np.uint8)
        for i, image in enumerate(part):
            row, column = divmod(i, 64)
            sheet[row * side : (row + 1) * side, column * side : (column + 1) * side] = image
        buffer = io.BytesIO()
        Image.fromarray(sheet).save(buffer, "webp", lossless=True, method=0)
        blobs.append(np.frombuffer(buffer.getvalue(), np.uint8))
    off = np.cumsum([0, *map(len, blobs)])
    np.savez(path, webp=np.concatenate(blobs), off=off, y=y, **extra)


def test_sheets_give_back_the_pixels_in_order(tmp_path):
    n = 12 * 3
    x, y = pixels(0, 250, 4, 4, 3), (np.arange(250) % 5).astype(np.uint8)
    names = np.array(["a", "b", "c", "d", "e"])
    # Eleven parts, so that part 10 would come before part 2 if sorted as text; several full and
    # unfilled sheets in part 0.
    bounds = [0, 150, *range(160, 251, 10)]
    for part, (a, b) in enumerate(pairwise(bounds)):
        write_sheets(tmp_path / f"tiny_train_{part}.npz", x[a:b], y[a:b], classes=names)
    write_sheets(tmp_path / "tiny_test.npz", x[:n], y[:n])
    tiny = open_dataset("tiny", tmp_path)
    assert len(list(tmp_path.glob("tiny_train_*"))) == 11
    np.testing.assert_array_equal(tiny.x_train, x)
    np.testing.assert_array_equal(tiny.y_train, y)
    np.testing.assert_array_equal(tiny.x_test, x[:n])
    assert tiny.classes == tuple("abcde")
    (tmp_path / "tiny_test.npz").unlink()
    assert len(open_dataset("tiny", tmp_path).x_test) == 0


def test_sheets_with_a_missing_or_damaged_part(tmp_path):
    x, y = pixels(0, 70, 4, 4, 3), np.zeros(70, np.uint8)
    for part in (0, 1, 2):
        write_sheets(tmp_path / f"tiny_train_{part}.npz", x, y)
    (tmp_path / "tiny_train_1.npz").unlink()
    assert "lacks part tiny_train_1.npz" in message("tiny", tmp_path)
    np.savez(tmp_path / "tiny_train_1.npz", webp=np.zeros(9, np.uint8), off=[0, 9], y=y)
    assert "tiny_train_1.npz' cannot be decoded" in message("tiny", tmp_path)
    np.savez(tmp_path / "tiny_train_1.npz", webp=np.zeros(9, np.uint8), y=y)
    assert "tiny_train_1.npz' lacks off" in message("tiny", tmp_path)


@pytest.mark.skipif(not (FULL / "cifar10_train_0.npz").is_file(), reason="full data files missing")
def test_real_cifar10_test_sheets():
    *test, names = datasets.npz._load_sheets([FULL / "cifar10_test.npz"])
    assert test[0].shape == (10_000, 32, 32, 3)
    assert np.bincount(test[1]).tolist() == [1000] * 10
    assert names[0] == "airplane"


# Folders


def colour_files():
    return {
        f"{split}/{label}/{i}.png": png(pixels(seed, 5, 6, 3))
        for seed, (split, label, i) in enumerate(
            (split, label, i)
            for split, label in [("train", "dog"), ("train", "cat"), ("test", "cat")]
            for i in range(2)
        )
    }


def check_colour_set(opened):
    assert opened.classes == ("cat", "dog")
    assert opened.y_train.tolist() == [0, 0, 1, 1]
    assert opened.y_test.tolist() == [0, 0]
    expected = [pixels(seed, 5, 6, 3) for seed in (2, 3, 0, 1)]
    np.testing.assert_array_equal(opened.x_train, np.stack(expected))
    np.testing.assert_array_equal(opened.x_test[1], pixels(5, 5, 6, 3))


def test_folder_and_zip_hold_the_same_set(tmp_path):
    root = write_tree(tmp_path / "pets", colour_files())
    (root / "train" / "dog" / "._0.png").write_bytes(b"a resource fork")
    check_colour_set(open_dataset(f"folder:{root}"))
    check_colour_set(open_dataset("pets", tmp_path))
    with zipfile.ZipFile(tmp_path / "zipped.zip", "w") as archive:
        for name in reversed(colour_files()):
            archive.writestr(name, colour_files()[name])
        archive.writestr("__MACOSX/train/dog/0.png", b"not an image")
    check_colour_set(open_dataset(f"folder:{tmp_path / 'zipped.zip'}"))
    check_colour_set(open_dataset("zipped", tmp_path))


def test_folder_without_splits_is_all_train(tmp_path):
    root = write_tree(tmp_path, {f"{c}/0.PNG": png(pixels(0, 4, 4)) for c in "ab"})
    grey = open_dataset(f"folder:{root}")
    assert grey.image_shape == (4, 4, 1)
    assert grey.y_train.tolist() == [0, 1]
    assert len(grey.y_test) == 0


def test_folder_val_stands_in_for_test_and_grey_joins_colour(tmp_path):
    files = {"train/a/0.png": png(pixels(0, 4, 4)), "train/b/0.png": png(pixels(1, 4, 4, 3))}
    root = write_tree(tmp_path, files | {"val/b/0.png": png(pixels(2, 4, 4, 3))})
    mixed = open_dataset(f"folder:{root}")
    np.testing.assert_array_equal(mixed.x_train[0], np.repeat(pixels(0, 4, 4, 1), CHANNELS, axis=2))
    np.testing.assert_array_equal(mixed.x_test[0], pixels(2, 4, 4, 3))
    write_tree(root, {"test/a/0.png": png(pixels(3, 4, 4, 3))})
    both = open_dataset(f"folder:{root}")
    np.testing.assert_array_equal(both.x_test, pixels(3, 4, 4, 3)[None])


def test_folder_names_the_image_of_odd_size(tmp_path):
    root = write_tree(tmp_path, colour_files())
    (root / "test" / "cat" / "0.png").write_bytes(png(pixels(0, 6, 6, 3)))  # the first one read
    text = message(f"folder:{root}")
    assert "test/cat/0.png is 6x6 but most are 5x6" in text


@pytest.mark.parametrize("archived", [False, True])
@pytest.mark.parametrize("damage", [lambda b: b[: len(b) // 2], lambda b: b"text"])
def test_corrupt_image_is_named(tmp_path, damage, archived):
    files = colour_files()
    files["train/dog/1.png"] = damage(files["train/dog/1.png"])
    root = write_tree(tmp_path / "pets", files)
    if archived:
        shutil.make_archive(str(root), "zip", root)
        root = tmp_path / "pets.zip"
    assert f"{root}/train/dog/1.png is corrupt" in message(f"folder:{root}")


def test_sixteen_bit_images_are_refused(tmp_path):
    deep = np.arange(16, dtype=np.uint16).reshape(4, 4) * 4096
    write_tree(tmp_path, {"a/0.png": png(deep)})
    assert "a/0.png has I;16 pixels" in message(f"folder:{tmp_path}")


def test_folder_mistakes(tmp_path):
    assert "no folder or .zip" in message(f"folder:{tmp_path / 'none'}")
    assert "(it has no files): expected" in message(f"folder:{tmp_path}")
    (tmp_path / "bad.zip").write_text("text")
    assert "not a readable .zip" in message(f"folder:{tmp_path / 'bad.zip'}")
    one = png(pixels(0, 4, 4))
    root = write_tree(tmp_path / "x", {"test/a/0.png": one})
    assert "no train images" in message(f"folder:{root}")
    write_tree(root, {"training/a/0.png": one})
    text = message(f"folder:{root}")
    assert f"{root}/training/a/0.png is not at [train|test|val|valid|validation/]CLASS" in text


FORMATS = ["bmp", "webp", "gif", "tiff", "ppm", "tga", "jp2", "jpg"]


@pytest.mark.parametrize("suffix", FORMATS)
def test_every_raster_format_that_pillow_opens_is_read(tmp_path, suffix):
    root = write_tree(tmp_path, {"a/0.png": png(pixels(0, 8, 8, 3))})
    (root / "b").mkdir()
    picture = Image.fromarray(pixels(1, 8, 8, 3))
    options = {"lossless": True} if suffix == "webp" else {}
    picture.save(root / "b" / f"0.{suffix}", **options)
    opened = open_dataset(f"folder:{root}")
    assert opened.y_train.tolist() == [0, 1]
    if suffix not in ("gif", "jpg", "jp2"):  # which lose colours
        np.testing.assert_array_equal(opened.x_train[1], pixels(1, 8, 8, 3))


def test_files_that_are_no_images_are_counted_in_one_warning(tmp_path):
    root = write_tree(tmp_path, colour_files())
    for name in ("notes.txt", "train/labels.TXT", "train/cat/0.svg", "Makefile"):
        (root / name).write_text("not an image")
    with pytest.warns(UserWarning, match="4 files are no images") as caught:
        check_colour_set(open_dataset(f"folder:{root}"))
    assert len(caught) == 1
    assert str(caught[0].message).endswith("2 with .txt, 1 with no suffix, 1 with .svg")
    assert caught[0].filename == __file__


@pytest.mark.parametrize("archived", [False, True])
@pytest.mark.parametrize("content", [{}, {"note.txt": b"text"}, {"0.heic_": b"pixels"}])
def test_a_class_without_images_is_named(tmp_path, content, archived):
    """Left out in silence, it would shift the labels of all that follow."""
    root = write_tree(tmp_path / "pets", colour_files())
    (root / "train" / "cow").mkdir()
    write_tree(root / "train" / "cow", content)
    if archived:
        shutil.make_archive(str(root), "zip", root)
        root = tmp_path / "pets.zip"
    assert "class folder 'cow' of the train part" in message(f"folder:{root}")


def test_a_class_without_images_in_a_part_that_is_not_read_does_no_harm(tmp_path):
    root = write_tree(tmp_path, colour_files())
    (root / "val" / "cow").mkdir(parents=True)
    (root / ".git" / "objects").mkdir(parents=True)
    check_colour_set(open_dataset(f"folder:{root}"))


@pytest.mark.parametrize("other", ["Cat", "cat ", "cAT"])
def test_classes_that_differ_by_case_or_spaces_are_named(tmp_path, other):
    one = png(pixels(0, 4, 4))
    root = write_tree(tmp_path / "a", {"train/cat/0.png": one, f"train/{other}/0.png": one})
    text = message(f"folder:{root}")
    assert repr(other) in text
    assert "'cat'" in text
    assert "alone: join or rename" in text
    root = write_tree(tmp_path / "b", {"train/cat/0.png": one, f"test/{other}/0.png": one})
    text = message(f"folder:{root}")
    assert f"class {other!r} of the test part" in text
    assert "it has 'cat'" in text


def test_a_test_class_that_train_lacks_is_named(tmp_path):
    one = png(pixels(0, 4, 4))
    files = {"train/cat/0.png": one, "validation/cat/0.png": one, "validation/eel/0.png": one}
    text = message(f"folder:{write_tree(tmp_path, files)}")
    assert "class 'eel' of the val part" in text
    assert "not in its train part: give both" in text


def test_class_names_are_compared_in_composed_unicode(tmp_path):
    """As macOS writes them in two code points, and others in one."""
    one = png(pixels(0, 4, 4))
    composed, apart = "caf\u00e9", "cafe\u0301"
    files = {f"train/{apart}/0.png": one, "train/zoo/0.png": one, f"test/{composed}/0.png": one}
    opened = open_dataset(f"folder:{write_tree(tmp_path / 'a', files)}")
    assert opened.classes == (composed, "zoo")
    assert opened.y_test.tolist() == [0]
    files = {f"train/{apart}/0.png": one, f"train/{composed}/0.png": one}
    assert "Unicode form alone" in message(f"folder:{write_tree(tmp_path / 'b', files)}")


@pytest.mark.parametrize("held_out", ["val", "valid", "validation", "Test", "VALID"])
def test_known_splits(tmp_path, held_out):
    files = {n.replace("test/", f"{held_out}/"): f for n, f in colour_files().items()}
    files = {n.replace("train/", "Train/"): f for n, f in files.items()}
    check_colour_set(open_dataset(f"folder:{write_tree(tmp_path, files)}"))


@pytest.mark.parametrize("around", ["pets", "archive/pets-main"])
@pytest.mark.parametrize("archived", [False, True])
def test_a_folder_around_the_layout_is_looked_through(tmp_path, around, archived):
    root = write_tree(tmp_path / "set", {f"{around}/{n}": f for n, f in colour_files().items()})
    with zipfile.ZipFile(tmp_path / "set.zip", "w") as archive:
        for name, content in colour_files().items():
            archive.writestr(f"{around}/{name}", content)
    check_colour_set(open_dataset(f"folder:{tmp_path / 'set.zip' if archived else root}"))


def test_a_folder_around_classes_without_splits_is_looked_through(tmp_path):
    root = write_tree(tmp_path, {f"all/{c}/0.png": png(pixels(0, 4, 4)) for c in "ab"})
    assert open_dataset(f"folder:{root}").classes == ("a", "b")
    (root / "all" / "c").mkdir()
    assert "class folder 'c'" in message(f"folder:{root}")
    lone = write_tree(tmp_path / "lone", {"a/0.png": png(pixels(0, 4, 4))})
    assert open_dataset(f"folder:{lone}").classes == ("a",), "a class is no wrapping"


def test_an_unknown_layout_names_the_first_file_and_what_was_expected(tmp_path):
    write_tree(tmp_path, {"b/notes.md": b"text", "a.csv": b"text"})
    text = message(f"folder:{tmp_path}")
    assert "its first file is a.csv): expected [train|test|val|valid|validation/]CLASS" in text
    write_tree(tmp_path, {"0.png": png(pixels(0, 4, 4))})
    assert f"{tmp_path}/0.png is not at [train|test|" in message(f"folder:{tmp_path}")


def saved(image, kind="png", **options):
    buffer = io.BytesIO()
    image.save(buffer, kind, **options)
    return buffer.getvalue()


@pytest.mark.parametrize("mode", ["RGBA", "LA", "P", "webp", "L with a transparent level"])
def test_transparent_pixels_are_white(tmp_path, mode):
    """A black glyph: without its background it would be black on black."""
    alpha = np.zeros((4, 4), np.uint8)
    alpha[1:3, 1] = 255
    if mode == "LA":
        content = saved(Image.fromarray(np.stack([0 * alpha, alpha], -1), "LA"))
    elif mode == "P":
        picture = Image.fromarray((alpha > 0).astype(np.uint8), "P")
        picture.putpalette([0, 0, 0, 0, 0, 0])
        content = saved(picture, transparency=0)
    elif mode == "L with a transparent level":
        content = saved(Image.fromarray(np.where(alpha, 0, 7).astype(np.uint8)), transparency=7)
    else:
        rgba = np.concatenate([np.zeros((4, 4, 3), np.uint8), alpha[..., None]], -1)
        kind = "webp" if mode == "webp" else "png"
        options = {"lossless": True, "exact": True} if kind == "webp" else {}
        content = saved(Image.fromarray(rgba), kind, **options)
    root = write_tree(tmp_path, {"a/0.png": content})
    image = open_dataset(f"folder:{root}").x_train[0]
    np.testing.assert_array_equal(image, np.repeat(255 - alpha[..., None], image.shape[2], 2))


def test_half_transparent_pixels_are_mixed_with_white(tmp_path):
    rgba = np.full((4, 4, 4), [255, 0, 0, 128], np.uint8)
    root = write_tree(tmp_path, {"a/0.png": saved(Image.fromarray(rgba))})
    np.testing.assert_array_equal(open_dataset(f"folder:{root}").x_train[0, 0, 0], [255, 127, 127])


@pytest.mark.parametrize("archived", [False, True])
def test_an_empty_image_file_is_named(tmp_path, archived):
    root = write_tree(tmp_path / "pets", colour_files() | {"train/dog/1.png": b""})
    if archived:
        shutil.make_archive(str(root), "zip", root)
        root = tmp_path / "pets.zip"
    assert f"{root}/train/dog/1.png is an empty file" in message(f"folder:{root}")


def test_a_zip_says_its_size_before_it_takes_the_memory(tmp_path):
    path = tmp_path / "bomb.zip"
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("train/a/0.png", png(pixels(0, 4, 4)))
        with archive.open("train/b/0.png", "w") as entry:
            for _ in range(200):
                entry.write(bytes(1 << 20))
    assert path.stat().st_size < 500_000
    tracemalloc.start()
    text = message(f"folder:{path}")
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert "train/b/0.png unpacks to 210 MB" in text
    assert peak < 20e6


def test_a_link_to_a_folder_around_it_is_not_followed(tmp_path):
    root = write_tree(tmp_path, colour_files())
    (root / "train" / "cat" / "loop").symlink_to(root / "train")
    check_colour_set(open_dataset(f"folder:{root}"))


def test_a_linked_class_is_read(tmp_path):
    one = png(pixels(0, 4, 4))
    root = write_tree(tmp_path, {"set/a/0.png": one, "elsewhere/0.png": one})
    (root / "set" / "b").symlink_to(root / "elsewhere")
    assert open_dataset(f"folder:{root / 'set'}").classes == ("a", "b")


# Labels


@pytest.mark.parametrize(
    ("labels", "text"),
    [
        (np.array([0, 1, 2**32 + 1]), "run from 0 to 4294967297"),
        (np.array([0, 1, 2**63 + 1], np.uint64), "run from 0 to 9223372036854775809"),
        (np.array([0, 1, 2**31]), "run from 0 to 2147483648"),
        (np.array([0, 1, -1]), "run from -1 to 1"),
        (np.array([0, 1, -(2**32)]), "run from -4294967296 to 1"),
    ],
)
@pytest.mark.parametrize("split", ["train", "test"])
def test_labels_are_looked_at_before_they_are_cast(tmp_path, labels, text, split):
    np.savez(tmp_path / "set.npz", **(arrays(n=3, m=3) | {f"y_{split}": labels}))
    assert text in message(f"npz:{tmp_path / 'set.npz'}")


@pytest.mark.parametrize(
    ("labels", "text"),
    [
        ([1, 2, 3], r"1 of its 4 classes \(labels 0\)"),
        ([0, 2, 5], r"3 of its 6 classes \(labels 1, 3, 4\)"),
        ([0, 1, 90], r"88 of its 91 classes \(labels 2, 3, 4, 5, 6, \.\.\.\)"),
    ],
)
def test_labels_from_1_or_with_gaps_are_a_warning(tmp_path, labels, text):
    np.savez(tmp_path / "set.npz", **(arrays(n=3, m=0) | {"y_train": np.array(labels)}))
    with pytest.warns(UserWarning, match=text):
        open_dataset("set", tmp_path)


@pytest.mark.parametrize("channels", [1, 3])
def test_channels_first_says_how_to_transpose(tmp_path, channels):
    np.savez(tmp_path / "set.npz", **arrays(shape=(channels, 8, 8)))
    text = message("set", tmp_path)
    assert f"shape [6, {channels}, 8, 8], channels first" in text
    assert "x_train.transpose(0, 2, 3, 1)" in text
    good = {
        k: v.transpose(0, 2, 3, 1) if k[0] == "x" else v
        for k, v in arrays(shape=(channels, 8, 8)).items()
    }
    np.savez(tmp_path / "set.npz", **good)
    assert open_dataset("set", tmp_path).image_shape == (8, 8, channels)


# Bare names and schemes


def test_a_bare_file_name_is_that_file(tmp_path):
    np.savez(tmp_path / "set.npz", **arrays())
    opened = open_dataset("set.npz[:4]", tmp_path)
    assert len(opened.x_train) == 4
    assert base_name("set.npz[:4]") == "set"
    write_tree(tmp_path / "pets", colour_files())
    shutil.make_archive(str(tmp_path / "pets"), "zip", tmp_path / "pets")
    check_colour_set(open_dataset("pets.zip", tmp_path))


@pytest.mark.parametrize(
    ("name", "base"),
    [
        ("tfds:emnist/letters", "emnist_letters"),
        ("tfds:emnist/letters:3.1.0[:50]", "emnist_letters"),
        ("tfds:mnist:3.0.1", "mnist"),
        ("tfds:mnist", "mnist"),
        ("folder:/data/cub200/", "cub200"),
        ("npz:data/mnist.npz[:5]", "mnist"),
        ("embedded:mnist", "mnist"),
    ],
)
def test_names_in_rows(name, base):
    assert base_name(name) == base


def test_a_path_that_ends_in_a_bracket_takes_a_rule_after_it(tmp_path):
    root = write_tree(tmp_path / "pets [old]", colour_files())
    assert "after a path that itself ends in ], write [:]" in message(f"folder:{root}")
    check_colour_set(open_dataset(f"folder:{root}[:]"))


def test_bare_name_prefers_data_dir_then_environment(tmp_path, monkeypatch):
    for folder, n in (("near", 3), ("far", 5)):
        (tmp_path / folder).mkdir()
        np.savez(tmp_path / folder / "set.npz", **arrays(n=n))
    np.savez(tmp_path / "far" / "only.npz", **arrays(n=4))
    monkeypatch.setenv("MADJAX_DATA", str(tmp_path / "far"))
    assert len(open_dataset("set", tmp_path / "near").y_train) == 3
    assert len(open_dataset("only", tmp_path / "near").y_train) == 4
    assert len(open_dataset("set").y_train) == 5
    assert open_dataset("set").name == "set"


def test_unknown_bare_name_lists_what_is_there(tmp_path):
    np.savez(tmp_path / "set.npz", **arrays())
    write_sheets(tmp_path / "tiny_train_0.npz", pixels(0, 2, 4, 4, 3), np.zeros(2, np.uint8))
    write_sheets(tmp_path / "tiny_test.npz", pixels(0, 2, 4, 4, 3), np.zeros(2, np.uint8))
    write_tree(tmp_path / "pets", colour_files())
    (tmp_path / "papers").mkdir()
    names = ("embedded:fashion_mnist", "embedded:mnist", "pets", "set", "tiny")
    assert list_names(tmp_path) == names
    assert f"use one of {', '.join(names)}, or" in message("nope", tmp_path)
    assert "$MADJAX_DATA unset" in message("nope")


@pytest.mark.parametrize("name", ["", "..", "a/b", "/set"])
def test_bare_names_are_no_paths(name, tmp_path):
    assert "write npz:PATH or folder:PATH" in message(name, tmp_path)


def test_unknown_scheme():
    assert "unknown scheme 'hf'" in message("hf:mnist")


def test_importing_does_not_load_tfds():
    code = "import sys, madjax.datasets; print('tensorflow_datasets' in sys.modules)"
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True
    )
    assert done.stdout.strip() == "False"


# Subset rules


@pytest.fixture(scope="module")
def twenty(tmp_path_factory):
    path = tmp_path_factory.mktemp("twenty") / "twenty.npz"
    np.savez(path, **arrays(n=20, m=7, shape=(2, 2, 1)))
    return path


bound = st.none() | st.integers(-25, 25)
step = st.none() | st.integers(-4, 4).filter(bool)


def written(rule):
    parts = ["" if p is None else str(p) for p in (rule.start, rule.stop, rule.step)]
    return ":".join(parts if rule.step is not None else parts[:2])


@settings(max_examples=60, deadline=None)
@given(st.builds(slice, bound, bound, step), st.none() | st.builds(slice, bound, bound, step))
def test_subset_rule_is_a_numpy_slice(twenty, train, test):
    whole = arrays(n=20, m=7, shape=(2, 2, 1))
    rules = [train] if test is None else [train, test]
    name = f"npz:{twenty}[{','.join(map(written, rules))}]"
    cut = {"train": train, "test": slice(None) if test is None else test}
    if any(not len(whole[f"y_{split}"][rule]) for split, rule in cut.items()):
        assert "widen it" in message(name)
        return
    got = open_dataset(name)
    assert got.name == name
    assert got.num_classes == 3
    for split, rule in cut.items():
        np.testing.assert_array_equal(getattr(got, f"x_{split}"), whole[f"x_{split}"][rule])
        np.testing.assert_array_equal(getattr(got, f"y_{split}"), whole[f"y_{split}"][rule])


@pytest.mark.parametrize(
    "rule", ["[]", "[5]", "[a:b]", "[1:2:3:4]", "[1:2,3:4,5:6]", "[:5,]", "[1.5:]", "]", "[[:5]]"]
)
def test_malformed_rules(twenty, rule):
    assert "malformed subset rule" in message(f"npz:{twenty}{rule}")


def test_rule_with_step_zero_and_rule_without_a_name(twenty):
    assert "step 0" in message(f"npz:{twenty}[::0]")
    assert "malformed subset rule" in message("[:5]")


def test_rules_work_on_embedded_and_bare_names(tmp_path):
    head = open_dataset("embedded:mnist[1000:1006,:2]")
    whole = open_dataset("embedded:mnist")
    np.testing.assert_array_equal(head.x_train, whole.x_train[1000:1006])
    np.testing.assert_array_equal(head.y_test, whole.y_test[:2])
    np.savez(tmp_path / "set.npz", **arrays())
    assert len(open_dataset("set[ 1 : 3 ]", tmp_path).y_train) == 2
    assert "none of the 0 test images" in message("embedded:fashion_mnist[:5,:5]")


# TensorFlow Datasets. Features that take encoded images or plain tensors can be prepared without
# TensorFlow, so this reads what TFDS really wrote.


def make_builder(name, image_feature, splits, encode, supervised=True, unknown=None):
    """A builder class outside TFDS's registry, so that reading must go by the files alone.

    unknown: a split whose classes are not known.
    """

    def info(self):
        features = {
            "image": image_feature,
            "label": tfds.features.ClassLabel(names=["ant", "bee", "cow"]),
        }
        return tfds.core.DatasetInfo(
            builder=self,
            features=tfds.features.FeaturesDict(features),
            supervised_keys=("image", "label") if supervised else None,
        )

    def examples(self, split, count):
        for i in range(count):
            yield i, {"image": encode(i), "label": -1 if split == unknown else i % 3}

    body = {
        "__module__": __name__,
        "VERSION": tfds.core.Version("1.2.0"),
        "_info": info,
        "_split_generators": lambda self, dl: {
            s: self._generate_examples(s, n) for s, n in splits.items()
        },
        "_generate_examples": examples,
    }
    with tfds.core.registered.skip_registration():
        return type(name, (tfds.core.GeneratorBasedBuilder,), body)


@pytest.fixture(scope="module")
def prepared(tmp_path_factory):
    root = tmp_path_factory.mktemp("tfds")
    as_png = tfds.features.Image(shape=(6, 5, 3), encoding_format="png")
    as_tensor = tfds.features.Tensor(shape=(4, 4, 1), dtype=np.uint8)
    deep = tfds.features.Tensor(shape=(4, 4, 1), dtype=np.uint16)
    any_size = tfds.features.Image(shape=(None, None, 3), encoding_format="png")

    def colour(i):
        return png(pixels(i, 6, 5, 3))

    def grey(i):
        return pixels(i, 4, 4, 1)

    def ragged(i):
        return png(pixels(i, 4 + i, 4, 3))

    for name, feature, splits, encode, supervised in (
        ("TinyPng", as_png, {"train": 11, "test": 4, "validation": 2}, colour, True),
        ("TinyTensor", as_tensor, {"train": 7}, grey, False),
        ("TinyVal", as_tensor, {"train": 3, "validation": 2}, grey, True),
        ("TinyRagged", any_size, {"train": 3}, ragged, True),
        ("TinyDeep", deep, {"train": 3}, lambda i: np.full((4, 4, 1), 300 + i, np.uint16), True),
    ):
        cls = make_builder(name, feature, splits, encode, supervised)
        cls(data_dir=root, file_format="array_record").download_and_prepare()
    splits = {"train": 5, "test": 4, "validation": 3}
    cls = make_builder("TinySecret", as_tensor, splits, grey, unknown="test")
    cls(data_dir=root, file_format="array_record").download_and_prepare()
    return root


class NoTensorflow:
    """An import hook: TFDS takes any `tensorflow` in sys.modules, even None, for the real one."""

    def find_spec(self, name, path=None, target=None):
        if name == "tensorflow":
            raise ModuleNotFoundError("reading must not import TensorFlow")


@pytest.fixture
def no_tensorflow(monkeypatch):
    monkeypatch.delitem(sys.modules, "tensorflow", raising=False)
    monkeypatch.setattr(sys, "meta_path", [NoTensorflow(), *sys.meta_path])


def by_first_pixels(x, y):
    return sorted((image.tobytes(), int(label)) for image, label in zip(x, y, strict=True))


@pytest.mark.usefixtures("no_tensorflow")
@pytest.mark.parametrize("name", ["tiny_png", "tiny_png:1.2.0"])
def test_tfds_reads_prepared_png_images(prepared, name):
    got = open_dataset(f"tfds:{name}", prepared)
    assert got.name == f"tfds:{name}"
    assert got.classes == ("ant", "bee", "cow")
    assert got.y_train.dtype == np.int32
    for split, count in (("train", 11), ("test", 4)):
        # TFDS shuffles when it prepares: pixels and labels must have stayed together.
        expected = [pixels(i, 6, 5, 3) for i in range(count)]
        assert by_first_pixels(getattr(got, f"x_{split}"), getattr(got, f"y_{split}")) == (
            by_first_pixels(expected, np.arange(count) % 3)
        )


@pytest.mark.usefixtures("no_tensorflow")
def test_tfds_without_test_split_or_supervised_keys(prepared):
    got = open_dataset("tfds:tiny_tensor[2:6]", prepared)
    whole = open_dataset("tfds:tiny_tensor", prepared)
    assert whole.x_train.shape == (7, 4, 4, 1)
    assert whole.x_test.shape == (0, 4, 4, 1)
    np.testing.assert_array_equal(got.x_train, whole.x_train[2:6])


def test_tfds_validation_stands_in_for_test(prepared):
    assert len(open_dataset("tfds:tiny_val", prepared).y_test) == 2


def test_tfds_a_test_split_without_classes_is_no_test_part(prepared):
    """ImageNet's, where its archive was there as the set was prepared."""
    assert sorted(open_dataset("tfds:tiny_secret", prepared).y_test) == [0, 1, 2]
    assert len(open_dataset("tfds:tiny_secret[random:2,:1]", prepared).y_test) == 1


def test_tfds_default_directory(prepared, monkeypatch):
    monkeypatch.setattr(tfds.core.constants, "DATA_DIR", str(prepared))
    assert len(open_dataset("tfds:tiny_png").y_train) == 11


def test_tfds_images_of_several_sizes(prepared):
    text = message("tfds:tiny_ragged", prepared)
    assert "of train of tiny_ragged/1.2.0 is " in text
    assert "write @4 after the data set's name to make all of one size" in text
    assert open_dataset("tfds:tiny_ragged@3", prepared).x_train.shape == (3, 3, 3, 3)


@pytest.mark.parametrize("error", [UnidentifiedImageError, AttributeError])
def test_tfds_rules_and_corrupt_images(prepared, monkeypatch, error):
    """Labels are read without the images, and a corrupt one may be left out."""
    data = open_dataset("tfds:tiny_tensor[heldout:1]", prepared)
    assert np.bincount(data.y_test).tolist() == [1, 1, 1]
    assert len(data.y_train) == 4
    whole = open_dataset("tfds:tiny_png", prepared)
    decode = tfds.features.Image.decode_example_np

    def damaged(self, example):
        image = decode(self, example)
        if image.tobytes() == whole.x_train[2].tobytes():
            raise error("not an image")
        return image

    monkeypatch.setattr(tfds.features.Image, "decode_example_np", damaged)
    assert "image 2 of train of tiny_png/1.2.0 is corrupt" in message("tfds:tiny_png", prepared)
    with pytest.warns(UserWarning, match="1 images are corrupt"):
        left = open_dataset("tfds:tiny_png[skip_corrupt]", prepared)
    np.testing.assert_array_equal(left.x_train, np.delete(whole.x_train, 2, axis=0))
    np.testing.assert_array_equal(left.y_train, np.delete(whole.y_train, 2))


def test_tfds_images_of_other_types_are_refused(prepared):
    text = message("tfds:tiny_deep", prepared)
    assert "of train of tiny_deep/1.2.0 of data set 'tfds:tiny_deep' is uint16 [4, 4, 1]" in text


def test_tfds_reading_is_quiet_and_leaves_the_log_level(prepared, monkeypatch):
    code = (
        "from madjax.datasets import open_dataset as o; import sys; o('tfds:tiny_png', sys.argv[1])"
    )
    # In a process of its own: TFDS gives its advice (use OpenCV) once a process.
    done = subprocess.run(
        [sys.executable, "-c", code, prepared], cwd=ROOT, capture_output=True, text=True, check=True
    )
    assert done.stdout + done.stderr == ""
    logger = logging.getLogger("absl")
    monkeypatch.setattr(logger, "level", 17)
    open_dataset("tfds:tiny_val", prepared)
    assert logger.level == 17


def test_tfds_unprepared_set_gives_the_command(tmp_path):
    text = message("tfds:mnist", tmp_path)
    assert "not prepared" in text
    assert "pip install tensorflow && python -c" in text
    assert f"tfds.builder('mnist', data_dir='{tmp_path}', file_format='array_record')" in text


def test_tfds_command_runs_up_to_preparing(tmp_path):
    """The printed Python is valid: all but the last call, which needs TensorFlow and a network."""
    code = message("tfds:mnist", tmp_path).split('python -c "')[1].rstrip('"')
    code = code.replace(".download_and_prepare()", ".info")
    subprocess.run([sys.executable, "-c", code], check=True, capture_output=True)


def test_tfds_unknown_name_config_and_syntax(tmp_path):
    assert "TFDS knows no data set 'no_such_set'" in message("tfds:no_such_set", tmp_path)
    assert "TFDS cannot open 'mnist/no_config'" in message("tfds:mnist/no_config", tmp_path)
    assert "TFDS cannot open 'two words'" in message("tfds:two words", tmp_path)


def test_tfds_set_prepared_in_another_format(prepared, tmp_path):
    shutil.copytree(prepared / "tiny_png", tmp_path / "tiny_png")
    info_path = tmp_path / "tiny_png" / "1.2.0" / "dataset_info.json"
    info = json.loads(info_path.read_text())
    assert info["fileFormat"] == "array_record"
    info_path.write_text(json.dumps(info | {"fileFormat": "tfrecord"}))
    text = message("tfds:tiny_png", tmp_path)
    assert "is prepared as tfrecord" in text
    assert "data_dir='NEW_DIR'" in text


@pytest.mark.filterwarnings("ignore:data set .* has no train image")
@pytest.mark.parametrize(("name", "shape"), [("mnist", (28, 28, 1)), ("cifar10", (32, 32, 3))])
def test_tfds_with_mock_data(name, shape, tmp_path):
    with tfds.testing.mock_data(num_examples=7):
        got = open_dataset(f"tfds:{name}[:5]", tmp_path)
        source = tfds.builder(name, file_format="array_record").as_data_source(split="train")
        expected = [source[i] for i in range(5)]
    assert got.x_train.shape == (5, *shape)
    assert got.x_test.shape == (7, *shape)
    assert got.num_classes == 10
    np.testing.assert_array_equal(got.x_train, [e["image"] for e in expected])
    np.testing.assert_array_equal(got.y_train, [e["label"] for e in expected])


@pytest.mark.filterwarnings("ignore:data set .* has no train image")
@pytest.mark.parametrize("config", ["letters", "digits"])
def test_tfds_emnist_is_turned_upright(config, tmp_path):
    """TFDS gives it with rows and columns exchanged."""
    with tfds.testing.mock_data(num_examples=3):
        got = open_dataset(f"tfds:emnist/{config}", tmp_path)
        builder = tfds.builder(f"emnist/{config}", file_format="array_record")
        parts = {s: builder.as_data_source(split=s) for s in ("train", "test")}
        for split, source in parts.items():
            for image, example in zip(getattr(got, f"x_{split}"), source, strict=True):
                np.testing.assert_array_equal(image[..., 0], example["image"][..., 0].T)


def test_tfds_set_without_images(tmp_path):
    with tfds.testing.mock_data(num_examples=2):
        assert "is not an image classification set" in message("tfds:anli", tmp_path)
