"""Cross entropy of a linear layer over a large vocabulary, whose logits are never whole in memory."""

from pallas_kernels.linear_cross_entropy.api import choose_implementation, linear_cross_entropy

__all__ = ["choose_implementation", "linear_cross_entropy"]
