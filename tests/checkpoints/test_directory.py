"""The bad-input table for a directory: index, shards, links, pickles, and config.json against the headers."""

import json
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from exaone_jax.checkpoints import convert, load
from exaone_jax.checkpoints.directory import INDEX_FILE, SINGLE_FILE, open_hf, small_files
from exaone_jax.checkpoints.matching import collapse
from exaone_jax.checkpoints.names import vision_shapes
from exaone_jax.checkpoints.safetensors import SafetensorsFile, TensorInfo, write_file
from exaone_jax.errors import CheckpointError, ConfigError
from exaone_jax.planning.inspect import inspect_model
from tests.checkpoints.synthetic import MODELS, VISION, exaone, exaone4, exaone_moe, write_checkpoint

SHARDS = ["model-00001-of-00003.safetensors", "model-00002-of-00003.safetensors", "model-00003-of-00003.safetensors"]


@pytest.fixture(scope="module")
def sharded(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = write_checkpoint(tmp_path_factory.mktemp("sharded") / "model", exaone(), shard_bytes=30_000, finite=True)
    assert sorted(file.name for file in path.glob("*.safetensors")) == SHARDS
    return path


@pytest.fixture
def copy(sharded: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(sharded, tmp_path / "copy"))


def edit_index(path: Path, change: Callable[[dict[str, Any]], object]) -> None:
    index = json.loads((path / INDEX_FILE).read_text())
    change(index)
    (path / INDEX_FILE).write_text(json.dumps(index))


def edit_config(path: Path, **values: Any) -> None:
    config = json.loads((path / "config.json").read_text()) | values
    (path / "config.json").write_text(json.dumps(config))


def refused(path: Path, message: str, error: type[Exception] = CheckpointError) -> None:
    """Every way in refuses with the same message, and a conversion leaves nothing behind."""
    for call in (load.checkpoint_config, load.read_params):
        with pytest.raises(error, match=message):
            call(path)
    for dry_run in (True, False):
        with pytest.raises(error, match=message):
            convert.from_hf(path, path.parent / "out", dry_run=dry_run)
    assert not list(path.parent.glob("out*"))


NORM = "transformer.ln_f.weight"
ESCAPES = [
    "../x.safetensors",
    "../../../../etc/passwd.safetensors",
    "/abs/x.safetensors",
    "C:\\x.safetensors",
    "C:x.safetensors",
    "\\\\host\\share\\x.safetensors",
    "..\\x.safetensors",
    "sub/x.safetensors",
    "model.bin",
    "model-00001.safetensors.exe",
    ".safetensors",
    "x\0.safetensors",
    "",
    7,
    None,
    ["x.safetensors"],
]


@pytest.mark.parametrize("name", ESCAPES, ids=repr)
def test_index_that_points_elsewhere(copy: Path, name: object):
    edit_index(copy, lambda index: index["weight_map"].update({NORM: name}))
    refused(copy, "expected the name of a .safetensors file in the same directory")


def test_index_names_a_shard_that_lacks_the_tensor(copy: Path):
    edit_index(copy, lambda index: index["weight_map"].update({NORM: SHARDS[0]}))
    refused(copy, f"'{NORM}' is said to be in {SHARDS[0]}; it is in {SHARDS[2]}")


def test_index_names_a_tensor_that_is_nowhere(copy: Path):
    edit_index(copy, lambda index: index["weight_map"].update({"ghost": SHARDS[0]}))
    refused(copy, "'ghost' .* no file has it")


def test_shard_holds_a_tensor_that_the_index_does_not_list(copy: Path):
    edit_index(copy, lambda index: index["weight_map"].pop(NORM))
    refused(copy, "does not list")


def test_total_size_differs(copy: Path):
    edit_index(copy, lambda index: index["metadata"].update(total_size=1))
    refused(copy, "total_size is 1, the files hold")


@pytest.mark.parametrize("total", ["12", True, 1.5, [1]])
def test_total_size_is_no_number(copy: Path, total: object):
    edit_index(copy, lambda index: index["metadata"].update(total_size=total))
    refused(copy, "total_size")


def test_index_without_total_size_is_a_warning(copy: Path):
    edit_index(copy, lambda index: index.pop("metadata"))
    with open_hf(copy) as directory:
        assert "no total_size" in directory.warnings[0]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("{", "not valid JSON"),
        (
            "version https://git-lfs.github.com/spec/v1\noid sha256:0\n",
            f"{INDEX_FILE}: is a git-lfs pointer.*git lfs pull",
        ),
        ("<!DOCTYPE html><html></html>", f"{INDEX_FILE}: is an HTML or XML page"),
        ("[]", "weight_map"),
        ('{"weight_map": {}}', "weight_map"),
        ('{"weight_map": []}', "weight_map"),
        ('{"weight_map": {"a": "x.safetensors", "a": "y.safetensors"}}', "duplicate name 'a'"),
        ("\xff", "not valid JSON|weight_map"),
    ],
)
def test_broken_index(copy: Path, text: str, message: str):
    (copy / INDEX_FILE).write_text(text, encoding="latin-1")
    refused(copy, message)


def test_missing_shard(copy: Path):
    (copy / SHARDS[1]).unlink()
    refused(copy, f"(?s)missing.*{SHARDS[1]}")


def test_stale_shard_of_another_export(copy: Path):
    shutil.copy(copy / SHARDS[0], copy / "model-00001-of-00007.safetensors")
    refused(copy, "shards of another export.*model-00001-of-00007")


def test_extra_weights(copy: Path):
    shutil.copy(copy / SHARDS[0], copy / "adapter_model.safetensors")
    refused(copy, "does not name .other weights.: adapter_model")


def test_single_file_beside_an_index(copy: Path):
    shutil.copy(copy / SHARDS[0], copy / SINGLE_FILE)
    refused(copy, "a single-file checkpoint beside a sharded one")


def test_shards_without_an_index(copy: Path):
    (copy / INDEX_FILE).unlink()
    refused(copy, f"{INDEX_FILE} is missing")


def test_tensor_in_two_shards(copy: Path):
    with SafetensorsFile(copy / SHARDS[2]) as file:
        tensors = {name: (info.dtype, file.read_rows(name)) for name, info in file.header.tensors.items()}
    with SafetensorsFile(copy / SHARDS[0]) as file:
        name = next(iter(file.header.tensors))
        tensors[name] = (file.header.tensors[name].dtype, file.read_rows(name))
    (copy / SHARDS[2]).unlink()
    write_file(copy / SHARDS[2], tensors)
    refused(copy, f"'{name}' is both in {SHARDS[0]} and in {SHARDS[2]}")


def test_bad_shard_names_the_file(copy: Path):
    (copy / SHARDS[1]).write_bytes(b"version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 5\n")
    refused(copy, f"{SHARDS[1]}.*git lfs pull")


def test_empty_directory_file_and_nothing(tmp_path: Path):
    (tmp_path / "empty").mkdir()
    refused(tmp_path / "empty", "holds no safetensors file")
    (tmp_path / "file").write_bytes(b"x")
    refused(tmp_path / "file", "is a file, expected a directory")
    refused(tmp_path / "nothing", "does not exist")


@pytest.mark.parametrize("name", ["pytorch_model.bin", "model.pt", "weights.pth", "model.ckpt", "flax_model.msgpack"])
def test_pickles_are_refused_with_a_reason(tmp_path: Path, name: str):
    (tmp_path / "model").mkdir()
    (tmp_path / "model" / name).write_bytes(b"\x80\x04.")
    refused(tmp_path / "model", f"only as {name}. Pickles may run code")


def test_link_out_of_the_directory(copy: Path, sharded: Path):
    (copy / SHARDS[0]).unlink()
    (copy / SHARDS[0]).symlink_to(sharded / SHARDS[0])
    refused(copy, "is a link to .* outside the checkpoint directory")


def test_index_that_links_out_or_nowhere(copy: Path, sharded: Path):
    (copy / INDEX_FILE).unlink()
    (copy / INDEX_FILE).symlink_to(sharded / INDEX_FILE)
    refused(copy, "outside the checkpoint directory")
    (copy / INDEX_FILE).unlink()
    (copy / INDEX_FILE).symlink_to("gone")
    refused(copy, "cannot be read")


def test_small_file_that_links_out(copy: Path):
    (copy / "passwd.json").symlink_to("/etc/passwd")
    with pytest.raises(CheckpointError, match="outside the checkpoint directory"):
        convert.from_hf(copy, copy.parent / "out")
    assert not list(copy.parent.glob("out*"))


def test_links_of_the_hub_cache_are_followed(sharded: Path, tmp_path: Path):
    """models--x/snapshots/<revision>/file -> ../../blobs/<hash>"""
    snapshot, blobs = tmp_path / "models--x" / "snapshots" / "abc", tmp_path / "models--x" / "blobs"
    snapshot.mkdir(parents=True)
    blobs.mkdir()
    for number, file in enumerate(file for file in sharded.iterdir() if file.is_file()):
        shutil.copy(file, blobs / str(number))
        (snapshot / file.name).symlink_to(f"../../blobs/{number}")
    convert.from_hf(snapshot, tmp_path / "native")
    assert load.checkpoint_config(tmp_path / "native") == exaone()


# ---- config.json against the headers ---------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"vocab_size": 95}, r"wrong shape:\n  transformer.wte.weight: found \[96, 32\], expected \[95, 32\]"),
        ({"hidden_size": 64}, "wrong shape"),
        ({"intermediate_size": 47}, r"h.\{0...2\}.mlp.c_fc_0.weight: found \[48, 32\], expected \[47, 32\] \(3\)"),
        ({"num_layers": 2}, r"does not have:\n  transformer.h.2"),
        ({"num_layers": 4}, r"missing tensors:\n  transformer.h.3"),
        ({"num_attention_heads": 2}, r"q_proj.weight: found \[64, 32\], expected \[32, 32\]"),
        ({"num_key_value_heads": 4}, "k_proj.weight: found"),
        ({"head_dim": 8}, "wrong shape"),
        ({"tie_word_embeddings": False}, r"missing tensors:\n  lm_head.weight"),
    ],
)
def test_config_disagrees_with_headers(copy: Path, changes: dict[str, Any], message: str):
    edit_config(copy, **changes)
    refused(copy, message)


def test_headers_are_checked_before_any_data_is_read(copy: Path, monkeypatch: pytest.MonkeyPatch):
    edit_config(copy, vocab_size=95)
    monkeypatch.setattr(SafetensorsFile, "read_rows", lambda *_: pytest.fail("data was read"))
    refused(copy, "wrong shape")


def test_moe_config_disagrees(tmp_path: Path):
    path = write_checkpoint(tmp_path / "model", exaone_moe(), finite=True)
    for changes, message in (
        (
            {"num_experts": 8},
            r"(?s)missing tensors:.*experts.\{4...7\}.*mlp.gate.weight: found \[4, 32\], expected \[8, 32\]",
        ),
        ({"moe_intermediate_size": 25}, "wrong shape"),
        ({"num_shared_experts": 2}, r"shared_experts.gate_proj.weight: found \[24, 32\], expected \[48, 32\]"),
        ({"mlp_layer_types": ["sparse"] * 8}, "missing tensors"),
        ({"num_nextn_predict_layers": 0}, r"does not have:\n  mtp"),
    ):
        shutil.copytree(path, tmp_path / "copy")
        changes = changes | ({"is_moe_layer": None} if "mlp_layer_types" in changes else {})
        edit_config(tmp_path / "copy", **changes)
        refused(tmp_path / "copy", message)
        shutil.rmtree(tmp_path / "copy")


def test_layer_types_of_another_length(tmp_path: Path):
    path = write_checkpoint(tmp_path / "model", exaone4(), finite=True)
    edit_config(path, layer_types=["full_attention"] * 6)
    refused(path, "layer_types", ConfigError)


def test_quantised_weights_are_refused(copy: Path):
    edit_config(copy, quantization_config={"quant_method": "fp8"})
    refused(copy, "quantised .quant_method 'fp8'")


@pytest.mark.parametrize("value", ["fp8", ["fp8"], False, 8])
def test_quantization_config_that_is_no_object(copy: Path, value: object):
    edit_config(copy, quantization_config=value)
    message = re.escape(f"config.json: quantization_config: found {value!r}, expected an object")
    refused(copy, message, ConfigError)
    with pytest.raises(ConfigError, match="quantization_config: found"):
        inspect_model(copy)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"version https://git-lfs.github.com/spec/v1\noid sha256:0\n", "config.json: a Git LFS pointer"),
        (b"<html>", "config.json: an HTML or XML page"),
    ],
)
def test_config_that_is_no_json(copy: Path, content: bytes, message: str):
    (copy / "config.json").write_bytes(content)
    refused(copy, message, ConfigError)


def test_no_config(copy: Path):
    (copy / "config.json").unlink()
    refused(copy, "config.json: no such file", ConfigError)


def rewrite(path: Path, change: Callable[[dict[str, tuple[str, Any]]], object]) -> None:
    """Write a single-file checkpoint again with its tensors (name -> dtype, bits) changed."""
    with SafetensorsFile(path / SINGLE_FILE) as file:
        tensors = {name: (info.dtype, file.read_rows(name)) for name, info in file.header.tensors.items()}
    change(tensors)
    (path / SINGLE_FILE).unlink()
    write_file(path / SINGLE_FILE, tensors)


@pytest.fixture
def single(tmp_path: Path) -> Path:
    return write_checkpoint(tmp_path / "single", exaone_moe(), finite=True)


def test_same_size_dtype_lie(single: Path):
    """float32 bits under the name of int32 look the same to every check of size."""
    bias = "model.layers.1.mlp.e_score_correction_bias"
    rewrite(single, lambda tensors: tensors.update({bias: ("I32", tensors[bias][1])}))
    refused(single, f"wrong dtype:\n  {bias}: found I32, expected BF16 or F16 or F32")


def test_transposed_tensor(single: Path):
    name = "model.layers.2.mlp.experts.3.down_proj.weight"
    rewrite(single, lambda tensors: tensors.update({name: ("BF16", np.ascontiguousarray(tensors[name][1].T))}))
    refused(single, r"experts.3.down_proj.weight: found \[24, 32\], expected \[32, 24\]")


def test_empty_tensor_may_not_stand_for_a_weight(single: Path):
    name = "model.norm.weight"
    rewrite(single, lambda tensors: tensors.update({name: ("BF16", np.empty(0, np.uint16))}))
    refused(single, r"model.norm.weight: found \[0\], expected \[32\]")


def test_dropped_bias(single: Path):
    rewrite(single, lambda tensors: tensors.pop("model.layers.4.mlp.e_score_correction_bias"))
    refused(single, r"missing tensors:\n  model.layers.4.mlp.e_score_correction_bias")


def test_part_of_mtp_missing(single: Path):
    rewrite(single, lambda tensors: tensors.pop("mtp.fc.weight"))
    refused(single, r"missing tensors:\n  mtp.fc.weight")


def test_mixed_dtypes_in_one_stack(tmp_path: Path):
    path = write_checkpoint(tmp_path / "model", exaone4(), finite=True)
    name = "model.layers.6.self_attn.q_proj.weight"
    rewrite(path, lambda tensors: tensors.update({name: ("F32", tensors[name][1].astype(np.uint32))}))
    refused(path, f"wrong dtype:\n  {name}: found F32, the other weights are BF16")


@pytest.mark.parametrize(
    ("name", "dtype", "kind"),
    [
        ("lm_head.weight", "F16", "weights are BF16"),
        ("mtp.fc.weight", "F16", "weights are BF16"),
        ("model.layers.1.mlp.e_score_correction_bias", "BF16", "router biases are F32"),
    ],
)
def test_one_tensor_of_another_dtype(single: Path, name: str, dtype: str, kind: str):
    """float16 bits under the name of bfloat16 look the same to every check of size."""
    rewrite(single, lambda tensors: tensors.update({name: (dtype, tensors[name][1].astype(np.uint16))}))
    refused(single, f"wrong dtype:\n  {name}: found {dtype}, the other {kind}")


def test_vision_tensors_have_a_dtype_of_their_own(tmp_path: Path):
    path = write_checkpoint(tmp_path / "model", MODELS["exaone4_5"], finite=True)
    names = list(vision_shapes(VISION))

    def cast(tensors: dict[str, tuple[str, Any]], dtype: str, changed: list[str]) -> None:
        tensors.update({name: (dtype, tensors[name][1]) for name in changed})

    rewrite(path, lambda tensors: cast(tensors, "F16", names))
    assert load.checkpoint_config(path) == MODELS["exaone4_5"]
    rewrite(path, lambda tensors: cast(tensors, "BF16", names[:1]))
    refused(path, f"{names[0]}: found BF16, the other vision tensors are F16")


def test_extra_tensor(single: Path, tmp_path: Path):
    extra = ("F32", np.arange(3, dtype=np.uint32))
    rewrite(single, lambda tensors: tensors.update({"model.layers.0.rotary_emb.inv_freq": extra}))
    refused(single, r"does not have:\n  model.layers.0.rotary_emb.inv_freq")
    report = convert.from_hf(single, tmp_path / "native", allow_extra=r".*\.inv_freq")
    assert report.extra_tensors == ["model.layers.0.rotary_emb.inv_freq"]
    convert.to_hf(tmp_path / "native", tmp_path / "back")
    assert (tmp_path / "back" / SINGLE_FILE).read_bytes() == (single / SINGLE_FILE).read_bytes()


@pytest.mark.parametrize("name", ["../../evil", "/abs", "a/b", ".hidden", "nul\0", "x" * 300, "", "ключ"])
def test_extra_tensor_name_never_becomes_a_path(single: Path, tmp_path: Path, name: str):
    rewrite(single, lambda tensors: tensors.update({name: ("F32", np.arange(3, dtype=np.uint32))}))
    with pytest.raises(CheckpointError, match="not a plain file name"):
        convert.from_hf(single, tmp_path / "out", allow_extra="(?s).*")
    assert not list(tmp_path.glob("out*"))


def test_allow_extra_must_be_a_regular_expression(single: Path, tmp_path: Path):
    with pytest.raises(CheckpointError, match="not a regular expression"):
        convert.from_hf(single, tmp_path / "out", allow_extra="(")


def test_no_mtp_weights_at_all(tmp_path: Path):
    """transformers drops mtp.* when it saves: such a checkpoint loads without MTP, and the report says so."""
    path = write_checkpoint(tmp_path / "model", exaone_moe(), without=["mtp."], finite=True)
    report = convert.from_hf(path, tmp_path / "native")
    assert report.mtp == "absent"
    assert any("no MTP weights" in warning for warning in report.warnings)
    for place in (path, tmp_path / "native"):
        assert load.checkpoint_config(place).mtp_layer is None
        assert not any(key[0] == "mtp" for key in load.read_params(place))
    assert convert.to_hf(tmp_path / "native", tmp_path / "back").mtp == "absent"
    assert (
        convert.from_hf(write_checkpoint(tmp_path / "with", exaone_moe()), tmp_path / "n2", dry_run=True).mtp
        == "present"
    )


# ---- small files and tables ------------------------------------------------------------------------------------------


def test_small_files(copy: Path):
    (copy / "modeling_exaone.py").write_text("x")
    (copy / "training_args.bin").write_bytes(b"\x80\x04")
    (copy / ".git").mkdir()
    (copy / ".git" / "config").write_text("x")
    (copy / "sub").mkdir()
    (copy / "sub" / "other.safetensors").write_bytes(b"x")
    (copy / "sub" / ".cache" / "huggingface").mkdir(parents=True)
    (copy / ".hidden").symlink_to(copy / "sub")
    (copy / ".gitattributes").write_text("x")
    (copy / "loop").symlink_to(copy)
    kept, skipped = small_files(copy, frozenset({*SHARDS, INDEX_FILE}))
    assert [file.path for file in kept] == [
        ".gitattributes", "LICENSE", "assets/logo.png", "chat_template.jinja", "config.json", "generation_config.json",
        "tokenizer.json", "tokenizer_config.json",
    ]  # fmt: skip
    assert {file.path: file.reason for file in skipped} == {
        ".git": "a hidden folder",
        ".hidden": "a link to a directory",
        "loop": "a link to a directory",
        "modeling_exaone.py": "code is copied only if asked for",
        "sub/.cache": "a hidden folder",
        "sub/other.safetensors": "weights outside the checkpoint",
        "training_args.bin": "weights in another format; pickles may run code",
    }


def test_collapse():
    names = [f"layers.{i}.experts.{e}.x" for i in (0, 1, 2, 5) for e in range(3)] + ["norm", "layers.7.y"]
    assert collapse(names) == ["layers.{0...2, 5}.experts.{0...2}.x (12)", "norm", "layers.7.y"]
    assert collapse([]) == []
    assert collapse(["a.1.{}", "a.{x}"])  # braces in a name are no fields


def test_tensor_info_bytes():
    assert TensorInfo("BF16", (3, 5)).nbytes == 30
    assert TensorInfo("F4", (4,)).nbytes == 2
    assert all(info.nbytes for info in (TensorInfo("F64", ()), TensorInfo("BOOL", (1,))))
    assert MODELS
