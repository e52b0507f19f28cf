"""The TPU kernel of paged attention: one loop over items of work, its pages fetched by double-buffered copies.

An item is some consecutive rows of one sequence. While a block of its pages is in the matrix unit, the next block is on its way
from HBM: the next pages of the item or, at its end, the first ones of the next item, so that short sequences and windows of
a page or two wait no more than long ones. Pages left of the window or past the last row are not fetched.

A block is folded tile by tile into a running softmax (Dao et al. 2022, arXiv:2205.14135), in base 2. There are two paths. Short
items (a decode row, verified drafts) take all heads side by side, so that their small products overlap. Long items lay the
rows of a group's heads under each other, head by head, and take one kv head at a time.
"""

import dataclasses
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
    TILE,
    compiler_params,
    dot,
    heads_at_once,
    iota,
    repeat,
)
from pallas_kernels.paged_attention.pages import Items, Pages


class Plan(NamedTuple):
    """What is static in one call."""

    window: int | None
    scale: float
    group: int
    page_size: int
    table_width: int
    few: int  # most queries of a short item
    many: int  # of a long one
    tile: int  # keys of one tile of scores; whole pages, and a multiple of 128
    keys: int  # keys of a block; whole tiles
    interpret: bool

    @property
    def padded(self) -> int:
        """Query heads on a kv head, as they lie in memory."""
        return -(-self.group // 8) * 8

    @property
    def height(self) -> int:
        """Most rows of a tile of scores."""
        return max(self.few * self.padded, self.many * self.group if self.many > self.few else 0)


class _Refs(NamedTuple):
    """The kernel's arguments, in their order. `scales`, `held_scales`: of k and v, or nothing."""

    count: Any
    table: Any
    items: Items
    q: Any
    kv: Any
    scales: Any
    out: Any
    q_rows: Any  # float32 [2, many, K, padded, D]
    out_rows: Any  # float32 [many, K, padded, D]
    long_rows: Any  # [K, group many, D], what is multiplied of a long item
    held: Any  # k, v [2, K, keys, D]
    held_scales: Any  # float32 [2, pages of a block, K, page_size]
    peaks: Any  # float32 [K, height, 128], every lane the same
    totals: Any  # float32 [K, height, 128], each lane the sum of its own columns
    sums: Any  # float32 [K, height, D]
    q_arrived: Any
    kv_arrived: Any
    out_left: Any


# Copies. What is waited for is what was started: both sides compute it from the item.


def _pages_of(plan: Plan, refs: _Refs, item: Array, block: Array) -> tuple[Array, Array]:
    """(number of the block's first page in its sequence, how many pages of it hold a key that the item sees)."""
    first = refs.items.low[item] // plan.page_size + block * (plan.keys // plan.page_size)
    end = (refs.items.high[item] + plan.page_size - 1) // plan.page_size
    return first, jnp.clip(end - first, 0, plan.keys // plan.page_size)


def _blocks_of(plan: Plan, refs: _Refs, item: Array) -> Array:
    """Blocks of the item; one that sees nothing has one block, without pages."""
    low, high = refs.items.low[item], refs.items.high[item]
    return jnp.maximum(1, (high - low // plan.page_size * plan.page_size + plan.keys - 1) // plan.keys)


def _loop(low: Array | int, high: Array | int, body: Callable[[Array], None]) -> None:
    def step(i: Array, carry: None) -> None:
        body(i)
        return carry

    lax.fori_loop(low, high, step, None)


def _copy_pages(plan: Plan, refs: _Refs, item: Array, block: Array, slot: Array, act: str) -> None:
    """Starts the copies of a block into `slot`, or waits for them."""
    first, count = _pages_of(plan, refs, item, block)
    row, place = refs.items.sequence[item] * plan.table_width, first % plan.table_width

    def page(i: Array) -> None:
        # A block has at most one page more than the table, so it wraps once.
        at = place + i
        number = refs.table[row + jnp.where(at < plan.table_width, at, at - plan.table_width)]
        at = pl.ds(pl.multiple_of(i * plan.page_size, plan.page_size), plan.page_size)
        pairs = [(x.at[number], held.at[slot, :, at]) for x, held in zip(refs.kv, refs.held, strict=True)]
        pairs += [(x.at[number], held.at[slot, i]) for x, held in zip(refs.scales, refs.held_scales, strict=True)]
        for source, target in pairs:
            getattr(pltpu.make_async_copy(source, target, refs.kv_arrived.at[slot]), act)()

    _loop(0, count, page)


def _copy_queries(refs: _Refs, item: Array, slot: Array, act: str) -> None:
    first = refs.items.first[item]

    def row(i: Array) -> None:
        getattr(pltpu.make_async_copy(refs.q.at[first + i], refs.q_rows.at[slot, i], refs.q_arrived.at[slot]), act)()

    _loop(0, refs.items.rows[item], row)


def _copy_out(refs: _Refs, first: Array | int, rows: Array, act: str) -> None:
    def row(i: Array) -> None:
        getattr(pltpu.make_async_copy(refs.out_rows.at[i], refs.out.at[first + i], refs.out_left), act)()

    _loop(0, rows, row)


# Arithmetic.


def _lanes(x: Array, width: int) -> Array:
    """A column that is the same in all 128 lanes, widened or narrowed."""
    return x[:, :width] if width < TILE else repeat(x, width // TILE, 1)


def _clear_values(plan: Plan, refs: _Refs, item: Array, first_key: Array, end: Array, slot: Array) -> None:
    """Zeroes the values before place `end` whose keys no row of the item sees, left-overs among them: 0 * NaN is NaN."""
    values = refs.held[1]
    low, high = refs.items.low[item] - first_key, refs.items.high[item] - first_key

    def chunk(i: Array) -> None:
        at = pl.ds(pl.multiple_of(i * TILE, TILE), TILE)
        place = i * TILE + lax.broadcasted_iota(jnp.int32, (1, TILE, values.shape[3]), 1)
        old = values[slot, :, at]
        kept = jnp.where((low <= place) & (place < high), old.astype(jnp.float32), 0.0)
        values[slot, :, at] = kept.astype(old.dtype)

    _loop(0, (jnp.maximum(low, 0) + TILE - 1) // TILE, chunk)
    _loop(jnp.maximum(high, 0) // TILE, end // TILE, chunk)


def _scale_row(plan: Plan, held: Any, slot: Array, at: Array, head: Array | int) -> Array:
    """float32 [1, tile]: one number a key."""
    first = at // plan.page_size
    pages = [held[slot, first + i, pl.ds(head, 1)] for i in range(plan.tile // plan.page_size)]
    return pages[0] if len(pages) == 1 else jnp.concatenate(pages, 1)


def _fold(
    plan: Plan,
    refs: _Refs,
    item: Array,
    slot: Array,
    first_key: Array,
    at: Array,
    head: Any,
    rows: Array,
    long: bool,
    masked: bool,
) -> None:
    """Folds one tile of keys into the softmax of one kv head.

    rows [R, D], of a `long` item head by head, of a short one query by query; `first_key` is the block's, `at` the
    tile's place in it; `masked` unless every row sees all its keys.
    """
    kept = pl.ds(0, rows.shape[0])
    low, high = refs.items.low[item], refs.items.high[item]
    key = first_key + at + iota((1, plan.tile), 1)
    k, v = (held[slot, head, pl.ds(at, plan.tile)].astype(rows.dtype) for held in refs.held)
    scores = dot(rows, k, (1, 1)) * (plan.scale * LOG2E)
    if refs.scales:
        scores = scores * _scale_row(plan, refs.held_scales[0], slot, at, head)
    if masked:
        row = iota((rows.shape[0], 1), 0)
        query = refs.items.position[item] + (row % plan.many if long else row // plan.padded)
        live = (key <= query) & (key >= low)
        if plan.window is not None:
            live &= key > query - plan.window
        scores = jnp.where(live, scores, HIDDEN)
    old = refs.peaks[head, kept]
    new = jnp.maximum(old, scores.max(1, keepdims=True))
    weights = jnp.exp2(scores - _lanes(new, plan.tile))
    decay = jnp.exp2(old - new)
    refs.peaks[head, kept] = new
    parts = (weights[:, c : c + TILE] for c in range(0, plan.tile, TILE))
    refs.totals[head, kept] = refs.totals[head, kept] * decay + functools.reduce(jnp.add, parts)
    if refs.scales:
        scale = _scale_row(plan, refs.held_scales[1], slot, at, head)
        weights = weights * (jnp.where((low <= key) & (key < high), scale, 0.0) if masked else scale)
    update = dot(weights.astype(rows.dtype), v, (1, 0))
    refs.sums[head, kept] = refs.sums[head, kept] * _lanes(decay, rows.shape[1]) + update


def _result(plan: Plan, refs: _Refs, head: Any, height: int) -> Array:
    """float32 [R, D] of one kv head."""
    kept = pl.ds(0, height)
    total = refs.totals[head, kept].sum(1, keepdims=True)
    return refs.sums[head, kept] * (1.0 / jnp.where(total == 0.0, 1.0, total))


def _short_rows(plan: Plan, refs: _Refs, query_slot: Array, head: Any) -> Array:
    rows = refs.q_rows[query_slot, pl.ds(0, plan.few), head]
    return rows.reshape(plan.few * plan.padded, rows.shape[2]).astype(refs.long_rows.dtype)


def _each_head(plan: Plan, refs: _Refs, body: Callable[[Any], None]) -> None:
    """`body(head)` for every kv head, eight side by side."""
    kv_heads = refs.peaks.shape[0]
    at_once = heads_at_once(kv_heads, 8)

    def some(i: Array | int) -> None:
        for head in range(at_once):
            body(i * at_once + head)

    if kv_heads == at_once:
        some(0)
    else:
        _loop(0, kv_heads // at_once, some)


def _start(plan: Plan, refs: _Refs, item: Array, query_slot: Array) -> None:
    """Empty sums, and a long item's rows as they are multiplied."""

    def empty(head: Any, height: int) -> None:
        for ref, value in ((refs.peaks, FLOOR), (refs.totals, 0.0), (refs.sums, 0.0)):
            ref[head, pl.ds(0, height)] = jnp.full((height, ref.shape[2]), value)

    def short() -> None:
        _each_head(plan, refs, lambda head: empty(head, plan.few * plan.padded))

    def long() -> None:
        def head(h: Array) -> None:
            empty(h, plan.many * plan.group)
            for g in range(plan.group):
                rows = refs.q_rows[query_slot, :, h, g]
                refs.long_rows[h, pl.ds(g * plan.many, plan.many)] = rows.astype(refs.long_rows.dtype)

        _loop(0, refs.peaks.shape[0], head)

    _by_length(plan, refs, item, short, long)


def _by_length(plan: Plan, refs: _Refs, item: Array, short: Callable[[], None], long: Callable[[], None]) -> None:
    if plan.many == plan.few:
        return short()
    is_short = refs.items.rows[item] <= plan.few
    pl.when(is_short)(short)
    pl.when(jnp.logical_not(is_short))(long)
    return None


def _over_tiles(plan: Plan, refs: _Refs, item: Array, block: Array, slot: Array, query_slot: Array) -> None:
    """Folds the block's tiles, as far as it has pages."""
    first, count = _pages_of(plan, refs, item, block)
    first_key = first * plan.page_size
    tiles = (count * plan.page_size + plan.tile - 1) // plan.tile
    if refs.held[1].dtype != jnp.int8:  # which has no NaN; its scales do not outlive a masked weight
        _clear_values(plan, refs, item, first_key, tiles * plan.tile, slot)
    fold = functools.partial(_fold, plan, refs, item, slot, first_key)

    def short() -> None:
        def tile(u: Array) -> None:
            at = pl.multiple_of(u * plan.tile, plan.tile)
            _each_head(plan, refs, lambda head: fold(at, head, _short_rows(plan, refs, query_slot, head), False, True))

        _loop(0, tiles, tile)

    def long() -> None:
        # Every row sees every key of the tiles between the window's edge and the diagonal.
        position, low = refs.items.position[item], refs.items.low[item]
        if plan.window is not None:
            low = jnp.maximum(low, position + refs.items.rows[item] - plan.window)

        def tile(i: Array) -> None:
            head, at = i // tiles, pl.multiple_of(i % tiles * plan.tile, plan.tile)
            rows, key = refs.long_rows[head], first_key + at
            clear = (low <= key) & (key + plan.tile <= position + 1)
            pl.when(clear)(lambda: fold(at, head, rows, True, False))
            pl.when(jnp.logical_not(clear))(lambda: fold(at, head, rows, True, True))

        _loop(0, tiles * refs.peaks.shape[0], tile)

    _by_length(plan, refs, item, short, long)


def _finish(plan: Plan, refs: _Refs, item: Array) -> None:
    """Writes the item's rows to `out_rows`."""

    def short() -> None:
        def head(h: Any) -> None:
            rows = _result(plan, refs, h, plan.few * plan.padded)
            refs.out_rows[pl.ds(0, plan.few), h] = rows.reshape(plan.few, plan.padded, rows.shape[1])

        _each_head(plan, refs, head)

    def long() -> None:
        def head(h: Array) -> None:
            rows = _result(plan, refs, h, plan.many * plan.group)
            for g in range(plan.group):
                refs.out_rows[:, h, g] = rows[g * plan.many : (g + 1) * plan.many]

        _loop(0, refs.peaks.shape[0], head)

    _by_length(plan, refs, item, short, long)


def _kernel(plan: Plan, quantized: bool, *args: Any) -> None:
    rest = list(args)

    def take(count: int) -> list[Any]:
        taken, rest[:count] = rest[:count], []
        return taken

    pair = 2 if quantized else 0
    fields = [*take(2), Items(*take(len(Items._fields))), *take(1), take(2), take(pair), *take(4), take(2), take(pair)]
    refs = _Refs._make([*fields, *rest])
    count = refs.count[0]

    def item(i: Array, carry: tuple[Array, Array]) -> tuple[Array, Array]:
        step, rows_leaving = carry
        query_slot = i % 2
        _copy_queries(refs, i, query_slot, "wait")
        _start(plan, refs, i, query_slot)
        blocks = _blocks_of(plan, refs, i)

        def block(j: Array, step: Array) -> Array:
            slot, is_last = step % 2, j == blocks - 1
            next_item = jnp.where(is_last, i + 1, i)

            @pl.when(next_item < count)
            def _() -> None:
                _copy_pages(plan, refs, next_item, jnp.where(is_last, 0, j + 1), 1 - slot, "start")

            @pl.when(is_last & (i + 1 < count))
            def _() -> None:
                _copy_queries(refs, i + 1, 1 - query_slot, "start")

            _copy_pages(plan, refs, i, j, slot, "wait")
            _over_tiles(plan, refs, i, j, slot, query_slot)
            return step + 1

        step = lax.fori_loop(0, blocks, block, step)
        _copy_out(refs, 0, rows_leaving, "wait")
        _finish(plan, refs, i)
        _copy_out(refs, refs.items.first[i], refs.items.rows[i], "start")
        return step, refs.items.rows[i]

    @pl.when(count > 0)
    def _() -> None:
        zero = jnp.int32(0)
        _copy_queries(refs, zero, zero, "start")
        _copy_pages(plan, refs, zero, zero, zero, "start")
        _, rows_leaving = lax.fori_loop(0, count, item, (zero, zero))
        _copy_out(refs, 0, rows_leaving, "wait")


def paged_attention(plan: Plan, items: Items, count: Array, q: Array, pages: Pages, dtype: Any) -> Array:
    """Returns float32 [N, K, padded, D]; rows of no item are not written.

    q float32 [N, K, padded, D]; `dtype` is what its product with the keys takes. Table entries must be pages that exist.
    """
    kv_heads, head_dim = q.shape[1], q.shape[3]
    scales = [] if pages.k_scales is None else [pages.k_scales, pages.v_scales]
    scalars = [count.reshape(1), pages.table.reshape(-1), *items]
    in_memory = pl.BlockSpec(memory_space=pl.ANY)
    column = pltpu.VMEM((kv_heads, plan.height, TILE), jnp.float32)
    held = pltpu.VMEM((2, kv_heads, plan.keys, head_dim), pages.k.dtype)
    held_scales = pltpu.VMEM((2, plan.keys // plan.page_size, kv_heads, plan.page_size), jnp.float32)
    return pl.pallas_call(
        functools.partial(_kernel, plan, bool(scales)),
        grid=(1,),
        in_specs=[pl.BlockSpec(memory_space=pltpu.SMEM)] * len(scalars) + [in_memory] * (3 + len(scales)),
        out_specs=in_memory,
        out_shape=jax.ShapeDtypeStruct(q.shape, jnp.float32),
        scratch_shapes=[
            pltpu.VMEM((2, plan.many, *q.shape[1:]), jnp.float32),
            pltpu.VMEM((plan.many, *q.shape[1:]), jnp.float32),
            pltpu.VMEM((kv_heads, plan.many * plan.group, head_dim), dtype),
            *[held] * 2,
            *[held_scales] * len(scales),
            *[column] * 2,
            pltpu.VMEM((kv_heads, plan.height, head_dim), jnp.float32),
            pltpu.SemaphoreType.DMA((2,)),
            pltpu.SemaphoreType.DMA((2,)),
            pltpu.SemaphoreType.DMA,
        ],
        # Every number of a page is inside the pool, every row inside the axis: checks would double the cost of a copy.
        compiler_params=dataclasses.replace(compiler_params(IN_ORDER), disable_bounds_checks=True),
        interpret=plan.interpret,
        name="paged_attention",
    )(*scalars, q, pages.k, pages.v, *scales)
