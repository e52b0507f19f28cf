"""What the kernels for NVIDIA GPUs share."""

from jax import Array, lax
from jax import numpy as jnp
from jax.experimental import pallas as pl


def product(a: Array, b: Array, contract: tuple[int, int]) -> Array:
    """Of two tiles over one axis of each, summed in float32; float32 tiles are multiplied in full float32."""
    precision = lax.Precision.HIGHEST if a.dtype == jnp.float32 else None
    dims = (((contract[0],), (contract[1],)), ((), ()))
    return lax.dot_general(a, b, dims, precision=precision, preferred_element_type=jnp.float32)


def whole(x: Array) -> pl.BlockSpec:
    """The whole array for every program, which loads what it needs."""
    return pl.BlockSpec(x.shape, lambda *_: (0,) * x.ndim)
