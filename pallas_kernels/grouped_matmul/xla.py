"""Grouped matmul in XLA: `lax.ragged_dot` where it is native, tiles of one group each on a CPU.

The choice falls when the program is lowered, for the platform it is lowered for: an ahead-of-time compile for a TPU on
a CPU host gets `ragged_dot`.
"""

import functools

import jax
import jax.numpy as jnp

from pallas_kernels.grouped_matmul import tiles
from pallas_kernels.grouped_matmul.quantized import QuantizedRhs, dequantize


@functools.partial(jax.jit, static_argnums=(4, 5))
def product(
    x: jax.Array,
    rhs: jax.Array | QuantizedRhs,
    sizes: jax.Array,
    first: jax.Array | None,
    transposed: bool,
    out_dtype: jnp.dtype,
) -> jax.Array:
    """x[m] @ rhs[g] or, transposed, x[m] @ rhs[g].T, in x's dtype."""
    on_cpu = functools.partial(tiles.product, out_dtype=out_dtype, transposed=transposed)
    elsewhere = functools.partial(_ragged_product, out_dtype=out_dtype, transposed=transposed)
    return jax.lax.platform_dependent(x, rhs, sizes, first, cpu=on_cpu, default=elsewhere)


@functools.partial(jax.jit, static_argnums=(4,))
def outer(
    left: jax.Array, right: jax.Array, sizes: jax.Array, first: jax.Array | None, out_dtype: jnp.dtype
) -> jax.Array:
    """out[g] = sum over the rows m of group g of left[m] right[m]^T: `[M, A]`, `[M, B]` -> `[G, A, B]`."""
    on_cpu = functools.partial(tiles.outer, out_dtype=out_dtype)
    elsewhere = functools.partial(_ragged_outer, out_dtype=out_dtype)
    return jax.lax.platform_dependent(left, right, sizes, first, cpu=on_cpu, default=elsewhere)


def _precision(dtype: jnp.dtype) -> jax.lax.Precision | None:
    return jax.lax.Precision.HIGHEST if dtype == jnp.float32 else None


def _of_groups(x: jax.Array, sizes: jax.Array) -> jax.Array:
    """x with zeros in the rows of no group, whatever they held."""
    return jnp.where((jnp.arange(x.shape[0]) < jnp.sum(sizes))[:, None], x, 0)


def _from(x: jax.Array, first: jax.Array | None) -> jax.Array:
    """x with row `first` on top, where `ragged_dot` wants the first group, and the rows before it at the end."""
    return x if first is None else jnp.roll(x, -first, axis=0)


def _ragged_product(
    x: jax.Array,
    rhs: jax.Array | QuantizedRhs,
    sizes: jax.Array,
    first: jax.Array | None,
    *,
    out_dtype: jnp.dtype,
    transposed: bool,
) -> jax.Array:
    matrices = dequantize(rhs, x.dtype) if isinstance(rhs, QuantizedRhs) else rhs.astype(x.dtype)
    out = jax.lax.ragged_dot(
        _of_groups(_from(x, first), sizes),
        jnp.swapaxes(matrices, 1, 2) if transposed else matrices,
        sizes,
        precision=_precision(x.dtype),
        preferred_element_type=jnp.float32,
    )
    return _from(_of_groups(out, sizes), None if first is None else -first).astype(out_dtype)


def _ragged_outer(
    left: jax.Array, right: jax.Array, sizes: jax.Array, first: jax.Array | None, *, out_dtype: jnp.dtype
) -> jax.Array:
    dims = jax.lax.RaggedDotDimensionNumbers(
        dot_dimension_numbers=(((0,), (0,)), ((), ())), lhs_ragged_dimensions=[0], rhs_group_dimensions=[]
    )
    out = jax.lax.ragged_dot_general(
        _of_groups(_from(left, first), sizes),
        _of_groups(_from(right, first), sizes),
        sizes,
        dims,
        precision=_precision(right.dtype),
        preferred_element_type=jnp.float32,
    )
    return out.astype(out_dtype)
