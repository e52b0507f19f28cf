"""Settings of the inference tests."""

import jax
import pytest


@pytest.fixture(autouse=True, scope="module")
def quick_compiles():
    """These tests compile much and compute little: half the time of a compile is optimisation that they do not need."""
    before = jax.config.read("jax_disable_most_optimizations")
    jax.config.update("jax_disable_most_optimizations", True)
    yield
    jax.config.update("jax_disable_most_optimizations", before)
