"""Images that are chosen by a name before they are decoded, made of one size, and kept."""

import io
import json
import os
import shutil
import warnings
import zipfile
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from madjax import (
    MLP,
    Defended,
    InputError,
    Knockoff,
    NoDefense,
    Sweep,
    Task,
    open_dataset,
    sweep,
)
from madjax.cli import main
from madjax.datasets import base_name
from madjax.datasets import folder as folders
from madjax.datasets.listing import lock_of, squared
from madjax.sweep import cache


def picture(seed, h=6, w=8, channels=3):
    return np.random.default_rng(seed).integers(0, 256, (h, w, channels), np.uint8)


def png(image):
    file = io.BytesIO()
    Image.fromarray(image.squeeze()).save(file, "png")
    return file.getvalue()


@pytest.fixture
def root(tmp_path):
    """Two classes of nine and seven images, of several sizes."""
    folder = tmp_path / "photos"
    for label, count in (("ant", 9), ("bee", 7)):
        (folder / label).mkdir(parents=True)
        for i in range(count):
            image = picture(10 * i + (label == "bee"), 6 + i % 3, 8)
            (folder / label / f"{i}.png").write_bytes(png(image))
    return folder


@pytest.fixture
def decoded(monkeypatch):
    """The names of the images that are decoded."""
    names, decode = [], folders._decode

    def counted(read, where):
        names.append(where)
        return decode(read, where)

    monkeypatch.setattr(folders, "_decode", counted)
    return names


def expected(root, name, side):
    """By Pillow alone."""
    image = Image.open(root / name)
    short = min(image.size)
    scaled = image.resize([side * n // short for n in image.size], Image.Resampling.BILINEAR)
    left, top = (round((n - side) / 2) for n in scaled.size)
    return np.asarray(scaled.crop((left, top, left + side, top + side)))


def test_every_image_is_a_square_of_the_side(root):
    for side in (3, 6, 9):
        data = open_dataset(f"folder:{root}@{side}")
        assert data.x_train.shape == (16, side, side, 3)
        for i in range(9):
            np.testing.assert_array_equal(
                data.x_train[i], expected(root, f"ant/{i}.png", side), err_msg=f"{i} at {side}"
            )
    assert base_name(f"folder:{root}@{side}[:3]") == "photos"


@pytest.mark.parametrize("shape", [(7, 5, 3), (5, 7, 1), (4, 4, 3)])
def test_squares_of_a_flat_image_are_flat(shape):
    for side in (1, 4, 10):
        found = squared(np.full(shape, 77, np.uint8), side)
        assert found.shape == (side, side, shape[2])
        assert (found == 77).all()


def test_squares_are_the_middle_of_what_is_long():
    """A wide image whose outer thirds are white and whose middle is black, and its transpose."""
    wide = np.full((4, 12, 1), 255, np.uint8)
    wide[:, 4:8] = 0
    assert (squared(wide, 4) == 0).all()
    assert (squared(wide.swapaxes(0, 1), 4) == 0).all()


def test_arrays_in_memory_are_made_of_one_side_too(tmp_path):
    x, y = np.stack([picture(i, 6, 6) for i in range(4)]), np.arange(4)
    np.savez(tmp_path / "set.npz", x_train=x, y_train=y, x_test=x[:2], y_test=y[:2])
    data = open_dataset("set@3[2:]", tmp_path)
    np.testing.assert_array_equal(data.x_train, [squared(each, 3) for each in x[2:]])
    np.testing.assert_array_equal(data.x_test, [squared(each, 3) for each in x[:2]])
    np.testing.assert_array_equal(data.y_train, [2, 3])


def test_random_images_are_the_same_every_time(root, decoded):
    data = open_dataset(f"folder:{root}@4[random:6]")
    assert len(decoded) == len(set(decoded)) == 6
    whole = open_dataset(f"folder:{root}@4")
    at = [int(np.flatnonzero((whole.x_train == x).all((1, 2, 3)))[0]) for x in data.x_train]
    assert at == sorted(set(at))
    assert at != list(range(6))
    np.testing.assert_array_equal(data.y_train, whole.y_train[at])
    again = open_dataset(f"folder:{root}@4[ random:6 ]")
    np.testing.assert_array_equal(again.x_train, data.x_train)
    with pytest.raises(InputError, match="draws 17 train images and has 16: draw fewer"):
        open_dataset(f"folder:{root}@4[random:17]")
    assert len(open_dataset(f"folder:{root}@4[random:16]").y_train) == 16


def test_random_draws_are_uniform(tmp_path):
    """Of 2,000 images 1,000: of each tenth about 100 (hypergeometric, std 6.7)."""
    x = np.zeros((2000, 1, 1, 1), np.uint8)
    np.savez(tmp_path / "set.npz", x_train=x, y_train=np.arange(2000) // 200)
    drawn = np.bincount(open_dataset("set[random:1000]", tmp_path).y_train)
    assert (abs(drawn - 100) < 5 * 6.7).all()
    assert len(set(drawn)) > 1


def test_so_many_of_each_class_are_held_out(root):
    whole = open_dataset(f"folder:{root}@4")
    assert not len(whole.x_test)
    data = open_dataset(f"folder:{root}@4[heldout:3]")
    assert np.bincount(data.y_test).tolist() == [3, 3]
    assert np.bincount(data.y_train).tolist() == [6, 4]
    both = sorted(x.tobytes() for part in (data.x_train, data.x_test) for x in part)
    assert both == sorted(x.tobytes() for x in whole.x_train)
    for x, y in zip(data.x_test, data.y_test, strict=True):
        at = (whole.x_train == x).all((1, 2, 3))
        assert whole.y_train[at] == y
    cut = open_dataset(f"folder:{root}@4[heldout:3,:5,:2]")
    np.testing.assert_array_equal(cut.x_train, data.x_train[:5])
    np.testing.assert_array_equal(cut.x_test, data.x_test[:2])


def test_bad_rules_are_one_line(root, tmp_path):
    for rule, text in (
        ("[heldout:7]", "class 1 has 7: hold out fewer"),
        ("[heldout:0]", "holds 0 images out: give 1 or more"),
        ("[random:0]", "leaves none of the 16 train images"),
        ("[:2,random:1]", "draws 1 test images and has 0"),
        ("[:2,heldout:1]", "malformed subset rule 'heldout:1'"),
        ("[random:-1]", "malformed subset rule"),
        ("@0", "asks for images of side 0"),
    ):
        with pytest.raises(InputError, match=text.replace("[", r"\[")):
            open_dataset(f"folder:{root}@4{rule}" if rule[0] == "[" else f"folder:{root}{rule}")
    (tmp_path / "parts" / "train").mkdir(parents=True)
    for split in ("train", "test"):
        shutil.copytree(root, tmp_path / "parts" / split, dirs_exist_ok=True)
    with pytest.raises(InputError, match="has a test part of 16 images: leave heldout out"):
        open_dataset(f"folder:{tmp_path / 'parts'}@4[heldout:1]")
    with pytest.raises(
        InputError,
        match=r"ant/\d\.png is \dx8 but most are 6x8 .*: write @6 after the data set's name",
    ):
        open_dataset(f"folder:{root}")


def corrupt(root, name):
    (root / name).write_bytes((root / name).read_bytes()[:50])


def test_corrupt_images_are_left_out_where_that_is_asked_for(root, tmp_path):
    whole = open_dataset(f"folder:{root}@4")
    corrupt(root, "ant/2.png")
    (root / "bee" / "0.png").write_bytes(b"")
    with pytest.raises(InputError, match=r"ant/2\.png is corrupt .*write skip_corrupt first"):
        open_dataset(f"folder:{root}@4")
    assert len(open_dataset(f"folder:{root}@4[:2]").y_train) == 2  # the others are not looked at
    for kept in (None, tmp_path / "cache", tmp_path / "cache"):
        with pytest.warns(
            UserWarning, match=r"2 images are corrupt, .*first is .*ant/2\.png"
        ) as one:
            data = open_dataset(f"folder:{root}@4[skip_corrupt]", folder=kept)
        assert len(one) == 1
        assert one[0].filename == __file__
        sound = np.delete(np.arange(16), [2, 9])
        np.testing.assert_array_equal(data.x_train, whole.x_train[sound])
        np.testing.assert_array_equal(data.y_train, whole.y_train[sound])
    with pytest.raises(InputError, match=r"\[skip_corrupt,2:3\]' has no image that can be decoded"):
        open_dataset(f"folder:{root}@4[skip_corrupt,2:3]")


def test_images_of_both_parts_are_cut_where_some_are_lost(root):
    data = open_dataset(f"folder:{root}@4[heldout:3]")
    for name in ("ant/0.png", "ant/4.png", "bee/1.png", "bee/5.png"):
        corrupt(root, name)
    with pytest.warns(UserWarning, match="4 images are corrupt"):
        found = open_dataset(f"folder:{root}@4[skip_corrupt,heldout:3]")
    for split in ("train", "test"):
        x, y = getattr(data, f"x_{split}"), getattr(data, f"y_{split}")
        left = {image.tobytes() for image in getattr(found, f"x_{split}")}
        at = [i for i, image in enumerate(x) if image.tobytes() in left]
        np.testing.assert_array_equal(getattr(found, f"x_{split}"), x[at])
        np.testing.assert_array_equal(getattr(found, f"y_{split}"), y[at])
    assert len(found.y_train) + len(found.y_test) == 12


@pytest.mark.parametrize("archived", [False, True])
def test_what_was_decoded_is_kept(root, tmp_path, decoded, archived):
    kept = tmp_path / "cache"
    if archived:
        shutil.make_archive(str(root), "zip", root)
        root = root.with_suffix(".zip")
    name = f"folder:{root}@4[heldout:2,random:9]"
    wanted = open_dataset(name)
    decoded.clear()
    first = open_dataset(name, folder=kept)
    assert len(decoded) == 9 + 4
    decoded.clear()
    data = open_dataset(name, folder=kept)
    assert not decoded
    assert isinstance(data.x_train.base, np.memmap)
    for each in (first, data):
        for part in ("x_train", "y_train", "x_test", "y_test"):
            np.testing.assert_array_equal(getattr(each, part), getattr(wanted, part))
        assert each.checksum() == wanted.checksum()
    open_dataset(f"folder:{root}@5[heldout:2,random:9]", folder=kept)
    assert len(decoded) == 13


def test_a_changed_file_is_decoded_anew(root, tmp_path):
    kept, name = tmp_path / "cache", f"folder:{root}@4"
    open_dataset(name, folder=kept)
    (root / "ant" / "3.png").write_bytes(png(picture(99, 6, 8)))
    np.testing.assert_array_equal(
        open_dataset(name, folder=kept).x_train[3], expected(root, "ant/3.png", 4)
    )
    (root / "ant" / "8.png").rename(root / "bee" / "8.png")  # another class
    assert open_dataset(name, folder=kept).y_train.sum() == 8


def test_a_colour_image_after_grey_ones(tmp_path):
    for i in range(3):
        (tmp_path / "set" / f"class {i}").mkdir(parents=True)
        image = picture(i, 4, 4, 3 if i == 1 else 1)
        (tmp_path / "set" / f"class {i}" / "0.png").write_bytes(png(image))
    for kept in (None, tmp_path / "cache", tmp_path / "cache"):
        data = open_dataset("set", tmp_path, folder=kept)
        assert data.x_train.shape == (3, 4, 4, 3)
        np.testing.assert_array_equal(data.x_train[1], picture(1, 4, 4, 3))
        for i in (0, 2):
            np.testing.assert_array_equal(data.x_train[i], picture(i, 4, 4, 1).repeat(3, axis=2))
    (entry,) = (tmp_path / "cache").glob("images-*")
    assert sorted(p.name for p in entry.iterdir()) == ["facts.json", "labels.npy", "pixels.npy"]


def test_a_damaged_entry_is_made_anew_and_a_crash_leaves_none(root, tmp_path, monkeypatch):
    kept, name = tmp_path / "cache", f"folder:{root}@4"
    wanted = open_dataset(name, folder=kept).x_train.copy()
    (entry,) = kept.glob("images-*")
    for file in entry.iterdir():
        file.write_bytes(b"nothing")
        with pytest.warns(UserWarning, match=r"cache entry .* is damaged \(.*: it is made anew"):
            data = open_dataset(name, folder=kept)
        np.testing.assert_array_equal(data.x_train, wanted)
    corrupt(root, "bee/6.png")
    with pytest.raises(InputError, match=r"bee/6\.png is corrupt"):
        open_dataset(name, folder=kept)
    assert [path.name for path in kept.glob("*images-*")] == [entry.name]


def test_a_folder_that_cannot_be_written_is_a_warning(root, tmp_path):
    (tmp_path / "cache").write_text("a file")
    with pytest.warns(UserWarning, match="are not kept in"):
        data = open_dataset(f"folder:{root}@4", folder=tmp_path / "cache")
    assert len(data.y_train) == 16


def test_the_cache_lists_and_prunes_them(root, tmp_path, monkeypatch, capsys):
    kept = tmp_path / "cache"
    monkeypatch.setenv("MADJAX_CACHE", str(kept))
    open_dataset(f"folder:{root}@4", folder=kept)
    (entry,) = cache.entries(kept)
    assert entry.what == f"folder:{root}@4"
    assert entry.size > 16 * 4 * 4 * 3
    assert main(["cache"]) == 0
    assert f"photos@4, {json.loads((entry.path / 'facts.json').read_text())['made']}" in (
        capsys.readouterr().out
    )
    assert main(["cache", "--prune", "1"]) == 0
    assert entry.path.is_dir()
    assert main(["cache", "--prune", "0"]) == 0
    assert not entry.path.exists()


def test_a_picture_that_would_fill_the_memory_is_named(tmp_path):
    """In every thread, and without a change to the warnings of others."""
    (tmp_path / "set" / "a").mkdir(parents=True)
    Image.new("1", (20_000, 9_000)).save(tmp_path / "set" / "a" / "0.png")
    before = list(warnings.filters)
    with pytest.raises(InputError, match=r"a/0\.png is corrupt \(Image size .* exceeds limit"):
        open_dataset("set", tmp_path)
    assert warnings.filters == before


def test_a_zip_is_read_by_several_threads(root, tmp_path):
    with zipfile.ZipFile(tmp_path / "many.zip", "w") as archive:
        for i in range(300):
            archive.writestr(f"class {i % 3}/{i:03}.png", png(picture(i, 5, 5)))
    data = open_dataset("many", tmp_path)
    wanted = [picture(i, 5, 5) for label in range(3) for i in range(label, 300, 3)]
    np.testing.assert_array_equal(data.x_train, wanted)


def test_a_very_long_image_does_not_fill_the_memory():
    """Its middle alone is scaled: 256 rows of the whole would be six gigabytes."""
    image = np.zeros((1, 30_001, 3), np.uint8)
    image[0, 15_000] = 255
    found = squared(image, 256)
    assert found.shape == (256, 256, 3)
    assert found[:, 100:156].min() > 128
    assert found[:, 0].max() <= 128
    np.testing.assert_allclose(found.astype(float), found[:, ::-1], atol=2)


def test_copies_of_a_tree_are_told_apart(tmp_path):
    """Equal names, sizes and times, other pixels."""
    for name, level in (("one", 10), ("two", 200)):
        (tmp_path / name / "a").mkdir(parents=True)
        path = tmp_path / name / "a" / "0.bmp"
        Image.fromarray(np.full((4, 4), level, np.uint8)).save(path)
        os.utime(path, (0, 0))
        assert open_dataset(name, tmp_path, folder=tmp_path / "cache").x_train.max() == level


@pytest.mark.parametrize("name", ["facts.json", "labels.npy", "pixels.npy"])
@pytest.mark.parametrize("content", [b"", b"null"])
def test_an_entry_of_which_a_file_is_empty_is_made_anew(root, tmp_path, name, content):
    kept = tmp_path / "cache"
    wanted = open_dataset(f"folder:{root}@4", folder=kept).x_train.copy()
    (entry,) = kept.glob("images-*")
    (entry / name).write_bytes(content)
    with pytest.warns(UserWarning, match="is damaged"):
        data = open_dataset(f"folder:{root}@4", folder=kept)
    np.testing.assert_array_equal(data.x_train, wanted)
    np.testing.assert_array_equal(open_dataset(f"folder:{root}@4", folder=kept).x_train, wanted)


def test_another_users_entry_is_read_and_stays(root, tmp_path, decoded, monkeypatch):
    kept, name = tmp_path / "cache", f"folder:{root}@4"
    open_dataset(name, folder=kept)
    decoded.clear()

    def refused(*_, **__):
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(os, "utime", refused)
    monkeypatch.setattr("madjax.datasets.listing.FileLock", refused)
    assert len(open_dataset(name, folder=kept).y_train) == 16
    assert not decoded


def test_a_full_disk_is_a_warning(root, tmp_path, monkeypatch):
    def full(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "posix_fallocate", full)
    with pytest.warns(UserWarning, match=r"are not kept in .*: No space left on device"):
        data = open_dataset(f"folder:{root}@4", folder=tmp_path / "cache")
    assert len(data.y_train) == 16
    assert not list((tmp_path / "cache").glob("*images-*"))


def test_a_system_that_cannot_reserve_a_file_keeps_images_too(root, tmp_path, decoded, monkeypatch):
    """As macOS."""
    monkeypatch.delattr(os, "posix_fallocate")
    for _ in range(2):
        data = open_dataset(f"folder:{root}@4", folder=tmp_path / "cache")
        assert len(data.y_train) == 16
    assert len(decoded) == 16


def test_a_file_that_cannot_be_read_is_not_corrupt(root, monkeypatch):
    """A network may be back the next time: no image is left out for good."""
    read = Path.read_bytes

    def flaky(path):
        if path.name == "3.png":
            raise OSError(5, "Input/output error")
        return read(path)

    monkeypatch.setattr(Path, "read_bytes", flaky)
    with pytest.raises(InputError, match=r"ant/3\.png cannot be read \(.*Input/output error"):
        open_dataset(f"folder:{root}@4[skip_corrupt]")


def test_pruning_leaves_what_is_being_made_and_what_is_no_entry(root, tmp_path, monkeypatch):
    kept = tmp_path / "cache"
    (kept / "images-holiday").mkdir(parents=True)
    open_dataset(f"folder:{root}@4", folder=kept)
    (entry,) = (each.path for each in cache.entries(kept))
    draft = kept / f".{entry.name}.part"
    draft.mkdir()
    with lock_of(entry):
        cache.prune(kept, 0)
        assert entry.is_dir()
        assert draft.is_dir()
    cache.prune(kept, 0)
    assert not entry.exists()
    assert not draft.exists()
    assert (kept / "images-holiday").is_dir()


def test_two_threads_decode_once(root, tmp_path, decoded):
    kept, name = tmp_path / "cache", f"folder:{root}@4"
    with ThreadPoolExecutor(4) as pool:
        found = list(pool.map(lambda _: open_dataset(name, folder=kept).x_train, range(4)))
    assert len(decoded) == 16
    for each in found[1:]:
        np.testing.assert_array_equal(each, found[0])


def test_queries_are_no_test_images_of_the_victim(root, tmp_path):
    """Not even where these are held out of the same folder."""
    task = Task(f"folder:{root}@4[heldout:3]", f"folder:{root}@4", architecture=MLP)
    config = Sweep(
        "leak", (task,), (Defended(NoDefense()),), (Knockoff(budget=5, architecture=MLP),)
    )
    with pytest.raises(InputError, match=r"6 of the 6 test images of .* are in the train part of"):
        sweep.run(config, tmp_path / "out")
    apart = replace(task, queryset=task.dataset)
    plan = sweep.plan(replace(config, tasks=(apart,)), tmp_path / "out")
    assert plan.cells == 1
