"""The plain meaning: all the logits at once."""

import jax
import jax.numpy as jnp


def linear_cross_entropy(
    x: jax.Array, weight: jax.Array, labels: jax.Array, counts: jax.Array, z_loss: float
) -> tuple[jax.Array, jax.Array]:
    """x `[M, D]`, weight `[V, D]`, labels int `[M]`, counts bool `[M]` -> (loss, lse) float32 `[M]`."""
    logits = jnp.dot(
        # Masked here too, so that nothing of a row that does not count reaches the gradient of the weight.
        jnp.where(counts[:, None], x, 0),
        weight.astype(x.dtype).T,
        precision=jax.lax.Precision.HIGHEST,
        preferred_element_type=jnp.float32,
    )
    lse = jax.nn.logsumexp(logits, axis=-1)
    known = (labels >= 0) & (labels < weight.shape[0])
    at_label = jnp.take_along_axis(logits, jnp.where(known, labels, 0)[:, None], axis=-1)[:, 0]
    loss = lse - jnp.where(known, at_label, jnp.nan) + z_loss * lse**2
    return jnp.where(counts, loss, 0), jnp.where(counts, lse, 0)
