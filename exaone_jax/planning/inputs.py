"""The arrays that a step takes, as shapes with shardings: nothing is allocated, and the mesh may be abstract."""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import cache, lru_cache
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from flax import nnx
from jax.sharding import AbstractMesh, Mesh, NamedSharding

from exaone_jax.config import ModelConfig, layer_plan
from exaone_jax.config.model import DType
from exaone_jax.config.run import LoraConfig
from exaone_jax.costs.workload import Mode, Workload
from exaone_jax.errors import ConfigError
from exaone_jax.model import Transformer
from exaone_jax.model.cache import CACHE_AXES, KVCache, init_cache
from exaone_jax.model.linear import Axes, Frozen, RouterBias
from exaone_jax.model.placement import ONE_DEVICE, Placement
from exaone_jax.parallel import MeshPlacement, place, sharded_shapes
from exaone_jax.training.lora import adapt
from exaone_jax.training.optimizer import adamw

OPTIMIZER = adamw(optax.constant_schedule(1e-4))


@dataclass(frozen=True)
class StepInputs:
    """Trees of ShapeDtypeStructs.

    Attributes:
        params, router_biases, frozen: states of the model; with lora, params are those of the adapters and frozen all else.
        opt_state: of AdamW, float32 moments; None but in training.
        kv: the cache; None in training.
        tokens: int32 `[B, T]`, `[B, chunk]` where there is a cache.
    """

    placement: MeshPlacement
    params: nnx.State
    router_biases: nnx.State
    frozen: nnx.State
    opt_state: optax.OptState | None
    kv: KVCache | None
    tokens: jax.ShapeDtypeStruct


def step_inputs(config: ModelConfig, work: Workload, mesh: Mesh | AbstractMesh) -> StepInputs:
    """Raises ConfigError where the mesh does not divide the model, or in training the rows and their tokens."""
    train, placement = work.mode == "train", place(config, mesh)
    if train:
        _check_divides(work, mesh)

    state = _state(config, work.mode, work.dtype, work.lora, mesh)
    kv = None if train else _cache(config, work, placement)
    rows = jax.ShapeDtypeStruct((work.batch, work.chunk), jnp.int32)
    tokens = _laid_out(rows, ("batch", "sequence" if train else "chunk"), placement)
    return StepInputs(placement, *state, kv, tokens)


def abstract_model(
    config: ModelConfig, mode: Mode, dtype: DType, lora: LoraConfig | None = None, placement: Placement = ONE_DEVICE
) -> Transformer:
    """Computing in dtype, in training over float32 parameters, with lora over adapters beside frozen ones."""

    def make() -> Transformer:
        rngs, param_dtype = nnx.Rngs(0), "float32" if mode == "train" else dtype
        model = Transformer(config, dtype=dtype, param_dtype=param_dtype, rngs=rngs, placement=placement)
        if lora is not None:
            adapt(model, lora, rngs)
        return model

    return nnx.eval_shape(make)


class _State(NamedTuple):
    params: nnx.State
    router_biases: nnx.State
    frozen: nnx.State
    opt_state: optax.OptState | None


@lru_cache(maxsize=4)  # a search tries many batches on one mesh
def _state(config: ModelConfig, mode: Mode, dtype: DType, lora: LoraConfig | None, mesh: Mesh | AbstractMesh) -> _State:
    return _State(*(sharded_shapes(tree, mesh) for tree in _shapes(config, mode, dtype, lora)))


@cache
def _shapes(config: ModelConfig, mode: Mode, dtype: DType, lora: LoraConfig | None) -> _State:
    """Without shardings: the same for every mesh."""
    model = abstract_model(config, mode, dtype, lora)
    _, params, biases, frozen = nnx.split(model, nnx.Param, RouterBias, Frozen)
    return _State(params, biases, frozen, jax.eval_shape(OPTIMIZER.transform.init, params) if mode == "train" else None)


def device_bytes(tree: Any) -> int:
    """Bytes of one device's part of the arrays of a tree."""
    leaves = jax.tree.leaves(tree)
    return sum(math.prod(leaf.sharding.shard_shape(leaf.shape)) * leaf.dtype.itemsize for leaf in leaves)


def _check_divides(work: Workload, mesh: Mesh | AbstractMesh) -> None:
    rows = math.prod(mesh.shape[axis] for axis in ("data", "fsdp", "expert"))
    if work.batch % rows:
        raise ConfigError(f"batch: found {work.batch} rows, expected a multiple of data x fsdp x expert = {rows}")
    if work.context % mesh.shape["context"]:
        raise ConfigError(f"context: {work.context:,} tokens do not divide into context={mesh.shape['context']} parts")


def _cache(config: ModelConfig, work: Workload, placement: MeshPlacement) -> KVCache:
    def zeros(shape: tuple[int, ...], dtype: jax.typing.DTypeLike, axes: Axes) -> jax.Array:
        del axes
        return jnp.zeros(shape, dtype)

    def make() -> KVCache:
        return init_cache(config, layer_plan(config.layers), work.batch, work.context, work.chunk, work.dtype, zeros)

    empty = jax.eval_shape(make)
    return jax.tree.map(lambda x: _laid_out(x, CACHE_AXES if x.ndim == 5 else ("batch",), placement), empty)


def _laid_out(x: jax.ShapeDtypeStruct, axes: tuple[str, ...], placement: MeshPlacement) -> jax.ShapeDtypeStruct:
    spec = placement.spec(x.shape, axes)
    return jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=NamedSharding(placement.mesh, spec))
