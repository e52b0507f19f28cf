"""A model with every kind of layer, small enough for eight virtual devices."""

from functools import cache

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.sharding import Mesh

from exaone_jax.config import LayerSpec, ModelConfig, MoEConfig
from exaone_jax.data.packing import PackedRows
from exaone_jax.model import Transformer
from exaone_jax.model.narrow import Narrow
from exaone_jax.parallel import MeshShape, make_mesh, parameter_shardings, place

LOCAL, GLOBAL = LayerSpec(window=8), LayerSpec(rope=False)
CONFIG = ModelConfig(
    model_type="exaone_moe",
    vocab_size=96,
    hidden_size=32,
    intermediate_size=48,
    num_heads=4,
    num_kv_heads=2,
    head_dim=16,
    layers=(LOCAL, *(layer.model_copy(update={"moe": True}) for layer in (LOCAL, LOCAL, GLOBAL))),
    moe=MoEConfig(num_experts=8, num_experts_per_tok=2, num_shared_experts=1, intermediate_size=16),
    mtp_layer=LayerSpec(),
    max_position_embeddings=256,
    initializer_range=0.2,
    dtype="float32",
)


@cache
def one_device(dtype: str = "float32") -> Transformer:
    """Computing in dtype over float32 weights."""
    return Transformer(CONFIG, dtype=dtype, param_dtype="float32", rngs=nnx.Rngs(0))


def on_mesh(shape: str, dtype: str = "float32", narrow: Narrow | None = None) -> Transformer:
    """The same weights on a mesh of all eight devices."""
    mesh = make_mesh(MeshShape.parse(shape))
    placement = place(CONFIG, mesh, narrow=narrow)
    placed = nnx.eval_shape(
        lambda: Transformer(CONFIG, dtype=dtype, param_dtype="float32", rngs=nnx.Rngs(0), placement=placement)
    )
    graphdef, abstract = nnx.split(placed)
    return nnx.merge(graphdef, moved(nnx.state(one_device()), abstract, mesh))


def moved(state: nnx.State, abstract: nnx.State, mesh: Mesh) -> nnx.State:
    """A model's values, on the devices of a mesh where those of `abstract` are to lie."""
    shardings = parameter_shardings(abstract, mesh)
    values = [
        (path, leaf.replace(jax.device_put(leaf[...], shardings[path]))) for path, leaf in nnx.to_flat_state(state)
    ]
    return nnx.from_flat_state(values)


def rows(batch: int, length: int) -> PackedRows:
    """Rows of two documents and some padding."""
    random = np.random.default_rng(batch * length)
    tokens = random.integers(0, CONFIG.vocab_size, (batch, length), np.int32)
    place = np.arange(length)
    first = random.integers(1, length - 4, (batch, 1))
    ids = np.where(place < first, 1, np.where(place < length - 3, 2, 0)).astype(np.int32)
    return PackedRows(jnp.asarray(tokens), jnp.asarray(ids))
