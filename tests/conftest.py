"""Strict settings for every test: rank promotion raises, four fake devices."""

import gc
import os

import jax
import numpy as np
import pytest

jax.config.update("jax_num_cpu_devices", 4)
jax.config.update("jax_numpy_rank_promotion", "raise")
jax.config.update("jax_traceback_in_locations_limit", 0)  # none reads where an operation is from
# Much of the tests' time is XLA's, and it is spent on code that runs once.
if "JAX_DISABLE_MOST_OPTIMIZATIONS" not in os.environ:
    jax.config.update("jax_disable_most_optimizations", True)
    if jax.__version_info__ < (0, 11):  # XLA stops at flags that it does not know, as later ones do
        # Its older code generators compile in half the time.
        flags = "--xla_cpu_use_fusion_emitters=false --xla_cpu_parallel_codegen_split_count=1"
        os.environ["XLA_FLAGS"] = f"{os.environ.get('XLA_FLAGS', '')} {flags}".strip()
os.environ["MADJAX_CACHE"] = ""  # no test finds what another made, but those of the cache
# Python's collector would walk millions of objects of traced programs, again and again.
gc.disable()


def pytest_configure(config):
    """Compiled programs are kept from run to run, and none is compiled twice in one."""
    if hasattr(config, "cache"):
        jax.config.update("jax_compilation_cache_dir", str(config.cache.mkdir("compiled")))
        jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.05)
        jax.config.update("jax_persistent_cache_min_entry_size_bytes", 0)


@pytest.fixture(scope="module", autouse=True)
def _forget():
    """Traced programs of one file are of no use to the next."""
    yield
    jax.clear_caches()
    gc.collect()


@pytest.fixture(scope="session")
def folder(tmp_path_factory):
    """A directory with the data set "tiny": 60 images of four classes, 30 to test on."""
    rng, out = np.random.default_rng(0), tmp_path_factory.mktemp("data")
    arrays = {}
    for split, n in (("train", 60), ("test", 30)):
        arrays[f"x_{split}"] = rng.integers(0, 256, (n, 6, 6), dtype=np.uint8)
        arrays[f"y_{split}"] = np.arange(n) % 4
    arrays["x_test"][3] = 7  # a flat image, by which a test knows it again
    np.savez(out / "tiny.npz", **arrays)
    return out
