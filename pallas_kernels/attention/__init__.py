"""Causal, windowed, segmented, grouped-query attention, forward and backward."""

from pallas_kernels.attention.api import attention, choose_implementation

__all__ = ["attention", "choose_implementation"]
