"""Linear cross entropy by chunks of rows: `[chunk, V]` logits exist at a time, forward and again backward."""

import jax
import jax.numpy as jnp

_LOGIT_BYTES = 2**28


def lse_and_label(
    x: jax.Array, weight: jax.Array, labels: jax.Array, chunk_size: int | None
) -> tuple[jax.Array, jax.Array]:
    """As `reference.lse_and_label`."""
    num_rows = x.shape[0]
    num_chunks = -(-num_rows // (chunk_size or default_chunk_size(weight.shape[0])))
    lse, at_label = _chunked(_deal(x, num_chunks), weight, _deal(labels, num_chunks))
    return _gather(lse, num_rows), _gather(at_label, num_rows)


def default_chunk_size(vocab_size: int) -> int:
    """Rows whose float32 logits take at most 256 MiB, in whole 128s where that leaves any."""
    rows = max(_LOGIT_BYTES // (4 * vocab_size), 1)
    return rows // 128 * 128 or rows


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


def _take_at_label(logits: jax.Array, labels: jax.Array) -> jax.Array:
    known = (labels >= 0) & (labels < logits.shape[1])
    return jnp.where(known, jnp.take_along_axis(logits, labels[:, None], axis=1, mode="clip")[:, 0], 0)


def _at_label(logits: jax.Array, labels: jax.Array) -> jax.Array:
    """logits[i, labels[i]] `[chunk]`, 0 where a label is none. A comparison stays local where V is sharded."""
    return jax.lax.platform_dependent(
        logits,
        labels,
        cpu=_take_at_label,
        default=lambda logits, labels: jnp.sum(jnp.where(_is_label(logits, labels), logits, 0), axis=-1),
    )


@jax.custom_vjp
def _chunked(x: jax.Array, weight: jax.Array, labels: jax.Array) -> tuple[jax.Array, jax.Array]:
    """x `[n, chunk, D]`, labels `[n, chunk]` -> lse and logits at the labels, float32 `[n, chunk]`."""
    return jax.lax.map(lambda chunk: _of_logits(_logits(chunk[0], weight), chunk[1]), (x, labels))


def _logits(x: jax.Array, weight: jax.Array) -> jax.Array:
    return _dot(x, weight.astype(x.dtype), 1, 1)


def _of_logits(logits: jax.Array, labels: jax.Array) -> tuple[jax.Array, jax.Array]:
    return jax.nn.logsumexp(logits, axis=-1), _at_label(logits, labels)


def _forward(x: jax.Array, weight: jax.Array, labels: jax.Array):
    if x.shape[0] > 1:
        out = _chunked(x, weight, labels)
        return out, (x, weight, labels, out[0], None)
    logits = _logits(x[0], weight)  # of one chunk they may as well stay in memory until the backward pass
    lse, at_label = _of_logits(logits, labels[0])
    return (lse[None], at_label[None]), (x, weight, labels, lse[None], logits)


def _backward(saved: tuple, grads: tuple[jax.Array, jax.Array]):
    """d lse / d logits = softmax, and d logit at label / d logits = onehot."""
    x, weight, labels, lse, kept = saved

    def one_chunk(dweight: jax.Array, chunk: tuple) -> tuple[jax.Array, jax.Array]:
        x, labels, lse, dlse, dlabel = chunk
        logits = _logits(x, weight) if kept is None else kept
        dlogits = dlse[:, None] * jnp.exp(logits - lse[:, None])
        dlogits = (dlogits + jnp.where(_is_label(logits, labels), dlabel[:, None], 0)).astype(x.dtype)
        dx = _dot(dlogits, weight.astype(x.dtype), 1, 0).astype(x.dtype)
        return dweight + _dot(dlogits, x, 0, 0), dx

    dweight, dx = jax.lax.scan(one_chunk, jnp.zeros(weight.shape, jnp.float32), (x, labels, lse, *grads))
    return dx, dweight.astype(weight.dtype), None


_chunked.defvjp(_forward, _backward)
