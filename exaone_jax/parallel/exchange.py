"""Tokens to the devices of their experts and back: what each device does, inside `shard_map`.

Two ways, with the same answer to the last bit, since both bring every expert's answer home and sum them there in the order
of the choice:
  all_to_all  each token goes to the devices that hold its experts, by ragged all-to-all, and its answers come back. Bytes
              on the wire are those of the tokens that move.
  gather      every device takes all tokens of its expert group, answers those that are its own and leaves zeros elsewhere;
              the sum over devices brings the answers home. Two plain collectives: for the few tokens of a decoding step,
              where latency is all.
Nothing is dropped: buffers hold the worst case, in which all tokens of a group choose the experts of one device. Where that would
be large, the tokens go in several rounds, and the backward pass sends them again.
"""

import functools

import jax
import jax.numpy as jnp
from jax import lax

from exaone_jax.model.moe import ExpertWeights, Routing, expert_mlp, weighted_sum

# Tokens a device up to which `gather` is taken. One table for every step, so that decoding k tokens and verifying them go
# the same way only by its rows and never by a timing.
GATHER_UP_TO = 64
# Bytes of the largest buffer of one round of `all_to_all`.
ROUND_BYTES = 2**30


def exchange(
    tokens: jax.Array, routing: Routing, weights: ExpertWeights, limit: float | None, axis: str, tokens_are_split: bool
) -> jax.Array:
    """Weighted answers float32 `[n, D]` of this device's tokens `[n, D]`.

    Args:
        tokens: of this device.
        routing: of these tokens; expert ids are of the whole model.
        weights: of this device's experts, the ones from axis_index * E / devices on.
        limit: of SwiGLU, as LayerSpec has it.
        axis: the mesh axis over which experts are split.
        tokens_are_split: whether tokens are split over it too, or the same on all its devices.
    """
    if tokens_are_split and lax.axis_size(axis) > 1 and len(tokens) > GATHER_UP_TO:
        answers = _in_rounds(tokens, routing.experts, weights, limit, axis)
    else:
        answers = _by_gather(tokens, routing.experts, weights, limit, axis, tokens_are_split)
    return weighted_sum(answers, routing.weights)


def _by_gather(
    tokens: jax.Array, experts: jax.Array, weights: ExpertWeights, limit: float | None, axis: str, split: bool
) -> jax.Array:
    if split:
        tokens, experts = (lax.all_gather(x, axis, tiled=True) for x in (tokens, experts))
    num_local = len(weights.gate)
    # Experts of other devices sort behind this device's own, and their rows belong to no group: they give zeros.
    own = (experts - lax.axis_index(axis) * num_local).reshape(-1)
    own = jnp.where((own >= 0) & (own < num_local), own, num_local)
    order = jnp.argsort(own, stable=True)
    sizes = jnp.bincount(own, length=num_local + 1)[:num_local].astype(jnp.int32)
    answers = expert_mlp(weights, tokens[order // experts.shape[1]], sizes, limit)
    answers = answers[jnp.argsort(order)].reshape(*experts.shape, -1)
    return lax.psum_scatter(answers, axis, tiled=True) if split else lax.psum(answers, axis)


def _in_rounds(
    tokens: jax.Array, experts: jax.Array, weights: ExpertWeights, limit: float | None, axis: str
) -> jax.Array:
    count, size = tokens.shape
    rounds = -(-_capacity(count, experts.shape[1], weights, axis) * size * tokens.dtype.itemsize // ROUND_BYTES)
    if rounds == 1:
        return _by_all_to_all(tokens, experts, weights, limit, axis)
    padded = ((0, -count % rounds), (0, 0))  # the last token once more: any real choice will do
    parts = (jnp.pad(x, padded, mode="edge").reshape(rounds, -1, x.shape[1]) for x in (tokens, experts))
    weights = jax.tree.map(lambda w: w.astype(jnp.float32), weights)  # so that their gradients add up in float32

    def one(tokens: jax.Array, experts: jax.Array, weights: ExpertWeights) -> jax.Array:
        return _by_all_to_all(tokens, experts, weights, limit, axis)

    once = jax.checkpoint(one, prevent_cse=False)
    answers = lax.map(lambda part: once(*part, weights), tuple(parts))
    return answers.reshape(-1, *answers.shape[2:])[:count]


def _capacity(count: int, k: int, weights: ExpertWeights, axis: str) -> int:
    """Most rows that can come to one device: of every token on every device, those of its choices that can be here."""
    return lax.axis_size(axis) * count * min(k, len(weights.gate))


def _by_all_to_all(
    tokens: jax.Array, experts: jax.Array, weights: ExpertWeights, limit: float | None, axis: str
) -> jax.Array:
    devices, me, num_local = lax.axis_size(axis), lax.axis_index(axis), len(weights.gate)
    count, k = experts.shape
    order = jnp.argsort(experts.reshape(-1), stable=True)
    chosen = jnp.bincount(experts.reshape(-1), length=devices * num_local).astype(jnp.int32)
    # tokens[from device, to device, expert there]
    all_chosen = lax.all_gather(chosen.reshape(devices, num_local), axis)
    sent = jnp.sum(all_chosen, axis=2)
    capacity = _capacity(count, k, weights, axis)
    arrived = _ragged_all_to_all(tokens[order // k], capacity, sent, axis)

    here = all_chosen[:, me]  # [from device, expert]: the order in which they arrived
    ends = jnp.cumsum(here.reshape(-1))
    place = jnp.searchsorted(ends, jnp.arange(capacity), side="right")
    expert = jnp.where(place < devices * num_local, place % num_local, num_local)
    by_expert = jnp.argsort(expert, stable=True)
    answers = expert_mlp(weights, arrived[by_expert], jnp.sum(here, axis=0), limit)[jnp.argsort(by_expert)]

    answers = _ragged_all_to_all(answers, count * k, sent.T, axis)
    return answers[jnp.argsort(order)].reshape(count, k, -1)


def _ragged_all_to_all(rows: jax.Array, capacity: int, sent: jax.Array, axis: str) -> jax.Array:
    """Rows `[M, D]`, those for device 0 first, then those for device 1 and so on -> `[capacity, D]`, those from device 0
    first; zeros behind them. sent int32 `[devices, devices]`: how many rows go from each device to each."""
    me = lax.axis_index(axis)
    before = jnp.cumsum(sent, axis=1) - sent  # in the sender's rows
    after = jnp.cumsum(sent, axis=0) - sent  # in the receiver's
    out = jnp.zeros((capacity, rows.shape[1]), rows.dtype)
    return lax.platform_dependent(
        rows,
        out,
        before,
        after,
        sent,
        me,
        cpu=functools.partial(_emulated, axis=axis),
        default=lambda rows, out, before, after, sent, me: lax.ragged_all_to_all(
            rows, out, before[me], sent[me], after[me], sent[:, me], axis_name=axis
        ),
    )


def _emulated(
    rows: jax.Array, out: jax.Array, before: jax.Array, after: jax.Array, sent: jax.Array, me: jax.Array, *, axis: str
) -> jax.Array:
    """For XLA:CPU, which has no ragged all-to-all: every device takes everybody's rows and keeps its own."""
    everybody = lax.all_gather(rows, axis)
    place = jnp.arange(len(out))
    sender = jnp.searchsorted(after[:, me] + sent[:, me], place, side="right")
    real = sender < len(sent)
    sender = jnp.minimum(sender, len(sent) - 1)
    row = before[sender, me] + place - after[sender, me]
    return jnp.where(real[:, None], everybody[sender, jnp.where(real, row, 0)], out)
