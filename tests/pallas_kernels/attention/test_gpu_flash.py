"""The Pallas kernels for GPUs, in the interpreter, against `reference`. `test_gpu.py` lowers them for CUDA."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pallas_kernels.attention import attention
from tests.pallas_kernels.attention.test_tpu import make_inputs, make_segments, poison_unseen

# float32: two orders of summing at most ~300 products of O(1) numbers; measured at most 5e-6.
FP32_ERROR = 2e-5
NAMES = ("out", "lse", "dq", "dk", "dv")


def run_all(implementation, q, k, v, **kwargs):
    """Returns (out, lse, dq, dk, dv) as float32 for fixed random cotangents of out and lse."""

    def both(q, k, v, d_out, d_lse):
        how = {"implementation": implementation, "interpret": implementation == "gpu", "return_lse": True, **kwargs}
        (out, lse), pull = jax.vjp(lambda *x: attention(*x, **how), q, k, v)
        return (out, lse, *pull((d_out.astype(out.dtype), jnp.where(jnp.isfinite(lse), d_lse, 0))))

    rng = np.random.default_rng(7)
    d_out = jnp.asarray(rng.normal(size=q.shape), jnp.float32)
    d_lse = jnp.asarray(rng.normal(size=(q.shape[0], q.shape[2], q.shape[1])), jnp.float32)
    return tuple(np.asarray(x, np.float32) for x in jax.jit(both)(q, k, v, d_out, d_lse))


def assert_agree(q, k, v, **kwargs):
    found, wanted = (run_all(name, q, k, v, **kwargs) for name in ("gpu", "reference"))
    for name, a, b in zip(NAMES, found, wanted, strict=True):
        np.testing.assert_allclose(a, b, rtol=FP32_ERROR, atol=FP32_ERROR, err_msg=name)


@pytest.mark.parametrize("window", [None, 1, 31, 32, 33, 127, 128, 129])
@pytest.mark.parametrize("segmented", [False, True])
def test_windows(window, segmented):
    ids = make_segments(1, 2, 150) if segmented else None
    assert_agree(*make_inputs(0, 2, 150, 4, 2, 64), window=window, segment_ids=ids)


@pytest.mark.parametrize(("heads", "kv_heads", "dim"), [(4, 4, 80), (5, 1, 128), (6, 2, 20)])
def test_groups_and_head_dims(heads, kv_heads, dim):
    assert_agree(*make_inputs(2, 1, 70, heads, kv_heads, dim), window=40, segment_ids=make_segments(3, 1, 70))


@pytest.mark.parametrize("length", [1, 32, 33])
def test_lengths(length):
    assert_agree(*make_inputs(4, 1, length, 2, 1, 64))


@pytest.mark.parametrize("static", [False, True])
@pytest.mark.parametrize("window", [None, 40])
@pytest.mark.parametrize(
    ("num_queries", "num_keys", "offsets"), [(50, 150, (100, 37)), (150, 50, (-30, 10)), (40, 40, (500, -500))]
)
def test_offsets(num_queries, num_keys, offsets, window, static):
    """Before, across and past the keys, with NaN in every key that nobody sees."""
    offsets = offsets[:1] if static else offsets
    q, _, _ = make_inputs(5, len(offsets), num_queries, 2, 1, 64)
    _, k, v = make_inputs(6, len(offsets), num_keys, 2, 1, 64)
    ids = tuple(make_segments(seed, len(offsets), n) for seed, n in ((7, num_queries), (8, num_keys)))
    k, v = poison_unseen(k, v, num_queries, offsets, window, ids)
    q_offset = offsets[0] if static else jnp.asarray(offsets, jnp.int32)
    assert_agree(q, k, v, window=window, segment_ids=ids, q_offset=q_offset)


def test_large_scores_stay_finite():
    q, k, v = make_inputs(9, 1, 70, 2, 1, 64)
    assert all(np.isfinite(x).all() for x in run_all("gpu", 100 * q, 100 * k, v))


@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float16])
@pytest.mark.parametrize("window", [None, 100])
def test_16_bits_are_as_near_to_the_truth_as_the_reference(window, dtype):
    q, k, v = make_inputs(10, 1, 200, 4, 2, 128, dtype)
    truth = run_all("reference", *(x.astype(jnp.float32) for x in (q, k, v)), window=window)
    found, reference = (run_all(name, q, k, v, window=window) for name in ("gpu", "reference"))
    for name, a, b, t in zip(NAMES, found, reference, truth, strict=True):
        # 2e-6: lse is float32 on both sides, where both errors are rounding noise.
        assert np.abs(a - t).mean() <= 2 * np.abs(b - t).mean() + 2e-6, name
        assert np.abs(a - t).max() <= 2 * np.abs(b - t).max() + 2e-6, name
