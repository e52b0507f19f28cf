"""Attention where each device has a part of every sequence: what each does, inside `shard_map`.

A window layer needs the last W - 1 keys of the device before it: one `ppermute`. A global layer gathers all keys, and as
late queries see more of them than early ones, each device trades the second half of its queries with its mirror image's:
device i has queries of the i-th and of the (n-1-i)-th place, and all have the same to do.
"""

import jax
import jax.numpy as jnp
from jax import lax

from pallas_kernels.attention import attention

_NO_DOCUMENT = jnp.iinfo(jnp.int32).min


def context_attention(
    q: jax.Array, k: jax.Array, v: jax.Array, segment_ids: jax.Array, window: int | None, axis: str
) -> jax.Array:
    """Causal attention of this device's queries to the keys of all.

    Args:
        q: `[B, T, H, D]`, T consecutive positions; those of the next device along `axis` follow.
        k, v: `[B, T, K, D]` of the same positions.
        segment_ids: int32 `[B, T]` of the same positions; queries see keys of their own id.
        window: None, or how many keys a query sees, itself included.
        axis: the mesh axis over which the sequence is split.
    """
    if window is not None and window - 1 <= q.shape[1]:
        return _with_neighbours_tail(q, k, v, segment_ids, window, axis)
    return _with_all_keys(q, k, v, segment_ids, window, axis)


def _with_neighbours_tail(
    q: jax.Array, k: jax.Array, v: jax.Array, ids: jax.Array, window: int, axis: str
) -> jax.Array:
    if (before := window - 1) == 0:
        return attention(q, k, v, window=window, segment_ids=ids)
    onward = [(i, i + 1) for i in range(lax.axis_size(axis) - 1)]
    tails = (lax.ppermute(x[:, -before:], axis, onward) for x in (k, v, ids))
    k, v, key_ids = (jnp.concatenate([tail, x], axis=1) for tail, x in zip(tails, (k, v, ids), strict=True))
    # The first device was sent zeros.
    key_ids = jnp.where((lax.axis_index(axis) == 0) & (jnp.arange(key_ids.shape[1]) < before), _NO_DOCUMENT, key_ids)
    return attention(q, k, v, window=window, segment_ids=(ids, key_ids), q_offset=before)


def _with_all_keys(
    q: jax.Array, k: jax.Array, v: jax.Array, ids: jax.Array, window: int | None, axis: str
) -> jax.Array:
    me, devices, length = lax.axis_index(axis), lax.axis_size(axis), q.shape[1]
    keys, values, key_ids = (lax.all_gather(x, axis, axis=1, tiled=True) for x in (k, v, ids))

    def part(q: jax.Array, query_ids: jax.Array, start: jax.Array) -> jax.Array:
        return attention(q, keys, values, window=window, segment_ids=(query_ids, key_ids), q_offset=start)

    def starting(position: jax.Array) -> jax.Array:
        return jnp.full((q.shape[0],), position, jnp.int32)

    if length % 2:
        return part(q, ids, starting(me * length))
    half, mirror = length // 2, [(i, devices - 1 - i) for i in range(devices)]
    traded_q, traded_ids = (lax.ppermute(x[:, half:], axis, mirror) for x in (q, ids))
    early = part(q[:, :half], ids[:, :half], starting(me * length))
    late = part(traded_q, traded_ids, starting((devices - 1 - me) * length + half))
    return jnp.concatenate([early, lax.ppermute(late, axis, mirror)], axis=1)
