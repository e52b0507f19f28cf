"""Attention as its definition reads: one dense mask, one softmax in float32. Time and memory O(T S)."""

import jax
import jax.numpy as jnp
from jax import Array

_HIDDEN = -1e30  # finite, so that a row that sees nothing has no inf - inf


def visible(
    num_queries: int,
    num_keys: int,
    q_offset: Array,
    segments: tuple[Array, Array] | None,
    *,
    causal: bool,
    window: int | None,
) -> Array:
    """Returns bool [B, T, S]: which keys each query may see.

    `q_offset` is int32 [B], `segments` is None or the pair (int32 [B, T], int32 [B, S]).
    """
    q_index = q_offset[:, None, None] + jnp.arange(num_queries)[None, :, None]
    distance = q_index - jnp.arange(num_keys)
    mask = jnp.ones(distance.shape, bool)
    if causal:
        mask &= distance >= 0
    if window is not None:
        mask &= distance < window
    if segments is not None:
        mask &= segments[0][:, :, None] == segments[1][:, None, :]
    return mask


def attention(
    q: Array,
    k: Array,
    v: Array,
    q_offset: Array,
    segments: tuple[Array, Array] | None,
    *,
    causal: bool,
    window: int | None,
    scale: float,
) -> tuple[Array, Array]:
    """Returns (out [B, T, H, D] in q's dtype, lse float32 [B, H, T]). Arguments as `api.attention`, already checked."""
    batch, num_queries, num_heads, head_dim = q.shape
    num_keys, num_kv_heads = k.shape[1:3]
    precision = jax.lax.Precision.HIGHEST if q.dtype == jnp.float32 else None
    mask = visible(num_queries, num_keys, q_offset, segments, causal=causal, window=window)
    # A key that no query sees may hold anything, NaN included: 0 * NaN must not reach the sums.
    seen = mask.any(1)[:, :, None, None]
    k, v = jnp.where(seen, k, 0), jnp.where(seen, v, 0)

    grouped = q.reshape(batch, num_queries, num_kv_heads, num_heads // num_kv_heads, head_dim)
    scores = (
        jnp.einsum("btkgd,bskd->bkgts", grouped, k, precision=precision, preferred_element_type=jnp.float32) * scale
    )
    mask = mask[:, None, None]
    scores = jnp.where(mask, scores, _HIDDEN)
    peak = jax.lax.stop_gradient(scores.max(-1, keepdims=True))
    weights = jnp.where(mask, jnp.exp(scores - peak), 0.0)
    total = weights.sum(-1, keepdims=True)
    empty = total == 0
    total = jnp.where(empty, 1.0, total)
    probs = (weights / total).astype(v.dtype)
    out = jnp.einsum("bkgts,bskd->btkgd", probs, v, precision=precision, preferred_element_type=jnp.float32)
    lse = jnp.where(empty, -jnp.inf, peak + jnp.log(total))
    return out.reshape(q.shape).astype(q.dtype), lse.reshape(batch, num_heads, num_queries)
