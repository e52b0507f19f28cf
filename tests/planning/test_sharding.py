"""`inspect --mesh`: every parameter of a published model on a mesh that no machine here has."""

import math

import pytest

from exaone_jax.config import published, read_config
from exaone_jax.errors import ConfigError
from exaone_jax.parallel import MeshShape
from exaone_jax.planning.sharding import shard_model
from tests.test_cli import run_json


def test_k_exaone_on_512_chips():
    config = read_config(published("K-EXAONE-236B-A23B"))
    sharded = shard_model(config, MeshShape(fsdp=16, expert=8, tensor=4))
    assert sharded.devices == 512
    by_name = {parameter.name: parameter for parameter in sharded.parameters}
    experts = by_name["segments.1.0.moe.experts.down_proj"]
    assert experts.shape == (11, 128, config.hidden_size, config.moe.intermediate_size)
    assert experts.spec == (None, ("expert",), ("fsdp",), ("tensor",))
    assert experts.bytes_per_device == math.prod(experts.shape) * 2 // 512
    assert by_name["segments.1.0.attention.q_proj.weight"].spec == (None, ("tensor",), ("fsdp",))
    assert by_name["norm.scale"].spec == (None,)
    # What is not split over everything (attention over 64 of 512, norms whole) makes the sum more than an even share.
    assert 1.0 < sharded.bytes_per_device / (237_099_669_632 * 2 / 512) < 1.5


def test_one_device_holds_all_and_bias_is_float32():
    sharded = shard_model(read_config(published("K-EXAONE-236B-A23B")), MeshShape())
    biases = [parameter for parameter in sharded.parameters if parameter.dtype == "float32"]
    assert {parameter.name.split(".")[-1] for parameter in biases} == {"bias"}
    wider = sum(math.prod(parameter.shape) * 2 for parameter in biases)
    assert sharded.bytes_per_device == 237_099_669_632 * 2 + wider


def test_the_command_line(capsys: pytest.CaptureFixture[str]):
    code, out = run_json(capsys, "inspect", "EXAONE-4.0-1.2B", "--mesh", "fsdp=2, tensor=4")
    assert code == 0
    assert out["sharding"]["devices"] == 8
    assert {"name", "dtype", "shape", "spec", "bytes_per_device"} == out["sharding"]["parameters"][0].keys()
    code, out = run_json(capsys, "inspect", "EXAONE-4.0-1.2B", "--mesh", "tensor=7")
    assert code == 2
    assert "does not divide into 7 parts" in out["error"]["message"]
    assert "kv_heads" in out["error"]["message"]


def test_what_is_left_over_is_not_known():
    with pytest.raises(ConfigError, match="no -1"):
        shard_model(read_config(published("EXAONE-4.0-1.2B")), MeshShape(fsdp=-1))
