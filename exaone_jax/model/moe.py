"""Mixture of experts: sigmoid router with a selection bias, routed experts by grouped matmul, a shared expert."""

from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx

from exaone_jax.config.model import LayerSpec, ModelConfig, MoEConfig
from exaone_jax.model.feedforward import MLP, swiglu
from exaone_jax.model.linear import Adapter, ParamFactory, dot
from exaone_jax.model.narrow import Narrow, narrow_grouped
from exaone_jax.model.placement import Placement
from pallas_kernels.grouped_matmul import grouped_matmul


class Routing(NamedTuple):
    """Where tokens go: experts int32 `[..., k]`, weights float32 `[..., k]`, and every sigmoid score, float32 `[..., E]`."""

    experts: jax.Array
    weights: jax.Array
    scores: jax.Array


class RouterStats(NamedTuple):
    """What training needs to know of a router: load float32 `[E]`, tokens sent to each expert, and balance_loss, a scalar.

    The loss is the sequence-wise one of DeepSeek-V3 (arXiv 2412.19437, equations 17 to 20), without its coefficient:
    sum over experts of f_e P_e, averaged over sequences, with f_e = E / (k T) times the tokens that chose e and P_e
    the mean share of e in the scores.
    """

    load: jax.Array
    balance_loss: jax.Array


def route(logits: jax.Array, bias: jax.Array, moe: MoEConfig) -> Routing:
    """Choose experts for router logits float32 `[..., E]`.

    The bias moves the choice only; weights are the unbiased scores of the chosen, normalised and then scaled. With
    groups, the topk_group groups whose two best biased scores have the greatest sum stay in the running.
    """
    scores = jax.nn.sigmoid(logits)
    choice = scores + bias
    if moe.n_group > 1:
        groups = choice.reshape(*choice.shape[:-1], moe.n_group, moe.num_experts // moe.n_group)
        group_scores = jnp.sum(jax.lax.top_k(groups, 2)[0], axis=-1)
        best_groups = jax.lax.top_k(group_scores, moe.topk_group)[1]
        kept = jnp.any(jax.nn.one_hot(best_groups, moe.n_group, dtype=bool), axis=-2)
        choice = jnp.where(kept[..., None], groups, -jnp.inf).reshape(choice.shape)
    experts = jax.lax.top_k(choice, moe.num_experts_per_tok)[1]
    weights = jnp.take_along_axis(scores, experts, axis=-1)
    if moe.norm_topk_prob:
        weights = weights / (jnp.sum(weights, axis=-1, keepdims=True) + 1e-20)
    return Routing(experts, weights * moe.routed_scaling_factor, scores)


def router_stats(routing: Routing, real: jax.Array, num_experts: int) -> RouterStats:
    """Statistics over the real tokens (bool `[B, T]`) of a batch, whose routing is `[B, T, ...]`."""
    weight = real.astype(jnp.float32)
    tokens = jnp.maximum(jnp.sum(weight, axis=1, keepdims=True), 1.0)
    chosen = jnp.sum(jax.nn.one_hot(routing.experts, num_experts, dtype=jnp.float32), axis=2)
    count = jnp.einsum("bte,bt->be", chosen, weight)
    share = routing.scores / (jnp.sum(routing.scores, axis=-1, keepdims=True) + 1e-20)
    mean_share = jnp.einsum("bte,bt->be", share, weight) / tokens
    frequency = count * (num_experts / routing.experts.shape[-1]) / tokens
    loss = jnp.mean(jnp.sum(jax.lax.stop_gradient(frequency) * mean_share, axis=-1))
    return RouterStats(jnp.sum(count, axis=0), loss)


class Router(nnx.Module):
    """Logits of the experts in float32, whatever the activations are."""

    def __init__(self, make: ParamFactory, size: int, num_experts: int):
        self.weight = make.normal((num_experts, size), ("experts", "embed"))
        self.bias = make.router_bias(num_experts)

    def __call__(self, x: jax.Array) -> jax.Array:
        return dot(x.astype(jnp.float32), self.weight[...])


class ExpertWeights(NamedTuple):
    """gate and up `[E, F, D]`, down `[E, D, F]`."""

    gate: jax.Array
    up: jax.Array
    down: jax.Array


class Experts(nnx.Module):
    """SwiGLU experts, each over its own tokens; weights `[E, out, in]`. Adapters, by name of the weight, are added to them."""

    adapters: dict[str, Adapter] | None = None

    def __init__(self, make: ParamFactory, size: int, moe: MoEConfig, limit: float | None):
        up, down = (moe.num_experts, moe.intermediate_size, size), (moe.num_experts, size, moe.intermediate_size)
        self.gate_proj = make.normal(up, ("experts", "expert_mlp", "embed"))
        self.up_proj = make.normal(up, ("experts", "expert_mlp", "embed"))
        self.down_proj = make.normal(down, ("experts", "embed", "expert_mlp"))
        self.limit = limit

    @property
    def weights(self) -> ExpertWeights:
        weights = {name: getattr(self, name)[...] for name in ("gate_proj", "up_proj", "down_proj")}
        if self.adapters is not None:
            weights = {name: self.adapters[name].added_to(weight) for name, weight in weights.items()}
        return ExpertWeights(*weights.values())

    def answer(
        self, weights: ExpertWeights, tokens: jax.Array, routing: Routing, narrow: Narrow | None = None
    ) -> jax.Array:
        """Send each token `[N, D]` to its k experts, of these weights, and sum their weighted answers: float32 `[N, D]`."""
        count, k = routing.experts.shape
        order = jnp.argsort(routing.experts.reshape(-1), stable=True)
        group_sizes = jnp.bincount(routing.experts.reshape(-1), length=len(weights.gate)).astype(jnp.int32)
        answers = expert_mlp(weights, tokens[order // k], group_sizes, self.limit, narrow)
        return weighted_sum(answers[jnp.argsort(order)].reshape(count, k, -1), routing.weights)


def expert_mlp(
    weights: ExpertWeights, x: jax.Array, group_sizes: jax.Array, limit: float | None, narrow: Narrow | None = None
) -> jax.Array:
    """x `[M, D]` sorted by expert, group_sizes int32 `[E]` -> `[M, D]`, zeros in the rows of no expert."""
    gate, up = (_product(x, weight, group_sizes, narrow) for weight in (weights.gate, weights.up))
    return _product(swiglu(gate, up, limit), weights.down, group_sizes, narrow)


def _product(rows: jax.Array, weight: jax.Array, group_sizes: jax.Array, narrow: Narrow | None = None) -> jax.Array:
    if narrow is not None:
        return narrow_grouped(rows, weight, group_sizes, narrow)
    return grouped_matmul(rows, weight, group_sizes, transpose_rhs=True)


class ExpertGradients(NamedTuple):
    """x `[M, D]` in x's dtype, mix float32 `[M]`, weights float32."""

    x: jax.Array
    mix: jax.Array
    weights: ExpertWeights


def expert_gradients(
    weights: ExpertWeights,
    x: jax.Array,
    group_sizes: jax.Array,
    limit: float | None,
    grad: jax.Array,
    mix: jax.Array,
    narrow: Narrow | None = None,
) -> ExpertGradients:
    """Of the sum over rows of mix * <grad, expert_mlp(x)>, where grad is `[M, D]` in x's dtype and mix float32 `[M]`.

    <grad, down @ hidden> is <down.T @ grad, hidden>: the answers themselves are not needed, unless narrow rounds them.
    """

    def by_row(rows: jax.Array, weight: jax.Array, grad: jax.Array) -> jax.Array:
        return jax.vjp(lambda rows: _product(rows, weight, group_sizes), rows)[1](grad)[0]

    def by_weight(rows: jax.Array, weight: jax.Array, grad: jax.Array) -> jax.Array:
        return jax.vjp(lambda wide: _product(rows, wide, group_sizes), weight.astype(jnp.float32))[1](grad)[0]

    gate, up = (_product(x, weight, group_sizes, narrow) for weight in (weights.gate, weights.up))
    hidden, through_swiglu = jax.vjp(lambda gate, up: swiglu(gate, up, limit), gate, up)
    dhidden = by_row(hidden, weights.down, grad).astype(jnp.float32)
    dgate, dup = through_swiglu((mix[:, None] * dhidden).astype(x.dtype))
    mixed = (mix[:, None] * hidden.astype(jnp.float32)).astype(x.dtype)
    if narrow is None:
        dmix = jnp.sum(dhidden * hidden.astype(jnp.float32), axis=-1)
    else:
        answers = _product(hidden, weights.down, group_sizes, narrow)
        dmix = jnp.sum(grad.astype(jnp.float32) * answers.astype(jnp.float32), axis=-1)
    return ExpertGradients(
        x=by_row(x, weights.gate, dgate) + by_row(x, weights.up, dup),
        mix=dmix,
        weights=ExpertWeights(
            by_weight(x, weights.gate, dgate),
            by_weight(x, weights.up, dup),
            by_weight(mixed, weights.down, grad),
        ),
    )


def weighted_sum(answers: jax.Array, weights: jax.Array) -> jax.Array:
    """answers `[N, k, D]`, weights float32 `[N, k]` -> float32 `[N, D]`.

    No product of matrices, of which a TPU would round both to bfloat16 and make a convolution with N windows.
    """
    return jnp.sum(answers.astype(jnp.float32) * weights[:, :, None], axis=1)


class MoE(nnx.Module):
    """Dropless mixture of experts. x `[B, T, D]`, real bool `[B, T]` -> (`[B, T, D]`, RouterStats)."""

    def __init__(self, make: ParamFactory, config: ModelConfig, spec: LayerSpec):
        if config.moe is None:
            raise ValueError("a sparse layer needs ModelConfig.moe")
        self.moe = config.moe
        self.router = Router(make, config.hidden_size, config.moe.num_experts)
        self.experts = Experts(make, config.hidden_size, config.moe, spec.swiglu_limit)
        if config.moe.num_shared_experts:
            width = config.moe.num_shared_experts * config.moe.intermediate_size
            self.shared = MLP(make, config.hidden_size, width, spec.swiglu_limit)

    def __call__(self, x: jax.Array, real: jax.Array, placement: Placement) -> tuple[jax.Array, RouterStats]:
        routing = placement.per_token(
            partial(route, moe=self.moe), (self.router(x),), ((self.router.bias[...], ("experts",)),)
        )
        out = placement.answer(self.experts, x, routing)
        if self.moe.num_shared_experts:
            out = out + self.shared(x, placement)
        return out, router_stats(routing, real, self.moe.num_experts)
