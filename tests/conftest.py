"""Settings of every test process, made before jax or torch is imported: they read them once, at import."""

import ctypes
import gc
import os
import sys

import hypothesis
import pytest


def _share_cores() -> None:
    """Give each xdist worker its part of the cores, so that workers do not fight over threads."""
    workers = int(os.environ.get("PYTEST_XDIST_WORKER_COUNT", "1"))
    threads = str(max(1, len(os.sched_getaffinity(0)) // workers))
    for name in (
        "OMP_NUM_THREADS",
        "MKL_NUM_THREADS",
        "OPENBLAS_NUM_THREADS",
        "NPROC",
    ):  # NPROC: XLA:CPU's thread pools
        os.environ.setdefault(name, threads)


_share_cores()
os.environ.setdefault("JAX_PLATFORMS", "cpu")  # tolerances are argued for the CPU; a GPU run names its own platform
os.environ.setdefault("JAX_NUM_CPU_DEVICES", "8")  # for tests of meshes; what asks for none runs on the first
# These tests compile much and compute little, and a third of a compile is optimisation that they do not need.
os.environ.setdefault("JAX_DISABLE_MOST_OPTIMIZATIONS", "true")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
os.environ["HF_HUB_OFFLINE"] = "1"  # a test that reaches for the network is wrong: fail at once

# Repeatable: the same examples in every run, no limit on time, which a busy machine would break at random.
hypothesis.settings.register_profile(
    "repeatable",
    derandomize=True,
    deadline=None,
    database=None,
    print_blob=True,
    suppress_health_check=[hypothesis.HealthCheck.too_slow],
)
hypothesis.settings.load_profile("repeatable")


@pytest.fixture(scope="module", autouse=True)
def _forget_programs(request: pytest.FixtureRequest):
    """A worker that kept the models and the compiled programs of every file would end with many gigabytes."""
    yield
    for made in vars(request.module).values():
        if callable(getattr(made, "cache_clear", None)):  # functools.cache
            made.cache_clear()
    if "jax" in sys.modules:
        sys.modules["jax"].clear_caches()
    gc.collect()
    if sys.platform == "linux":
        ctypes.CDLL(None).malloc_trim(0)  # freed memory goes back to the system
