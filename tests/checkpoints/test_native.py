"""The native form: stock Orbax restores it, damage is found, bits survive."""

import json
import shutil
from pathlib import Path

import jax
import numpy as np
import orbax.checkpoint as ocp
import pytest
from flax import nnx

from exaone_jax.checkpoints import convert, load
from exaone_jax.checkpoints.bits import as_bits
from exaone_jax.checkpoints.names import parameters, path_name
from exaone_jax.checkpoints.native import CHUNK_BYTES, MANIFEST, NativeDirectory, rows_per_chunk
from exaone_jax.errors import CheckpointError
from tests.checkpoints.synthetic import exaone, exaone_moe, write_checkpoint


def nested(flat: dict) -> dict:
    """A flat dict keyed by path as nested dicts, the keys as they are (integers under `segments`)."""
    tree: dict = {}
    for path, value in flat.items():
        node = tree
        for key in path[:-1]:
            node = node.setdefault(key, {})
        node[path[-1]] = value
    return tree


def same_bits(a: jax.Array, b: jax.Array) -> bool:
    one, other = np.asarray(a), np.asarray(b)
    return one.dtype == other.dtype and np.array_equal(as_bits(one), as_bits(other))


@pytest.fixture(scope="module")
def native(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("native")
    source = write_checkpoint(root / "hf", exaone_moe())
    convert.from_hf(source, root / "native")
    return root / "native"


def flat_keys(tree: dict, prefix: tuple = ()) -> dict:
    flat = {}
    for key, value in tree.items():
        flat |= flat_keys(value, (*prefix, key)) if isinstance(value, dict) else {(*prefix, key): value}
    return flat


def test_orbax_restores_without_a_target(native: Path):
    restored = ocp.PyTreeCheckpointer().restore(native / "params")
    ours = load.read_params(native)
    flat = {".".join(map(str, path)): value for path, value in flat_keys(restored).items()}
    assert flat.keys() == {path_name(path) for path in ours}
    for path, value in ours.items():
        assert same_bits(value, flat[path_name(path)]), path


@pytest.mark.parametrize("keys", ["int", "str"])
def test_orbax_restores_into_an_abstract_tree_with_shardings(native: Path, keys: str):
    """The tree of `nnx.to_pure_dict` has integer keys where the model has lists; both spellings restore."""
    sharding = jax.sharding.SingleDeviceSharding(jax.devices()[0])
    ours = load.read_params(native)

    def abstract(value: jax.Array) -> jax.ShapeDtypeStruct:
        return jax.ShapeDtypeStruct(value.shape, value.dtype, sharding=sharding)

    target = nested({path if keys == "int" else tuple(map(str, path)): abstract(value) for path, value in ours.items()})
    with ocp.StandardCheckpointer() as checkpointer:
        restored = checkpointer.restore(native / "params", target)
    for path, value in flat_keys(restored).items():
        wanted = next(ours[p] for p in ours if path_name(p) == path_name(path))
        assert same_bits(value, wanted)
        assert value.sharding == sharding


def test_orbax_restores_an_nnx_state(native: Path):
    """Into the state of a module with the same structure: here a stand-in with one parameter."""
    ours = load.read_params(native)
    path = ("norm", "scale")
    state = nnx.State({"norm": {"scale": nnx.Param(jax.ShapeDtypeStruct(ours[path].shape, ours[path].dtype))}})
    target = nnx.to_pure_dict(state)
    args = ocp.args.PyTreeRestore(item=target, partial_restore=True)
    restored = ocp.Checkpointer(ocp.PyTreeCheckpointHandler()).restore(native / "params", args=args)
    assert same_bits(restored["norm"]["scale"], ours[path])


def test_one_chunk_a_layer_and_expert(native: Path):
    """Each tensor is one file, so it can be written when it is read, and a host reads only the layers it holds."""
    config = exaone_moe()
    for path, parameter in parameters(config).items():
        chunks = list((native / "params" / path_name(path)).glob("c.*"))
        assert len(chunks) == len(parameter.tensors)
        codecs = json.loads((native / "params" / path_name(path) / "zarr.json").read_text())["codecs"]
        assert [codec["name"] for codec in codecs][-2:] == ["bytes", "crc32c"]
        size = parameter.tensors[0].size * (4 if parameter.keep_float32 else 2)
        assert {chunk.stat().st_size for chunk in chunks} == {size + 4}


def test_rows_per_chunk():
    assert rows_per_chunk((100, 50), 2) == 100
    assert rows_per_chunk((), 4) == 1
    assert rows_per_chunk((0, 3), 4) == 1
    for shape in ((153_600, 6_144), (102_400, 5_120), (27_392, 5_120), (10_007, 8_192)):  # the last: a prime
        rows = rows_per_chunk(shape, 2)
        assert rows * shape[1] * 2 <= CHUNK_BYTES
        assert rows * shape[1] * 2 > CHUNK_BYTES / 4
    assert 153_600 % rows_per_chunk((153_600, 6_144), 2) == 0


def damaged(native: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(native, tmp_path / "damaged"))


CHUNK = "params/segments.0.0.attention.q_proj.weight/c.0.0.0"


def test_a_flipped_bit_is_found(native: Path, tmp_path: Path):
    path = damaged(native, tmp_path)
    rng = np.random.default_rng(0)
    data = (path / CHUNK).read_bytes()
    for bit in rng.integers(0, 8 * len(data), 10):
        changed = bytearray(data)
        changed[bit // 8] ^= 1 << (bit % 8)
        (path / CHUNK).write_bytes(changed)
        with pytest.raises(CheckpointError, match=r"q_proj.*cannot be read"):
            load.read_params(path)
        with pytest.raises(CheckpointError, match="cannot be read"):
            convert.to_hf(path, tmp_path / "out")
    assert not list(tmp_path.glob("out*"))


@pytest.mark.parametrize("change", ["gone", "short", "empty"])
def test_a_damaged_chunk_is_found(native: Path, tmp_path: Path, change: str):
    path = damaged(native, tmp_path)
    if change == "gone":
        (path / CHUNK).unlink()
    else:
        (path / CHUNK).write_bytes((path / CHUNK).read_bytes()[: -7 if change == "short" else 0])
    with pytest.raises(CheckpointError, match="cannot be read"):
        load.read_params(path)


@pytest.mark.parametrize(
    ("file", "text", "message"),
    [
        (MANIFEST, "{", "not valid JSON"),
        (MANIFEST, "[" * 100_000, "exaone_jax.json: not valid JSON"),
        (MANIFEST, "{}", "not the manifest"),
        (MANIFEST, '{"format": "exaone_jax native checkpoint", "version": 2}', "version 2"),
        (MANIFEST, '{"format": "exaone_jax native checkpoint", "version": true}', "version True, this release reads 1"),
        (MANIFEST, '{"format": "exaone_jax native checkpoint", "version": 1}', "damaged"),
        ("params/norm.scale/zarr.json", "{", "cannot be opened"),
        ("source/00000.header", "gone", "damaged"),
    ],
)
def test_damaged_metadata(native: Path, tmp_path: Path, file: str, text: str, message: str):
    path = damaged(native, tmp_path)
    (path / file).unlink() if text == "gone" else (path / file).write_text(text)
    with pytest.raises(CheckpointError, match=message):
        NativeDirectory(path)


def edit_manifest(path: Path, keys: tuple[str | int, ...], value: object) -> None:
    raw = json.loads((path / MANIFEST).read_text())
    place = raw
    for key in keys[:-1]:
        place = place[key]
    place[keys[-1]] = value
    (path / MANIFEST).write_text(json.dumps(raw))


@pytest.mark.parametrize(
    "name", ["../../escaped.safetensors", "/tmp/escaped.safetensors", "..\\x.safetensors", "C:x.safetensors", "x", ""]
)
def test_source_files_stay_in_the_output(native: Path, tmp_path: Path, name: str):
    path = damaged(native, tmp_path)
    edit_manifest(path, ("source", "files", 0, "name"), name)
    with pytest.raises(CheckpointError, match=r"exaone_jax.json: .* is not the name of a .safetensors file"):
        convert.to_hf(path, tmp_path / "a" / "b" / "out")
    assert [entry.name for entry in tmp_path.iterdir()] == ["damaged"]


@pytest.fixture(scope="module")
def sharded(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A native checkpoint that came in three shards."""
    root = tmp_path_factory.mktemp("sharded")
    convert.from_hf(write_checkpoint(root / "hf", exaone(), shard_bytes=30_000), root / "native")
    return root / "native"


def drop(weight_map: dict, name: str) -> dict:
    return {key: file for key, file in weight_map.items() if key != name}


NORM = "transformer.ln_f.weight"


@pytest.mark.parametrize(
    ("index", "message"),
    [
        (lambda _: "junk", "not valid JSON"),
        (lambda _: {"weight_map": {"a": "../../x.safetensors"}}, "expected the name of a .safetensors file"),
        (lambda _: {"weight_map": {"a": "x.safetensors"}}, "'a' is said to be in x.safetensors; no file has it"),
        (lambda index: index | {"weight_map": drop(index["weight_map"], NORM)}, f"does not list:\n  '{NORM}'"),
        (lambda index: index | {"metadata": {"total_size": 1}}, "total_size is 1, the files hold"),
    ],
    ids=["junk", "outside", "other", "short", "size"],
)
def test_recorded_index_must_fit_the_recorded_files(sharded: Path, tmp_path: Path, index, message: str):
    path = damaged(sharded, tmp_path)
    file = path / "source" / "index.json"
    changed = index(json.loads(file.read_text()))
    file.write_text(changed if isinstance(changed, str) else json.dumps(changed))
    for dry_run in (True, False):
        with pytest.raises(CheckpointError, match=rf"(?s)source/index.json: .*{message}|index.json\n.*{message}"):
            convert.to_hf(path, tmp_path / "out", dry_run=dry_run)
    assert [entry.name for entry in tmp_path.iterdir()] == ["damaged"]
    convert.to_hf(path, tmp_path / "out", max_shard_bytes=10**9)  # writes a layout of its own


def test_recorded_shards_need_an_index(sharded: Path, tmp_path: Path):
    path = damaged(sharded, tmp_path)
    edit_manifest(path, ("source", "index"), False)
    with pytest.raises(CheckpointError, match=r"exaone_jax.json: records model-00001-of-.* without an index"):
        convert.to_hf(path, tmp_path / "out")
    assert not (tmp_path / "out").exists()


DTYPE = ("dtypes", "norm.scale")


@pytest.mark.parametrize(
    ("keys", "value", "message"),
    [
        (DTYPE, "BOGUS", "'norm.scale' has unknown dtype 'BOGUS'"),
        (DTYPE, 5, "dtypes.norm.scale: "),
        (DTYPE, [], "dtypes.norm.scale: "),
        (("dtypes",), ["BF16"], "dtypes: "),
        (("mtp",), "yes", "mtp: "),
        (("copied",), {"a": 1}, "copied.a: "),
        (("carried", "x"), {"dtype": "BOGUS", "shape": [1]}, "'x' has unknown dtype"),
        (("carried", "x"), {"dtype": "BF16", "shape": ["1"]}, "carried.x.shape.0: "),
        (("carried", "x"), {"dtype": "BF16", "shape": [-1]}, "carried.x.shape.0: "),
        (("carried", "x"), {"dtype": "BF16", "shape": 1}, "carried.x.shape: "),
        (("carried", "\x1b[2J\ud800"), 1, r"carried.*: "),
        (("source",), [], "source: "),
        (("source", "files", 0), "x", "source.files.0: "),
        (("source", "files", 0, "size"), "12", "source.files.0.size: "),
        (("source", "files", 0, "size"), 1.5, "source.files.0.size: "),
        (("source", "files", 0, "name"), None, "source.files.0.name: "),
    ],
)
def test_damaged_manifest(native: Path, tmp_path: Path, keys: tuple[str | int, ...], value: object, message: str):
    path = damaged(native, tmp_path)
    edit_manifest(path, keys, value)
    with pytest.raises(CheckpointError, match=rf"exaone_jax.json: .*{message}") as raised:
        NativeDirectory(path)
    assert str(raised.value).isprintable()


def test_config_of_another_model(native: Path, tmp_path: Path):
    path = damaged(native, tmp_path)
    raw = json.loads((path / "config.json").read_text()) | {"vocab_size": 95}
    (path / "config.json").write_text(json.dumps(raw))
    with pytest.raises(
        CheckpointError, match=r"embed.embedding: found bfloat16 of shape \[96, 32\], expected .* \[95, 32\]"
    ):
        load.read_params(path)


def test_a_directory_that_is_not_native(tmp_path: Path):
    with pytest.raises(CheckpointError, match="is missing"):
        NativeDirectory(tmp_path)
