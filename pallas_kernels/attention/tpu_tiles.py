"""What the TPU kernels share: constants, products, where queries stand, and how a column of row statistics becomes a row."""

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax.numpy as jnp
from jax import Array, lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

TILE = 128  # lanes of a vector register, and the side of the tiles that a window folds
HIDDEN = -1e30  # the score of a key that may not be seen; finite, so that no inf - inf
FLOOR = -1e29  # no running maximum is below this: exp2(HIDDEN - FLOOR) is 0, so a row that sees nothing sums to 0
LOG2E = 1.4426950408889634

PARALLEL, IN_ORDER = pltpu.GridDimensionSemantics.PARALLEL, pltpu.GridDimensionSemantics.ARBITRARY


class Band(NamedTuple):
    """Where the queries stand among the keys of their row of the batch: query i at key `offset + i`."""

    queries: int  # T
    keys: int  # S
    offset: int | None  # None: one a row of the batch, int32 [B] in scalar memory, the kernel's first argument

    @property
    def past_end(self) -> bool:
        """Whether a query may stand after the last key."""
        return self.offset is None or self.offset + self.queries > self.keys

    @property
    def expected(self) -> int:
        """The offset, for estimates: where it is data, queries are taken for the last of the keys."""
        return self.keys - self.queries if self.offset is None else self.offset

    def blind(self, window: int | None) -> bool:
        """Whether a query may see no key."""
        if self.offset is None or self.offset < 0:
            return True
        return window is not None and self.offset + self.queries - self.keys >= window

    def offset_of(self, row: Any, *offsets: Any) -> Any:
        """In an index map: the offset of a row of the batch."""
        return offsets[0][row] if self.offset is None else self.offset

    def take_offset(self, refs: tuple[Any, ...]) -> tuple[Any, tuple[Any, ...]]:
        """In a kernel whose first grid dimension is the batch: (the offset, the other arguments)."""
        return (refs[0][pl.program_id(0)], refs[1:]) if self.offset is None else (self.offset, refs)

    def pallas_call(
        self, kernel: Callable[..., None], offsets: Array | None, inputs: Sequence[Array], **call: Any
    ) -> Any:
        """`pl.pallas_call(kernel, ...)(*inputs)`; `offsets`, where there are any, go before the inputs and into index maps."""
        names = ("grid", "in_specs", "out_specs", "scratch_shapes")
        grid = {name: call.pop(name) for name in names if name in call}
        prefetched = [] if offsets is None else [offsets]
        spec = pltpu.PrefetchScalarGridSpec(num_scalar_prefetch=len(prefetched), **grid)
        return pl.pallas_call(kernel, grid_spec=spec, **call)(*prefetched, *inputs)


def compiler_params(*dimensions: pltpu.GridDimensionSemantics) -> pltpu.CompilerParams:
    # The default limit of 16 MB is a quarter or less of every chip's VMEM.
    return pltpu.CompilerParams(dimension_semantics=dimensions, vmem_limit_bytes=56 * 2**20)


def ceil_to(x: int, multiple: int) -> int:
    return -(-x // multiple) * multiple


def dot(a: Array, b: Array, contract: tuple[int, int]) -> Array:
    """Float32 product of two matrices over the named dimension of each."""
    precision = lax.Precision.HIGHEST if a.dtype == jnp.float32 else lax.Precision.DEFAULT
    dimensions = (((contract[0],), (contract[1],)), ((), ()))
    return lax.dot_general(a, b, dimensions, precision=precision, preferred_element_type=jnp.float32)


def iota(shape: tuple[int, int], dimension: int) -> Array:
    return lax.broadcasted_iota(jnp.int32, shape, dimension)


def repeat(x: Array, times: int, axis: int) -> Array:
    return x if times == 1 else jnp.concatenate([x] * times, axis)


def heads_at_once(group: int, most: int) -> int:
    """The largest divisor of `group` that is at most `most`."""
    return max(n for n in range(1, group + 1) if group % n == 0 and n <= max(1, most))


def columns_to_rows(columns: list[Array]) -> Array:
    """One column [128, 1] or [128, 128] (all lanes the same) a head -> [heads, 128]: a single transpose serves all heads."""
    lane = iota((TILE, TILE), 1)
    table = jnp.zeros((TILE, TILE), jnp.float32)
    for head, column in enumerate(columns):
        table = jnp.where(lane == head, column, table)
    return table.T[: len(columns)]


def log_sum_exp2(peaks: list[Array], totals: list[Array]) -> Array:
    """[heads, 128] base-2 log-sum-exp from columns of maxima and sums; -inf where the sum is 0."""
    return columns_to_rows(peaks) + jnp.log2(columns_to_rows(totals))


def cost(scores: int, products: int, head_dim: int, inputs: Sequence[Array]) -> pl.CostEstimate:
    """For XLA's scheduler and for who counts FLOPs: of all scores that the kernel computes, masked ones included, each part of
    so many products over head_dim. Bytes are of the inputs and once more for the results."""
    flops = 2 * products * scores * head_dim
    read = sum(x.size * x.dtype.itemsize for x in inputs)
    return pl.CostEstimate(flops=flops, transcendentals=scores, bytes_accessed=2 * read)
