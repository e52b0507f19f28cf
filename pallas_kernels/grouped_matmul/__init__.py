"""Rows sorted by group, times the matrix of their group: the products of a mixture of experts."""

from pallas_kernels.grouped_matmul.api import choose_implementation, grouped_matmul
from pallas_kernels.grouped_matmul.quantized import QuantizedRhs

__all__ = ["QuantizedRhs", "choose_implementation", "grouped_matmul"]
