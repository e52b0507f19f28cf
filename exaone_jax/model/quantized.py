"""Frozen matrices in 8 or 4 bits, for adapters to be trained beside."""

import math
from typing import Any, Literal

import jax
import jax.numpy as jnp
from flax import nnx

from exaone_jax.model.linear import Axes, Frozen

Kind = Literal["int8", "nf4"]
# The 16 values of NormalFloat4, quantiles of a normal distribution scaled to [-1, 1] (arXiv 2305.14314, appendix E).
NF4 = (
    -1.0, -0.6961928009986877, -0.5250730514526367, -0.39491748809814453, -0.28444138169288635, -0.18477343022823334,
    -0.09105003625154495, 0.0, 0.07958029955625534, 0.16093020141124725, 0.24611230194568634, 0.33791524171829224,
    0.44070982933044434, 0.5626170039176941, 0.7229568362236023, 1.0,
)  # fmt: skip
_BLOCK = 64  # values of a row that share a scale in nf4


class Quantized(nnx.Module):
    """Matrices `[..., out, in]`. `[...]` gives them back in float32, whose values are those of the codes.

    int8: codes int8 `[..., out, in]` and scale float32 `[..., out, 1]`, the largest magnitude of a row over 127.
    nf4: codes uint8 `[..., out, in / 2]`, two a byte, the first in the low bits; scale float32 `[..., out, in / block]`, the
    largest magnitude of a block of up to 64 of a row's values. An odd `in` is refused with ValueError.
    """

    def __init__(self, weight: jax.Array, axes: Axes, kind: Kind):
        self.kind: Kind = kind
        codes, scale = quantise(weight, axes, kind)
        self.codes, self.scale = Frozen(codes, axes=axes), Frozen(scale, axes=(*axes[:-1], "rank"))

    def __getitem__(self, index: Any) -> jax.Array:
        codes, scale = self.codes[...], self.scale[...]
        values = codes.astype(jnp.float32) if self.kind == "int8" else _of_nf4(codes)
        blocks = values.reshape(*values.shape[:-1], scale.shape[-1], -1)
        return (blocks * scale[..., None]).reshape(values.shape)[index]

    def get_metadata(self, name: str) -> Any:
        """As that of the variable that this replaces."""
        return self.codes.get_metadata(name)


def quantise(weight: jax.Array, axes: Axes, kind: Kind) -> tuple[jax.Array, jax.Array]:
    """The codes and scale of `Quantized`."""
    of = _to_int8 if kind == "int8" else _to_nf4
    return jax.lax.map(of, weight) if axes[0] == "layers" else of(weight)  # only one layer is wide at a time


def _to_int8(weight: jax.Array) -> tuple[jax.Array, jax.Array]:
    wide = weight.astype(jnp.float32)
    scale = _largest(wide) / 127
    return jnp.round(wide / scale).astype(jnp.int8), scale


def _to_nf4(weight: jax.Array) -> tuple[jax.Array, jax.Array]:
    size = weight.shape[-1]
    if size % 2:
        raise ValueError(f"nf4 packs two values into a byte: found rows of {size}, expected an even number")
    blocks = weight.astype(jnp.float32).reshape(*weight.shape[:-1], -1, math.gcd(size, _BLOCK))
    scale = _largest(blocks)
    levels = jnp.array(NF4, jnp.float32)
    between = (levels[1:] + levels[:-1]) / 2
    nearest = jnp.searchsorted(between, blocks / scale, method="compare_all").astype(jnp.uint8)
    pairs = nearest.reshape(*weight.shape[:-1], -1, 2)
    return pairs[..., 0] | pairs[..., 1] << 4, scale[..., 0]


def _of_nf4(codes: jax.Array) -> jax.Array:
    pairs = jnp.stack([codes & 15, codes >> 4], axis=-1)
    return jnp.array(NF4, jnp.float32)[pairs.reshape(*codes.shape[:-1], -1)]


def _largest(values: jax.Array) -> jax.Array:
    """Magnitude along the last axis, kept; 1 where all are zero."""
    most = jnp.max(jnp.abs(values), axis=-1, keepdims=True)
    return jnp.where(most == 0, 1.0, most)
