"""The public face: a model from a checkpoint directory, text from a model."""

import os
from pathlib import Path
from typing import cast

import jax
import jax.numpy as jnp
from flax import nnx
from jax.sharding import Mesh

from exaone_jax.checkpoints.load import open_checkpoint, read_open
from exaone_jax.checkpoints.names import ParameterPath
from exaone_jax.errors import InputError
from exaone_jax.inference.text import generate, remember_source
from exaone_jax.model import Transformer
from exaone_jax.model.placement import ONE_DEVICE
from exaone_jax.model.relayout import with_layers
from exaone_jax.parallel import RULES, Rules, parameter_shardings, place

__all__ = ["generate", "load"]

_DTYPES = ("float32", "bfloat16", "float16")


def load(
    path: str | os.PathLike[str],
    *,
    dtype: str | None = None,
    mesh: Mesh | None = None,
    rules: Rules = RULES,
    scan_layers: bool | None = None,
) -> Transformer:
    """A model with the weights of a Hugging Face directory (sharded or not) or a native checkpoint.

    Args:
        path: the directory.
        dtype: "float32", "bfloat16" or "float16", of weights and activations; None: what config.json says. The router
            bias is float32 always.
        mesh: from `exaone_jax.parallel.make_mesh`: every device reads its own part of each array, and no host holds a whole
            one that is split. None: the default device.
        rules: which mesh axes split which logical axis.
        scan_layers: keep repeated layers stacked and scan them; None: yes, but not on one CPU device, where decoding
            would copy each layer's weights out of the stack at every token.

    Raises CheckpointError or ConfigError that name the file and what is wrong with it, before any weight is read
    where the headers show it; ConfigError where a rule cannot split an array.
    """
    if dtype is not None and dtype not in _DTYPES:
        raise InputError(f"dtype must be one of {', '.join(_DTYPES)}, found {dtype!r}")
    config, checkpoint = open_checkpoint(Path(path))
    with checkpoint:
        compute = jnp.dtype(dtype or config.dtype)
        placement = ONE_DEVICE if mesh is None else place(config, mesh, rules)
        graphdef, state = nnx.split(
            nnx.eval_shape(lambda: Transformer(config, dtype=compute, rngs=nnx.Rngs(0), placement=placement))
        )
        shardings = None if mesh is None else parameter_shardings(state, mesh, rules)
        params = read_open(config, checkpoint, dtype=compute, mesh_shardings=shardings)
    filled = [(key, leaf.replace(params.pop(cast(ParameterPath, key)))) for key, leaf in nnx.to_flat_state(state)]
    model = nnx.merge(graphdef, nnx.from_flat_state(filled))
    scan = (mesh is not None or jax.default_backend() != "cpu") if scan_layers is None else scan_layers
    model = with_layers(model, scan=scan)
    remember_source(model, Path(path))
    return model
