"""Checkpoints that transformers wrote, and checkpoints that transformers reads."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from exaone_jax.checkpoints import convert, load
from exaone_jax.checkpoints.directory import INDEX_FILE, open_hf
from exaone_jax.checkpoints.verify import verify
from exaone_jax.config.hf import to_hf
from exaone_jax.config.model import ModelConfig
from tests.checkpoints.synthetic import exaone4, exaone4_5, exaone_moe, tree_bytes, write_checkpoint

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")

CONFIGS = {
    "exaone4": exaone4(),
    "exaone4-tied": exaone4(tied=True),
    "exaone_moe": exaone_moe(mtp=False),
    "exaone_moe with MTP": exaone_moe(),
    "exaone4_5": exaone4_5(),
}


def make_model(config: ModelConfig) -> Any:
    raw = to_hf(config, {})
    raw.pop("architectures", None)
    hf_config = transformers.AutoConfig.for_model(**raw)
    torch.manual_seed(0)
    vision = config.vision is not None
    auto = transformers.AutoModelForImageTextToText if vision else transformers.AutoModelForCausalLM
    return auto.from_config(hf_config, dtype=torch.bfloat16)


@pytest.mark.parametrize("name", CONFIGS)
@pytest.mark.parametrize("shard", ["50KB", "5GB"])
def test_what_transformers_saved_comes_back_byte_for_byte(name: str, shard: str, tmp_path: Path):
    config = CONFIGS[name]
    model = make_model(config)
    model.save_pretrained(tmp_path / "hf", max_shard_size=shard)
    assert (tmp_path / "hf" / INDEX_FILE).exists() == (shard == "50KB")
    report = convert.from_hf(tmp_path / "hf", tmp_path / "native")
    convert.to_hf(tmp_path / "native", tmp_path / "back")
    assert tree_bytes(tmp_path / "back") == tree_bytes(tmp_path / "hf")
    # transformers has no MTP module: its checkpoint lacks the tensors that the configuration promises.
    assert report.mtp == ("absent" if config.mtp_layer else "none")
    assert load.checkpoint_config(tmp_path / "hf").mtp_layer is None


@pytest.mark.parametrize("name", ["exaone4", "exaone4-tied", "exaone_moe with MTP"])
def test_what_we_wrote_loads_in_transformers(name: str, tmp_path: Path):
    """No key missing or unexpected, and the same values: transformers' names in memory against the file's."""
    config = CONFIGS[name]
    path = write_checkpoint(tmp_path / "hf", config, finite=True)
    model, info = transformers.AutoModelForCausalLM.from_pretrained(
        path, dtype=torch.bfloat16, output_loading_info=True, local_files_only=True
    )
    assert not info["missing_keys"]
    assert not info["unexpected_keys"]
    state = model.state_dict()
    with open_hf(path) as directory:
        for key, value in state.items():
            stored = key.replace("mlp.gate.e_score_correction_bias", "mlp.e_score_correction_bias")
            if stored in directory.tensors:
                bits = value.view(torch.int16 if value.dtype == torch.bfloat16 else torch.int32).numpy()
                np.testing.assert_array_equal(bits.view(directory.read_rows(stored).dtype), directory.read_rows(stored))
    assert sum(key.endswith("q_proj.weight") for key in state) == len(config.layers)


def test_saved_from_memory_and_read_by_transformers(tmp_path: Path):
    """HF -> parameters -> HF through memory: transformers computes the same logits from both, to the bit."""
    config = exaone_moe(mtp=False)
    write_checkpoint(tmp_path / "hf", config, finite=True)
    convert.save_hf(load.read_params(tmp_path / "hf"), config, tmp_path / "out")
    assert verify(tmp_path / "hf", tmp_path / "out").ok
    tokens, logits = torch.arange(20)[None], []
    for name in ("hf", "out"):
        model = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / name, dtype=torch.float32)
        with torch.no_grad():
            logits.append(model(tokens).logits)
    assert torch.equal(*logits)
