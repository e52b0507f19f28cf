"""Loading into arrays: values, dtypes, shardings, and no byte read that a device does not hold."""

import os
import subprocess
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from exaone_jax.checkpoints import convert, load
from exaone_jax.checkpoints.bits import as_bits
from exaone_jax.checkpoints.directory import open_hf
from exaone_jax.checkpoints.names import parameters, path_name, tensor_map
from exaone_jax.errors import CheckpointError
from tests.checkpoints.synthetic import MODELS, exaone4_5, exaone_moe, write_checkpoint


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("form", ["hf", "native"])
def test_every_element_is_in_its_place(name: str, form: str, tmp_path: Path):
    """Against a plain reading of the files, one tensor at a time."""
    config = MODELS[name]
    path = write_checkpoint(tmp_path / "hf", config, shard_bytes=50_000)
    with open_hf(path) as directory:
        tensors = {name: directory.read_rows(name) for name in directory.tensors}
    if form == "native":
        convert.from_hf(path, tmp_path / "native")
        path = tmp_path / "native"
    params = load.read_params(path)
    assert {key: value.shape for key, value in params.items()} == {
        key: parameter.shape for key, parameter in parameters(config).items()
    }
    for tensor in tensor_map(config):
        if not tensor.carried:
            found = as_bits(np.asarray(params[tensor.path]))[tensor.index]
            np.testing.assert_array_equal(found, tensors[tensor.name], tensor.name)


@pytest.mark.parametrize("form", ["hf", "native"])
def test_dtype(form: str, tmp_path: Path):
    path = write_checkpoint(tmp_path / "hf", exaone_moe(), finite=True)
    if form == "native":
        convert.from_hf(path, tmp_path / "native")
        path = tmp_path / "native"
    stored = load.read_params(path)
    for dtype in (jnp.float32, jnp.bfloat16, jnp.float16, "bfloat16"):
        loaded = load.read_params(path, dtype=dtype)
        for key, value in loaded.items():
            wanted = stored[key] if key[-1] == "bias" else stored[key].astype(dtype)
            assert value.dtype == wanted.dtype
            np.testing.assert_array_equal(np.asarray(value), np.asarray(wanted))
    with pytest.raises(CheckpointError, match="cannot be loaded as int8"):
        load.read_params(path, dtype="int8")


def test_bias_that_was_saved_in_bfloat16_is_loaded_in_float32(tmp_path: Path):
    """model.to(bfloat16) before saving rounds the bias; what is left of it is kept in float32."""
    from exaone_jax.checkpoints.safetensors import SafetensorsFile, write_file

    path = write_checkpoint(tmp_path / "hf", exaone_moe(), finite=True)
    with SafetensorsFile(path / "model.safetensors") as file:
        tensors = {name: (info.dtype, file.read_rows(name)) for name, info in file.header.tensors.items()}
    for name, (_, bits) in tensors.items():
        if name.endswith("bias"):
            tensors[name] = ("BF16", (bits >> 16).astype(np.uint16))
    (path / "model.safetensors").unlink()
    write_file(path / "model.safetensors", tensors)
    before = (path / "model.safetensors").read_bytes()
    bias = next(value for key, value in load.read_params(path).items() if key[-1] == "bias")
    assert bias.dtype == jnp.float32
    convert.from_hf(path, tmp_path / "native")
    convert.to_hf(tmp_path / "native", tmp_path / "back")
    assert (tmp_path / "back" / "model.safetensors").read_bytes() == before


def test_carried_tensors_are_not_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    from exaone_jax.checkpoints.safetensors import SafetensorsFile

    path, seen = write_checkpoint(tmp_path / "hf", exaone4_5()), []
    read = SafetensorsFile.read_rows
    monkeypatch.setattr(
        SafetensorsFile, "read_rows", lambda self, name, *rows: seen.append(name) or read(self, name, *rows)
    )
    load.read_params(path)
    assert seen
    assert not any("visual" in name for name in seen)


SHARDED = """
import sys
import jax, numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec as P
from exaone_jax.checkpoints import load, safetensors
from exaone_jax.checkpoints.names import parameters
path = sys.argv[1]
assert jax.device_count() == 4
mesh = Mesh(np.array(jax.devices()).reshape(2, 2), ("a", "b"))
whole = load.read_params(path)
def spec(parameter, number):
    # each parameter is cut in another way: last axis, the one before, experts, or two of them
    ndim, choice = len(parameter.shape), number % 4
    axes = [None] * ndim
    if ndim >= 2 and parameter.shape[-1] % 4 == 0 and parameter.shape[-2] % 4 == 0:
        if choice in (0, 2): axes[-1] = "a"
        if choice in (1, 2): axes[-2] = "b"
        if choice == 3: axes[-2] = ("a", "b")
        if ndim == 4: axes[1], axes[-1], axes[-2] = ("a", "b"), None, None
    return NamedSharding(mesh, P(*axes))
config = load.checkpoint_config(path)
shardings = {key: spec(p, n) for n, (key, p) in enumerate(parameters(config).items())}
counted = [0]
original = safetensors.SafetensorsFile._read
def counting(self, out, start):
    counted[0] += out.size
    return original(self, out, start)
safetensors.SafetensorsFile._read = counting
loaded = load.read_params(path, mesh_shardings=shardings)
for key, value in loaded.items():
    assert value.sharding == shardings[key], key
    assert np.array_equal(np.asarray(value).view(np.uint8), np.asarray(whole[key]).view(np.uint8)), key
    for shard in value.addressable_shards:
        assert shard.data.shape == shardings[key].shard_shape(value.shape)
print("bytes", counted[0])
"""


@pytest.mark.parametrize("form", ["hf", "native"])
def test_sharded_on_four_devices(form: str, tmp_path: Path):
    path = write_checkpoint(tmp_path / "hf", exaone_moe(), shard_bytes=100_000)
    if form == "native":
        convert.from_hf(path, tmp_path / "native")
        path = tmp_path / "native"
    run = subprocess.run(
        [sys.executable, "-c", SHARDED, str(path)],
        capture_output=True, text=True, cwd=Path(__file__).parents[2],
        env=os.environ | {"JAX_PLATFORMS": "cpu", "JAX_NUM_CPU_DEVICES": "4"},
    )  # fmt: skip
    assert run.returncode == 0, run.stderr
    assert "bytes" in run.stdout


def test_rows_of_other_devices_are_not_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """A device that holds one half of the experts and a quarter of the vocabulary reads those rows only."""
    config = exaone_moe()
    path = write_checkpoint(tmp_path / "hf", config)
    with open_hf(path) as directory:
        rows: list[tuple[str, int, int | None]] = []
        read = type(directory).read_rows

        def counting(self: object, name: str, begin: int = 0, end: int | None = None) -> np.ndarray:
            rows.append((name, begin, end))
            return read(directory, name, begin, end)

        monkeypatch.setattr(type(directory), "read_rows", counting)
        embedding, experts = (
            next(p for key, p in parameters(config).items() if path_name(key).endswith(end))
            for end in ("embed.embedding", "experts.down_proj")
        )
        load._reader(directory, embedding, None)((slice(24, 48), slice(0, 32)))
        assert rows == [("model.embed_tokens.weight", 24, 48)]
        rows.clear()
        load._reader(directory, experts, None)((slice(0, 1), slice(2, 4), slice(8, 16), slice(0, 24)))
        assert [row[1:] for row in rows] == [(8, 16), (8, 16)]
        assert ["experts.2." in row[0] or "experts.3." in row[0] for row in rows] == [True, True]


def test_missing_sharding_is_an_error(tmp_path: Path):
    path = write_checkpoint(tmp_path / "hf", exaone_moe())
    with pytest.raises(KeyError):
        load.read_params(path, mesh_shardings={})
    sharding = jax.sharding.SingleDeviceSharding(jax.devices()[0])
    loaded = load.read_params(path, mesh_shardings=dict.fromkeys(parameters(exaone_moe()), sharding))
    assert all(value.sharding == sharding for value in loaded.values())
