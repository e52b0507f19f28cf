"""Logical axes to mesh axes: specs of every parameter of every published model, and rules that cannot be."""

import pytest
from flax import nnx
from jax.sharding import AbstractMesh, PartitionSpec

from exaone_jax.config import published, published_names, read_config
from exaone_jax.errors import ConfigError
from exaone_jax.model import Transformer
from exaone_jax.parallel import MESH_AXES, RULES, partition_spec

SIZES = {"fsdp": 4, "expert": 2, "tensor": 2}
MESH = AbstractMesh(tuple(SIZES.get(axis, 1) for axis in MESH_AXES), MESH_AXES)


@pytest.mark.parametrize("name", published_names())
def test_every_parameter_of_every_published_model_is_split(name: str):
    config = read_config(published(name))
    state = nnx.state(nnx.eval_shape(lambda: Transformer(config, rngs=nnx.Rngs(0))))
    for path, variable in nnx.to_flat_state(state):
        shape, axes = variable.get_value().shape, variable.get_metadata("axes")
        spec = partition_spec(str(path), shape, axes, MESH)
        parts = [axis for entry in spec if entry for axis in ((entry,) if isinstance(entry, str) else entry)]
        split = path[-1] in ("weight", "embedding", "gate_proj", "up_proj", "down_proj", "bias")
        assert bool(parts) == split, (path, spec)
        if "experts" in path:
            assert sorted(parts) == ["expert", "fsdp", "tensor"], (path, spec)


def test_axes_of_size_one_are_left_out():
    assert partition_spec("w", (8, 8), ("embed", "mlp"), MESH) == PartitionSpec(("fsdp",), ("tensor",))
    assert partition_spec("x", (8, 8), ("batch", "sequence"), MESH) == PartitionSpec(("fsdp", "expert"), None)


@pytest.mark.parametrize(
    ("shape", "axes", "rules", "message"),
    [
        ((8, 8), ("embed", "width"), RULES, "'width' has no rule"),
        ((8, 8), ("embed", "mlp"), RULES | {"mlp": ("model",)}, "names 'model'"),
        ((8, 8), ("embed", "mlp"), RULES | {"mlp": ("fsdp",)}, "would split both 'embed' and 'mlp'"),
        ((6, 8), ("embed", "mlp"), RULES, "'embed' of size 6 does not divide into 4 parts"),
    ],
)
def test_rules_that_cannot_be(shape, axes, rules, message: str):
    with pytest.raises(ConfigError, match=message) as error:
        partition_spec("layer.weight", shape, axes, MESH, rules)
    assert "layer.weight" in str(error.value)
    assert "vocab   " in str(error.value)  # the table
