"""What libtpu makes of the products in 8 bits: products of 8 bits, on the chips that have them. No TPU: `make test-tpu`."""

import importlib.util
import os
import re

import jax
import jax.numpy as jnp
import pytest

from exaone_jax.model.narrow import narrow_dot, narrow_grouped
from tests.pallas_kernels.tpu_compiler import array, compile_for

pytestmark = [
    pytest.mark.skipif(importlib.util.find_spec("libtpu") is None, reason="needs libtpu: make test-tpu"),
    pytest.mark.skipif(
        os.environ.get("JAX_PLATFORMS") != "cpu", reason="needs JAX_PLATFORMS=cpu, or libtpu looks for a TPU"
    ),
]

ROWS, WIDTH, OUT, EXPERTS = 512, 1024, 768, 4
SMALL = {"int8": r"s8\[[^\]]*\]", "float8": r"f8e4m3fn\[[^\]]*\]"}


@pytest.fixture(autouse=True)
def _no_tpu_look_up(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TPU_SKIP_MDS_QUERY", "1")
    monkeypatch.setenv("ALLOW_MULTIPLE_LIBTPU_LOAD", "1")


def products(text: str) -> list[str]:
    """The types of both sides of each product in a TPU's program, which writes them as convolutions, and those of experts as
    calls of a kernel whose last two arguments they are."""
    types = dict(re.findall(r"(%[\w.-]+) = (\w+\[[^\]]*\])", text))
    calls = re.findall(r"convolution\((%[\w.-]+), (%[\w.-]+)", text)
    calls += re.findall(r"%ragged-dot-none\S* = [^\n]*?custom-call\([^)]*?(%[\w.-]+), (%[\w.-]+)\)", text)
    return [f"{types[left]} {types[right]}" for left, right in calls]


@pytest.mark.parametrize(("chip", "kind"), [("v5e", "int8"), ("v6e", "int8"), ("tpu7x", "float8")])
@pytest.mark.parametrize("grouped", [False, True])
def test_the_forward_products_are_of_8_bits(chip: str, kind, grouped: bool) -> None:
    x, weight = array((ROWS, WIDTH), jnp.bfloat16), array((OUT, WIDTH), jnp.bfloat16)
    if grouped:
        weights, sizes = array((EXPERTS, OUT, WIDTH), jnp.bfloat16), array((EXPERTS,), jnp.int32)
        program = compile_for(chip, lambda *each: narrow_grouped(*each, kind), x, weights, sizes)
    else:
        program = compile_for(chip, lambda *each: narrow_dot(*each, kind), x, weight)
    found = products(program.as_text())
    assert found and all(re.fullmatch(f"{SMALL[kind]} {SMALL[kind]}", each) for each in found), found


def test_the_gradients_products_are_wide() -> None:
    def loss(x: jax.Array, weight: jax.Array) -> jax.Array:
        return narrow_dot(x, weight, "int8").astype(jnp.float32).sum()

    x, weight = array((ROWS, WIDTH), jnp.bfloat16), array((OUT, WIDTH), jnp.bfloat16)
    found = products(compile_for("v6e", jax.grad(lambda *each: loss(*each) ** 2, (0, 1)), x, weight).as_text())
    assert sum("s8[" in each for each in found) <= 1 < len(found)
