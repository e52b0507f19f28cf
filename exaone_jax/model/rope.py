"""Rotary position embedding over the whole head dimension, halves rotated (NeoX order)."""

from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from exaone_jax.config.model import Llama3RopeScaling


class Rotation(NamedTuple):
    """cos and sin `[B, T, 1, head_dim // 2]` in the dtype of the activations."""

    cos: jax.Array
    sin: jax.Array


def inverse_frequencies(head_dim: int, theta: float, scaling: Llama3RopeScaling | None) -> np.ndarray:
    """Angular frequency of each pair of dimensions, radians a position, float32 `[head_dim // 2]`.

    Scaling is Llama 3's: wavelengths above original/low are stretched by `factor`, those below original/high are kept,
    and between the two a linear ramp in original/wavelength blends them.
    """
    exponents = np.arange(0, head_dim, 2, dtype=np.float32) / np.float32(head_dim)
    # Powers rounded to float32 before the division, as torch does: at position 200,000 the last bit is 0.02 radians.
    frequencies = np.float32(1.0) / (np.float64(theta) ** exponents).astype(np.float32)
    if scaling is None:
        return frequencies
    rotations = scaling.original_max_position_embeddings / (np.float32(2 * np.pi) / frequencies)
    ramp = (rotations - scaling.low_freq_factor) / (scaling.high_freq_factor - scaling.low_freq_factor)
    kept = np.clip(ramp, 0.0, 1.0)
    return ((1 - kept) * frequencies / scaling.factor + kept * frequencies).astype(np.float32)


def rotation(positions: jax.Array, frequencies: np.ndarray, dtype: jax.typing.DTypeLike) -> Rotation:
    """Rotation for int32 positions `[B, T]`; the angles are computed in float32."""
    angles = positions[..., None, None].astype(jnp.float32) * frequencies
    return Rotation(jnp.cos(angles).astype(dtype), jnp.sin(angles).astype(dtype))


def rotate(x: jax.Array, by: Rotation) -> jax.Array:
    """Rotate heads `[B, T, H, head_dim]`."""
    first, second = jnp.split(x, 2, axis=-1)
    return jnp.concatenate([first * by.cos - second * by.sin, second * by.cos + first * by.sin], axis=-1)
