"""ModelConfig and config.json. Importing it does not import jax."""

from exaone_jax.config.hf import (
    from_hf,
    published,
    published_names,
    quantization,
    read_config,
    read_config_and_extra,
    read_raw_config,
    to_hf,
)
from exaone_jax.config.model import (
    LayerSpec,
    Llama3RopeScaling,
    ModelConfig,
    MoEConfig,
    Segment,
    VisionConfig,
    layer_plan,
)

__all__ = [
    "LayerSpec",
    "Llama3RopeScaling",
    "MoEConfig",
    "ModelConfig",
    "Segment",
    "VisionConfig",
    "from_hf",
    "layer_plan",
    "published",
    "published_names",
    "quantization",
    "read_config",
    "read_config_and_extra",
    "read_raw_config",
    "to_hf",
]
