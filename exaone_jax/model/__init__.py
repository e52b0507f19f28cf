"""The Flax model: embedding, attention, feed-forward, mixture of experts, multi-token prediction."""

from exaone_jax.model.cache import KVCache
from exaone_jax.model.moe import RouterStats
from exaone_jax.model.transformer import ForwardOutput, Transformer, check_tokens

__all__ = ["ForwardOutput", "KVCache", "RouterStats", "Transformer", "check_tokens"]
