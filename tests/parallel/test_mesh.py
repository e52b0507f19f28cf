"""The mesh factory: shapes from text, what does not match the devices, and which axes cross slices."""

import dataclasses
import math

import jax
import numpy as np
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


@dataclasses.dataclass(frozen=True)
class SliceDevice:
    """What a mesh asks of a TPU: a v6e chip of one of several slices."""

    id: int
    slice_index: int
    coords: tuple[int, int, int]
    process_index: int
    core_on_chip: int = 0
    platform: str = "tpu"
    device_kind: str = "TPU v6 lite"


def slices_of(count: int, rows: int, columns: int) -> list[SliceDevice]:
    chips = [(index, x, y) for index in range(count) for y in range(rows) for x in range(columns)]
    return [SliceDevice(i, index, (x, y, 0), index) for i, (index, x, y) in enumerate(chips)]


def test_data_and_what_is_left_of_fsdp_cross_slices():
    across = [(MeshShape(fsdp=32), 4), (MeshShape(data=2, fsdp=16), 4), (MeshShape(data=8, tensor=4), 4)]
    assert [shape.across(32, slices)[:2] for shape, slices in across] == [(1, 4), (2, 2), (4, 1)]
    assert MeshShape(data=6, fsdp=-1).across(24, 4) == (2, 2, 1, 1, 1)
    assert MeshShape(tensor=8).across(8, 1) == (1, 1, 1, 1, 1)


@pytest.mark.parametrize(
    ("shape", "crossing"),
    [
        ("fsdp=8,expert=2,tensor=4", {"fsdp": 4}),
        ("data=4,fsdp=2,expert=2,tensor=4", {"data": 4}),
        ("data=2,fsdp=4,expert=2,context=4", {"data": 2, "fsdp": 2}),
        ("data=2,fsdp=2,tensor=4,context=4", {"data": 2, "fsdp": 2}),
    ],
)
def test_no_other_axis_crosses_slices(shape: str, crossing: dict[str, int]):
    """Four slices of 4 x 4: the devices along an axis are of so many slices, in equal parts, those of one slice together."""
    mesh = make_mesh(MeshShape.parse(shape), slices_of(4, 4, 4))  # pyrefly: ignore[bad-argument-type]
    index = np.vectorize(lambda device: device.slice_index)(mesh.devices)
    assert len({device.id for device in mesh.devices.flat}) == 64
    for place, axis in enumerate(MESH_AXES):
        groups = np.moveaxis(index, place, -1).reshape(-1, index.shape[place])
        for group in groups:
            found, counts = np.unique(group, return_counts=True)
            assert len(found) == crossing.get(axis, 1), axis
            assert len(set(counts)) == 1 and np.count_nonzero(np.diff(group)) == len(found) - 1, axis
    assert math.prod(crossing.values()) == 4


def test_any_axis_of_gpus_may_cross_hosts():
    """jax gives the GPUs of each host a slice of their own."""
    gpus = [dataclasses.replace(device, platform="gpu", device_kind="H100") for device in slices_of(2, 2, 4)]
    mesh = make_mesh(MeshShape(expert=8, tensor=2), gpus)  # pyrefly: ignore[bad-argument-type]
    assert [device.id for device in mesh.devices.flat] == list(range(16))


@pytest.mark.parametrize("shape", ["expert=8,tensor=8", "fsdp=2,tensor=32", "data=2,expert=32"])
def test_axes_that_would_have_to_cross_slices(shape: str):
    with pytest.raises(ConfigError, match="do not divide into 4 slices"):
        make_mesh(MeshShape.parse(shape), slices_of(4, 4, 4))  # pyrefly: ignore[bad-argument-type]
