"""One mesh factory, one table of logical axis -> mesh axes, and what runs across devices."""

from exaone_jax.parallel.mesh import MESH_AXES, MeshShape, copies, make_mesh
from exaone_jax.parallel.placement import MeshPlacement, init_model, place
from exaone_jax.parallel.rules import RULES, Rules, parameter_shardings, partition_spec, sharded_shapes

__all__ = [
    "MESH_AXES",
    "RULES",
    "MeshPlacement",
    "MeshShape",
    "Rules",
    "copies",
    "init_model",
    "make_mesh",
    "parameter_shardings",
    "partition_spec",
    "place",
    "sharded_shapes",
]
