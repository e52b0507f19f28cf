"""`exaone-jax inspect`: what a model is, from its config.json alone, or with the headers of its weights beside it."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from exaone_jax.checkpoints import names
from exaone_jax.checkpoints.directory import holds_weights, open_hf
from exaone_jax.checkpoints.matching import checked_quantization, collapse, fit, printable, without_mtp
from exaone_jax.checkpoints.native import NativeDirectory, is_native
from exaone_jax.checkpoints.safetensors import TensorInfo
from exaone_jax.config import LayerSpec, ModelConfig, layer_plan, published, read_config_and_extra

if TYPE_CHECKING:
    from rich.console import RenderableType

_OWNER = "LGAI-EXAONE/"  # of the published repositories
_BYTES = {"float32": 4, "bfloat16": 2, "float16": 2}


@dataclass(frozen=True)
class Part:
    """Tensors, parameters and bytes of one part of a checkpoint."""

    tensors: int
    parameters: int
    bytes: int


@dataclass(frozen=True)
class KVMemory:
    """Bytes of keys and values that one sequence of `context` tokens keeps, in the checkpoint's dtype.

    Attributes:
        context: tokens.
        global_bytes: of the layers that attend to everything before.
        window_bytes: of the window layers, which keep min(window, context) tokens each.
        all_global_bytes: what the same layers would keep without windows.
    """

    context: int
    global_bytes: int
    window_bytes: int
    all_global_bytes: int

    @property
    def total_bytes(self) -> int:
        return self.global_bytes + self.window_bytes


@dataclass(frozen=True)
class Checkpoint:
    """What a checkpoint holds, by its headers, against what the configuration says.

    Attributes:
        native: it has the native form; else it is a Hugging Face directory.
        files: number of safetensors files, or of arrays in the native form.
        tensors, parameters, bytes: found in them.
        dtypes: number of tensors of each safetensors dtype.
        missing, unexpected, mismatched: names; a mismatched tensor is there with a wrong shape or dtype.
    """

    native: bool
    files: int
    tensors: int
    parameters: int
    bytes: int
    dtypes: dict[str, int]
    missing: tuple[str, ...]
    unexpected: tuple[str, ...]
    mismatched: tuple[str, ...]

    @property
    def fits(self) -> bool:
        """Can it be loaded? Tensors that the native form has beyond the configuration were carried there on request."""
        return not (self.missing or self.mismatched or (self.unexpected and not self.native))


@dataclass(frozen=True)
class Inspection:
    """What `inspect_model` found. Counts follow the configuration; `checkpoint` is what lies on disk.

    Attributes:
        name: of the published model, or the path.
        config: the model; without the MTP layer where a checkpoint has no tensor of it (`mtp_absent`), as it is loaded.
        main, mtp, vision: the parts that `tensors`, `parameters` and `bytes` add up; None where the model has none.
        active_parameters: parameters that compute one token: all of `main` but the input embedding (a lookup; counted
            where it is tied to the output) and the experts that the router does not choose.
        quantization: the `quantization_config` of config.json. `bytes` are those of the model before quantisation.
        checkpoint: None where there are no weights.
    """

    name: str
    config: ModelConfig
    main: Part
    mtp: Part | None
    vision: Part | None
    active_parameters: int
    quantization: dict[str, Any] | None
    checkpoint: Checkpoint | None
    mtp_absent: bool = False

    @property
    def ok(self) -> bool:
        """The checkpoint, if there is one, fits the configuration. Quantised tensors are not meant to."""
        return self.checkpoint is None or self.quantization is not None or self.checkpoint.fits

    def _sum(self, field: str) -> int:
        return sum(getattr(part, field) for part in (self.main, self.mtp, self.vision) if part is not None)

    @property
    def parameters(self) -> int:
        return self._sum("parameters")

    @property
    def tensors(self) -> int:
        return self._sum("tensors")

    @property
    def bytes(self) -> int:
        """Bytes of tensor data, `total_size` of an index: in `config.dtype`, but router biases in float32."""
        return self._sum("bytes")

    @property
    def kv_bytes_per_token_per_layer(self) -> int:
        return 2 * self.config.num_kv_heads * self.config.head_dim * _BYTES[self.config.dtype]

    @property
    def kv_bytes_per_token(self) -> int:
        """Bytes that one token of context adds while no window is full: keys and values of every layer.

        Without the MTP layer, whose cache exists only where a server drafts with it.
        """
        return self.config.num_layers * self.kv_bytes_per_token_per_layer

    @property
    def kv_bytes_per_token_global(self) -> int:
        """Bytes that one token of context adds once all windows are full: keys and values of the global layers only."""
        return self.kv_bytes_per_token_per_layer * sum(layer.window is None for layer in self.config.layers)

    def kv_memory(self, context: int) -> KVMemory:
        """Bytes that one sequence of `context` tokens keeps. A ring adds C - 1 slots to take chunks of C."""
        layer_bytes = self.kv_bytes_per_token_per_layer
        windows = [layer.window for layer in self.config.layers if layer.window is not None]
        return KVMemory(
            context=context,
            global_bytes=context * self.kv_bytes_per_token_global,
            window_bytes=layer_bytes * sum(min(window, context) for window in windows),
            all_global_bytes=context * self.kv_bytes_per_token,
        )

    @property
    def plan(self) -> str:
        """The layer plan: `1 x [L128d L128 L128 G] + 11 x [L128 L128 L128 G]` is K-EXAONE 236B."""
        segments = layer_plan(self.config.layers)
        mixed = self.config.moe is not None
        return " + ".join(
            f"{segment.repeats} x [{' '.join(layer_symbol(layer, mixed) for layer in segment.pattern)}]"
            for segment in segments
        )

    def to_dict(self) -> dict[str, Any]:
        """As JSON. `layers` is their number."""
        config = self.config
        memory = self.kv_memory(config.max_position_embeddings)
        return {
            "name": self.name,
            "model_type": config.model_type,
            "dtype": config.dtype,
            "parameters": self.parameters,
            "active_parameters": self.active_parameters,
            "tensors": self.tensors,
            "bytes": self.bytes,
            "parts": {
                name: asdict(part)
                for name, part in (("main", self.main), ("mtp", self.mtp), ("vision", self.vision))
                if part is not None
            },
            "mtp_absent": self.mtp_absent,
            "layers": config.num_layers,
            "layer_plan": self.plan,
            "vocab_size": config.vocab_size,
            "hidden_size": config.hidden_size,
            "max_position_embeddings": config.max_position_embeddings,
            "kv_bytes_per_token": self.kv_bytes_per_token,
            "kv_bytes_per_token_global": self.kv_bytes_per_token_global,
            "kv_bytes_at_max_context": {**asdict(memory), "total_bytes": memory.total_bytes},
            "quantization": self.quantization,
            "checkpoint": None if self.checkpoint is None else asdict(self.checkpoint),
        }


def layer_symbol(layer: LayerSpec, mixed: bool) -> str:
    """`L128` is a layer with a window of 128, `G` one that attends to everything and has no rotary embeddings.

    Suffixes: `r` a G with rotary embeddings, `n` an L without, `d` a dense layer of a mixture of experts (`mixed`),
    `c7` SwiGLU clamped at 7.
    """
    symbol = "G" if layer.window is None else f"L{layer.window}"
    if layer.rope == (layer.window is None):
        symbol += "r" if layer.rope else "n"
    if mixed and not layer.moe:
        symbol += "d"
    return symbol if layer.swiglu_limit is None else f"{symbol}c{layer.swiglu_limit:g}"


def inspect_model(name_or_path: str | Path) -> Inspection:
    """Inspect a published model by name, a config.json, or a directory that holds one and perhaps weights, in either form.

    A path that exists is a path. Reads no tensor data and imports no jax. Raises ConfigError for an unknown name or a
    wrong config.json, CheckpointError for a checkpoint that cannot be opened. One that can be opened but does not fit
    its config.json is no error here: see `Inspection.ok`.
    """
    path = Path(name_or_path)
    if path.exists():
        name, source = str(path), path
    else:
        name = str(name_or_path).removeprefix(_OWNER)
        source = published(name)
    promised, extra = read_config_and_extra(source)
    config, checkpoint = _checkpoint(promised, path) if path.is_dir() else (promised, None)
    parts = _parts(config)
    return Inspection(
        name=name,
        config=config,
        main=parts["main"],
        mtp=parts.get("mtp"),
        vision=parts.get("vision"),
        active_parameters=_active_parameters(config),
        quantization=checked_quantization(extra, name),
        checkpoint=checkpoint,
        mtp_absent=config.mtp_layer != promised.mtp_layer,
    )


def _part_of(tensor: names.TensorMap) -> str:
    if tensor.carried:
        return "vision"
    return "mtp" if tensor.path[0] == "mtp" else "main"


def _parts(config: ModelConfig) -> dict[str, Part]:
    tensors, parameters, size = Counter(), Counter(), Counter()
    for tensor in names.tensor_map(config):
        part = _part_of(tensor)
        tensors[part] += 1
        parameters[part] += tensor.size
        size[part] += tensor.size * (4 if tensor.keep_float32 else _BYTES[config.dtype])
    return {part: Part(tensors[part], parameters[part], size[part]) for part in tensors}


def _active_parameters(config: ModelConfig) -> int:
    total, routed = 0, 0
    for tensor in names.tensor_map(config):
        if _part_of(tensor) != "main" or (tensor.path[0] == "embed" and not config.tie_word_embeddings):
            continue
        if "experts" in tensor.path:
            routed += tensor.size
        else:
            total += tensor.size
    if config.moe is not None:
        total += routed * config.moe.num_experts_per_tok // config.moe.num_experts
    return total


def _checkpoint(config: ModelConfig, directory: Path) -> tuple[ModelConfig, Checkpoint | None]:
    """What lies in a directory, opened as loading opens it, and the configuration of what is there."""
    if is_native(directory):
        with NativeDirectory(directory) as native:
            return native.config, _compared(native.config, native.tensors, True, native.num_arrays)
    if not holds_weights(directory):
        return config, None
    with open_hf(directory) as opened:
        config = without_mtp(config, opened.tensors)
        return config, _compared(config, opened.tensors, False, len(opened.files))


def _compared(config: ModelConfig, found: Mapping[str, TensorInfo], native: bool, files: int) -> Checkpoint:
    differs = fit(config, found)
    return Checkpoint(
        native=native,
        files=files,
        tensors=len(found),
        parameters=sum(math.prod(tensor.shape) for tensor in found.values()),
        bytes=sum(tensor.nbytes for tensor in found.values()),
        dtypes=dict(Counter(tensor.dtype for tensor in found.values())),
        missing=differs.missing,
        unexpected=differs.unexpected,
        mismatched=tuple(differs.shapes | differs.dtypes),
    )


def render(inspection: Inspection) -> RenderableType:
    """The inspection for people: a rich renderable."""
    from rich.console import Group
    from rich.table import Table
    from rich.text import Text

    table = Table.grid(padding=(0, 2))
    table.add_column(style="bold")
    table.add_column(overflow="fold")
    for label, value in _rows(inspection):
        table.add_row(label, Text(value))
    return Group(Text(inspection.name, style="bold cyan"), table)


def _rows(inspection: Inspection) -> list[tuple[str, str]]:
    config, memory = inspection.config, inspection.kv_memory(inspection.config.max_position_embeddings)
    rows = [
        ("model type", f"{config.model_type}, {config.dtype}"),
        ("layers", f"{config.num_layers} = {inspection.plan}"),
        ("", _legend(inspection.plan)),
        ("width", _width(config)),
        ("parameters", f"{inspection.parameters:,} ({inspection.active_parameters:,} compute each token)"),
        ("tensors", f"{inspection.tensors:,}"),
        ("bytes", f"{inspection.bytes:,} ({_size(inspection.bytes)})"),
    ]
    for label, part in (("  of them MTP", inspection.mtp), ("  of them vision", inspection.vision)):
        if part is not None:
            rows.append((label, f"{part.parameters:,} parameters, {part.tensors:,} tensors, {_size(part.bytes)}"))
    if inspection.mtp_absent:
        rows.append(("MTP layer", "none: config.json has one, the checkpoint has no weights of it"))
    if config.mtp_layer is not None:
        times = "" if config.mtp_num_steps == 1 else f", applied {config.mtp_num_steps} times"
        rows.append(("MTP layer", layer_symbol(config.mtp_layer, config.moe is not None) + times))
    rows += [
        ("KV a token", _kv_per_token(inspection)),
        (
            f"KV at {memory.context:,}",
            f"{_size(memory.total_bytes)} = global {_size(memory.global_bytes)} + windows {_size(memory.window_bytes)}"
            f" (all global: {_size(memory.all_global_bytes)})",
        ),
    ]
    if inspection.quantization is not None:
        method = inspection.quantization.get("quant_method", "unknown method")
        rows.append(("quantised", f"{method}; the bytes above are before quantisation, and it cannot be loaded"))
    return rows + ([] if inspection.checkpoint is None else _checkpoint_rows(inspection.checkpoint))


def _kv_per_token(inspection: Inspection) -> str:
    text = f"{inspection.kv_bytes_per_token:,} bytes"
    if inspection.kv_bytes_per_token_global == inspection.kv_bytes_per_token:
        return text
    return f"{text}, {inspection.kv_bytes_per_token_global:,} once the windows are full"


def _width(config: ModelConfig) -> str:
    width = (
        f"hidden {config.hidden_size:,}, dense MLP {config.intermediate_size:,}, "
        f"{config.num_heads} heads over {config.num_kv_heads} of {config.head_dim}, vocabulary {config.vocab_size:,}"
    )
    if config.moe is None:
        return width
    moe = config.moe
    experts = f"{moe.num_experts_per_tok} of {moe.num_experts} experts + {moe.num_shared_experts} shared"
    return f"{width}, {experts} of {moe.intermediate_size:,}"


def _legend(plan: str) -> str:
    """What the symbols of a plan mean, no more of them than it has."""
    words = plan.replace("[", " ").replace("]", " ").split()
    layers = [word for word in words if word[0] in "LG"]
    unrotated = any(word[0] == "G" and "r" not in word for word in layers)
    meanings = {
        "Lw: window of w tokens": any(word[0] == "L" for word in layers),
        "G: all tokens before" + ", without rotary embeddings" * unrotated: any(word[0] == "G" for word in layers),
        "r: with rotary embeddings": any("r" in word for word in layers),
        "n: without rotary embeddings": any("n" in word for word in layers),
        "d: dense MLP": any("d" in word for word in layers),
        "cx: SwiGLU clamped at x": any("c" in word for word in layers),
    }
    return "; ".join(meaning for meaning, used in meanings.items() if used)


def _checkpoint_rows(checkpoint: Checkpoint) -> list[tuple[str, str]]:
    dtypes = ", ".join(f"{count:,} {dtype}" for dtype, count in sorted(checkpoint.dtypes.items()))
    rows = [
        (
            "on disk",
            f"{checkpoint.files:,} {'arrays' if checkpoint.native else 'files'}, {checkpoint.tensors:,} tensors ({dtypes}), "
            f"{checkpoint.parameters:,} parameters, {checkpoint.bytes:,} bytes ({_size(checkpoint.bytes)})",
        )
    ]
    for label in ("missing", "unexpected", "mismatched"):
        names_found = getattr(checkpoint, label)
        lines = collapse(map(printable, names_found))
        if lines:
            more = f", and {len(lines) - 3:,} rows more" if len(lines) > 3 else ""
            rows.append((f"  {label}", f"{len(names_found):,}: {', '.join(lines[:3])}{more}"))
    return rows


def _size(count: float) -> str:
    """1536 -> '1.50 KiB'."""
    for unit in ("bytes", "KiB", "MiB", "GiB"):
        if count < 1024:
            return f"{count:.2f} {unit}" if unit != "bytes" else f"{count:,.0f} bytes"
        count /= 1024
    return f"{count:,.2f} TiB"
