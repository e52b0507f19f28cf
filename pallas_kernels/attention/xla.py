"""Attention in plain XLA: time O(T W) under a window, O(T^2 / 2) causal, and memory O(T D) both ways.

The forward is FlashAttention's running softmax (Dao et al. 2022, arXiv:2205.14135); the backward recomputes the weights
from the saved log-sum-exp. Heads and query blocks are loops; a query block visits only the key tiles that it can see,
with bounds computed as it goes, so one program serves every offset and length. Under a short window the whole span is
one tile.

Tiles are small enough for the second-level cache: XLA:CPU writes every tile of scores out, and larger ones spill.
"""

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

_HIDDEN = -1e30  # finite, so that a row that sees nothing has no inf - inf
_FAR = 2**30  # the position of a padded key: after every query
_ROWS = 1024  # rows of one tile: query block x heads of a group
_MAX_QUERY_BLOCK = 256
_KEY_BLOCK = 256
_TILE = _ROWS * _KEY_BLOCK
_MAX_SINGLE_SPAN = 1024  # under a window: the widest span taken as one tile


class _Plan(NamedTuple):
    """What is static in one call."""

    num_queries: int
    num_keys: int
    group: int
    causal: bool
    window: int | None
    scale: float
    block_q: int
    block_k: int
    segmented: bool

    @property
    def single(self) -> bool:
        """Whether every key that a query block can see fits one tile."""
        return self.window is not None and self.block_q + self.window - 1 <= self.block_k


class _Rows(NamedTuple):
    """One query block: its first and last position; per row (position-major, then head of the group) its own."""

    first: Array
    last: Array
    position: Array
    segment: Array | None


class _Tile(NamedTuple):
    """One block of keys: k and v [block_k, D]; mask over (keys, rows), None where every row sees every key."""

    k: Array
    v: Array
    mask: Array | None


def _ceil_to(x: int, multiple: int) -> int:
    return -(-x // multiple) * multiple


def _make_plan(q: Array, k: Array, segmented: bool, causal: bool, window: int | None, scale: float) -> _Plan:
    num_queries, num_keys, group = q.shape[1], k.shape[1], q.shape[2] // k.shape[2]
    most = max(8, min(_MAX_QUERY_BLOCK, _ROWS // group))
    if window is not None:
        most = min(most, max(64, _ceil_to(window, 64)))  # a wider block would only widen the dead part of its span
    blocks = -(-num_queries // most)
    block_q = min(num_queries, _ceil_to(-(-num_queries // blocks), 8))
    block_k = max(_KEY_BLOCK, min(4096, _TILE // (block_q * group)))
    if window is not None and block_q + window - 1 <= _MAX_SINGLE_SPAN:
        block_k = _ceil_to(block_q + window - 1, 16)
    block_k = min(block_k, _ceil_to(num_keys, 16))
    return _Plan(num_queries, num_keys, group, causal, window, scale, block_q, block_k, segmented)


@functools.partial(jax.jit, static_argnames=("causal", "window", "scale"))
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
    plan = _make_plan(q, k, segments is not None, causal, window, scale)
    return _attention(plan, q, k, v, q_offset, segments)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _attention(plan: _Plan, q: Array, k: Array, v: Array, q_offset: Array, segments: Any) -> tuple[Array, Array]:
    return _forward(plan, q, k, v, q_offset, segments)[0]


# Layout: queries [B K, blocks, block_q G, D] (rows position-major), keys [B K, S + block_k, D].


def _to_rows(plan: _Plan, x: Array, num_kv_heads: int, fill: float = 0.0) -> Array:
    """[B, T, H, D] -> [B K, blocks, block_q G, D]."""
    batch, length, _, dim = x.shape
    x = jnp.pad(x, ((0, 0), (0, -length % plan.block_q), (0, 0), (0, 0)), constant_values=fill)
    x = x.reshape(batch, -1, num_kv_heads, plan.group * dim).swapaxes(1, 2)
    return x.reshape(batch * num_kv_heads, -1, plan.block_q * plan.group, dim)


def _from_rows(plan: _Plan, x: Array, batch: int) -> Array:
    """[B K, blocks, block_q G, D] -> [B, T, H, D]."""
    num_kv_heads, dim = x.shape[0] // batch, x.shape[-1]
    x = x.reshape(batch, num_kv_heads, -1, plan.group * dim).swapaxes(1, 2)
    return x.reshape(batch, x.shape[1], num_kv_heads * plan.group, dim)[:, : plan.num_queries]


def _to_keys(plan: _Plan, x: Array) -> Array:
    """[B, S, K, D] -> [B K, S + block_k, D]: padded, so that a tile that starts at any key stays inside."""
    x = jnp.pad(x.swapaxes(1, 2), ((0, 0), (0, 0), (0, plan.block_k), (0, 0)))
    return x.reshape(-1, *x.shape[2:])


def _from_keys(plan: _Plan, x: Array, batch: int) -> Array:
    """[B K, S + block_k, D] -> [B, S, K, D]."""
    return x.reshape(batch, -1, *x.shape[1:])[:, :, : plan.num_keys].swapaxes(1, 2)


def _per_head(plan: _Plan, q_offset: Array, segments: tuple[Array, Array] | None, num_kv_heads: int) -> Any:
    """What each of the B K loops needs beside q, k and v: its offset, and the segment ids of its rows and keys."""
    offsets = jnp.repeat(q_offset, num_kv_heads)
    if segments is None:
        return offsets, None, None
    rows, keys = segments
    rows = jnp.pad(rows, ((0, 0), (0, -plan.num_queries % plan.block_q)), mode="edge")
    rows = jnp.repeat(rows, plan.group, axis=1).reshape(rows.shape[0], -1, plan.block_q * plan.group)
    keys = jnp.pad(keys, ((0, 0), (0, plan.block_k)))
    return offsets, jnp.repeat(rows, num_kv_heads, axis=0), jnp.repeat(keys, num_kv_heads, axis=0)


def _rows(plan: _Plan, offset: Array, block: Array, row_segments: Array | None) -> _Rows:
    first = offset + block * plan.block_q
    # Padded rows repeat the last one: were they to see further keys, those keys would count as seen.
    last = jnp.minimum(first + plan.block_q, offset + plan.num_queries) - 1
    step = np.repeat(np.arange(plan.block_q, dtype=np.int32), plan.group)
    return _Rows(first, last, jnp.minimum(first + step, last), row_segments)


def _tile(
    plan: _Plan, rows: _Rows, k: Array, v: Array, key_segments: Array | None, start: Array, masked: bool
) -> _Tile:
    k = jax.lax.dynamic_slice_in_dim(k, start, plan.block_k)
    v = jax.lax.dynamic_slice_in_dim(v, start, plan.block_k)
    if not masked:
        return _Tile(k, v, None)
    position = start + jnp.arange(plan.block_k)
    inside = position < plan.num_keys
    if plan.causal:
        position = jnp.where(inside, position, _FAR)
        mask = position[:, None] <= rows.position
        seen = position <= rows.last
    else:
        mask = jnp.broadcast_to(inside[:, None], (plan.block_k, rows.position.shape[0]))
        seen = inside
    if plan.window is not None:
        mask &= rows.position - plan.window < position[:, None]
        seen &= rows.first - plan.window < position
    if key_segments is not None:
        same = jax.lax.dynamic_slice_in_dim(key_segments, start, plan.block_k)[:, None] == rows.segment
        mask &= same
        seen = mask[:, :: plan.group].any(1)
    # A key that none of these rows sees may hold NaN, and 0 * NaN is NaN.
    return _Tile(jnp.where(seen[:, None], k, 0), jnp.where(seen[:, None], v, 0), mask)


def _over_tiles(
    plan: _Plan, rows: _Rows, key_segments: Array | None, body: Callable[[Array, Any, bool], Any], carry: Any
) -> Any:
    """Folds `body(start, carry, masked)` over the key tiles that the query block can see."""
    first, last = rows.first, rows.last
    start = jnp.int32(0) if plan.window is None else jnp.clip(first - plan.window + 1, 0, plan.num_keys)
    if plan.single:
        return body(start, carry, True)
    end = jnp.clip(last + 1, 0, plan.num_keys) if plan.causal else jnp.int32(plan.num_keys)
    count = jnp.maximum(0, -((start - end) // plan.block_k))

    def run(low: Array, high: Array, body: Callable[[Array, Any, bool], Any], masked: bool, carry: Any) -> Any:
        return jax.lax.fori_loop(low, high, lambda j, c: body(start + j * plan.block_k, c, masked), carry)

    zero = jnp.int32(0)
    if key_segments is not None:

        def either(start: Array, carry: Any, _: bool) -> Any:
            clear = _sees_all(plan, rows, key_segments, start)
            return jax.lax.cond(clear, lambda c: body(start, c, False), lambda c: body(start, c, True), carry)

        return run(zero, count, either, True, carry)
    # Tiles before `low` cross the window's edge, tiles from `high` on cross the diagonal or the end.
    clear = jnp.clip(first + 1, 0, plan.num_keys) if plan.causal else jnp.int32(plan.num_keys)
    low = zero
    if plan.window is not None:
        low = jnp.minimum(count, jnp.maximum(0, -((start - (last - plan.window + 1)) // plan.block_k)))
        carry = run(zero, low, body, True, carry)
    high = jnp.clip((clear - start) // plan.block_k, low, count)
    carry = run(low, high, body, False, carry)
    return run(high, count, body, True, carry)


def _sees_all(plan: _Plan, rows: _Rows, key_segments: Array, start: Array) -> Array:
    """Whether every row sees every key of the tile, so that it needs no mask: most tiles of long documents."""
    keys = jax.lax.dynamic_slice_in_dim(key_segments, start, plan.block_k)
    end = start + plan.block_k
    clear = (end <= plan.num_keys) & jnp.all(keys == keys[0]) & jnp.all(rows.segment == keys[0])
    if plan.causal:
        clear &= end <= rows.first + 1
    if plan.window is not None:
        clear &= rows.last - plan.window < start
    return clear


def _dot(spec: str, a: Array, b: Array) -> Array:
    precision = jax.lax.Precision.HIGHEST if a.dtype == jnp.float32 else None
    return jnp.einsum(spec, a, b, precision=precision, preferred_element_type=jnp.float32)


def _scales(plan: _Plan, dtype: Any) -> tuple[float, float]:
    """(what to multiply q by, what to multiply scores by): q where that is exact enough, for it costs nothing there."""
    return (plan.scale, 1.0) if dtype == jnp.float32 else (1.0, plan.scale)


def _forward(plan: _Plan, q: Array, k: Array, v: Array, q_offset: Array, segments: Any) -> Any:
    batch, _, _, dim = q.shape
    num_kv_heads = k.shape[2]
    q_scale, score_scale = _scales(plan, q.dtype)
    height = plan.block_q * plan.group

    def tile_step(rows: _Rows, q_rows: Array, keys: Any, start: Array, carry: Any, masked: bool) -> Any:
        peak, total, out = carry
        k_head, v_head, key_segments = keys
        tile = _tile(plan, rows, k_head, v_head, key_segments, start, masked)
        scores = _dot("md,sd->ms", q_rows, tile.k)
        if score_scale != 1.0:
            scores = scores * score_scale
        if tile.mask is not None:
            scores = jnp.where(tile.mask.T, scores, _HIDDEN)
        new_peak = jnp.maximum(peak, scores.max(-1, keepdims=True))
        weights = jnp.exp(scores - new_peak)
        if tile.mask is not None:
            weights = jnp.where(tile.mask.T, weights, 0.0)
        decay = jnp.exp(peak - new_peak)
        total = total * decay + weights.sum(-1, keepdims=True)
        return new_peak, total, out * decay + _dot("ms,sd->md", weights.astype(q.dtype), tile.v)

    def head(xs: Any) -> tuple[Array, Array]:
        q_rows, k_head, v_head, (offset, row_segments, key_segments) = xs

        def block(xs: Any) -> tuple[Array, Array]:
            index, q_block, block_segments = xs
            rows = _rows(plan, offset, index, block_segments)
            step = functools.partial(tile_step, rows, q_block, (k_head, v_head, key_segments))
            init = (jnp.full((height, 1), _HIDDEN), jnp.zeros((height, 1)), jnp.zeros((height, dim)))
            peak, total, out = _over_tiles(plan, rows, key_segments, step, init)
            empty = total == 0
            safe = jnp.where(empty, 1.0, total)
            return (out / safe).astype(q.dtype), jnp.where(empty, -jnp.inf, peak + jnp.log(safe))

        return jax.lax.map(block, (jnp.arange(q_rows.shape[0]), q_rows, row_segments))

    q_rows = _to_rows(plan, q if q_scale == 1.0 else q * q_scale, num_kv_heads)
    xs = (q_rows, _to_keys(plan, k), _to_keys(plan, v), _per_head(plan, q_offset, segments, num_kv_heads))
    out, lse = jax.lax.map(head, xs)
    out = _from_rows(plan, out, batch)
    lse = _from_rows(plan, lse, batch)[..., 0]
    return (out, lse.swapaxes(1, 2)), (q, k, v, q_offset, segments, out, lse)


def _backward(plan: _Plan, residuals: Any, grads: tuple[Array, Array]) -> Any:
    q, k, v, q_offset, segments, out, lse = residuals
    d_out, d_lse = grads
    batch, _, _, dim = q.shape
    num_kv_heads = k.shape[2]
    q_scale, score_scale = _scales(plan, q.dtype)
    height = plan.block_q * plan.group
    d_out = d_out.astype(q.dtype)
    # d scores = weights * (d_out . v - d_out . out + d_lse), so both row terms are one number a row.
    shift = (d_out.astype(jnp.float32) * out.astype(jnp.float32)).sum(-1) - d_lse.swapaxes(1, 2)

    def tile_step(rows: _Rows, block: Any, keys: Any, start: Array, carry: Any, masked: bool) -> Any:
        q_block, d_block, lse_block, shift_block = block
        d_q, d_k, d_v = carry
        k_head, v_head, key_segments = keys
        tile = _tile(plan, rows, k_head, v_head, key_segments, start, masked)
        # Scores stand transposed, [keys, rows]: of the five products only d_q's left side is then transposed, which
        # XLA:CPU does at half speed.
        scores = _dot("sd,md->sm", tile.k, q_block)
        if score_scale != 1.0:
            scores = scores * score_scale
        weights = jnp.exp(scores - lse_block)
        d_scores = weights * (_dot("sd,md->sm", tile.v, d_block) - shift_block)
        if tile.mask is not None:
            weights = jnp.where(tile.mask, weights, 0.0)
            d_scores = jnp.where(tile.mask, d_scores, 0.0)
        d_scores = d_scores.astype(q.dtype)
        d_q = d_q + _dot("sm,sd->md", d_scores, tile.k)
        d_k = _add_at(d_k, start, _dot("sm,md->sd", d_scores, q_block))
        d_v = _add_at(d_v, start, _dot("sm,md->sd", weights.astype(q.dtype), d_block))
        return d_q, d_k, d_v

    def head(xs: Any) -> Any:
        q_rows, d_rows, lse_rows, shift_rows, k_head, v_head, (offset, row_segments, key_segments) = xs

        def block(carry: Any, xs: Any) -> Any:
            index, block_xs, block_segments = xs
            rows = _rows(plan, offset, index, block_segments)
            q_block, d_block, lse_block, shift_block = block_xs
            block_xs = (q_block, d_block, lse_block[:, 0], shift_block[:, 0])
            step = functools.partial(tile_step, rows, block_xs, (k_head, v_head, key_segments))
            carry = (jnp.zeros((height, dim)), *carry)
            d_q, d_k, d_v = _over_tiles(plan, rows, key_segments, step, carry)
            return (d_k, d_v), (d_q * plan.scale).astype(q.dtype)

        zeros = jnp.zeros(k_head.shape, jnp.float32)
        xs = (jnp.arange(q_rows.shape[0]), (q_rows, d_rows, lse_rows, shift_rows), row_segments)
        (d_k, d_v), d_q = jax.lax.scan(block, (zeros, zeros), xs)
        return d_q, (d_k * score_scale).astype(k.dtype), d_v.astype(v.dtype)

    xs = (
        _to_rows(plan, q if q_scale == 1.0 else q * q_scale, num_kv_heads),
        _to_rows(plan, d_out, num_kv_heads),
        _to_rows(plan, lse[..., None], num_kv_heads, fill=jnp.inf),  # a padded row has weight 0
        _to_rows(plan, shift[..., None], num_kv_heads),
        _to_keys(plan, k),
        _to_keys(plan, v),
        _per_head(plan, q_offset, segments, num_kv_heads),
    )
    d_q, d_k, d_v = jax.lax.map(head, xs)
    return _from_rows(plan, d_q, batch), _from_keys(plan, d_k, batch), _from_keys(plan, d_v, batch), None, None


def _add_at(x: Array, start: Array, update: Array) -> Array:
    old = jax.lax.dynamic_slice_in_dim(x, start, update.shape[0])
    return jax.lax.dynamic_update_slice_in_dim(x, old + update, start, 0)


_attention.defvjp(_forward, _backward)
