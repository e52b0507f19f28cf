"""RMSNorm."""

from functools import partial

import jax
import jax.numpy as jnp
from flax import nnx

from exaone_jax.model.linear import ParamFactory


@partial(jax.checkpoint, static_argnums=2, prevent_cse=False)
def rms_norm(x: jax.Array, scale: jax.Array, eps: float) -> jax.Array:
    """scale * cast(x / rms(x)) over the last axis; the backward pass keeps x alone."""
    x32 = x.astype(jnp.float32)
    normed = x32 * jax.lax.rsqrt(jnp.mean(jnp.square(x32), axis=-1, keepdims=True) + eps)
    return scale.astype(x.dtype) * normed.astype(x.dtype)


class RMSNorm(nnx.Module):
    """scale * cast(x / rms(x)) over the last axis: the mean in float32, the cast before the scale."""

    def __init__(self, make: ParamFactory, size: int, eps: float, axis: str):
        self.scale = make.ones((size,), (axis,))
        self.eps = eps

    def __call__(self, x: jax.Array) -> jax.Array:
        return rms_norm(x, self.scale[...], self.eps)
