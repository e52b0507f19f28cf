"""Paged attention in plain XLA: only the pages that a row can see are read, and no [N, slots] array exists.

The rows are cut into items of one sequence, and a loop runs over the items that are there: its length is data. An item folds
its blocks of pages, window's edge to diagonal, into a running softmax (Dao et al. 2022, arXiv:2205.14135). Decode rows and
verified drafts take a path with few rows, chunks one with many; both stand in the one program.
"""

import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import Array

from pallas_kernels.paged_attention.pages import Items, Pages, few_rows, make_items, pages_of_block, rows_of_sequences

_HIDDEN = -1e30  # finite, so that a row that sees nothing has no inf - inf
_ROWS = 64  # rows of a long item
_KEYS = 512  # keys of a block


class _Plan(NamedTuple):
    """What is static in one call."""

    window: int | None
    scale: float
    few: int
    many: int
    dtype: jnp.dtype  # what is multiplied


@functools.partial(jax.jit, static_argnames=("window", "scale"))
def paged_attention(
    q: Array, pages: Pages, query_starts: Array, lengths: Array, *, window: int | None, scale: float
) -> Array:
    """Returns [N, H, D] in q's dtype. Arguments as `api.paged_attention`, already checked."""
    num_rows, num_heads, head_dim = q.shape
    few = few_rows(num_rows, lengths.shape[0])
    # XLA:CPU multiplies a few rows in bfloat16 at a tenth of the float32 speed.
    dtype = jnp.dtype(jnp.float32) if jax.default_backend() == "cpu" else q.dtype
    plan = _Plan(window, scale, few, max(few, min(_ROWS, num_rows)), dtype)
    items, count = make_items(pages, query_starts, lengths, num_rows, plan.many, window)
    # An item's rows are sliced and written back at full height: what that writes past them, the next item writes over.
    q = jnp.pad(q, ((0, plan.many), (0, 0), (0, 0))).reshape(
        -1, pages.k.shape[1], num_heads // pages.k.shape[1], head_dim
    )

    def step(i: Array, out: Array) -> Array:
        item = Items(*(x[i] for x in items))
        run = functools.partial(_item, plan, pages, item, q, out)
        if plan.few == plan.many:
            return run(plan.few)
        return jax.lax.cond(item.rows <= plan.few, lambda: run(plan.few), lambda: run(plan.many))

    out = jax.lax.fori_loop(0, count, step, jnp.zeros_like(q))[:num_rows].reshape(num_rows, num_heads, head_dim)
    return jnp.where(rows_of_sequences(query_starts, num_rows)[:, None, None], out, 0)


def _item(plan: _Plan, pages: Pages, item: Items, q: Array, out: Array, height: int) -> Array:
    """`out` with the item's rows, taken `height` at a time."""
    kv_heads, group, head_dim = q.shape[1:]
    rows = jax.lax.dynamic_slice_in_dim(q, item.first, height).transpose(1, 0, 2, 3)
    rows = rows.reshape(kv_heads, height * group, head_dim).astype(plan.dtype)
    position = jnp.repeat(item.position + jnp.arange(height), group)[:, None, None]
    width = pages_of_block(pages, plan.window, height, _KEYS)
    first_page = item.low // pages.page_size
    count = (jnp.maximum(item.high, item.low) - first_page * pages.page_size + width * pages.page_size - 1) // (
        width * pages.page_size
    )

    def block(j: Array, carry: Any) -> Any:
        peak, total, acc = carry
        number = first_page + j * width + jnp.arange(width)
        at = pages.table[item.sequence, number % pages.table.shape[1]]
        key = number[:, None] * pages.page_size + jnp.arange(pages.page_size)
        inside = (item.low <= key) & (key < item.high)
        live = inside & (key <= position)
        if plan.window is not None:
            live &= position - plan.window < key
        k, k_scales = _block(plan, at, pages.k, pages.k_scales)
        v, v_scales = _block(plan, at, pages.v, pages.v_scales)
        scores = _dot("krd,pksd->krps", rows, k) * plan.scale
        if k_scales is not None:
            scores = scores * k_scales
        scores = jnp.where(live, scores, _HIDDEN)
        new_peak = jnp.maximum(peak, scores.max((2, 3), keepdims=True))
        weights = jnp.where(live, jnp.exp(scores - new_peak), 0.0)
        decay = jnp.exp(peak - new_peak)
        total = total * decay + weights.sum((2, 3), keepdims=True)
        # A slot that none of the rows sees may hold NaN, and 0 * NaN is NaN. For keys the mask of the scores does.
        v = jnp.where(inside[:, None, :, None], v, 0)
        if v_scales is not None:
            weights = weights * jnp.where(inside, v_scales, 0)
        acc = acc * decay[..., 0] + _dot("krps,pksd->krd", weights.astype(plan.dtype), v)
        return new_peak, total, acc

    stat = (kv_heads, height * group, 1, 1)
    init = (jnp.full(stat, _HIDDEN), jnp.zeros(stat), jnp.zeros(rows.shape, jnp.float32))
    _, total, acc = jax.lax.fori_loop(0, count, block, init)
    acc = (acc / jnp.where(total == 0, 1.0, total)[..., 0]).astype(out.dtype)
    acc = acc.reshape(kv_heads, height, group, head_dim).transpose(1, 0, 2, 3)
    return jax.lax.dynamic_update_slice_in_dim(out, acc, item.first, 0)


def _block(plan: _Plan, at: Array, x: Array, scales: Array | None) -> tuple[Array, Array | None]:
    """The pages `at` of x [width, K, page_size, D] to multiply, and their scales [K, 1, width, page_size] where there are."""
    x = jnp.take(x, at, axis=0, mode="clip").astype(plan.dtype)
    if scales is None:
        return x, None
    return x, jnp.take(scales, at, axis=0, mode="clip").swapaxes(0, 1)[:, None]


def _dot(spec: str, a: Array, b: Array) -> Array:
    precision = jax.lax.Precision.HIGHEST if a.dtype == jnp.float32 else None
    return jnp.einsum(spec, a, b, precision=precision, preferred_element_type=jnp.float32)
