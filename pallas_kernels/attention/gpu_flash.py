"""Flash attention for NVIDIA GPUs, by Pallas's Triton lowering: what cuDNN's lacks, segment ids, offsets and a log-sum-exp.

Forward is FlashAttention's running softmax; backward is FlashAttention-2's (Dao 2023, arXiv:2307.08691): one kernel for d_q,
one for d_k and d_v, which sums over the heads of a group, so keys are never repeated. Each visits only the blocks that the
diagonal and the window leave.
"""

import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import Array, lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton

from pallas_kernels._triton import product

_HIDDEN = -1e30  # finite, so that a row that sees nothing has no inf - inf
_NEVER = 1e30  # the lse of a query that sees nothing: every weight exp(score - lse) is 0

Segments = tuple[Array, Array] | None


class Plan(NamedTuple):
    """What is static in one call. keys: without padding; block: queries, and keys, of a tile."""

    window: int | None
    scale: float
    keys: int
    block: int
    interpret: bool

    def compiler_params(self, head_dim: int) -> triton.CompilerParams:
        return triton.CompilerParams(num_warps=4 if head_dim <= 64 else 8, num_stages=2)


def attention(
    q: Array,
    k: Array,
    v: Array,
    offsets: Array,
    segments: Segments,
    *,
    window: int | None,
    scale: float,
    interpret: bool,
) -> tuple[Array, Array]:
    """Returns (out [B, T, H, D] in q's dtype, lse float32 [B, H, T]). Causal; no key that a row may not see holds NaN."""
    length, head_dim = q.shape[1], q.shape[3]
    block = 64 if q.dtype.itemsize == 2 else 32  # four operands of a tile and its sums fit the shared memory of a card
    plan = Plan(window, scale, k.shape[1], block, interpret)
    width = max(16, pl.next_power_of_2(head_dim))  # Triton's arrays are powers of two

    def pad(x: Array) -> Array:
        return jnp.pad(x, ((0, 0), (0, -x.shape[1] % block), (0, 0), (0, width - head_dim)))

    if segments is not None:
        q_ids, k_ids = (jnp.pad(ids, ((0, 0), (0, -ids.shape[1] % block))) for ids in segments)
        segments = q_ids, k_ids
    out, lse = _attention(plan, pad(q), pad(k), pad(v), offsets, segments)
    return out[:, :length, :, :head_dim], lse[:, :, :length]


def _seen(plan: Plan, offset: Array, query: Array, key: Array, q_ids: Array | None, k_ids: Array | None) -> Array:
    """bool [queries, keys] of a tile, of which `query` and `key` are the first."""
    index = key + lax.broadcasted_iota(jnp.int32, (plan.block, plan.block), 1)
    distance = offset + query + lax.broadcasted_iota(jnp.int32, (plan.block, plan.block), 0) - index
    seen = (distance >= 0) & (index < plan.keys)
    if plan.window is not None:
        seen &= distance < plan.window
    if q_ids is not None and k_ids is not None:
        seen &= q_ids[:, None] == k_ids[None, :]
    return seen


def _key_blocks(plan: Plan, offset: Array, query: Array, blocks: int) -> tuple[Array, Array]:
    """The first block of keys that a block of queries sees, and the one after the last."""
    first, last = offset + query, offset + query + plan.block - 1
    begin = 0 if plan.window is None else (jnp.maximum(first - plan.window + 1, 0)) // plan.block
    end = jnp.minimum((jnp.maximum(last + 1, 0) + plan.block - 1) // plan.block, blocks)
    return jnp.asarray(begin, jnp.int32), end.astype(jnp.int32)


def _query_blocks(plan: Plan, offset: Array, key: Array, blocks: int) -> tuple[Array, Array]:
    """The first block of queries that sees a block of keys, and the one after the last."""
    begin = jnp.maximum(key - offset, 0) // plan.block
    end = jnp.asarray(blocks, jnp.int32)
    if plan.window is not None:
        last = key + plan.block - 1 - offset + plan.window - 1
        end = jnp.minimum(jnp.maximum(last + plan.block, 0) // plan.block, blocks)
    return begin.astype(jnp.int32), end.astype(jnp.int32)


def _forward_kernel(plan: Plan, offset_ref, q_ref, k_ref, v_ref, *refs) -> None:
    *ids, out_ref, lse_ref = refs
    offset, query, q = offset_ref[()], pl.program_id(2) * plan.block, q_ref[...]
    q_ids = ids[0][...] if ids else None

    def visit(block, carry):
        peak, total, out = carry
        at = pl.ds(block * plan.block, plan.block)
        seen = _seen(plan, offset, query, block * plan.block, q_ids, ids[1][at] if ids else None)
        scores = jnp.where(seen, product(q, k_ref[at, :], (1, 1)) * plan.scale, _HIDDEN)
        higher = jnp.maximum(peak, scores.max(1))
        weights = jnp.where(seen, jnp.exp(scores - higher[:, None]), 0.0)
        rescale = jnp.exp(peak - higher)
        out = out * rescale[:, None] + product(weights.astype(q.dtype), v_ref[at, :], (1, 0))
        return higher, total * rescale + weights.sum(1), out

    start = (jnp.full(plan.block, _HIDDEN), jnp.zeros(plan.block), jnp.zeros(q.shape, jnp.float32))
    bounds = _key_blocks(plan, offset, query, k_ref.shape[0] // plan.block)
    peak, total, out = lax.fori_loop(*bounds, visit, start)
    empty = total == 0
    total = jnp.where(empty, 1.0, total)
    out_ref[...] = (out / total[:, None]).astype(out_ref.dtype)
    lse_ref[...] = jnp.where(empty, -jnp.inf, peak + jnp.log(total))


def _score_gradient(plan: Plan, q, d_out, k, v, lse, shift, seen) -> tuple[Array, Array]:
    """(weights, gradient of the scores before `scale`) of a tile, float32 [queries, keys]."""
    scores = jnp.where(seen, product(q, k, (1, 1)) * plan.scale, _HIDDEN)
    weights = jnp.exp(scores - lse[:, None])
    return weights, weights * (product(d_out, v, (1, 1)) - shift[:, None]) * plan.scale


def _d_q_kernel(plan: Plan, offset_ref, q_ref, d_out_ref, lse_ref, shift_ref, k_ref, v_ref, *refs) -> None:
    *ids, d_q_ref = refs
    offset, query = offset_ref[()], pl.program_id(2) * plan.block
    rows = q_ref[...], d_out_ref[...]
    stats = lse_ref[...], shift_ref[...]
    q_ids = ids[0][...] if ids else None

    def visit(block, d_q):
        at = pl.ds(block * plan.block, plan.block)
        seen = _seen(plan, offset, query, block * plan.block, q_ids, ids[1][at] if ids else None)
        k = k_ref[at, :]
        _, d_scores = _score_gradient(plan, *rows, k, v_ref[at, :], *stats, seen)
        return d_q + product(d_scores.astype(k.dtype), k, (1, 0))

    bounds = _key_blocks(plan, offset, query, k_ref.shape[0] // plan.block)
    d_q = lax.fori_loop(*bounds, visit, jnp.zeros(q_ref.shape, jnp.float32))
    d_q_ref[...] = d_q.astype(d_q_ref.dtype)


def _d_kv_kernel(plan: Plan, offset_ref, q_ref, d_out_ref, lse_ref, shift_ref, k_ref, v_ref, *refs) -> None:
    *ids, d_k_ref, d_v_ref = refs
    offset, key = offset_ref[()], pl.program_id(2) * plan.block
    k, v = k_ref[...], v_ref[...]
    k_ids = ids[1][...] if ids else None
    begin, end = _query_blocks(plan, offset, key, q_ref.shape[0] // plan.block)
    count = jnp.maximum(end - begin, 0)

    def visit(step, sums):  # all blocks of one head of the group, then those of the next
        d_k, d_v = sums
        head, block = step // count, begin + step % count
        at = pl.ds(block * plan.block, plan.block)
        seen = _seen(plan, offset, block * plan.block, key, ids[0][at] if ids else None, k_ids)
        q, d_out = q_ref[at, head, :], d_out_ref[at, head, :]
        weights, d_scores = _score_gradient(plan, q, d_out, k, v, lse_ref[head, at], shift_ref[head, at], seen)
        d_v += product(weights.astype(d_out.dtype), d_out, (0, 0))
        return d_k + product(d_scores.astype(q.dtype), q, (0, 0)), d_v

    zeros = jnp.zeros(k.shape, jnp.float32)
    d_k, d_v = lax.fori_loop(0, count * q_ref.shape[1], visit, (zeros, zeros))
    d_k_ref[...], d_v_ref[...] = d_k.astype(d_k_ref.dtype), d_v.astype(d_v_ref.dtype)


def _specs(plan: Plan, q: Array, k: Array, by_key: bool) -> dict[str, pl.BlockSpec]:
    """Blocks for a grid of (batch, head, block of queries), or `by_key` of (batch, kv head, block of keys)."""
    group, (length, keys), dim = q.shape[2] // k.shape[2], (q.shape[1], k.shape[1]), q.shape[3]
    scalar = pl.BlockSpec((None,), lambda b, h, i: (b,))
    if by_key:
        return {
            "offset": scalar,
            "q": pl.BlockSpec((None, length, group, dim), lambda b, h, i: (b, 0, h, 0)),
            "stat": pl.BlockSpec((None, group, length), lambda b, h, i: (b, h, 0)),
            "kv": pl.BlockSpec((None, plan.block, None, dim), lambda b, h, i: (b, i, h, 0)),
            "q_ids": pl.BlockSpec((None, length), lambda b, h, i: (b, 0)),
            "k_ids": pl.BlockSpec((None, plan.block), lambda b, h, i: (b, i)),
        }
    return {
        "offset": scalar,
        "q": pl.BlockSpec((None, plan.block, None, dim), lambda b, h, i: (b, i, h, 0)),
        "stat": pl.BlockSpec((None, None, plan.block), lambda b, h, i: (b, h, i)),
        "kv": pl.BlockSpec((None, keys, None, dim), lambda b, h, i: (b, 0, h // group, 0)),
        "q_ids": pl.BlockSpec((None, plan.block), lambda b, h, i: (b, i)),
        "k_ids": pl.BlockSpec((None, keys), lambda b, h, i: (b, 0)),
    }


def _call(plan: Plan, kernel: Any, q: Array, k: Array, operands: dict[str, list], results: dict[str, list]) -> Any:
    """Runs a kernel on `operands`, {name of the spec: arrays}; `results` holds shapes in the same way."""
    by_key = kernel is _d_kv_kernel
    specs = _specs(plan, q, k, by_key)
    heads, length = (k.shape[2], k.shape[1]) if by_key else (q.shape[2], q.shape[1])
    return pl.pallas_call(
        functools.partial(kernel, plan),
        grid=(q.shape[0], heads, length // plan.block),
        in_specs=[specs[name] for name, arrays in operands.items() for _ in arrays],
        out_specs=[specs[name] for name, shapes in results.items() for _ in shapes],
        out_shape=[shape for shapes in results.values() for shape in shapes],
        compiler_params=plan.compiler_params(q.shape[3]),
        interpret=plan.interpret,
        name=kernel.__name__.strip("_"),
    )(*(array for arrays in operands.values() for array in arrays))


def _ids(segments: Segments) -> dict[str, list]:
    return {} if segments is None else {"q_ids": [segments[0]], "k_ids": [segments[1]]}


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _differentiable(plan: Plan, q: Array, k: Array, v: Array, offsets: Array, segments: Segments) -> Any:
    return _forward(plan, q, k, v, offsets, segments)[0]


_attention = jax.jit(_differentiable, static_argnums=0)


def _forward(plan: Plan, q: Array, k: Array, v: Array, offsets: Array, segments: Segments) -> Any:
    stat = jax.ShapeDtypeStruct((q.shape[0], q.shape[2], q.shape[1]), jnp.float32)
    operands = {"offset": [offsets], "q": [q], "kv": [k, v]} | _ids(segments)
    out, lse = _call(plan, _forward_kernel, q, k, operands, {"q": [jax.typeof(q)], "stat": [stat]})
    return (out, lse), (q, k, v, offsets, segments, out, lse)


def _backward(plan: Plan, saved: Any, grads: tuple[Array, Array]) -> Any:
    q, k, v, offsets, segments, out, lse = saved
    d_out, d_lse = grads
    # d scores = weights * (d_out . v - d_out . out + d_lse), so both row terms are one number a row.
    shift = (d_out.astype(jnp.float32) * out.astype(jnp.float32)).sum(-1).swapaxes(1, 2) - d_lse
    lse = jnp.where(jnp.isneginf(lse), _NEVER, lse)
    operands = {"offset": [offsets], "q": [q, d_out.astype(q.dtype)], "stat": [lse, shift], "kv": [k, v]} | _ids(
        segments
    )
    (d_q,) = _call(plan, _d_q_kernel, q, k, operands, {"q": [jax.typeof(q)]})
    d_k, d_v = _call(plan, _d_kv_kernel, q, k, operands, {"kv": [jax.typeof(k), jax.typeof(v)]})
    return d_q, d_k, d_v, None, None


_differentiable.defvjp(_forward, _backward)
