"""Grouped matmul on a TPU: jax's megablox kernels, kept from rows of no group."""

import functools

import jax
import jax.numpy as jnp
from jax.experimental.pallas.ops.tpu.megablox import ops as megablox

_TILE = 128


def unsupported(lhs: jax.Array, rhs: jax.Array, interpret: bool) -> str | None:
    """Why megablox cannot serve this call, or None."""
    if jax.default_backend() != "tpu" and not interpret:
        return f"megablox needs a TPU or interpret=True, and the backend is {jax.default_backend()!r}"
    if lhs.dtype != jnp.bfloat16 or rhs.dtype != jnp.bfloat16:
        return f"megablox multiplies in the MXU's bfloat16, and lhs, rhs are {lhs.dtype}, {rhs.dtype}"
    if any(size % _TILE for size in (*lhs.shape, *rhs.shape[1:])):
        return f"megablox needs M, K and N to be multiples of {_TILE}, found lhs {lhs.shape} and rhs {rhs.shape}"
    return None


def grouped_matmul(
    lhs: jax.Array,
    rhs: jax.Array,
    group_sizes: jax.Array,
    transpose_rhs: bool,
    out_dtype: jnp.dtype,
    interpret: bool,
) -> jax.Array:
    """lhs `[M, K]` and rhs `[G, K, N]` or `[G, N, K]` bfloat16, group_sizes int32 `[G]` -> `[M, N]`."""
    mine = (jnp.arange(lhs.shape[0]) < jnp.sum(group_sizes))[:, None]
    sizes = (*lhs.shape, rhs.shape[1 if transpose_rhs else 2])
    run = functools.partial(
        megablox.gmm, tiling=(_tile(sizes[0]), _tile(sizes[1]), _tile(sizes[2])), transpose_rhs=transpose_rhs
    )
    # megablox leaves rows of no group unwritten, in the result and in lhs's gradient: one select guards each.
    out = run(jnp.where(mine, lhs, 0), rhs, group_sizes, preferred_element_type=out_dtype, interpret=interpret)
    return jnp.where(mine, out, 0)


def _tile(size: int) -> int:
    """The largest of megablox's usual tiles that divides size."""
    return next(tile for tile in (512, 256, _TILE) if size % tile == 0)
