"""The gradient of a grouped matmul of float matrices: two products of the same kind, and an outer product by groups."""

import functools
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp

# (x, rhs, sizes, first, transposed, out_dtype) -> x[m] @ rhs[g] or, transposed, x[m] @ rhs[g].T, in x's dtype
Product = Callable[[jax.Array, jax.Array, jax.Array, jax.Array | None, bool, jnp.dtype], jax.Array]
# (left, right, sizes, first, out_dtype) -> out[g] = sum over the rows m of group g of left[m] right[m]^T
Outer = Callable[[jax.Array, jax.Array, jax.Array, jax.Array | None, jnp.dtype], jax.Array]


class Plan(NamedTuple):
    """What is static in one call."""

    product: Product
    outer: Outer
    transpose_rhs: bool
    out_dtype: jnp.dtype


@functools.partial(jax.custom_vjp, nondiff_argnums=(4,))
def grouped_matmul(lhs: jax.Array, rhs: jax.Array, sizes: jax.Array, first: jax.Array | None, plan: Plan) -> jax.Array:
    """lhs `[M, K]`, rhs `[G, K, N]` or, transposed, `[G, N, K]`, sizes int32 `[G]` of the groups from row `first` (None: 0)
    on, inside the rows -> `[M, N]` of out_dtype."""
    return plan.product(lhs, rhs, sizes, first, plan.transpose_rhs, plan.out_dtype)


def _forward(lhs: jax.Array, rhs: jax.Array, sizes: jax.Array, first: jax.Array | None, plan: Plan):
    return grouped_matmul(lhs, rhs, sizes, first, plan), (lhs, rhs, sizes, first)


def _backward(plan: Plan, saved: tuple, grad: jax.Array):
    lhs, rhs, sizes, first = saved
    left, right = (grad, lhs.astype(grad.dtype)) if plan.transpose_rhs else (lhs.astype(grad.dtype), grad)
    drhs = plan.outer(left, right, sizes, first, rhs.dtype)
    return plan.product(grad, rhs, sizes, first, not plan.transpose_rhs, lhs.dtype), drhs, None, None


grouped_matmul.defvjp(_forward, _backward)
