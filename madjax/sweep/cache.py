"""Results of stages on disk, named by what determines them: made once for all runs and commands.

    $MADJAX_CACHE/STAGE-DIGEST.npz    the arrays of one result, and what it is and what made it
    $MADJAX_CACHE/images-DIGEST/      decoded images of a data set (madjax/datasets/listing.py)
    $MADJAX_CACHE/programs-DIGEST/    compiled programs, by JAX, which removes the oldest

The default is the user's cache directory; with an empty MADJAX_CACHE nothing is kept. What is kept
may be deleted at any time.
"""

import contextlib
import json
import os
import platform
import shutil
import time
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from datetime import UTC, datetime
from importlib.metadata import version
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np
import platformdirs
from filelock import FileLock, Timeout

from madjax import processes
from madjax.config import digest
from madjax.datasets.listing import FACTS, KIND, lock_of
from madjax.errors import InputError, in_one_line
from madjax.files import write_atomically

VARIABLE = "MADJAX_CACHE"
VERSIONS = {"network": 1, "posteriors": 1, "answers": 1, "transfer": 1, "stolen": 1}
"""Of each stage: to be raised when its results change though nothing that a key holds does."""
_PACKAGES = ("jax", "flax", "optax", "jax-privacy")
_SETTINGS = (
    "jax_enable_x64",
    "jax_default_matmul_precision",
    "jax_default_prng_impl",
    "jax_threefry_partitionable",
)
DAY = 24 * 60 * 60
Maker = dict[str, Any]
"""Device, commit and versions that a result was made with."""


class Key(NamedTuple):
    """What a result of a stage is, and the digest of all that determines it."""

    stage: str
    what: str
    """For people: a part of it."""
    digest: str | None
    """None where it cannot be told from another, as a function has no source: it is not kept."""

    @property
    def name(self) -> str:
        """Of its file, without the suffix."""
        return f"{self.stage}-{self.digest}"


def key(stage: str, what: str, **inputs: Any) -> Key:
    """The key of a result: a described value, or another key, for each of the stage's inputs.

    The stage's version, those of JAX, Flax and optax, the platform and JAX's settings of precision
    and of random numbers are inputs of all.
    """
    keys = [value for value in inputs.values() if isinstance(value, Key)]
    inputs |= {n: value.digest for n, value in inputs.items() if isinstance(value, Key)}
    inputs |= {
        "stage": [stage, VERSIONS[stage]],
        "versions": [version(package) for package in _PACKAGES],
        "platform": jax.default_backend(),
        "settings": [str(getattr(jax.config, name)) for name in _SETTINGS],
    }
    if any(each.digest is None for each in keys) or _has_unknown_source(inputs):
        return Key(stage, what, None)
    return Key(stage, what, digest(inputs, 24))


def _has_unknown_source(value: Any) -> bool:
    """Whether code is described of which `madjax.config.describe` found no source."""
    if isinstance(value, dict):
        unknown = "source" in value and "path" in value and value["source"] is None
        return unknown or any(map(_has_unknown_source, value.values()))
    return isinstance(value, list | tuple) and any(map(_has_unknown_source, value))


class Entry(NamedTuple):
    """A result on disk."""

    path: Path
    what: str
    maker: Maker
    made: str
    size: int
    """Bytes."""
    idle: float
    """Days since it was last used."""


@dataclass(frozen=True)
class Cache:
    """A folder of results; without one, nothing is kept and nothing is found.

    maker is this run's.
    """

    folder: Path | None = None
    maker: Maker = field(default_factory=dict)

    @processes.by_first
    def get(self, key: Key, like: Any) -> tuple[Any, Maker] | None:
        """A result with the structure and shapes of `like`, and what made it, or None.

        One that is damaged is named in a warning and removed, and None.
        """
        path = self._path(key)
        if not self.has(key):
            return None
        try:
            with path.open("rb") as file, np.load(file) as held:
                facts = json.loads(str(held["facts"]))
                leaves, structure = jax.tree.flatten(like)
                found = [_as(held[f"leaf{i}"], leaf) for i, leaf in enumerate(leaves)]
        except Exception as error:  # of many kinds, by what is damaged
            warnings.warn(
                f"cache entry {path} is damaged ({in_one_line(error)}): it is made anew",
                stacklevel=2,
            )
            if not isinstance(error, OSError):  # of which the file may know nothing
                with contextlib.suppress(OSError):
                    path.unlink()
            return None
        with contextlib.suppress(OSError):  # of another user, perhaps
            os.utime(path)
        return jax.tree.unflatten(structure, found), facts["maker"]

    @processes.by_first
    def has(self, key: Key) -> bool:
        """Whether there is a result, which may be damaged."""
        path = self._path(key)
        return path is not None and path.is_file()

    @processes.by_first
    def put(self, key: Key, tree: Any, maker: Maker | None = None) -> None:
        """Keep a result, of this run's maker by default.

        Where that cannot be, a warning says so, and the run goes on.
        """
        path = self._path(key)
        if path is None:
            return
        facts = {
            "what": key.what,
            "maker": maker or self.maker,
            "made": f"{datetime.now(UTC):%F %T}",
        }
        arrays = {f"leaf{i}": np.asarray(leaf) for i, leaf in enumerate(jax.tree.leaves(tree))}

        def write(draft: Path) -> None:
            with draft.open("wb") as file:  # savez adds a suffix to a path
                np.savez(file, facts=np.array(json.dumps(facts)), **arrays)

        try:
            write_atomically(path, write)
        except InputError as error:
            warnings.warn(f"a result is not kept for other runs: {error}", stacklevel=2)

    @contextlib.contextmanager
    def alone(self, key: Key, log: Callable[[str], None]) -> Iterator[None]:
        """Hold a result while it is looked for and made: who else wants it waits, and finds it.

        A command that ends, in any way, holds nothing any more. Of several processes the first
        holds it, and the others wait for what it finds.
        """
        path = self._path(key)
        if path is None or not processes.is_first():
            yield
            return
        lock = FileLock(path.parent / "locks" / f"{key.name}.lock")
        try:
            lock.acquire(timeout=0)
        except Timeout:
            log(f"{key.stage} of {key.what}: another command makes it, waiting")
            lock.acquire()
        except OSError:  # a folder that others may write to, and this user may only read
            yield
            return
        try:
            yield
        finally:
            lock.release()

    def _path(self, key: Key) -> Path | None:
        if self.folder is None or key.digest is None:
            return None
        return self.folder / f"{key.name}.npz"


def _as(array: np.ndarray, like: Any) -> np.ndarray:
    """An array as it was put in; files do not know types such as bfloat16."""
    if array.dtype.kind == "V" and array.dtype.itemsize == np.dtype(like.dtype).itemsize:
        array = array.view(like.dtype)
    if (array.shape, array.dtype) != (like.shape, like.dtype):
        raise ValueError(f"it holds {array.dtype}{list(array.shape)}")
    return array


def folder() -> Path | None:
    """The folder of `$MADJAX_CACHE`, by default the user's; None where that is empty."""
    said = os.environ.get(VARIABLE)
    if said is None:
        return Path(platformdirs.user_cache_dir("madjax"))
    return Path(said).expanduser() if said else None


@processes.by_first
def open_cache(maker: Maker) -> Cache:
    """The cache of this machine, or, with a warning, one that keeps nothing where none can be."""
    where = folder()
    if where is not None:
        try:
            (where / "locks").mkdir(parents=True, exist_ok=True)
        except OSError as error:
            warnings.warn(
                f"{where} cannot be written ({error.strerror}): no result is kept for other runs; "
                f"set {VARIABLE} to another folder, or to nothing",
                stacklevel=2,
            )
            where = None
    return Cache(where, maker)


def keep_programs() -> None:
    """Let JAX keep compiled programs in the cache too, for all that this process does from now on.

    Nothing is changed where JAX has a folder already (`$JAX_COMPILATION_CACHE_DIR`), or none can
    be written. Where JAX's variables do not say otherwise, programs are kept that took 0.1 s to
    compile, and the oldest go when there are 2 GB of them.
    """
    where = folder()
    if where is None or jax.config.jax_compilation_cache_dir is not None:
        return
    path = where / f"{PROGRAMS}-{_instructions()}"
    try:
        path.mkdir(parents=True, exist_ok=True)
        _mend(path)
    except OSError:  # which `open_cache` says
        return
    jax.config.update("jax_compilation_cache_dir", str(path))
    for name, value in _USUAL.items():
        if name.upper() not in os.environ:
            jax.config.update(name, value)


PROGRAMS = "programs"
_USUAL = {
    "jax_compilation_cache_max_size": 2**31,
    "jax_persistent_cache_min_compile_time_secs": 0.1,
}


def _mend(path: Path) -> None:
    """Remove programs that a command was killed at while it wrote them.

    JAX writes down when one was used after the program itself, and it finds room for no other
    where it has not (0.10.2).
    """
    with contextlib.suppress(Timeout), FileLock(path / ".lockfile").acquire(timeout=0):
        for file in path.glob("*-cache"):
            if not file.with_name(f"{file.name.removesuffix('cache')}atime").exists():
                file.unlink(missing_ok=True)


def _instructions() -> str:
    """A digest of the instructions of this CPU: machines that share a home may have others.

    JAX takes programs for its own that were compiled for more than there are.
    """
    said = platform.processor()
    with contextlib.suppress(OSError):
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        said = next((line for line in lines if line.startswith(("flags", "Features"))), said)
    return digest([platform.machine(), said], 24)


def entries(where: Path) -> list[Entry]:
    """What a folder holds, what was used last first."""
    found = []
    for path in where.glob("*.npz"):
        facts = {"what": "damaged", "maker": {}, "made": "?"}
        with contextlib.suppress(Exception), path.open("rb") as file, np.load(file) as held:
            facts = json.loads(str(held["facts"]))
        said = facts["what"], facts["maker"], facts["made"]
        found.append(Entry(path, *said, path.stat().st_size, _idle(path)))
    for path in where.glob(f"{KIND}-{'[0-9a-f]' * 24}/"):
        facts = {"what": "damaged", "made": "?"}
        with contextlib.suppress(Exception):
            facts = json.loads((path / FACTS).read_text())
        with contextlib.suppress(OSError):  # another command removes it
            size = sum(file.stat().st_size for file in path.iterdir())
            found.append(Entry(path, facts["what"], {}, facts["made"], size, _idle(path)))
    for path in where.glob(f"{PROGRAMS}-{'[0-9a-f]' * 24}/"):
        with contextlib.suppress(OSError, ValueError):  # another command removes it; it is empty
            kept = [file for file in path.iterdir() if file.name.endswith("-cache")]
            size = sum(file.stat().st_size for file in kept)
            used = min(map(_idle, path.iterdir()))
            made = datetime.fromtimestamp(min(file.stat().st_mtime for file in kept), UTC)
            what = f"{len(kept)} compiled programs"
            found.append(Entry(path, what, {}, f"{made:%F %T}", size, used))
    return sorted(found, key=lambda entry: entry.idle)


def prune(where: Path, days: float) -> list[Entry]:
    """Remove what was not used for so many days, and return what it was."""
    gone = [entry for entry in entries(where) if entry.idle >= days]
    drafts = (path for path in where.glob(".*.part") if _idle(path) >= days)  # of who was killed
    for path in (*(entry.path for entry in gone), *drafts):
        if path.name.startswith(PROGRAMS):
            shutil.rmtree(path, ignore_errors=True)
        elif path.is_dir():
            name = path.name.strip(".").removesuffix(".part")
            with contextlib.suppress(Timeout), lock_of(where / name, wait=False):
                shutil.rmtree(path, ignore_errors=True)
        else:
            path.unlink(missing_ok=True)
    return gone


def in_bytes(count: float) -> str:
    """A number of bytes for people."""
    return f"{count / 1e6:,.1f} MB" if count < 1e9 else f"{count / 1e9:,.1f} GB"


def _idle(path: Path) -> float:
    return (time.time() - path.stat().st_mtime) / DAY
