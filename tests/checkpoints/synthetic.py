"""Small synthetic checkpoints of every model_type, with random bits for weights (NaN payloads and infinities included)."""

import hashlib
import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import numpy as np

from exaone_jax.checkpoints.hf_writer import HFLayout, HFWriter, plan_layout
from exaone_jax.checkpoints.names import SAFETENSORS_DTYPE, tensor_map
from exaone_jax.checkpoints.safetensors import Bits, TensorInfo
from exaone_jax.config.hf import to_hf
from exaone_jax.config.model import LayerSpec, Llama3RopeScaling, ModelConfig, MoEConfig, VisionConfig

SMALL: dict[str, Any] = {
    "vocab_size": 96,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_heads": 4,
    "num_kv_heads": 2,
    "head_dim": 16,
    "max_position_embeddings": 128,
    "bos_token_id": 1,
    "eos_token_ids": (53,),
    "pad_token_id": 0,
}
LLAMA3 = Llama3RopeScaling(factor=8, low_freq_factor=1, high_freq_factor=4, original_max_position_embeddings=64)
VISION = VisionConfig(
    depth=2,
    hidden_size=16,
    intermediate_size=24,
    num_heads=4,
    num_kv_heads=2,
    in_channels=3,
    patch_size=4,
    temporal_patch_size=2,
    spatial_merge_size=2,
    out_hidden_size=32,
)


def hybrid(count: int, window: int, norm: str, first_moe: int | None = None) -> tuple[LayerSpec, ...]:
    """L L L G repeated; layers from `first_moe` on are mixtures of experts."""
    return tuple(
        LayerSpec(
            window=None if layer % 4 == 3 else window,
            rope=layer % 4 != 3,
            norm="pre" if norm == "pre" else "post",
            moe=first_moe is not None and layer >= first_moe,
        )
        for layer in range(count)
    )


def exaone(tied: bool = True) -> ModelConfig:
    layers = (LayerSpec(qk_norm=False),) * 3
    return ModelConfig(model_type="exaone", layers=layers, tie_word_embeddings=tied, rope_scaling=LLAMA3, **SMALL)


def exaone4(tied: bool = False) -> ModelConfig:
    return ModelConfig(
        model_type="exaone4", layers=hybrid(8, 16, "post"), tie_word_embeddings=tied, rope_scaling=LLAMA3, **SMALL
    )


def exaone_moe(mtp: bool = True, layers: int = 8, **changes: Any) -> ModelConfig:
    moe = MoEConfig(
        num_experts=4, num_experts_per_tok=2, num_shared_experts=1, intermediate_size=24, routed_scaling_factor=2.5
    )
    return ModelConfig(
        model_type="exaone_moe",
        layers=hybrid(layers, 16, "pre", first_moe=1),
        moe=moe,
        mtp_layer=LayerSpec() if mtp else None,
        **(SMALL | changes),
    )


def exaone4_5(vision: VisionConfig | None = VISION) -> ModelConfig:
    return ModelConfig(
        model_type="exaone4_5",
        layers=hybrid(4, 16, "post"),
        mtp_layer=LayerSpec(window=16, norm="post"),
        rope_scaling=LLAMA3,
        vision=vision,
        **SMALL,
    )


MODELS = {
    "exaone-tied": exaone(),
    "exaone": exaone(tied=False),
    "exaone4": exaone4(),
    "exaone4-tied": exaone4(tied=True),
    "exaone_moe": exaone_moe(),
    "exaone_moe-no-mtp": exaone_moe(mtp=False),
    "exaone4_5": exaone4_5(),
}


def random_bits(name: str, info: TensorInfo, finite: bool = False) -> Bits:
    """Bits that are a function of the name. Not finite: every bit pattern may appear, NaN payloads among them."""
    seed = int.from_bytes(hashlib.sha256(name.encode()).digest()[:8], "little")
    rng = np.random.default_rng(seed)
    count = int(np.prod(info.shape))
    if not finite:
        data = rng.integers(0, 256, info.nbytes, np.uint8)
        return data.view(f"<u{info.nbytes // max(count, 1) or 1}").reshape(info.shape)
    values = rng.standard_normal(count, np.float32) * np.float32(0.05)
    if info.dtype == "BF16":
        return (values.view(np.uint32) >> 16).astype(np.uint16).reshape(info.shape)
    return values.view(np.uint32).reshape(info.shape)


def tensor_infos(config: ModelConfig) -> dict[str, TensorInfo]:
    dtype = SAFETENSORS_DTYPE[config.dtype]
    return {t.name: TensorInfo("F32" if t.keep_float32 else dtype, t.shape) for t in tensor_map(config)}


def write_layout(path: Path, layout: HFLayout, finite: bool = False) -> None:
    writer = HFWriter(path, layout)
    for header in layout.files.values():
        for name, info in header.tensors.items():
            writer.write_rows(name, 0, info.shape[0] if info.shape else 1, random_bits(name, info, finite))
    writer.finish()


def small_files(path: Path, config: ModelConfig) -> None:
    """The files beside the weights, some with bytes that a rewrite would lose."""
    raw = to_hf(config, {"transformers_version": "5.1.0", "use_cache": True})
    (path / "config.json").write_text(json.dumps(raw, indent=3) + "\n\n")  # an indent that no library would choose
    (path / "generation_config.json").write_bytes(b'{"eos_token_id":53 , "x": 1.0e0}')
    (path / "tokenizer.json").write_bytes('{\r\n "model": "엑사원"}'.encode())
    (path / "tokenizer_config.json").write_bytes(b"\xef\xbb\xbf{}")
    (path / "chat_template.jinja").write_bytes(b"{{ messages }}")
    (path / "LICENSE").write_bytes(b"licence\n")
    (path / "assets").mkdir()
    (path / "assets" / "logo.png").write_bytes(bytes(range(256)))


def write_checkpoint(
    path: Path,
    config: ModelConfig,
    *,
    shard_bytes: int = 10**9,
    finite: bool = False,
    without: Iterable[str] = (),
) -> Path:
    """A Hugging Face directory of `config` whose tensors are random bits; `without`: prefixes of tensors to leave out."""
    path.mkdir(parents=True)
    infos = {name: info for name, info in tensor_infos(config).items() if not name.startswith(tuple(without))}
    write_layout(path, plan_layout(infos, shard_bytes), finite)
    small_files(path, config)
    return path


def tree_bytes(path: Path) -> dict[str, bytes]:
    """Every file below a directory and its bytes."""
    return {file.relative_to(path).as_posix(): file.read_bytes() for file in sorted(path.rglob("*")) if file.is_file()}
