"""FLOPs of a step, exactly: of matrix products, a multiplication and an addition counted as two.

Counted are window layers as windows, the experts that tokens are sent to, the shared expert, the router, the output head and,
in training, the multi-token-prediction layer. Not counted: norms, rotations, softmax, the optimizer.
"""

from dataclasses import dataclass

from exaone_jax.config import LayerSpec, ModelConfig
from exaone_jax.costs.workload import Workload


@dataclass(frozen=True)
class ForwardFlops:
    """Of one forward pass over all devices. mtp: the whole layer with its own pass through the head; 0 where it is not run."""

    projections: int
    attention: int
    mlp: int
    experts: int
    router: int
    head: int
    mtp: int

    @property
    def total(self) -> int:
        return self.layers + self.head + self.mtp

    @property
    def layers(self) -> int:
        return self.projections + self.attention + self.mlp + self.experts + self.router


@dataclass(frozen=True)
class StepFlops:
    """model: the forward pass, in training three times (the backward pass has two products for each), where all but adapters is
    frozen twice and attention once more: frozen matrices have no gradient, and adapters' own are left out. recomputed: on top of
    that, what the backward pass does again: by the remat policy, the scores inside attention, and the logits."""

    forward: ForwardFlops
    model: int
    recomputed: int


def visible_keys(start: int, stop: int, window: int | None) -> int:
    """Sum over positions p in [start, stop) of the keys that p sees: min(p + 1, window)."""
    if window is None or stop <= window:
        return (stop * (stop + 1) - start * (start + 1)) // 2
    if start >= window:
        return (stop - start) * window
    return visible_keys(start, window, None) + (stop - window) * window


def step_flops(config: ModelConfig, work: Workload) -> StepFlops:
    forward = forward_flops(config, work)
    if work.mode != "train":
        return StepFlops(forward, forward.total, 0)
    model = 3 * forward.total if work.lora is None else 2 * forward.total + forward.attention
    return StepFlops(forward, model, _recomputed(config, work, forward))


def forward_flops(config: ModelConfig, work: Workload) -> ForwardFlops:
    train, tokens = work.mode == "train", work.tokens
    heads_of = tokens if train else work.batch  # serving needs the logits of each row's last token
    head = 2 * heads_of * config.hidden_size * config.vocab_size
    layers = [_layer(config, layer, work) for layer in config.layers]
    mtp = 0
    if train and config.mtp_layer is not None:
        mtp = sum(_layer(config, config.mtp_layer, work)) + 2 * tokens * 2 * config.hidden_size**2 + head
    sums = (sum(layer[part] for layer in layers) for part in range(5))
    return ForwardFlops(*sums, head=head, mtp=mtp)


def _layer(config: ModelConfig, layer: LayerSpec, work: Workload) -> tuple[int, int, int, int, int]:
    """(projections, attention, dense MLP, experts with the shared one, router)."""
    size, tokens, moe = config.hidden_size, work.tokens, config.moe
    projections = 4 * tokens * size * config.head_dim * (config.num_heads + config.num_kv_heads)
    keys = work.batch * visible_keys(work.start, work.context, layer.window)
    attention = 4 * keys * config.num_heads * config.head_dim
    if not layer.moe or moe is None:
        return projections, attention, 6 * tokens * size * config.intermediate_size, 0, 0
    active = moe.num_experts_per_tok + moe.num_shared_experts
    return (
        projections,
        attention,
        0,
        6 * tokens * size * moe.intermediate_size * active,
        2 * tokens * size * moe.num_experts,
    )


def _recomputed(config: ModelConfig, work: Workload, forward: ForwardFlops) -> int:
    mtp_layer = (0,) * 5 if config.mtp_layer is None else _layer(config, config.mtp_layer, work)
    attention, experts = forward.attention + mtp_layer[1], forward.experts + mtp_layer[3]
    again = attention // 2  # the backward kernels make the scores again, one of attention's two products
    again += forward.head * (1 if config.mtp_layer is None else 2)  # chunks of logits, made again by the loss
    if work.remat in ("full", "offload"):
        again += forward.layers + (forward.mtp - forward.head - _fc(config, work) if forward.mtp else 0)
    elif work.remat == "dots":  # keeps plain matrix products, of which attention and the experts' are none
        shared = 0 if config.moe is None else config.moe.num_shared_experts
        routed = 1 if config.moe is None else config.moe.num_experts_per_tok
        again += attention + experts * routed // (routed + shared)
    return again


def _fc(config: ModelConfig, work: Workload) -> int:
    return 4 * work.tokens * config.hidden_size**2
