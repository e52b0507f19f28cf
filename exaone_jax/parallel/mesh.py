"""The one place that makes a device mesh and decides its axis types."""

import math
import re
from collections.abc import Sequence

import jax
import numpy as np
from jax.experimental import mesh_utils
from jax.sharding import AxisType, Mesh
from pydantic import BaseModel, ConfigDict, Field

from exaone_jax.errors import ConfigError

MESH_AXES = ("data", "fsdp", "expert", "tensor", "context")
_REST = -1


class MeshShape(BaseModel):
    """How many devices lie along each axis. One axis may be -1: as many as are left.

    data: whole copies of the model. fsdp: weights and batch are split over it. expert: experts and batch are. tensor:
    heads, MLP width and vocabulary are. context: the sequence is. Of these, data and fsdp may cross slices.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    data: int = Field(default=1, ge=_REST)
    fsdp: int = Field(default=1, ge=_REST)
    expert: int = Field(default=1, ge=_REST)
    tensor: int = Field(default=1, ge=_REST)
    context: int = Field(default=1, ge=_REST)

    @classmethod
    def parse(cls, text: str) -> "MeshShape":
        """From "fsdp=4,tensor=2". Raises ConfigError that names the part that is wrong."""
        sizes: dict[str, int] = {}
        for part in text.replace(" ", "").split(","):
            axis, _, size = part.partition("=")
            if axis not in MESH_AXES or axis in sizes or not re.fullmatch("-?[0-9]{1,9}", size):
                raise ConfigError(f"mesh: found {part!r}, expected AXIS=SIZE, each axis of {', '.join(MESH_AXES)} once")
            sizes[axis] = int(size)
        if bad := [f"{axis}={size}" for axis, size in sizes.items() if size < _REST or size == 0]:
            raise ConfigError(f"mesh: found {', '.join(bad)}, expected sizes of at least 1, or -1 for the rest")
        return cls(**sizes)

    def sizes(self, num_devices: int) -> tuple[int, ...]:
        """Sizes in the order of MESH_AXES for so many devices. Raises ConfigError where they cannot be laid out so."""
        wanted = [getattr(self, axis) for axis in MESH_AXES]
        fixed = math.prod(size for size in wanted if size != _REST)
        if wanted.count(_REST) > 1:
            raise ConfigError(f"mesh {self}: one axis at most may be -1")
        if _REST in wanted and num_devices % fixed == 0:
            wanted[wanted.index(_REST)] = num_devices // fixed
        if _REST in wanted or math.prod(wanted) != num_devices:
            raise ConfigError(
                f"mesh {self}: found {num_devices} devices, expected {fixed}{' or a multiple' * (_REST in wanted)}"
            )
        return tuple(wanted)

    def across(self, num_devices: int, num_slices: int) -> tuple[int, ...]:
        """Of each size, the factor that crosses slices: in `data` as much of their number as divides it, in `fsdp` the rest.

        Raises ConfigError where an axis that must not would have to cross slices.
        """
        sizes = dict(zip(MESH_AXES, self.sizes(num_devices), strict=True))
        data = math.gcd(sizes["data"], num_slices)
        fsdp = num_slices // data
        if sizes["fsdp"] % fsdp:
            raise ConfigError(
                f"mesh {self}: data={sizes['data']} and fsdp={sizes['fsdp']} do not divide into {num_slices} slices, "
                "which only these two may cross"
            )
        return tuple({"data": data, "fsdp": fsdp}.get(axis, 1) for axis in MESH_AXES)

    def __str__(self) -> str:
        named = [f"{axis}={getattr(self, axis)}" for axis in MESH_AXES if getattr(self, axis) != 1]
        return ",".join(named) or "one device"


def make_mesh(shape: MeshShape, devices: Sequence[jax.Device] | None = None) -> Mesh:
    """A mesh with the axes of MESH_AXES over `devices` (None: all there are), laid out as the interconnect likes it.

    Axes are `Auto`: the compiler propagates shardings from those of the parameters and the constraints of the model. Where
    TPUs belong to several slices, the outer parts of `data` and `fsdp` are slices (`MeshShape.across`) and all else stays
    within one. GPUs lie in their order, host after host: any axis may cross hosts, the outer ones do first.

    Raises ConfigError where the shape does not match the devices or their slices.
    """
    devices = list(jax.devices() if devices is None else devices)
    sizes = shape.sizes(len(devices))
    if devices[0].platform != "tpu":
        grid = np.array(devices).reshape(sizes)
    elif (num_slices := len({getattr(device, "slice_index", 0) for device in devices})) > 1:
        across = shape.across(len(devices), num_slices)
        within = tuple(size // slices for size, slices in zip(sizes, across, strict=True))
        grid = mesh_utils.create_hybrid_device_mesh(within, across, devices, allow_split_physical_axes=True)
    else:
        grid = mesh_utils.create_device_mesh(sizes, devices, allow_split_physical_axes=True)
    return Mesh(grid, MESH_AXES, axis_types=(AxisType.Auto,) * len(MESH_AXES))


def copies(mesh: Mesh) -> list[Mesh]:
    """For each part of `data`, which holds a whole copy of the model: a mesh of its devices alone, with all the axes."""
    return [Mesh(part[None], mesh.axis_names, axis_types=mesh.axis_types) for part in mesh.devices]
