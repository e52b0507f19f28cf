"""Compiles for a TPU that is not there: libtpu's compiler runs on any machine."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

TOPOLOGIES = {"v5e": "v5e:2x2", "v5p": "v5p:2x2x1", "v6e": "v6e:2x2", "tpu7x": "tpu7x:2x2x1"}


def mesh_of(chip: str) -> jax.sharding.Mesh:
    """One device of `chip`."""
    from jax.experimental import topologies

    devices = topologies.get_topology_desc(platform="tpu", topology_name=TOPOLOGIES[chip]).devices
    return jax.sharding.Mesh(np.array(devices[:1]), ("x",), axis_types=(jax.sharding.AxisType.Auto,))


def here(mesh: jax.sharding.Mesh) -> jax.sharding.NamedSharding:
    return jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec())


def compile_for(chip: str, function: Callable[..., Any], *shapes: Any) -> Any:
    """The program of `function` for one device of `chip`; `shapes` are trees of what `array` makes."""
    mesh = mesh_of(chip)
    placed = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=here(mesh)), shapes)
    with jax.set_mesh(mesh):
        return jax.jit(function).trace(*placed).lower(lowering_platforms=("tpu",)).compile()


def array(shape: tuple[int, ...], dtype: Any) -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct(shape, jnp.dtype(dtype))
