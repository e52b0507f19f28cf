"""Grouped matmul on TPU with int8, int4 or float8 matrices, which are dequantised on chip: HBM is read in the small type.

A grid step multiplies one tile of rows with one tile of the matrix of a group that has rows in it. Where the scales stand decides
what is multiplied by them:
  one an output channel        the finished sums, once
  one a contracted channel     the rows, before the kernel: the same thing seen from the gradient
  one a block of both          each tile of the matrix, in float32, before it is rounded to the rows' dtype
"""

import functools

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from pallas_kernels.grouped_matmul.quantized import QuantizedRhs, split_scales

_LANES = 128
_ROWS = 128  # of a tile; each group's first and last tile are shared with its neighbours
_VMEM = 40 * 2**20


def unsupported(lhs: jax.Array, rhs: QuantizedRhs) -> str | None:
    """Why the kernel cannot serve a call, or None."""
    if lhs.dtype not in (jnp.bfloat16, jnp.float32):
        return f"the kernel multiplies bfloat16 and float32, and lhs is {lhs.dtype}"
    if any(size % _LANES for size in rhs.shape[1:]):
        return f"the kernel needs K and N to be multiples of {_LANES}, found rhs {rhs.shape}"
    block = rhs.shape[1] // rhs.scales.shape[1]
    if min(rhs.scales.shape[1:]) > 1 and (block % _LANES or not _tile(rhs.shape[1], block)):
        return f"the kernel takes blocks of {_LANES}, 256 or 512 along the first axis of a matrix, found {block}"
    return None


def _tile(size: int, block: int = _LANES) -> int | None:
    """The largest tile that divides size and has whole blocks."""
    return next((tile for tile in (512, 256, _LANES) if size % tile == 0 and tile % block == 0), None)


def product(
    x: jax.Array,
    rhs: QuantizedRhs,
    sizes: jax.Array,
    first: jax.Array | None,
    transposed: bool,
    out_dtype: jnp.dtype,
    interpret: bool,
) -> jax.Array:
    """x `[M, K]` times values `[G, K, N]` or, transposed, `[G, N, K]` -> `[M, N]`, zeros in the rows of no group."""
    num_rows, n = x.shape[0], rhs.shape[1 if transposed else 2]
    begin = jnp.cumsum(sizes) - sizes + (0 if first is None else first)
    row = jnp.arange(num_rows)
    mine = ((row >= begin[0]) & (row < begin[-1] + sizes[-1]))[:, None]
    x, after, scales = split_scales(jnp.where(mine, x, 0), rhs, begin, sizes, transposed)
    if after is None:
        after = jnp.ones((rhs.shape[0], 1, n), jnp.float32)
    if scales is not None:
        scales = jnp.repeat(scales, rhs.shape[2] // scales.shape[2], axis=2)
    x = jnp.pad(x, ((0, -num_rows % _ROWS), (0, 0)))
    out = _call(x, rhs.values, scales, after, begin, sizes, transposed, out_dtype, interpret)
    return jnp.where(mine, out[:num_rows], 0)


# Two functions, not one closed over a flag: a plan holds one of them, and plans that are equal share a compile.
compiled = functools.partial(product, interpret=False)
interpreted = functools.partial(product, interpret=True)


def _items(begin: jax.Array, sizes: jax.Array, num_tiles: int) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Pairs of a group and a tile of rows that it has rows in, by rows: groups and tiles int32 `[num_tiles + G]`, and how
    many pairs there are. A tile's pairs are neighbours, so it stays on chip for all its groups."""
    tile = begin // _ROWS
    count = jnp.where(sizes > 0, (begin + sizes - 1) // _ROWS - tile + 1, 0)
    ends = jnp.cumsum(count)
    item = jnp.arange(num_tiles + len(sizes))
    group = jnp.minimum(jnp.searchsorted(ends, item, side="right"), len(sizes) - 1).astype(jnp.int32)
    tiles = jnp.minimum(tile[group] + item - (ends - count)[group], num_tiles - 1)
    return group, tiles.astype(jnp.int32), ends[-1]


@functools.partial(jax.jit, static_argnums=(6, 7, 8))
def _call(
    x: jax.Array,
    values: jax.Array,
    scales: jax.Array | None,
    after: jax.Array,
    begin: jax.Array,
    sizes: jax.Array,
    transposed: bool,
    out_dtype: jnp.dtype,
    interpret: bool,
) -> jax.Array:
    """x in whole tiles; scales `[G, blocks, B]` of values `[G, A, B]` or None; after `[G, 1, N]`."""
    (num_rows, k), n = x.shape, values.shape[1 if transposed else 2]
    block = _LANES if scales is None else values.shape[1] // scales.shape[1]
    first_tile, second_tile = _tile(values.shape[1], block), _tile(values.shape[2])
    if first_tile is None or second_tile is None:
        raise NotImplementedError(f"grouped_matmul: no tiles for quantised values {values.shape}")
    tile_k, tile_n = (second_tile, first_tile) if transposed else (first_tile, second_tile)
    groups, tiles, count = _items(begin, sizes, num_rows // _ROWS)

    def at(i, j):
        """The tile of values, in their layout, for tile i of N and tile j of K."""
        return (i, j) if transposed else (j, i)

    in_specs = [
        pl.BlockSpec((_ROWS, tile_k), lambda i, item, j, group, tile, *_: (tile[item], j)),
        pl.BlockSpec((None, first_tile, second_tile), lambda i, item, j, group, *_: (group[item], *at(i, j))),
        pl.BlockSpec((None, 1, tile_n), lambda i, item, j, group, *_: (group[item], 0, i)),
    ]
    arrays = [x, values, after]
    if scales is not None:
        whole = (None, scales.shape[1], second_tile)
        in_specs.append(pl.BlockSpec(whole, lambda i, item, j, group, *_: (group[item], 0, at(i, j)[1])))
        arrays.append(scales)
    return pl.pallas_call(
        functools.partial(_kernel, transposed=transposed, block=block if scales is not None else None),
        grid_spec=pltpu.PrefetchScalarGridSpec(
            num_scalar_prefetch=4,
            grid=(n // tile_n, count, k // tile_k),
            in_specs=in_specs,
            out_specs=pl.BlockSpec((_ROWS, tile_n), lambda i, item, j, group, tile, *_: (tile[item], i)),
            scratch_shapes=[pltpu.VMEM((_ROWS, tile_n), jnp.float32)],
        ),
        out_shape=jax.ShapeDtypeStruct((num_rows, n), out_dtype),
        compiler_params=pltpu.CompilerParams(
            dimension_semantics=(pltpu.PARALLEL, pltpu.ARBITRARY, pltpu.ARBITRARY), vmem_limit_bytes=_VMEM
        ),
        cost_estimate=pl.CostEstimate(
            flops=2 * num_rows * k * n,
            transcendentals=0,
            bytes_accessed=values.size * values.dtype.itemsize + (n // tile_n) * x.size * x.dtype.itemsize,
        ),
        interpret=interpret,
        name="grouped_matmul_quantized",
    )(groups, tiles, begin, sizes, *arrays)


def _kernel(groups, tiles, begin, sizes, x_ref, values_ref, after_ref, *refs, transposed: bool, block: int | None):
    (*scales_ref, out_ref, sum_ref), item = refs, pl.program_id(1)
    i, j = pl.program_id(0), pl.program_id(2)

    @pl.when(j == 0)
    def _():
        sum_ref[...] = jnp.zeros_like(sum_ref)

    matrix = values_ref[...].astype(jnp.float32)
    if block is not None:
        blocks = matrix.shape[0] // block
        above = (i if transposed else j) * blocks
        parts = [matrix[b * block : (b + 1) * block] * scales_ref[0][pl.ds(above + b, 1), :] for b in range(blocks)]
        matrix = jnp.concatenate(parts, axis=0)
    precision = lax.Precision.HIGHEST if x_ref.dtype == jnp.float32 else lax.Precision.DEFAULT
    dims = (((1,), (1 if transposed else 0,)), ((), ()))
    sum_ref[...] += lax.dot_general(
        x_ref[...], matrix.astype(x_ref.dtype), dims, precision=precision, preferred_element_type=jnp.float32
    )

    @pl.when(j == pl.num_programs(2) - 1)
    def _():
        # What the groups before have written stays; a row of no group keeps whatever was there.
        row = tiles[item] * _ROWS + lax.broadcasted_iota(jnp.int32, out_ref.shape, 0)
        own = (row >= begin[groups[item]]) & (row < begin[groups[item]] + sizes[groups[item]])
        kept = out_ref[...].astype(jnp.float32)
        out_ref[...] = jnp.where(own, sum_ref[...] * after_ref[...], kept).astype(out_ref.dtype)
