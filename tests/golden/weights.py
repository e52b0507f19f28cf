"""Random checkpoints that need not be stored: every tensor follows from its name and a seed, bit for bit, wherever numpy runs.

`tensor_shapes` is written out from the published tensor lists, apart from `exaone_jax.checkpoints`, so that it is a witness.
"""

import json
import zlib
from collections.abc import Mapping
from pathlib import Path

import numpy as np
from safetensors.numpy import save_file


def uniform(name: str, shape: tuple[int, ...], seed: int) -> np.ndarray:
    """float32 in [-1, 1) from raw generator bits: numpy promises those stay the same, unlike its distributions."""
    bits = np.random.PCG64([seed, zlib.crc32(name.encode())]).random_raw(int(np.prod(shape)))
    return ((bits >> np.uint64(40)).astype(np.float32) / 2**23 - 1).reshape(shape)


def random_tensor(name: str, shape: tuple[int, ...], seed: int, tied: bool = False) -> np.ndarray:
    """A float32 value that makes mistakes visible: no norm is one, no bias is zero, logits spread over several units."""
    value = uniform(name, shape, seed)
    if name.endswith(("q_norm.weight", "k_norm.weight")):
        return (
            1.5 + 0.5 * value
        )  # attention scores of standard deviation about 2: some keys matter much more than others
    if len(shape) == 1 and name.endswith(".weight"):
        return 1 + 0.5 * value
    if name.endswith("e_score_correction_bias"):
        return 0.3 * value  # about the spread of the scores it is added to
    if "embed_tokens" in name or name.endswith("wte.weight"):
        return value * np.float32((12 / shape[1]) ** 0.5 if tied else 1)  # tied: it is the output head too
    gain = 2.0 if name.startswith("lm_head") or name.endswith("gate.weight") else 1.0
    return value * np.float32(gain * (3 / np.prod(shape[1:])) ** 0.5)


def random_tensors(config: dict, seed: int) -> dict[str, np.ndarray]:
    tied = config.get("text_config", config)["tie_word_embeddings"]
    return {name: random_tensor(name, shape, seed, tied) for name, shape in tensor_shapes(config).items()}


def write_checkpoint(directory: Path, config: dict, tensors: Mapping[str, np.ndarray]) -> Path:
    directory.mkdir(parents=True, exist_ok=True)
    (directory / "config.json").write_text(json.dumps(config, indent=2))
    file = directory / "model.safetensors"
    file.unlink(missing_ok=True)  # a file of this name may still be mapped into memory
    save_file({name: np.ascontiguousarray(t) for name, t in tensors.items()}, file, {"format": "pt"})
    return directory


def tensor_shapes(config: dict) -> dict[str, tuple[int, ...]]:
    """Hugging Face tensor name -> shape of any EXAONE language model, MTP included where `num_nextn_predict_layers` says so."""
    if config["model_type"] == "exaone":
        return _shapes_3x(config)
    text = config.get("text_config", config)
    root = "model.language_model." if "text_config" in config else "model."
    vocab, size = text["vocab_size"], text["hidden_size"]
    shapes = {root + "embed_tokens.weight": (vocab, size)}
    for layer in range(text["num_hidden_layers"]):
        sparse = bool(text.get("num_experts")) and text["mlp_layer_types"][layer] == "sparse"
        shapes |= {f"{root}layers.{layer}.{name}": shape for name, shape in _layer_shapes(text, sparse).items()}
    shapes[root + "norm.weight"] = (size,)
    if not text["tie_word_embeddings"]:
        shapes["lm_head.weight"] = (vocab, size)
    if text.get("num_nextn_predict_layers"):
        norms = ("pre_fc_norm_embedding", "pre_fc_norm_hidden", "norm")
        shapes |= {"mtp.fc.weight": (size, 2 * size)} | {f"mtp.{norm}.weight": (size,) for norm in norms}
        shapes |= {f"mtp.layers.0.{name}": shape for name, shape in _layer_shapes(text, sparse=False).items()}
    if "vision_config" in config:
        shapes |= _vision_shapes(config["vision_config"])
    return shapes


def _layer_shapes(config: dict, sparse: bool) -> dict[str, tuple[int, ...]]:
    size, pre = config["hidden_size"], config["model_type"] == "exaone_moe"
    norms = (
        ("input_layernorm", "post_attention_layernorm")
        if pre
        else ("post_attention_layernorm", "post_feedforward_layernorm")
    )
    shapes: dict[str, tuple[int, ...]] = {f"{norm}.weight": (size,) for norm in norms}
    shapes |= {f"self_attn.{name}.weight": shape for name, shape in _attention_shapes(config).items()}
    dim = _head_dim(config)
    shapes |= {"self_attn.q_norm.weight": (dim,), "self_attn.k_norm.weight": (dim,)}
    if not sparse:
        return shapes | _mlp_shapes("mlp", size, config["intermediate_size"])
    inner, experts = config["moe_intermediate_size"], config["num_experts"]
    shapes |= {"mlp.gate.weight": (experts, size), "mlp.e_score_correction_bias": (experts,)}
    for expert in range(experts):
        shapes |= _mlp_shapes(f"mlp.experts.{expert}", size, inner)
    if config["num_shared_experts"]:
        shapes |= _mlp_shapes("mlp.shared_experts", size, inner * config["num_shared_experts"])
    return shapes


def _attention_shapes(config: dict, out: str = "o_proj") -> dict[str, tuple[int, ...]]:
    size, dim = config["hidden_size"], _head_dim(config)
    q, kv = config["num_attention_heads"] * dim, config["num_key_value_heads"] * dim
    return {"q_proj": (q, size), "k_proj": (kv, size), "v_proj": (kv, size), out: (size, q)}


def _mlp_shapes(name: str, size: int, inner: int) -> dict[str, tuple[int, ...]]:
    up, down = (inner, size), (size, inner)
    return {f"{name}.gate_proj.weight": up, f"{name}.up_proj.weight": up, f"{name}.down_proj.weight": down}


def _head_dim(config: dict) -> int:
    return config.get("head_dim") or config["hidden_size"] // config["num_attention_heads"]


def _shapes_3x(config: dict) -> dict[str, tuple[int, ...]]:
    vocab, size, inner = config["vocab_size"], config["hidden_size"], config["intermediate_size"]
    shapes = {"transformer.wte.weight": (vocab, size)}
    for layer in range(config["num_layers"]):
        block: dict[str, tuple[int, ...]] = {"ln_1": (size,), "ln_2": (size,)}
        block |= {f"attn.attention.{name}": shape for name, shape in _attention_shapes(config, "out_proj").items()}
        block |= {"mlp.c_fc_0": (inner, size), "mlp.c_fc_1": (inner, size), "mlp.c_proj": (size, inner)}
        shapes |= {f"transformer.h.{layer}.{name}.weight": shape for name, shape in block.items()}
    shapes["transformer.ln_f.weight"] = (size,)
    if not config["tie_word_embeddings"]:
        shapes["lm_head.weight"] = (vocab, size)
    return shapes


def _vision_shapes(config: dict) -> dict[str, tuple[int, ...]]:
    size, inner, depth = config["hidden_size"], config["intermediate_size"], config["depth"]
    kv = config["num_key_value_heads"] * size // config["num_heads"]
    merged = size * config["spatial_merge_size"] ** 2
    patch = (config["in_channels"], config["temporal_patch_size"], config["patch_size"], config["patch_size"])
    shapes = {"patch_embed.proj.weight": (size, *patch), "merger.ln_q.weight": (size,)}
    for block in range(depth):
        linears = {"attn.qkv": (size + 2 * kv, size), "attn.proj": (size, size)}
        linears |= {"mlp.gate_proj": (inner, size), "mlp.up_proj": (inner, size), "mlp.down_proj": (size, inner)}
        shapes |= {f"blocks.{block}.norm1.weight": (size,), f"blocks.{block}.norm2.weight": (size,)}
        shapes |= _with_bias({f"blocks.{block}.{name}": shape for name, shape in linears.items()})
    shapes |= _with_bias({"merger.mlp.0": (merged, merged), "merger.mlp.2": (config["out_hidden_size"], merged)})
    return {f"model.visual.{name}": shape for name, shape in shapes.items()}


def _with_bias(linears: dict[str, tuple[int, ...]]) -> dict[str, tuple[int, ...]]:
    weights: dict[str, tuple[int, ...]] = {f"{name}.weight": shape for name, shape in linears.items()}
    return weights | {f"{name}.bias": shape[:1] for name, shape in linears.items()}
