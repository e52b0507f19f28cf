"""Attention of ragged queries to a paged or ring key-value cache: prefill chunks and decode rows in one call."""

from pallas_kernels.paged_attention.api import QUANTIZED, choose_implementation, paged_attention
from pallas_kernels.paged_attention.pages import pool_format

__all__ = ["QUANTIZED", "choose_implementation", "paged_attention", "pool_format"]
