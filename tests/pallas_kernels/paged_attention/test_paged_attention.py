"""paged_attention: `reference` against the definition in numpy, and `xla` against `reference`."""

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
from pallas_kernels.paged_attention import choose_implementation, paged_attention, pool_format
from tests.pallas_kernels.paged_attention.cases import FP32_ERROR, by_rows, make_case, run

# Nothing yet, one token, a chunk inside a context, a whole prompt, more rows than positions, decode, a longer chunk.
MIX = [(0, 0), (1, 1), (100, 40), (5, 5), (1, 3), (64, 1), (130, 70), (30, 0), (90, 4)]


@pytest.mark.parametrize("implementation", ["reference", "xla"])
@pytest.mark.parametrize(
    ("window", "page_size", "table_width"), [(None, 4, 40), (None, 80, 1), (1, 16, 6), (7, 80, 1), (1000, 16, 6)]
)
def test_matches_the_definition(implementation, window, page_size, table_width):
    """Over a wide table, a ring of several pages that wraps, and one that is a single page; all unseen slots are NaN."""
    case = make_case(0, MIX, (4, 2), 16, page_size, table_width=table_width, window=window)
    wanted = by_rows(case, MIX, window, table_width * page_size)
    np.testing.assert_allclose(run(case, implementation, window), wanted, atol=FP32_ERROR)


@pytest.mark.parametrize("implementation", ["reference", "xla"])
def test_window_counts_the_query_itself(implementation):
    case = make_case(1, [(300, 200)], (1, 1), 16, 16, table_width=19, poison=False)
    values = np.zeros((21, 1, 16, 16), np.float32)
    for p in range(300):
        values[case.arrays["page_table"][0, p // 16], 0, p % 16] = p
    case.arrays["v_pages"] = jnp.asarray(values)
    out = run(case, implementation, window=128, scale=0.0)  # equal weights: the mean of the seen
    wanted = [np.arange(max(0, p - 127), p + 1).mean() for p in range(100, 300)]
    np.testing.assert_allclose(out[:200, 0, 0], wanted, rtol=1e-5)


@settings(max_examples=20)
@given(
    seed=st.integers(0, 2**16),
    sequences=st.lists(st.tuples(st.integers(0, 200), st.sampled_from([0, 1, 1, 1, 4, 37])), min_size=6, max_size=6),
    window=st.sampled_from([None, 50]),
    shape=st.sampled_from([(64, 4, 16, 13), (80, 2, 32, 5)]),
)
def test_mixes(seed, sequences, window, shape):
    """One flat axis of 230 rows for every mix; the table of 5 pages is a ring that forgets."""
    dim, group, page_size, width = shape
    case = make_case(
        seed, sequences, (group, 1), dim, page_size, table_width=width, num_rows=230, num_pages=160, window=window
    )
    found, wanted = (run(case, name, window=window) for name in ("xla", "reference"))
    np.testing.assert_allclose(found, wanted, atol=FP32_ERROR, rtol=FP32_ERROR)
    assert np.isfinite(found).all() and (found[sum(rows for _, rows in sequences) :] == 0).all()


@pytest.mark.parametrize("implementation", ["reference", "xla"])
def test_rows_that_see_nothing_give_zeros(implementation):
    sequences = [(0, 3), (20, 2), (2, 5), (0, 0)]
    out = run(make_case(2, sequences, (2, 1), 16, 8, table_width=3, num_rows=15), implementation)
    blind = np.r_[0:3, 5:8, 10:15]
    assert (out[blind] == 0).all() and (out[np.r_[3:5, 8:10]] != 0).all()


@pytest.mark.parametrize("implementation", ["reference", "xla"])
@pytest.mark.parametrize("kv_dtype", [jnp.int8, jnp.float8_e4m3fn])
def test_quantized_pages_mean_value_times_scale(implementation, kv_dtype):
    case = make_case(3, MIX, (4, 2), 64, 16, table_width=9, kv_dtype=kv_dtype)
    found = run(case, implementation)
    plain = dict(case.arrays)
    for name in ("k", "v"):
        x, scales = plain.pop(f"{name}_pages"), plain.pop(f"{name}_scales")
        plain[f"{name}_pages"] = x.astype(jnp.float32) * scales[..., None]
    wanted = paged_attention(case.q, **plain, implementation="reference")
    np.testing.assert_allclose(found, wanted, atol=FP32_ERROR)
    truth = by_rows(case, MIX, None, 9 * 16)
    # One part in 254 (int8) or 32 (e4m3, relative to the value) of a key of norm 8 moves a score by some hundredths.
    assert np.abs(found - truth).max() < (0.05 if kv_dtype == jnp.int8 else 0.2)


@pytest.mark.parametrize(("window", "kv_dtype"), [(None, None), (128, jnp.int8)])
def test_bfloat16_is_as_near_to_the_truth_as_the_reference(window, kv_dtype):
    case = make_case(
        4, [(300, 100), (200, 1)], (4, 2), 128, 32, table_width=10, dtype=jnp.bfloat16, kv_dtype=kv_dtype, window=window
    )
    exact = {name: x.astype(jnp.float32) if x.dtype == jnp.bfloat16 else x for name, x in case.arrays.items()}
    truth = paged_attention(case.q.astype(jnp.float32), **exact, window=window, implementation="reference")
    found, reference = (np.abs(run(case, name, window=window) - truth) for name in ("xla", "reference"))
    assert found.mean() <= 2 * reference.mean() and found.max() <= 2 * reference.max()
    assert paged_attention(**case.call(window=window)).dtype == jnp.bfloat16


@pytest.mark.parametrize("implementation", ["reference", "xla"])
def test_nan_in_a_seen_key_stays_in_its_sequence(implementation):
    case = make_case(5, [(40, 8), (40, 8)], (2, 1), 16, 16, table_width=3)
    page, slot = int(case.arrays["page_table"][0, 1]), 2  # position 18 of sequence 0
    case.arrays["v_pages"] = case.arrays["v_pages"].at[page, 0, slot].set(jnp.nan)
    out = run(case, implementation)
    assert np.isnan(out[:8]).all() and np.isfinite(out[8:]).all()


@pytest.mark.parametrize("implementation", ["reference", "xla"])
def test_sequences_share_pages(implementation):
    """A common prefix of two pages is stored once; rows of one sequence in two calls are the rows of one."""
    case = make_case(6, [(50, 18), (50, 7)], (2, 1), 16, 16, table_width=4)
    case.arrays["page_table"] = case.arrays["page_table"].at[1].set(case.arrays["page_table"][0])
    case.q = case.q.at[18:25].set(case.q[11:18])
    out = run(case, implementation)
    np.testing.assert_allclose(out[18:25], out[11:18], atol=1e-6)


@pytest.mark.parametrize("implementation", ["reference", "xla"])
def test_large_scores_stay_finite(implementation):
    case = make_case(7, [(150, 20)], (2, 1), 16, 16, table_width=10)
    case.q = case.q * 1e5
    assert np.isfinite(run(case, implementation)).all()


def test_one_compile_serves_every_mix():
    traces = []

    @jax.jit
    def step(q, arrays):
        traces.append(1)
        return paged_attention(q, **arrays, implementation="xla")

    for seed, sequences in enumerate([[(9, 9), (20, 1), (0, 0)], [(0, 0), (0, 0), (64, 30)], [(1, 1), (1, 1), (1, 1)]]):
        case = make_case(seed, sequences, (2, 1), 16, 8, table_width=8, num_rows=32)
        wanted = by_rows(case, sequences, None, 64)
        np.testing.assert_allclose(step(case.q, case.arrays), wanted, atol=FP32_ERROR)
    assert len(traces) == 1


def shapes(rows, sequences, width):
    ints = functools.partial(jax.ShapeDtypeStruct, dtype=jnp.int32)
    pages = jax.ShapeDtypeStruct((sequences * width, 2, 16, 64), jnp.float32)
    arrays = {
        "page_table": ints((sequences, width)),
        "query_starts": ints((sequences + 1,)),
        "lengths": ints((sequences,)),
    }
    return jax.ShapeDtypeStruct((rows, 8, 64), jnp.float32), {"k_pages": pages, "v_pages": pages, **arrays}


@pytest.mark.parametrize("window", [None, 128])
def test_temporaries_do_not_grow_with_the_context(window):
    def temporaries(width):
        call = functools.partial(paged_attention, window=window, implementation="xla")
        q, arrays = shapes(512, 8, width)
        return (
            jax.jit(lambda q, arrays: call(q, **arrays)).lower(q, arrays).compile().memory_analysis().temp_size_in_bytes
        )

    assert temporaries(4096) <= temporaries(64) + 2**20 < 2**24


CALLS = {
    "causal": {},
    "window": {"window": 3},
    "int8": {"kv_dtype": jnp.int8},
    "float8": {"kv_dtype": jnp.float8_e4m3fn, "window": 3},
    "bfloat16": {"dtype": jnp.bfloat16},
    "float16": {"dtype": jnp.float16},
    "dim": {"dim": 16},
    "pages": {"page_size": 12},
}


@pytest.mark.parametrize("name", CALLS)
def test_every_call_gives_a_result_or_a_reason(name):
    """Every implementation, in the interpreter and out of it: what it returns is right, or it says why it cannot."""
    call = dict(CALLS[name])
    window, dim, page_size = call.pop("window", None), call.pop("dim", 64), call.pop("page_size", 32)
    case = make_case(8, [(8, 3), (4, 1)], (2, 1), dim, page_size, table_width=1, **call)
    wanted = run(case, "reference", window)
    served = set()
    for implementation in ("reference", "xla", "tpu", "gpu", None):
        for interpret in (False, True):
            try:
                found = paged_attention(**case.call(implementation=implementation, interpret=interpret, window=window))
            except NotImplementedError as reason:
                words = (
                    "is for Pallas kernels|no TPU here|no GPU here|not been timed|head dimensions|pages of|are float16"
                )
                assert re.search(f"^paged_attention: .* ({words})", str(reason))  # noqa: PT017
                continue
            served.add((implementation, interpret))
            # Weights and results of O(1) are rounded to float16's 11 bits, bfloat16's 8.
            tolerance = {"float16": 2e-3, "bfloat16": 2e-2}.get(case.q.dtype.name, FP32_ERROR)
            np.testing.assert_allclose(np.asarray(found, np.float32), wanted, atol=tolerance)
    on_tpu = set() if name in ("dim", "pages", "float16") else {("tpu", True)}
    assert served == {("reference", False), ("xla", False), ("gpu", True), (None, False)} | on_tpu


@pytest.mark.parametrize("rank", [3, 4])
def test_a_pool_in_its_format_is_an_array_as_any_other(rank):
    shape = (6, 2, 8, 16)[:rank]
    plain = jax.sharding.SingleDeviceSharding(jax.devices()[0])
    pool = jax.jit(lambda: jnp.zeros(shape), out_shardings=pool_format(plain, rank))()
    assert pool.format == jnp.zeros(shape).format and pool.format.layout.major_to_minor == tuple(range(rank))


def test_the_choice_can_be_asked_and_is_logged_once(caplog, monkeypatch):
    monkeypatch.setattr(_select, "_logged", set())
    assert choose_implementation() == "xla"
    assert choose_implementation("reference") == "reference"
    monkeypatch.setattr(_select, "_logged", set())
    case = make_case(9, [(4, 4)], (2, 1), 16, 8, table_width=1)
    with caplog.at_level(logging.INFO, logger="pallas_kernels"):
        paged_attention(**case.call())
        paged_attention(**case.call())
    assert [r.getMessage() for r in caplog.records] == ["paged_attention: chose implementation 'xla' on backend 'cpu'"]


Q, PAGES, SCALES = jnp.zeros((5, 4, 16)), jnp.zeros((6, 2, 8, 16)), jnp.zeros((6, 2, 8))
INT8 = {"k_pages": PAGES.astype(jnp.int8), "v_pages": PAGES.astype(jnp.int8), "k_scales": SCALES, "v_scales": SCALES}


@pytest.mark.parametrize(
    ("change", "error", "words"),
    [
        ({"q": Q[0]}, ValueError, r"q must be \[N, H, D\]"),
        ({"q": Q[:0]}, ValueError, "empty"),
        ({"q": Q[:, :3]}, ValueError, "do not divide"),
        ({"q": Q[..., :8]}, ValueError, "differ in the head dimension"),
        ({"q": Q.astype(jnp.int32)}, TypeError, "q must be float32"),
        ({"q": Q.astype(jnp.bfloat16)}, TypeError, "q's dtype bfloat16"),
        ({"k_pages": PAGES[0]}, ValueError, "k_pages must be"),
        ({"v_pages": PAGES[:5]}, ValueError, "one shape"),
        ({"v_pages": PAGES.astype(jnp.int8)}, TypeError, "found float32 and int8"),
        ({"k_scales": SCALES}, ValueError, "k_scales are given|belong to int8"),
        (INT8 | {"v_scales": None}, ValueError, "v_scales .* missing"),
        (INT8 | {"k_scales": SCALES[:, 0]}, ValueError, "k_scales must have shape"),
        (INT8 | {"k_scales": SCALES.astype(jnp.bfloat16)}, TypeError, "k_scales must be float32"),
        ({"page_table": jnp.zeros((3,), jnp.int32)}, ValueError, r"\[S, M\]"),
        ({"page_table": jnp.zeros((2, 3))}, TypeError, "page_table must be an int32"),
        ({"query_starts": jnp.zeros((2,), jnp.int32)}, ValueError, r"query_starts must have shape \(3,\)"),
        ({"lengths": jnp.zeros((3,), jnp.int32)}, ValueError, "lengths must have shape"),
        ({"lengths": [1, 2]}, TypeError, "lengths must be an int32"),
        ({"window": 0}, ValueError, ">= 1"),
        ({"window": 2.0}, TypeError, "window"),
        ({"implementation": "cuda"}, ValueError, "unknown implementation"),
    ],
)
def test_wrong_input_never_computes(change, error, words):
    call = {"q": Q, "k_pages": PAGES, "v_pages": PAGES, "page_table": jnp.zeros((2, 3), jnp.int32)}
    call |= {"query_starts": jnp.zeros((3,), jnp.int32), "lengths": jnp.zeros((2,), jnp.int32)} | change
    with pytest.raises(error, match=words):
        paged_attention(**call)
