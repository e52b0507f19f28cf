"""Grouped matmul on XLA:CPU, where `lax.ragged_dot` multiplies every row by every group's matrix.

Two forms share the rows:
  heads: the first few rows of every group as one batched product that reads rhs in place. Good while the groups are
    small and alike, and it writes the whole of a weight gradient in parallel.
  tiles: what the heads leave, in tiles of 512, 128, 32 and 8 rows of one group each; a loop a size, as long as the tiles
    that there really are, takes four tiles with copies of their matrices and multiplies them as one batch. Empty groups
    cost nothing. (XLA:CPU shares the tiles of a batch among its threads; one small product a step does not scale.)
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

from pallas_kernels.grouped_matmul.quantized import QuantizedRhs, dequantize

_SIZES = (8, 32, 128, 512)
_BATCH = 4
# Measured, in units of a row's arithmetic: what a tile (copying and packing its matrix) or a head costs beside its rows.
_TILE_OVERHEAD = 40
_HEAD_OVERHEAD = 24
_LARGEST_HEAD = 128
_FEW_ROWS = 128
# Below this much arithmetic (about 0.1 ms, what the loops' steps cost) and this many weights every group takes every row:
# then no loop is compiled either, which takes a second or two of each program.
_SMALL_FLOPS = 32_000_000
_SMALL_RHS = 2**20

_BATCHED = ((0,), (0,))


class Spans(NamedTuple):
    """Consecutive rows of each group: int32 `[G]` each."""

    begin: jax.Array
    length: jax.Array


class Level(NamedTuple):
    """The tiles of one size: how many each group has (int32 `[G]`), and which rows they cover."""

    size: int
    tiles: jax.Array
    rows: Spans


class Batch(NamedTuple):
    """_BATCH tiles: their groups `[B]`, the first row each reads `[B]`, and which of those are its own `[B, size]`."""

    group: jax.Array
    start: jax.Array
    mine: jax.Array


def product(
    x: jax.Array,
    rhs: jax.Array | QuantizedRhs,
    sizes: jax.Array,
    first: jax.Array | None,
    *,
    out_dtype: jnp.dtype,
    transposed: bool,
) -> jax.Array:
    """x `[M, K]` times rhs `[G, K, N]` or, transposed, `[G, N, K]`, groups from row `first` (None: 0) on -> `[M, N]`."""
    if (num_rows := x.shape[0]) < _SIZES[0]:
        x = jnp.pad(x, ((0, _SIZES[0] - num_rows), (0, 0)))
    spans = _spans(sizes, first)
    if _is_small(x.shape[0], rhs.shape):
        rhs = dequantize(rhs, x.dtype) if isinstance(rhs, QuantizedRhs) else rhs
        return _head_product(x, rhs, spans, x.shape[0], transposed)[:num_rows].astype(out_dtype)
    # float32 until the end: XLA:CPU writes a tile into a bfloat16 array by converting the whole array there and back.
    out = jnp.zeros((x.shape[0], rhs.shape[1 if transposed else 2]), jnp.float32)
    head = _head_size(x.shape[0], rhs.shape)
    # A head reads rhs in place, which needs it in x's dtype.
    if not isinstance(rhs, QuantizedRhs) and rhs.dtype == x.dtype and head < _LARGEST_HEAD:
        after = _after_heads(spans, head)
        cost = rhs.shape[0] * (head + _HEAD_OVERHEAD) + _cost(after, x.shape[0])
        use = cost < _cost(spans, x.shape[0])
        out = lax.cond(use, lambda: _head_product(x, rhs, spans, head, transposed), lambda: out)
        spans = jax.tree.map(lambda yes, no: jnp.where(use, yes, no), after, spans)
    for level in _levels(spans, x.shape[0]):
        out = _add_products(out, x, rhs, level, transposed)
    return out[:num_rows].astype(out_dtype)


def outer(
    left: jax.Array, right: jax.Array, sizes: jax.Array, first: jax.Array | None, *, out_dtype: jnp.dtype
) -> jax.Array:
    """out[g] = left[rows of g]^T @ right[rows of g]: left `[M, A]`, right `[M, B]` -> `[G, A, B]`, summed in float32."""
    if (num_rows := left.shape[0]) < _SIZES[0]:
        left, right = (jnp.pad(a, ((0, _SIZES[0] - num_rows), (0, 0))) for a in (left, right))
    spans = _spans(sizes, first)
    head = _head_size(left.shape[0], (sizes.shape[0], left.shape[1], right.shape[1]))
    start, mine = _head_rows(spans, head, left.shape[0])
    rows = start[:, None] + jnp.arange(head)
    out = _outer_batch(_take(left, rows), _take(right, rows), mine)
    if head < left.shape[0]:
        for level in _levels(_after_heads(spans, head), left.shape[0]):
            out = _add_outers(out, left, right, level)
    return out.astype(out_dtype)


def _spans(sizes: jax.Array, first: jax.Array | None = None) -> Spans:
    begin = jnp.cumsum(sizes) - sizes
    return Spans(begin if first is None else first + begin, sizes)


def _take(a: jax.Array, index: jax.Array) -> jax.Array:
    return a.at[index].get(mode="promise_in_bounds")


def _dot(a: jax.Array, b: jax.Array, a_axis: int, b_axis: int) -> jax.Array:
    return lax.dot_general(a, b, (((a_axis,), (b_axis,)), _BATCHED), preferred_element_type=jnp.float32)


def _times(x: jax.Array, matrices: jax.Array, transposed: bool) -> jax.Array:
    """x `[B, R, K]` times matrices `[B, K, N]` or, transposed, `[B, N, K]` -> float32 `[B, R, N]`."""
    if transposed and x.shape[1] <= _FEW_ROWS:
        # As the left side they are streamed, where XLA:CPU would first transpose the right side. Without the barrier it
        # folds the transpose of the result into the product and has the rows on the left again.
        return jnp.swapaxes(lax.optimization_barrier(_dot(matrices, x, 2, 2)), 1, 2)
    return _dot(x, matrices, 2, 2 if transposed else 1)


# Heads.


def _is_small(num_rows: int, rhs_shape: tuple[int, ...]) -> bool:
    """Whether every group may as well take every row."""
    num_groups, k, n = rhs_shape
    weights = num_groups * k * n
    return num_groups == 1 or (2 * num_rows * weights <= _SMALL_FLOPS and weights <= _SMALL_RHS)


def _head_size(num_rows: int, rhs_shape: tuple[int, ...]) -> int:
    """Rows of a head: a quarter over the mean, which covers most groups of a balanced router, as a multiple of 8."""
    if _is_small(num_rows, rhs_shape):
        return num_rows
    return min(-(-5 * num_rows // (4 * 8 * rhs_shape[0])) * 8, _LARGEST_HEAD, num_rows)


def _after_heads(spans: Spans, head: int) -> Spans:
    taken = jnp.minimum(spans.length, head)
    return Spans(spans.begin + taken, spans.length - taken)


def _head_rows(spans: Spans, head: int, num_rows: int) -> tuple[jax.Array, jax.Array]:
    """First row that each head reads, `[G]`, and which of the rows read are its group's, `[G, head]`."""
    start = jnp.minimum(spans.begin, num_rows - head)
    rows = start[:, None] + jnp.arange(head)
    return start, (rows >= spans.begin[:, None]) & (rows < (spans.begin + spans.length)[:, None])


def _head_product(x: jax.Array, rhs: jax.Array, spans: Spans, head: int, transposed: bool) -> jax.Array:
    """float32 `[M, N]`: right in the rows of the heads, zero in the rows of no group, anything in the rest."""
    num_groups, num_rows = rhs.shape[0], x.shape[0]
    start, _ = _head_rows(spans, head, num_rows)
    heads = _take(x, start[:, None] + jnp.arange(head))
    y = _times(heads, rhs.astype(x.dtype), transposed)
    row, ends = jnp.arange(num_rows), spans.begin + spans.length
    group = jnp.minimum(jnp.sum(ends <= row[:, None], axis=1), num_groups - 1)
    place = jnp.clip(row - start[group], 0, head - 1)
    out = _take(y.reshape(num_groups * head, -1), group * head + place)
    return jnp.where(((row >= spans.begin[0]) & (row < ends[-1]))[:, None], out, 0)


# Tiles.


def _levels(spans: Spans, num_rows: int) -> list[Level]:
    """Covers the spans by tiles, largest first; one is left partly empty where the next size would cost more."""
    sizes = [size for size in _SIZES if size <= num_rows]
    levels = []
    for smaller, size in zip([None, *sizes[:-1]], sizes, strict=True):
        fits = 0 if smaller is None else smaller * ((_TILE_OVERHEAD + size) // (_TILE_OVERHEAD + smaller))
        levels.append((size, fits))
    chosen = []
    for size, fits in reversed(levels):
        count = spans.length // size + (spans.length % size > fits)
        covered = jnp.minimum(count * size, spans.length)
        chosen.append(Level(size, count, Spans(spans.begin, covered)))
        spans = Spans(spans.begin + covered, spans.length - covered)
    return chosen


def _cost(spans: Spans, num_rows: int) -> jax.Array:
    """What the tiles of the spans cost, in rows."""
    costs = [jnp.sum(level.tiles) * (level.size + _TILE_OVERHEAD) for level in _levels(spans, num_rows)]
    return jnp.sum(jnp.stack(costs))


def _batch(level: Level, first: jax.Array, num_rows: int) -> Batch:
    """Tiles first, first + 1, ... of a level; a tile past the last has no rows of its own."""
    tile = first + jnp.arange(_BATCH)
    ends = jnp.cumsum(level.tiles)
    group = jnp.minimum(jnp.sum(ends <= tile[:, None], axis=1), ends.shape[0] - 1)
    begin = level.rows.begin[group] + (tile - (ends - level.tiles)[group]) * level.size
    end = jnp.minimum(begin + level.size, (level.rows.begin + level.rows.length)[group])
    # A tile that would reach past the last row reads from further up.
    start = jnp.clip(begin, 0, num_rows - level.size)
    row = start[:, None] + jnp.arange(level.size)
    mine = (row >= begin[:, None]) & (row < end[:, None]) & (tile < ends[-1])[:, None]
    return Batch(group, start, mine)


def _rows(a: jax.Array, batch: Batch, size: int) -> jax.Array:
    return jnp.stack([lax.dynamic_slice_in_dim(a, batch.start[i], size) for i in range(_BATCH)])


def _steps(level: Level) -> jax.Array:
    return -(-jnp.sum(level.tiles) // _BATCH)


def _matrices(rhs: jax.Array | QuantizedRhs, group: jax.Array, dtype: jnp.dtype) -> jax.Array:
    if isinstance(rhs, QuantizedRhs):
        return dequantize(QuantizedRhs(_take(rhs.values, group), _take(rhs.scales, group)), dtype)
    return _take(rhs, group).astype(dtype)


def _add_products(
    out: jax.Array, x: jax.Array, rhs: jax.Array | QuantizedRhs, level: Level, transposed: bool
) -> jax.Array:
    def step(i: jax.Array, out: jax.Array) -> jax.Array:
        batch = _batch(level, i * _BATCH, x.shape[0])
        # Without the barrier XLA:CPU moves a conversion of the whole rhs (bfloat16 to float32) out of the loop.
        all_kernels, group = lax.optimization_barrier((rhs, batch.group))
        kernels = _matrices(all_kernels, group, x.dtype)
        y = _times(_rows(x, batch, level.size), kernels, transposed)
        for tile in range(_BATCH):
            old = lax.dynamic_slice_in_dim(out, batch.start[tile], level.size)
            new = jnp.where(batch.mine[tile][:, None], y[tile], old)
            out = lax.dynamic_update_slice_in_dim(out, new, batch.start[tile], 0)
        return out

    return lax.fori_loop(0, _steps(level), step, out)


def _outer_batch(left: jax.Array, right: jax.Array, mine: jax.Array) -> jax.Array:
    """`[B, R, I]`, `[B, R, J]`, mine `[B, R]` -> float32 `[B, I, J]`. Both sides are masked: 0 * NaN is NaN."""
    left, right = (jnp.where(mine[..., None], a, 0) for a in (left, right))
    # Few rows are transposed faster here than inside XLA:CPU's product.
    return _dot(lax.optimization_barrier(jnp.swapaxes(left, 1, 2)), right, 2, 1)


def _add_outers(out: jax.Array, left: jax.Array, right: jax.Array, level: Level) -> jax.Array:
    def step(i: jax.Array, out: jax.Array) -> jax.Array:
        batch = _batch(level, i * _BATCH, left.shape[0])
        y = _outer_batch(_rows(left, batch, level.size), _rows(right, batch, level.size), batch.mine)
        for tile in range(_BATCH):
            old = lax.dynamic_index_in_dim(out, batch.group[tile], keepdims=False)
            out = lax.dynamic_update_index_in_dim(out, old + y[tile], batch.group[tile], 0)
        return out

    return lax.fori_loop(0, _steps(level), step, out)
