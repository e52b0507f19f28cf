"""Causal attention over all keys, or under a window too wide for one pass: FlashAttention, forward and backward.

Forward (Dao et al. 2022, arXiv:2205.14135): a running maximum and rescaled sums over tiles of keys. Only tiles that cross the
diagonal or the window's edge are masked; the rest run a body without any mask arithmetic, and tiles outside the band run none.

Backward in one kernel, five products a tile where the usual pair of kernels takes seven: query blocks are the outer loop, and
the gradients of a chunk of keys stay on chip in float32 all the while. Grouped queries make that cheap, as the chunk is one kv
head's and every head of the group adds to it. Several chunks of keys are several calls, each adding to d_q in place.

The kernels' layout is q [B, K, G, T, D] with the G heads of a group together, k and v [B, K, S, D]. Query i of row b stands at
key `offset[b] + i`: a static number, or one a row of the batch in scalar memory, from which the index maps pick what is fetched.
"""

import functools
from collections.abc import Callable
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
    iota,
    log_sum_exp2,
    repeat,
)
from pallas_kernels.attention.tuned import Tiles


class Plan(NamedTuple):
    """What is static in one call. T is already a multiple of `rows`, and S of `block`."""

    window: int | None
    scale: float
    group: int
    head_dim: int
    band: Band
    rows: int  # queries of one grid step
    keys: int  # keys of one tile of scores
    block: int  # forward: keys that one grid step fetches. Backward: keys of one chunk
    segmented: bool
    interpret: bool

    @property
    def height(self) -> int:
        """Rows of the tile of scores: every head of the group."""
        return self.group * self.rows


def make_plan(
    band: Band,
    group: int,
    head_dim: int,
    window: int | None,
    scale: float,
    segmented: bool,
    backward: bool,
    tiles: Tiles,
    interpret: bool,
) -> Plan:
    keys = min(tiles.flash_keys, ceil_to(band.keys, TILE))
    padded = ceil_to(band.keys, keys)
    rows = min((tiles.flash_rows_backward if backward else tiles.flash_rows) // group, ceil_to(band.queries, TILE))
    rows = max(n for n in range(TILE, keys + 1, TILE) if keys % n == 0 and n <= max(rows, TILE))
    most = tiles.flash_chunk if backward else tiles.flash_block
    count = -(-padded // most)
    block = ceil_to(-(-padded // count), keys)
    return Plan(window, scale, group, head_dim, band, rows, keys, block, segmented, interpret)


def padding(plan: Plan) -> tuple[int, int]:
    """(rows to put after the last query, and after the last key)."""
    queries, keys = plan.band.queries, plan.band.keys
    return ceil_to(queries, plan.rows) - queries, ceil_to(keys, plan.block) - keys


def _over_tiles(plan: Plan, first_query: Array, first_key: Array | int, body: Callable[[Array, bool], None]) -> None:
    """Runs `body(u, masked)` for each tile u of the keys that the query block sees; `masked` where a score may be dead."""
    tiles, last_query = plan.block // plan.keys, first_query + plan.rows - 1

    def floor(key: Array) -> Array:
        return (key - first_key) // plan.keys

    # Beyond the last key there is only padding.
    last_key = jnp.minimum(last_query, plan.band.keys - 1) if plan.band.past_end else last_query
    end = jnp.clip(floor(last_key) + 1, 0, tiles)
    start = jnp.int32(0) if plan.window is None else jnp.clip(floor(first_query - plan.window + 1), 0, end)

    def run(low: Array, high: Array, masked: bool, shift: Callable[[Array], Array] = lambda u: u) -> None:
        def step(u: Array, carry: None) -> None:
            body(shift(u), masked)
            return carry

        lax.fori_loop(low, high, step, None)

    if plan.segmented:
        return run(start, end, True)
    # Tiles start .. left cross the window's edge, left .. right are clear, right .. end cross the diagonal.
    left = start
    if plan.window is not None:
        left = jnp.clip(-((first_key - (last_query - plan.window + 1)) // plan.keys), start, end)
    clear = jnp.minimum(first_query + 1, plan.band.keys) if plan.band.past_end else first_query + 1
    right = jnp.clip(floor(clear), left, end)
    run(left, right, False)
    # One loop for both edges: the body is long, and a second copy of it would be compiled for nothing.
    run(start, end - right + left, True, lambda u: jnp.where(u < left, u, u + right - left))
    return None


def _mask(plan: Plan, axis: int, first_query: Array, first_key: Array, segments: tuple[Array, Array] | None) -> Array:
    """bool of one head's scores; `axis` is where the queries stand: 0 forward, 1 backward. Segments: ids as (column, row)."""
    shape = (plan.rows, plan.keys) if axis == 0 else (plan.keys, plan.rows)
    distance = iota(shape, axis) - iota(shape, 1 - axis) + (first_query - first_key)
    live = distance >= 0
    if plan.window is not None:
        live &= distance < plan.window
    if plan.band.past_end:
        live &= iota(shape, 1 - axis) < plan.band.keys - first_key
    if segments is not None:
        live &= segments[0] == segments[1]
    return live


def _lanes(x: Array, width: int) -> Array:
    """A column that is the same in all 128 lanes, widened or narrowed."""
    return x[:, :width] if width < TILE else repeat(x, width // TILE, 1)


def _first_block(plan: Plan, first_query: Array) -> Array | int:
    if plan.window is None:
        return 0
    return jnp.clip(first_query - plan.window + 1, 0, plan.band.keys - 1) // plan.block


def _forward_kernel(plan: Plan, num_key_blocks: int, *refs: Any) -> None:
    offset, (q, k, v, *segments, out, lse, peaks, totals, sums) = plan.band.take_offset(refs)
    step = pl.program_id(3)
    first_query = pl.program_id(2) * plan.rows + offset
    first_key = (_first_block(plan, first_query) + step) * plan.block

    @pl.when(step == 0)
    def _() -> None:
        peaks[...] = jnp.full_like(peaks, FLOOR)
        totals[...] = jnp.zeros_like(totals)
        sums[...] = jnp.zeros_like(sums)

    def tile(u: Array, masked: bool) -> None:
        at = pl.multiple_of(u * plan.keys, plan.keys)
        keys = pl.ds(at, plan.keys)
        rows = q[0, 0].reshape(plan.height, plan.head_dim)
        scores = dot(rows, k[0, 0, keys], (1, 1)) * (plan.scale * LOG2E)
        if masked:
            ids = (segments[0][0], segments[1][0, :, keys]) if segments else None
            live = _mask(plan, 0, first_query, first_key + at, ids)
            scores = jnp.where(repeat(live, plan.group, 0), scores, HIDDEN)
        old = peaks[...]
        new = jnp.maximum(old, scores.max(1, keepdims=True))
        weights = jnp.exp2(scores - _lanes(new, plan.keys))
        decay = jnp.exp2(old - new)
        peaks[...] = new
        # Each lane sums its own columns; the lanes are added up once, at the end.
        parts = (weights[:, at : at + TILE] for at in range(0, plan.keys, TILE))
        totals[...] = totals[...] * decay + functools.reduce(jnp.add, parts)
        update = dot(weights.astype(v.dtype), v[0, 0, keys], (1, 0))
        sums[...] = sums[...] * _lanes(decay, plan.head_dim) + update

    _over_tiles(plan, first_query, first_key, tile)

    @pl.when(step == num_key_blocks - 1)
    def _() -> None:
        total = totals[...].sum(1, keepdims=True)
        safe = jnp.where(total == 0.0, 1.0, total) if plan.segmented or plan.band.blind(plan.window) else total
        out[0, 0] = (sums[...] * (1.0 / safe)).astype(out.dtype).reshape(plan.group, plan.rows, plan.head_dim)
        for at in range(0, plan.rows, TILE):
            columns = [pl.ds(head * plan.rows + at, TILE) for head in range(plan.group)]
            column_totals = [totals[c].sum(1, keepdims=True) for c in columns]
            lse[0, 0, :, at : at + TILE] = log_sum_exp2([peaks[c] for c in columns], column_totals)


def _num_scores(plan: Plan, first_key: int, end: int) -> int:
    """Scores of one kv head that the tiles run between these keys hold."""
    tiles, offset = 0, plan.band.expected
    for start in range(offset, offset + plan.band.queries, plan.rows):
        seen = 0 if plan.window is None else start + 1 - plan.window  # the first key that the first query sees
        first, last = max(seen, first_key) // plan.keys, min(start + plan.rows, end)
        tiles += max(0, -(-last // plan.keys) - max(first, first_key // plan.keys))
    return tiles * plan.keys * plan.height


def forward(
    plan: Plan, offsets: Array | None, q: Array, k: Array, v: Array, segments: tuple[Array, Array] | None
) -> tuple[Array, Array]:
    """Returns (out [B, K, G, T, D], base-2 lse float32 [B, K, G, T]).

    q [B, K, G, T, D]; k, v [B, K, S, D]; segments (queries' int32 [B, T, 1], keys' int32 [B, 1, S]); offsets int32 [B] where
    the plan has none.
    """
    batch, kv_heads, group, length, head_dim = q.shape
    last_block = k.shape[2] // plan.block - 1
    num_blocks = last_block + 1
    if plan.band.offset is not None:
        num_blocks = min(num_blocks, max(1, -(-(plan.band.offset + plan.band.queries) // plan.block)))
    if plan.window is not None:
        num_blocks = min(num_blocks, -(-(plan.rows + plan.window - 2) // plan.block) + 1)

    def key_block(b: Array, i: Array, j: Array, *offsets: Any) -> Array:
        # A step past the diagonal asks for the block that is already there, so nothing is fetched.
        first = i * plan.rows + plan.band.offset_of(b, *offsets)
        last = jnp.clip((first + plan.rows - 1) // plan.block, 0, last_block)
        return jnp.minimum(_first_block(plan, first) + j, last)

    rows = pl.BlockSpec((1, 1, group, plan.rows, head_dim), lambda b, h, i, j, *_: (b, h, 0, i, 0))
    keys = pl.BlockSpec((1, 1, plan.block, head_dim), lambda b, h, i, j, *o: (b, h, key_block(b, i, j, *o), 0))
    in_specs, inputs = [rows, keys, keys], [q, k, v]
    if segments is not None:
        in_specs += [
            pl.BlockSpec((1, plan.rows, 1), lambda b, h, i, j, *_: (b, i, 0)),
            pl.BlockSpec((1, 1, plan.block), lambda b, h, i, j, *o: (b, 0, key_block(b, i, j, *o))),
        ]
        inputs += segments
    column = pltpu.VMEM((plan.height, TILE), jnp.float32)
    return plan.band.pallas_call(
        functools.partial(_forward_kernel, plan, num_blocks),
        offsets,
        inputs,
        grid=(batch, kv_heads, length // plan.rows, num_blocks),
        in_specs=in_specs,
        out_specs=[rows, pl.BlockSpec((1, 1, group, plan.rows), lambda b, h, i, j, *_: (b, h, 0, i))],
        out_shape=[
            jax.ShapeDtypeStruct(q.shape, q.dtype),
            jax.ShapeDtypeStruct((batch, kv_heads, group, length), jnp.float32),
        ],
        scratch_shapes=[column, column, pltpu.VMEM((plan.height, head_dim), jnp.float32)],
        compiler_params=compiler_params(PARALLEL, PARALLEL, PARALLEL, IN_ORDER),
        cost_estimate=cost(batch * kv_heads * _num_scores(plan, 0, k.shape[2]), 2, head_dim, inputs),
        interpret=plan.interpret,
        name="flash_attention_forward",
    )


class _Span(NamedTuple):
    """The query blocks that a chunk of keys is multiplied with: `num_blocks` grid steps from the first that sees any of it."""

    first_key: int
    every: bool  # from block 0: nobody else writes the gradients of queries that see none of the chunk
    num_blocks: int
    last_block: int  # of all queries

    def first_block(self, plan: Plan, offset: Any) -> Any:
        if self.every:
            return 0
        at = (self.first_key - offset) // plan.rows
        return min(max(at, 0), self.last_block) if isinstance(at, int) else jnp.clip(at, 0, self.last_block)


def _make_span(plan: Plan, chunk: int, count: int, every: bool) -> _Span:
    span = _Span(chunk * plan.block, every, count, count - 1)
    if every:
        return span
    if plan.band.offset is None:
        if plan.window is None:
            return span
        # The first block may begin up to rows - 1 queries before the first that sees the chunk.
        return span._replace(num_blocks=min(count, -(-(plan.block + plan.window - 2) // plan.rows) + 1))
    end = count * plan.rows
    if plan.window is not None:
        end = min(end, span.first_key + plan.block + plan.window - 1 - plan.band.offset)
    first = span.first_block(plan, plan.band.offset)
    return span._replace(num_blocks=max(1, -(-end // plan.rows) - first))


def _backward_kernel(plan: Plan, span: _Span, *refs: Any) -> None:
    offset, (q, d_out, lse, shift, k, v, *rest, d_q, d_k, d_v, sum_q, sum_k, sum_v) = plan.band.take_offset(refs)
    segments, earlier = (rest[:2], rest[2:]) if plan.segmented else ([], rest)
    block = pl.program_id(2)
    query_block = span.first_block(plan, offset) + block
    first_query = query_block * plan.rows + offset

    @pl.when(block == 0)
    def _() -> None:
        sum_k[...] = jnp.zeros_like(sum_k)
        sum_v[...] = jnp.zeros_like(sum_v)

    def row(ref: Any) -> Array:
        return jnp.concatenate([ref[0, 0, h : h + 1] for h in range(plan.group)], 1)

    def tile(u: Array, masked: bool) -> None:
        at = pl.multiple_of(u * plan.keys, plan.keys)
        keys = pl.ds(at, plan.keys)
        k_tile, v_tile = k[0, 0, keys], v[0, 0, keys]
        rows, d_rows = (x[0, 0].reshape(plan.height, plan.head_dim) for x in (q, d_out))
        # Transposed, [keys, rows]: the two numbers a query has are then a row, which every sublane reads for free.
        scores = dot(k_tile, rows, (1, 1)) * (plan.scale * LOG2E)
        if masked:
            ids = (segments[1][0, keys], segments[0][0]) if segments else None
            live = _mask(plan, 1, first_query, span.first_key + at, ids)
            scores = jnp.where(repeat(live, plan.group, 1), scores, HIDDEN)
        weights = jnp.exp2(scores - row(lse))
        d_scores = (weights * (dot(v_tile, d_rows, (1, 1)) - row(shift))).astype(q.dtype)
        # Sums stand transposed too, [D, .]: with D in rows a product fills all columns of the matrix unit, and D is half of them.
        sum_v[:, keys] += dot(d_rows, weights.astype(q.dtype), (0, 1))
        sum_k[:, keys] += dot(rows, d_scores, (0, 1))
        sum_q[...] += dot(k_tile, d_scores, (0, 0))

    def block_of_queries() -> None:
        sum_q[...] = jnp.zeros_like(sum_q)
        _over_tiles(plan, first_query, span.first_key, tile)
        query_grads = (sum_q[...].T * plan.scale).reshape(plan.group, plan.rows, plan.head_dim)
        if earlier:
            query_grads += earlier[0][0, 0]
        d_q[0, 0] = query_grads.astype(d_q.dtype)

    if plan.band.offset is not None:
        block_of_queries()
    else:
        # Steps after the last query block stay on it: its gradient is complete and must not be added again.
        pl.when(query_block <= span.last_block)(block_of_queries)

    @pl.when(block == span.num_blocks - 1)
    def _() -> None:
        d_k[0, 0] = (sum_k[...].T * plan.scale).astype(d_k.dtype)
        d_v[0, 0] = sum_v[...].T.astype(d_v.dtype)


def _backward_chunk(
    plan: Plan, offsets: Array | None, chunk: int, inputs: list[Array], d_q: Array | None
) -> tuple[Array, Array, Array]:
    """(d_q, d_k and d_v of the chunk of keys). Given d_q of other chunks, float32, this chunk's part is added to it in place."""
    q, k = inputs[0], inputs[4]
    batch, kv_heads, group, length, head_dim = q.shape
    span = _make_span(plan, chunk, length // plan.rows, every=d_q is None)

    def at(b: Array, i: Array, *offsets: Any) -> Array:
        return jnp.minimum(span.first_block(plan, plan.band.offset_of(b, *offsets)) + i, span.last_block)

    rows = pl.BlockSpec((1, 1, group, plan.rows, head_dim), lambda b, h, i, *o: (b, h, 0, at(b, i, *o), 0))
    stats = pl.BlockSpec((1, 1, group, plan.rows), lambda b, h, i, *o: (b, h, 0, at(b, i, *o)))
    keys = pl.BlockSpec((1, 1, plan.block, head_dim), lambda b, h, i, *_: (b, h, chunk, 0))
    in_specs = [rows, rows, stats, stats, keys, keys]
    if plan.segmented:
        in_specs += [
            pl.BlockSpec((1, 1, plan.rows), lambda b, h, i, *o: (b, 0, at(b, i, *o))),
            pl.BlockSpec((1, plan.block, 1), lambda b, h, i, *_: (b, chunk, 0)),
        ]
    aliases = {}
    if d_q is not None:
        aliases = {len(inputs) + (offsets is not None): 0}
        inputs, in_specs = [*inputs, d_q], [*in_specs, rows]
    kv_grads = pl.BlockSpec((1, 1, plan.block, head_dim), lambda b, h, i, *_: (b, h, 0, 0))
    kv_shape = jax.ShapeDtypeStruct((batch, kv_heads, plan.block, head_dim), k.dtype)
    kv_sum = pltpu.VMEM((head_dim, plan.block), jnp.float32)
    scores = _num_scores(plan, span.first_key, span.first_key + plan.block)
    return plan.band.pallas_call(
        functools.partial(_backward_kernel, plan, span),
        offsets,
        inputs,
        grid=(batch, kv_heads, span.num_blocks),
        in_specs=in_specs,
        out_specs=[rows, kv_grads, kv_grads],
        out_shape=[jax.ShapeDtypeStruct(q.shape, q.dtype if d_q is None else d_q.dtype), kv_shape, kv_shape],
        scratch_shapes=[pltpu.VMEM((head_dim, plan.height), jnp.float32), kv_sum, kv_sum],
        input_output_aliases=aliases,
        compiler_params=compiler_params(PARALLEL, PARALLEL, IN_ORDER),
        cost_estimate=cost(batch * kv_heads * scores, 5, head_dim, inputs),
        interpret=plan.interpret,
        name="flash_attention_backward",
    )


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
    """Returns (d_q [B, K, G, T, D], d_k and d_v [B, K, S, D]).

    lse is base-2, +large where a query sees nothing; shift is `d_out . out - d_lse`; both float32 [B, K, G, T].
    segments is (queries' int32 [B, 1, T], keys' int32 [B, S, 1]): the forward's, transposed. offsets as there.
    """
    inputs = [q, d_out, lse, shift, k, v, *(segments or ())]
    chunks = k.shape[2] // plan.block
    if chunks == 1:
        return _backward_chunk(plan, offsets, 0, inputs, None)
    d_q, key_grads, value_grads = jnp.zeros(q.shape, jnp.float32), [], []
    for chunk in range(chunks):
        d_q, d_k, d_v = _backward_chunk(plan, offsets, chunk, inputs, d_q)
        key_grads.append(d_k)
        value_grads.append(d_v)
    return d_q.astype(q.dtype), jnp.concatenate(key_grads, 2), jnp.concatenate(value_grads, 2)
