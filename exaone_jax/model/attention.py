"""Grouped-query attention with QK-norm, optional rotation and optional window, with and without a cache."""

import dataclasses
from functools import partial

import jax
import jax.numpy as jnp
from flax import nnx

from exaone_jax.config.model import LayerSpec, ModelConfig
from exaone_jax.model.cache import LayerKV
from exaone_jax.model.linear import Linear, ParamFactory
from exaone_jax.model.norm import RMSNorm
from exaone_jax.model.paged import Paged
from exaone_jax.model.placement import Placement
from exaone_jax.model.rope import Rotation, rotate
from pallas_kernels.attention import attention

# Up to this many queries a row attend over the whole ring at once; more are worth laying the window out in order.
_FEW_QUERIES = 16


@dataclasses.dataclass(frozen=True)
class Packed:
    """Attention inside rows `[B, T]`, between positions of equal segment id (None: one segment a row)."""

    segment_ids: jax.Array | None
    placement: Placement

    def __call__(self, q: jax.Array, k: jax.Array, v: jax.Array, window: int | None) -> jax.Array:
        return self.placement.attend(q, k, v, self.segment_ids, window)


@dataclasses.dataclass
class Cached:
    """Attention of new tokens to themselves and to one layer of a cache; holds the updated layer afterwards.

    layer: LayerKV stacked `[R, …]`, of which `index` is this layer's.
    lengths: int32 `[B]`, positions already in the cache. valid: int32 `[B]`, how many of the new tokens are real.
    """

    layer: LayerKV
    index: jax.typing.ArrayLike
    lengths: jax.Array
    valid: jax.Array
    placement: Placement

    def __call__(self, q: jax.Array, k: jax.Array, v: jax.Array, window: int | None) -> jax.Array:
        run = partial(_attend_cached, window)
        held = (self.layer, self.index, self.lengths, self.valid)
        out, self.layer = self.placement.attend_cached(run, *held, (q, k, v))
        return out


def _attend_cached(
    window: int | None,
    layer: LayerKV,
    index: jax.typing.ArrayLike,
    lengths: jax.Array,
    valid: jax.Array,
    q: jax.Array,
    k: jax.Array,
    v: jax.Array,
) -> tuple[jax.Array, LayerKV]:
    step = _CachedStep(layer, index, lengths, valid)
    return step.attend(q, k, v, window), step.layer


def _put(index: jax.Array, slot: jax.Array, stacked: jax.Array, new: jax.Array) -> jax.Array:
    """new `[B, C, K, head_dim]` into the slots `[B, C]` of one layer of stacked `[R, B, K, slots, head_dim]`."""
    row = jnp.arange(new.shape[0])[:, None]
    return stacked.at[index, row, :, slot].set(new, mode="drop", unique_indices=True)


def _put_by_head(index: jax.Array, slot: jax.Array, stacked: jax.Array, new: jax.Array) -> jax.Array:
    """The same. A TPU lays what one index writes side by side: were that all heads, it would copy the whole cache into such a
    layout and back. A CPU writes index after index, and wants few."""
    row, head = jnp.arange(new.shape[0])[:, None, None], jnp.arange(new.shape[2])
    return stacked.at[index, row, head, slot[..., None]].set(new, mode="drop", unique_indices=True)


@dataclasses.dataclass
class _CachedStep:
    """The work of `Cached`, on one device's part."""

    layer: LayerKV
    index: jax.typing.ArrayLike
    lengths: jax.Array
    valid: jax.Array

    def attend(self, q: jax.Array, k: jax.Array, v: jax.Array, window: int | None) -> jax.Array:
        in_order = window is not None and q.shape[1] > _FEW_QUERIES
        before = self._window_before(window) if in_order and window is not None else None
        self._write(k, v)
        if before is not None:
            return self._attend_window(q, k, v, before, window)
        keys, values = (jnp.moveaxis(self._read(x), 1, 2) for x in self.layer)
        if q.shape[1] > _FEW_QUERIES:
            return attention(q, keys, values, q_offset=self.lengths)
        return self._attend_slots(q, window)

    def _read(self, stacked: jax.Array) -> jax.Array:
        return stacked[self.index]

    def _write(self, k: jax.Array, v: jax.Array) -> None:
        """Put keys and values `[B, C, K, head_dim]` into their slots; tokens that are not real are dropped."""
        size = self.layer.k.shape[3]
        offsets = jnp.arange(k.shape[1])
        slot = (self.lengths[:, None] + offsets) % size
        slot = jnp.where(offsets < self.valid[:, None], slot, size)  # out of range: dropped by the scatter
        put = partial(jax.lax.platform_dependent, self.index, slot, cpu=_put, default=_put_by_head)
        k, v = (put(stacked, new.astype(stacked.dtype)) for stacked, new in zip(self.layer, (k, v), strict=True))
        self.layer = LayerKV(k, v)

    def _window_before(self, window: int) -> tuple[jax.Array, jax.Array, jax.Array]:
        """Keys and values `[B, P, K, head_dim]` of the P = W-1 positions before the new tokens, and which exist.

        A layer with fewer slots than that holds the whole context: P is then all of them.
        """
        size = self.layer.k.shape[3]
        positions = self.lengths[:, None] + jnp.arange(-min(window - 1, size), 0)
        slot = (positions % size)[:, None, :, None]
        k, v = (jnp.moveaxis(jnp.take_along_axis(self._read(x), slot, axis=2), 1, 2) for x in self.layer)
        return k, v, positions >= 0

    def _attend_window(
        self,
        q: jax.Array,
        k: jax.Array,
        v: jax.Array,
        before: tuple[jax.Array, jax.Array, jax.Array],
        window: int | None,
    ) -> jax.Array:
        keys_before, values_before, exists = before
        keys = jnp.concatenate([keys_before.astype(k.dtype), k], axis=1)
        values = jnp.concatenate([values_before.astype(v.dtype), v], axis=1)
        key_ids = jnp.concatenate([exists, jnp.ones(k.shape[:2], bool)], axis=1).astype(jnp.int32)
        query_ids = jnp.ones(q.shape[:2], jnp.int32)
        offset = keys_before.shape[1]
        return attention(q, keys, values, window=window, segment_ids=(query_ids, key_ids), q_offset=offset)

    def _attend_slots(self, q: jax.Array, window: int | None) -> jax.Array:
        """Few queries against every slot, masked by the position that each slot holds after the write."""
        batch, queries, heads, head_dim = q.shape
        keys, values = (self._read(x) for x in self.layer)
        kv_heads, size = keys.shape[1:3]
        newest = (self.lengths + self.valid - 1)[:, None]
        held = newest - (newest - jnp.arange(size)) % size  # position in each slot, negative where none was written
        distance = (self.lengths[:, None] + jnp.arange(queries))[:, :, None] - held[:, None, :]
        visible = (held[:, None, :] >= 0) & (distance >= 0)
        if window is not None:
            visible &= distance < window
        precision = jax.lax.Precision.HIGHEST if q.dtype == jnp.float32 else None
        grouped = q.reshape(batch, queries, kv_heads, heads // kv_heads, head_dim)
        grouped = jnp.moveaxis(grouped, 1, 3).reshape(batch, kv_heads, -1, head_dim) * head_dim**-0.5
        scores = jnp.einsum(
            "bknd,bksd->bkns", grouped, keys.astype(q.dtype), precision=precision, preferred_element_type=jnp.float32
        )
        visible = jnp.tile(visible, (1, heads // kv_heads, 1))[:, None]
        hidden = jnp.finfo(jnp.float32).min  # finite, so that a row with no real token stays free of NaN
        probs = jax.nn.softmax(jnp.where(visible, scores, hidden), axis=-1).astype(q.dtype)
        out = jnp.einsum(
            "bkns,bksd->bknd", probs, values.astype(q.dtype), precision=precision, preferred_element_type=jnp.float32
        )
        out = jnp.moveaxis(out.reshape(batch, kv_heads, heads // kv_heads, queries, head_dim), 3, 1)
        return out.reshape(batch, queries, heads, head_dim).astype(q.dtype)


class Attention(nnx.Module):
    """x `[B, T, D]` -> `[B, T, D]`. Normalises and rotates queries and keys, then leaves where to look to `attend`."""

    def __init__(self, make: ParamFactory, config: ModelConfig, spec: LayerSpec):
        size, head_dim = config.hidden_size, config.head_dim
        self.q_proj = Linear(make, size, config.num_heads * head_dim, ("heads", "embed"))
        self.k_proj = Linear(make, size, config.num_kv_heads * head_dim, ("kv_heads", "embed"))
        self.v_proj = Linear(make, size, config.num_kv_heads * head_dim, ("kv_heads", "embed"))
        self.o_proj = Linear(make, config.num_heads * head_dim, size, ("embed", "heads"))
        if spec.qk_norm:
            self.q_norm = RMSNorm(make, head_dim, config.rms_norm_eps, "head_dim")
            self.k_norm = RMSNorm(make, head_dim, config.rms_norm_eps, "head_dim")
        self.spec, self.head_dim = spec, head_dim

    def __call__(self, x: jax.Array, rotation: Rotation, attend: Packed | Cached | Paged) -> jax.Array:
        heads = (*x.shape[:2], -1, self.head_dim)
        weights = tuple(proj.weight[...] for proj in (self.q_proj, self.k_proj, self.v_proj))
        qkv = attend.placement.project(x, weights, ("heads", "kv_heads", "kv_heads"))
        if self.spec.qk_norm:
            # libtpu 0.0.48 to 0.0.50 fuse the products with the split into heads and its norm, and abort on some meshes:
            # "TransformWindow: split of a padded window dim is not supported".
            qkv = jax.lax.optimization_barrier(qkv)
        q, k, v = (
            proj.adapted(x, out).reshape(heads)
            for proj, out in zip((self.q_proj, self.k_proj, self.v_proj), qkv, strict=True)
        )
        if self.spec.qk_norm:
            q, k = self.q_norm(q), self.k_norm(k)
        if self.spec.rope:
            q, k = rotate(q, rotation), rotate(k, rotation)
        out = attend(q, k, v, self.spec.window).reshape(*x.shape[:2], -1)
        return self.o_proj.adapted(out, attend.placement.contract(out, self.o_proj.weight[...], "heads"))
