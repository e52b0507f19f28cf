"""Running a segment: the blocks of one pattern, scanned over their stacked parameters.

A segment that stands once is run directly: its leading axis of one is dropped without a copy.
"""

from collections.abc import Callable, Sequence
from functools import partial
from typing import Literal, TypeVar, cast

import jax
import jax.numpy as jnp
from flax import nnx
from jax.ad_checkpoint import checkpoint_name

from exaone_jax.model.attention import Cached, Packed
from exaone_jax.model.block import Block
from exaone_jax.model.cache import LayerKV, PagedKV
from exaone_jax.model.linear import PRODUCT
from exaone_jax.model.moe import RouterStats
from exaone_jax.model.paged import Paged
from exaone_jax.model.placement import Placement
from exaone_jax.model.rope import Rotation

Remat = Literal["full", "dots", "offload"] | None
_BLOCK_INPUT = "block_input"
SegmentStats = tuple[RouterStats | None, ...]
KV = TypeVar("KV", LayerKV, PagedKV)
Look = Callable[[KV, jax.typing.ArrayLike], Cached | Paged]

_REMAT_POLICIES = {
    "full": jax.checkpoint_policies.nothing_saveable,
    "dots": jax.checkpoint_policies.save_only_these_names(PRODUCT),
    "offload": jax.checkpoint_policies.save_and_offload_only_these_names(
        names_which_can_be_saved=[],
        names_which_can_be_offloaded=[_BLOCK_INPUT],
        offload_src="device",
        offload_dst="pinned_host",
    ),
}


def run(
    blocks: nnx.List[Block],
    x: jax.Array,
    rotation: Rotation,
    real: jax.Array,
    segment_ids: jax.Array | None,
    remat: Remat,
    placement: Placement,
) -> tuple[jax.Array, SegmentStats]:
    """x `[B, T, D]` through a segment without a cache; statistics, one for each place in the pattern, are `[R, …]`."""
    graphdef, params = nnx.split(blocks)
    once = (
        _repeats(params) == 1
    )  # no loop keeps the compiler from finding that it computes a layer twice, and keeping all of it

    def one(block: Block, x: jax.Array) -> tuple[jax.Array, RouterStats | None]:
        x = checkpoint_name(x, _BLOCK_INPUT)
        return block(x, rotation, Packed(segment_ids, placement), real, placement)

    def body(x: jax.Array, params: nnx.State) -> tuple[jax.Array, SegmentStats]:
        stats = []
        for block in nnx.merge(graphdef, params):
            layer = partial(one, block)
            if remat is not None:  # each layer by itself: a pattern's worth of experts' buffers is too much at once
                layer = jax.checkpoint(layer, policy=_REMAT_POLICIES[remat], prevent_cse=once)
            x, block_stats = layer(x)
            stats.append(block_stats)
        return x, tuple(stats)

    if once:
        x, stats = body(x, jax.tree.map(lambda leaf: leaf[0], params))
        return x, jax.tree.map(lambda leaf: leaf[None], stats)
    return jax.lax.scan(body, x, params)


def step(
    blocks: nnx.List[Block],
    x: jax.Array,
    rotation: Rotation,
    real: jax.Array,
    caches: Sequence[KV],
    look: Look[KV],
    placement: Placement,
) -> tuple[jax.Array, tuple[KV, ...]]:
    """x `[B, C, D]` through a segment with its caches, which ride along so that the loop updates them in place.

    look: (a stack's cache, which layer of the stack) -> the attention of that layer.
    """
    graphdef, params = nnx.split(blocks)

    def body(
        carry: tuple[jax.Array, tuple[KV, ...]], xs: tuple[nnx.State, jax.typing.ArrayLike]
    ) -> tuple[tuple[jax.Array, tuple[KV, ...]], None]:
        (x, caches), (params, index) = carry, xs
        updated = []
        for block, layer in zip(nnx.merge(graphdef, params), caches, strict=True):
            attend = look(layer, index)
            x, _ = block(x, rotation, attend, real, placement)
            updated.append(cast(KV, attend.layer))
        return (x, tuple(updated)), None

    carry = (x, tuple(caches))
    if _repeats(params) == 1:
        return body(carry, (jax.tree.map(lambda leaf: leaf[0], params), 0))[0]
    return jax.lax.scan(body, carry, (params, jnp.arange(_repeats(params))))[0]


def _repeats(params: nnx.State) -> int:
    return jax.tree.leaves(params)[0].shape[0]
