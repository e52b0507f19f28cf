"""Weights whose parts lie on several devices, put together for use inside `shard_map`."""

from functools import partial
from typing import NamedTuple

import jax
from jax import lax


class Parts(NamedTuple):
    """Mesh axes over which a dimension of a weight is split; no axes: it is whole."""

    axes: tuple[str, ...]
    dim: int

    def gather(self, weight: jax.Array, dtype: jax.typing.DTypeLike) -> jax.Array:
        """The whole weight in the dtype that it multiplies in: float32 master weights travel at half their bytes."""
        weight = weight.astype(dtype)
        return lax.all_gather(weight, self.axes, axis=self.dim, tiled=True) if self.axes else weight

    def scatter(self, grad: jax.Array) -> jax.Array:
        """This device's part of the sum of a whole weight's gradients, in the dtype of `grad`."""
        return lax.psum_scatter(grad, self.axes, scatter_dimension=self.dim, tiled=True) if self.axes else grad


@partial(jax.custom_vjp, nondiff_argnums=(1, 2))
def gathered(weight: jax.Array, parts: Parts, dtype: jax.typing.DTypeLike) -> jax.Array:
    """The whole weight with the values of `dtype` in the weight's own dtype, in which its gradient is then summed."""
    return parts.gather(weight, dtype).astype(weight.dtype)


def _forward(weight: jax.Array, parts: Parts, dtype: jax.typing.DTypeLike) -> tuple[jax.Array, None]:
    return gathered(weight, parts, dtype), None


def _backward(parts: Parts, dtype: jax.typing.DTypeLike, saved: None, grad: jax.Array) -> tuple[jax.Array]:
    return (parts.scatter(grad),)


gathered.defvjp(_forward, _backward)


@partial(jax.custom_vjp, nondiff_argnums=(1,))
def summed(x: jax.Array, axes: tuple[str, ...]) -> jax.Array:
    """`psum` of what leaves a `shard_map` that does not check replication, whole over these axes.

    Such a `shard_map` hands its gradient back in equal shares, one for each device, which the transpose of `psum` would add up
    in another collective: each device makes the sum from its own share.
    """
    return lax.psum(x, axes)


def _summed_forward(x: jax.Array, axes: tuple[str, ...]) -> tuple[jax.Array, None]:
    return summed(x, axes), None


def _summed_backward(axes: tuple[str, ...], saved: None, share: jax.Array) -> tuple[jax.Array]:
    return (share * lax.axis_size(axes),)


summed.defvjp(_summed_forward, _summed_backward)
