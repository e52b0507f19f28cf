"""Attention on TPU: the window kernels where the band fits on chip, flash attention elsewhere.

This page checks what the kernels serve, brings the arrays into their layout and back, and ties forward to backward.
"""

import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

from pallas_kernels.attention import tpu_flash, tpu_window
from pallas_kernels.attention.tpu_tiles import LOG2E
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
    q_offset: Any = 0,
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
    if not isinstance(q_offset, int | np.integer) or q_offset != 0:
        return "the TPU kernels need q_offset=0"
    if q.shape[1] != k.shape[1]:
        return f"the TPU kernels need as many keys as queries, and this has T={q.shape[1]}, S={k.shape[1]}"
    return None


class _Plan(NamedTuple):
    """What is static in one call."""

    window: int | None
    scale: float
    kind: str
    interpret: bool

    @property
    def one_pass(self) -> bool:
        return self.window is not None and self.window <= tpu_window.MAX_WINDOW

    def kernel(self, q: Array, k: Array, segmented: bool, backward: bool) -> Any:
        """The kernel module's own plan."""
        length, heads, head_dim = q.shape[1:]
        face = (length, heads // k.shape[2], head_dim)
        how = (self.scale, segmented, backward, tiles(self.kind), self.interpret)
        if self.window is not None and self.one_pass:
            return tpu_window.make_plan(*face, self.window, *how)
        return tpu_flash.make_plan(*face, self.window, *how)


def attention(
    q: Array,
    k: Array,
    v: Array,
    segments: tuple[Array, Array] | None,
    *,
    window: int | None,
    scale: float,
    interpret: bool,
) -> tuple[Array, Array]:
    """Returns (out [B, T, H, D] in q's dtype, lse float32 [B, H, T]). Arguments as `api.attention`, already checked."""
    if segments is not None and segments[0] is not segments[1]:
        k, v = _clear_unseen(k, v, segments, window)
    return _attention(_Plan(window, scale, device_kind() or "", interpret), q, k, v, segments)


@functools.partial(jax.jit, static_argnames="window")
def _clear_unseen(k: Array, v: Array, segments: tuple[Array, Array], window: int | None) -> tuple[Array, Array]:
    """Zeroes keys that no query sees: they may hold NaN, and 0 * NaN is NaN. With one array of ids each key sees itself."""
    query_ids, key_ids = segments
    length, chunk = query_ids.shape[1], 256
    distance = jnp.arange(length)[:, None] - jnp.arange(-(-length // chunk) * chunk).reshape(-1, 1, chunk)
    ids = jnp.pad(key_ids, ((0, 0), (0, -length % chunk))).reshape(key_ids.shape[0], -1, chunk).swapaxes(0, 1)

    def any_query(chunk: tuple[Array, Array]) -> Array:
        distance, ids = chunk
        near = (distance >= 0) & (distance < (length if window is None else window))
        return (near & (query_ids[:, :, None] == ids[:, None])).any(1)

    seen = jax.lax.map(any_query, (distance, ids)).swapaxes(0, 1).reshape(key_ids.shape[0], -1)[:, :length, None, None]
    return jnp.where(seen, k, 0), jnp.where(seen, v, 0)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _differentiable(plan: _Plan, q: Array, k: Array, v: Array, segments: Any) -> tuple[Array, Array]:
    return _forward(plan, q, k, v, segments)[0]


_attention = jax.jit(_differentiable, static_argnums=0)


def _padding(plan: _Plan, kernel: Any, length: int) -> tuple[int, int]:
    """(keys before the first, rows after the last)."""
    return tpu_window.padding(kernel, length) if plan.one_pass else (0, tpu_flash.padding(kernel, length))


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


def _segments(segments: Any, before: int, after: int, transposed: bool) -> tuple[Array, Array] | None:
    """Ids as a column and a row: the queries' the column forward, the keys' backward."""
    if segments is None:
        return None
    queries = jnp.pad(segments[0], ((0, 0), (0, after)))
    keys = jnp.pad(segments[1], ((0, 0), (before, after)))
    return (queries[:, None], keys[..., None]) if transposed else (queries[..., None], keys[:, None])


def _forward(plan: _Plan, q: Array, k: Array, v: Array, segments: Any) -> Any:
    length, kv_heads = k.shape[1:3]
    kernel = plan.kernel(q, k, segments is not None, backward=False)
    before, after = _padding(plan, kernel, length)
    run = tpu_window.forward if plan.one_pass else tpu_flash.forward
    rows, keys, values = _to_rows(q, kv_heads, after), _to_keys(k, before, after), _to_keys(v, before, after)
    out, lse = run(kernel, rows, keys, values, _segments(segments, before, after, transposed=False))
    out = _from_rows(out, length)
    lse = lse.reshape(q.shape[0], q.shape[2], -1)[..., :length] * _LN2
    return (out, lse), (q, k, v, segments, out, lse)


def _backward(plan: _Plan, residuals: Any, grads: tuple[Array, Array]) -> Any:
    q, k, v, segments, out, lse = residuals
    d_out, d_lse = grads
    length, kv_heads = k.shape[1:3]
    kernel = plan.kernel(q, k, segments is not None, backward=True)
    before, after = _padding(plan, kernel, length)
    run = tpu_window.backward if plan.one_pass else tpu_flash.backward
    # d scores = weights * (d_out . v - d_out . out + d_lse), so both row terms are one number a row.
    shift = (d_out.astype(jnp.float32) * out.astype(jnp.float32)).sum(-1).swapaxes(1, 2) - d_lse
    lse = jnp.where(jnp.isneginf(lse), _NEVER, lse * LOG2E)
    d_q, d_k, d_v = run(
        kernel,
        _to_rows(q, kv_heads, after),
        _to_rows(d_out.astype(q.dtype), kv_heads, after),
        _stats(lse, kv_heads, after),
        _stats(shift, kv_heads, after),
        _to_keys(k, before, after),
        _to_keys(v, before, after),
        _segments(segments, before, after, transposed=True),
    )
    return _from_rows(d_q, length), _from_keys(d_k, before, length), _from_keys(d_v, before, length), None


_differentiable.defvjp(_forward, _backward)
