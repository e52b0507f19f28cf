"""Grouped matmul on NVIDIA GPUs, by Pallas's Triton lowering: every tile is of one group, wherever the group's rows begin.

A program multiplies a tile of one group's rows with a tile of its matrix; for the matrices' gradient it has a tile of one matrix
and goes by the group's rows. Small matrices (int8, float8) are multiplied as they are, and their scales with the sums.
"""

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton

from pallas_kernels._select import target
from pallas_kernels._triton import product as triton_product
from pallas_kernels._triton import whole
from pallas_kernels.grouped_matmul.quantized import QuantizedRhs, split_scales

_TILE_N = 128


class Plan(NamedTuple):
    """What is static in one call. transposed: whether the matrices are `[N, K]`; interpret: run in the interpreter."""

    transposed: bool
    interpret: bool


def unsupported(
    lhs: jax.Array, rhs: jax.Array | QuantizedRhs, *, interpret: bool = False, named: bool = True
) -> str | None:
    """Why this implementation cannot serve a call, or None if it can.

    Until it has run on a card, a call gets it by asking for "gpu" alone: not `named`, it serves nothing.
    """
    if not interpret and target() != "gpu":
        return "there is no GPU here; interpret=True runs the kernel on any backend"
    if not named:
        return "the Pallas kernel has not been timed on a card; implementation='gpu' asks for it"
    values = rhs.values if isinstance(rhs, QuantizedRhs) else rhs
    if max(lhs.size, values.size, lhs.shape[0] * max(values.shape[1:])) >= 2**31:
        return f"the GPU kernel counts elements in 32 bits, and lhs, rhs are {lhs.shape}, {rhs.shape}"
    if not isinstance(rhs, QuantizedRhs):
        return None
    if values.dtype == jnp.int4:
        return "Triton has no 4-bit arrays"
    blocks = [size // count for size, count in zip(values.shape[1:], rhs.scales.shape[1:], strict=True)]
    if min(rhs.scales.shape[1:]) > 1 and any(block % _TILE_N for block in blocks):
        return f"the GPU kernel takes blocks of multiples of {_TILE_N}, found {blocks[0]} x {blocks[1]}"
    return None


def product(
    x: jax.Array,
    rhs: jax.Array | QuantizedRhs,
    sizes: jax.Array,
    first: jax.Array | None,
    transposed: bool,
    out_dtype: jnp.dtype,
    interpret: bool,
) -> jax.Array:
    """x `[M, K]` times rhs `[G, K, N]` or, transposed, `[G, N, K]` -> `[M, N]`, zeros in the rows of no group."""
    begin = jnp.cumsum(sizes) - sizes + (0 if first is None else first)
    after = scales = None
    if isinstance(rhs, QuantizedRhs):
        x, after, scales = split_scales(x, rhs, begin, sizes, transposed)
        rhs = rhs.values
    out = _product(x, rhs, after, scales, begin, sizes, Plan(transposed, interpret), out_dtype)
    row = jnp.arange(x.shape[0])
    return jnp.where(((row >= begin[0]) & (row < begin[-1] + sizes[-1]))[:, None], out, 0)


def outer(
    left: jax.Array,
    right: jax.Array,
    sizes: jax.Array,
    first: jax.Array | None,
    out_dtype: jnp.dtype,
    interpret: bool,
) -> jax.Array:
    """out[g] = sum over the rows m of group g of left[m] right[m]^T: `[M, A]`, `[M, B]` -> `[G, A, B]`."""
    begin = jnp.cumsum(sizes) - sizes + (0 if first is None else first)
    return _outer(left, right, begin, begin + sizes, out_dtype, interpret)


# Functions of the module, not closed over a flag: a plan holds them, and plans that are equal share a compile.
compiled = functools.partial(product, interpret=False), functools.partial(outer, interpret=False)
interpreted = functools.partial(product, interpret=True), functools.partial(outer, interpret=True)


def _tiles(dtype: jnp.dtype) -> tuple[int, int]:
    """Rows, and contracted channels, of a tile."""
    return (64, 64) if dtype.itemsize == 2 else (32, 32)


def _items(begin: jax.Array, sizes: jax.Array, rows: int, most: int) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Tiles of `rows` rows of one group: their groups, first rows and ends of the groups, int32 `[most]`; those past the last
    are empty."""
    count = -(-sizes // rows)
    ends = jnp.cumsum(count)
    item = jnp.arange(most)
    group = jnp.minimum(jnp.searchsorted(ends, item, side="right"), len(sizes) - 1)
    start = begin[group] + (item - (ends - count)[group]) * rows
    return group.astype(jnp.int32), start.astype(jnp.int32), (begin + sizes)[group].astype(jnp.int32)


def _load(ref, *index: jax.Array, kept: jax.Array, dtype: jnp.dtype) -> jax.Array:
    """The elements `index`, zeros where not `kept`: what is there is never looked at."""
    x = triton.load(ref.at[tuple(jnp.broadcast_to(i, kept.shape) if i.ndim else i for i in index)], mask=kept)
    return jnp.where(kept, x.astype(dtype), 0)


def _iota(size: int, axis: int) -> jax.Array:
    return lax.broadcasted_iota(jnp.int32, (size, 1) if axis == 0 else (1, size), axis)


@functools.partial(jax.jit, static_argnums=(6, 7))
def _product(x, values, after, scales, begin, sizes, plan: Plan, out_dtype: jnp.dtype) -> jax.Array:
    """`after` float32 `[G, 1, N]` or None multiplies the sums, `scales` float32 `[G, blocks, blocks]` or None the tiles."""
    (num_rows, _), n = x.shape, values.shape[1 if plan.transposed else 2]
    rows, _ = _tiles(x.dtype)
    items = _items(begin, sizes, rows, num_rows // rows + min(len(sizes), num_rows))
    optional = [a for a in (after, scales) if a is not None]
    return pl.pallas_call(
        functools.partial(_product_kernel, plan, after is not None, scales is not None),
        grid=(items[0].shape[0], pl.cdiv(n, _TILE_N)),
        in_specs=[pl.BlockSpec((None,), lambda i, j: (i,))] * 3 + [whole(a) for a in (x, values, *optional)],
        out_specs=pl.BlockSpec((num_rows, n), lambda i, j: (0, 0)),
        out_shape=jax.ShapeDtypeStruct((num_rows, n), out_dtype),
        compiler_params=triton.CompilerParams(num_warps=4, num_stages=3),
        interpret=plan.interpret,
        name="grouped_matmul",
    )(*items, x, values, *optional)


def _product_kernel(
    plan: Plan, has_after: bool, has_scales: bool, group_ref, start_ref, end_ref, x_ref, values_ref, *refs
):
    *optional, out_ref = refs
    group, (rows, depth), k, n = group_ref[()], _tiles(x_ref.dtype), x_ref.shape[1], out_ref.shape[1]
    row, first_column = start_ref[()] + _iota(rows, 0), pl.program_id(1) * _TILE_N
    own, column = row < end_ref[()], first_column + _iota(_TILE_N, 1)

    def scale(first_channel):
        blocks, size = optional[-1].shape[1:], values_ref.shape[1:]
        at = (first_column, first_channel) if plan.transposed else (first_channel, first_column)
        return optional[-1][group, at[0] // (size[0] // blocks[0]), at[1] // (size[1] // blocks[1])]

    def add(step, total):
        channel = step * depth + _iota(depth, 1)
        a = _load(x_ref, row, channel, kept=own & (channel < k), dtype=x_ref.dtype)
        if plan.transposed:
            down = first_column + _iota(_TILE_N, 0)
            b = _load(values_ref, group, down, channel, kept=(down < n) & (channel < k), dtype=x_ref.dtype)
        else:
            down = step * depth + _iota(depth, 0)
            b = _load(values_ref, group, down, column, kept=(down < k) & (column < n), dtype=x_ref.dtype)
        part = triton_product(a, b, (1, 1 if plan.transposed else 0))
        return total + (part * scale(step * depth) if has_scales else part)

    steps = jnp.where(start_ref[()] < end_ref[()], pl.cdiv(k, depth), 0)
    total = lax.fori_loop(0, steps, add, jnp.zeros((rows, _TILE_N), jnp.float32))
    kept = own & (column < n)
    if has_after:
        total *= _load(optional[0], group, jnp.zeros_like(column), column, kept=column < n, dtype=jnp.float32)
    at = tuple(jnp.broadcast_to(i, kept.shape) for i in (row, column))
    triton.store(out_ref.at[at], total.astype(out_ref.dtype), mask=kept)


@functools.partial(jax.jit, static_argnums=(4, 5))
def _outer(left, right, begin, end, out_dtype: jnp.dtype, interpret: bool) -> jax.Array:
    out = jax.ShapeDtypeStruct((begin.shape[0], left.shape[1], right.shape[1]), out_dtype)
    rows, _ = _tiles(left.dtype)
    return pl.pallas_call(
        _outer_kernel,
        grid=(out.shape[0], pl.cdiv(out.shape[1], rows), pl.cdiv(out.shape[2], _TILE_N)),
        in_specs=[pl.BlockSpec((None,), lambda g, i, j: (g,))] * 2 + [whole(left), whole(right)],
        out_specs=pl.BlockSpec(out.shape, lambda g, i, j: (0, 0, 0)),
        out_shape=out,
        compiler_params=triton.CompilerParams(num_warps=4, num_stages=3),
        interpret=interpret,
        name="grouped_outer",
    )(begin, end, left, right)


def _outer_kernel(begin_ref, end_ref, left_ref, right_ref, out_ref):
    group, begin, end, dtype = pl.program_id(0), begin_ref[()], end_ref[()], left_ref.dtype
    rows, depth = _tiles(dtype)  # the tile's height is of channels here, and its depth of rows
    above = pl.program_id(1) * rows
    left_channel, right_channel = above + _iota(rows, 1), pl.program_id(2) * _TILE_N + _iota(_TILE_N, 1)

    def add(step, total):
        row = begin + step * depth + _iota(depth, 0)
        a = _load(left_ref, row, left_channel, kept=(row < end) & (left_channel < left_ref.shape[1]), dtype=dtype)
        b = _load(right_ref, row, right_channel, kept=(row < end) & (right_channel < right_ref.shape[1]), dtype=dtype)
        return total + triton_product(a, b, (0, 0))

    total = lax.fori_loop(0, (end - begin + depth - 1) // depth, add, jnp.zeros((rows, _TILE_N), jnp.float32))
    down = above + _iota(rows, 0)
    kept = (down < out_ref.shape[1]) & (right_channel < out_ref.shape[2])
    at = tuple(jnp.broadcast_to(i, kept.shape) for i in (down, right_channel))
    triton.store(out_ref.at[(group, *at)], total.astype(out_ref.dtype), mask=kept)
