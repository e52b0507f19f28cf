"""The public face of the grouped matmul: checks, and the choice of an implementation."""

import jax
import jax.numpy as jnp

from pallas_kernels._select import choose
from pallas_kernels.grouped_matmul import gpu, reference, tpu, xla

# None takes "xla" everywhere (`lax.ragged_dot` off the CPU) until a kernel of "tpu" or "gpu" has been timed faster.
_ORDER = ("xla",)


def grouped_matmul(
    lhs: jax.Array,
    rhs: jax.Array,
    group_sizes: jax.Array,
    *,
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

    Products are accumulated in float32. rhs may be wider than lhs (float32 master weights under bfloat16 compute): it
    multiplies in lhs's dtype, and its gradient keeps its own.

    Args:
      lhs: `[M, K]` float32, bfloat16 or float16. M may be 0.
      rhs: `[G, K, N]` float32, bfloat16 or float16; `[G, N, K]` with transpose_rhs, as checkpoints have weights.
      group_sizes: `[G]` int32, each >= 0, summing to at most M. The values may be traced, so they are not checked: a
        negative one counts as 0, and what reaches past row M is cut off.
      transpose_rhs: whether rhs is `[G, N, K]`.
      implementation: "reference", "xla", "tpu" (megablox), "gpu", or None to choose.
      interpret: run a Pallas implementation in the interpreter; the others ignore it.
      preferred_element_type: dtype of the result; lhs's by default.

    Returns:
      `[M, N]`. Differentiable in lhs and rhs (reverse mode).

    Raises:
      TypeError: a dtype that is not served.
      ValueError: shapes that do not fit, or an unknown implementation.
      NotImplementedError: the named implementation cannot serve this call.
    """
    name = _chosen(lhs, rhs, group_sizes, transpose_rhs, implementation, interpret, preferred_element_type)
    out_dtype = jnp.dtype(lhs.dtype if preferred_element_type is None else preferred_element_type)
    if lhs.shape[0] == 0:
        return jnp.zeros((0, rhs.shape[1 if transpose_rhs else 2]), out_dtype)
    if name == "tpu":
        return tpu.grouped_matmul(lhs, rhs, group_sizes, transpose_rhs, out_dtype, interpret)
    run = reference.grouped_matmul if name == "reference" else xla.grouped_matmul
    return run(lhs, rhs, group_sizes, transpose_rhs, out_dtype)


def choose_implementation(
    lhs: jax.Array,
    rhs: jax.Array,
    group_sizes: jax.Array,
    *,
    transpose_rhs: bool = False,
    implementation: str | None = None,
    interpret: bool = False,
    preferred_element_type: jax.typing.DTypeLike | None = None,
) -> str:
    """The name of the implementation that `grouped_matmul` would run; the same arguments and errors."""
    return _chosen(lhs, rhs, group_sizes, transpose_rhs, implementation, interpret, preferred_element_type)


def _chosen(
    lhs: jax.Array,
    rhs: jax.Array,
    group_sizes: jax.Array,
    transpose_rhs: bool,
    implementation: str | None,
    interpret: bool,
    preferred_element_type: jax.typing.DTypeLike | None,
) -> str:
    _check(lhs, rhs, group_sizes, transpose_rhs, preferred_element_type)
    reasons = {
        "reference": None,
        "xla": None,
        "tpu": tpu.unsupported(lhs, rhs, interpret),
        "gpu": gpu.unsupported(),
    }
    return choose("grouped_matmul", implementation, reasons, order=_ORDER)


def _check(
    lhs: jax.Array,
    rhs: jax.Array,
    group_sizes: jax.Array,
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
    if rhs.shape[0] != group_sizes.shape[0]:
        raise ValueError(f"grouped_matmul: rhs has {rhs.shape[0]} groups, group_sizes {group_sizes.shape[0]}")
    if min(rhs.shape) < 1:
        raise ValueError(f"grouped_matmul: rhs {rhs.shape} has an empty axis")
    if group_sizes.dtype != jnp.int32:
        raise TypeError(f"grouped_matmul: group_sizes must be int32, found {group_sizes.dtype}")
    named = {"lhs": lhs.dtype, "rhs": rhs.dtype}
    if preferred is not None:
        named["preferred_element_type"] = jnp.dtype(preferred)
    for name, dtype in named.items():
        if dtype not in (jnp.float32, jnp.bfloat16, jnp.float16):
            raise TypeError(f"grouped_matmul: {name} must be float32, bfloat16 or float16, found {dtype}")
