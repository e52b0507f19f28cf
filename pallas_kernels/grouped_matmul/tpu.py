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
    (num_rows, k), n = lhs.shape, rhs.shape[2]
    if num_rows % _TILE or k % _TILE or n % _TILE:
        return f"megablox needs M, K and N to be multiples of {_TILE}, found M={num_rows}, K={k}, N={n}"
    return None


def grouped_matmul(
    lhs: jax.Array, rhs: jax.Array, group_sizes: jax.Array, out_dtype: jnp.dtype, interpret: bool
) -> jax.Array:
    """lhs `[M, K]` and rhs `[G, K, N]` bfloat16, group_sizes int32 `[G]` -> `[M, N]`."""
    mine = (jnp.arange(lhs.shape[0]) < jnp.sum(group_sizes))[:, None]
    run = functools.partial(megablox.gmm, tiling=(_tile(lhs.shape[0]), _tile(lhs.shape[1]), _tile(rhs.shape[2])))
    # megablox leaves rows of no group unwritten, in the result and in lhs's gradient: one select guards each.
    out = run(jnp.where(mine, lhs, 0), rhs, group_sizes, preferred_element_type=out_dtype, interpret=interpret)
    return jnp.where(mine, out, 0)


def _tile(size: int) -> int:
    """The largest of megablox's usual tiles that divides size."""
    return next(tile for tile in (512, 256, _TILE) if size % tile == 0)
