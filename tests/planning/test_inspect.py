"""`inspect` of published models, config files and directories with weights."""

import io
import json
import subprocess
import sys

import numpy as np
import pytest
from rich.console import Console

from exaone_jax import cli
from exaone_jax.checkpoints import convert
from exaone_jax.checkpoints.directory import INDEX_FILE
from exaone_jax.checkpoints.names import tensor_map
from exaone_jax.checkpoints.safetensors import write_file
from exaone_jax.config import LayerSpec, from_hf, published
from exaone_jax.errors import CheckpointError, ConfigError
from exaone_jax.planning.inspect import inspect_model, layer_symbol, render

GIB = 2**30
TINY = {
    "model_type": "exaone_moe",
    "vocab_size": 32,
    "hidden_size": 8,
    "intermediate_size": 12,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "max_position_embeddings": 64,
    "rope_parameters": {"rope_type": "default", "rope_theta": 1e4},
    "sliding_window": 8,
    "layer_types": ["sliding_attention", "full_attention"],
    "first_k_dense_replace": 1,
    "num_experts": 4,
    "num_experts_per_tok": 2,
    "num_shared_experts": 1,
    "moe_intermediate_size": 4,
    "routed_scaling_factor": 2.5,
    "num_nextn_predict_layers": 1,
    "dtype": "float32",
}


def shown(inspection):
    console = Console(file=io.StringIO(), width=160)
    console.print(render(inspection))
    return console.file.getvalue()


def write_checkpoint(directory, skip=(), change=lambda name, array: array, extra=None):
    """config.json, two safetensors files of zeros and their index."""
    (directory / "config.json").write_text(json.dumps(TINY))
    tensors = dict(extra or {})
    for tensor in tensor_map(from_hf(TINY)[0]):
        if tensor.name not in skip:
            tensors[tensor.name] = ("F32", change(tensor.name, np.zeros(tensor.shape, np.float32)))
    names, weight_map = list(tensors), {}
    for number, part in enumerate((names[:7], names[7:])):
        write_file(directory / f"model-{number}.safetensors", {name: tensors[name] for name in part})
        weight_map |= dict.fromkeys(part, f"model-{number}.safetensors")
    (directory / INDEX_FILE).write_text(json.dumps({"weight_map": weight_map}))


def test_k_exaone():
    found = inspect_model("K-EXAONE-236B-A23B").to_dict()
    assert found["model_type"] == "exaone_moe"
    assert found["parameters"] == 237_099_669_632
    assert found["tensors"] == 18_688
    assert found["bytes"] == 474_199_351_296
    assert found["layers"] == 48
    assert found["layer_plan"] == "1 x [L128d L128 L128 G] + 11 x [L128 L128 L128 G]"
    assert found["kv_bytes_per_token"] == 48 * 4096  # 8 kv heads of 128, keys and values, bfloat16: 4 KiB a layer
    assert found["kv_bytes_per_token_global"] == 12 * 4096
    assert found["parts"]["main"]["parameters"] == 236_571_156_352
    assert found["parts"]["mtp"] == {"tensors": 15, "parameters": 528_513_280, "bytes": 1_057_026_560}
    json.dumps(found)


@pytest.mark.parametrize(
    ("name", "windowed", "all_global"),
    [
        ("EXAONE-4.0-32B", 8.75, 32),
        ("EXAONE-4.5-33B", 16.75, 64),
        ("K-EXAONE-236B-A23B", 12.02, 48),
        ("K-EXAONE-2.0-750B-A37B", 20.04, 78),
    ],
)
def test_kv_memory_at_the_longest_context(name, windowed, all_global):
    inspection = inspect_model(name)
    memory = inspection.kv_memory(inspection.config.max_position_embeddings)
    assert round(memory.total_bytes / GIB, 2) == windowed
    assert memory.all_global_bytes == all_global * GIB


def test_kv_memory_of_a_short_context_fills_no_window():
    inspection = inspect_model("EXAONE-4.0-32B")
    memory = inspection.kv_memory(100)
    assert memory.total_bytes == memory.all_global_bytes == 100 * inspection.kv_bytes_per_token


def test_active_parameters():
    assert round(inspect_model("K-EXAONE-236B-A23B").active_parameters / 1e9, 2) == 22.72
    assert round(inspect_model("K-EXAONE-2.0-750B-A37B").active_parameters / 1e9, 1) == 36.4
    tied = inspect_model("EXAONE-4.0-1.2B")  # the embedding is the output matrix too
    assert tied.active_parameters == tied.parameters


def test_vision_is_counted_apart():
    found = inspect_model("EXAONE-4.5-33B").to_dict()
    assert found["parts"]["vision"]["parameters"] == 1_286_482_944
    assert found["parts"]["mtp"]["parameters"] == 536_110_336
    assert found["tensors"] == 1_064


def test_symbols():
    assert layer_symbol(LayerSpec(window=128), False) == "L128"
    assert layer_symbol(LayerSpec(window=128, rope=False), True) == "L128nd"
    assert layer_symbol(LayerSpec(), False) == "Gr"
    assert layer_symbol(LayerSpec(rope=False, moe=True, swiglu_limit=7.5), True) == "Gc7.5"


def test_names_and_paths_agree(tmp_path):
    path = published("EXAONE-4.0-1.2B")
    (tmp_path / "config.json").write_bytes(path.read_bytes())
    by_name = inspect_model("EXAONE-4.0-1.2B").to_dict()
    assert inspect_model("LGAI-EXAONE/EXAONE-4.0-1.2B").to_dict() == by_name
    for place in (path, tmp_path, str(tmp_path)):
        assert inspect_model(place).to_dict() == by_name | {"name": str(place)}


def test_unknown_names_and_bad_files(tmp_path):
    with pytest.raises(ConfigError, match=r"did you mean EXAONE-4.0-32B\?"):
        inspect_model("EXAONE-4-32B")
    with pytest.raises(ConfigError, match=r"config\.json: no such file"):
        inspect_model(tmp_path)
    (tmp_path / "config.json").write_text("{")
    with pytest.raises(ConfigError, match="not valid JSON"):
        inspect_model(tmp_path)


def test_headers_that_fit(tmp_path):
    write_checkpoint(tmp_path)
    inspection = inspect_model(tmp_path)
    found = inspection.checkpoint
    assert found is not None
    assert (found.files, found.tensors, found.parameters) == (2, inspection.tensors, inspection.parameters)
    assert found.bytes == inspection.bytes
    assert found.dtypes == {"F32": inspection.tensors}
    assert found.missing == found.unexpected == found.mismatched == ()
    assert inspection.ok
    json.dumps(inspection.to_dict())
    assert "2 files" in shown(inspection)


def test_headers_that_differ_are_told(tmp_path):
    def change(name, array):
        return array[:, :-1] if name == "model.embed_tokens.weight" else array

    stray = {"stray": ("F32", np.zeros(3, np.float32)), "lm_head.weight": ("F16", np.zeros((32, 8), np.float16))}
    write_checkpoint(tmp_path, skip=["mtp.norm.weight", "lm_head.weight"], change=change, extra=stray)
    inspection = inspect_model(tmp_path)
    found = inspection.checkpoint
    assert found is not None
    assert found.missing == ("mtp.norm.weight",)
    assert found.unexpected == ("stray",)
    assert found.mismatched == ("model.embed_tokens.weight", "lm_head.weight")
    assert not inspection.ok
    assert cli.main(["inspect", str(tmp_path)]) == cli.main(["inspect", str(tmp_path), "--json"]) == 1
    text = shown(inspection)
    assert all(word in text for word in ("missing", "mtp.norm.weight", "stray", "model.embed_tokens.weight"))


def test_bad_weights_are_refused(tmp_path):
    write_checkpoint(tmp_path)
    shard = tmp_path / "model-1.safetensors"
    (tmp_path / "model-2.safetensors").write_bytes(shard.read_bytes())
    with pytest.raises(CheckpointError, match=r"does not name .*model-2.safetensors"):
        inspect_model(tmp_path)
    (tmp_path / "model-2.safetensors").unlink()
    shard.write_bytes(b"version https://git-lfs.github.com/spec/v1\n")
    with pytest.raises(CheckpointError, match="git-lfs pointer"):
        inspect_model(tmp_path)
    shard.unlink()
    with pytest.raises(CheckpointError, match=r"(?s)shards that the index names are missing.*model-1.safetensors"):
        inspect_model(tmp_path)


@pytest.mark.parametrize(
    ("file", "message"),
    [("../../x.safetensors", "same directory"), ("model-0.safetensors", "is said to be in model-0.safetensors")],
)
def test_index_that_points_elsewhere(tmp_path, file, message):
    write_checkpoint(tmp_path)
    index = json.loads((tmp_path / INDEX_FILE).read_text())
    index["weight_map"]["mtp.norm.weight"] = file
    (tmp_path / INDEX_FILE).write_text(json.dumps(index))
    with pytest.raises(CheckpointError, match=message):
        inspect_model(tmp_path)


def test_pickles_are_refused_as_in_loading(tmp_path):
    (tmp_path / "config.json").write_text(json.dumps(TINY))
    (tmp_path / "pytorch_model.bin").write_bytes(b"\x80\x04.")
    with pytest.raises(CheckpointError, match="only as pytorch_model.bin. Pickles may run code"):
        inspect_model(tmp_path)


@pytest.mark.parametrize("mtp", [True, False])
def test_both_forms_are_seen_as_they_are_loaded(tmp_path, mtp):
    (tmp_path / "hf").mkdir()
    names = [tensor.name for tensor in tensor_map(from_hf(TINY)[0])]
    extra = {"x.inv_freq": ("F32", np.zeros(3, np.float32))}
    write_checkpoint(tmp_path / "hf", skip=[] if mtp else [n for n in names if n.startswith("mtp.")], extra=extra)
    convert.from_hf(tmp_path / "hf", tmp_path / "native", allow_extra="x.inv_freq")
    for path in (tmp_path / "hf", tmp_path / "native"):
        found = inspect_model(path)
        assert found.checkpoint is not None
        assert (found.config.mtp_layer is not None, found.mtp is not None, found.mtp_absent) == (mtp, mtp, not mtp)
        assert found.checkpoint.tensors == found.tensors + 1
        assert (found.checkpoint.missing, found.checkpoint.unexpected) == ((), ("x.inv_freq",))
        assert ("no weights of it" in shown(found)) == (not mtp)
    assert found.checkpoint.native
    assert found.ok  # it was carried on request
    assert not inspect_model(tmp_path / "hf").ok
    (tmp_path / "native" / "params" / "norm.scale" / "zarr.json").unlink()
    with pytest.raises(CheckpointError, match="cannot be opened"):
        inspect_model(tmp_path / "native")


def test_quantised_weights_are_inspected_and_named(tmp_path):
    raw = TINY | {"quantization_config": {"quant_method": "fp8"}}
    write_checkpoint(tmp_path, skip=["lm_head.weight"])  # as if it were packed under another name
    (tmp_path / "config.json").write_text(json.dumps(raw))
    inspection = inspect_model(tmp_path)
    assert inspection.ok
    assert inspection.to_dict()["quantization"] == {"quant_method": "fp8"}
    assert "fp8" in shown(inspection)


@pytest.mark.parametrize("name", ["EXAONE-4.0-1.2B", "EXAONE-4.5-33B", "K-EXAONE-2.0-750B-A37B"])
def test_render_says_what_to_dict_says(name):
    inspection = inspect_model(name)
    text = shown(inspection)
    for value in (inspection.plan, f"{inspection.parameters:,}", f"{inspection.tensors:,}", f"{inspection.bytes:,}"):
        assert value in text
    assert f"{inspection.kv_bytes_per_token:,}" in text


def test_inspect_imports_no_jax():
    code = (
        "import sys; from exaone_jax.planning.inspect import inspect_model;"
        "inspect_model('K-EXAONE-236B-A23B').to_dict();"
        "print([name for name in ('jax', 'flax', 'torch', 'rich') if name in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"
