"""The TPU kernel, in the interpreter, against `reference`. `test_tpu_compiles.py` gives it to the real TPU compiler."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from pallas_kernels.paged_attention import choose_implementation, paged_attention, tpu, tpu_kernel, tuned
from pallas_kernels.paged_attention.pages import Pages
from tests.pallas_kernels.paged_attention.cases import FP32_ERROR, forget_compiles, make_case, run

# Nothing yet, decode, a chunk inside a context, a whole prompt, more rows than positions, drafts to verify, a long context.
MIX = [(0, 0), (37, 1), (100, 40), (5, 5), (1, 3), (64, 4), (130, 30), (30, 0), (9, 1), (330, 1)]


@pytest.fixture
def small_tiles(monkeypatch):
    """Tiles so small that short inputs have several items, blocks, and tiles of a block."""
    monkeypatch.setattr(tpu, "tiles", lambda *_: tuned.Tiles(16, 128, 256, 2**22))
    forget_compiles()
    yield
    forget_compiles()


def assert_agree(case, window=None):
    found, wanted = (run(case, name, window) for name in ("tpu", "reference"))
    np.testing.assert_allclose(found, wanted, atol=FP32_ERROR, rtol=FP32_ERROR)


@pytest.mark.parametrize("window", [1, 127, 128, 129, 1000])
def test_windows(window):
    """What no row may see is NaN: slots, pages, and numbers of pages that do not exist."""
    assert_agree(make_case(0, MIX, (2, 1), 64, 32, table_width=11, window=window), window)


@pytest.mark.parametrize(
    ("heads", "dim", "page_size", "table_width"), [((5, 1), 128, 128, 3), ((6, 2), 80, 8, 43), ((9, 9), 64, 256, 1)]
)
def test_groups_head_dims_and_page_sizes(heads, dim, page_size, table_width):
    """The last is a ring of one page, which has forgotten the start of the longest sequence."""
    assert_agree(make_case(1, MIX, heads, dim, page_size, table_width=table_width, window=100), 100)


def test_long_items_no_taller_than_short_ones():
    """Eight queries of heads padded to eight, and sixteen queries of four heads: both are 64 rows."""
    assert_agree(make_case(9, [(20, 12), (5, 1)], (4, 1), 64, 32, table_width=1, num_rows=16))


@pytest.mark.usefixtures("small_tiles")
@settings(max_examples=15)
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
    assert_agree(make_case(2, MIX, (2, 1), 64, page_size, table_width=11, window=window, kv_dtype=kv_dtype), window)


def test_rows_that_see_nothing_give_zeros():
    sequences = [(0, 3), (20, 2), (2, 5), (0, 0)]
    out = run(make_case(3, sequences, (2, 1), 64, 16, table_width=3, num_rows=15), "tpu", None)
    blind = np.r_[0:3, 5:8, 10:15]
    assert (out[blind] == 0).all() and (out[np.r_[3:5, 8:10]] != 0).all()
    assert (run(make_case(3, [(0, 0)] * 4, (2, 1), 64, 16, table_width=3, num_rows=15), "tpu", None) == 0).all()


def test_what_nobody_sees_changes_no_bit():
    clean, poisoned = (make_case(4, MIX, (2, 1), 64, 16, table_width=21, poison=p, num_rows=90) for p in (False, True))
    np.testing.assert_array_equal(run(poisoned, "tpu", None), run(clean, "tpu", None))


def test_bfloat16_is_as_near_to_the_truth_as_the_reference():
    window = 128
    case = make_case(5, [(300, 100), (200, 1)], (4, 2), 128, 32, table_width=10, dtype=jnp.bfloat16, window=window)
    exact = {name: x.astype(jnp.float32) if x.dtype == jnp.bfloat16 else x for name, x in case.arrays.items()}
    truth = paged_attention(case.q.astype(jnp.float32), **exact, window=window, implementation="reference")
    found, reference = (np.abs(run(case, name, window) - truth) for name in ("tpu", "reference"))
    assert found.mean() <= 2 * reference.mean() and found.max() <= 2 * reference.max()


@pytest.mark.usefixtures("small_tiles")
def test_copies_race_with_nothing(monkeypatch):
    """The TPU interpreter runs a copy only when it is waited for, and watches every access for races."""
    from jax._src.pallas.mosaic.interpret import interpret_pallas_call

    call = pl.pallas_call
    exact = pltpu.InterpretParams(detect_races=True, dma_execution_mode="on_wait")
    monkeypatch.setattr(tpu_kernel.pl, "pallas_call", lambda *a, interpret, **k: call(*a, interpret=exact, **k))
    assert_agree(make_case(6, [(300, 40), (0, 2), (700, 1), (9, 1)], (2, 1), 64, 64, table_width=10, window=300), 300)
    assert not interpret_pallas_call.races.races_found


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"dim": 96}, "head dimensions"),
        ({"dtype": jnp.float16}, "float16"),
        ({"heads": (40, 1)}, "query heads"),
        ({"page_size": 12}, "pages of 8 to 1024 slots .* have 12"),
        ({"page_size": 96}, "have 96"),
        ({"page_size": 16, "kv_dtype": jnp.int8}, "int8 pages of 32"),
        ({"table_width": 2**17}, "entries"),
    ],
)
def test_refusals_name_the_reason(change, words):
    shape = {
        "dim": 64,
        "heads": (2, 1),
        "page_size": 32,
        "dtype": jnp.float32,
        "table_width": 1,
        "kv_dtype": None,
    } | change
    width = shape.pop("table_width")
    case = make_case(
        7, [(8, 1), (4, 1)], shape.pop("heads"), shape.pop("dim"), shape.pop("page_size"), table_width=1, **shape
    )
    case.arrays["page_table"] = jnp.zeros((2, width), jnp.int32)
    with pytest.raises(NotImplementedError, match=words):
        paged_attention(**case.call(implementation="tpu", interpret=True))


def test_without_a_tpu_it_says_so():
    if jax.default_backend() == "tpu":
        pytest.skip("there is one")
    with pytest.raises(NotImplementedError, match="no TPU here"):
        paged_attention(**make_case(8, [(8, 1)], (2, 1), 64, 32, table_width=1).call(implementation="tpu"))
    assert choose_implementation("tpu", interpret=True) == "tpu"


def test_tiles_of_every_chip_fit_together():
    for kind in ("TPU v5 lite", "TPU v5", "TPU v6 lite", "TPU7x", "something new"):
        found = tuned.tiles(kind, 8, 128)
        assert found.rows % 16 == 0 and found.keys % 128 == 0 and found.block % found.keys == 0


@pytest.mark.parametrize("page_size", [8, 64, 128, 384, 1024])
@pytest.mark.parametrize("kv_heads", [1, 7, 8, 27])
def test_blocks_are_whole_tiles_and_pages(kv_heads, page_size):
    pages = Pages(
        *(jax.ShapeDtypeStruct((9, kv_heads, page_size, 80), jnp.float32),) * 2, None, None, jnp.zeros((4, 5))
    )
    for rows, window, kind in ((4, None, "TPU v6 lite"), (13, 128, "TPU v5"), (900, 4096, "TPU7x")):
        plan = tpu.make_plan(rows, 2, pages, window, 1.0, tuned.tiles(kind, 2, 80), False)
        assert plan.keys % plan.tile == plan.tile % page_size == plan.tile % 128 == 0
        assert plan.many == plan.few or (plan.many > plan.few and plan.many % 16 == 0)
