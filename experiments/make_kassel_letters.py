"""Makes kassel_letters.npz, the query images of most runs here, from the Stanford OCR data.

What: 47,010 train and 5,142 test images (folds 0 to 8, and fold 9), 28x28 as MNIST's digits are,
labels 0 to 25. A letter is a raster of 16 rows and 8 columns, whose pixels count as 1.4 times as
wide as high. Its ink is scaled so that the longer side has 20 pixels, at most 2.2-fold, by bicubic
interpolation, and its centre of mass put in the middle.

Command: ``python experiments/make_kassel_letters.py letter.data.gz --out DIR/kassel_letters.npz``.
The file comes from https://ai.stanford.edu/~btaskar/ocr/ (R. Kassel; B. Taskar, C. Guestrin and
D. Koller, Max-Margin Markov Networks, NIPS 2003). With ``--smoke`` it makes letters out of noise,
and what it writes is gone when it ends.

Cost: about 10 seconds on one CPU core.
"""

import argparse
import gzip
import re
import sys
import tempfile
import zlib
from collections.abc import Iterable
from pathlib import Path

import numpy as np
from PIL import Image

from madjax.files import check_can_write, save_npz, write_atomically

HIGH, WIDE = 16, 8
"""Rows and columns of a raster."""
ASPECT, LONGEST, ENLARGED = 1.4, 20, 2.2
"""Width of a pixel over its height; the longer side of the ink in pixels; the largest factor."""
TEST_FOLD = 9
SIDE = 28
LINE = re.compile(
    r"\S+\s(?P<letter>[a-z])\s\S+\s\S+\s\S+\s(?P<fold>\d)\s"
    rf"(?P<pixels>([01]\s){{{HIGH * WIDE - 1}}}[01])"
)
"""An id, the letter, the next one's id, word, position, fold, and the pixels row by row."""


def centred(raster: np.ndarray) -> np.ndarray:
    """uint8 [28, 28] of a raster, bool [16, 8] with some ink."""
    rows, columns = (np.flatnonzero(raster.any(axis=axis)) for axis in (1, 0))
    ink = raster[rows[0] : rows[-1] + 1, columns[0] : columns[-1] + 1]
    high, wide = ink.shape[0], ink.shape[1] * ASPECT
    factor = min(LONGEST / max(high, wide), ENLARGED)
    # A margin of one source pixel lets the interpolation fade out.
    sizes = zip((high, wide), ink.shape, strict=True)
    height, width = (round(round(factor * side) * (n + 2) / n) for side, n in sizes)
    framed = Image.fromarray(np.pad(ink, 1) * np.uint8(255))
    scaled = np.asarray(framed.resize((width, height), Image.Resampling.BICUBIC))
    # Sums of integers are exact, and with them which way a half is rounded.
    masses = (scaled.sum(axis=1), scaled.sum(axis=0))
    centre = (mass @ np.arange(len(mass)) / mass.sum() for mass in masses)
    top, left = (
        min(max(round((SIDE - 1) / 2 - at), 0), SIDE - n)
        for at, n in zip(centre, scaled.shape, strict=True)
    )
    image = np.zeros((SIDE, SIDE), np.uint8)
    image[top : top + height, left : left + width] = scaled
    return image


def letters(lines: Iterable[str]) -> dict[str, np.ndarray]:
    """The arrays of the .npz, of lines as letter.names describes them. ValueError for another."""
    images, labels, folds = [], [], []
    for number, line in enumerate(lines, start=1):
        found = LINE.fullmatch(line.strip())
        if not found or "1" not in found["pixels"]:
            raise ValueError(f"line {number} has no letter of {HIGH}x{WIDE} pixels; is it whole?")
        raster = np.array(found["pixels"].split()).reshape(HIGH, WIDE) == "1"
        images.append(centred(raster))
        labels.append(ord(found["letter"]) - ord("a"))
        folds.append(int(found["fold"]))
    if not images:
        raise ValueError("the file is empty")
    x, y = np.array(images)[..., None], np.array(labels, np.uint8)
    test = np.array(folds) == TEST_FOLD
    return {"x_train": x[~test], "y_train": y[~test], "x_test": x[test], "y_test": y[test]}


def convert(source: Path, out: Path) -> None:
    """Write the .npz, and print how many letters it has. ValueError for a file that is none."""
    check_can_write(out)
    try:
        with gzip.open(source, "rt") if source.suffix == ".gz" else source.open() as lines:
            arrays = letters(lines)
    except (EOFError, gzip.BadGzipFile, zlib.error, ValueError) as error:
        raise ValueError(f"{source}: {error}") from None
    write_atomically(out, lambda draft: save_npz(draft, arrays))
    print(f"{out.name}: {len(arrays['x_train']):,} train and {len(arrays['x_test']):,} test images")


def main() -> int:
    """Make it of the file that the command line names, or of noise."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("source", type=Path, nargs="?", help="letter.data.gz, or that unpacked")
    parser.add_argument("--out", type=Path, default=Path("kassel_letters.npz"))
    parser.add_argument("--smoke", action="store_true", help="noise in place of the file")
    args = parser.parse_args()
    if not args.smoke:
        if args.source is None:
            parser.error("give letter.data.gz")
        try:
            convert(args.source, args.out)
        except (OSError, ValueError) as error:
            print(f"error: {error}", file=sys.stderr)
            return 2
        return 0
    with tempfile.TemporaryDirectory() as folder:
        noise = np.random.default_rng(0).integers(0, 2, (20, HIGH * WIDE))
        lines = [f"{i} a -1 1 1 {i % 10} " + " ".join(map(str, own)) for i, own in enumerate(noise)]
        source = Path(folder) / "letter.data"
        source.write_text("\n".join(lines))
        convert(source, Path(folder) / "letters.npz")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
