"""Conversion both ways: the same bytes in every file, and nothing half-written whatever happens."""

import json
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from exaone_jax.checkpoints import atomic, convert, load
from exaone_jax.checkpoints.directory import INDEX_FILE, SINGLE_FILE, open_hf
from exaone_jax.checkpoints.names import parameters, path_name
from exaone_jax.checkpoints.verify import verify
from exaone_jax.config.hf import read_config
from exaone_jax.config.model import ModelConfig
from exaone_jax.errors import CheckpointError, StorageError
from tests.checkpoints.synthetic import (
    MODELS,
    exaone,
    exaone4_5,
    exaone_moe,
    tree_bytes,
    write_checkpoint,
)

# ---- the same bytes --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("shard_bytes", [30_000, 10**9], ids=["sharded", "single"])
@pytest.mark.parametrize("name", MODELS)
def test_round_trip(name: str, shard_bytes: int, tmp_path: Path):
    """Every bit pattern occurs in the weights: NaN payloads, signalling NaNs, negative zeros, subnormals."""
    source = write_checkpoint(tmp_path / "hf", MODELS[name], shard_bytes=shard_bytes)
    there = convert.from_hf(source, tmp_path / "native")
    back = convert.to_hf(tmp_path / "native", tmp_path / "back")
    assert tree_bytes(tmp_path / "back") == tree_bytes(source)
    assert not there.warnings
    assert not back.warnings
    counts = (there.tensors, there.parameters, there.bytes, there.mtp)
    assert counts == (back.tensors, back.parameters, back.bytes, back.mtp)
    assert json.loads(json.dumps(there.to_dict()))["model_type"] == MODELS[name].model_type


def test_foreign_layout_comes_back(tmp_path: Path):
    """Order, metadata, key order, escapes, padding and shard boundaries that we would never choose."""
    source = write_checkpoint(tmp_path / "hf", exaone(), shard_bytes=10**9)
    with open_hf(source) as directory:
        tensors = {name: (info, directory.read_rows(name)) for name, info in directory.tensors.items()}
    names = sorted(tensors, key=lambda name: name[::-1])
    (source / SINGLE_FILE).unlink()
    weight_map = {}
    for file, part in (("b.safetensors", names[:7]), ("a.safetensors", names[7:])):
        header, position, data = {}, 0, b""
        for name in part:
            info, bits = tensors[name]
            header[name] = {
                "data_offsets": [position, position + info.nbytes],
                "shape": list(info.shape),
                "dtype": info.dtype,
            }
            position, data = position + info.nbytes, data + bits.tobytes()
            weight_map[name] = file
        listed = dict(reversed(header.items())) | {"__metadata__": {"format": "pt", "z": "1", "a": "\u00e9"}}
        text = json.dumps(listed, indent=1).encode() + b" " * 3  # unaligned on purpose
        (source / file).write_bytes(len(text).to_bytes(8, "little") + text + data)
    (source / INDEX_FILE).write_text(
        json.dumps({"weight_map": weight_map, "metadata": {"total_size": 71_104, "x": [1]}})
    )
    convert.from_hf(source, tmp_path / "native")
    convert.to_hf(tmp_path / "native", tmp_path / "back")
    assert tree_bytes(tmp_path / "back") == tree_bytes(source)


def test_large_tensors_are_cut_into_chunks_and_come_back(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr("exaone_jax.checkpoints.native.CHUNK_BYTES", 700)  # odd: chunks that do not divide the rows
    source = write_checkpoint(tmp_path / "hf", exaone4_5())
    convert.from_hf(source, tmp_path / "native", workers=3)
    assert len(list((tmp_path / "native" / "params" / "embed.embedding").glob("c.*"))) > 8
    convert.to_hf(tmp_path / "native", tmp_path / "back", workers=3)
    assert tree_bytes(tmp_path / "back") == tree_bytes(source)
    assert verify(source, tmp_path / "native", allow_nonfinite=True).ok


@pytest.mark.parametrize("dtype", ["float32", "float16"])
def test_other_dtypes(dtype: str, tmp_path: Path):
    config = exaone_moe().model_copy(update={"dtype": dtype})
    source = write_checkpoint(tmp_path / "hf", config)
    convert.from_hf(source, tmp_path / "native")
    convert.to_hf(tmp_path / "native", tmp_path / "back")
    assert tree_bytes(tmp_path / "back") == tree_bytes(source)


def test_dtype_that_config_json_does_not_say_is_a_warning(tmp_path: Path):
    source = write_checkpoint(tmp_path / "hf", exaone())
    raw = json.loads((source / "config.json").read_text())
    raw["torch_dtype" if "torch_dtype" in raw else "dtype"] = "float32"
    (source / "config.json").write_text(json.dumps(raw))
    assert "config.json says float32, the tensors are BF16" in convert.from_hf(source, tmp_path / "n").warnings[0]


def test_code_and_pickles_stay_behind_and_are_reported(tmp_path: Path):
    source = write_checkpoint(tmp_path / "hf", exaone())
    (source / "modeling_exaone.py").write_text("raise SystemExit")
    (source / "optimizer.pt").write_bytes(b"\x80\x04")
    (source / "params").mkdir()
    (source / "params" / "x").write_bytes(b"x")
    report = convert.from_hf(source, tmp_path / "native")
    assert {file.path: file.reason for file in report.not_copied} == {
        "modeling_exaone.py": "code is copied only if asked for",
        "optimizer.pt": "weights in another format; pickles may run code",
        "params/x": "its name belongs to the native form",
    }
    convert.to_hf(tmp_path / "native", tmp_path / "back")
    left_out = {"modeling_exaone.py", "optimizer.pt", "params/x"}
    expected = {name: data for name, data in tree_bytes(source).items() if name not in left_out}
    assert tree_bytes(tmp_path / "back") == expected


def test_code_goes_along_where_it_is_asked_for(tmp_path: Path):
    source = write_checkpoint(tmp_path / "hf", exaone())
    (source / "modeling_exaone.py").write_text("raise SystemExit")
    convert.from_hf(source, tmp_path / "native", with_code=True)
    convert.to_hf(tmp_path / "native", tmp_path / "back")
    assert tree_bytes(tmp_path / "back") == tree_bytes(source)


def test_files_changed_in_between_are_copied_and_reported(tmp_path: Path):
    convert.from_hf(write_checkpoint(tmp_path / "hf", exaone()), tmp_path / "native")
    (tmp_path / "native" / "chat_template.jinja").write_text("new")
    (tmp_path / "native" / "LICENSE").unlink()
    (tmp_path / "native" / "NOTES.md").write_text("mine")
    report = convert.to_hf(tmp_path / "native", tmp_path / "back")
    assert sorted(report.warnings) == [
        "LICENSE: came with the checkpoint and is gone",
        "chat_template.jinja: was changed after the conversion",
    ]
    assert (tmp_path / "back" / "chat_template.jinja").read_text() == "new"
    assert (tmp_path / "back" / "NOTES.md").read_text() == "mine"


def test_resharding(tmp_path: Path):
    source = write_checkpoint(tmp_path / "hf", exaone_moe())
    convert.from_hf(source, tmp_path / "native")
    report = convert.to_hf(tmp_path / "native", tmp_path / "back", max_shard_bytes=100_000)
    assert len(report.weight_files) > 1
    index = json.loads((tmp_path / "back" / INDEX_FILE).read_text())
    assert index["metadata"] == {"total_size": report.bytes, "total_parameters": report.parameters}
    assert verify(source, tmp_path / "back", allow_nonfinite=True).ok


# ---- from memory -----------------------------------------------------------------------------------------------------


def params_of(config: ModelConfig) -> dict:
    """Parameters that name their place: no two elements of the model are alike, as far as bfloat16 can tell."""
    params, rng = {}, np.random.default_rng(0)
    for path, parameter in parameters(config).items():
        dtype = jnp.float32 if parameter.keep_float32 else jnp.bfloat16
        params[path] = jnp.asarray(rng.standard_normal(parameter.shape), dtype)
    return params


def nested(flat: dict) -> dict:
    tree: dict = {}
    for path, value in flat.items():
        node = tree
        for key in path[:-1]:
            node = node.setdefault(key, {})
        node[path[-1]] = value
    return tree


@pytest.mark.parametrize("form", ["flat", "nested", "state"])
@pytest.mark.parametrize("save", [convert.save_hf, convert.save_native])
def test_save_and_load(form: str, save, tmp_path: Path):
    config = exaone_moe()
    params = params_of(config)
    tree = params if form == "flat" else nested(params)
    if form == "state":
        tree = nnx.State(jax.tree.map(nnx.Param, tree))
    report = save(tree, config, tmp_path / "model")
    assert (report.tensors, report.mtp) == (len([1 for p in parameters(config).values() for _ in p.tensors]), "present")
    assert load.checkpoint_config(tmp_path / "model") == config
    back = load.read_params(tmp_path / "model")
    assert back.keys() == params.keys()
    for path, value in params.items():
        assert back[path].dtype == value.dtype
        np.testing.assert_array_equal(np.asarray(back[path]), np.asarray(value), err_msg=path_name(path))


def test_saved_parameters_have_the_layout_of_hugging_face(tmp_path: Path):
    config = exaone_moe()
    params = params_of(config)
    convert.save_hf(params, config, tmp_path / "model")
    with open_hf(tmp_path / "model") as directory:
        down = directory.read_rows("model.layers.5.mlp.experts.3.down_proj.weight")
        embed = directory.read_rows("model.embed_tokens.weight")
    where = next(
        t
        for p in parameters(config).values()
        for t in p.tensors
        if t.name.endswith("layers.5.mlp.experts.3.down_proj.weight")
    )
    np.testing.assert_array_equal(down, np.asarray(params[where.path][where.index]).view(np.uint16))
    np.testing.assert_array_equal(embed, np.asarray(params["embed", "embedding"]).view(np.uint16))


def test_native_without_a_source_layout_becomes_hf(tmp_path: Path):
    config = exaone_moe()
    convert.save_native(params_of(config), config, tmp_path / "native")
    report = convert.to_hf(tmp_path / "native", tmp_path / "hf")
    assert report.weight_files == [SINGLE_FILE]
    assert read_config(tmp_path / "hf") == config
    assert verify(tmp_path / "native", tmp_path / "hf").ok


def test_saved_dtype(tmp_path: Path):
    """Stored as config.dtype unless told; the bias stays float32; config.json says what was stored."""
    config, params = exaone_moe(), params_of(exaone_moe())
    wide = {path: value.astype(jnp.float32) for path, value in params.items()}
    convert.save_hf(wide, config, tmp_path / "bf16")
    convert.save_hf(wide, config, tmp_path / "f32", dtype="float32")
    assert read_config(tmp_path / "f32").dtype == "float32"
    for name, kind in (("bf16", "BF16"), ("f32", "F32")):
        with open_hf(tmp_path / name) as directory:
            assert directory.tensors["model.norm.weight"].dtype == kind
            assert directory.tensors["model.layers.1.mlp.e_score_correction_bias"].dtype == "F32"
    assert verify(tmp_path / "bf16", tmp_path / "f32").mismatched
    with pytest.raises(CheckpointError, match="cannot be stored as int8"):
        convert.save_hf(wide, config, tmp_path / "int", dtype="int8")


def test_small_files_unknown_keys_and_vision_come_from_another_checkpoint(tmp_path: Path):
    """Training the text side of 4.5: the tower and the tokenizer of the checkpoint it began with are written again."""
    config = exaone4_5()
    source = write_checkpoint(tmp_path / "hf", config)
    params = params_of(config)
    with pytest.raises(CheckpointError, match="vision tower"):
        convert.save_hf(params, config, tmp_path / "out")
    for place in (source, tmp_path / "native"):
        if not place.exists():
            convert.from_hf(source, place)
        out = tmp_path / f"out-{place.name}"
        convert.save_hf(params, config, out, extra_files_from=place)
        assert (out / "tokenizer.json").read_bytes() == (source / "tokenizer.json").read_bytes()
        assert json.loads((out / "config.json").read_text())["transformers_version"] == "5.1.0"
        with open_hf(source) as one, open_hf(out) as other:
            for name in one.tensors:
                if "visual" in name:
                    np.testing.assert_array_equal(one.read_rows(name), other.read_rows(name))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda p: p.pop(("norm", "scale")), r"missing parameters:\n  norm.scale"),
        (lambda p: p.update({("rngs", "count"): jnp.zeros(())}), r"does not have:\n  rngs.count"),
        (lambda p: p.update({("norm", "scale"): jnp.zeros(3)}), r"norm.scale: found \[3\], expected \[32\]"),
        (lambda p: p.update({("norm", "scale"): jnp.zeros(32, jnp.int32)}), "norm.scale: int32"),
    ],
)
def test_wrong_parameters_are_not_saved(change, message: str, tmp_path: Path):
    params = params_of(exaone_moe())
    change(params)
    for save in (convert.save_hf, convert.save_native):
        with pytest.raises(CheckpointError, match=message):
            save(params, exaone_moe(), tmp_path / "out")
    assert not list(tmp_path.iterdir())


# ---- outputs ---------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_checkpoint(tmp_path_factory.mktemp("source") / "hf", exaone_moe(), shard_bytes=100_000)


def test_dry_run_writes_nothing(source: Path, tmp_path: Path):
    report = convert.from_hf(source, tmp_path / "sub" / "native", dry_run=True)
    assert report.dry_run
    assert (report.tensors, report.seconds) == (len(load.open_checkpoint(source)[1].tensors), 0)
    assert not list(tmp_path.iterdir())


def test_existing_output(source: Path, tmp_path: Path):
    (tmp_path / "empty").mkdir()
    convert.from_hf(source, tmp_path / "empty")
    (tmp_path / "file").write_text("x")
    with pytest.raises(StorageError, match="exists and is not a directory"):
        convert.from_hf(source, tmp_path / "file", overwrite=True)
    for dry_run in (True, False):
        with pytest.raises(StorageError, match="exists and is not empty"):
            convert.from_hf(source, tmp_path / "empty", dry_run=dry_run)
    before = tree_bytes(tmp_path / "empty")
    other = write_checkpoint(tmp_path / "other", exaone())
    convert.from_hf(other, tmp_path / "empty", overwrite=True)
    assert tree_bytes(tmp_path / "empty") != before
    assert load.checkpoint_config(tmp_path / "empty") == exaone()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["empty", "file", "other"]


def test_output_in_the_working_directory(source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    convert.from_hf(source, ".")
    assert load.checkpoint_config(tmp_path / "here") == exaone_moe()
    assert [path.name for path in tmp_path.iterdir()] == ["here"]


def test_overwriting_never_removes_foreign_files(source: Path, tmp_path: Path):
    convert.from_hf(source, tmp_path / "out")
    (tmp_path / "out" / "thesis.txt").write_text("years of work")
    before = tree_bytes(tmp_path / "out")
    with pytest.raises(StorageError, match=r"thesis.txt: is not part of a checkpoint"):
        convert.from_hf(source, tmp_path / "out", overwrite=True)
    assert tree_bytes(tmp_path / "out") == before
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


@pytest.mark.parametrize(
    "name",
    [
        "params/_METADATA",
        "source/main.c",
        "carried/x",
        "exaone_jax.json/x",
        "other.safetensors",
        "config.json/x",
        "vocab/x",
        "model-00001-of-00002.safetensors",
    ],
)
@pytest.mark.parametrize("direction", ["from_hf", "to_hf"])
def test_overwriting_never_removes_what_has_a_name_of_ours(direction: str, name: str, source: Path, tmp_path: Path):
    src = source
    if direction == "to_hf":
        src = tmp_path / "native"
        convert.from_hf(source, src)
    (tmp_path / "out" / name).parent.mkdir(parents=True)
    (tmp_path / "out" / name).write_text("years of work")
    with pytest.raises(StorageError, match=r"is not part of a checkpoint and would be lost"):
        getattr(convert, direction)(src, tmp_path / "out", overwrite=True)
    assert tree_bytes(tmp_path / "out") == {name: b"years of work"}


def test_overwriting_replaces_the_weights_that_the_index_names(source: Path, tmp_path: Path):
    out = Path(shutil.copytree(source, tmp_path / "out"))
    (out / "adapter.safetensors").write_text("years of work")
    before = tree_bytes(out)
    with pytest.raises(StorageError, match=r"adapter.safetensors: is not part of a checkpoint"):
        convert.from_hf(source, out, overwrite=True)
    assert tree_bytes(out) == before
    (out / "adapter.safetensors").unlink()
    convert.from_hf(source, out, overwrite=True)
    assert verify(source, out).same


def test_overwriting_without_an_atomic_swap(source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(atomic, "_exchange", lambda *_: False)
    convert.from_hf(source, tmp_path / "out")
    convert.from_hf(write_checkpoint(tmp_path / "other", exaone()), tmp_path / "out", overwrite=True)
    assert load.checkpoint_config(tmp_path / "out") == exaone()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["other", "out"]


def test_a_kill_between_the_two_renames_is_put_right(source: Path, tmp_path: Path):
    convert.from_hf(source, tmp_path / "out")
    (tmp_path / "out").rename(tmp_path / "out.replaced-12345678")
    assert atomic.sweep(tmp_path / "out") == []
    assert load.checkpoint_config(tmp_path / "out") == exaone_moe()


@pytest.mark.parametrize("exists", [True, False])
def test_what_only_looks_like_a_leftover_is_not_touched(exists: bool, source: Path, tmp_path: Path):
    for name in ("out.partial-backup", "out.replaced-old", "out.partial-0123456789", "out.replaced-ABCDEF01"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "thesis.txt").write_text("years of work")
    (tmp_path / "out.partial-01234567").write_text("a file")
    (tmp_path / "out.replaced-01234567").symlink_to(tmp_path / "out.replaced-old")
    if exists:
        (tmp_path / "out").mkdir()
    before = tree_bytes(tmp_path)
    assert atomic.sweep(tmp_path / "out") == []
    assert tree_bytes(tmp_path) == before
    assert (tmp_path / "out").exists() == exists
    (tmp_path / "out.partial-89abcdef").mkdir()
    assert atomic.sweep(tmp_path / "out") == ["out.partial-89abcdef"]


@pytest.mark.parametrize("dst", [".", "inside", ".."])
def test_output_on_the_source(source: Path, dst: str):
    before = tree_bytes(source)
    with pytest.raises(StorageError, match="in, around or on the source"):
        convert.from_hf(source, source / dst, overwrite=True)
    assert tree_bytes(source) == before


def test_converting_a_native_checkpoint_again(source: Path, tmp_path: Path):
    convert.from_hf(source, tmp_path / "native")
    with pytest.raises(CheckpointError, match="native checkpoint already"):
        convert.from_hf(tmp_path / "native", tmp_path / "x")
    with pytest.raises(CheckpointError, match="no native checkpoint"):
        convert.to_hf(source, tmp_path / "x")


def test_no_space(source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    usage = shutil.disk_usage(tmp_path)
    monkeypatch.setattr(atomic.shutil, "disk_usage", lambda _: usage._replace(free=1000))
    with pytest.raises(StorageError, match="bytes are needed and 1,000 are free"):
        convert.from_hf(source, tmp_path / "out")
    assert not list(tmp_path.iterdir())


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write anywhere")
def test_read_only_output(source: Path, tmp_path: Path):
    (tmp_path / "locked").mkdir(mode=0o500)
    with pytest.raises(StorageError):
        convert.from_hf(source, tmp_path / "locked" / "out")


def test_progress_counts_every_byte_once(source: Path, tmp_path: Path):
    seen: list[tuple[int, int]] = []
    report = convert.from_hf(
        source, tmp_path / "n", workers=4, on_progress=lambda done, total: seen.append((done, total))
    )
    assert seen[-1] == (report.bytes, report.bytes)
    assert [done for done, _ in seen] == sorted(done for done, _ in seen)
    assert report.bytes_per_second > 0


def test_an_interrupt_leaves_nothing(source: Path, tmp_path: Path):
    def interrupt(done: int, total: int) -> None:
        if done > total // 2:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        convert.from_hf(source, tmp_path / "out", on_progress=interrupt)
    assert not list(tmp_path.iterdir())


# ---- processes that die ----------------------------------------------------------------------------------------------

CHILD = """
import resource, sys
from exaone_jax.checkpoints import convert
direction, src, dst, limit, overwrite = sys.argv[1:]
if int(limit):
    resource.setrlimit(resource.RLIMIT_FSIZE, (int(limit), int(limit)))
print("ready", flush=True)
getattr(convert, direction)(src, dst, workers=2, overwrite=overwrite == "1")
print("done", flush=True)
"""


def spawn(direction: str, src: Path, dst: Path, limit: int = 0, overwrite: bool = False) -> subprocess.Popen:
    arguments = [direction, str(src), str(dst), str(limit), str(int(overwrite))]
    return subprocess.Popen(
        [sys.executable, "-c", CHILD, *arguments],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        cwd=Path(__file__).parents[2],
        env=os.environ | {"JAX_PLATFORMS": "cpu", "OMP_NUM_THREADS": "1"},
    )


@pytest.fixture(scope="module")
def larger(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """7 MB, so that a conversion takes long enough to be killed in the middle."""
    config = exaone_moe(vocab_size=2048, hidden_size=256, intermediate_size=512, num_heads=8, num_kv_heads=2)
    return write_checkpoint(tmp_path_factory.mktemp("larger") / "hf", config, shard_bytes=4_000_000, finite=True)


def states(root: Path, dst: Path) -> str:
    return f"{sorted(path.name for path in root.iterdir())}, {dst.name} exists: {dst.exists()}"


@pytest.mark.parametrize("direction", ["from_hf", "to_hf"])
def test_sigkill_leaves_the_old_state_or_the_new_one(direction: str, larger: Path, tmp_path: Path):
    """Kill at random moments while an older checkpoint is overwritten; it stays whole or is replaced whole. Then rerun."""
    src = larger
    if direction == "to_hf":
        src = tmp_path / "native"
        convert.from_hf(larger, src)
    dst = tmp_path / "out"
    if direction == "from_hf":
        convert.from_hf(write_checkpoint(tmp_path / "old", exaone(), finite=True), dst)
    else:
        write_checkpoint(dst, exaone(), finite=True)
    old = tree_bytes(dst)
    rng, killed = random.Random(0), 0
    for _ in range(4):
        child = spawn(direction, src, dst, overwrite=True)
        assert child.stdout is not None
        assert child.stdout.readline() == "ready\n"
        time.sleep(rng.uniform(0.0, 0.25))
        child.send_signal(signal.SIGKILL)
        killed += child.wait() == -signal.SIGKILL
        now = tree_bytes(dst)
        if now != old:
            assert verify(src, dst).ok, states(tmp_path, dst)
    assert killed
    child = spawn(direction, src, dst, overwrite=True)
    _, errors = child.communicate()
    assert child.returncode == 0, errors
    assert verify(src, dst).ok
    assert not list(tmp_path.glob("out.*"))


def test_a_running_conversion_is_not_swept(larger: Path, tmp_path: Path):
    with atomic.new_directory(tmp_path / "out", overwrite=False, may_go=lambda *_: False) as partial:
        child = spawn("from_hf", larger, tmp_path / "out")
        _, errors = child.communicate()
        assert child.returncode != 0
        assert "another process is writing it" in errors
        assert partial.is_dir()


def test_a_directory_that_another_process_sweeps_is_not_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    lock, held = atomic.lock, []

    def lock_after_another(directory: Path) -> int | None:
        held.append(lock(directory))  # flock goes by descriptor: this one is as good as another process
        return lock(directory)

    monkeypatch.setattr(atomic, "lock", lock_after_another)
    with (
        pytest.raises(StorageError, match="another process is writing it"),
        atomic.new_directory(tmp_path / "out", overwrite=False, may_go=lambda *_: False),
    ):
        pytest.fail("the directory was handed out")
    os.close(held[0])
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("direction", ["from_hf", "to_hf"])
def test_file_size_limit_leaves_nothing(direction: str, larger: Path, tmp_path: Path):
    """EFBIG stands in for a disk that fills up: the same path through the writer."""
    src = larger
    if direction == "to_hf":
        src = tmp_path / "native"
        convert.from_hf(larger, src)
    child = spawn(direction, src, tmp_path / "out", limit=300_000)
    _, errors = child.communicate()
    assert child.returncode == 1, errors
    assert "StorageError" in errors.splitlines()[-1]
    assert not list(tmp_path.glob("out*"))


@pytest.mark.skipif(os.geteuid() != 0, reason="mounting a small file system needs root")
@pytest.mark.parametrize("direction", ["from_hf", "to_hf"])
def test_full_disk_leaves_nothing(direction: str, larger: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    src = larger
    if direction == "to_hf":
        src = tmp_path / "native"
        convert.from_hf(larger, src)
    disk = tmp_path / "disk"
    disk.mkdir()
    if subprocess.run(
        ["mount", "-t", "tmpfs", "-o", "size=3m", "tmpfs", disk], check=False, capture_output=True
    ).returncode:
        pytest.skip("mounting is not allowed here")
    try:
        with pytest.raises(StorageError, match="are needed and"):
            getattr(convert, direction)(src, disk / "out")
        monkeypatch.setattr(convert, "check_free_space", lambda *_: None)  # space that another process took meanwhile
        with pytest.raises(StorageError):
            getattr(convert, direction)(src, disk / "out")
        assert not list(disk.iterdir())
    finally:
        subprocess.run(["umount", disk], check=True)


# ---- memory ----------------------------------------------------------------------------------------------------------

MEMORY_CHILD = """
import sys, threading, time
from exaone_jax.checkpoints import convert
direction, src, dst, workers = sys.argv[1:]
def anonymous():
    for line in open("/proc/self/status"):
        if line.startswith("RssAnon"):
            return int(line.split()[1]) * 1024
peak, stop = [anonymous()], threading.Event()
def watch():
    while not stop.wait(0.002):
        peak[0] = max(peak[0], anonymous())
thread = threading.Thread(target=watch, daemon=True)
thread.start()
before = anonymous()
getattr(convert, direction)(src, dst, workers=int(workers))
stop.set(); thread.join()
print(before, peak[0])
"""


def peak_memory(direction: str, src: Path, dst: Path, workers: int) -> tuple[int, int]:
    """Anonymous memory of a process of its own, before a conversion and at its peak."""
    run = subprocess.run(
        [sys.executable, "-c", MEMORY_CHILD, direction, str(src), str(dst), str(workers)],
        capture_output=True, text=True, check=True, timeout=500,
        cwd=Path(__file__).parents[2], env=os.environ | {"JAX_PLATFORMS": "cpu"},
    )  # fmt: skip
    before, peak = map(int, run.stdout.split())
    return before, peak


def bounded_model(tmp_path: Path, layers: int, **changes: Any) -> tuple[Path, int, int]:
    """-> a checkpoint, bytes in all, bytes of the largest tensor."""
    config = exaone_moe(layers=layers, **changes)
    path = write_checkpoint(tmp_path / "hf", config, shard_bytes=10**9, finite=False)
    with open_hf(path) as directory:
        return path, directory.nbytes, max(info.nbytes for info in directory.tensors.values())


def check_bound(tmp_path: Path, path: Path, bound: int, workers: int) -> None:
    """Peak anonymous memory <= `bound`, both ways, in processes of their own."""
    for direction, src, dst in (("from_hf", path, tmp_path / "n"), ("to_hf", tmp_path / "n", tmp_path / "b")):
        before, peak = peak_memory(direction, src, dst, workers)
        print(f"{direction}, {workers} workers: before {before:,}, peak {peak:,}, bound {bound:,}")
        assert peak <= bound


def test_memory_bound_of_a_small_model(tmp_path: Path):
    """200 MB in tensors of up to 8 MB. 90 MB is the interpreter with what it imports; 50 MB is slack for allocators."""
    path, total, largest = bounded_model(
        tmp_path,
        24,
        vocab_size=4096,
        hidden_size=1024,
        intermediate_size=2048,
        num_heads=16,
        num_kv_heads=4,
        head_dim=64,
    )
    bound = 2 * largest * 2 + (140 << 20)
    assert total > 190 * 10**6
    assert total > bound - (90 << 20) + largest  # what the bound leaves cannot hold the model
    check_bound(tmp_path, path, bound, workers=2)


@pytest.mark.slow
def test_memory_bound_of_four_gigabytes(tmp_path: Path):
    """The gate of the issue: 2 x the largest unit x workers + 1 GB, on more than 4 GB of tensors."""
    from exaone_jax.config.model import MoEConfig

    moe = MoEConfig(num_experts=16, num_experts_per_tok=2, num_shared_experts=1, intermediate_size=1024)
    config = exaone_moe(
        layers=24,
        vocab_size=51200,
        hidden_size=2048,
        intermediate_size=8192,
        num_heads=16,
        num_kv_heads=4,
        head_dim=128,
    ).model_copy(update={"moe": moe})
    path = write_checkpoint(tmp_path / "hf", config, shard_bytes=10**9)
    with open_hf(path) as directory:
        assert directory.nbytes > 4 * 10**9
        largest = max(info.nbytes for info in directory.tensors.values())
    for workers in (1, 4):
        check_bound(tmp_path, path, 2 * largest * workers + 10**9, workers)
        if workers == 4:
            assert verify(path, tmp_path / "b", allow_nonfinite=True).ok
        shutil.rmtree(tmp_path / "n")
        shutil.rmtree(tmp_path / "b")
