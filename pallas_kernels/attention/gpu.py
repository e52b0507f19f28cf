"""Attention on NVIDIA GPUs: cuDNN's flash attention through `jax.nn`, where it computes what was asked."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

from pallas_kernels._select import target

_MAX_HEAD_DIM = 128  # on every GPU that cuDNN's flash attention serves; Hopper would take 256


def unsupported(
    q: Array | None = None,
    k: Array | None = None,
    *,
    segmented: bool = False,
    q_offset: Any = 0,
    interpret: bool = False,
    return_lse: bool = False,
) -> str | None:
    """Returns why this implementation cannot serve a call, or None if it can. Without arrays: any call at all."""
    if interpret:
        return "interpret=True is for Pallas kernels, and this is cuDNN"
    if target() != "gpu":
        return "there is no GPU here"
    if q is None or k is None:
        return None
    if q.dtype not in (jnp.bfloat16, jnp.float16):
        return f"cuDNN takes bfloat16 and float16, and this is {q.dtype}"
    if q.shape[3] % 8 or q.shape[3] > _MAX_HEAD_DIM:
        return f"cuDNN takes head dimensions that are multiples of 8 up to {_MAX_HEAD_DIM}, and this is {q.shape[3]}"
    if segmented:
        return "cuDNN has no segment ids"
    if not isinstance(q_offset, int | np.integer) or q_offset != 0:
        return "cuDNN's causal mask starts at the first key: it needs q_offset=0"
    if q.shape[1] != k.shape[1]:
        return f"cuDNN's masks are those of as many keys as queries, and this has T={q.shape[1]}, S={k.shape[1]}"
    if return_lse:
        return "jax.nn rounds cuDNN's log-sum-exp to the dtype of q and drops its gradient"
    return None


def attention(q: Array, k: Array, v: Array, *, causal: bool, window: int | None, scale: float) -> Array:
    """Returns out [B, T, H, D]. Arguments as `api.attention`, already checked.

    `jax.nn` counts a window without the query: (W - 1, 0) is W keys, the query included.
    """
    local = None if window is None else (window - 1, 0)
    return jax.nn.dot_product_attention(
        q, k, v, scale=scale, is_causal=causal, local_window_size=local, implementation="cudnn"
    )
