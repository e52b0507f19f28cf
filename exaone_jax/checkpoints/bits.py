"""Tensor data as bits: dtypes, counts of what is not finite.

numpy and eager jax rewrite signalling NaNs of bfloat16 that pass through float arithmetic, so nothing here does that.
"""

from typing import Any

import ml_dtypes
import numpy as np
from numpy.typing import DTypeLike, NDArray

from exaone_jax.checkpoints.safetensors import Bits

FLOATS: dict[str, np.dtype[Any]] = {
    "BF16": np.dtype(ml_dtypes.bfloat16),
    "F16": np.dtype(np.float16),
    "F32": np.dtype(np.float32),
}
_BY_DTYPE = {dtype: name for name, dtype in FLOATS.items()}
_MANTISSA = {"BF16": (0x7F80, 0x007F), "F16": (0x7C00, 0x03FF), "F32": (0x7F800000, 0x007FFFFF)}


def safetensors_dtype(dtype: DTypeLike) -> str:
    """bfloat16 -> "BF16"; raises KeyError for what a parameter cannot be."""
    return _BY_DTYPE[np.dtype(dtype)]


def as_float(bits: Bits, dtype: str) -> NDArray[Any]:
    """The same memory seen as floats."""
    return bits.view(FLOATS[dtype])


def as_bits(array: NDArray[Any]) -> Bits:
    """The same memory seen as unsigned integers."""
    return array.view(f"u{array.dtype.itemsize}")


def count_nonfinite(bits: Bits, dtype: str) -> tuple[int, int]:
    """How many NaNs and how many infinities, told from the bits."""
    exponent, mantissa = _MANTISSA[dtype]
    special = bits[(bits & bits.dtype.type(exponent)) == exponent]
    nans = int(np.count_nonzero(special & special.dtype.type(mantissa)))
    return nans, special.size - nans
