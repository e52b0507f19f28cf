"""The decoding round on the device: draft with the MTP layer, verify with the model, keep what agrees.

One round proposes k tokens and settles between 1 and k+1. With k = 0 it is plain decoding, so both are one piece of
code. A draft d is kept with probability min(1, p(d) / q(d)), where p and q are the model's and the drafter's
distributions after the same penalties and filters; the first draft that is not kept is replaced by a draw from
max(p - q, 0), normalised (Leviathan et al. 2023, arXiv 2211.17192). The tokens have the model's own distribution, and
greedy tokens are the model's own.
"""

import dataclasses
from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx

from exaone_jax.inference.sampling import RowSampling, draw, log_distribution, penalise, row_keys
from exaone_jax.model import KVCache, Transformer

_TOKEN, _DRAFT, _ACCEPT = 0, 1, 2  # purposes of random draws


class Pending(NamedTuple):
    """What the MTP layer has yet to read: hidden `[B, k+1, D]`, the token after each `[B, k+1]`, how many `[B]`."""

    hidden: jax.Array
    tokens: jax.Array
    valid: jax.Array


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class DecodeState:
    """B rows in the middle of decoding.

    last: int32 `[B]`, the newest token, not in the cache yet; it stands at position cache.lengths.
    tokens: int32 `[B, N]`, what was generated; generated: int32 `[B]`, how many. limit: int32 `[B]`, how many may be.
    done: bool `[B]`. counts int32 `[B, V]` and in_prompt bool `[B, V]` feed the penalties (`[B, 0]` without any).
    drafted int32 `[B]` and accepted int32 `[B, k]`: rounds that drafted, and how often each draft was kept.
    finite: bool `[B]`, whether all logits that tokens were drawn from were.
    """

    cache: KVCache
    last: jax.Array
    tokens: jax.Array
    generated: jax.Array
    limit: jax.Array
    done: jax.Array
    counts: jax.Array
    in_prompt: jax.Array
    drafted: jax.Array
    accepted: jax.Array
    finite: jax.Array
    mtp_cache: KVCache | None = None
    pending: Pending | None = None


@partial(jax.jit, static_argnums=(0,), static_argnames=("drafts", "stop_ids"), donate_argnames=("state",))
def decode(
    graphdef: nnx.GraphDef[Transformer],
    params: nnx.State,
    state: DecodeState,
    rows: RowSampling,
    rounds: jax.Array,
    *,
    drafts: int,
    stop_ids: tuple[int, ...],
) -> DecodeState:
    """Up to `rounds` rounds of `drafts` proposed tokens each; ends early when every row is done."""
    model = nnx.merge(graphdef, params)

    def unfinished(carry: tuple[jax.Array, DecodeState]) -> jax.Array:
        return (carry[0] < rounds) & ~jnp.all(carry[1].done)

    def one(carry: tuple[jax.Array, DecodeState]) -> tuple[jax.Array, DecodeState]:
        return carry[0] + 1, decode_round(model, carry[1], rows, drafts, stop_ids)

    return jax.lax.while_loop(unfinished, one, (jnp.int32(0), state))[1]


def decode_round(
    model: Transformer, state: DecodeState, rows: RowSampling, drafts: int, stop_ids: tuple[int, ...]
) -> DecodeState:
    """Draft, verify, settle; rows that are done stay as they are."""
    start = state.cache.lengths
    active = ~state.done
    state, proposed, proposal = _draft(model, state, rows, drafts)
    inputs = jnp.concatenate([state.last[:, None], proposed], axis=1)
    hidden, cache = model.step(inputs, state.cache, jnp.where(active, drafts + 1, 0))
    logits = model.logits(hidden)
    target = _targets(logits, state, rows, proposed)
    kept, final = _settle(target, proposal, proposed, rows, start)
    new = jnp.concatenate([proposed, final[:, None]], axis=1)
    new = jnp.where(jnp.arange(drafts + 1) == kept[:, None], final[:, None], new)
    unused = ~active[:, None] | (jnp.arange(drafts + 1) > kept[:, None])
    state = dataclasses.replace(
        state,
        cache=cache.rolled_back(jnp.where(active, start + kept + 1, start)),
        finite=state.finite & jnp.all(jnp.all(jnp.isfinite(logits), axis=-1) | unused, axis=-1),
    )
    if drafts:
        state = dataclasses.replace(
            state,
            pending=Pending(hidden, new, jnp.where(active, kept + 1, 0)),
            drafted=state.drafted + active,
            accepted=state.accepted + (active[:, None] & (jnp.arange(drafts) < kept[:, None])),
        )
    return emit(state, new, kept + 1, stop_ids)


def emit(state: DecodeState, new: jax.Array, count: jax.Array, stop_ids: tuple[int, ...]) -> DecodeState:
    """Write the first `count` (int32 `[B]`) of the new tokens `[B, n]`, up to a stop id or the limit."""
    batch, n = new.shape
    index = jnp.arange(n)
    stops = jnp.isin(new, jnp.array(stop_ids, jnp.int32)) & (index < count[:, None])
    first_stop = jnp.where(jnp.any(stops, axis=1), jnp.argmax(stops, axis=1), n)
    count = jnp.minimum(jnp.minimum(count, first_stop + 1), state.limit - state.generated)
    count = jnp.where(state.done, 0, count)
    row = jnp.arange(batch)[:, None]
    place = jnp.where(index < count[:, None], state.generated[:, None] + index, state.tokens.shape[1])
    generated = state.generated + count
    return dataclasses.replace(
        state,
        tokens=state.tokens.at[row, place].set(new, mode="drop"),
        generated=generated,
        last=jnp.where(
            count > 0, jnp.take_along_axis(new, jnp.maximum(count - 1, 0)[:, None], axis=1)[:, 0], state.last
        ),
        done=state.done | (first_stop < count) | (generated >= state.limit),
        counts=state.counts.at[row, jnp.where(index < count[:, None], new, state.counts.shape[1])].add(1, mode="drop"),
    )


def first_token(
    model: Transformer, hidden: jax.Array, state: DecodeState, rows: RowSampling, stop_ids: tuple[int, ...]
) -> DecodeState:
    """Draw the first token from hidden `[B, D]` of the prompt's last position."""
    logits = model.logits(hidden[:, None])
    target = _targets(logits, state, rows, state.last[:, None][:, :0])
    token = draw(target[:, 0], rows, state.cache.lengths, _TOKEN)
    state = dataclasses.replace(state, finite=jnp.all(jnp.isfinite(logits), axis=(1, 2)))
    return emit(state, token[:, None], jnp.ones_like(state.generated), stop_ids)


def _distribution(logits: jax.Array, counts: jax.Array, state: DecodeState, rows: RowSampling) -> jax.Array:
    if state.counts.shape[1]:
        logits = penalise(logits, counts, state.in_prompt, rows)
    return log_distribution(logits, rows)


def _count(counts: jax.Array, token: jax.Array) -> jax.Array:
    return counts.at[jnp.arange(token.shape[0]), token].add(1, mode="drop") if counts.shape[1] else counts


def _targets(logits: jax.Array, state: DecodeState, rows: RowSampling, proposed: jax.Array) -> jax.Array:
    """The model's log-distributions `[B, k+1, V]`, each penalised as if the drafts before it had been generated."""
    counts, targets = state.counts, []
    for j in range(logits.shape[1]):
        targets.append(_distribution(logits[:, j], counts, state, rows))
        if j < proposed.shape[1]:
            counts = _count(counts, proposed[:, j])
    return jnp.stack(targets, axis=1)


def _draft(
    model: Transformer, state: DecodeState, rows: RowSampling, drafts: int
) -> tuple[DecodeState, jax.Array, jax.Array]:
    """Propose tokens int32 `[B, k]` with their log-distributions `[B, k, V]`; the MTP layer reads what is pending
    first.

    Its cache keeps what it read of true hidden states only: what it wrote while drafting on its own is forgotten.
    """
    batch, vocab = state.last.shape[0], model.config.vocab_size
    if not drafts:
        return state, jnp.zeros((batch, 0), jnp.int32), jnp.zeros((batch, 0, vocab), jnp.float32)
    if state.pending is None or state.mtp_cache is None:
        raise ValueError("drafting needs a state that was prefilled for it")
    hidden, tokens, valid = state.pending
    out, cache = model.mtp_step(hidden, tokens, state.mtp_cache, valid)
    read = cache.lengths
    out = jnp.take_along_axis(out, jnp.maximum(valid - 1, 0)[:, None, None], axis=1)
    counts, proposed, proposal = state.counts, [], []
    for j in range(drafts):
        if j:
            out, cache = model.mtp_step(out, proposed[-1][:, None], cache, jnp.where(state.done, 0, 1))
        log_probs = _distribution(model.logits(out[:, 0]), counts, state, rows)
        token = draw(log_probs, rows, state.cache.lengths + 1 + j, _DRAFT)
        counts = _count(counts, token)
        proposed.append(token)
        proposal.append(log_probs)
    state = dataclasses.replace(state, mtp_cache=cache.rolled_back(read))
    return state, jnp.stack(proposed, axis=1), jnp.stack(proposal, axis=1)


def _settle(
    target: jax.Array, proposal: jax.Array, proposed: jax.Array, rows: RowSampling, start: jax.Array
) -> tuple[jax.Array, jax.Array]:
    """How many drafts are kept, int32 `[B]`, and the token that follows them, int32 `[B]`."""
    batch, drafts = proposed.shape
    kept = jnp.zeros((batch,), jnp.int32)
    agreeing = jnp.ones((batch,), bool)
    for j in range(drafts):
        chosen = proposed[:, j, None]
        ratio = jnp.take_along_axis(target[:, j] - proposal[:, j], chosen, axis=1)[:, 0]
        keys = row_keys(rows.seed, start + 1 + j, _ACCEPT)
        agreeing &= jnp.log(jax.vmap(jax.random.uniform)(keys)) < ratio
        kept += agreeing
    after = jnp.take_along_axis(target, kept[:, None, None], axis=1)[:, 0]
    if drafts:
        rejected = jnp.take_along_axis(proposal, jnp.minimum(kept, drafts - 1)[:, None, None], axis=1)[:, 0]
        rest = jnp.maximum(jnp.exp(after) - jnp.exp(rejected), 0.0)
        # Where the two distributions agree to rounding nothing is left over, and the model's own is the right one.
        use_rest = (kept < drafts) & (jnp.sum(rest, axis=-1) > 0)
        after = jnp.where(use_rest[:, None], jnp.log(rest), after)
    return kept, draw(after, rows, start + 1 + kept, _TOKEN)
