"""SwiGLU feed-forward."""

from functools import partial

import jax
import jax.numpy as jnp
from flax import nnx

from exaone_jax.model.linear import Linear, ParamFactory
from exaone_jax.model.placement import Placement


@partial(jax.checkpoint, static_argnums=2, prevent_cse=False)
def swiglu(gate: jax.Array, up: jax.Array, limit: float | None) -> jax.Array:
    """silu(gate) * up. With a limit the pre-activations are clamped first, the gate from above only (K-EXAONE 2.0).

    The backward pass keeps gate and up alone and computes what lies between again: a few operations against three arrays.
    """
    if limit is not None:
        gate, up = jnp.minimum(gate, limit), jnp.clip(up, -limit, limit)
    return jax.nn.silu(gate) * up


class MLP(nnx.Module):
    """down(swiglu(gate(x), up(x))), x `[..., D]`."""

    def __init__(self, make: ParamFactory, size: int, hidden: int, limit: float | None):
        self.gate_proj = Linear(make, size, hidden, ("mlp", "embed"))
        self.up_proj = Linear(make, size, hidden, ("mlp", "embed"))
        self.down_proj = Linear(make, hidden, size, ("embed", "mlp"))
        self.limit = limit

    def __call__(self, x: jax.Array, placement: Placement) -> jax.Array:
        weights = (self.gate_proj.weight[...], self.up_proj.weight[...])
        gate, up = placement.project(x, weights, ("mlp", "mlp"))
        gate, up = self.gate_proj.adapted(x, gate), self.up_proj.adapted(x, up)
        hidden = swiglu(gate, up, self.limit)
        return self.down_proj.adapted(hidden, placement.contract(hidden, self.down_proj.weight[...], "mlp"))
