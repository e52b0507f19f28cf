"""Linear cross entropy by chunks of rows: `[chunk, V]` logits exist at a time, forward and again backward."""

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp

_LOGIT_BYTES = 2**28


class Rows(NamedTuple):
    """What goes with each row, `[M]` or by chunks `[n, chunk]`."""

    labels: jax.Array
    counts: jax.Array


def linear_cross_entropy(
    x: jax.Array, weight: jax.Array, labels: jax.Array, counts: jax.Array, z_loss: float, chunk_size: int | None
) -> tuple[jax.Array, jax.Array]:
    """x `[M, D]`, weight `[V, D]`, labels int `[M]`, counts bool `[M]` -> (loss, lse) float32 `[M]`."""
    num_rows = x.shape[0]
    num_chunks = -(-num_rows // (chunk_size or default_chunk_size(weight.shape[0])))
    x, labels, counts = (_deal(a, num_chunks) for a in (x, labels, counts))
    out: LossAndLse = _chunked(x, weight, Rows(labels, counts), z_loss)
    return _gather(out.loss, num_rows), _gather(out.lse, num_rows)


def default_chunk_size(vocab_size: int) -> int:
    """Rows whose float32 logits take at most 256 MiB, in whole 128s where that leaves any."""
    rows = max(_LOGIT_BYTES // (4 * vocab_size), 1)
    return rows // 128 * 128 or rows


class LossAndLse(NamedTuple):
    """float32 `[n, chunk]` each."""

    loss: jax.Array
    lse: jax.Array


def _deal(a: jax.Array, num_chunks: int) -> jax.Array:
    """`[M, ...]` -> `[num_chunks, chunk, ...]`: row m goes to chunk m % num_chunks.

    So rows that are sharded over a mesh stay where they are, and every device has a part of every chunk.
    """
    chunk = -(-a.shape[0] // num_chunks)
    a = jnp.pad(a, ((0, chunk * num_chunks - a.shape[0]), *((0, 0),) * (a.ndim - 1)))
    return jnp.swapaxes(a.reshape(chunk, num_chunks, *a.shape[1:]), 0, 1)


def _gather(a: jax.Array, num_rows: int) -> jax.Array:
    return jnp.swapaxes(a, 0, 1).reshape(-1)[:num_rows]


def _dot(a: jax.Array, b: jax.Array, a_axis: int, b_axis: int) -> jax.Array:
    precision = jax.lax.Precision.HIGHEST if a.dtype == jnp.float32 else None
    dims = (((a_axis,), (b_axis,)), ((), ()))
    return jax.lax.dot_general(a, b, dims, precision=precision, preferred_element_type=jnp.float32)


def _is_label(logits: jax.Array, labels: jax.Array) -> jax.Array:
    """bool `[chunk, V]`."""
    return jax.lax.broadcasted_iota(labels.dtype, logits.shape, 1) == labels[:, None]


def _at_label(logits: jax.Array, labels: jax.Array) -> jax.Array:
    """logits[i, labels[i]] `[chunk]`; of no meaning where a label is none. A comparison stays local where V is sharded."""
    return jax.lax.platform_dependent(
        logits,
        labels,
        cpu=lambda logits, labels: jnp.take_along_axis(logits, labels[:, None], axis=1, mode="clip")[:, 0],
        default=lambda logits, labels: jnp.sum(jnp.where(_is_label(logits, labels), logits, 0), axis=-1),
    )


@functools.partial(jax.custom_vjp, nondiff_argnums=(3,))
def _chunked(x: jax.Array, weight: jax.Array, rows: Rows, z_loss: float) -> LossAndLse:
    """x `[n, chunk, D]` -> loss and lse `[n, chunk]`."""
    return jax.lax.map(lambda chunk: _loss(_logits(chunk[0], weight), chunk[1], z_loss), (x, rows))


def _logits(x: jax.Array, weight: jax.Array) -> jax.Array:
    return _dot(x, weight.astype(x.dtype), 1, 1)


def _loss(logits: jax.Array, rows: Rows, z_loss: float) -> LossAndLse:
    labels, counts = rows
    lse = jax.nn.logsumexp(logits, axis=-1)
    known = (labels >= 0) & (labels < logits.shape[1])
    loss = lse - jnp.where(known, _at_label(logits, labels), jnp.nan) + z_loss * lse**2
    return LossAndLse(jnp.where(counts, loss, 0), jnp.where(counts, lse, 0))


def _forward(x: jax.Array, weight: jax.Array, rows: Rows, z_loss: float):
    if x.shape[0] > 1:
        out: LossAndLse = _chunked(x, weight, rows, z_loss)
        return out, (x, weight, rows, out.lse, None)
    logits = _logits(x[0], weight)  # of one chunk they may as well stay in memory until the backward pass
    out = jax.tree.map(lambda a: a[None], _loss(logits, jax.tree.map(lambda a: a[0], rows), z_loss))
    return out, (x, weight, rows, out.lse, logits)


def _backward(z_loss: float, saved: tuple, grads: LossAndLse):
    """d loss / d logits = softmax * (1 + 2 z_loss lse) - onehot, and d lse / d logits = softmax."""
    x, weight, rows, lse, kept = saved

    def one_chunk(dweight: jax.Array, chunk: tuple) -> tuple[jax.Array, jax.Array]:
        x, (labels, counts), lse, (dloss, dlse) = chunk
        dloss, dlse = jnp.where(counts, dloss, 0), jnp.where(counts, dlse, 0)
        x = jnp.where(counts[:, None], x, 0)
        # A row that does not count has lse 0: its logits must be zeros, so that nothing overflows.
        logits = _logits(x, weight) if kept is None else jnp.where(counts[:, None], kept, 0)
        scaled = (dloss * (1 + 2 * z_loss * lse) + dlse)[:, None] * jnp.exp(logits - lse[:, None])
        dlogits = (scaled - jnp.where(_is_label(logits, labels), dloss[:, None], 0)).astype(x.dtype)
        dx = _dot(dlogits, weight.astype(x.dtype), 1, 0).astype(x.dtype)
        return dweight + _dot(dlogits, x, 0, 0), dx

    dweight, dx = jax.lax.scan(one_chunk, jnp.zeros(weight.shape, jnp.float32), (x, rows, lse, grads))
    return dx, dweight.astype(weight.dtype), None


_chunked.defvjp(_forward, _backward)
