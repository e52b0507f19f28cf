"""The GPU kernels: in the interpreter against float64, and lowered for CUDA. No GPU computes here."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pallas_kernels.grouped_matmul import QuantizedRhs, choose_implementation, gpu, grouped_matmul
from tests.pallas_kernels.cuda import TRITON, library_calls
from tests.pallas_kernels.grouped_matmul import test_quantized as quantized
from tests.pallas_kernels.grouped_matmul.test_grouped_matmul import (
    assert_close,
    exact,
    operands,
    sizes_strategy,
    value_and_gradients,
)

IN_INTERPRETER = {"implementation": "gpu", "interpret": True}
# (experts, hidden, an expert's width) of K-EXAONE and K-EXAONE 2.0, an eighth of them on a card
EXPERTS = {"236B": (16, 6144, 2048), "750B": (8, 7168, 2048)}


@pytest.mark.parametrize("transpose_rhs", [False, True])
@given(sizes=sizes_strategy(6, 150))
@settings(max_examples=10)
def test_matches_float64(transpose_rhs: bool, sizes: list[int]):
    """Widths off every tile's edge. Rows of no group, and matrices of groups without rows, hold NaN."""
    used, empty = sum(sizes), np.flatnonzero(np.asarray(sizes) == 0)
    lhs, rhs, grad = operands((150, 72, 200, 6))
    truth = exact(lhs, rhs, sizes, grad)
    lhs, grad, rhs = lhs.at[used:].set(jnp.nan), grad.at[used:].set(jnp.nan), rhs.at[empty].set(jnp.nan)
    found = value_and_gradients(
        lhs, rhs, jnp.asarray(sizes, jnp.int32), grad, transpose_rhs=transpose_rhs, **IN_INTERPRETER
    )
    # A float32 sum of up to 200 products: see the same bound of the other implementations.
    assert_close(found, truth, 2e-5)
    assert not found[0][used:].any() and not found[1][used:].any() and not found[2][empty].any()


@given(data=st.data())
@settings(max_examples=8)
def test_a_shard_of_the_groups(data: st.DataObject):
    """Rows of other groups hold poison: they give zeros and reach no gradient."""
    sizes, offset = data.draw(sizes_strategy(6, 150)), data.draw(st.integers(0, 3))
    lhs, rhs, grad = operands((150, 72, 200, 3))
    starts = np.cumsum([0, *sizes])
    rows = slice(int(starts[offset]), int(starts[offset + 3]))
    truth = [np.zeros(grad.shape), np.zeros(lhs.shape), None]
    truth[0][rows], truth[1][rows], truth[2] = exact(lhs[rows], rhs, sizes[offset : offset + 3], grad[rows])
    mine = np.zeros((150, 1), bool)
    mine[rows] = True
    lhs, grad = jnp.where(mine, lhs, jnp.nan), jnp.where(mine, grad, jnp.nan)
    options = {"group_offset": jnp.int32(offset), **IN_INTERPRETER}
    assert_close(value_and_gradients(lhs, rhs, jnp.asarray(sizes, jnp.int32), grad, **options), truth, 2e-5)


@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float16])
def test_16_bits_are_as_good_as_the_reference(dtype):
    lhs, rhs, grad = operands((300, 96, 80, 6), dtype)
    sizes = jnp.asarray([1, 2, 150, 0, 90, 57], jnp.int32)
    truth = exact(lhs, rhs, sizes, grad)
    plain = value_and_gradients(lhs, rhs, sizes, grad, implementation="reference")
    for a, b, t in zip(value_and_gradients(lhs, rhs, sizes, grad, **IN_INTERPRETER), plain, truth, strict=True):
        assert np.abs(a - t).max() <= 2 * np.abs(b - t).max()


def test_wide_weights_keep_their_gradient():
    """bfloat16 rows with float32 weights: the weights' gradient is not rounded to bfloat16."""
    lhs, rhs, grad = operands((150, 72, 200, 6))
    sizes, lhs, grad = jnp.asarray([30] * 5 + [0], jnp.int32), lhs.astype(jnp.bfloat16), grad.astype(jnp.bfloat16)
    out, pull = jax.vjp(lambda *x: grouped_matmul(*x, sizes, **IN_INTERPRETER), lhs, rhs)
    dlhs, drhs = pull(grad)
    assert (out.dtype, dlhs.dtype, drhs.dtype) == (jnp.bfloat16, jnp.bfloat16, jnp.float32)
    truth = exact(lhs, rhs, sizes, grad)[2]
    np.testing.assert_allclose(np.asarray(drhs), truth, rtol=0, atol=2e-5 * np.abs(truth).max())


@pytest.mark.parametrize("scales", ["output", "contracted", "block", "one"])
@pytest.mark.parametrize(("dtype", "transposed"), [("int8", False), ("float8_e4m3fn", True)])
def test_quantised_matrices(scales: str, dtype: str, transposed: bool):
    (lhs, grad), rhs = quantized.operands("float32"), quantized.matrices(scales, dtype, transposed)
    truth = quantized.exact(lhs, rhs, grad, transposed)
    other = (np.arange(len(lhs)) < quantized.FIRST) | (np.arange(len(lhs)) >= quantized.LAST)
    lhs, grad = (jnp.where(other[:, None], jnp.nan, a) for a in (lhs, grad))
    options = {"transpose_rhs": transposed, **IN_INTERPRETER}
    for found, expected in zip(quantized.forward_and_dlhs(lhs, rhs, grad, **options), truth, strict=True):
        np.testing.assert_allclose(found, expected, rtol=0, atol=2e-5 * np.abs(expected).max())
        assert not found[other].any()


@pytest.fixture
def cuda(monkeypatch):
    """A GPU, as far as tracing and lowering look."""
    monkeypatch.setattr(gpu, "target", lambda: "gpu")
    monkeypatch.setattr("pallas_kernels._select.target", lambda: "gpu")


def shapes(model: str, transposed: bool, matrices: str = "bfloat16"):
    experts, hidden, width = EXPERTS[model]
    size = (width, hidden) if transposed else (hidden, width)
    rhs = jax.ShapeDtypeStruct((experts, *size), matrices)
    if matrices != "bfloat16":
        blocks = (experts, size[0] // 128, size[1] // 128)
        rhs = QuantizedRhs(rhs, jax.ShapeDtypeStruct(blocks, jnp.float32))
    sizes = jax.ShapeDtypeStruct((8 * experts,), jnp.int32)
    return jax.ShapeDtypeStruct((4096, hidden), jnp.bfloat16), rhs, sizes, jax.ShapeDtypeStruct((), jnp.int32)


@pytest.mark.parametrize("transposed", [False, True])
@pytest.mark.parametrize("model", EXPERTS)
def test_training_lowers_to_three_kernels(cuda, model, transposed):
    def loss(lhs, rhs, sizes, offset):
        out = grouped_matmul(lhs, rhs, sizes, group_offset=offset, transpose_rhs=transposed, implementation="gpu")
        return out.astype(jnp.float32).sum()

    found = library_calls(jax.grad(loss, (0, 1)), *shapes(model, transposed))
    assert found == [TRITON] * 2  # a sum's gradient needs no forward product


@pytest.mark.parametrize("matrices", ["bfloat16", "int8", "float8_e4m3fn"])
@pytest.mark.parametrize("model", EXPERTS)
def test_serving_lowers_to_one_kernel(cuda, model, matrices):
    run = functools.partial(grouped_matmul, transpose_rhs=True, implementation="gpu")
    found = library_calls(
        lambda lhs, rhs, sizes, offset: run(lhs, rhs, sizes, group_offset=offset), *shapes(model, True, matrices)
    )
    assert found == [TRITON]


def test_nothing_named_takes_ragged_dot_on_a_gpu(cuda):
    lhs, rhs, sizes, _ = shapes("236B", False)
    rhs = jax.ShapeDtypeStruct((sizes.shape[0], 64, 64), rhs.dtype)
    lhs = jax.ShapeDtypeStruct((64, 64), lhs.dtype)
    assert choose_implementation(lhs, rhs, sizes) == "xla"
    assert set(library_calls(grouped_matmul, lhs, rhs, sizes)) == {"ragged_dot"}


def test_refusals_name_the_reason(cuda):
    def ask(lhs, rhs):
        sizes = jax.ShapeDtypeStruct(rhs.shape[:1], jnp.int32)
        return choose_implementation(lhs, rhs, sizes, implementation="gpu")

    lhs, int4 = jax.ShapeDtypeStruct((64, 256), jnp.bfloat16), quantized.matrices("output", "int4", False)
    with pytest.raises(NotImplementedError, match="no 4-bit arrays"):
        ask(lhs, int4)
    small = QuantizedRhs(jnp.zeros((3, 256, 384), jnp.int8), jnp.ones((3, 4, 3)))
    with pytest.raises(NotImplementedError, match="blocks of multiples of 128, found 64 x 128"):
        ask(lhs, small)
    with pytest.raises(NotImplementedError, match="32 bits"):
        ask(lhs, jax.ShapeDtypeStruct((2**13, 256, 2**10), jnp.bfloat16))


def test_without_a_gpu_it_says_so():
    if jax.default_backend() == "gpu":
        pytest.skip("there is a GPU")
    lhs, rhs, _ = operands((5, 8, 16, 4))
    with pytest.raises(NotImplementedError, match="no GPU here"):
        grouped_matmul(lhs, rhs, jnp.zeros(4, jnp.int32), implementation="gpu")
