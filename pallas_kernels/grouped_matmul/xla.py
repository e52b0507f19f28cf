"""Grouped matmul in XLA: `lax.ragged_dot` where it is native, tiles of one group each on a CPU.

The choice falls when the program is lowered, for the platform it is lowered for: an ahead-of-time compile for a TPU on
a CPU host gets `ragged_dot`.
"""

import functools

import jax
import jax.numpy as jnp

from pallas_kernels.grouped_matmul import tiles


@functools.partial(jax.custom_vjp, nondiff_argnums=(3, 4))
def grouped_matmul(
    lhs: jax.Array, rhs: jax.Array, group_sizes: jax.Array, transpose_rhs: bool, out_dtype: jnp.dtype
) -> jax.Array:
    """lhs `[M, K]`, rhs `[G, K, N]` or, transposed, `[G, N, K]`, group_sizes int32 `[G]` -> `[M, N]` of out_dtype."""
    return _product(lhs, rhs, _inside(group_sizes, lhs.shape[0]), out_dtype, transpose_rhs)


def _forward(lhs: jax.Array, rhs: jax.Array, group_sizes: jax.Array, transpose_rhs: bool, out_dtype: jnp.dtype):
    return grouped_matmul(lhs, rhs, group_sizes, transpose_rhs, out_dtype), (lhs, rhs, group_sizes)


def _backward(
    transpose_rhs: bool, out_dtype: jnp.dtype, saved: tuple[jax.Array, jax.Array, jax.Array], grad: jax.Array
):
    lhs, rhs, group_sizes = saved
    sizes, same = _inside(group_sizes, lhs.shape[0]), lhs.astype(grad.dtype)
    drhs = _outer(grad, same, sizes, rhs.dtype) if transpose_rhs else _outer(same, grad, sizes, rhs.dtype)
    return _product(grad, rhs, sizes, lhs.dtype, not transpose_rhs), drhs, None


grouped_matmul.defvjp(_forward, _backward)


def _inside(group_sizes: jax.Array, num_rows: int) -> jax.Array:
    """The sizes, with what is negative or reaches past the last row cut off."""
    ends = jnp.minimum(jnp.cumsum(jnp.maximum(group_sizes, 0)), num_rows)
    return jnp.diff(ends, prepend=0)


@functools.partial(jax.jit, static_argnums=(3, 4))
def _product(x: jax.Array, rhs: jax.Array, sizes: jax.Array, out_dtype: jnp.dtype, transposed: bool) -> jax.Array:
    """x[m] @ rhs[g] or, transposed, x[m] @ rhs[g].T, in x's dtype."""
    on_cpu = functools.partial(tiles.product, out_dtype=out_dtype, transposed=transposed)
    elsewhere = functools.partial(_ragged_product, out_dtype=out_dtype, transposed=transposed)
    return jax.lax.platform_dependent(x, rhs, sizes, cpu=on_cpu, default=elsewhere)


@functools.partial(jax.jit, static_argnums=(3,))
def _outer(left: jax.Array, right: jax.Array, sizes: jax.Array, out_dtype: jnp.dtype) -> jax.Array:
    """out[g] = sum over the rows m of group g of left[m] right[m]^T: `[M, A]`, `[M, B]` -> `[G, A, B]`."""
    on_cpu = functools.partial(tiles.outer, out_dtype=out_dtype)
    elsewhere = functools.partial(_ragged_outer, out_dtype=out_dtype)
    return jax.lax.platform_dependent(left, right, sizes, cpu=on_cpu, default=elsewhere)


def _precision(dtype: jnp.dtype) -> jax.lax.Precision | None:
    return jax.lax.Precision.HIGHEST if dtype == jnp.float32 else None


def _of_groups(x: jax.Array, sizes: jax.Array) -> jax.Array:
    """x with zeros in the rows of no group, whatever they held."""
    return jnp.where((jnp.arange(x.shape[0]) < jnp.sum(sizes))[:, None], x, 0)


def _ragged_product(
    x: jax.Array, rhs: jax.Array, sizes: jax.Array, *, out_dtype: jnp.dtype, transposed: bool
) -> jax.Array:
    out = jax.lax.ragged_dot(
        _of_groups(x, sizes),
        (jnp.swapaxes(rhs, 1, 2) if transposed else rhs).astype(x.dtype),
        sizes,
        precision=_precision(x.dtype),
        preferred_element_type=jnp.float32,
    )
    return _of_groups(out, sizes).astype(out_dtype)


def _ragged_outer(left: jax.Array, right: jax.Array, sizes: jax.Array, *, out_dtype: jnp.dtype) -> jax.Array:
    dims = jax.lax.RaggedDotDimensionNumbers(
        dot_dimension_numbers=(((0,), (0,)), ((), ())), lhs_ragged_dimensions=[0], rhs_group_dimensions=[]
    )
    out = jax.lax.ragged_dot_general(
        _of_groups(left, sizes),
        _of_groups(right, sizes),
        sizes,
        dims,
        precision=_precision(right.dtype),
        preferred_element_type=jnp.float32,
    )
    return out.astype(out_dtype)
