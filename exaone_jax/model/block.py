"""One decoder layer, as its LayerSpec says."""

import jax
from flax import nnx

from exaone_jax.config.model import LayerSpec, ModelConfig
from exaone_jax.model.attention import Attention, Cached, Packed
from exaone_jax.model.feedforward import MLP
from exaone_jax.model.linear import ParamFactory
from exaone_jax.model.moe import MoE, RouterStats
from exaone_jax.model.norm import RMSNorm
from exaone_jax.model.paged import Paged
from exaone_jax.model.placement import ACTIVATIONS, Placement
from exaone_jax.model.rope import Rotation


class Block(nnx.Module):
    """Attention and feed-forward, each added to its input; the norm is before (pre) or after, in the branch (post)."""

    def __init__(self, make: ParamFactory, config: ModelConfig, spec: LayerSpec):
        def norm() -> RMSNorm:
            return RMSNorm(make, config.hidden_size, config.rms_norm_eps, "norm")

        self.attention = Attention(make, config, spec)
        if spec.norm == "pre":
            self.input_norm, self.mlp_norm = norm(), norm()
        else:
            self.post_attention_norm, self.post_mlp_norm = norm(), norm()
        if spec.moe:
            self.moe = MoE(make, config, spec)
        else:
            self.mlp = MLP(make, config.hidden_size, config.intermediate_size, spec.swiglu_limit)
        self.spec = spec

    def __call__(
        self, x: jax.Array, rotation: Rotation, attend: Packed | Cached | Paged, real: jax.Array, placement: Placement
    ) -> tuple[jax.Array, RouterStats | None]:
        """x `[B, T, D]`, real bool `[B, T]` -> (x, router statistics where the layer is sparse)."""
        if self.spec.norm == "pre":
            x = x + self.attention(self.input_norm(x), rotation, attend)
            out, stats = self._feed_forward(self.mlp_norm(x), real, placement)
            return placement.constrain(x + out, ACTIVATIONS), stats
        x = x + self.post_attention_norm(self.attention(x, rotation, attend))
        out, stats = self._feed_forward(x, real, placement)
        return placement.constrain(x + self.post_mlp_norm(out), ACTIVATIONS), stats

    def _feed_forward(
        self, x: jax.Array, real: jax.Array, placement: Placement
    ) -> tuple[jax.Array, RouterStats | None]:
        return self.moe(x, real, placement) if self.spec.moe else (self.mlp(x, placement), None)
