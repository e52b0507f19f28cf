"""Paged attention as its definition reads: every sequence's pages gathered, one dense mask, one float32 softmax."""

import jax
import jax.numpy as jnp
from jax import Array

from pallas_kernels.paged_attention.pages import Pages, row_starts, rows_of_sequences

_HIDDEN = -1e30  # finite, so that a row that sees nothing has no inf - inf


def held_positions(pages: Pages, lengths: Array) -> Array:
    """int32 [S, slots]: the position that each slot holds, the newest one that falls there; negative where none yet."""
    last = lengths[:, None] - 1
    return last - (last - jnp.arange(pages.slots)) % pages.slots


def _gathered(pages: Pages, x: Array, scales: Array | None, seen: Array, dtype: jnp.dtype) -> Array:
    """[S, K, slots, D] in the dtype to multiply in; slots that no row of their sequence sees are zeros."""
    x = jnp.take(x, pages.table, axis=0, mode="clip").swapaxes(1, 2)
    if scales is not None:
        scales = jnp.take(scales, pages.table, axis=0, mode="clip").swapaxes(1, 2)
        x = (x.astype(jnp.float32) * scales[..., None]).astype(dtype)
    x = x.reshape(*x.shape[:2], pages.slots, x.shape[-1])
    return jnp.where(seen[:, None, :, None], x, 0)  # 0 * NaN must not reach the sums


def paged_attention(
    q: Array, pages: Pages, query_starts: Array, lengths: Array, *, window: int | None, scale: float
) -> Array:
    """Returns [N, H, D] in q's dtype. Arguments as `api.paged_attention`, already checked."""
    num_rows, kv_heads = q.shape[0], pages.k.shape[1]
    precision = jax.lax.Precision.HIGHEST if q.dtype == jnp.float32 else None
    starts, lengths = row_starts(query_starts, num_rows), jnp.maximum(lengths, 0)
    row = jnp.arange(num_rows)
    sequence = jnp.minimum(jnp.searchsorted(starts[1:], row, side="right"), lengths.shape[0] - 1)
    position = lengths[sequence] + row - starts[sequence + 1]
    held = held_positions(pages, lengths)[sequence]
    distance = position[:, None] - held
    mask = (held >= 0) & (distance >= 0) & rows_of_sequences(query_starts, num_rows)[:, None]
    if window is not None:
        mask &= distance < window
    seen = jnp.zeros((lengths.shape[0], pages.slots), bool).at[sequence].max(mask)
    k = _gathered(pages, pages.k, pages.k_scales, seen, q.dtype)[sequence]
    v = _gathered(pages, pages.v, pages.v_scales, seen, q.dtype)[sequence]

    grouped = q.reshape(num_rows, kv_heads, -1, q.shape[2])
    mask = mask[:, None, None]
    scores = jnp.einsum("nkgd,nksd->nkgs", grouped, k, precision=precision, preferred_element_type=jnp.float32) * scale
    scores = jnp.where(mask, scores, _HIDDEN)
    weights = jnp.where(mask, jnp.exp(scores - scores.max(-1, keepdims=True)), 0.0)
    total = weights.sum(-1, keepdims=True)
    probs = (weights / jnp.where(total == 0, 1.0, total)).astype(q.dtype)
    out = jnp.einsum("nkgs,nksd->nkgd", probs, v, precision=precision, preferred_element_type=jnp.float32)
    return out.reshape(q.shape).astype(q.dtype)
