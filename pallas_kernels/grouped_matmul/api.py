"""The public face of the grouped matmul: checks, and the choice of an implementation."""

import jax
import jax.numpy as jnp
from jax import lax

from pallas_kernels._select import choose, not_pallas
from pallas_kernels.grouped_matmul import gpu, gradient, quantized, reference, tpu, tpu_quantized, xla
from pallas_kernels.grouped_matmul.quantized import QuantizedRhs

# None takes "xla" everywhere (`lax.ragged_dot` off the CPU) until a kernel of "tpu" or "gpu" has been timed faster.
_ORDER = ("xla",)


def grouped_matmul(
    lhs: jax.Array,
    rhs: jax.Array | QuantizedRhs,
    group_sizes: jax.Array,
    *,
    group_offset: jax.Array | int | None = None,
    transpose_rhs: bool = False,
    implementation: str | None = None,
    interpret: bool = False,
    preferred_element_type: jax.typing.DTypeLike | None = None,
) -> jax.Array:
    """out[m] = lhs[m] @ rhs[g], where g is the group that row m belongs to; rhs[g].T with transpose_rhs.

    The first group_sizes[0] rows belong to group 0, the next group_sizes[1] to group 1, and so on. Rows past
    sum(group_sizes) belong to none: they give zeros and get zero gradients. What such rows hold, and what the rhs of
    a group without rows holds, never reaches a result, even if it is NaN ("xla" off the CPU promises it for the rows
    alone).

    With group_offset, rhs holds the matrices of groups group_offset, group_offset + 1, ... alone, as a device has them
    whose mesh shares the experts; rows of other groups then give zeros and get zero gradients like rows of none.

    Products are accumulated in float32. rhs may be wider than lhs (float32 master weights under bfloat16 compute): it
    multiplies in lhs's dtype, and its gradient keeps its own.

    Args:
      lhs: `[M, K]` float32, bfloat16 or float16. M may be 0.
      rhs: `[G, K, N]` float32, bfloat16 or float16; `[G, N, K]` with transpose_rhs, as checkpoints have weights. A
        QuantizedRhs is dequantised a tile at a time ("xla" off the CPU: all at once) and has no gradient.
      group_sizes: `[G]` int32, or `[all groups]` with group_offset, each >= 0, summing to at most M. The values may be
        traced, so they are not checked: a negative one counts as 0, and what reaches past row M is cut off.
      group_offset: the first group of rhs, an integer or an int32 scalar; a traced one that leaves fewer than G groups is
        cut to what leaves G.
      transpose_rhs: whether rhs is `[G, N, K]`.
      implementation: "reference", "xla", "tpu" (megablox; our kernel for a QuantizedRhs), "gpu" (our kernel), or None to choose.
      interpret: run a Pallas implementation in its interpreter; the others refuse it.
      preferred_element_type: dtype of the result; lhs's by default.

    Returns:
      `[M, N]`. Differentiable in lhs and rhs (reverse mode).

    Raises:
      TypeError: a dtype that is not served.
      ValueError: shapes or a group_offset that do not fit, or an unknown implementation.
      NotImplementedError: the named implementation cannot serve this call, or the gradient of a QuantizedRhs is asked for.
    """
    name = choose_implementation(
        lhs,
        rhs,
        group_sizes,
        group_offset=group_offset,
        transpose_rhs=transpose_rhs,
        implementation=implementation,
        interpret=interpret,
        preferred_element_type=preferred_element_type,
    )
    out_dtype = jnp.dtype(lhs.dtype if preferred_element_type is None else preferred_element_type)
    if lhs.shape[0] == 0:
        return jnp.zeros((0, rhs.shape[1 if transpose_rhs else 2]), out_dtype)
    sizes, first = _own(group_sizes, group_offset, lhs.shape[0], rhs.shape[0])
    gpu_product, gpu_outer = gpu.interpreted if interpret else gpu.compiled
    if isinstance(rhs, QuantizedRhs):
        products = {"reference": _plain_quantized, "xla": xla.product, "gpu": gpu_product}
        products["tpu"] = tpu_quantized.interpreted if interpret else tpu_quantized.compiled
        plan = quantized.Plan(products[name], transpose_rhs, lhs.dtype, out_dtype)
        return quantized.grouped_matmul(lhs, rhs, sizes, first, plan)
    if name == "tpu":
        return tpu.grouped_matmul(lhs, rhs, sizes, first, transpose_rhs, out_dtype, interpret)
    if name == "reference":
        return reference.grouped_matmul(lhs, rhs, sizes, first, transpose_rhs, out_dtype)
    product, outer = (gpu_product, gpu_outer) if name == "gpu" else (xla.product, xla.outer)
    return gradient.grouped_matmul(lhs, rhs, sizes, first, gradient.Plan(product, outer, transpose_rhs, out_dtype))


def _own(
    group_sizes: jax.Array, group_offset: jax.Array | int | None, num_rows: int, num_groups: int
) -> tuple[jax.Array, jax.Array | None]:
    """The sizes of rhs's groups, with what is negative or reaches past the last row cut off, and their first row, None for 0."""
    ends = jnp.minimum(jnp.cumsum(jnp.maximum(group_sizes, 0)), num_rows)
    if group_offset is None:
        return jnp.diff(ends, prepend=0), None
    bounds = lax.dynamic_slice_in_dim(jnp.pad(ends, (1, 0)), group_offset, num_groups + 1)
    return jnp.diff(bounds), bounds[0]


def _plain_quantized(
    x: jax.Array, rhs: QuantizedRhs, sizes: jax.Array, first: jax.Array | None, transposed: bool, out_dtype: jnp.dtype
) -> jax.Array:
    return reference.grouped_matmul(x, quantized.dequantize(rhs, x.dtype), sizes, first, transposed, out_dtype)


def choose_implementation(
    lhs: jax.Array,
    rhs: jax.Array | QuantizedRhs,
    group_sizes: jax.Array,
    *,
    group_offset: jax.Array | int | None = None,
    transpose_rhs: bool = False,
    implementation: str | None = None,
    interpret: bool = False,
    preferred_element_type: jax.typing.DTypeLike | None = None,
) -> str:
    """The name of the implementation that `grouped_matmul` would run; the same arguments and errors."""
    _check(lhs, rhs, group_sizes, group_offset, transpose_rhs, preferred_element_type)
    reasons = {
        "reference": not_pallas(interpret),
        "xla": not_pallas(interpret),
        "tpu": tpu.unsupported(lhs, rhs, interpret),
        "gpu": gpu.unsupported(lhs, rhs, interpret=interpret, named=implementation is not None),
    }
    return choose("grouped_matmul", implementation, reasons, order=_ORDER)


def _check(
    lhs: jax.Array,
    rhs: jax.Array | QuantizedRhs,
    group_sizes: jax.Array,
    group_offset: jax.Array | int | None,
    transpose_rhs: bool,
    preferred: jax.typing.DTypeLike | None,
) -> None:
    if lhs.ndim != 2 or rhs.ndim != 3 or group_sizes.ndim != 1:
        expected = "[G, N, K]" if transpose_rhs else "[G, K, N]"
        raise ValueError(
            f"grouped_matmul: expected lhs [M, K], rhs {expected}, group_sizes [G]; "
            f"found {lhs.shape}, {rhs.shape}, {group_sizes.shape}"
        )
    if lhs.shape[1] != rhs.shape[2 if transpose_rhs else 1]:
        raise ValueError(f"grouped_matmul: lhs {lhs.shape} and rhs {rhs.shape} differ in K")
    if group_offset is not None:
        _check_offset(group_offset, rhs.shape[0], group_sizes.shape[0])
    elif rhs.shape[0] != group_sizes.shape[0]:
        raise ValueError(f"grouped_matmul: rhs has {rhs.shape[0]} groups, group_sizes {group_sizes.shape[0]}")
    if min(rhs.shape) < 1:
        raise ValueError(f"grouped_matmul: rhs {rhs.shape} has an empty axis")
    if group_sizes.dtype != jnp.int32:
        raise TypeError(f"grouped_matmul: group_sizes must be int32, found {group_sizes.dtype}")
    named = {"lhs": lhs.dtype}
    if isinstance(rhs, QuantizedRhs):
        quantized.check(rhs)
    else:
        named["rhs"] = rhs.dtype
    if preferred is not None:
        named["preferred_element_type"] = jnp.dtype(preferred)
    for name, dtype in named.items():
        if dtype not in (jnp.float32, jnp.bfloat16, jnp.float16):
            raise TypeError(f"grouped_matmul: {name} must be float32, bfloat16 or float16, found {dtype}")


def _check_offset(group_offset: jax.Array | int, num_groups: int, num_all: int) -> None:
    if num_groups > num_all:
        raise ValueError(f"grouped_matmul: rhs has {num_groups} groups, group_sizes {num_all}")
    if isinstance(group_offset, int):
        if not 0 <= group_offset <= num_all - num_groups:
            raise ValueError(
                f"grouped_matmul: group_offset must be 0 to {num_all - num_groups} for {num_groups} of {num_all} groups, "
                f"found {group_offset}"
            )
    elif group_offset.shape != () or group_offset.dtype != jnp.int32:
        raise TypeError(
            f"grouped_matmul: group_offset must be an integer or an int32 scalar, found {group_offset.dtype} "
            f"{group_offset.shape}"
        )
