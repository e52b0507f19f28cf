"""Paged attention on NVIDIA GPUs, by Pallas's Triton lowering: one program an item of rows, a kv head and a part of the keys.

An item is some consecutive rows of one sequence; the heads of a group are rows of one product. Its pages are read where they
lie, a block of keys at a time, window's edge to diagonal, and folded into a running softmax. Where items and heads are too few
to fill a card, each item's keys are shared among several programs (flash decoding), whose results are weighed by
their log-sum-exp.
"""

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import Array, lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton

from pallas_kernels._select import target
from pallas_kernels._triton import product, whole
from pallas_kernels.paged_attention.pages import Items, Pages, make_items, rows_of_sequences

_HIDDEN = -1e30  # finite, so that a row that sees nothing has no inf - inf
_MAX_HEAD_DIM = 128
_HEIGHT = 64  # rows of a tile of scores, heads of the group included
_PROGRAMS = 264  # two on each of the 132 multiprocessors of an H100 or H200


class Plan(NamedTuple):
    """What is static in one call. rows: queries of an item; keys: of a block; parts: programs that share an item's keys."""

    window: int | None
    scale: float
    group: int
    rows: int
    keys: int
    parts: int
    interpret: bool


def unsupported(
    q: Array | None = None, pages: Pages | None = None, *, interpret: bool = False, named: bool = True
) -> str | None:
    """Returns why this implementation cannot serve a call, or None if it can. Without arrays: any call at all.

    Until it has run on a card, a call gets it by asking for "gpu" alone: not `named`, it serves nothing.
    """
    if not interpret and target() != "gpu":
        return "there is no GPU here; interpret=True runs the kernel on any backend"
    if not named:
        return "the Pallas kernel has not been timed on a card; implementation='gpu' asks for it"
    if q is None or pages is None:
        return None
    if q.shape[2] > _MAX_HEAD_DIM:
        return f"the GPU kernel takes head dimensions up to {_MAX_HEAD_DIM}, and this is {q.shape[2]}"
    if q.shape[1] // pages.k.shape[1] > _HEIGHT:
        return f"the GPU kernel takes at most {_HEIGHT} query heads on a kv head, and this is {q.shape[1] // pages.k.shape[1]}"
    if max(q.size, pages.k.size) >= 2**31:
        return f"the GPU kernel counts elements in 32 bits, and q, k_pages are {q.shape}, {pages.k.shape}"
    return None


@functools.partial(jax.jit, static_argnames=("window", "scale", "interpret"))
def paged_attention(
    q: Array, pages: Pages, query_starts: Array, lengths: Array, *, window: int | None, scale: float, interpret: bool
) -> Array:
    """Returns [N, H, D] in q's dtype. Arguments as `api.paged_attention`, already checked."""
    num_rows, num_heads, head_dim = q.shape
    kv_heads, group = pages.k.shape[1], num_heads // pages.k.shape[1]
    rows = max(1, min(_HEIGHT // group, -(-num_rows // lengths.shape[0])))
    items, _ = make_items(pages, query_starts, lengths, num_rows, rows, window)
    keys = (
        64 if q.dtype.itemsize == 2 else 32
    )  # two blocks of keys and values beside the queries in a card's shared memory
    seen = pages.slots if window is None else min(pages.slots, window + rows - 1)
    parts = max(1, min(_PROGRAMS // (items.first.shape[0] * kv_heads), seen // keys))
    plan = Plan(window, scale, group, rows, keys, parts, interpret)
    # A number out of range must not become an address.
    pages = pages._replace(table=jnp.clip(pages.table, 0, pages.k.shape[0] - 1))

    row = jnp.arange(rows)
    at = items.first[:, None] + row  # [I, rows]
    tiles = q.at[at].get(mode="clip").reshape(*at.shape, kv_heads, group, head_dim).swapaxes(1, 2)
    tiles = tiles.reshape(at.shape[0], kv_heads, rows * group, head_dim)
    height, width = (max(16, pl.next_power_of_2(n)) for n in (rows * group, head_dim))  # Triton's arrays
    tiles = jnp.pad(tiles, ((0, 0), (0, 0), (0, height - rows * group), (0, width - head_dim)))
    out, lse = _call(plan, items, tiles, pages)

    # A part that saw nothing weighs exp(-inf - peak) = 0; where none saw anything, all are zeros anyway.
    peak = lse.max(0)
    weights = jnp.exp(lse - jnp.where(jnp.isneginf(peak), 0, peak))
    total = weights.sum(0)
    out = (out * (weights / jnp.where(total == 0, 1, total))[..., None]).sum(0)[:, :, : rows * group, :head_dim]
    out = out.reshape(at.shape[0], kv_heads, rows, group, head_dim).swapaxes(1, 2).reshape(*at.shape, *q.shape[1:])
    at = jnp.where(row < items.rows[:, None], at, num_rows)
    out = jnp.zeros_like(q).at[at].set(out.astype(q.dtype), mode="drop")
    return jnp.where(rows_of_sequences(query_starts, num_rows)[:, None, None], out, 0)


def _call(plan: Plan, items: Items, q: Array, pages: Pages) -> tuple[Array, Array]:
    """(out float32 [parts, I, K, height, D], each part's own softmax, and its lse [parts, I, K, height])."""
    num_items, kv_heads, height, head_dim = q.shape
    held = [x for x in (pages.table, pages.k, pages.v, pages.k_scales, pages.v_scales) if x is not None]
    scalars = [items.sequence, items.position, items.low, items.high]
    result = jax.ShapeDtypeStruct((plan.parts, *q.shape), jnp.float32)
    lse = jax.ShapeDtypeStruct(result.shape[:-1], jnp.float32)
    return pl.pallas_call(
        functools.partial(_kernel, plan),
        grid=(num_items, kv_heads, plan.parts),
        in_specs=[
            *[pl.BlockSpec((None,), lambda i, h, p: (i,)) for _ in scalars],
            pl.BlockSpec((None, None, height, head_dim), lambda i, h, p: (i, h, 0, 0)),
            *[whole(x) for x in held],
        ],
        out_specs=[
            pl.BlockSpec((None, None, None, height, head_dim), lambda i, h, p: (p, i, h, 0, 0)),
            pl.BlockSpec((None, None, None, height), lambda i, h, p: (p, i, h, 0)),
        ],
        out_shape=[result, lse],
        compiler_params=triton.CompilerParams(num_warps=4, num_stages=2),
        interpret=plan.interpret,
        name="paged_attention",
    )(*scalars, q, *held)


def _kernel(plan: Plan, sequence_ref, position_ref, low_ref, high_ref, q_ref, table_ref, k_ref, v_ref, *refs) -> None:
    *scales, out_ref, lse_ref = refs
    sequence, low, high = sequence_ref[()], low_ref[()], high_ref[()]
    head, part, q = pl.program_id(1), pl.program_id(2), q_ref[...]
    page_size, head_dim = k_ref.shape[2:]
    height, width = q.shape
    position = position_ref[()] + lax.broadcasted_iota(jnp.int32, (height, plan.keys), 0) // plan.group
    channel = lax.broadcasted_iota(jnp.int32, (plan.keys, width), 1)

    def load(ref, page, slot, inside):
        """The keys' rows of a pool [keys, D] in q's dtype, zeros where nobody of the item sees the key: 0 * NaN is NaN."""
        rows = jnp.broadcast_to(page[:, None], channel.shape), head, jnp.broadcast_to(slot[:, None], channel.shape)
        kept = jnp.broadcast_to(inside[:, None], channel.shape) & (channel < head_dim)
        x = triton.load(ref.at[(*rows, jnp.minimum(channel, head_dim - 1))], mask=kept)
        return jnp.where(kept, x.astype(q.dtype), 0)

    def visit(block, carry):
        peak, total, out = carry
        key = block * plan.keys + lax.broadcasted_iota(jnp.int32, (plan.keys,), 0)
        inside = (low <= key) & (key < high)
        page = table_ref[sequence, (key // page_size) % table_ref.shape[1]]
        slot = key % page_size
        distance = position - key[None, :]
        seen = inside[None, :] & (distance >= 0)
        if plan.window is not None:
            seen &= distance < plan.window
        scores = product(q, load(k_ref, page, slot, inside), (1, 1)) * plan.scale
        factors = [jnp.where(inside, triton.load(x.at[page, head, slot], mask=inside), 0.0) for x in scales]
        if factors:
            scores *= factors[0][None, :]
        scores = jnp.where(seen, scores, _HIDDEN)
        higher = jnp.maximum(peak, scores.max(1))
        weights = jnp.where(seen, jnp.exp(scores - higher[:, None]), 0.0)
        rescale = jnp.exp(peak - higher)
        total = total * rescale + weights.sum(1)
        if factors:
            weights *= factors[1][None, :]
        out = out * rescale[:, None] + product(weights.astype(q.dtype), load(v_ref, page, slot, inside), (1, 0))
        return higher, total, out

    begin, end = low // plan.keys, (jnp.maximum(high, low) + plan.keys - 1) // plan.keys
    share = (end - begin + plan.parts - 1) // plan.parts
    begin += part * share
    start = (jnp.full(height, _HIDDEN), jnp.zeros(height), jnp.zeros((height, width), jnp.float32))
    peak, total, out = lax.fori_loop(begin, jnp.minimum(begin + share, end), visit, start)
    empty = total == 0
    total = jnp.where(empty, 1.0, total)
    out_ref[...] = out / total[:, None]
    lse_ref[...] = jnp.where(empty, -jnp.inf, peak + jnp.log(total))
