"""The TPU kernels, in the interpreter, against `reference`. `test_tpu_compiles.py` gives them to the real TPU compiler."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pallas_kernels.attention import attention, choose_implementation, tpu, tuned

# float32: two orders of summing at most ~600 products of O(1) numbers; measured at most 5e-6.
FP32_ERROR = 2e-5
NAMES = ("out", "lse", "dq", "dk", "dv")


def make_inputs(seed, batch, length, heads, kv_heads, dim, dtype=jnp.float32):
    rng = np.random.default_rng(seed)
    q = rng.normal(size=(batch, length, heads, dim))
    k, v = (rng.normal(size=(batch, length, kv_heads, dim)) for _ in range(2))
    return tuple(jnp.asarray(x, dtype) for x in (q, k, v))


def make_segments(seed, batch, length, low=0):
    return jnp.asarray(np.sort(np.random.default_rng(seed).integers(low, 4, (batch, length)), axis=1), jnp.int32)


def run_all(implementation, q, k, v, **kwargs):
    """Returns (out, lse, dq, dk, dv) as float32 for fixed random cotangents of out and lse."""

    def run(q, k, v):
        interpret = implementation == "tpu"
        return attention(q, k, v, implementation=implementation, interpret=interpret, return_lse=True, **kwargs)

    def both(q, k, v, d_out, d_lse):
        (out, lse), pull = jax.vjp(run, q, k, v)
        return (out, lse, *pull((d_out.astype(out.dtype), jnp.where(jnp.isfinite(lse), d_lse, 0))))

    rng = np.random.default_rng(7)
    d_out = jnp.asarray(rng.normal(size=q.shape), jnp.float32)
    d_lse = jnp.asarray(rng.normal(size=(q.shape[0], q.shape[2], q.shape[1])), jnp.float32)
    # Each case runs once: XLA's optimiser would cost more than it saves.
    run_once = jax.jit(both, compiler_options={"xla_backend_optimization_level": 0})
    return tuple(np.asarray(x, np.float32) for x in run_once(q, k, v, d_out, d_lse))


def assert_agree(q, k, v, **kwargs):
    found, wanted = (run_all(name, q, k, v, **kwargs) for name in ("tpu", "reference"))
    for name, a, b in zip(NAMES, found, wanted, strict=True):
        np.testing.assert_allclose(a, b, rtol=FP32_ERROR, atol=FP32_ERROR, err_msg=name)


@pytest.fixture
def small_tiles(monkeypatch):
    """Tiles so small that short inputs have several blocks, unrolled steps and chunks of keys."""
    small = tuned.Tiles(512, 2, 2, 256, 256, 128, 256, 256)
    monkeypatch.setattr(tpu, "tiles", lambda *_: small)


@pytest.mark.parametrize("window", [1, 127, 128, 129, 250, 1000, None])
def test_windows(window):
    assert_agree(*make_inputs(0, 1, 300, 2, 1, 64), window=window)


@pytest.mark.parametrize("length", [1, 128, 257])
@pytest.mark.parametrize("window", [None, 128])
def test_lengths(length, window):
    assert_agree(*make_inputs(1, 2, length, 2, 2, 64), window=window)


@pytest.mark.parametrize(("heads", "kv_heads", "dim"), [(4, 4, 80), (5, 1, 128), (6, 2, 64)])
@pytest.mark.parametrize("window", [None, 130])
def test_groups_and_head_dims(heads, kv_heads, dim, window):
    assert_agree(*make_inputs(2, 1, 270, heads, kv_heads, dim), window=window, scale=0.2)


@pytest.mark.usefixtures("small_tiles")
@pytest.mark.parametrize("window", [100, 256, None])
@pytest.mark.parametrize("segmented", [False, True])
def test_many_blocks(window, segmented):
    """The carry between blocks, the step past the end, unrolled tiles, and d_q summed over chunks of keys."""
    ids = make_segments(3, 1, 700) if segmented else None
    assert_agree(*make_inputs(3, 1, 700, 2, 1, 64), window=window, segment_ids=ids)


@pytest.mark.usefixtures("small_tiles")
@pytest.mark.parametrize("segmented", [False, True])
def test_wide_window_runs_as_flash(monkeypatch, segmented):
    """The window's edge crosses tiles and whole blocks of keys lie left of it."""
    monkeypatch.setattr(tpu.tpu_window, "MAX_WINDOW", 0)
    ids = make_segments(4, 1, 900) if segmented else None
    for window in (129, 384):
        assert_agree(*make_inputs(4, 1, 900, 2, 1, 64), window=window, segment_ids=ids)


@pytest.mark.parametrize("window", [None, 128, 140])
def test_segments(window):
    """Ids of queries and keys apart, and one array of ids in no order."""
    q, k, v = make_inputs(5, 2, 290, 2, 1, 64)
    unsorted = jnp.asarray(np.random.default_rng(0).integers(-1, 2, (2, 290)), jnp.int32)
    for ids in ((make_segments(6, 2, 290), make_segments(7, 2, 290, low=1)), unsorted):
        assert_agree(q, k, v, window=window, segment_ids=ids)


def make_chunk(seed, num_queries, num_keys, batch=1):
    """(q, k, v) of a call whose keys are not its queries', 2 heads on 1 kv head of 64."""
    q, _, _ = make_inputs(seed, batch, num_queries, 2, 1, 64)
    _, k, v = make_inputs(seed + 1, batch, num_keys, 2, 1, 64)
    return q, k, v


def poison_unseen(k, v, num_queries, offsets, window, ids):
    """NaN in every key that no query of its row of the batch sees."""
    at = np.asarray(offsets)[:, None] + np.arange(num_queries)
    distance = at[:, :, None] - np.arange(k.shape[1])
    sees = (distance >= 0) & (distance < (window or k.shape[1] + num_queries))
    if ids is not None:
        sees &= np.asarray(ids[0])[:, :, None] == np.asarray(ids[1])[:, None]
    unseen = jnp.asarray(~sees.any(1))[:, :, None, None]
    return jnp.where(unseen, jnp.nan, k), jnp.where(unseen, jnp.nan, v)


def assert_chunk_agrees(seed, num_queries, num_keys, offsets, window, segmented, static):
    """`offsets`: one a row of the batch, passed as an array, or as one int where `static`. Unseen keys are NaN."""
    batch = len(offsets)
    q, k, v = make_chunk(seed, num_queries, num_keys, batch)
    ids = (make_segments(seed, batch, num_queries), make_segments(seed + 1, batch, num_keys)) if segmented else None
    k, v = poison_unseen(k, v, num_queries, offsets, window, ids)
    q_offset = offsets[0] if static else jnp.asarray(offsets, jnp.int32)
    assert_agree(q, k, v, window=window, segment_ids=ids, q_offset=q_offset)


@pytest.mark.usefixtures("small_tiles")
@pytest.mark.parametrize("window", [None, 100, 128, 200])
@pytest.mark.parametrize("static", [False, True])
def test_a_chunk_against_a_buffer_of_keys(window, static):
    """Cached prefill: several blocks and chunks of keys, and offsets that are no multiple of a tile."""
    offsets = [413] if static else [413, 128]
    assert_chunk_agrees(20, 200, 700, offsets, window, False, static)


@pytest.mark.usefixtures("small_tiles")
@pytest.mark.parametrize("static", [False, True])
def test_a_chunk_against_a_buffer_under_a_wide_window(monkeypatch, static):
    """The window's edge, the diagonal and the end of the keys all cross tiles of the flash kernels."""
    monkeypatch.setattr(tpu.tpu_window, "MAX_WINDOW", 0)
    assert_chunk_agrees(21, 300, 900, [571] if static else [571, 700], 300, False, static)


@pytest.mark.parametrize("window", [128, 100])
def test_a_ring_prefill_is_one_pass(window):
    """The engine's window layer: W - 1 keys before the chunk, some of which do not exist yet."""
    before, length = window - 1, 200
    q, k, v = make_chunk(22, length, before + length, batch=2)
    missing = jnp.asarray([before, window // 3])[:, None]
    ids = (jnp.ones((2, length), jnp.int32), (jnp.arange(before + length) >= missing).astype(jnp.int32))
    assert_agree(q, k, v, window=window, segment_ids=ids, q_offset=before)


@pytest.mark.usefixtures("small_tiles")
@settings(max_examples=12)
@given(
    seed=st.integers(0, 2**16),
    num_queries=st.sampled_from([1, 100, 128, 300]),
    num_keys=st.sampled_from([1, 130, 256, 600]),
    offsets=st.tuples(*[st.sampled_from([-400, -100, -1, 0, 1, 127, 128, 200, 555, 2**30])] * 2),
    window=st.sampled_from([None, 1, 100, 128, 250]),
    flash=st.booleans(),
    segmented=st.booleans(),
    static=st.booleans(),
)
def test_any_offset(seed, num_queries, num_keys, offsets, window, flash, segmented, static):
    """Before every key, after all of them, across the ends; rows that see nothing give zeros."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(tpu.tpu_window, "MAX_WINDOW", 0 if flash else 1024)
        assert_chunk_agrees(seed, num_queries, num_keys, offsets[:1] if static else offsets, window, segmented, static)


def test_one_program_serves_every_offset():
    q, k, v = make_chunk(23, 130, 300)
    traces = []

    @jax.jit
    def run(q, k, v, q_offset):
        traces.append(1)
        return attention(q, k, v, q_offset=q_offset, window=128, implementation="tpu", interpret=True)

    for offset in (0, 77, 170):
        wanted = attention(q, k, v, q_offset=offset, window=128, implementation="reference")
        np.testing.assert_allclose(run(q, k, v, jnp.asarray([offset], jnp.int32)), wanted, atol=FP32_ERROR)
    assert len(traces) == 1


@pytest.mark.parametrize("window", [None, 128])
def test_rows_that_see_nothing(window):
    q, k, v = make_inputs(9, 1, 270, 2, 1, 64)
    ids = (jnp.arange(270)[None] // 100, jnp.full((1, 270), 1))  # only queries 100..199 see keys
    out, lse, *grads = run_all("tpu", q, k, v, segment_ids=ids, window=window)
    blind = np.r_[0:100, 200:270]
    assert (out[:, blind] == 0).all() and np.isneginf(lse[:, :, blind]).all()
    assert np.isfinite(out).all() and np.isfinite(lse[:, :, 100:200]).all()
    assert all(np.isfinite(g).all() for g in grads)
    assert (grads[0][:, blind] == 0).all()


@pytest.mark.parametrize("window", [None, 128])
def test_nan_in_keys_that_nobody_sees(window):
    q, k, v = make_inputs(11, 1, 300, 2, 1, 64)
    bad = jnp.arange(300)[None] >= 250
    ids = (jnp.zeros((1, 300), jnp.int32), bad.astype(jnp.int32))
    clean = run_all("tpu", q, k, v, window=window, segment_ids=ids)
    k, v = (jnp.where(bad[:, :, None, None], jnp.nan, x) for x in (k, v))
    for a, b in zip(run_all("tpu", q, k, v, window=window, segment_ids=ids), clean, strict=True):
        np.testing.assert_array_equal(a, b)


@pytest.mark.parametrize("window", [None, 128])
def test_large_scores_stay_finite(window):
    q, k, v = make_inputs(13, 1, 300, 2, 1, 64)
    found = run_all("tpu", q * 300, k * 300, v, window=window)
    assert all(np.isfinite(x).all() for x in found)
    wanted = attention(q * 300, k * 300, v, window=window, implementation="reference")
    # Scores near 1e5 have a float32 spacing of 0.008: the softmax of near ties may differ by that much.
    np.testing.assert_allclose(found[0], wanted, atol=0.05)


@pytest.mark.parametrize("window", [None, 128])
def test_bfloat16_is_as_near_to_the_truth_as_the_reference(window):
    q, k, v = make_inputs(8, 1, 300, 4, 2, 128, jnp.bfloat16)
    truth = run_all("reference", *(x.astype(jnp.float32) for x in (q, k, v)), window=window)
    found, reference = (run_all(name, q, k, v, window=window) for name in ("tpu", "reference"))
    for name, a, b, t in zip(NAMES, found, reference, truth, strict=True):
        # 2e-6: lse is float32 on both sides, where both errors are rounding noise.
        assert np.abs(a - t).mean() <= 2 * np.abs(b - t).mean() + 2e-6, name
        assert np.abs(a - t).max() <= 2 * np.abs(b - t).max() + 2e-6, name


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"causal": False}, "causal"),
        ({"dim": 96}, "head dimensions"),
        ({"dtype": jnp.float16}, "float16"),
        ({"heads": 40}, "query heads"),
    ],
)
def test_refusals_name_the_reason(change, words):
    shape = {"dim": 64, "heads": 2, "dtype": jnp.float32} | change
    q = jnp.zeros((1, 128, shape["heads"], shape["dim"]), shape["dtype"])
    k = jnp.zeros((1, 128, 1, shape["dim"]), shape["dtype"])
    call = {name: change[name] for name in ("causal",) if name in change}
    with pytest.raises(NotImplementedError, match=words):
        attention(q, k, k, implementation="tpu", interpret=True, **call)


def test_without_a_tpu_it_says_so():
    if jax.default_backend() == "tpu":
        pytest.skip("there is one")
    q = jnp.zeros((1, 128, 1, 64))
    with pytest.raises(NotImplementedError, match="no TPU here"):
        attention(q, q, q, implementation="tpu")
    assert choose_implementation("tpu", interpret=True) == "tpu"


def test_tiles_of_every_chip_fit_together():
    for kind in ("TPU v5 lite", "TPU v5", "TPU v6 lite", "TPU7x", "something new"):
        found = tuned.tiles(kind, 8, 128)
        assert all(size % 128 == 0 for name, size in found._asdict().items() if "unroll" not in name)
        assert found.flash_block % found.flash_keys == 0 and found.flash_chunk % found.flash_keys == 0
