"""Grouped matmul on a TPU: jax's megablox kernels, kept from rows of no group."""

import functools

import jax
import jax.numpy as jnp
from jax.experimental.pallas.ops.tpu.megablox import ops as megablox

from pallas_kernels._select import target
from pallas_kernels.grouped_matmul import tpu_quantized
from pallas_kernels.grouped_matmul.quantized import QuantizedRhs

_TILE = 128


def unsupported(lhs: jax.Array, rhs: jax.Array | QuantizedRhs, interpret: bool) -> str | None:
    """Why megablox, or the kernel of quantised matrices, cannot serve this call, or None."""
    if target() != "tpu" and not interpret:
        return (
            f"its kernels need a TPU or interpret=True, and this call is for {target()!r}; a compile ahead of time "
            "needs jax.set_mesh with a mesh of the TPU topology's devices"
        )
    if isinstance(rhs, QuantizedRhs):
        return tpu_quantized.unsupported(lhs, rhs)
    if lhs.dtype != jnp.bfloat16 or rhs.dtype != jnp.bfloat16:
        return f"megablox multiplies in the MXU's bfloat16, and lhs, rhs are {lhs.dtype}, {rhs.dtype}"
    if any(size % _TILE for size in (*lhs.shape, *rhs.shape[1:])):
        return f"megablox needs M, K and N to be multiples of {_TILE}, found lhs {lhs.shape} and rhs {rhs.shape}"
    return None


def grouped_matmul(
    lhs: jax.Array,
    rhs: jax.Array,
    sizes: jax.Array,
    first: jax.Array | None,
    transpose_rhs: bool,
    out_dtype: jnp.dtype,
    interpret: bool,
) -> jax.Array:
    """lhs `[M, K]` and rhs `[G, K, N]` or `[G, N, K]` bfloat16, sizes int32 `[G]` of the groups from row `first` (None: 0) on
    -> `[M, N]`."""
    row, extents = jnp.arange(lhs.shape[0]), (*lhs.shape, rhs.shape[1 if transpose_rhs else 2])
    begin = 0 if first is None else first
    mine = ((row >= begin) & (row < begin + jnp.sum(sizes)))[:, None]
    run = functools.partial(megablox.gmm, tiling=tuple(map(_tile, extents)), transpose_rhs=transpose_rhs)
    if first is not None:  # the rows before are those of one more group, which has no matrix here
        sizes = jnp.concatenate([jnp.reshape(first, 1), sizes])
        run = functools.partial(run, group_offset=jnp.ones((), jnp.int32))
    # megablox leaves rows of no group unwritten, in the result and in lhs's gradient: one select guards each.
    out = run(jnp.where(mine, lhs, 0), rhs, sizes, preferred_element_type=out_dtype, interpret=interpret)
    return jnp.where(mine, out, 0)


def _tile(size: int) -> int:
    """The largest of megablox's usual tiles that divides size."""
    return next(tile for tile in (512, 256, _TILE) if size % tile == 0)
