"""The grouped matmul against its plain meaning: values, gradients, poison, and a reasoned answer to every call."""

import functools
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pallas_kernels.grouped_matmul import QuantizedRhs, choose_implementation, grouped_matmul, tiles, xla

# (M, K, N, G): one small batch; a padded single row; heads and tiles; tiles up to 512 rows; a decode step.
SHAPES = [(5, 8, 16, 4), (1, 256, 160, 64), (300, 96, 80, 16), (700, 96, 80, 4), (96, 64, 48, 64)]


def sizes_strategy(num_groups: int, num_rows: int) -> st.SearchStrategy[list[int]]:
    """Group sizes from cuts of the rows: often empty groups, often one large, with or without rows past the end."""
    cut = st.one_of(st.just(0), st.just(num_rows), st.integers(0, num_rows))
    return st.lists(cut, min_size=num_groups, max_size=num_groups).map(
        lambda cuts: np.diff([0, *sorted(cuts)]).tolist()
    )


def operands(shape: tuple[int, int, int, int], dtype: jax.typing.DTypeLike = jnp.float32, seed: int = 0):
    """lhs, rhs and the gradient of the result."""
    num_rows, k, n, num_groups = shape
    keys = jax.random.split(jax.random.key(seed), 3)
    shapes = ((num_rows, k), (num_groups, k, n), (num_rows, n))
    return tuple(jax.random.normal(key, s, dtype) for key, s in zip(keys, shapes, strict=True))


def value_and_gradients(lhs, rhs, sizes, grad, **options) -> list[np.ndarray]:
    """The result, lhs's gradient and rhs's gradient, in float32; all of rhs `[G, K, N]`, however it is handed over."""
    return [np.asarray(a, np.float32) for a in _value_and_gradients(lhs, rhs, sizes, grad, **options)]


@functools.partial(jax.jit, static_argnames=("transpose_rhs", "implementation", "interpret", "preferred_element_type"))
def _value_and_gradients(lhs, rhs, sizes, grad, group_offset=None, transpose_rhs=False, **options):
    turn = (lambda a: jnp.swapaxes(a, 1, 2)) if transpose_rhs else (lambda a: a)
    run = functools.partial(
        grouped_matmul, group_sizes=sizes, transpose_rhs=transpose_rhs, group_offset=group_offset, **options
    )
    out, pull = jax.vjp(run, lhs, turn(rhs))
    dlhs, drhs = pull(grad.astype(out.dtype))
    return out, dlhs, turn(drhs)


def exact(lhs, rhs, sizes, grad) -> list[np.ndarray]:
    """The same in float64 by a loop over groups."""
    lhs, rhs, grad = (np.asarray(a, np.float64) for a in (lhs, rhs, grad))
    out, dlhs, drhs = np.zeros(grad.shape), np.zeros(lhs.shape), np.zeros(rhs.shape)
    ends = np.cumsum(sizes)
    for group, (start, end) in enumerate(zip(ends - np.asarray(sizes), ends, strict=True)):
        out[start:end] = lhs[start:end] @ rhs[group]
        dlhs[start:end] = grad[start:end] @ rhs[group].T
        drhs[group] = lhs[start:end].T @ grad[start:end]
    return [out, dlhs, drhs]


def assert_close(found: list[np.ndarray], expected: list[np.ndarray], tolerance: float) -> None:
    """Errors relative to the largest entry: an entry near zero is the difference of large terms."""
    for name, a, b in zip(("out", "dlhs", "drhs"), found, expected, strict=True):
        np.testing.assert_allclose(a, b, rtol=0, atol=tolerance * max(float(np.abs(b).max()), 1e-30), err_msg=name)


@pytest.mark.parametrize("implementation", ["reference", "xla"])
@given(data=st.data(), shape=st.sampled_from(SHAPES), transpose_rhs=st.booleans())
@settings(max_examples=25, deadline=None)
def test_matches_float64(
    implementation: str, data: st.DataObject, shape: tuple[int, int, int, int], transpose_rhs: bool
):
    sizes = jnp.asarray(data.draw(sizes_strategy(shape[3], shape[0])), jnp.int32)
    lhs, rhs, grad = operands(shape)
    found = value_and_gradients(lhs, rhs, sizes, grad, implementation=implementation, transpose_rhs=transpose_rhs)
    # A float32 sum of n products of normals is off by about sqrt(n) * 6e-8 * sqrt(n); n <= 700 here, and the largest entry is
    # above sqrt(n): 2e-5 leaves a factor of ten.
    assert_close(found, exact(lhs, rhs, sizes, grad), 2e-5)
    used = int(sizes.sum())
    assert not found[0][used:].any()
    assert not found[1][used:].any()
    assert not found[2][np.asarray(sizes) == 0].any()


@pytest.mark.parametrize("sizes", [[20] * 15, [0, 300, *[0] * 14], [1, 2, 150, 0, 0, 90, *[4] * 10]])
def test_bfloat16_is_as_good_as_the_reference_in_bfloat16(sizes: list[int]):
    lhs, rhs, grad = operands((300, 96, 80, 16), jnp.bfloat16)
    group_sizes = jnp.asarray(sizes + [0] * (16 - len(sizes)), jnp.int32)
    truth = exact(lhs, rhs, group_sizes, grad)
    plain = value_and_gradients(lhs, rhs, group_sizes, grad, implementation="reference")
    found = value_and_gradients(lhs, rhs, group_sizes, grad, implementation="xla")
    for a, b, t in zip(found, plain, truth, strict=True):
        assert np.abs(a - t).max() <= 2 * np.abs(b - t).max()


@pytest.mark.parametrize("transpose_rhs", [False, True])
@pytest.mark.parametrize("implementation", ["reference", "xla"])
@pytest.mark.parametrize("shape", SHAPES)
def test_poison_stays_where_it_is(implementation: str, shape: tuple[int, int, int, int], transpose_rhs: bool):
    num_rows, num_groups = shape[0], shape[3]
    lhs, rhs, grad = operands(shape)
    sizes = np.zeros(num_groups, np.int32)
    sizes[1] = -(-num_rows // 2)
    sizes[3] = num_rows // 4
    used = int(sizes.sum())
    clean = exact(lhs, rhs, sizes, grad)
    lhs, grad = lhs.at[used:].set(jnp.nan), grad.at[used:].set(jnp.nan)
    rhs = rhs.at[np.flatnonzero(sizes == 0)].set(jnp.nan)
    clean[0][used:] = 0
    options = {"implementation": implementation, "transpose_rhs": transpose_rhs}
    assert_close(value_and_gradients(lhs, rhs, jnp.asarray(sizes), grad, **options), clean, 2e-5)


@pytest.mark.parametrize("implementation", ["reference", "xla"])
@given(data=st.data(), shape=st.sampled_from([(300, 96, 80, 16), (700, 96, 80, 6)]), transpose_rhs=st.booleans())
@settings(max_examples=8, deadline=None)
def test_a_shard_of_the_groups(implementation, data, shape, transpose_rhs):
    """Rows of other groups hold poison: they give zeros and reach no gradient."""
    num_rows, num_groups = shape[0], shape[3]
    sizes = data.draw(sizes_strategy(num_groups, num_rows))
    offset = data.draw(st.integers(0, num_groups - 3))
    lhs, rhs, grad = operands((*shape[:3], 3))
    starts = np.cumsum([0, *sizes])
    rows = slice(int(starts[offset]), int(starts[offset + 3]))
    truth = [np.zeros(grad.shape), np.zeros(lhs.shape), np.zeros(rhs.shape)]
    part = exact(lhs[rows], rhs, sizes[offset : offset + 3], grad[rows])
    truth[0][rows], truth[1][rows], truth[2] = part
    mine = np.zeros((num_rows, 1), bool)
    mine[rows] = True
    lhs, grad = jnp.where(mine, lhs, jnp.nan), jnp.where(mine, grad, jnp.nan)
    options = {"implementation": implementation, "transpose_rhs": transpose_rhs}
    sizes = jnp.asarray(sizes, jnp.int32)
    found = value_and_gradients(lhs, rhs, sizes, grad, group_offset=jnp.int32(offset), **options)
    assert_close(found, truth, 2e-5)


def test_sizes_that_do_not_fit_are_cut_off():
    lhs, rhs, grad = operands((300, 96, 80, 16))
    wrong = jnp.asarray([-5, 100, 250, *[7] * 13], jnp.int32)
    right = jnp.asarray([0, 100, 200, *[0] * 13], jnp.int32)
    assert_close(value_and_gradients(lhs, rhs, wrong, grad, implementation="xla"), exact(lhs, rhs, right, grad), 2e-5)


@given(sizes=st.lists(st.integers(0, 1500), min_size=1, max_size=12))
@settings(max_examples=40, deadline=None)
def test_tiles_cover_every_row_once_and_skip_empty_groups(sizes: list[int]):
    num_rows, counts = max(sum(sizes), 8), np.asarray(sizes)
    spans = tiles.Spans(jnp.asarray(np.cumsum(counts) - counts, jnp.int32), jnp.asarray(counts, jnp.int32))
    with jax.disable_jit():
        levels = tiles._levels(spans, num_rows)
    seen = np.zeros(num_rows, int)
    for level in levels:
        assert not np.asarray(level.tiles)[counts == 0].any()
        np.testing.assert_array_equal(np.asarray(level.tiles), -(-np.asarray(level.rows.length) // level.size))
        for begin, count in zip(*(np.asarray(a) for a in level.rows), strict=True):
            seen[begin : begin + count] += 1
    np.testing.assert_array_equal(seen, np.arange(num_rows) < counts.sum())
    # The rows computed are at most three times those asked for, and a smallest tile a group.
    assert sum(int(level.tiles.sum()) * level.size for level in levels) <= 3 * counts.sum() + 8 * (counts > 0).sum()


def test_decode_takes_tiles_and_not_every_matrix():
    """16 rows in 14 of 128 groups: 14 tiles' matrices are copied, and no head reads all 128."""
    sizes = np.zeros(128, np.int32)
    sizes[::9][:14] = 1
    sizes[0] = 3
    spans = tiles._spans(jnp.asarray(sizes))
    assert [int(level.tiles.sum()) for level in tiles._levels(spans, 16)] == [14]
    assert int(tiles._cost(spans, 16)) < 128 * (8 + tiles._HEAD_OVERHEAD)


@pytest.mark.parametrize("transpose_rhs", [False, True])
@pytest.mark.parametrize("dtypes", [("float32", "float32"), ("bfloat16", "bfloat16"), ("bfloat16", "float32")])
def test_decode_copies_a_few_matrices_only(dtypes: tuple[str, str], transpose_rhs: bool):
    """XLA:CPU would hoist a conversion of all the bfloat16 matrices out of the loop, which costs 40 times a decode step."""
    shape = (128, 512, 256) if transpose_rhs else (128, 256, 512)
    lhs, rhs = jax.ShapeDtypeStruct((16, 256), dtypes[0]), jax.ShapeDtypeStruct(shape, dtypes[1])
    sizes = jax.ShapeDtypeStruct((128,), jnp.int32)
    forward = functools.partial(grouped_matmul, transpose_rhs=transpose_rhs, implementation="xla")
    dlhs = jax.grad(lambda *args: forward(*args).astype(jnp.float32).sum())
    for call in (forward, dlhs):
        temporaries = jax.jit(call).lower(lhs, rhs, sizes).compile().memory_analysis().temp_size_in_bytes
        # A step copies 4 of the 128 matrices, at most twice in float32.
        assert temporaries <= 10 * 256 * 512 * 4


def test_wide_weights_keep_their_gradient():
    """bfloat16 rows with float32 weights: the result is bfloat16, and the weights' gradient is not rounded to it."""
    lhs, rhs, grad = operands((300, 96, 80, 16))
    sizes = jnp.asarray([20] * 15 + [0], jnp.int32)
    lhs, grad = lhs.astype(jnp.bfloat16), grad.astype(jnp.bfloat16)
    truth = exact(lhs, rhs.astype(jnp.bfloat16), sizes, grad)
    for implementation in ("reference", "xla"):
        out, pull = jax.vjp(lambda a, b, i=implementation: grouped_matmul(a, b, sizes, implementation=i), lhs, rhs)
        dlhs, drhs = pull(grad)
        assert (out.dtype, dlhs.dtype, drhs.dtype) == (jnp.bfloat16, jnp.bfloat16, jnp.float32)
        # bfloat16 keeps 8 bits: half a unit in the last place is 2**-9 of the value.
        np.testing.assert_allclose(np.asarray(out, np.float32), truth[0], rtol=2**-8, atol=1e-4)
    np.testing.assert_allclose(np.asarray(drhs), truth[2], rtol=0, atol=2e-5 * np.abs(truth[2]).max())


@pytest.mark.parametrize("implementation", ["reference", "xla"])
def test_preferred_element_type(implementation: str):
    lhs, rhs, grad = operands((300, 96, 80, 16), jnp.bfloat16)
    sizes = jnp.asarray([18] * 16, jnp.int32)
    options = {"implementation": implementation, "preferred_element_type": jnp.float32}
    out = grouped_matmul(lhs, rhs, sizes, **options)
    assert out.dtype == jnp.float32
    truth = exact(lhs, rhs, sizes, grad)
    # Products of bfloat16 are exact in float32, so only the sum rounds.
    np.testing.assert_allclose(np.asarray(out), truth[0], rtol=0, atol=2e-5 * np.abs(truth[0]).max())
    found = value_and_gradients(lhs, rhs, sizes, grad, **options)
    for a, t in zip(found[1:], truth[1:], strict=True):
        np.testing.assert_allclose(a, t, rtol=2**-8, atol=2**-9 * np.abs(t).max())


def test_inside_a_rematerialised_scan():
    lhs, rhs, _ = operands((96, 64, 64, 64))
    layers, sizes = jnp.stack([rhs, -rhs]) / 7, jnp.asarray([3] * 20 + [0] * 44, jnp.int32)

    def loss(lhs: jax.Array, layers: jax.Array, implementation: str) -> jax.Array:
        @jax.checkpoint
        def layer(x: jax.Array, kernel: jax.Array) -> tuple[jax.Array, None]:
            return x + grouped_matmul(jnp.tanh(x), kernel, sizes, implementation=implementation), None

        return jnp.sum(jax.lax.scan(layer, lhs, layers)[0] ** 2)

    found, expected = (
        jax.jit(jax.grad(loss, argnums=(0, 1)), static_argnums=2)(lhs, layers, name) for name in ("xla", "reference")
    )
    for a, b in zip(found, expected, strict=True):
        np.testing.assert_allclose(a, b, rtol=0, atol=2e-5 * np.abs(b).max())


@pytest.mark.parametrize("first", [None, 5])
def test_ragged_dot_form_means_the_same(first: int | None):
    """What the program is on other platforms, run here."""
    lhs, rhs, grad = operands((40, 16, 24, 5))
    sizes = jnp.asarray([3, 0, 20, 10, 0], jnp.int32)
    begin = first or 0
    lhs, grad = (a.at[begin + 33 :].set(jnp.nan).at[:begin].set(jnp.nan) for a in (lhs, grad))
    truth = exact(lhs[begin:], rhs, sizes, grad[begin:])
    truth = [*(np.pad(a, ((begin, 0), (0, 0))) for a in truth[:2]), truth[2]]
    row = None if first is None else jnp.int32(first)
    options = {"out_dtype": jnp.dtype(jnp.float32)}
    found = [
        xla._ragged_product(lhs, rhs, sizes, row, transposed=False, **options),
        xla._ragged_product(grad, rhs, sizes, row, transposed=True, **options),
        xla._ragged_outer(lhs, grad, sizes, row, **options),
    ]
    assert_close([np.asarray(a) for a in found], truth, 2e-5)


def test_the_platform_is_chosen_at_lowering():
    lhs, rhs, _ = operands((700, 96, 80, 4))
    sizes = jnp.asarray([100, 0, 300, 250], jnp.int32)

    def loss(lhs: jax.Array, rhs: jax.Array) -> jax.Array:
        return jnp.sum(grouped_matmul(lhs, rhs, sizes) ** 2)

    traced = jax.jit(jax.grad(loss, argnums=(0, 1))).trace(lhs, rhs)
    text = {name: traced.lower(lowering_platforms=(name,)).as_text() for name in ("cpu", "tpu")}
    assert text["tpu"].count("ragged_dot") >= 3
    assert "stablehlo.while" not in text["tpu"]
    assert "stablehlo.while" in text["cpu"]
    assert "chlo.ragged_dot" not in text["cpu"]


@pytest.mark.parametrize("transpose_rhs", [False, True])
@pytest.mark.parametrize("group_offset", [None, 1])
def test_megablox_in_the_interpreter(transpose_rhs: bool, group_offset: int | None):
    lhs, rhs, grad = operands((384, 128, 256, 4), jnp.bfloat16)
    sizes = [130, 0, 70, 100]
    truth = exact(lhs, rhs, sizes, grad)
    lhs, grad = lhs.at[300:].set(jnp.nan), grad.at[300:].set(jnp.nan)
    if group_offset:  # the first group is another device's
        rhs, truth[2] = rhs[1:], truth[2][1:]
        truth[0][:130], truth[1][:130] = 0, 0
        lhs, grad = lhs.at[:130].set(jnp.nan), grad.at[:130].set(jnp.nan)
    group_sizes = jnp.asarray(sizes, jnp.int32)
    options = {"transpose_rhs": transpose_rhs, "group_offset": group_offset}
    plain = value_and_gradients(lhs, rhs, group_sizes, grad, implementation="reference", **options)
    found = value_and_gradients(lhs, rhs, group_sizes, grad, implementation="tpu", interpret=True, **options)
    for a, b, t in zip(found, plain, truth, strict=True):
        assert np.abs(a - t).max() <= 2 * np.abs(b - t).max()


def test_no_rows():
    lhs, rhs, grad = operands((0, 8, 16, 4))
    for implementation in ("reference", "xla"):
        out, dlhs, drhs = value_and_gradients(lhs, rhs, jnp.zeros(4, jnp.int32), grad, implementation=implementation)
        assert (out.shape, dlhs.shape) == ((0, 16), (0, 8))
        assert not drhs.any()


CALLS = {
    "plain": {},
    "turned": {"transpose_rhs": True},
    "empty groups": {"sizes": [0, 100, 0, 28]},
    "rows of no group": {"sizes": [30, 0, 50, 0]},
    "offset": {"group_offset": 2},
    "traced offset": {"group_offset": jnp.int32(1)},
    "result": {"preferred_element_type": jnp.float32},
    "float32": {"dtype": jnp.float32},
    "float16": {"dtype": jnp.float16},
    "odd": {"shape": (5, 8, 16, 4), "sizes": [2, 0, 1, 1]},
    "no rows": {"shape": (0, 128, 128, 4), "sizes": [0, 0, 0, 0]},
    "int8": {"quantized": "int8"},
    "int4": {"quantized": "int4", "transpose_rhs": True},
    "float8": {"quantized": "float8_e4m3fn", "group_offset": 1},
    "quantised odd": {"shape": (5, 8, 16, 4), "sizes": [2, 0, 1, 1], "quantized": "int8"},
}
NOT_ON_TPU = ("float32", "float16", "odd", "quantised odd")


@pytest.mark.parametrize("name", CALLS)
def test_every_call_gives_a_result_or_a_reason(name):
    """Every implementation, in the interpreter and out of it: what it returns is right, or it says why it cannot."""
    call = {"shape": (128, 128, 128, 4), "sizes": [40, 8, 48, 32], "dtype": jnp.bfloat16, "quantized": None} | CALLS[
        name
    ]
    lhs, rhs, _ = operands(call.pop("shape"), call.pop("dtype"))
    sizes, small = jnp.asarray(call.pop("sizes"), jnp.int32), call.pop("quantized")
    if call.get("transpose_rhs"):
        rhs = rhs.swapaxes(1, 2)
    rhs = rhs[int(call.get("group_offset", 0)) :]
    if "traced offset" in name:
        rhs = rhs[:2]
    if small:
        rhs = QuantizedRhs(jnp.round(2 * rhs).clip(-7, 7).astype(small), jnp.full((rhs.shape[0], 1, 1), 0.5))
    wanted = np.asarray(grouped_matmul(lhs, rhs, sizes, implementation="reference", **call), np.float32)
    served = set()
    for implementation in ("reference", "xla", "tpu", "gpu", None):
        for interpret in (False, True):
            options = {"implementation": implementation, "interpret": interpret, **call}
            try:
                found = grouped_matmul(lhs, rhs, sizes, **options)
            except NotImplementedError as reason:
                words = "is for Pallas kernels|need a TPU|no GPU here|no 4-bit arrays|multiplies|multiples of 128"
                assert re.search(f"^grouped_matmul: .* ({words})", str(reason))  # noqa: PT017
                with pytest.raises(NotImplementedError, match=re.escape(str(reason))):
                    choose_implementation(lhs, rhs, sizes, **options)
                continue
            served.add((implementation, interpret))
            assert choose_implementation(lhs, rhs, sizes, **options) == (implementation or "xla")
            # Two orders of one float32 sum, which a narrow result may round to neighbours.
            near = {"float16": 2**-10, "bfloat16": 2**-7}.get(found.dtype.name, 1e-5)
            np.testing.assert_allclose(found.astype(jnp.float32), wanted, rtol=near, atol=near)
    on_tpu = set() if name in NOT_ON_TPU else {("tpu", True)}
    on_gpu = set() if name == "int4" else {("gpu", True)}
    assert served == {("reference", False), ("xla", False), (None, False)} | on_tpu | on_gpu


def test_wrong_calls_are_named():
    lhs, rhs, sizes = jnp.zeros((6, 8)), jnp.zeros((2, 8, 4)), jnp.zeros(2, jnp.int32)
    with pytest.raises(ValueError, match="expected lhs"):
        grouped_matmul(lhs[0], rhs, sizes)
    with pytest.raises(ValueError, match="differ in K"):
        grouped_matmul(lhs[:, :7], rhs, sizes)
    with pytest.raises(ValueError, match="differ in K"):
        grouped_matmul(lhs, rhs, sizes, transpose_rhs=True)
    with pytest.raises(ValueError, match="2 groups, group_sizes 1"):
        grouped_matmul(lhs, rhs, sizes[:1])
    with pytest.raises(ValueError, match="empty axis"):
        grouped_matmul(lhs, rhs[:, :, :0], sizes)
    with pytest.raises(TypeError, match="int32, found float32"):
        grouped_matmul(lhs, rhs, sizes.astype(jnp.float32))
    with pytest.raises(TypeError, match="lhs must be float32, bfloat16 or float16, found int32"):
        grouped_matmul(lhs.astype(jnp.int32), rhs, sizes)
    with pytest.raises(TypeError, match="preferred_element_type must be"):
        grouped_matmul(lhs, rhs, sizes, preferred_element_type=jnp.int8)
    with pytest.raises(ValueError, match="group_offset must be 0 to 1 for 1 of 2 groups, found 2"):
        grouped_matmul(lhs, rhs[:1], sizes, group_offset=2)
    with pytest.raises(ValueError, match="rhs has 2 groups, group_sizes 1"):
        grouped_matmul(lhs, rhs, sizes[:1], group_offset=0)
    with pytest.raises(TypeError, match="int32 scalar, found float32"):
        grouped_matmul(lhs, rhs, sizes, group_offset=jnp.zeros(()))
    with pytest.raises(ValueError, match="unknown implementation 'cuda'"):
        grouped_matmul(lhs, rhs, sizes, implementation="cuda")
