"""attention: every implementation against `reference`, and `reference` against a loop over rows."""

import functools
import logging
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pallas_kernels import _select
from pallas_kernels.attention import attention, choose_implementation

# float32: two orders of summing at most ~700 products of O(1) numbers; measured at most 1e-5.
FP32_ERROR = 2e-5

SETTINGS = settings(max_examples=12, deadline=None, derandomize=True)


def make_inputs(seed, batch, num_queries, num_keys, heads, kv_heads, dim, dtype=jnp.float32):
    rng = np.random.default_rng(seed)
    q = rng.normal(size=(batch, num_queries, heads, dim))
    k, v = (rng.normal(size=(batch, num_keys, kv_heads, dim)) for _ in range(2))
    return tuple(jnp.asarray(x, dtype) for x in (q, k, v))


def make_segments(seed, batch, length):
    return jnp.asarray(np.sort(np.random.default_rng(seed).integers(0, 4, (batch, length)), axis=1), jnp.int32)


def run_all(implementation, q, k, v, **kwargs):
    """Returns (out, lse, dq, dk, dv) as float32 for fixed random cotangents of out and lse."""
    static = {name: kwargs.pop(name) for name in ("window", "causal", "scale") if name in kwargs}
    if isinstance(kwargs.get("q_offset"), int):
        static["q_offset"] = kwargs.pop("q_offset")
    rng = np.random.default_rng(7)
    d_out = jnp.asarray(rng.normal(size=q.shape), q.dtype)
    d_lse = jnp.asarray(rng.normal(size=(q.shape[0], q.shape[2], q.shape[1])), jnp.float32)

    @jax.jit
    def run(q, k, v, d_out, d_lse, kwargs):
        call = functools.partial(attention, implementation=implementation, return_lse=True, **static, **kwargs)
        (out, lse), pull = jax.vjp(call, q, k, v)
        return out, lse, *pull((d_out, jnp.where(jnp.isfinite(lse), d_lse, 0)))

    return tuple(np.asarray(x, np.float32) for x in run(q, k, v, d_out, d_lse, kwargs))


def assert_agree(q, k, v, tolerance=FP32_ERROR, **kwargs):
    found, wanted = (run_all(name, q, k, v, **kwargs) for name in ("xla", "reference"))
    for name, a, b in zip(("out", "lse", "dq", "dk", "dv"), found, wanted, strict=True):
        np.testing.assert_allclose(a, b, rtol=tolerance, atol=tolerance, err_msg=name)


def attention_by_rows(q, k, v, window, segments, q_offset):
    """The definition once more, in float64 numpy, one query and head at a time."""
    q, k, v = (np.asarray(x, np.float64) for x in (q, k, v))
    out = np.zeros(q.shape)
    for b, i, h in np.ndindex(q.shape[:3]):
        at = q_offset + i
        keys = [j for j in range(k.shape[1]) if j <= at and (window is None or j > at - window)]
        if segments is not None:
            keys = [j for j in keys if segments[0][b, i] == segments[1][b, j]]
        if keys:
            head = h // (q.shape[2] // k.shape[2])
            scores = k[b, keys, head] @ q[b, i, h] / np.sqrt(q.shape[3])
            weights = np.exp(scores - scores.max())
            out[b, i, h] = weights @ v[b, keys, head] / weights.sum()
    return out


@pytest.mark.parametrize("implementation", ["reference", "xla"])
@pytest.mark.parametrize("window", [None, 1, 3, 40])
@pytest.mark.parametrize("q_offset", [0, 5])
def test_matches_the_definition(implementation, window, q_offset):
    q, k, v = make_inputs(0, 2, 11, 11 + q_offset, 4, 2, 16)
    segments = (make_segments(1, 2, 11), make_segments(2, 2, 11 + q_offset))
    for ids in (None, segments):
        out = attention(q, k, v, window=window, q_offset=q_offset, segment_ids=ids, implementation=implementation)
        np.testing.assert_allclose(out, attention_by_rows(q, k, v, window, ids, q_offset), atol=FP32_ERROR)


@pytest.mark.parametrize("implementation", ["reference", "xla"])
def test_window_counts_the_query_itself(implementation):
    q, k, _ = make_inputs(0, 1, 300, 300, 1, 1, 16)
    v = jnp.broadcast_to(jnp.arange(300.0)[None, :, None, None], (1, 300, 1, 16))
    out = attention(q * 0, k, v, window=128, implementation=implementation)  # equal weights: the mean of the seen
    wanted = [np.arange(max(0, i - 127), i + 1).mean() for i in range(300)]
    np.testing.assert_allclose(out[0, :, 0, 0], wanted, rtol=1e-5)


@SETTINGS
@given(
    seed=st.integers(0, 2**16),
    batch=st.integers(1, 2),
    length=st.sampled_from([1, 2, 7, 8, 127, 128, 129, 257, 300, 521]),
    window=st.sampled_from([None, 1, 2, 127, 128, 129, 1000]),
    heads=st.sampled_from([(1, 1), (4, 4), (4, 1), (6, 2), (10, 2)]),
    dim=st.sampled_from([16, 64, 80, 128]),
    segmented=st.booleans(),
)
def test_training_shapes(seed, batch, length, window, heads, dim, segmented):
    q, k, v = make_inputs(seed, batch, length, length, *heads, dim)
    assert_agree(q, k, v, window=window, segment_ids=make_segments(seed, batch, length) if segmented else None)


@SETTINGS
@given(
    seed=st.integers(0, 2**16),
    num_queries=st.sampled_from([1, 3, 8, 100, 129, 260]),
    before=st.sampled_from([0, 1, 127, 300]),
    after=st.sampled_from([0, 5, 300]),
    window=st.sampled_from([None, 1, 127, 128, 129, 700]),
    static=st.booleans(),
)
def test_a_chunk_against_a_buffer_of_keys(seed, num_queries, before, after, window, static):
    """Queries start at an offset; the buffer goes on after them. Dynamic offsets differ by row; gradients work too."""
    batch = 1 if static else 2
    q, k, v = make_inputs(seed, batch, num_queries, before + num_queries + after, 4, 2, 16)
    q_offset = before if static else jnp.asarray([before, before // 2], jnp.int32)
    assert_agree(q, k, v, window=window, q_offset=q_offset)


@pytest.mark.parametrize("window", [1, 16, 128])
def test_ring_prefill(window):
    """The chunked-prefill call: S = W - 1 + T, and segment ids that mark which of the leading keys do not exist yet."""
    length = 150
    q, k, v = make_inputs(3, 2, length, window - 1 + length, 4, 2, 64)
    invalid = jnp.asarray([window - 1, window // 3])[:, None]
    ids = (jnp.ones((2, length), jnp.int32), (jnp.arange(window - 1 + length) >= invalid).astype(jnp.int32))
    assert_agree(q, k, v, window=window, q_offset=window - 1, segment_ids=ids)
    # Row 0 has no history: the same as attention over the chunk alone.
    out = attention(q, k, v, window=window, q_offset=window - 1, segment_ids=ids, implementation="xla")
    alone = attention(q[:1], k[:1, window - 1 :], v[:1, window - 1 :], window=window, implementation="reference")
    np.testing.assert_allclose(out[:1], alone, atol=FP32_ERROR)


@pytest.mark.parametrize("segmented", [False, True])
@pytest.mark.parametrize(("num_queries", "num_keys"), [(5, 300), (300, 5), (260, 256), (257, 513)])
def test_not_causal(num_queries, num_keys, segmented):
    q, k, v = make_inputs(4, 2, num_queries, num_keys, 4, 2, 16)
    ids = (make_segments(1, 2, num_queries), make_segments(2, 2, num_keys)) if segmented else None
    assert_agree(q, k, v, causal=False, segment_ids=ids)


def test_unsorted_segments_and_scale():
    q, k, v = make_inputs(5, 2, 290, 290, 4, 2, 16)
    ids = jnp.asarray(np.random.default_rng(0).integers(-1, 2, (2, 290)), jnp.int32)
    assert_agree(q, k, v, segment_ids=ids, scale=0.7)


@pytest.mark.slow
@pytest.mark.parametrize("window", [None, 128, 1100, 4096])
def test_long(window):
    q, k, v = make_inputs(6, 1, 1500, 1500, 2, 1, 64)
    assert_agree(q, k, v, window=window)


@pytest.mark.parametrize("window", [None, 128])
def test_bfloat16_is_as_near_to_the_truth_as_the_reference(window):
    q, k, v = make_inputs(8, 1, 300, 300, 4, 2, 128, jnp.bfloat16)
    truth = run_all("reference", *(x.astype(jnp.float32) for x in (q, k, v)), window=window)
    found, reference = (run_all(name, q, k, v, window=window) for name in ("xla", "reference"))
    for name, a, b, t in zip(("out", "lse", "dq", "dk", "dv"), found, reference, truth, strict=True):
        # 1e-6: lse is float32 on both sides, where both errors are rounding noise.
        assert np.abs(a - t).mean() <= 2 * np.abs(b - t).mean() + 1e-6, name
        assert np.abs(a - t).max() <= 2 * np.abs(b - t).max() + 1e-6, name
    out = attention(q, k, v, window=window, implementation="xla")
    assert out.dtype == jnp.bfloat16


@pytest.mark.parametrize("implementation", ["reference", "xla"])
@pytest.mark.parametrize("window", [None, 128])
def test_rows_that_see_nothing(implementation, window):
    q, k, v = make_inputs(9, 1, 270, 270, 2, 1, 16)
    ids = (jnp.arange(270)[None] // 100, jnp.full((1, 270), 1))  # only queries 100..199 see keys
    out, lse, *grads = run_all(implementation, q, k, v, segment_ids=ids, window=window)
    blind = np.r_[0:100, 200:270]
    assert (out[:, blind] == 0).all() and np.isneginf(lse[:, :, blind]).all()
    assert np.isfinite(out).all() and np.isfinite(lse[:, :, 100:200]).all()
    assert all(np.isfinite(g).all() for g in grads)
    assert (grads[0][:, blind] == 0).all()


@pytest.mark.parametrize("implementation", ["reference", "xla"])
@pytest.mark.parametrize("q_offset", [-400, -7, 400])
def test_queries_outside_the_keys(implementation, q_offset):
    """Before every key, and so far after them that the window has passed: ring attention meets both."""
    q, k, v = make_inputs(10, 1, 33, 300, 2, 1, 16)
    found = run_all(implementation, q, k, v, window=50, q_offset=q_offset)
    assert_agree(q, k, v, window=50, q_offset=q_offset)
    if q_offset != -7:
        assert (found[0] == 0).all() and np.isneginf(found[1]).all() and (found[3] == 0).all()


@pytest.mark.parametrize("implementation", ["reference", "xla"])
@pytest.mark.parametrize("window", [None, 128])
@pytest.mark.parametrize("num_queries", [1, 20, 150])
def test_nan_in_keys_that_nobody_sees(implementation, window, num_queries):
    """The unused tail of a buffer, keys left of the window, and keys of no query's segment are poisoned."""
    q, k, v = make_inputs(11, 2, num_queries, 700, 4, 2, 16)
    q_offset = jnp.asarray([250, 333], jnp.int32)
    index = jnp.arange(700)[None]
    poisoned = index >= q_offset[:, None] + num_queries
    if window is not None:
        poisoned |= index < q_offset[:, None] - window + 1
    other = (index >= 240) & (index < 245)
    ids = (jnp.zeros((2, num_queries), jnp.int32), jnp.broadcast_to(other, (2, 700)).astype(jnp.int32))
    for segment_ids, bad in ((None, poisoned), (ids, poisoned | other)):
        clean = run_all(implementation, q, k, v, window=window, q_offset=q_offset, segment_ids=segment_ids)
        nan_k, nan_v = (jnp.where(bad[:, :, None, None], jnp.nan, x) for x in (k, v))
        found = run_all(implementation, q, nan_k, nan_v, window=window, q_offset=q_offset, segment_ids=segment_ids)
        for a, b in zip(found, clean, strict=True):
            np.testing.assert_array_equal(a, b)


def test_nan_in_a_seen_key_is_not_hidden():
    q, k, v = make_inputs(12, 1, 40, 40, 2, 1, 16)
    out = attention(q, k, v.at[0, 30].set(jnp.nan), implementation="xla")
    assert np.isnan(out[0, 30:]).all()


def test_large_scores_stay_finite():
    q, k, v = make_inputs(13, 1, 300, 300, 2, 1, 16)
    for window in (None, 64):
        found = run_all("xla", q * 300, k * 300, v, window=window)
        assert all(np.isfinite(x).all() for x in found)
        wanted = attention(q * 300, k * 300, v, window=window, implementation="reference")
        # Scores near 1e5 have a float32 spacing of 0.008: the softmax of near ties may differ by that much.
        np.testing.assert_allclose(found[0], wanted, atol=0.05)


def test_two_halves_join_through_lse():
    """Ring attention: the parts over two shards of keys, weighted by their lse, are the whole, gradients too."""
    q, k, v = make_inputs(14, 1, 200, 200, 4, 2, 16)

    def halves(q, k, v):
        run = functools.partial(attention, q, implementation="xla", return_lse=True)
        parts = [run(k[:, :100], v[:, :100], q_offset=0), run(k[:, 100:], v[:, 100:], q_offset=-100)]
        lse = jnp.stack([p[1] for p in parts])
        weights = jnp.exp(lse - jax.nn.logsumexp(lse, axis=0))
        return sum(p[0] * w.swapaxes(1, 2)[..., None] for p, w in zip(parts, weights, strict=True))

    whole = functools.partial(attention, implementation="reference")
    np.testing.assert_allclose(halves(q, k, v), whole(q, k, v), atol=FP32_ERROR)
    # Where the second lse is -inf its gradient is 0 * inf in logsumexp itself: compare the rows that see both halves.
    loss = lambda run: lambda q, k, v: (jnp.sin(run(q, k, v)[:, 100:])).sum()  # noqa: E731
    for a, b in zip(*(jax.grad(loss(run), (0, 1, 2))(q, k, v) for run in (halves, whole)), strict=True):
        np.testing.assert_allclose(a, b, atol=FP32_ERROR)


def gradient_memory(length, window):
    shape = jax.ShapeDtypeStruct((1, length, 4, 64), jnp.float32)
    kv = jax.ShapeDtypeStruct((1, length, 2, 64), jnp.float32)
    loss = lambda q, k, v: attention(q, k, v, window=window, implementation="xla").sum()  # noqa: E731
    compiled = jax.jit(jax.value_and_grad(loss, (0, 1, 2))).lower(shape, kv, kv).compile()
    analysis = compiled.memory_analysis()
    return analysis.temp_size_in_bytes, analysis.argument_size_in_bytes + analysis.output_size_in_bytes


@pytest.mark.parametrize("window", [None, 128])
def test_temporaries_grow_with_the_length_not_its_square(window):
    (small, _), (large, face) = gradient_memory(2048, window), gradient_memory(16384, window)
    assert large <= 8 * small
    # Re-laid-out copies of q, k, v, out, d_out and the gradients, and nothing else that grows.
    assert large <= 4 * face


@pytest.mark.parametrize("window", [None, 128, 4096])
def test_long_contexts_lower_small(window):
    shape = jax.ShapeDtypeStruct((1, 262144, 32, 128), jnp.bfloat16)
    kv = jax.ShapeDtypeStruct((1, 262144, 8, 128), jnp.bfloat16)
    loss = lambda q, k, v: attention(q, k, v, window=window, implementation="xla").astype(jnp.float32).sum()  # noqa: E731
    text = jax.jit(jax.grad(loss, (0, 1, 2))).lower(shape, kv, kv).as_text()
    assert len(text.splitlines()) < 2500


CALLS = {
    "causal": {},
    "window": {"window": 3},
    "all": {"causal": False},
    "offset": {"q_offset": 1},
    "traced": {"q_offset": jnp.asarray([1])},
    "segments": {"segment_ids": jnp.zeros((1, 8), jnp.int32)},
    "pair": {"segment_ids": (jnp.zeros((1, 8), jnp.int32), jnp.arange(8)[None] // 5)},
    "keys": {"keys": 5},
    "dim": {"dim": 16},
    "rows of the batch": {"q_offset": jnp.asarray([2]), "keys": 11, "window": 4},
    "lse": {"return_lse": True, "window": 3},
    "scale": {"scale": 0.3},
    "float16": {"dtype": jnp.float16},
    "bfloat16": {"dtype": jnp.bfloat16, "segment_ids": jnp.arange(8)[None] // 3},
}


@pytest.mark.parametrize("name", CALLS)
def test_every_call_gives_a_result_or_a_reason(name):
    """Every implementation, in the interpreter and out of it: what it returns is right, or it says why it cannot."""
    call = dict(CALLS[name])
    shape = (15, 1, 8, call.pop("keys", 8), 2, 1, call.pop("dim", 64), call.pop("dtype", jnp.float32))
    q, k, v = make_inputs(*shape)
    wanted = attention(q, k, v, implementation="reference", **call)
    served = set()
    for implementation in ("reference", "xla", "tpu", "gpu", None):
        for interpret in (False, True):
            try:
                found = attention(q, k, v, implementation=implementation, interpret=interpret, **call)
            except NotImplementedError as reason:
                words = "is for Pallas kernels|no TPU here|no GPU here|(are|is) causal|head dimensions|float16"
                assert re.search(f"^attention: .* ({words})", str(reason))  # noqa: PT017
                continue
            served.add((implementation, interpret))
            # Weights and results of O(1) are rounded to float16's 11 bits, bfloat16's 8.
            tolerance = {"float16": 2e-3, "bfloat16": 2e-2}.get(q.dtype.name, FP32_ERROR)
            for a, b in zip(jax.tree.leaves(found), jax.tree.leaves(wanted), strict=True):
                np.testing.assert_allclose(a.astype(jnp.float32), b.astype(jnp.float32), atol=tolerance)
    on_tpu = set() if name in ("all", "dim", "float16") else {("tpu", True)}
    on_gpu = set() if name == "all" else {("gpu", True)}
    assert served == {("reference", False), ("xla", False), (None, False)} | on_tpu | on_gpu


def test_the_choice_can_be_asked_and_is_logged_once(caplog, monkeypatch):
    monkeypatch.setattr(_select, "_logged", set())
    q, k, v = make_inputs(16, 1, 4, 4, 2, 1, 16)
    assert choose_implementation() == "xla"
    assert choose_implementation("reference") == "reference"
    monkeypatch.setattr(_select, "_logged", set())
    with caplog.at_level(logging.INFO, logger="pallas_kernels"):
        attention(q, k, v)
        attention(q, k, v)
    assert [r.getMessage() for r in caplog.records] == ["attention: chose implementation 'xla' on backend 'cpu'"]


Q, KV = (1, 8, 4, 16), (1, 8, 2, 16)


@pytest.mark.parametrize(
    ("shapes", "kwargs", "error", "words"),
    [
        ((Q[1:], KV, KV), {}, ValueError, "4 dimensions"),
        ((Q, KV, (1, 9, 2, 16)), {}, ValueError, "one shape"),
        (((2, 8, 4, 16), KV, KV), {}, ValueError, "agree in B and D"),
        (((1, 8, 4, 32), KV, KV), {}, ValueError, "agree in B and D"),
        (((1, 8, 3, 16), KV, KV), {}, ValueError, "do not divide"),
        (((1, 0, 4, 16), KV, KV), {}, ValueError, "empty"),
        ((Q, KV, KV), {"window": 0}, ValueError, ">= 1"),
        ((Q, KV, KV), {"window": -3}, ValueError, ">= 1"),
        ((Q, KV, KV), {"window": 2.0}, TypeError, "window"),
        ((Q, KV, KV), {"window": 2, "causal": False}, ValueError, "causal"),
        ((Q, KV, KV), {"segment_ids": jnp.zeros((1, 7), jnp.int32)}, ValueError, "segment_ids"),
        ((Q, KV, KV), {"segment_ids": jnp.zeros((1, 8))}, TypeError, "integers"),
        ((Q, (1, 9, 2, 16), (1, 9, 2, 16)), {"segment_ids": jnp.zeros((1, 8), jnp.int32)}, ValueError, "T == S"),
        ((Q, KV, KV), {"q_offset": 1.5}, TypeError, "q_offset"),
        ((Q, KV, KV), {"q_offset": jnp.zeros((2,), jnp.int32)}, ValueError, "q_offset"),
        ((Q, KV, KV), {"q_offset": jnp.zeros((1,))}, TypeError, "q_offset"),
        ((Q, KV, KV), {"implementation": "cuda"}, ValueError, "unknown implementation"),
    ],
)
def test_wrong_input_never_computes(shapes, kwargs, error, words):
    with pytest.raises(error, match=words):
        attention(*(jnp.zeros(s) for s in shapes), **kwargs)


def test_wrong_dtypes():
    q, k = jnp.zeros(Q), jnp.zeros(KV)
    with pytest.raises(TypeError, match="q's dtype"):
        attention(q, k.astype(jnp.bfloat16), k)
    with pytest.raises(TypeError, match="must be float32"):
        attention(*(x.astype(jnp.int32) for x in (q, k, k)))
