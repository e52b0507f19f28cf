"""A model of every kind of layer that is trained, small enough to compile in a second or two."""

import numpy as np
import pytest
from flax import nnx

from exaone_jax.config.model import LayerSpec, ModelConfig, MoEConfig
from exaone_jax.data import PackedRows, pack
from exaone_jax.model import Transformer

LOCAL, GLOBAL = LayerSpec(window=5), LayerSpec(rope=False)


def sparse(spec: LayerSpec) -> LayerSpec:
    return spec.model_copy(update={"moe": True})


@pytest.fixture(scope="session")
def config() -> ModelConfig:
    """Dense then sparse layers, local and global, the last two twice over; a multi-token-prediction layer."""
    return ModelConfig(
        model_type="exaone_moe",
        vocab_size=61,
        hidden_size=16,
        intermediate_size=24,
        num_heads=2,
        num_kv_heads=1,
        head_dim=8,
        layers=(LOCAL, *(sparse(spec) for spec in (LOCAL, GLOBAL, LOCAL, GLOBAL))),
        moe=MoEConfig(
            num_experts=4, num_experts_per_tok=2, num_shared_experts=1, intermediate_size=8, routed_scaling_factor=2.5
        ),
        mtp_layer=LayerSpec(),
        max_position_embeddings=64,
        initializer_range=0.3,
    )


@pytest.fixture
def model(config: ModelConfig) -> Transformer:
    return Transformer(config, rngs=nnx.Rngs(0))


@pytest.fixture(scope="session")
def documents() -> list[np.ndarray]:
    """Of 1, 2 and 3 tokens too, the sizes at which a next token, or one after that, comes to be."""
    rng = np.random.default_rng(0)
    return [rng.integers(0, 61, size) for size in (16, 11, 3, 2, 9, 1)]


@pytest.fixture(scope="session")
def batch(documents: list[np.ndarray]) -> PackedRows:
    """The documents in 3 rows of 16, with padding."""
    rows = pack(documents, 16, pad_id=60)
    assert rows.tokens.shape == (3, 16)
    assert (rows.segment_ids == 0).any()
    return rows
