"""Cuts the two image sets that ship inside the package out of the full files.

What: ``madjax/data/mnist.npz`` holds the first 10,000 train and first 2,000 test images of MNIST;
``madjax/data/fashion_mnist.npz`` the first 12,000 train images of Fashion-MNIST, as query images.
Original order, pixels and labels untouched.

Command: ``python experiments/make_embedded_data.py DATA_DIR``, where DATA_DIR holds the full
``mnist.npz`` and ``fashion_mnist.npz`` (keys x_train, y_train, x_test, y_test). With ``--smoke``
it cuts a few images out of noise, and what it writes is gone when it ends.

Cost: about 15 seconds and 200 MB of memory on one CPU core; the result is 6.2 MB and the same
bytes at every run with one version of liblzma.
"""

import argparse
import tempfile
import zipfile
from pathlib import Path

import numpy as np

_OUT = Path(__file__).parents[1] / "madjax" / "data"
_DIGITS = tuple("0123456789")
_FASHION = (
    "T-shirt/top",
    "Trouser",
    "Pullover",
    "Dress",
    "Coat",
    "Sandal",
    "Shirt",
    "Sneaker",
    "Bag",
    "Ankle boot",
)


def write_npz(path: Path, arrays: dict[str, np.ndarray]) -> None:
    """Writes an .npz that `np.load` reads, LZMA instead of deflate, with fixed time stamps."""
    # Measured on these images, in bytes (MNIST, Fashion-MNIST): LZMA 1,635,875 and 4,513,043;
    # LZMA with the pixel axes first 1,905,581 and 5,350,929; bzip2 1,674,851 and 4,812,995;
    # lossless WebP sheets 64 wide 1,811,818 and 4,651,330; sheets 1 wide 1,759,836 and 4,461,596,
    # which took minutes to write and gain nothing in sum.
    with zipfile.ZipFile(path, "w", zipfile.ZIP_LZMA) as archive:
        for key, array in arrays.items():
            entry = zipfile.ZipInfo(f"{key}.npy", date_time=(1980, 1, 1, 0, 0, 0))
            entry.compress_type = zipfile.ZIP_LZMA
            entry.create_system = 3  # else the bytes depend on the operating system
            with archive.open(entry, "w") as file:
                np.lib.format.write_array(file, np.ascontiguousarray(array), allow_pickle=False)


def cut(source: Path, train: int, test: int, classes: tuple[str, ...]) -> dict[str, np.ndarray]:
    """The first `train` and `test` images of a full set, with class names; no empty test part."""
    with np.load(source) as full:
        arrays = {key: full[key][:train] for key in ("x_train", "y_train")}
        if test:
            arrays |= {key: full[key][:test] for key in ("x_test", "y_test")}
    return arrays | {"classes": np.array(classes)}


def embed(data_dir: Path, out: Path) -> None:
    """Writes both files and prints their sizes."""
    out.mkdir(parents=True, exist_ok=True)
    for name, train, test, classes in (
        ("mnist", 10_000, 2_000, _DIGITS),
        ("fashion_mnist", 12_000, 0, _FASHION),
    ):
        path = out / f"{name}.npz"
        write_npz(path, cut(data_dir / f"{name}.npz", train, test, classes))
        print(f"{path.name}: {path.stat().st_size:,} bytes")


def main() -> None:
    """Embeds what the command line names, or a few images of noise."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("data_dir", type=Path, nargs="?", help="folder with the full .npz files")
    parser.add_argument("--out", type=Path, default=_OUT, help="folder to write to")
    parser.add_argument("--smoke", action="store_true", help="noise in place of DATA_DIR")
    args = parser.parse_args()
    if not args.smoke:
        if args.data_dir is None:
            parser.error("give the folder with the full .npz files")
        embed(args.data_dir, args.out)
        return
    with tempfile.TemporaryDirectory() as folder:
        noise = np.random.default_rng(0).integers(0, 256, (20, 28, 28), dtype=np.uint8)
        arrays = {"x_train": noise, "y_train": noise[:, 0, 0] % 10}
        arrays |= {"x_test": noise, "y_test": noise[:, 0, 0] % 10}
        for name in ("mnist", "fashion_mnist"):
            np.savez(Path(folder) / f"{name}.npz", **arrays)
        embed(Path(folder), Path(folder) / "out")


if __name__ == "__main__":
    main()
