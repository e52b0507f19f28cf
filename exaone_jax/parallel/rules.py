"""The one table of logical axes: which mesh axes split them."""

import math
from collections.abc import Mapping
from typing import Any, cast

import jax
from flax import nnx
from jax.sharding import AbstractMesh, Mesh, NamedSharding, PartitionSpec

from exaone_jax.errors import ConfigError
from exaone_jax.model.linear import Axes

Path = tuple[str | int, ...]  # of a parameter, as in a flat nnx state
Rules = Mapping[str, tuple[str, ...]]

# Logical axis -> the mesh axes it is split over, major to minor.
RULES: Rules = {
    # parameters
    "layers": (),
    "vocab": ("tensor",),
    "embed": ("fsdp",),
    "norm": (),
    "heads": ("tensor",),
    "kv_heads": ("tensor",),
    "head_dim": (),
    "mlp": ("tensor",),
    "experts": ("expert",),
    "expert_mlp": ("tensor",),
    "mtp_in": (),
    "rank": (),
    # activations
    "batch": ("data", "fsdp", "expert"),
    "sequence": ("context",),
    "features": (),
}


def partition_spec(
    name: str, shape: tuple[int, ...], axes: Axes, mesh: Mesh | AbstractMesh, rules: Rules = RULES
) -> PartitionSpec:
    """How an array of this shape and these logical axes is split over the mesh.

    Mesh axes of size one are left out, so a spec says what is really split.

    Raises:
        ConfigError: with the table, where an axis has no rule, a rule names no axis of the mesh, a mesh axis would split
            two dimensions of the array, or a dimension does not divide.
    """
    used: dict[str, str] = {}
    entries: list[tuple[str, ...] | None] = []
    for size, axis in zip(shape, axes, strict=True):
        if axis not in rules:
            raise _wrong(name, f"logical axis {axis!r} has no rule", rules)
        split = rules[axis]
        for mesh_axis in split:
            if mesh_axis not in mesh.shape:
                raise _wrong(
                    name, f"the rule of {axis!r} names {mesh_axis!r}; the mesh has {', '.join(mesh.shape)}", rules
                )
            if mesh_axis in used:
                raise _wrong(name, f"mesh axis {mesh_axis!r} would split both {used[mesh_axis]!r} and {axis!r}", rules)
            used[mesh_axis] = axis
        parts = math.prod(mesh.shape[mesh_axis] for mesh_axis in split)
        if size % parts:
            raise _wrong(
                name, f"{axis!r} of size {size} does not divide into {parts} parts ({' x '.join(split)})", rules
            )
        entries.append(tuple(mesh_axis for mesh_axis in split if mesh.shape[mesh_axis] > 1) or None)
    return PartitionSpec(*entries)


def parameter_shardings(
    state: nnx.State, mesh: Mesh | AbstractMesh, rules: Rules = RULES
) -> dict[tuple[str | int, ...], NamedSharding]:
    """The sharding of every parameter of a model (arrays or shapes), by its path. Raises ConfigError as partition_spec."""
    shardings = {}
    for path, variable in nnx.to_flat_state(state):
        value, axes = variable.get_value(), variable.get_metadata("axes")
        spec = partition_spec(".".join(map(str, path)), value.shape, axes, mesh, rules)
        shardings[cast(Path, path)] = NamedSharding(mesh, spec)
    return shardings


def sharded_shapes(tree: Any, mesh: Mesh | AbstractMesh) -> Any:
    """A tree of shapes with shardings: parameters, and what an optimizer keeps for each, by their logical axes; scalars whole."""

    def shard(path: jax.tree_util.KeyPath, leaf: Any) -> Any:
        variable = isinstance(leaf, nnx.Variable)
        value = leaf.get_value() if variable else leaf
        if not hasattr(value, "shape"):  # optax masked it out
            return leaf
        spec = PartitionSpec()
        if variable:
            name = jax.tree_util.keystr(path, simple=True, separator=".")
            spec = partition_spec(name, value.shape, leaf.get_metadata("axes"), mesh)
        struct = jax.ShapeDtypeStruct(value.shape, value.dtype, sharding=NamedSharding(mesh, spec))
        return leaf.replace(struct) if variable else struct

    return jax.tree_util.tree_map_with_path(shard, tree, is_leaf=lambda leaf: isinstance(leaf, nnx.Variable))


def sharded_bytes(value: jax.ShapeDtypeStruct | jax.Array, sharding: NamedSharding) -> int:
    """Bytes of one device's part of an array."""
    return math.prod(sharding.shard_shape(value.shape)) * value.dtype.itemsize


def _wrong(name: str, problem: str, rules: Rules) -> ConfigError:
    width = max(map(len, rules))
    table = "\n".join(f"  {axis:{width}} -> {', '.join(split) or '-'}" for axis, split in rules.items())
    return ConfigError(f"{name}: {problem}\nrules:\n{table}")
