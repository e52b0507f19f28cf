"""What training minimises: next-token loss, multi-token-prediction loss, balance loss of the routers."""

import dataclasses
import math
from typing import NamedTuple

import jax
import jax.numpy as jnp

from exaone_jax.data.packing import PackedRows
from exaone_jax.errors import ConfigError
from exaone_jax.model import RouterStats, Transformer
from exaone_jax.model.stack import Remat, SegmentStats
from pallas_kernels.linear_cross_entropy import linear_cross_entropy


@dataclasses.dataclass(frozen=True)
class LossConfig:
    """Weights of the terms; the defaults are K-EXAONE's.

    mtp_weight: of the multi-token-prediction loss, where the model has that layer; 0 leaves it out.
    balance_weight: of the sequence-wise balance loss, summed over the sparse layers.
    z_loss: of the squared log of the softmax's normaliser (arXiv 2204.02311), part of both token losses.
    remat: what the backward pass recomputes, as `Transformer.forward`.
    """

    mtp_weight: float = 0.05
    balance_weight: float = 1e-4
    z_loss: float = 0.0
    remat: Remat = None


class TokenLoss(NamedTuple):
    """A loss summed over `tokens` predicted tokens, both float32 scalars."""

    total: jax.Array
    tokens: jax.Array


class LossMetrics(NamedTuple):
    """float32 scalars, in nats a token where they are token losses.

    objective: what was minimised. loss: next token. mtp_loss: the token after that, None where it is not trained.
    balance_loss: summed over the sparse layers, without its weight; None, as expert_load, where the model has no experts.
    expert_load: float32 `[sparse layers, E]`, the number of tokens each expert got.
    """

    objective: jax.Array
    loss: jax.Array
    tokens: jax.Array
    mtp_loss: jax.Array | None
    balance_loss: jax.Array | None
    expert_load: jax.Array | None


class Targets(NamedTuple):
    """labels int32 `[B, T]`, and mask bool `[B, T]`, which of them count."""

    labels: jax.Array
    mask: jax.Array


def targets(batch: PackedRows, ahead: int) -> Targets:
    """The token `ahead` places after each position. It counts where both are of one document, neither is padding, and the
    batch's loss_mask asks for it."""
    tokens, ids = jnp.asarray(batch.tokens), jnp.asarray(batch.segment_ids)

    def shifted(x: jax.Array) -> jax.Array:
        return jnp.pad(x[..., ahead:], (*[(0, 0)] * (x.ndim - 1), (0, min(ahead, x.shape[-1]))))

    counts = (ids == shifted(ids)) & (ids != 0)
    if batch.loss_mask is not None:
        counts &= shifted(jnp.asarray(batch.loss_mask))
    return Targets(shifted(tokens), counts)


class Whole(NamedTuple):
    """Of a whole batch, whose parts are computed one after the other: predicted tokens of both losses, and rows; float32."""

    tokens: jax.Array
    mtp_tokens: jax.Array
    rows: float


def whole(batch: PackedRows) -> Whole:
    """Of a batch `[..., T]`."""
    counts = (jnp.sum(targets(batch, ahead).mask, dtype=jnp.float32) for ahead in (1, 2))
    return Whole(*counts, rows=float(math.prod(batch.tokens.shape[:-1])))


def token_loss(model: Transformer, hidden: jax.Array, to: Targets, z_loss: float = 0.0) -> TokenLoss:
    """Cross-entropy of the targets under hidden states `[B, T, D]` (after the final norm); no logits are kept, and of the
    vocabulary every device multiplies its own words."""

    def losses(
        hidden: jax.Array, labels: jax.Array, mask: jax.Array, weight: jax.Array, vocab_axis: str | None
    ) -> jax.Array:
        rows = hidden.reshape(-1, hidden.shape[-1])
        loss, _ = linear_cross_entropy(
            rows, weight, labels.reshape(-1), mask=mask.reshape(-1), z_loss=z_loss, axis_name=vocab_axis
        )
        return loss.reshape(labels.shape)

    total = jnp.sum(model.placement.over_vocab(losses, (hidden, *to), model.head_weight()))
    return TokenLoss(total, jnp.sum(to.mask, dtype=jnp.float32))


def mtp_loss(model: Transformer, hidden: jax.Array, batch: PackedRows, config: LossConfig) -> TokenLoss:
    """Loss of the multi-token-prediction layer: position p, told token p+1, predicts token p+2 of the same document.

    The last position of a document is told the first token of another, or padding: its target does not count, and being
    the last of its document no position that counts attends to it.
    """
    next_tokens = targets(batch, 1).labels
    drafted = model.mtp_forward(hidden, next_tokens, segment_ids=jnp.asarray(batch.segment_ids), remat=config.remat)
    return token_loss(model, drafted, targets(batch, 2), config.z_loss)


def has_mtp_loss(model: Transformer, config: LossConfig) -> bool:
    """Whether the multi-token-prediction layer is trained. Raises ConfigError where it could not be."""
    layer = model.config.mtp_layer
    if layer is None or config.mtp_weight == 0:
        return False
    if layer.moe:
        raise ConfigError(
            "a multi-token-prediction layer with experts cannot be trained: its routers would not balance"
        )
    return True


def total_loss(
    model: Transformer, batch: PackedRows, config: LossConfig, of: Whole | None = None
) -> tuple[jax.Array, tuple[LossMetrics, tuple[SegmentStats, ...]]]:
    """The objective, a float32 scalar, for a batch `[B, T]`; with it the metrics and the routers' statistics.

    With `of`, the batch is a part of that one: objective, metrics and statistics of all its parts add up to those of the
    whole, as do gradients.
    """
    of = whole(batch) if of is None else of
    tokens, segment_ids = jnp.asarray(batch.tokens), jnp.asarray(batch.segment_ids)
    with_mtp = has_mtp_loss(model, config)
    hidden, stats = model.forward(tokens, segment_ids=segment_ids, remat=config.remat)
    main = token_loss(model, hidden, targets(batch, 1), config.z_loss)
    loss = main.total / jnp.maximum(of.tokens, 1.0)
    objective, ahead, balance, load = loss, None, None, None
    if with_mtp:
        ahead = mtp_loss(model, hidden, batch, config).total / jnp.maximum(of.mtp_tokens, 1.0)
        objective = objective + config.mtp_weight * ahead
    if routers := by_layer(stats):
        balance = jnp.sum(jnp.stack([router.balance_loss for router in routers])) * (len(tokens) / of.rows)
        load = jnp.stack([router.load for router in routers])
        objective = objective + config.balance_weight * balance
    return objective, (LossMetrics(objective, loss, main.tokens, ahead, balance, load), stats)


def by_layer(stats: tuple[SegmentStats, ...]) -> list[RouterStats]:
    """Statistics of the sparse layers from first to last: load float32 `[E]`, balance_loss a scalar."""
    layers = []
    for segment in stats:
        repeats = next((len(router.load) for router in segment if router is not None), 0)
        for repeat in range(repeats):
            layers += [RouterStats(*(x[repeat] for x in router)) for router in segment if router is not None]
    return layers
