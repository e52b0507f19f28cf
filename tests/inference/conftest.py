"""Settings of the inference tests."""

import pytest


@pytest.fixture(autouse=True, scope="module")
def all_compile_quickly(quick_compiles: None):
    """Every test of this folder."""
