"""The plain meaning: all the logits at once."""

import jax
import jax.numpy as jnp


def lse_and_label(x: jax.Array, weight: jax.Array, labels: jax.Array) -> tuple[jax.Array, jax.Array]:
    """x `[M, D]`, weight `[V, D]`, labels int `[M]` -> the log-sum-exp of each row of x @ weight.T and the logit at its
    label, 0 where that is outside [0, V): float32 `[M]` each."""
    logits = jnp.dot(
        x, weight.astype(x.dtype).T, precision=jax.lax.Precision.HIGHEST, preferred_element_type=jnp.float32
    )
    known = (labels >= 0) & (labels < weight.shape[0])
    at_label = jnp.take_along_axis(logits, jnp.where(known, labels, 0)[:, None], axis=-1)[:, 0]
    return jax.nn.logsumexp(logits, axis=-1), jnp.where(known, at_label, 0)
