"""The Flax model: embedding, attention, feed-forward, mixture of experts, multi-token prediction."""

from exaone_jax.model.cache import KVCache
from exaone_jax.model.moe import RouterStats
from exaone_jax.model.paged import PagedCache, Rows
from exaone_jax.model.transformer import ForwardOutput, Transformer, check_tokens

__all__ = ["ForwardOutput", "KVCache", "PagedCache", "RouterStats", "Rows", "Transformer", "check_tokens"]
