"""Tokens to the devices of their experts and back: what each device does, inside `shard_map`.

Two ways, with the same answer to the last bit, since both bring every expert's answer home and sum them there in the order
of the choice:
  all_to_all  each token goes to the devices that hold its experts, by ragged all-to-all, and its answers come back. Bytes
              on the wire are those of the tokens that move.
  gather      every device takes all tokens of its expert group, answers those that are its own and leaves zeros elsewhere;
              the sum over devices brings the answers home. Two plain collectives: for the few tokens of a decoding step,
              where latency is all.
Nothing is dropped: buffers hold the worst case, in which all tokens of a group choose the experts of one device. Where that would
be large, the tokens go in several rounds. The backward pass keeps nothing but what came in: tokens travel again, beside their
gradients, and the gradient of a token's weight for an expert, <gradient, answer>, is found where the hidden units are, so
that no answer is computed or sent twice.
"""

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

from exaone_jax.model.moe import ExpertWeights, Routing, expert_gradients, expert_mlp, weighted_sum
from exaone_jax.model.narrow import Narrow
from exaone_jax.parallel.gather import Parts, gathered
from pallas_kernels.attention.tpu import device_kind

# Tokens a device up to which `gather` is taken. One table for every step, so that decoding k tokens and verifying them go
# the same way only by its rows and never by a timing.
GATHER_UP_TO = 64
# Bytes of the largest buffer of one round of `all_to_all`.
ROUND_BYTES = 2**29
# v5e as jax names it: its compiler has no ragged all-to-all ("not supported in limited ICI routing", libtpu 0.0.48).
_V5E = ("TPU v5 lite", "TPU v5e")


class Layout(NamedTuple):
    """axis: the mesh axis over which experts are split. limit: of SwiGLU, as LayerSpec has it. parts: of gate, up and down,
    the dimension of which each device has a part. narrow: as `OneDevice` has it."""

    axis: str
    limit: float | None
    parts: tuple[Parts, Parts, Parts]
    narrow: Narrow | None = None


def exchange(
    tokens: jax.Array, routing: Routing, weights: ExpertWeights, layout: Layout, tokens_are_split: bool
) -> jax.Array:
    """Weighted answers float32 `[n, D]` of this device's tokens `[n, D]`.

    Args:
        tokens: of this device.
        routing: of these tokens; expert ids are of the whole model.
        weights: this device's parts of its experts, the ones from axis_index * E / devices on; of any dtype.
        layout: of the experts.
        tokens_are_split: whether tokens are split over its axis too, or the same on all its devices.
    """
    if tokens_are_split and lax.axis_size(layout.axis) > 1 and len(tokens) > GATHER_UP_TO:
        return _by_all_to_all(tokens, routing.experts, routing.weights, weights, layout)
    whole = ExpertWeights(*(gathered(w, p, tokens.dtype) for w, p in zip(weights, layout.parts, strict=True)))
    answers = _by_gather(tokens, routing.experts, whole, layout, tokens_are_split)
    return weighted_sum(answers, routing.weights)


def _by_gather(tokens: jax.Array, experts: jax.Array, weights: ExpertWeights, layout: Layout, split: bool) -> jax.Array:
    axis = layout.axis
    if split:
        tokens, experts = (lax.all_gather(x, axis, tiled=True) for x in (tokens, experts))
    num_local = len(weights.gate)
    # Experts of other devices sort behind this device's own, and their rows belong to no group: they give zeros.
    own = (experts - lax.axis_index(axis) * num_local).reshape(-1)
    own = jnp.where((own >= 0) & (own < num_local), own, num_local)
    order = jnp.argsort(own, stable=True)
    sizes = jnp.bincount(own, length=num_local + 1)[:num_local].astype(jnp.int32)
    answers = expert_mlp(weights, tokens[order // experts.shape[1]], sizes, layout.limit, layout.narrow)
    answers = answers[jnp.argsort(order)].reshape(*experts.shape, -1)
    return lax.psum_scatter(answers, axis, tiled=True) if split else lax.psum(answers, axis)


@functools.partial(jax.custom_vjp, nondiff_argnums=(4,))
def _by_all_to_all(
    tokens: jax.Array, experts: jax.Array, mix: jax.Array, weights: ExpertWeights, layout: Layout
) -> jax.Array:
    """experts int32 and their weights, mix float32 `[n, k]` -> float32 `[n, D]`."""
    whole = _whole(weights, layout, tokens.dtype)

    def one(tokens: jax.Array, experts: jax.Array, mix: jax.Array) -> jax.Array:
        trip = _plan(experts, len(whole.gate), layout.axis)
        answers = expert_mlp(whole, trip.out(tokens), trip.sizes, layout.limit, layout.narrow)
        return weighted_sum(trip.home(answers), mix)

    rounds = _rounds(tokens, experts, whole, layout.axis)
    if rounds == 1:
        return one(tokens, experts, mix)
    out = lax.map(lambda part: one(*part), tuple(_deal(x, rounds) for x in (tokens, experts, mix)))
    return _undeal(out, len(tokens))


def _all_to_all_forward(
    tokens: jax.Array, experts: jax.Array, mix: jax.Array, weights: ExpertWeights, layout: Layout
) -> tuple[jax.Array, tuple[jax.Array, jax.Array, jax.Array, ExpertWeights]]:
    return _by_all_to_all(tokens, experts, mix, weights, layout), (tokens, experts, mix, weights)


def _all_to_all_backward(
    layout: Layout, saved: tuple[jax.Array, jax.Array, jax.Array, ExpertWeights], grad: jax.Array
) -> tuple[jax.Array, None, jax.Array, ExpertWeights]:
    tokens, experts, mix, weights = saved
    whole = _whole(weights, layout, tokens.dtype)

    def one(total: ExpertWeights, part: tuple[jax.Array, ...]) -> tuple[ExpertWeights, tuple[jax.Array, jax.Array]]:
        tokens, experts, mix, grad = part
        trip = _plan(experts, len(whole.gate), layout.axis)
        # grad is what a sum in float32 was cast from the tokens' dtype for: nothing is lost.
        arrived, grads = trip.out(tokens), trip.out(grad.astype(tokens.dtype))
        found = expert_gradients(whole, arrived, trip.sizes, layout.limit, grads, trip.out_scalars(mix), layout.narrow)
        dtokens = jnp.sum(trip.home(found.x).astype(jnp.float32), axis=1).astype(tokens.dtype)
        return jax.tree.map(jnp.add, total, found.weights), (dtokens, trip.home_scalars(found.mix))

    total = jax.tree.map(lambda w: jnp.zeros(w.shape, jnp.float32), whole)
    rounds = _rounds(tokens, experts, whole, layout.axis)
    if rounds == 1:
        total, (dtokens, dmix) = one(total, (tokens, experts, mix, grad))
    else:
        parts = (*(_deal(x, rounds) for x in (tokens, experts, mix)), _deal(grad, rounds, "constant"))
        total, found = lax.scan(one, total, parts)
        dtokens, dmix = (_undeal(x, len(tokens)) for x in found)
    dweights = (p.scatter(g).astype(w.dtype) for g, p, w in zip(total, layout.parts, weights, strict=True))
    return dtokens, None, dmix, ExpertWeights(*dweights)


_by_all_to_all.defvjp(_all_to_all_forward, _all_to_all_backward)


def _whole(weights: ExpertWeights, layout: Layout, dtype: jnp.dtype) -> ExpertWeights:
    return ExpertWeights(*(parts.gather(w, dtype) for w, parts in zip(weights, layout.parts, strict=True)))


def rounds_of(count: int, size: int) -> int:
    """In how many rounds a device's `count` tokens go, whose buffer of one round alone would have `size` bytes.

    The next number that divides the tokens, where one is near: no row is padded.
    """
    least = -(-size // ROUND_BYTES)
    return next((rounds for rounds in range(least, 2 * least) if count % rounds == 0), least)


def _rounds(tokens: jax.Array, experts: jax.Array, whole: ExpertWeights, axis: str) -> int:
    capacity = _capacity(len(tokens), experts.shape[1], len(whole.gate), axis)
    return rounds_of(len(tokens), capacity * tokens.shape[1] * tokens.dtype.itemsize)


def _deal(x: jax.Array, rounds: int, mode: str = "edge") -> jax.Array:
    """`[n, ...]` -> `[rounds, n / rounds, ...]`; the last token once more where that leaves a rest: any real choice will do."""
    return jnp.pad(x, ((0, -len(x) % rounds), (0, 0)), mode=mode).reshape(rounds, -1, x.shape[1])


def _undeal(x: jax.Array, count: int) -> jax.Array:
    return x.reshape(-1, x.shape[2])[:count]


def _capacity(count: int, k: int, num_local: int, axis: str) -> int:
    """Most rows that can come to one device: of every token on every device, those of its choices that can be here."""
    return lax.axis_size(axis) * count * min(k, num_local)


class _Trip(NamedTuple):
    """Of n tokens with k choices each on every device to the devices of their experts, and home. At one device at most C rows
    arrive; of more than do, the rest are zeros of no expert.

    Attributes:
        order, back: `[n k]`, the choices by their expert, and where each stands among them.
        by_expert, by_sender: `[C]`, the rows that arrived by their expert, and where each stands among them.
        sizes: `[experts here]`, rows of each.
        sent: `[devices, devices]`, how many rows go from each device to each.
        source: of the rows that arrived `[C]`, the device they come from and their row there; a device of none for the rest.
        target: of the choices by expert `[n k]`, the device they go to and their row there.
        k, axis: choices of a token, and the mesh axis.
    """

    order: jax.Array
    back: jax.Array
    by_expert: jax.Array
    by_sender: jax.Array
    sizes: jax.Array
    sent: jax.Array
    source: tuple[jax.Array, jax.Array]
    target: tuple[jax.Array, jax.Array]
    k: int
    axis: str

    def out(self, tokens: jax.Array) -> jax.Array:
        """`[n, D]` -> `[C, D]` by expert."""
        rows = tokens[self.order // self.k]
        return _ragged_all_to_all(rows, len(self.by_expert), self.sent, self.axis)[self.by_expert]

    def home(self, rows: jax.Array) -> jax.Array:
        """`[C, D]` by expert -> `[n, k, D]`."""
        answers = _ragged_all_to_all(rows[self.by_sender], len(self.order), self.sent.T, self.axis)
        return answers[self.back].reshape(-1, self.k, rows.shape[1])

    def out_scalars(self, mix: jax.Array) -> jax.Array:
        """`[n, k]` -> `[C]` by expert. So few bytes that everybody's go to all."""
        everybody = lax.all_gather(mix.reshape(-1)[self.order], self.axis)
        return everybody.at[self.source].get(mode="fill", fill_value=0)[self.by_expert]

    def home_scalars(self, values: jax.Array) -> jax.Array:
        """`[C]` by expert -> `[n, k]`."""
        everybody = lax.all_gather(values[self.by_sender], self.axis)
        return everybody[self.target][self.back].reshape(-1, self.k)


def _plan(experts: jax.Array, num_local: int, axis: str) -> _Trip:
    devices, me = lax.axis_size(axis), lax.axis_index(axis)
    count, k = experts.shape
    chosen = experts.reshape(-1)
    order = jnp.argsort(chosen, stable=True)
    # [from device, to device, expert there]
    sizes = lax.all_gather(
        jnp.bincount(chosen, length=devices * num_local).astype(jnp.int32).reshape(devices, -1), axis
    )
    sent = jnp.sum(sizes, axis=2)
    before, after = _starts(sent)

    here = sizes[:, me]  # [from device, expert]: the order in which they arrive
    place = jnp.arange(_capacity(count, k, num_local, axis))
    kind = jnp.searchsorted(jnp.cumsum(here.reshape(-1)), place, side="right")
    sender = kind // num_local  # `devices` in the rows past the last
    by_expert = jnp.argsort(jnp.where(sender < devices, kind % num_local, num_local), stable=True)
    row = place + (before - after)[:, me].at[sender].get(mode="clip")
    receiver = chosen[order] // num_local
    there = jnp.arange(count * k) + (after - before)[me][receiver]
    return _Trip(
        order=order,
        back=jnp.argsort(order),
        by_expert=by_expert,
        by_sender=jnp.argsort(by_expert),
        sizes=jnp.sum(here, axis=0),
        sent=sent,
        source=(sender, row),
        target=(receiver, there),
        k=k,
        axis=axis,
    )


def _starts(sent: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Where the rows from each device to each begin: in the sender's rows, and in the receiver's."""
    return jnp.cumsum(sent, axis=1) - sent, jnp.cumsum(sent, axis=0) - sent


def _ragged_all_to_all(rows: jax.Array, capacity: int, sent: jax.Array, axis: str) -> jax.Array:
    """Rows `[M, D]`, those for device 0 first, then those for device 1 and so on -> `[capacity, D]`, those from device 0
    first; zeros behind them. sent int32 `[devices, devices]`: how many rows go from each device to each."""
    me = lax.axis_index(axis)
    before, after = _starts(sent)
    out = jnp.zeros((capacity, rows.shape[1]), rows.dtype)
    if (device_kind() or "").startswith(_V5E):
        return _emulated(rows, out, before, after, sent, me, axis=axis)
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
    """Where there is no ragged all-to-all: every device takes everybody's rows and keeps its own."""
    everybody = lax.all_gather(rows, axis)
    place = jnp.arange(len(out))
    sender = jnp.searchsorted(after[:, me] + sent[:, me], place, side="right")
    real = sender < len(sent)
    sender = jnp.minimum(sender, len(sent) - 1)
    row = before[sender, me] + place - after[sender, me]
    return jnp.where(real[:, None], everybody[sender, jnp.where(real, row, 0)], out)
