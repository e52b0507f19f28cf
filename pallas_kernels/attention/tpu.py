"""Attention on TPU: the window kernels where the band fits on chip, flash attention elsewhere.

This page checks what the kernels serve, brings the arrays into their layout and back, and ties forward to backward.
"""

import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array, lax

from pallas_kernels.attention import tpu_flash, tpu_window
from pallas_kernels.attention.tpu_tiles import LOG2E, Band
from pallas_kernels.attention.tuned import tiles

HEAD_DIMS = (64, 80, 128)
_MAX_GROUP = 16  # a tile of scores holds the rows of every head of the group
_LN2 = float(np.log(2))
_NEVER = 1e30  # the lse of a query that sees nothing: every weight exp2(score - lse) is 0


def device_kind() -> str | None:
    """The TPU that a call is for: that of the mesh in force, as in a compile ahead of time, else the backend's. None: no TPU."""
    device = jax.sharding.get_abstract_mesh().abstract_device
    kind = device.device_kind if device is not None else jax.devices()[0].device_kind
    return kind if kind.startswith("TPU") else None


def unsupported(
    q: Array | None = None,
    k: Array | None = None,
    *,
    causal: bool = True,
    interpret: bool = False,
) -> str | None:
    """Returns why this implementation cannot serve a call, or None if it can. Without arrays: any call at all."""
    if not interpret and device_kind() is None:
        return (
            "there is no TPU here; interpret=True runs the kernels on any backend, and a compile ahead of time "
            "needs jax.set_mesh with a mesh of the TPU topology's devices"
        )
    if q is None or k is None:
        return None
    if q.dtype == jnp.float16:
        return "the TPU kernels take bfloat16 and float32, and this is float16"
    if q.shape[3] not in HEAD_DIMS:
        return f"the TPU kernels take head dimensions {HEAD_DIMS}, and this is {q.shape[3]}"
    if q.shape[2] // k.shape[2] > _MAX_GROUP:
        return f"the TPU kernels take at most {_MAX_GROUP} query heads on a kv head, and this is {q.shape[2] // k.shape[2]}"
    if not causal:
        return "the TPU kernels are causal"
    return None


class _Plan(NamedTuple):
    """What is static in one call."""

    window: int | None
    scale: float
    band: Band
    kind: str
    interpret: bool

    @property
    def one_pass(self) -> bool:
        return self.window is not None and self.window <= tpu_window.MAX_WINDOW

    @property
    def sliced(self) -> bool:
        """Whether the keys are those beside the queries, as the window kernels take them, and not yet all of them."""
        return self.one_pass and (self.band.offset != 0 or self.band.queries != self.band.keys)

    def kernel(self, group: int, head_dim: int, segmented: bool, backward: bool) -> Any:
        """The kernel module's own plan."""
        how = (self.scale, segmented, backward, tiles(self.kind, group, head_dim), self.interpret)
        if self.window is not None and self.one_pass:
            return tpu_window.make_plan(self.band, group, head_dim, self.window, *how)
        return tpu_flash.make_plan(self.band, group, head_dim, self.window, *how)


def attention(
    q: Array,
    k: Array,
    v: Array,
    q_offset: int | Array,
    segments: tuple[Array, Array] | None,
    *,
    window: int | None,
    scale: float,
    interpret: bool,
) -> tuple[Array, Array]:
    """Returns (out [B, T, H, D] in q's dtype, lse float32 [B, H, T]). Arguments as `api.attention`, already checked."""
    queries, keys = q.shape[1], k.shape[1]
    static = isinstance(q_offset, int | np.integer)
    # Further out nothing changes any more, and no sum overflows.
    offset = (np if static else jnp).clip(q_offset, -queries, keys + (window or 0))
    band = Band(queries, keys, int(offset) if static else None)
    offsets = jnp.broadcast_to(jnp.asarray(offset, jnp.int32), q.shape[:1])
    k, v = clear_unseen(band, window, k, v, offsets, segments)
    plan = _Plan(window, scale, band, device_kind() or "", interpret)
    if plan.sliced and window is not None:
        k, v, segments = _beside_queries(band, tpu_window.look_back(window), k, v, offsets, segments)
    return _attention(plan, q, k, v, None if static else offsets, segments)


def clear_unseen(
    band: Band, window: int | None, k: Array, v: Array, offsets: Array, segments: tuple[Array, Array] | None
) -> tuple[Array, Array]:
    """Zeroes keys that no query of their row of the batch sees: they may hold NaN, and 0 * NaN is NaN.

    With one array of ids, T == S and no offset each key sees itself, and nothing is to do.
    """
    if band == Band(band.queries, band.queries, 0) and (segments is None or segments[0] is segments[1]):
        return k, v
    return _clear_unseen(band, window, k, v, offsets, segments)


@functools.partial(jax.jit, static_argnums=(0, 1))
def _clear_unseen(
    band: Band, window: int | None, k: Array, v: Array, offsets: Array, segments: tuple[Array, Array] | None
) -> tuple[Array, Array]:
    query = jnp.arange(band.keys) - offsets[:, None]  # [B, S]: the query that stands at the key
    seen = query < band.queries
    if window is not None:
        seen &= query > -window
    if segments is not None:
        seen &= _seen_by_id(band, window, offsets, segments)
    seen = seen[:, :, None, None]
    return jnp.where(seen, k, 0), jnp.where(seen, v, 0)


def _seen_by_id(band: Band, window: int | None, offset: Array, segments: tuple[Array, Array]) -> Array:
    """bool [B, S]: which keys a query with their id sees. Chunk by chunk of keys, with the queries that are near enough."""
    chunk = 256
    near = band.queries if window is None else min(band.queries, chunk + window - 1)

    def of_row(query_ids: Array, key_ids: Array, offset: Array) -> Array:
        def of_chunk(xs: tuple[Array, Array]) -> Array:
            first, ids = xs
            start = jnp.clip(first - offset, 0, band.queries - near)
            query = offset + start + jnp.arange(near)
            distance = query[:, None] - first - jnp.arange(chunk)
            sees = lax.dynamic_slice_in_dim(query_ids, start, near)[:, None] == ids
            sees &= (distance >= 0) & (distance < (window or 2**31 - 1))
            return sees.any(0)

        starts = jnp.arange(0, band.keys, chunk)
        ids = jnp.pad(key_ids, (0, -band.keys % chunk)).reshape(-1, chunk)
        return lax.map(of_chunk, (starts, ids)).reshape(-1)[: band.keys]

    return jax.vmap(of_row)(*segments, offset)


def _beside_queries(
    band: Band, before: int, k: Array, v: Array, offsets: Array, segments: tuple[Array, Array] | None
) -> tuple[Array, Array, tuple[Array, Array] | None]:
    """Keys, values and key ids `offset - before .. offset + T`, zeros where there are none: [B, before + T, ...]."""

    def static(x: Array) -> Array:
        low, high = before - (band.offset or 0), (band.offset or 0) + band.queries - band.keys
        return lax.pad(x, jnp.zeros((), x.dtype), [(0, 0, 0), (low, high, 0), *[(0, 0, 0)] * (x.ndim - 2)])

    def traced(x: Array) -> Array:
        wide, size = before + band.queries, before + band.queries
        x = jnp.pad(x, ((0, 0), (wide, wide), *[(0, 0)] * (x.ndim - 2)))
        # Further out than this no query sees a key, and dynamic_slice clips it to that.
        return jax.vmap(lambda row, at: lax.dynamic_slice_in_dim(row, at, size))(x, offsets - before + wide)

    take = traced if band.offset is None else static
    return take(k), take(v), None if segments is None else (segments[0], take(segments[1]))


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _differentiable(
    plan: _Plan, q: Array, k: Array, v: Array, offsets: Array | None, segments: Any
) -> tuple[Array, Array]:
    return _forward(plan, q, k, v, offsets, segments)[0]


_attention = jax.jit(_differentiable, static_argnums=0)


class _Padding(NamedTuple):
    """Rows to put around what the kernels take."""

    queries: int  # after the last
    before: int  # the first key
    keys: int  # after the last


def _padding(plan: _Plan, kernel: Any) -> _Padding:
    if not plan.one_pass:
        queries, keys = tpu_flash.padding(kernel)
        return _Padding(queries, 0, keys)
    after = tpu_window.padding(kernel)
    return _Padding(after, 0 if plan.sliced else tpu_window.look_back(kernel.window), after)


def _to_rows(x: Array, kv_heads: int, after: int) -> Array:
    """[B, T, H, D] -> [B, K, G, T + after, D]. Heads move first and split then: [T, K, G, D] would be padded in G."""
    batch, length, _, dim = x.shape
    x = jnp.pad(x.swapaxes(1, 2), ((0, 0), (0, 0), (0, after), (0, 0)))
    return x.reshape(batch, kv_heads, -1, length + after, dim)


def _from_rows(x: Array, length: int) -> Array:
    """[B, K, G, T + after, D] -> [B, T, H, D]."""
    return x.reshape(x.shape[0], -1, *x.shape[3:])[:, :, :length].swapaxes(1, 2)


def _to_keys(x: Array, before: int, after: int) -> Array:
    """[B, T, K, D] -> [B, K, before + T + after, D]."""
    return jnp.pad(x.swapaxes(1, 2), ((0, 0), (0, 0), (before, after), (0, 0)))


def _from_keys(x: Array, before: int, length: int) -> Array:
    """[B, K, before + T + after, D] -> [B, T, K, D]."""
    return x[:, :, before : before + length].swapaxes(1, 2)


def _stats(x: Array, kv_heads: int, after: int) -> Array:
    """float32 [B, H, T] -> [B, K, G, T + after]."""
    x = x.reshape(x.shape[0], kv_heads, -1, x.shape[2])
    return jnp.pad(x, ((0, 0), (0, 0), (0, 0), (0, after)))


def _segments(segments: Any, padding: _Padding, transposed: bool) -> tuple[Array, Array] | None:
    """Ids as a column and a row: the queries' the column forward, the keys' backward."""
    if segments is None:
        return None
    queries = jnp.pad(segments[0], ((0, 0), (0, padding.queries)))
    keys = jnp.pad(segments[1], ((0, 0), (padding.before, padding.keys)))
    return (queries[:, None], keys[..., None]) if transposed else (queries[..., None], keys[:, None])


def _forward(plan: _Plan, q: Array, k: Array, v: Array, offsets: Array | None, segments: Any) -> Any:
    length, heads, head_dim = q.shape[1:]
    kv_heads = k.shape[2]
    kernel = plan.kernel(heads // kv_heads, head_dim, segments is not None, backward=False)
    padding = _padding(plan, kernel)
    run = tpu_window.forward if plan.one_pass else tpu_flash.forward
    rows = _to_rows(q, kv_heads, padding.queries)
    keys, values = (_to_keys(x, padding.before, padding.keys) for x in (k, v))
    out, lse = run(kernel, offsets, rows, keys, values, _segments(segments, padding, transposed=False))
    out = _from_rows(out, length)
    lse = lse.reshape(q.shape[0], heads, -1)[..., :length] * _LN2
    return (out, lse), (q, k, v, offsets, segments, out, lse)


def _backward(plan: _Plan, residuals: Any, grads: tuple[Array, Array]) -> Any:
    q, k, v, offsets, segments, out, lse = residuals
    d_out, d_lse = grads
    length, heads, head_dim = q.shape[1:]
    num_keys, kv_heads = k.shape[1:3]
    kernel = plan.kernel(heads // kv_heads, head_dim, segments is not None, backward=True)
    padding = _padding(plan, kernel)
    run = tpu_window.backward if plan.one_pass else tpu_flash.backward
    # d scores = weights * (d_out . v - d_out . out + d_lse), so both row terms are one number a row.
    shift = (d_out.astype(jnp.float32) * out.astype(jnp.float32)).sum(-1).swapaxes(1, 2) - d_lse
    lse = jnp.where(jnp.isneginf(lse), _NEVER, lse * LOG2E)
    d_q, d_k, d_v = run(
        kernel,
        offsets,
        _to_rows(q, kv_heads, padding.queries),
        _to_rows(d_out.astype(q.dtype), kv_heads, padding.queries),
        _stats(lse, kv_heads, padding.queries),
        _stats(shift, kv_heads, padding.queries),
        _to_keys(k, padding.before, padding.keys),
        _to_keys(v, padding.before, padding.keys),
        _segments(segments, padding, transposed=True),
    )
    d_k, d_v = (_from_keys(x, padding.before, num_keys) for x in (d_k, d_v))
    return _from_rows(d_q, length), d_k, d_v, None, None


_differentiable.defvjp(_forward, _backward)
