"""`exaone-jax inspect --mesh`: how every parameter is split over a mesh, by shapes alone; no devices are needed."""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any, cast

from flax import nnx
from jax.sharding import AbstractMesh

from exaone_jax.checkpoints.names import ParameterPath, path_name
from exaone_jax.config import ModelConfig
from exaone_jax.errors import ConfigError
from exaone_jax.model import Transformer
from exaone_jax.parallel import MESH_AXES, MeshShape, parameter_shardings
from exaone_jax.parallel.rules import sharded_bytes

if TYPE_CHECKING:
    from rich.console import RenderableType


@dataclass(frozen=True)
class ShardedParameter:
    """One parameter: its whole shape, the mesh axes that split each dimension, and the bytes of one device's part."""

    name: str
    dtype: str
    shape: tuple[int, ...]
    spec: tuple[tuple[str, ...] | None, ...]
    bytes_per_device: int


@dataclass(frozen=True)
class ShardedModel:
    """Every parameter of a model on a mesh."""

    mesh: MeshShape
    devices: int
    parameters: tuple[ShardedParameter, ...]

    @property
    def bytes_per_device(self) -> int:
        return sum(parameter.bytes_per_device for parameter in self.parameters)

    def to_dict(self) -> dict[str, Any]:
        return {
            "mesh": self.mesh.model_dump(),
            "devices": self.devices,
            "bytes_per_device": self.bytes_per_device,
            "parameters": [asdict(parameter) for parameter in self.parameters],
        }

    def render(self) -> RenderableType:
        """The table for people."""
        from rich.markup import escape
        from rich.table import Table

        table = Table(title=f"{self.mesh}: {self.devices:,} devices")
        for name in ("parameter", "shape", "split over"):
            table.add_column(name, overflow="fold")
        table.add_column("bytes a device", justify="right")
        for parameter in self.parameters:
            split = ", ".join("-" if axes is None else "x".join(axes) for axes in parameter.spec)
            shape = ", ".join(map(str, parameter.shape))
            cells = (parameter.name, f"{parameter.dtype} [{shape}]", f"[{split}]", f"{parameter.bytes_per_device:,}")
            table.add_row(*map(escape, cells))
        table.add_section()
        table.add_row("in all", "", "", f"{self.bytes_per_device:,}")
        return table


def shard_model(config: ModelConfig, mesh: MeshShape) -> ShardedModel:
    """The parameters of a model in its own dtype on a mesh of this shape.

    Raises ConfigError where the mesh has an axis of -1, and, with the table of rules, where a parameter does not divide.
    """
    sizes = tuple(getattr(mesh, axis) for axis in MESH_AXES)
    if min(sizes) < 1:
        raise ConfigError(f"mesh {mesh}: there are no devices to count here, expected a size for every axis and no -1")
    model = nnx.eval_shape(lambda: Transformer(config, dtype=config.dtype, rngs=nnx.Rngs(0)))
    state = nnx.state(model)
    shardings = parameter_shardings(state, AbstractMesh(sizes, MESH_AXES))
    parameters = []
    for path, variable in nnx.to_flat_state(state):
        path, value = cast(ParameterPath, path), variable.get_value()
        sharding = shardings[path]
        spec = tuple((axes,) if isinstance(axes, str) else axes for axes in sharding.spec)
        size = sharded_bytes(value, sharding)
        parameters.append(ShardedParameter(path_name(path), str(value.dtype), value.shape, spec, size))
    return ShardedModel(mesh, math.prod(sizes), tuple(parameters))
