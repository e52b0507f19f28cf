"""Low-rank adapters beside a frozen model (LoRA, arXiv 2106.09685; QLoRA, arXiv 2305.14314), and their files as PEFT has them.

Not by qwix (0.1.8): it adds parameters to modules where it meets their products in a trace, and here that is inside scans over
layers stacked beforehand, where it fails; and its LoRA has no rule for experts' ragged products.
"""

import json
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any, cast

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from exaone_jax.checkpoints.atomic import new_directory, storage_errors, write_new
from exaone_jax.checkpoints.names import ParameterPath, TensorMap, parameters
from exaone_jax.checkpoints.safetensors import write_file
from exaone_jax.config import ModelConfig
from exaone_jax.config.run import LoraConfig
from exaone_jax.errors import ConfigError
from exaone_jax.model import Transformer
from exaone_jax.model.linear import Adapter, Axes, Frozen, Linear
from exaone_jax.model.moe import Experts
from exaone_jax.model.quantized import Quantized

EXPERTS = "experts"
ADAPTER_CONFIG, ADAPTER_MODEL = "adapter_config.json", "adapter_model.safetensors"
_EXPERT_WEIGHTS = ("gate_proj", "up_proj", "down_proj")


def adapt(model: Transformer, lora: LoraConfig, rngs: nnx.Rngs) -> None:
    """Freeze a model in place and put adapters beside the matrices of its layers, and the head, that `lora.targets` names.

    The multi-token-prediction layer is frozen without adapters: PEFT's model has none. a is uniform in +-1 / sqrt(in) and
    b zero, so that the adapted model starts as the model itself.

    Raises ConfigError where the model has no such matrix.
    """
    missing = set(lora.targets)
    for path, module in list(nnx.iter_modules(model)):
        if not isinstance(module, Linear | Experts):
            continue
        name, layer = str(path[-1]), path[0] == "segments"
        if isinstance(module, Linear):
            weight, wanted = module.weight, (layer or path == ("lm_head",)) and name in lora.targets
            if wanted:
                module.adapter = _adapter(weight, lora, rngs)
            if layer:
                module.weight = cast(Any, _frozen(weight, lora))
        else:
            wanted, name = layer and EXPERTS in lora.targets, EXPERTS
            if wanted:
                adapters = {each: _adapter(getattr(module, each), lora, rngs) for each in _EXPERT_WEIGHTS}
                module.adapters = cast(Any, nnx.Dict(adapters))
            for each in _EXPERT_WEIGHTS:
                setattr(module, each, _frozen(getattr(module, each), lora))
        if wanted:
            missing.discard(name)
    if missing:
        tied = "; its output head is the embedding" if "lm_head" in missing else ""
        raise ConfigError(f"lora.targets: this model has no {', '.join(sorted(missing))}{tied}")
    _freeze_rest(model, lora)


def _adapter(weight: nnx.Variable[jax.Array], lora: LoraConfig, rngs: nnx.Rngs) -> Adapter:
    *stacked, rows, columns = weight.shape
    *lead, out, into = cast(Axes, weight.get_metadata("axes"))
    bound = columns**-0.5
    a = jax.random.uniform(rngs.params(), (*stacked, lora.rank, columns), jnp.float32, -bound, bound)
    b = jnp.zeros((*stacked, rows, lora.rank), jnp.float32)
    return Adapter(
        nnx.Param(a, axes=(*lead, "rank", into)), nnx.Param(b, axes=(*lead, out, "rank")), lora.alpha / lora.rank
    )


def _frozen(weight: nnx.Variable[jax.Array], lora: LoraConfig) -> Frozen | Quantized:
    axes = weight.get_metadata("axes")
    if lora.base in ("int8", "nf4"):
        return Quantized(weight[...], axes, cast(Any, lora.base))
    return Frozen(weight[...].astype(lora.base), axes=axes)


def base_dtype(lora: LoraConfig) -> str:
    """Of what is frozen and not quantised."""
    return "float32" if lora.base == "float32" else "bfloat16"


def _freeze_rest(model: Transformer, lora: LoraConfig) -> None:
    """Norms, embedding, the head's matrix, routers and the multi-token-prediction layer."""
    for _, module in list(nnx.iter_modules(model)):
        if isinstance(module, Adapter):
            continue
        for name, value in list(vars(module).items()):
            if isinstance(value, nnx.Param):
                frozen = Frozen(value[...].astype(base_dtype(lora)), axes=value.get_metadata("axes"))
                setattr(module, name, frozen)


def merge_adapters(model: Transformer, dtype: jax.typing.DTypeLike) -> None:
    """Make a model of an adapted one, in place: every matrix with what its adapter adds, as nnx.Param of `dtype`."""

    def param(value: jax.Array, axes: Axes) -> Any:
        return nnx.Param(value.astype(dtype), axes=axes)

    for _, module in list(nnx.iter_modules(model)):
        if isinstance(module, Linear):
            weight, axes = module.weight[...], module.weight.get_metadata("axes")
            module.weight = param(weight if module.adapter is None else module.adapter.added_to(weight), axes)
            if "adapter" in vars(module):
                del module.adapter
        elif isinstance(module, Experts):
            for name, weight in zip(_EXPERT_WEIGHTS, module.weights, strict=True):
                setattr(module, name, param(weight, getattr(module, name).get_metadata("axes")))
            if "adapters" in vars(module):
                del module.adapters
    for _, module in list(nnx.iter_modules(model)):
        for name, value in list(vars(module).items()):
            if isinstance(value, Frozen):
                setattr(module, name, param(value[...], value.get_metadata("axes")))


@partial(jax.jit, static_argnums=(0, 2))
def merged(graphdef: nnx.GraphDef[Transformer], parts: tuple[nnx.State, ...], dtype: jax.typing.DTypeLike) -> nnx.State:
    """The parameters of a model with its adapters added, as a model without adapters has them."""
    model = nnx.merge(graphdef, *parts)
    merge_adapters(model, dtype)
    return nnx.state(model)


@jax.jit
def _digests(arrays: list[jax.Array]) -> list[jax.Array]:
    def of(x: jax.Array) -> jax.Array:
        bits = jax.lax.bitcast_convert_type(x, {1: jnp.uint8, 2: jnp.uint16, 4: jnp.uint32}[x.dtype.itemsize])
        place, stride = jnp.zeros((), jnp.uint32), 1
        for axis in reversed(range(x.ndim)):
            place = place + jax.lax.broadcasted_iota(jnp.uint32, x.shape, axis) * jnp.uint32(stride % 2**32)
            stride *= x.shape[axis]
        return jnp.sum(bits.astype(jnp.uint32) * (2 * place + 1), dtype=jnp.uint32)

    return [of(x) for x in arrays]


def base_digest(frozen: nnx.State) -> str:
    """Of the bits of the frozen arrays, the same on any mesh: a run goes on only beside the weights that it began with."""
    return "-".join(f"{int(value):08x}" for value in _digests(jax.tree.leaves(frozen)))


def save_adapter(params: nnx.State, config: ModelConfig, lora: LoraConfig, dst: Path, base: str) -> None:
    """Write adapters as a directory that `peft.PeftModel.from_pretrained(model, dst)` loads, `model` being that of transformers.

    Args:
        params: the adapters, as `nnx.state(model, nnx.Param)` has them, on this process whole.
        base: the path or name of the model that they were trained beside.

    Raises StorageError where it cannot be written.
    """
    tensors = {name: ("F32", np.ascontiguousarray(array)) for name, array in _peft_tensors(params, config)}

    def ours(entry: Path, partial: Path) -> bool:
        return (partial / entry.name).is_file()

    with new_directory(dst, overwrite=True, may_go=ours) as partial, storage_errors(str(dst)):
        write_file(partial / ADAPTER_MODEL, tensors)
        text = json.dumps(_peft_config(config, lora, base), indent=2, ensure_ascii=False)
        write_new(partial / ADAPTER_CONFIG, text.encode() + b"\n")


def _peft_tensors(params: nnx.State, config: ModelConfig) -> Iterator[tuple[str, np.ndarray]]:
    maps, values = parameters(config), {path: var.get_value() for path, var in nnx.to_flat_state(params)}
    adapted = sorted({path[:-1] for path in values}, key=str)
    for path in adapted:
        a, b = (np.asarray(values[(*path, side)]) for side in "ab")
        if path[-2] != "adapters":
            for tensor in maps[cast(ParameterPath, (*path[:-1], "weight"))].tensors:
                yield from _pair(tensor.name.removesuffix(".weight"), a[tensor.index], b[tensor.index])
        elif path[-1] == "down_proj":
            for place, prefix in _experts(maps[cast(ParameterPath, (*path[:-2], "down_proj"))].tensors):
                yield from _stacked(prefix, a[place], b[place])
        elif path[-1] == "gate_proj":
            up_a, up_b = (np.asarray(values[(*path[:-1], "up_proj", side)]) for side in "ab")
            for place, prefix in _experts(maps[cast(ParameterPath, (*path[:-2], "gate_proj"))].tensors):
                yield from _stacked(f"{prefix}.base_layer", *_fused(a[place], b[place], up_a[place], up_b[place]))


def _pair(name: str, a: np.ndarray, b: np.ndarray) -> Iterator[tuple[str, np.ndarray]]:
    yield f"base_model.model.{name}.lora_A.weight", a
    yield f"base_model.model.{name}.lora_B.weight", b


def _experts(tensors: tuple[TensorMap, ...]) -> Iterator[tuple[int, str]]:
    """(which layer of a stack, the name of its experts' module) for each layer."""
    for tensor in tensors:
        if tensor.index[1] == 0:
            yield tensor.index[0], tensor.name.rsplit(".", 3)[0]


def _fused(a: np.ndarray, b: np.ndarray, up_a: np.ndarray, up_b: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Of gate and up in one matrix `[E, 2F, D]`: rank 2r, where neither sees the other's."""
    return np.concatenate([a, up_a], axis=1), np.concatenate(
        [np.concatenate([b, np.zeros_like(b)], axis=2), np.concatenate([np.zeros_like(up_b), up_b], axis=2)], axis=1
    )


def _stacked(name: str, a: np.ndarray, b: np.ndarray) -> Iterator[tuple[str, np.ndarray]]:
    """a `[E, r, in]` and b `[E, out, r]` as PEFT has those of a three-dimensional parameter: `[E r, in]` and `[out, r E]`."""
    yield from _pair(name, a.reshape(-1, a.shape[-1]), b.transpose(1, 2, 0).reshape(b.shape[1], -1))


def _peft_config(config: ModelConfig, lora: LoraConfig, base: str) -> dict[str, Any]:
    """PEFT takes gate_proj, up_proj and down_proj of a mixture of experts for the experts' whatever module they are in: those
    of dense layers and shared experts are told as parameters there."""
    names = {
        path[-2]: tensor.name.removesuffix(".weight").rsplit(".", 1)[-1]
        for path, parameter in parameters(config).items()
        for tensor in parameter.tensors[:1]
        if path[-1] == "weight" and path[-2] in lora.targets
    }
    sparse = config.moe is not None
    told = {name for target, name in names.items() if sparse and target in _EXPERT_WEIGHTS}
    targets = [f"{name}.weight" for name in sorted(told)]
    if EXPERTS in lora.targets:
        targets += ["experts.gate_up_proj", "experts.down_proj"]
    patterns = {"experts.gate_up_proj": 2} if EXPERTS in lora.targets else {}
    return {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": base,
        "r": lora.rank,
        "lora_alpha": lora.alpha,
        "target_modules": sorted(set(names.values()) - told),
        "target_parameters": targets or None,
        "rank_pattern": {name: times * lora.rank for name, times in patterns.items()},
        "alpha_pattern": {name: times * lora.alpha for name, times in patterns.items()},
        "lora_dropout": 0.0,
        "bias": "none",
        "fan_in_fan_out": False,
        "use_rslora": False,
        "use_dora": False,
        "inference_mode": True,
    }
