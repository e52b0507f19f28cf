"""Attention under a window that fits on chip whole: one pass, forward and backward, over the band's tiles alone.

Queries come in tiles of 128. With W keys rounded up to m tiles, query tile t can see key tiles t - m .. t. In tile t it sees the
keys up to the diagonal, in tile t - m those after it: the two triangles are complementary, so they *fold* into one tile, and the
softmax of a query tile is over m tiles of live scores instead of m + 1 half-dead ones. For W = 128 that is a single tile.

The kernels' layout is q [B, K, G, T, D] with the G heads of a group together, so that the keys and values fetched once serve
all of them, and k and v [B, K, m * 128 + T, D]: the queries' own keys, and before them those that the first tile looks back at.
Where the queries stand at an offset, that is a slice of the keys, and all that the kernels need of the rest is where it ends.
"""

import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import Array, lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from pallas_kernels.attention.tpu_tiles import (
    FLOOR,
    HIDDEN,
    IN_ORDER,
    LOG2E,
    PARALLEL,
    TILE,
    Band,
    ceil_to,
    compiler_params,
    cost,
    dot,
    heads_at_once,
    iota,
    log_sum_exp2,
    repeat,
)
from pallas_kernels.attention.tuned import Tiles

MAX_WINDOW = 1024  # 8 tiles of float32 scores a head; wider bands run as flash attention
_SCORES = 8 * 2 * TILE * TILE  # scores in flight: 8 heads at W = 128


class Plan(NamedTuple):
    """What is static in one call. T is already a multiple of `block`."""

    window: int
    scale: float
    group: int
    head_dim: int
    band: Band
    block: int  # queries of one grid step
    unroll: int
    heads: int  # heads whose scores are taken in one product
    segmented: bool
    interpret: bool

    @property
    def back(self) -> int:
        """Key tiles looked back at."""
        return look_back(self.window) // TILE

    @property
    def blind(self) -> bool:
        """Whether a query may see nothing."""
        return self.segmented or self.band.blind(self.window)

    @property
    def span(self) -> int:
        """Keys that a query tile is multiplied with."""
        return (self.back + 1) * TILE


def make_plan(
    band: Band,
    group: int,
    head_dim: int,
    window: int,
    scale: float,
    segmented: bool,
    backward: bool,
    tiles: Tiles,
    interpret: bool,
) -> Plan:
    back = -(-window // TILE)
    most = max(1, tiles.window_rows // group // TILE, back)
    num_tiles = -(-band.queries // TILE)
    unroll = tiles.window_unroll_backward if backward else tiles.window_unroll
    if num_tiles <= most:
        size = ceil_to(num_tiles, unroll) if num_tiles >= 4 * unroll else num_tiles
        size = (
            max(size, back) if backward else size
        )  # it hands on one block at most: none is shorter than the look-back
    else:  # the least padding, then the longest block
        sizes = [n for n in range(max(back, most // 2), most + 1) if n % unroll == 0] or [most]
        size = min(sizes, key=lambda n: (ceil_to(num_tiles, n), -n))
    while size % unroll:
        unroll //= 2
    heads = heads_at_once(group, _SCORES // (TILE * TILE * (back + 1)))
    return Plan(window, scale, group, head_dim, band, size * TILE, unroll, heads, segmented, interpret)


def padding(plan: Plan) -> int:
    """Rows to put after the last of both queries and keys."""
    return ceil_to(plan.band.queries, plan.block) - plan.band.queries


def look_back(window: int) -> int:
    """Keys that are to stand before the queries' own."""
    return -(-window // TILE) * TILE


# A query tile's place in its folded scores. `axis` is where the queries stand: 0 forward (rows), 1 backward (lanes).


def _own(axis: int) -> Array:
    """bool [128, 128]: which keys of its own tile a query sees."""
    return iota((TILE, TILE), 1 - axis) <= iota((TILE, TILE), axis)


def _fold(plan: Plan, x: Array, axis: int, own: Array) -> Array:
    """Scores against the span -> scores against the m folded tiles."""
    keys = 1 - axis
    first, last = (lax.slice_in_dim(x, at, at + TILE, axis=keys) for at in (0, plan.back * TILE))
    folded = jnp.where(own, last, first)
    if plan.back == 1:
        return folded
    return jnp.concatenate([folded, lax.slice_in_dim(x, TILE, plan.back * TILE, axis=keys)], keys)


def _unfold(plan: Plan, x: Array, axis: int, own: Array, dtype: Any) -> Array:
    """The way back: a weight goes to the one key that it belongs to, and 0 to the other."""
    keys = 1 - axis
    folded = lax.slice_in_dim(x, 0, TILE, axis=keys)
    middle = [] if plan.back == 1 else [lax.slice_in_dim(x, TILE, plan.back * TILE, axis=keys)]
    parts = [jnp.where(own, 0.0, folded), *middle, jnp.where(own, folded, 0.0)]
    return jnp.concatenate(parts, keys).astype(dtype)


def _mask(
    plan: Plan, offset: Array | int, tile: Array, axis: int, own: Array, segments: tuple[Array, Array] | None
) -> Array:
    """bool, folded: which of a tile's scores live. `tile` is the query tile's number; segments are (column, row) of ids."""
    folded = plan.back * TILE
    shape = (TILE, folded) if axis == 0 else (folded, TILE)
    query, at = iota(shape, axis), iota(shape, 1 - axis)
    key = jnp.where(
        at <= query, at, at - folded
    )  # from the first query of the tile; `at <= query` only in the folded tile
    before = offset + tile * TILE  # keys before the tile's own
    live = (query - key < plan.window) & (key >= -before)
    if plan.band.past_end:
        live &= key < plan.band.keys - before
    if segments is None:
        return live
    queries, keys = segments if axis == 0 else segments[::-1]
    first, middle, last = (
        lax.slice_in_dim(keys, low, high, axis=1 - axis)
        for low, high in ((0, TILE), (TILE, max(folded, TILE + 1)), (folded, plan.span))
    )
    ids = jnp.where(own, last, first)
    if plan.back > 1:
        middle = jnp.broadcast_to(middle, (TILE, folded - TILE) if axis == 0 else (folded - TILE, TILE))
        ids = jnp.concatenate([ids, middle], 1 - axis)
    return live & (ids == queries)


def _over_tiles(plan: Plan, offset: Array | int, block: Array, body: Any) -> None:
    """Runs `body(at, masked)` for every query tile of the block, `unroll` of them side by side."""
    tiles = plan.block // TILE
    always = plan.segmented or plan.window % TILE != 0
    never = isinstance(offset, int) and offset >= plan.window - 1 and not plan.band.past_end

    def side_by_side(step: Array, masked: bool) -> None:
        for j in range(plan.unroll):
            body(pl.multiple_of((step * plan.unroll + j) * TILE, TILE), masked)

    def step(index: Array, carry: None) -> None:
        if always or never:
            side_by_side(index, always)
            return carry
        # Only tiles that look back past the first key, or stand after the last one.
        first = (block * tiles + index * plan.unroll) * TILE + offset
        masked = first < plan.window - 1
        if plan.band.past_end:
            masked |= first + plan.unroll * TILE > plan.band.keys
        pl.when(masked)(lambda: side_by_side(index, True))
        pl.when(jnp.logical_not(masked))(lambda: side_by_side(index, False))
        return carry

    lax.fori_loop(0, tiles // plan.unroll, step, None)


def _forward_kernel(plan: Plan, *refs: Any) -> None:
    offset, (q, k, v, *segments, out, lse) = plan.band.take_offset(refs)
    block = pl.program_id(2)

    def tile(at: Array, masked: bool) -> None:
        own = _own(0)
        keys = pl.ds(at, plan.span)
        mask = None
        if masked:
            ids = (segments[0][0, pl.ds(at, TILE)], segments[1][0, :, keys]) if segments else None
            mask = repeat(_mask(plan, offset, block * (plan.block // TILE) + at // TILE, 0, own, ids), plan.heads, 0)
        own = repeat(own, plan.heads, 0)
        peaks, totals = [], []
        for head in range(0, plan.group, plan.heads):
            heads = slice(head, head + plan.heads)
            rows = q[0, 0, heads, pl.ds(at, TILE)].reshape(plan.heads * TILE, plan.head_dim)
            scores = _fold(plan, dot(rows, k[0, 0, keys], (1, 1)), 0, own) * (plan.scale * LOG2E)
            if mask is not None:
                scores = jnp.where(mask, scores, HIDDEN)
            peak = scores.max(1, keepdims=True)
            if plan.blind:
                peak = jnp.maximum(peak, FLOOR)
            weights = jnp.exp2(scores - peak)
            total = weights.sum(1, keepdims=True)
            sums = dot(_unfold(plan, weights, 0, own, v.dtype), v[0, 0, keys], (1, 0))
            safe = jnp.where(total == 0.0, 1.0, total) if plan.blind else total
            tile_out = (sums * (1.0 / safe)).astype(out.dtype)
            out[0, 0, heads, pl.ds(at, TILE)] = tile_out.reshape(plan.heads, TILE, plan.head_dim)
            for h in range(0, plan.heads * TILE, TILE):
                peaks.append(peak[h : h + TILE])
                totals.append(total[h : h + TILE])
        lse[0, 0, :, pl.ds(at, TILE)] = log_sum_exp2(peaks, totals)

    _over_tiles(plan, offset, block, tile)


def _overlapping(plan: Plan, leading: int, axis: int, shape: tuple[int, ...], last: int | None = None) -> pl.BlockSpec:
    """Blocks of `block` keys and the look-back before them: they overlap, so they are addressed by element.

    `last` is the last block there is, where the grid goes on after it.
    """
    size = plan.block + plan.back * TILE
    full = [size if dim == axis else n for dim, n in enumerate(shape)]
    block = tuple(pl.Element(n) for n in [1] * leading + full[leading:])

    def index(*grid: Array) -> tuple[Any, ...]:
        step = grid[2] if last is None else jnp.minimum(grid[2], last)
        return tuple(
            grid[dim] if dim < leading else step * plan.block if dim == axis else 0 for dim in range(len(shape))
        )

    return pl.BlockSpec(block, index)


def _row_block(plan: Plan, *, stats: bool = False, last: int | None = None) -> pl.BlockSpec:
    """Blocks of queries: [1, 1, G, block, D], or of one number a query, [1, 1, G, block]."""

    def step(i: Array) -> Array:
        return i if last is None else jnp.minimum(i, last)

    if stats:
        return pl.BlockSpec((1, 1, plan.group, plan.block), lambda b, h, i, *_: (b, h, 0, step(i)))
    return pl.BlockSpec((1, 1, plan.group, plan.block, plan.head_dim), lambda b, h, i, *_: (b, h, 0, step(i), 0))


def forward(
    plan: Plan, offsets: Array | None, q: Array, k: Array, v: Array, segments: tuple[Array, Array] | None
) -> tuple[Array, Array]:
    """Returns (out [B, K, G, T, D], base-2 lse float32 [B, K, G, T]).

    q [B, K, G, T, D]; k, v [B, K, m * 128 + T, D]; segments (queries' int32 [B, T, 1], keys' int32 [B, 1, m * 128 + T]);
    offsets int32 [B] where the plan has none.
    """
    batch, kv_heads, group, length, _ = q.shape
    kv = _overlapping(plan, 2, 2, k.shape)
    in_specs, inputs = [_row_block(plan), kv, kv], [q, k, v]
    if segments is not None:
        in_specs += [
            pl.BlockSpec((1, plan.block, 1), lambda b, h, i, *_: (b, i, 0)),
            _overlapping(plan, 1, 2, (batch, 1, k.shape[2])),
        ]
        inputs += segments
    return plan.band.pallas_call(
        functools.partial(_forward_kernel, plan),
        offsets,
        inputs,
        grid=(batch, kv_heads, length // plan.block),
        in_specs=in_specs,
        out_specs=[_row_block(plan), _row_block(plan, stats=True)],
        out_shape=[
            jax.ShapeDtypeStruct(q.shape, q.dtype),
            jax.ShapeDtypeStruct((batch, kv_heads, group, length), jnp.float32),
        ],
        compiler_params=compiler_params(PARALLEL, PARALLEL, PARALLEL),
        cost_estimate=cost(batch * kv_heads * plan.group * length * plan.span, 2, plan.head_dim, inputs),
        interpret=plan.interpret,
        name="window_attention_forward",
    )


def _backward_kernel(plan: Plan, num_blocks: int, *refs: Any) -> None:
    offset, others = plan.band.take_offset(refs)
    q, d_out, lse, shift, k, v, *segments, d_q, d_k, d_v, carry_k, carry_v = others
    block = pl.program_id(2)

    @pl.when(block == 0)
    def _() -> None:
        carry_k[...] = jnp.zeros_like(carry_k)
        carry_v[...] = jnp.zeros_like(carry_v)

    def tile(at: Array, masked: bool) -> None:
        own = _own(1)
        keys, queries = pl.ds(at, plan.span), pl.ds(at, TILE)
        mask = None
        if masked:
            ids = (segments[1][0, keys], segments[0][0, :, queries]) if segments else None
            mask = repeat(_mask(plan, offset, block * (plan.block // TILE) + at // TILE, 1, own, ids), plan.heads, 1)
        own = repeat(own, plan.heads, 1)
        k_span, v_span = k[0, 0, keys], v[0, 0, keys]
        key_grads = value_grads = jnp.zeros((plan.span, plan.head_dim), jnp.float32)
        for head in range(0, plan.group, plan.heads):
            heads = slice(head, head + plan.heads)
            rows, d_rows = (x[0, 0, heads, queries].reshape(plan.heads * TILE, plan.head_dim) for x in (q, d_out))
            lse_row, shift_row = (
                jnp.concatenate([x[0, 0, h : h + 1, queries] for h in range(head, head + plan.heads)], 1)
                for x in (lse, shift)
            )
            # Transposed, [keys, rows]: the two numbers a query has are then a row, which every sublane reads for free.
            scores = _fold(plan, dot(k_span, rows, (1, 1)), 1, own) * (plan.scale * LOG2E)
            if mask is not None:
                scores = jnp.where(mask, scores, HIDDEN)
            weights = jnp.exp2(scores - lse_row)
            d_scores = weights * (_fold(plan, dot(v_span, d_rows, (1, 1)), 1, own) - shift_row)
            weights = _unfold(plan, weights, 1, own, q.dtype)
            d_scores = _unfold(plan, d_scores, 1, own, q.dtype)
            value_grads += dot(weights, d_rows, (1, 0))
            key_grads += dot(d_scores, rows, (1, 0))
            query_grads = (dot(d_scores, k_span, (0, 0)) * plan.scale).astype(d_q.dtype)
            d_q[0, 0, heads, queries] = query_grads.reshape(plan.heads, TILE, plan.head_dim)
        _hand_on(plan, carry_k, key_grads, d_k, at, plan.scale)
        _hand_on(plan, carry_v, value_grads, d_v, at, 1.0)

    @pl.when(block < num_blocks)
    def _() -> None:
        _over_tiles(plan, offset, block, tile)

    # One step past the end: the last key tiles have seen all their queries and are still in the carry.
    @pl.when(block == num_blocks)
    def _() -> None:
        d_k[0, 0, : plan.back * TILE] = (carry_k[...] * plan.scale).astype(d_k.dtype)
        d_v[0, 0, : plan.back * TILE] = carry_v[...].astype(d_v.dtype)


def _hand_on(plan: Plan, carry: Any, grads: Array, out: Any, at: Array, scale: float) -> None:
    """Adds a query tile's gradients to those of its span. The oldest key tile is then complete, the others are handed on."""
    kept = plan.back * TILE
    total = carry[...] + grads[:kept]
    out[0, 0, pl.ds(at, TILE)] = (total[:TILE] * scale).astype(out.dtype)
    if plan.back > 1:
        carry[: kept - TILE] = total[TILE:]
    carry[kept - TILE :] = grads[kept:]


def backward(
    plan: Plan,
    offsets: Array | None,
    q: Array,
    d_out: Array,
    lse: Array,
    shift: Array,
    k: Array,
    v: Array,
    segments: tuple[Array, Array] | None,
) -> tuple[Array, Array, Array]:
    """Returns (d_q [B, K, G, T, D], d_k and d_v [B, K, m * 128 + T, D], laid out as k).

    lse is base-2, +large where a query sees nothing; shift is `d_out . out - d_lse`; both float32 [B, K, G, T].
    segments is (queries' int32 [B, 1, T], keys' int32 [B, m * 128 + T, 1]): the forward's, transposed. offsets as there.
    """
    batch, kv_heads, _, length, _ = q.shape
    num_blocks = length // plan.block
    last = num_blocks - 1
    kv = _overlapping(plan, 2, 2, k.shape, last)
    rows, stats = _row_block(plan, last=last), _row_block(plan, stats=True, last=last)
    in_specs, inputs = [rows, rows, stats, stats, kv, kv], [q, d_out, lse, shift, k, v]
    if segments is not None:
        in_specs += [
            pl.BlockSpec((1, 1, plan.block), lambda b, h, i, *_: (b, 0, jnp.minimum(i, last))),
            _overlapping(plan, 1, 1, (batch, k.shape[2], 1), last),
        ]
        inputs += segments
    # A key tile is complete `back` tiles after its own query tile, and is written there: the array comes out already padded
    # in front as k is. What the block of the extra step holds past the carry is never read.
    kv_grads = pl.BlockSpec((1, 1, plan.block, plan.head_dim), lambda b, h, i, *_: (b, h, i, 0))
    kv_shape = jax.ShapeDtypeStruct((batch, kv_heads, length + plan.block, plan.head_dim), k.dtype)
    carry = pltpu.VMEM((plan.back * TILE, plan.head_dim), jnp.float32)
    d_q, d_k, d_v = plan.band.pallas_call(
        functools.partial(_backward_kernel, plan, num_blocks),
        offsets,
        inputs,
        grid=(batch, kv_heads, num_blocks + 1),
        in_specs=in_specs,
        out_specs=[rows, kv_grads, kv_grads],
        out_shape=[jax.ShapeDtypeStruct(q.shape, q.dtype), kv_shape, kv_shape],
        scratch_shapes=[carry, carry],
        compiler_params=compiler_params(PARALLEL, PARALLEL, IN_ORDER),
        cost_estimate=cost(batch * kv_heads * plan.group * length * plan.span, 5, plan.head_dim, inputs),
        interpret=plan.interpret,
        name="window_attention_backward",
    )
    return d_q, d_k[:, :, : k.shape[2]], d_v[:, :, : k.shape[2]]
