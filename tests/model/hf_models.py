"""Random small models as Hugging Face has them: a checkpoint in the published spelling, the same model in transformers, and
what transformers' `save_pretrained` writes of it."""

from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
import transformers

from tests.golden.cases import CASES
from tests.golden.weights import random_tensors, write_checkpoint

# 3.x is a Llama by other names (model_type `exaone` was never part of transformers).
_TO_LLAMA = {
    "transformer.wte": "model.embed_tokens",
    "transformer.ln_f": "model.norm",
    "transformer.h.": "model.layers.",
    "ln_1": "input_layernorm",
    "ln_2": "post_attention_layernorm",
    "attn.attention.out_proj": "self_attn.o_proj",
    "attn.attention": "self_attn",
    "mlp.c_fc_0": "mlp.gate_proj",
    "mlp.c_fc_1": "mlp.up_proj",
    "mlp.c_proj": "mlp.down_proj",
}


@dataclass(frozen=True)
class HFModel:
    """published: a directory of `config` and `tensors`; saved: what transformers makes of it (3.x: the same directory)."""

    config: dict
    tensors: dict[str, np.ndarray]
    published: Path
    saved: Path
    model: transformers.PreTrainedModel

    def logits(self, tokens: np.ndarray, mask: np.ndarray | None = None) -> np.ndarray:
        """float32 or float64 `[B, T, V]`, one forward pass without a cache."""
        with torch.no_grad():
            attention_mask = None if mask is None else torch.from_numpy(mask)
            out = self.model(input_ids=torch.from_numpy(tokens), attention_mask=attention_mask, use_cache=False).logits
        return (out.float() if out.dtype == torch.bfloat16 else out).numpy()


def build(case: str, directory: Path, seed: int = 0, dtype: torch.dtype = torch.float32) -> HFModel:
    """Write the case's checkpoint under `directory`, load it into transformers as `dtype`, save it again from there."""
    config = CASES[case]
    tensors = random_tensors(config, seed)
    published = write_checkpoint(directory / "published", config, tensors)
    if config["model_type"] == "exaone":
        return HFModel(config, tensors, published, published, _llama(config, tensors, directory / "llama", dtype))
    model = _load(published, dtype)
    model.save_pretrained(directory / "saved")
    return HFModel(config, tensors, published, directory / "saved", model)


def _load(directory: Path, dtype: torch.dtype) -> transformers.PreTrainedModel:
    vision = "vision_config" in transformers.PreTrainedConfig.get_config_dict(directory)[0]
    auto = transformers.AutoModelForImageTextToText if vision else transformers.AutoModelForCausalLM
    model, info = auto.from_pretrained(directory, dtype=dtype, output_loading_info=True)
    left = {key: value for key, value in info.items() if value}
    if left:
        raise ValueError(f"transformers did not load {directory} whole: {left}")
    if dtype != torch.float32 and hasattr(model, "set_experts_implementation"):
        model.set_experts_implementation("eager")  # its grouped matmul takes no float64
    return model.eval()


def _llama(
    config: dict, tensors: dict[str, np.ndarray], directory: Path, dtype: torch.dtype
) -> transformers.PreTrainedModel:
    same = ("vocab_size", "hidden_size", "intermediate_size", "num_attention_heads", "num_key_value_heads", "head_dim")
    same += ("max_position_embeddings", "rope_theta", "rope_scaling", "tie_word_embeddings")
    llama = {key: config[key] for key in same if key in config}
    llama |= {"model_type": "llama", "architectures": ["LlamaForCausalLM"], "num_hidden_layers": config["num_layers"]}
    llama |= {"rms_norm_eps": config["layer_norm_epsilon"], "hidden_act": config["activation_function"]}
    renamed = {}
    for name, tensor in tensors.items():
        for old, new in _TO_LLAMA.items():
            name = name.replace(old, new)
        renamed[name] = tensor
    return _load(write_checkpoint(directory, llama, renamed), dtype)
