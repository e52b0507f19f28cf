"""One table per model_type: every Hugging Face tensor <-> the parameter that holds it, with the layout change.

Names and shapes are those of the published files (safetensors headers), not of transformers in memory: experts lie apart, the
router bias is `mlp.e_score_correction_bias`, multi-token prediction is at the root as `mtp.*`.
"""

import math
from collections.abc import Iterable
from dataclasses import dataclass
from functools import lru_cache

from exaone_jax.config.model import LayerSpec, ModelConfig, VisionConfig, layer_plan
from exaone_jax.errors import ConfigError

ParameterPath = tuple[str | int, ...]  # as in a flat nnx state: ("segments", 0, 3, "attention", "q_proj", "weight")
Shape = tuple[int, ...]

FLOAT_DTYPES = ("BF16", "F16", "F32")
SAFETENSORS_DTYPE = {"bfloat16": "BF16", "float16": "F16", "float32": "F32"}
CARRIED = "carried"  # first path entry of tensors that travel through conversion untouched (4.5's vision tower)

_LLAMA_LIKE = {
    "attention.q_proj.weight": "self_attn.q_proj.weight",
    "attention.k_proj.weight": "self_attn.k_proj.weight",
    "attention.v_proj.weight": "self_attn.v_proj.weight",
    "attention.o_proj.weight": "self_attn.o_proj.weight",
    "attention.q_norm.scale": "self_attn.q_norm.weight",
    "attention.k_norm.scale": "self_attn.k_norm.weight",
    "mlp.gate_proj.weight": "mlp.gate_proj.weight",
    "mlp.up_proj.weight": "mlp.up_proj.weight",
    "mlp.down_proj.weight": "mlp.down_proj.weight",
}
_EXAONE4_BLOCK = _LLAMA_LIKE | {
    "post_attention_norm.scale": "post_attention_layernorm.weight",
    "post_mlp_norm.scale": "post_feedforward_layernorm.weight",
}
_EXAONE_MOE_BLOCK = _LLAMA_LIKE | {
    "input_norm.scale": "input_layernorm.weight",
    "mlp_norm.scale": "post_attention_layernorm.weight",  # the name means the opposite of EXAONE 4's
    "moe.router.weight": "mlp.gate.weight",
    "moe.router.bias": "mlp.e_score_correction_bias",
    "moe.experts.gate_proj": "mlp.experts.{expert}.gate_proj.weight",
    "moe.experts.up_proj": "mlp.experts.{expert}.up_proj.weight",
    "moe.experts.down_proj": "mlp.experts.{expert}.down_proj.weight",
    "moe.shared.gate_proj.weight": "mlp.shared_experts.gate_proj.weight",
    "moe.shared.up_proj.weight": "mlp.shared_experts.up_proj.weight",
    "moe.shared.down_proj.weight": "mlp.shared_experts.down_proj.weight",
}
_EXAONE_BLOCK = {
    "input_norm.scale": "ln_1.weight",
    "mlp_norm.scale": "ln_2.weight",
    "attention.q_proj.weight": "attn.attention.q_proj.weight",
    "attention.k_proj.weight": "attn.attention.k_proj.weight",
    "attention.v_proj.weight": "attn.attention.v_proj.weight",
    "attention.o_proj.weight": "attn.attention.out_proj.weight",
    "mlp.gate_proj.weight": "mlp.c_fc_0.weight",
    "mlp.up_proj.weight": "mlp.c_fc_1.weight",
    "mlp.down_proj.weight": "mlp.c_proj.weight",
}
_MTP = {
    "mtp.embedding_norm.scale": "mtp.pre_fc_norm_embedding.weight",
    "mtp.hidden_norm.scale": "mtp.pre_fc_norm_hidden.weight",
    "mtp.fc.weight": "mtp.fc.weight",
    "mtp.norm.scale": "mtp.norm.weight",
}
MTP_PREFIX = "mtp."


@dataclass(frozen=True)
class NameTable:
    """Hugging Face names of one model_type: the four tensors around the layers, the layer's prefix, and one layer's names."""

    embedding: str
    layer: str
    norm: str
    block: dict[str, str]
    lm_head: str = "lm_head.weight"


TABLES = {
    "exaone": NameTable("transformer.wte.weight", "transformer.h.{}.", "transformer.ln_f.weight", _EXAONE_BLOCK),
    "exaone4": NameTable("model.embed_tokens.weight", "model.layers.{}.", "model.norm.weight", _EXAONE4_BLOCK),
    "exaone_moe": NameTable("model.embed_tokens.weight", "model.layers.{}.", "model.norm.weight", _EXAONE_MOE_BLOCK),
    "exaone4_5": NameTable(
        "model.language_model.embed_tokens.weight",
        "model.language_model.layers.{}.",
        "model.language_model.norm.weight",
        _EXAONE4_BLOCK,
    ),
}


@dataclass(frozen=True, slots=True)
class TensorMap:
    """One Hugging Face tensor and its place: `parameter[path][index] == tensor`.

    Attributes:
        name: Hugging Face tensor name.
        path: of the parameter, as in a flat nnx state.
        index: into the parameter's stacked leading axes: () for none, (r,) in a segment, (r, e) for expert e.
        dtypes: safetensors dtypes the tensor may have.
        keep_float32: a model that is loaded in another dtype keeps this one in float32 (router bias).
    """

    name: str
    path: ParameterPath
    index: tuple[int, ...]
    shape: Shape
    dtypes: tuple[str, ...] = FLOAT_DTYPES
    keep_float32: bool = False

    @property
    def carried(self) -> bool:
        return self.path[0] == CARRIED

    @property
    def size(self) -> int:
        return math.prod(self.shape)


@dataclass(frozen=True)
class Parameter:
    """One parameter and the tensors stacked in it; `tensors` are in row-major order of their index."""

    path: ParameterPath
    stacked: Shape
    tensors: tuple[TensorMap, ...]

    @property
    def shape(self) -> Shape:
        return (*self.stacked, *self.tensors[0].shape)

    @property
    def keep_float32(self) -> bool:
        return self.tensors[0].keep_float32


@dataclass(frozen=True)
class Totals:
    """What a checkpoint of a configuration holds. bytes: with the router bias in float32, the rest in `config.dtype`."""

    tensors: int
    parameters: int
    bytes: int


def path_name(path: ParameterPath) -> str:
    """("segments", 0, 1, "mlp") -> "segments.0.1.mlp"."""
    return ".".join(map(str, path))


def _attention_shapes(config: ModelConfig, spec: LayerSpec) -> dict[str, Shape]:
    hidden, q, kv = config.hidden_size, config.num_heads * config.head_dim, config.num_kv_heads * config.head_dim
    shapes: dict[str, Shape] = {
        "attention.q_proj.weight": (q, hidden),
        "attention.k_proj.weight": (kv, hidden),
        "attention.v_proj.weight": (kv, hidden),
        "attention.o_proj.weight": (hidden, q),
    }
    if spec.qk_norm:
        shapes |= {"attention.q_norm.scale": (config.head_dim,), "attention.k_norm.scale": (config.head_dim,)}
    return shapes


def _mlp_shapes(prefix: str, hidden: int, width: int, suffix: str = ".weight") -> dict[str, Shape]:
    return {
        f"{prefix}.gate_proj{suffix}": (width, hidden),
        f"{prefix}.up_proj{suffix}": (width, hidden),
        f"{prefix}.down_proj{suffix}": (hidden, width),
    }


def _moe_shapes(config: ModelConfig) -> dict[str, Shape]:
    hidden, moe = config.hidden_size, config.moe
    if moe is None:
        raise ConfigError("a layer is a mixture of experts but the model has no `moe` section")
    shapes: dict[str, Shape] = {"moe.router.weight": (moe.num_experts, hidden), "moe.router.bias": (moe.num_experts,)}
    shapes |= _mlp_shapes("moe.experts", hidden, moe.intermediate_size, suffix="")
    if moe.num_shared_experts:
        shapes |= _mlp_shapes("moe.shared", hidden, moe.num_shared_experts * moe.intermediate_size)
    return shapes


def block_shapes(config: ModelConfig, spec: LayerSpec) -> dict[str, Shape]:
    """Parameters of one decoder layer with the shapes of one Hugging Face tensor of each (`[out, in]`)."""
    norms = ("input_norm", "mlp_norm") if spec.norm == "pre" else ("post_attention_norm", "post_mlp_norm")
    shapes: dict[str, Shape] = {f"{norm}.scale": (config.hidden_size,) for norm in norms}
    shapes |= _attention_shapes(config, spec)
    if spec.moe:
        return shapes | _moe_shapes(config)
    return shapes | _mlp_shapes("mlp", config.hidden_size, config.intermediate_size)


def _block_maps(
    config: ModelConfig, spec: LayerSpec, prefix: str, path: ParameterPath, repeat: int
) -> Iterable[TensorMap]:
    names = TABLES[config.model_type].block
    for parameter, shape in block_shapes(config, spec).items():
        if parameter not in names:
            raise ConfigError(
                f"model_type {config.model_type!r} has no tensor for {parameter}, which layer {prefix!r} needs"
            )
        full_path = (*path, *parameter.split("."))
        name = prefix + names[parameter]
        if "{expert}" in name and config.moe is not None:
            for expert in range(config.moe.num_experts):
                yield TensorMap(name.format(expert=expert), full_path, (repeat, expert), shape)
        else:
            keep = parameter == "moe.router.bias"
            yield TensorMap(name, full_path, (repeat,), shape, keep_float32=keep)


def _layer_maps(config: ModelConfig) -> Iterable[TensorMap]:
    layer = 0
    for s, segment in enumerate(layer_plan(config.layers)):
        for repeat in range(segment.repeats):
            for p, spec in enumerate(segment.pattern):
                prefix = TABLES[config.model_type].layer.format(layer)
                yield from _block_maps(config, spec, prefix, ("segments", s, p), repeat)
                layer += 1


def _mtp_maps(config: ModelConfig, spec: LayerSpec) -> Iterable[TensorMap]:
    hidden = config.hidden_size
    for parameter, name in _MTP.items():
        shape = (hidden, 2 * hidden) if parameter == "mtp.fc.weight" else (hidden,)
        yield TensorMap(name, tuple(parameter.split(".")), (), shape)
    yield from _block_maps(config, spec, f"{MTP_PREFIX}layers.0.", ("mtp", "block"), 0)


def _vision_block_shapes(vision: VisionConfig) -> dict[str, Shape]:
    hidden, width = vision.hidden_size, vision.intermediate_size
    qkv = (vision.num_heads + 2 * vision.num_kv_heads) * (hidden // vision.num_heads)
    linears = {"attn.qkv": (qkv, hidden), "attn.proj": (hidden, hidden)} | {
        "mlp.gate_proj": (width, hidden),
        "mlp.up_proj": (width, hidden),
        "mlp.down_proj": (hidden, width),
    }
    shapes: dict[str, Shape] = {"norm1.weight": (hidden,), "norm2.weight": (hidden,)}
    for name, shape in linears.items():
        shapes |= {f"{name}.weight": shape, f"{name}.bias": shape[:1]}
    return shapes


def vision_shapes(vision: VisionConfig) -> dict[str, Shape]:
    """Hugging Face tensors of EXAONE 4.5's vision tower."""
    hidden, patch, merged = vision.hidden_size, vision.patch_size, vision.spatial_merge_size**2 * vision.hidden_size
    shapes: dict[str, Shape] = {
        "patch_embed.proj.weight": (hidden, vision.in_channels, vision.temporal_patch_size, patch, patch),
        "merger.ln_q.weight": (hidden,),
        "merger.mlp.0.weight": (merged, merged),
        "merger.mlp.0.bias": (merged,),
        "merger.mlp.2.weight": (vision.out_hidden_size, merged),
        "merger.mlp.2.bias": (vision.out_hidden_size,),
    }
    for block in range(vision.depth):
        shapes |= {f"blocks.{block}.{name}": shape for name, shape in _vision_block_shapes(vision).items()}
    return {f"model.visual.{name}": shape for name, shape in shapes.items()}


@lru_cache(maxsize=8)
def tensor_map(config: ModelConfig) -> tuple[TensorMap, ...]:
    """Every tensor that a Hugging Face checkpoint of this configuration has, each once, embedding first.

    Raises:
        ConfigError: a layer needs a tensor that the model_type has no name for (an MoE layer in `exaone4`, say).
    """
    table, vocab = TABLES[config.model_type], (config.vocab_size, config.hidden_size)
    maps = [TensorMap(table.embedding, ("embed", "embedding"), (), vocab), *_layer_maps(config)]
    maps.append(TensorMap(table.norm, ("norm", "scale"), (), (config.hidden_size,)))
    if not config.tie_word_embeddings:
        maps.append(TensorMap(table.lm_head, ("lm_head", "weight"), (), vocab))
    if config.mtp_layer is not None:
        maps.extend(_mtp_maps(config, config.mtp_layer))
    if config.vision is not None:
        visual = vision_shapes(config.vision)
        maps.extend(TensorMap(name, (CARRIED, name), (), shape) for name, shape in visual.items())
    return tuple(maps)


def parameters(config: ModelConfig) -> dict[ParameterPath, Parameter]:
    """The parameters of the model, without carried tensors, by path: what `nnx.to_flat_state(nnx.state(model))` has."""
    groups: dict[ParameterPath, list[TensorMap]] = {}
    for tensor in tensor_map(config):
        if not tensor.carried:
            groups.setdefault(tensor.path, []).append(tensor)
    result = {}
    for path, tensors in groups.items():
        tensors.sort(key=lambda tensor: tensor.index)
        stacked = tuple(size + 1 for size in tensors[-1].index)
        result[path] = Parameter(path, stacked, tuple(tensors))
    return result


def totals(config: ModelConfig) -> Totals:
    """Published counts of a configuration: tensors, parameters, bytes of tensor data (`total_size` of an index)."""
    maps, width = tensor_map(config), 4 if config.dtype == "float32" else 2
    sizes = [tensor.size for tensor in maps]
    data = sum(size * (4 if tensor.keep_float32 else width) for size, tensor in zip(sizes, maps, strict=True))
    return Totals(len(maps), sum(sizes), data)
