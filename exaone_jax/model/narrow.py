"""Products of the forward pass in int8 or float8, with the gradients of the wide ones (straight-through).

Each row of both sides, a token and an output channel, has its own scale: its largest magnitude is the largest that the type
has. Not by qwix (0.1.8): it puts its products where it meets those of a trace, which fails inside scans over stacked layers.
"""

from functools import partial
from typing import Literal

import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name

from exaone_jax.errors import ConfigError
from exaone_jax.model.linear import PRODUCT, dot_gradients
from pallas_kernels.grouped_matmul import grouped_matmul

Narrow = Literal["int8", "float8"]
# The type, the largest value that is used of it, and what its products are summed in.
_TYPES = {"int8": (jnp.int8, 127.0, jnp.int32), "float8": (jnp.float8_e4m3fn, 448.0, jnp.float32)}
# Starts of jax's `device_kind` of the TPUs whose matrix units are faster in a type than in bfloat16 (jax's tpu_info.py, 0.10).
_TPUS = {"int8": ("TPU v5", "TPU v6"), "float8": ("TPU7",)}
_FLOAT8_GPU = (8, 9)  # compute capability: Ada, Hopper and later


def check_device(kind: Narrow, device: jax.Device, has_experts: bool) -> None:
    """Raises ConfigError where a device gains nothing by products in this type, or its compiler has not the experts'.

    A CPU computes what they mean, and more slowly.
    """
    if device.platform == "cpu":
        return
    capability = getattr(device, "compute_capability", None)
    if capability is None:
        served = device.device_kind.startswith(_TPUS[kind])
    else:
        served = kind == "float8" and not has_experts and tuple(map(int, capability.split("."))) >= _FLOAT8_GPU
    if not served:
        raise ConfigError(
            f"quantize_forward: found {kind} on {device.device_kind}{' with experts' * has_experts}, expected int8 on TPU v5e, "
            "v5p or v6e, float8 on TPU7x, or float8 without experts on a GPU of compute capability 8.9 or later"
        )


def narrowed(x: jax.Array, kind: Narrow) -> tuple[jax.Array, jax.Array]:
    """x `[..., n]` -> codes `[..., n]` of the type and scale float32 `[..., 1]`, whose product is about x.

    A row with a value that is not finite has a scale that is not: it does not get lost.
    """
    dtype, limit, _ = _TYPES[kind]
    wide = x.astype(jnp.float32)
    most = jnp.max(jnp.abs(wide), axis=-1, keepdims=True)
    scale = jnp.where(most == 0, 1.0, most) / limit
    # Rounding may take the largest a hair past the limit, which float8 has no value for.
    values = jnp.clip(wide / scale, -limit, limit)
    return (jnp.round(values) if kind == "int8" else values).astype(dtype), scale


@partial(jax.custom_vjp, nondiff_argnums=(2,))
def narrow_dot(x: jax.Array, weight: jax.Array, kind: Narrow) -> jax.Array:
    """As `dot`, x `[..., in]` and weight `[out, in]` -> `[..., out]`, of both rounded."""
    (rows, row_scale), (columns, column_scale) = narrowed(x, kind), narrowed(weight.astype(x.dtype), kind)
    dims = (((x.ndim - 1,), (1,)), ((), ()))
    sums = jax.lax.dot_general(rows, columns, dims, preferred_element_type=_TYPES[kind][2])
    out = sums.astype(jnp.float32) * row_scale * column_scale[:, 0]
    return checkpoint_name(out.astype(x.dtype), PRODUCT)


def _dot_forward(x: jax.Array, weight: jax.Array, kind: Narrow) -> tuple[jax.Array, tuple[jax.Array, jax.Array]]:
    return narrow_dot(x, weight, kind), (x, weight)


def _dot_backward(kind: Narrow, saved: tuple[jax.Array, jax.Array], grad: jax.Array) -> tuple[jax.Array, jax.Array]:
    return dot_gradients(saved, grad)


narrow_dot.defvjp(_dot_forward, _dot_backward)


@partial(jax.custom_vjp, nondiff_argnums=(3,))
def narrow_grouped(rows: jax.Array, weight: jax.Array, group_sizes: jax.Array, kind: Narrow) -> jax.Array:
    """As `grouped_matmul`, rows `[M, in]`, weight `[G, out, in]` and group_sizes int32 `[G]` -> `[M, out]`, of both rounded."""
    left, row_scale = narrowed(rows, kind)
    right, column_scale = narrowed(weight.astype(rows.dtype), kind)
    sums = jax.lax.platform_dependent(
        left, right, group_sizes, cpu=_grouped_on_cpu, default=partial(_grouped, dtype=_TYPES[kind][2])
    )
    ends = jnp.cumsum(group_sizes)
    place = jnp.arange(len(rows))
    group = jnp.minimum(jnp.searchsorted(ends, place, side="right"), len(ends) - 1)
    out = sums * row_scale * column_scale[group, :, 0]
    return jnp.where((place < ends[-1])[:, None], out, 0).astype(rows.dtype)


def _grouped(left: jax.Array, right: jax.Array, group_sizes: jax.Array, dtype: jnp.dtype) -> jax.Array:
    right = jnp.swapaxes(right, 1, 2)
    return jax.lax.ragged_dot(left, right, group_sizes, preferred_element_type=dtype).astype(jnp.float32)


def _grouped_on_cpu(left: jax.Array, right: jax.Array, group_sizes: jax.Array) -> jax.Array:
    """The codes' products in float32, which holds each of them exactly."""
    return grouped_matmul(left.astype(jnp.float32), right.astype(jnp.float32), group_sizes, transpose_rhs=True)


def _grouped_forward(
    rows: jax.Array, weight: jax.Array, group_sizes: jax.Array, kind: Narrow
) -> tuple[jax.Array, tuple[jax.Array, jax.Array, jax.Array]]:
    return narrow_grouped(rows, weight, group_sizes, kind), (rows, weight, group_sizes)


def _grouped_backward(
    kind: Narrow, saved: tuple[jax.Array, jax.Array, jax.Array], grad: jax.Array
) -> tuple[jax.Array, jax.Array, None]:
    rows, weight, group_sizes = saved
    wide = partial(grouped_matmul, group_sizes=group_sizes, transpose_rhs=True)
    return *jax.vjp(wide, rows, weight)[1](grad), None


narrow_grouped.defvjp(_grouped_forward, _grouped_backward)
