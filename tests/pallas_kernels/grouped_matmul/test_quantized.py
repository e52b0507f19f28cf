"""Grouped matmul with quantised matrices: against the same matrices dequantised, forward and in the gradient of the rows."""

import os

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pallas_kernels.grouped_matmul import QuantizedRhs, choose_implementation, grouped_matmul
from pallas_kernels.grouped_matmul.quantized import dequantize
from tests.pallas_kernels.tpu_compiler import TOPOLOGIES, array, compile_for

SIZES, OFFSET, GROUPS = (60, 70, 0, 110, 10, 10), 1, 3  # rows of groups 1 to 3 are ours; one of them has none
FIRST, LAST = 60, 240


def matrices(scales: str, dtype: str, transposed: bool, k: int = 256, n: int = 384) -> QuantizedRhs:
    """Values in [-7, 7], exact in every dtype; one scale an output channel, a contracted one, a block, or for all."""
    random = np.random.default_rng(0)
    shape = {"output": (1, n), "contracted": (k, 1), "block": (k // 128, n // 128), "one": (1, 1)}[scales]
    values, factors = random.integers(-7, 8, (GROUPS, k, n)), random.uniform(0.5, 1.5, (GROUPS, *shape))
    if transposed:
        values, factors = values.swapaxes(1, 2), factors.swapaxes(1, 2)
    return QuantizedRhs(jnp.asarray(values, dtype), jnp.asarray(factors, jnp.float32))


def forward_and_dlhs(lhs, rhs, grad, **options) -> list[np.ndarray]:
    sizes = jnp.asarray(SIZES, jnp.int32)

    @jax.jit
    def run(lhs, rhs, grad, offset):
        out, pull = jax.vjp(lambda lhs: grouped_matmul(lhs, rhs, sizes, group_offset=offset, **options), lhs)
        return out, *pull(grad)

    return [np.asarray(a, np.float32) for a in run(lhs, rhs, grad, jnp.int32(OFFSET))]


def exact(lhs, rhs: QuantizedRhs, grad, transposed: bool) -> list[np.ndarray]:
    """In float64, by groups."""
    full = np.asarray(dequantize(rhs, jnp.float32), np.float64)
    full = full.swapaxes(1, 2) if transposed else full
    lhs, grad = np.asarray(lhs, np.float64), np.asarray(grad, np.float64)
    out, dlhs = np.zeros(grad.shape), np.zeros(lhs.shape)
    starts = np.cumsum([0, *SIZES])
    for group in range(GROUPS):
        rows = slice(starts[OFFSET + group], starts[OFFSET + group + 1])
        out[rows], dlhs[rows] = lhs[rows] @ full[group], grad[rows] @ full[group].T
    return [out, dlhs]


def operands(dtype: str) -> tuple[jax.Array, jax.Array]:
    """lhs and the gradient of the result."""
    random = np.random.default_rng(1)
    return tuple(jnp.asarray(random.normal(size=(280, width)), dtype) for width in (256, 384))


@pytest.mark.parametrize("implementation", ["reference", "xla", "tpu"])
@pytest.mark.parametrize("scales", ["output", "contracted", "block", "one"])
@pytest.mark.parametrize(("dtype", "transposed"), [("int8", False), ("float8_e4m3fn", True), ("int4", True)])
def test_matches_float64(implementation: str, scales: str, dtype: str, transposed: bool):
    (lhs, grad), rhs = operands("float32"), matrices(scales, dtype, transposed)
    truth = exact(lhs, rhs, grad, transposed)
    other = (np.arange(len(lhs)) < FIRST) | (np.arange(len(lhs)) >= LAST)
    lhs, grad = (jnp.where(other[:, None], jnp.nan, a) for a in (lhs, grad))
    options = {"implementation": implementation, "interpret": implementation == "tpu", "transpose_rhs": transposed}
    for found, expected in zip(forward_and_dlhs(lhs, rhs, grad, **options), truth, strict=True):
        # Sums of 384 float32 products: 1e-6 of the largest, as measured; the bound is that of every implementation.
        np.testing.assert_allclose(found, expected, rtol=0, atol=2e-5 * np.abs(expected).max())
        assert not found[other].any()


@pytest.mark.parametrize("implementation", ["xla", "tpu"])
@pytest.mark.parametrize("scales", ["output", "block"])
def test_bfloat16_is_as_good_as_the_reference_in_bfloat16(implementation: str, scales: str):
    (lhs, grad), rhs = operands("bfloat16"), matrices(scales, "int8", True)
    truth = exact(lhs, rhs, grad, True)
    plain = forward_and_dlhs(lhs, rhs, grad, implementation="reference", transpose_rhs=True)
    options = {"implementation": implementation, "interpret": implementation == "tpu"}
    found = forward_and_dlhs(lhs, rhs, grad, transpose_rhs=True, **options)
    for a, b, t in zip(found, plain, truth, strict=True):
        assert np.abs(a - t).max() <= 2 * np.abs(b - t).max()


def test_matrices_stay_small_in_memory():
    """XLA:CPU dequantises four matrices of 128 at a time, at most four times in float32."""
    rhs = QuantizedRhs(
        jax.ShapeDtypeStruct((128, 512, 256), jnp.int8), jax.ShapeDtypeStruct((128, 512, 1), jnp.float32)
    )
    lhs, sizes = jax.ShapeDtypeStruct((16, 256), jnp.float32), jax.ShapeDtypeStruct((128,), jnp.int32)
    call = jax.jit(lambda *args: grouped_matmul(*args, transpose_rhs=True, implementation="xla"))
    assert call.lower(lhs, rhs, sizes).compile().memory_analysis().temp_size_in_bytes <= 4 * 4 * 512 * 256 * 4


def test_the_gradient_of_quantised_matrices_is_refused():
    (lhs, _), rhs = operands("float32"), matrices("output", "int8", False)
    sizes = jnp.asarray([100, 100, 80], jnp.int32)

    def loss(scales: jax.Array) -> jax.Array:
        return jnp.sum(grouped_matmul(lhs, QuantizedRhs(rhs.values, scales), sizes))

    with pytest.raises(NotImplementedError, match="a quantised rhs has no gradient"):
        jax.grad(loss)(rhs.scales)


def test_wrong_matrices_are_named():
    (lhs, _), (values, scales) = operands("float32"), matrices("output", "int8", False)
    sizes = jnp.asarray([100, 100, 80], jnp.int32)
    with pytest.raises(TypeError, match="quantised values must be one of int8, int4, float8_e4m3fn, found int16"):
        grouped_matmul(lhs, QuantizedRhs(values.astype(jnp.int16), scales), sizes)
    with pytest.raises(TypeError, match="scales must be float32, found bfloat16"):
        grouped_matmul(lhs, QuantizedRhs(values, scales.astype(jnp.bfloat16)), sizes)
    with pytest.raises(ValueError, match=r"in whole blocks \[a, b\], found \(3, 1, 100\)"):
        grouped_matmul(lhs, QuantizedRhs(values, scales[:, :, :100]), sizes)


def test_what_the_tpu_kernel_cannot_serve():
    (lhs, _), (values, scales) = operands("float32"), matrices("block", "int8", False)
    sizes = jnp.asarray([100, 100, 80], jnp.int32)
    narrow = QuantizedRhs(values, jnp.ones((GROUPS, 16, 3)))
    for rhs, reason in ((narrow, "takes blocks of 128, 256 or 512"), (QuantizedRhs(values[:, :, :96], scales), "128")):
        with pytest.raises(NotImplementedError, match=reason):
            choose_implementation(lhs, rhs, sizes, implementation="tpu", interpret=True)
    with pytest.raises(NotImplementedError, match="need a TPU or interpret=True"):
        choose_implementation(lhs, QuantizedRhs(values, scales), sizes, implementation="tpu")


@pytest.mark.slow
@pytest.mark.skipif(
    os.environ.get("JAX_PLATFORMS") != "cpu", reason="needs JAX_PLATFORMS=cpu, or libtpu looks for a TPU"
)
@pytest.mark.parametrize("chip", TOPOLOGIES)
@pytest.mark.parametrize("dtype", ["int8", "float8_e4m3fn", "int4"])
@pytest.mark.parametrize("blocks", [False, True])
def test_compiles_for(monkeypatch, chip: str, dtype: str, blocks: bool):
    """K-EXAONE's experts, an eighth of them on a chip, forward and dX."""
    pytest.importorskip("libtpu")
    monkeypatch.setenv("TPU_SKIP_MDS_QUERY", "1")
    monkeypatch.setenv("ALLOW_MULTIPLE_LIBTPU_LOAD", "1")
    groups, n, k, num_rows = 16, 2048, 6144, 4096
    scales = (groups, n // 128, k // 128) if blocks else (groups, n, 1)
    rhs = QuantizedRhs(array((groups, n, k), dtype), array(scales, "float32"))

    def call(lhs, rhs, sizes, offset, grad):
        options = {"group_offset": offset, "transpose_rhs": True, "implementation": "tpu"}
        out, pull = jax.vjp(lambda lhs: grouped_matmul(lhs, rhs, sizes, **options), lhs)
        return out, *pull(grad)

    rows, grad = array((num_rows, k), "bfloat16"), array((num_rows, n), "bfloat16")
    memory = compile_for(chip, call, rows, rhs, array((128,), "int32"), array((), "int32"), grad).memory_analysis()
    # A few arrays of rows in float32 and the scales spread along one axis, and nothing of 16 x 2,048 x 6,144 in bfloat16.
    assert memory.temp_size_in_bytes <= 4 * num_rows * k * 4
