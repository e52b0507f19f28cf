"""Quantised matrices: small values and what multiplies them back, and the gradient that such a product has."""

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.custom_derivatives import CustomVJPPrimal, SymbolicZero

VALUE_DTYPES = tuple(map(jnp.dtype, ("int8", "int4", "float8_e4m3fn")))


class QuantizedRhs(NamedTuple):
    """rhs = values * scales, each scale over one block of values.

    values: `[G, A, B]` int8, int4 or float8_e4m3fn, in either layout of rhs.
    scales: `[G, A / a, B / b]` float32 for blocks of `[a, b]`: `[G, 1, N]` (`[G, N, 1]` with transpose_rhs) is one an output
      channel, and `[G, A / 128, B / 128]` is what K-EXAONE 2.0's fp8 release has.
    """

    values: jax.Array
    scales: jax.Array

    @property
    def shape(self) -> tuple[int, ...]:
        return self.values.shape

    @property
    def ndim(self) -> int:
        return self.values.ndim


def check(rhs: QuantizedRhs) -> None:
    """Raises TypeError and ValueError where values and scales do not fit."""
    values, scales = rhs
    if values.dtype not in VALUE_DTYPES:
        known = ", ".join(map(str, VALUE_DTYPES))
        raise TypeError(f"grouped_matmul: quantised values must be one of {known}, found {values.dtype}")
    if scales.dtype != jnp.float32:
        raise TypeError(f"grouped_matmul: scales must be float32, found {scales.dtype}")
    fits = scales.ndim == values.ndim == 3 and scales.shape[0] == values.shape[0] and min(scales.shape) > 0
    if not fits or any(size % count for size, count in zip(values.shape[1:], scales.shape[1:], strict=True)):
        raise ValueError(
            f"grouped_matmul: expected scales [G, A / a, B / b] for values [G, A, B] = {values.shape} in whole blocks "
            f"[a, b], found {scales.shape}"
        )


def dequantize(rhs: QuantizedRhs, dtype: jnp.dtype) -> jax.Array:
    """values * scales in float32, rounded to dtype; any leading axes."""
    values, scales = rhs
    (a, b), (blocks_a, blocks_b) = values.shape[-2:], scales.shape[-2:]
    blocks = values.astype(jnp.float32).reshape(*values.shape[:-2], blocks_a, a // blocks_a, blocks_b, b // blocks_b)
    return (blocks * scales[..., :, None, :, None]).reshape(values.shape).astype(dtype)


def split_scales(
    x: jax.Array, rhs: QuantizedRhs, begin: jax.Array, sizes: jax.Array, transposed: bool
) -> tuple[jax.Array, jax.Array | None, jax.Array | None]:
    """What a kernel that multiplies x `[M, K]` with the values is to multiply where: (x, after, scales).

    x has taken in scales of contracted channels. after: float32 `[G, 1, N]` for the finished sums, or None. scales: float32
    `[G, A / a, B / b]` of blocks in both axes, for each tile of the values, or None. begin, sizes: int32 `[G]`, the groups' rows.
    """
    scales, axis = rhs.scales, 2 if transposed else 1  # of rhs, that is contracted
    if min(scales.shape[1:]) > 1:
        return x, None, scales
    if scales.shape[axis] == 1:
        after = scales.reshape(scales.shape[0], 1, -1)
        return x, jnp.repeat(after, rhs.shape[3 - axis] // after.shape[2], axis=2), None
    before = jnp.repeat(scales.reshape(scales.shape[0], -1), x.shape[1] // scales.shape[axis], axis=1)
    group = jnp.clip(jnp.searchsorted(begin + sizes, jnp.arange(x.shape[0]), side="right"), 0, len(sizes) - 1)
    return (x.astype(jnp.float32) * before[group]).astype(x.dtype), None, None


# (x, rhs, sizes, first, transposed, out_dtype) -> x[m] @ rhs[g] or, transposed, x[m] @ rhs[g].T
Product = Callable[[jax.Array, QuantizedRhs, jax.Array, jax.Array | None, bool, jnp.dtype], jax.Array]


class Plan(NamedTuple):
    """What is static in one call. in_dtype: of lhs."""

    product: Product
    transpose_rhs: bool
    in_dtype: jnp.dtype
    out_dtype: jnp.dtype


@functools.partial(jax.custom_vjp, nondiff_argnums=(4,))
def grouped_matmul(
    lhs: jax.Array, rhs: QuantizedRhs, sizes: jax.Array, first: jax.Array | None, plan: Plan
) -> jax.Array:
    """lhs `[M, K]` times the matrices of groups that lie at row `first` and after, `sizes` int32 `[G]` rows each -> `[M, N]`."""
    return plan.product(lhs, rhs, sizes, first, plan.transpose_rhs, plan.out_dtype)


def _forward(
    lhs: CustomVJPPrimal, rhs: Any, sizes: CustomVJPPrimal, first: CustomVJPPrimal | None, plan: Plan
) -> tuple[jax.Array, tuple[QuantizedRhs, jax.Array, jax.Array | None]]:
    """rhs: a QuantizedRhs of CustomVJPPrimal."""
    if rhs.values.perturbed or rhs.scales.perturbed:
        raise NotImplementedError(
            "grouped_matmul: a quantised rhs has no gradient, because a step smaller than its grid would be lost: "
            "differentiate in lhs alone, or keep the matrices in a float type"
        )
    matrices, row = QuantizedRhs(rhs.values.value, rhs.scales.value), None if first is None else first.value
    return grouped_matmul(lhs.value, matrices, sizes.value, row, plan), (matrices, sizes.value, row)


def _backward(
    plan: Plan, saved: tuple[QuantizedRhs, jax.Array, jax.Array | None], grad: jax.Array | SymbolicZero
) -> tuple[jax.Array | None, None, None, None]:
    if isinstance(grad, SymbolicZero):
        return None, None, None, None
    rhs, sizes, first = saved
    return plan.product(grad, rhs, sizes, first, not plan.transpose_rhs, plan.in_dtype), None, None, None


grouped_matmul.defvjp(_forward, _backward, symbolic_zeros=True)
