"""The key-value cache: whole context for global layers, a ring of the last positions for window layers."""

import dataclasses
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp

from exaone_jax.config.model import LayerSpec, ModelConfig, Segment

CACHE_AXES = ("layers", "batch", "kv_heads", "slots", "head_dim")
Zeros = Callable[[tuple[int, ...], jax.typing.DTypeLike, tuple[str, ...]], jax.Array]


class LayerKV(NamedTuple):
    """Keys and values of one stacked block, each `[R, B, K, slots, head_dim]`. Position p lives in slot p mod slots."""

    k: jax.Array
    v: jax.Array


class PagedKV(NamedTuple):
    """Keys and values of one stacked block, each `[R, P, K, page_size, head_dim]`, P the pages of the layers' group.

    In int8 and float8_e4m3fn each position of each head has its own scale, float32 `[R, P, K, page_size]`, so that what is
    read of it depends on nothing else.
    """

    k: jax.Array
    v: jax.Array
    k_scales: jax.Array | None = None
    v_scales: jax.Array | None = None


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class KVCache:
    """What attention remembers.

    layers: one LayerKV for each (segment, place in its pattern).
    lengths: int32 `[B]`, how many positions each row holds. Slots hold no positions of their own: which position a slot
        has follows from the length, so forgetting the newest tokens is a smaller length and nothing else.
    """

    layers: tuple[tuple[LayerKV, ...], ...]
    lengths: jax.Array

    def rolled_back(self, lengths: jax.Array) -> "KVCache":
        """The cache as it was at `lengths` (int32 `[B]`), at most one `step` of `chunk` tokens ago for the rings."""
        return dataclasses.replace(self, lengths=lengths)


def slots(spec: LayerSpec, capacity: int, chunk: int) -> int:
    """Slots a layer needs for `capacity` positions written up to `chunk` at a time.

    A ring of window - 1 + chunk keeps every key that the first query of a chunk sees while the chunk's own keys go in.
    """
    return capacity if spec.window is None else min(capacity, spec.window - 1 + chunk)


def init_cache(
    config: ModelConfig,
    plan: tuple[Segment, ...],
    batch: int,
    capacity: int,
    chunk: int,
    dtype: jax.typing.DTypeLike,
    zeros: Zeros,
) -> KVCache:
    """An empty cache for `batch` rows of up to `capacity` positions, written at most `chunk` at a time.

    zeros: makes an array of a shape and dtype, laid out by its logical axes.
    """

    def layer(spec: LayerSpec, repeats: int) -> LayerKV:
        shape = (repeats, batch, config.num_kv_heads, slots(spec, capacity, chunk), config.head_dim)
        return LayerKV(zeros(shape, dtype, CACHE_AXES), zeros(shape, dtype, CACHE_AXES))

    layers = tuple(tuple(layer(spec, segment.repeats) for spec in segment.pattern) for segment in plan)
    return KVCache(layers, jnp.zeros((batch,), jnp.int32))
