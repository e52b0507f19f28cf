"""The GPU kernel: in the interpreter against `reference`, and lowered for CUDA. No GPU computes here."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pallas_kernels.paged_attention import choose_implementation, gpu, paged_attention
from tests.pallas_kernels.cuda import TRITON, library_calls
from tests.pallas_kernels.paged_attention.cases import FP32_ERROR, make_case, run

# Nothing yet, decode, a chunk inside a context, a whole prompt, more rows than positions, drafts to verify, a long context.
MIX = [(0, 0), (37, 1), (100, 40), (5, 5), (1, 3), (64, 4), (130, 30), (30, 0), (9, 1), (330, 1)]
HEADS = {"2.4B": (32, 8, 80), "7.8B": (32, 8, 128), "32B": (40, 8, 128), "1.2B": (32, 8, 64), "236B": (64, 8, 128)}


def assert_agree(case, window=None):
    found, wanted = (run(case, name, window) for name in ("gpu", "reference"))
    np.testing.assert_allclose(found, wanted, atol=FP32_ERROR, rtol=FP32_ERROR)


@pytest.mark.parametrize("window", [1, 127, 128, 129, 1000])
def test_windows(window):
    """What no row may see is NaN: slots, pages, and numbers of pages that do not exist."""
    assert_agree(make_case(0, MIX, (2, 1), 64, 32, table_width=11, window=window), window)


@pytest.mark.parametrize(
    ("heads", "dim", "page_size", "table_width"), [((5, 1), 128, 128, 3), ((6, 2), 80, 12, 43), ((40, 1), 20, 512, 1)]
)
def test_groups_head_dims_and_page_sizes(heads, dim, page_size, table_width):
    """Also what the TPU kernel refuses: pages of 12 slots, dimension 20, 40 heads on one. The last is a ring of one page."""
    assert_agree(make_case(1, MIX, heads, dim, page_size, table_width=table_width, window=100), 100)


@pytest.mark.parametrize("parts", [1, 3, 8])
def test_keys_shared_among_programs(monkeypatch, parts):
    """Also where most of the parts see nothing."""
    sequences = [(700, 1), (40, 1), (0, 1), (512, 1)]
    monkeypatch.setattr(gpu, "_PROGRAMS", parts * len(sequences) * 2)
    gpu.paged_attention.clear_cache()
    case = make_case(2, sequences, (4, 2), 64, 64, table_width=11, num_rows=4)
    kernel = functools.partial(paged_attention, **case.call(implementation="gpu", interpret=True))
    assert f"grid=({len(sequences)}, 2, {parts})" in str(jax.make_jaxpr(kernel)())
    np.testing.assert_allclose(
        kernel(), paged_attention(**case.call(implementation="reference")), atol=FP32_ERROR, rtol=FP32_ERROR
    )
    gpu.paged_attention.clear_cache()


@settings(max_examples=10)
@given(
    seed=st.integers(0, 2**16),
    sequences=st.lists(
        st.tuples(st.sampled_from([0, 1, 31, 128, 300, 700]), st.sampled_from([0, 1, 1, 1, 4, 40])),
        min_size=6,
        max_size=6,
    ),
    window=st.sampled_from([None, 140]),
)
def test_mixes_of_many_blocks(seed, sequences, window):
    """The table of 10 pages is a ring that forgets the start of the longest."""
    assert_agree(make_case(seed, sequences, (2, 1), 64, 64, table_width=10, num_rows=243, window=window), window)


@pytest.mark.parametrize(
    ("kv_dtype", "window", "page_size"), [(jnp.int8, None, 32), (jnp.int8, 128, 128), (jnp.float8_e4m3fn, 128, 32)]
)
def test_quantized_pages(kv_dtype, window, page_size):
    assert_agree(make_case(3, MIX, (2, 1), 64, page_size, table_width=11, window=window, kv_dtype=kv_dtype), window)


def test_rows_that_see_nothing_give_zeros():
    sequences = [(0, 3), (20, 2), (2, 5), (0, 0)]
    out = run(make_case(4, sequences, (2, 1), 64, 16, table_width=3, num_rows=15), "gpu", None)
    blind = np.r_[0:3, 5:8, 10:15]
    assert (out[blind] == 0).all() and (out[np.r_[3:5, 8:10]] != 0).all()


def test_what_nobody_sees_changes_no_bit():
    clean, poisoned = (make_case(5, MIX, (2, 1), 64, 16, table_width=21, poison=p, num_rows=90) for p in (False, True))
    np.testing.assert_array_equal(run(poisoned, "gpu", None), run(clean, "gpu", None))


@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float16])
def test_16_bits_are_as_near_to_the_truth_as_the_reference(dtype):
    window = 128
    case = make_case(6, [(300, 100), (200, 1)], (4, 2), 128, 32, table_width=10, dtype=dtype, window=window)
    exact = {name: x.astype(jnp.float32) if x.dtype == dtype else x for name, x in case.arrays.items()}
    truth = paged_attention(case.q.astype(jnp.float32), **exact, window=window, implementation="reference")
    found, reference = (np.abs(run(case, name, window) - truth) for name in ("gpu", "reference"))
    assert found.mean() <= 2 * reference.mean() and found.max() <= 2 * reference.max()


@pytest.fixture
def cuda(monkeypatch):
    """A GPU, as far as tracing and lowering look."""
    monkeypatch.setattr(gpu, "target", lambda: "gpu")
    monkeypatch.setattr("pallas_kernels._select.target", lambda: "gpu")


def shapes(heads, kv_heads, head_dim, kv_dtype=jnp.bfloat16, rows=64):
    """64 sequences of 8,192 tokens in pages of 128 slots: q's rows, and the pages."""
    pages = jax.ShapeDtypeStruct((2048, kv_heads, 128, head_dim), kv_dtype)
    arrays = {"q": jax.ShapeDtypeStruct((rows, heads, head_dim), jnp.bfloat16), "k_pages": pages, "v_pages": pages}
    for name, shape in (("page_table", (64, 64)), ("query_starts", (65,)), ("lengths", (64,))):
        arrays[name] = jax.ShapeDtypeStruct(shape, jnp.int32)
    if kv_dtype != jnp.bfloat16:
        scales = jax.ShapeDtypeStruct(pages.shape[:3], jnp.float32)
        arrays |= {"k_scales": scales, "v_scales": scales}
    return arrays


@pytest.mark.parametrize("kv_dtype", [jnp.bfloat16, jnp.int8, jnp.float8_e4m3fn])
@pytest.mark.parametrize("window", [None, 128, 4096])
@pytest.mark.parametrize("model", HEADS)
def test_lowers_for_every_model(cuda, model, window, kv_dtype):
    for rows in (64, 192, 64 + 512):  # decode, two drafts to verify, decode beside a chunk
        arrays = shapes(*HEADS[model], kv_dtype, rows)
        assert library_calls(functools.partial(paged_attention, window=window, implementation="gpu"), **arrays) == [
            TRITON
        ]


def test_nothing_named_takes_xla_on_a_gpu(cuda):
    assert choose_implementation() == "xla" and choose_implementation("gpu") == "gpu"
    assert library_calls(paged_attention, **shapes(32, 8, 128)) == []


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"q": (64, 32, 136), "k_pages": (16, 8, 128, 136)}, "head dimensions up to 128, and this is 136"),
        ({"q": (64, 65, 64), "k_pages": (16, 1, 128, 64)}, "at most 64 query heads on a kv head, and this is 65"),
        ({"q": (64, 32, 128), "k_pages": (2**14, 8, 128, 128)}, "32 bits"),
    ],
)
def test_refusals_name_the_reason(cuda, change, words):
    arrays = shapes(32, 8, 128)
    for name in ("q", "k_pages", "v_pages"):
        arrays[name] = jax.ShapeDtypeStruct(change["q" if name == "q" else "k_pages"], jnp.bfloat16)
    with pytest.raises(NotImplementedError, match=words):
        jax.eval_shape(functools.partial(paged_attention, implementation="gpu"), **arrays)


def test_without_a_gpu_it_says_so():
    if jax.default_backend() == "gpu":
        pytest.skip("there is a GPU")
    with pytest.raises(NotImplementedError, match="no GPU here"):
        choose_implementation("gpu")
