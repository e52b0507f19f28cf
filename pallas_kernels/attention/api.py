"""The one public function of attention: it checks its input, picks an implementation and runs it."""

from typing import Any, Literal, overload

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

from pallas_kernels._select import choose, not_pallas
from pallas_kernels.attention import gpu, reference, tpu, xla

Segments = Array | tuple[Array, Array] | None


@overload
def attention(
    q: Array,
    k: Array,
    v: Array,
    *,
    window: int | None = ...,
    causal: bool = ...,
    segment_ids: Segments = ...,
    q_offset: int | Array = ...,
    scale: float | None = ...,
    implementation: str | None = ...,
    interpret: bool = ...,
    return_lse: Literal[False] = ...,
) -> Array: ...
@overload
def attention(
    q: Array,
    k: Array,
    v: Array,
    *,
    window: int | None = ...,
    causal: bool = ...,
    segment_ids: Segments = ...,
    q_offset: int | Array = ...,
    scale: float | None = ...,
    implementation: str | None = ...,
    interpret: bool = ...,
    return_lse: Literal[True],
) -> tuple[Array, Array]: ...
def attention(
    q: Array,
    k: Array,
    v: Array,
    *,
    window: int | None = None,
    causal: bool = True,
    segment_ids: Segments = None,
    q_offset: int | Array = 0,
    scale: float | None = None,
    implementation: str | None = None,
    interpret: bool = False,
    return_lse: bool = False,
) -> Array | tuple[Array, Array]:
    """Grouped-query attention: `softmax(scale * q k^T) v` over the keys that each query may see.

    Query i of row b sits at key index `q_offset[b] + i` and sees key j iff `0 <= q_offset[b] + i - j` (causal), the
    same difference is `< window` (W keys, self included), and their segment ids are equal. Query head h reads kv head
    `h // (H / K)`. A query that sees nothing gives zeros (lse -inf) and zero gradients. A key that no query of its
    row of the batch sees may hold anything, NaN included; one that some of them see must be finite. The softmax is
    float32; float32 inputs are multiplied in full float32.

    Differentiable in q, k and v (reverse mode). On several devices call it inside `shard_map`: "xla" loops over batch
    and heads, which a sharded jit would gather.

    Args:
      q: float32 or bfloat16 or float16 [B, T, H, D].
      k, v: q's dtype, [B, S, K, D]; K divides H.
      window: None, or how many keys a query sees at most, itself included; >= 1, and causal only.
      causal: whether keys after the query are hidden.
      segment_ids: None, int32 [B, T] where T == S, or the pair (queries' int32 [B, T], keys' int32 [B, S]).
      q_offset: an int, or int32 [B] (a traced value is allowed: only the keys up to `q_offset + T` are visited).
      scale: default `D ** -0.5`.
      implementation: "reference", "xla", "tpu", "gpu", or None to choose (see `choose_implementation`).
      interpret: run a Pallas implementation in its interpreter; the others refuse it.
      return_lse: also return the log-sum-exp of the scaled scores.

    Returns:
      out [B, T, H, D] in q's dtype; with `return_lse` the pair (out, lse float32 [B, H, T]). Both are differentiable.

    Raises:
      ValueError: shapes, window, or an unknown implementation. TypeError: dtypes.
      NotImplementedError: the named implementation cannot serve this call; the message says why.
    """
    _check_qkv(q, k, v)
    window = _check_window(window, causal)
    segments = _check_segments(segment_ids, q, k)
    offsets = _check_offset(q_offset, q.shape[0])
    on_tpu = tpu.unsupported(q, k, causal=causal, interpret=interpret)
    on_gpu = gpu.unsupported(
        q,
        k,
        causal=causal,
        segmented=segments is not None,
        q_offset=q_offset,
        interpret=interpret,
        return_lse=return_lse,
        named=implementation is not None,
    )
    name = choose("attention", implementation, _reasons(interpret, on_tpu, on_gpu))
    if isinstance(q_offset, int | np.integer) and window is not None and window >= q_offset + q.shape[1]:
        window = None  # it hides nothing: the causal path
    factor = q.shape[-1] ** -0.5 if scale is None else float(scale)
    where = q_offset if isinstance(q_offset, int | np.integer) else offsets
    how: dict[str, Any] = {"window": window, "scale": factor}
    if name == "tpu":
        out, lse = tpu.attention(q, k, v, where, segments, interpret=interpret, **how)
    elif name == "gpu":
        how |= {"causal": causal, "interpret": interpret, "return_lse": return_lse}
        return gpu.attention(q, k, v, where, segments, **how)
    else:
        run = reference.attention if name == "reference" else xla.attention
        out, lse = run(q, k, v, offsets, segments, causal=causal, **how)
    return (out, lse) if return_lse else out


def choose_implementation(implementation: str | None = None, *, interpret: bool = False) -> str:
    """Returns the implementation that `attention(..., implementation=implementation, interpret=interpret)` would run.

    That is for a call that the backend's own kernel serves; `tpu.unsupported` and `gpu.unsupported` say which calls
    theirs do not.

    Raises as `attention` does where none can.
    """
    on_tpu, on_gpu = tpu.unsupported(interpret=interpret), gpu.unsupported(interpret=interpret)
    return choose("attention", implementation, _reasons(interpret, on_tpu, on_gpu))


def _reasons(interpret: bool, on_tpu: str | None, on_gpu: str | None) -> dict[str, str | None]:
    plain = not_pallas(interpret)
    return {"reference": plain, "xla": plain, "tpu": on_tpu, "gpu": on_gpu}


def _check_qkv(q: Array, k: Array, v: Array) -> None:
    for name, x in (("q", q), ("k", k), ("v", v)):
        if x.ndim != 4:
            raise ValueError(f"attention: {name} must have 4 dimensions, found shape {x.shape}")
        if 0 in x.shape:
            raise ValueError(f"attention: {name} has an empty dimension: shape {x.shape}")
        if x.dtype not in (jnp.float32, jnp.bfloat16, jnp.float16):
            raise TypeError(f"attention: {name} must be float32, bfloat16 or float16, found {x.dtype}")
        if x.dtype != q.dtype:
            raise TypeError(f"attention: {name} must have q's dtype {q.dtype}, found {x.dtype}")
    if k.shape != v.shape:
        raise ValueError(f"attention: k and v must have one shape [B, S, K, D], found {k.shape} and {v.shape}")
    if q.shape[0] != k.shape[0] or q.shape[3] != k.shape[3]:
        raise ValueError(
            f"attention: q [B, T, H, D] and k [B, S, K, D] must agree in B and D, found {q.shape} and {k.shape}"
        )
    if q.shape[2] % k.shape[2]:
        raise ValueError(f"attention: {k.shape[2]} kv heads do not divide {q.shape[2]} query heads")


def _check_window(window: int | None, causal: bool) -> int | None:
    if window is None:
        return None
    if isinstance(window, bool) or not isinstance(window, int | np.integer):
        raise TypeError(f"attention: window must be None or an int, found {window!r}")
    if window < 1:
        raise ValueError(f"attention: window counts the query itself, so it must be >= 1, found {window}")
    if not causal:
        raise ValueError("attention: a window needs causal=True")
    return int(window)


def _check_segments(segment_ids: Segments, q: Array, k: Array) -> tuple[Array, Array] | None:
    if segment_ids is None:
        return None
    if not isinstance(segment_ids, tuple):
        if q.shape[1] != k.shape[1]:
            raise ValueError(
                f"attention: one segment_ids array needs T == S, found T={q.shape[1]}, S={k.shape[1]}: give a pair"
            )
        segment_ids = (segment_ids, segment_ids)
    if len(segment_ids) != 2:
        raise ValueError(
            f"attention: segment_ids must be one array or (q_ids, kv_ids), found {len(segment_ids)} arrays"
        )
    for name, ids, like in (("q", segment_ids[0], q), ("kv", segment_ids[1], k)):
        if ids.shape != like.shape[:2]:
            raise ValueError(f"attention: {name} segment_ids must have shape {like.shape[:2]}, found {ids.shape}")
        if not jnp.issubdtype(ids.dtype, jnp.integer):
            raise TypeError(f"attention: {name} segment_ids must be integers, found {ids.dtype}")
    return jnp.asarray(segment_ids[0], jnp.int32), jnp.asarray(segment_ids[1], jnp.int32)


def _check_offset(q_offset: int | Array, batch: int) -> Array:
    if isinstance(q_offset, int | np.integer):
        return jnp.full((batch,), q_offset, jnp.int32)
    if not isinstance(q_offset, jax.Array | np.ndarray):
        raise TypeError(f"attention: q_offset must be an int or int32 [B], found {q_offset!r}")
    if not jnp.issubdtype(q_offset.dtype, jnp.integer):
        raise TypeError(f"attention: q_offset must be int32, found {q_offset.dtype}")
    if q_offset.shape != (batch,):
        raise ValueError(f"attention: q_offset must be an int or have shape ({batch},), found {q_offset.shape}")
    return jnp.asarray(q_offset, jnp.int32)
