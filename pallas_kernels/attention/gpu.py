"""Attention on NVIDIA GPUs: cuDNN's flash attention through `jax.nn` where it computes what was asked, else `gpu_flash`."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

from pallas_kernels._select import target
from pallas_kernels.attention import gpu_flash
from pallas_kernels.attention.tpu import clear_unseen
from pallas_kernels.attention.tpu_tiles import Band

_MAX_HEAD_DIM = 128  # on every GPU that cuDNN's flash attention serves; Hopper would take 256


def unsupported(
    q: Array | None = None,
    k: Array | None = None,
    *,
    causal: bool = True,
    segmented: bool = False,
    q_offset: Any = 0,
    interpret: bool = False,
    return_lse: bool = False,
    named: bool = True,
) -> str | None:
    """Returns why this implementation cannot serve a call, or None if it can. Without arrays: any call at all.

    Not `named`, it serves what cuDNN does: until `gpu_flash` has run on a card, a call gets it by asking for "gpu" alone.
    """
    if not interpret and target() != "gpu":
        return "there is no GPU here; interpret=True runs the Pallas kernel on any backend"
    if q is None or k is None:
        return None
    cudnn = _not_cudnn(q, k, segmented, q_offset, return_lse)
    if not interpret and (cudnn is None or not named):
        return cudnn
    flash = _not_flash(q, k, causal)
    return None if flash is None else flash if interpret else f"{cudnn}; {flash}"


def _not_cudnn(q: Array, k: Array, segmented: bool, q_offset: Any, return_lse: bool) -> str | None:
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


def _not_flash(q: Array, k: Array, causal: bool) -> str | None:
    if not causal:
        return "the Pallas kernel is causal"
    if q.shape[3] > _MAX_HEAD_DIM:
        return f"the Pallas kernel takes head dimensions up to {_MAX_HEAD_DIM}, and this is {q.shape[3]}"
    if max(q.size, k.size) >= 2**31:
        return f"the Pallas kernel counts elements in 32 bits, and q, k are {q.shape}, {k.shape}"
    return None


def attention(
    q: Array,
    k: Array,
    v: Array,
    q_offset: int | Array,
    segments: tuple[Array, Array] | None,
    *,
    causal: bool,
    window: int | None,
    scale: float,
    interpret: bool,
    return_lse: bool,
) -> Array | tuple[Array, Array]:
    """Returns what `api.attention` does, of arguments that are already checked.

    `jax.nn` counts a window without the query: (W - 1, 0) is W keys, the query included.
    """
    if not interpret and _not_cudnn(q, k, segments is not None, q_offset, return_lse) is None:
        local = None if window is None else (window - 1, 0)
        return jax.nn.dot_product_attention(
            q, k, v, scale=scale, is_causal=causal, local_window_size=local, implementation="cudnn"
        )
    queries, keys = q.shape[1], k.shape[1]
    static = isinstance(q_offset, int | np.integer)
    # Further out nothing changes any more, and no sum overflows.
    offset = (np if static else jnp).clip(q_offset, -queries, keys + (window or 0))
    offsets = jnp.broadcast_to(jnp.asarray(offset, jnp.int32), q.shape[:1])
    k, v = clear_unseen(Band(queries, keys, int(offset) if static else None), window, k, v, offsets, segments)
    out, lse = gpu_flash.attention(q, k, v, offsets, segments, window=window, scale=scale, interpret=interpret)
    return (out, lse) if return_lse else out
