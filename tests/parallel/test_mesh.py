"""The mesh factory: shapes from text, and what does not match the devices."""

import jax
import pytest

from exaone_jax.errors import ConfigError
from exaone_jax.parallel import MESH_AXES, MeshShape, make_mesh


def test_parse_and_sizes():
    shape = MeshShape.parse("fsdp=4, tensor=2")
    assert shape.sizes(8) == (1, 4, 1, 2, 1)
    assert str(shape) == "fsdp=4,tensor=2"
    assert MeshShape.parse(str(shape)) == shape
    assert MeshShape().sizes(1) == (1, 1, 1, 1, 1)


def test_one_axis_takes_the_rest():
    assert MeshShape(data=-1, expert=2).sizes(8) == (4, 1, 2, 1, 1)


@pytest.mark.parametrize(
    "text", ["model=2", "fsdp", "fsdp=two", "fsdp=2,fsdp=2", "fsdp=", "=2", "", ",", "fsdp=2,", "fsdp=--2", "fsdp=²"]
)
def test_text_that_is_no_mesh(text: str):
    with pytest.raises(ConfigError, match="expected AXIS=SIZE"):
        MeshShape.parse(text)


@pytest.mark.parametrize("text", ["fsdp=0", "fsdp=-2"])
def test_sizes_that_are_none(text: str):
    with pytest.raises(ConfigError, match="at least 1"):
        MeshShape.parse(text)


@pytest.mark.parametrize(("shape", "devices"), [(MeshShape(fsdp=4), 8), (MeshShape(fsdp=3, data=-1), 8)])
def test_devices_that_do_not_match(shape: MeshShape, devices: int):
    with pytest.raises(ConfigError, match="found 8 devices, expected"):
        shape.sizes(devices)


def test_only_one_axis_may_be_the_rest():
    with pytest.raises(ConfigError, match="at most"):
        MeshShape(fsdp=-1, data=-1).sizes(8)


def test_mesh_has_every_axis_and_propagates():
    mesh = make_mesh(MeshShape(), jax.devices()[:1])
    assert mesh.axis_names == MESH_AXES
    assert set(mesh.axis_types) == {jax.sharding.AxisType.Auto}
