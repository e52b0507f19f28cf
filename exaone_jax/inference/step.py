"""The serving step on the device: chunks of prompts, new tokens and drafts to verify in one program on one flat token axis.

What a request says depends on its own tokens, parameters and seed alone. The token at a position is drawn from the model's
distribution there with noise of (seed, position), always; a draft is kept where it is the token so drawn. So a seed gives
the same text with drafts and without, in any company, and after any interruption ("drafter-invariant" speculation,
Daliri et al. 2024, arXiv 2408.07978). The drafter draws with the same noise, which keeps a share of at least
(1 - t) / (1 + t) of its drafts where its distribution is a total variation of t away; greedy drafts are kept where they agree.
"""

import dataclasses
from typing import Generic, NamedTuple, TypeVar

import jax
import jax.numpy as jnp
import numpy as np

from exaone_jax.inference.sampling import RowSampling, draw, log_distribution, penalise
from exaone_jax.model import PagedCache, Rows, Transformer
from exaone_jax.model.paged import Window

Array = TypeVar("Array", np.ndarray, jax.Array)
_TOKEN = 0  # purpose of the random draws, as in `decode`


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class ServingState:
    """What stays on the device between steps; S slots, k drafts.

    lengths: int32 `[S]`, positions settled in the cache. limits: int32 `[S]`, how many ever are: the last token is not read.
    last: int32 `[S]`, the newest token, not in the cache yet. drafts: int32 `[S, k]`, proposed to follow it.
    counts int32 `[S, V]` of generated tokens and in_prompt bool `[S, V]` feed the penalties.
    """

    cache: PagedCache
    lengths: jax.Array
    limits: jax.Array
    last: jax.Array
    drafts: jax.Array
    counts: jax.Array
    in_prompt: jax.Array
    sampling: RowSampling


class Batch(NamedTuple, Generic[Array]):
    """What one step is to do, from the host: N rows of A sequences, the rows of each in order; padding has no rows.

    tokens: int32 `[N]` of prompts; rows that decode take theirs from the state. starts: int32 `[A + 1]`, first rows.
    slots: int32 `[A]`; S for padding. first: int32 `[A]`, position of the first row of a prompt's chunk, -1 to decode.
    after: int32 `[A]`, the token after a chunk. draws: bool `[A]`, whether the chunk is the prompt's last.
    """

    tokens: Array
    starts: Array
    slots: Array
    first: Array
    after: Array
    draws: Array


class Emitted(NamedTuple):
    """tokens int32 `[A, k + 1]` of which the first `count` (int32 `[A]`) are new; finite bool `[A]`, their logits were."""

    tokens: jax.Array
    count: jax.Array
    finite: jax.Array


def init_state(
    model: Transformer, pages: dict[Window, int], page_size: int, slots: int, drafts: int, sampling: RowSampling
) -> ServingState:
    """A state in which nothing runs. sampling: of the slots, to be written over by `admit`."""
    vocab = model.config.vocab_size

    def integers(*shape: int) -> jax.Array:
        return jnp.zeros((slots, *shape), jnp.int32)

    return ServingState(
        cache=model.init_paged_cache(pages, page_size, mtp=drafts > 0),
        lengths=integers(),
        limits=integers(),
        last=integers(),
        drafts=integers(drafts),
        counts=integers(vocab),
        in_prompt=jnp.zeros((slots, vocab), bool),
        sampling=sampling,
    )


def admit(
    state: ServingState,
    slot: jax.Array,
    limit: jax.Array,
    sampling: RowSampling,
    counts: jax.Array,
    in_prompt: jax.Array,
) -> ServingState:
    """Give a slot to a request: its limit, sampling parameters (`[1]`), and counts and in_prompt `[V]`."""
    return dataclasses.replace(
        state,
        limits=state.limits.at[slot].set(limit),
        counts=state.counts.at[slot].set(counts),
        in_prompt=state.in_prompt.at[slot].set(in_prompt),
        sampling=jax.tree.map(lambda all_slots, own: all_slots.at[slot].set(own[0]), state.sampling, sampling),
    )


def serving_step(
    model: Transformer,
    state: ServingState,
    tables: tuple[jax.Array, ...],
    batch: Batch[jax.Array],
    windows: tuple[Window, ...],
) -> tuple[ServingState, Emitted]:
    """Run the batch. tables: int32 `[S, M]` for each of `windows`."""
    slots, decoding = batch.slots, batch.first < 0
    own = jnp.concatenate([state.last[:, None], state.drafts], axis=1)[slots]
    first = jnp.where(decoding, state.lengths[slots], batch.first)
    rows = Rows.of(tuple(t[slots] for t in tables), windows, batch.starts, first, len(batch.tokens))
    place = jnp.arange(len(batch.tokens)) - batch.starts[rows.sequence]  # of a row among its sequence's
    place = jnp.minimum(place, own.shape[1] - 1)
    tokens = jnp.where(decoding[rows.sequence], own[rows.sequence, place], batch.tokens)
    hidden, cache = model.ragged_step(tokens, state.cache, rows)

    drawn, emitted = _draw(model, state, batch, rows, hidden, own[:, 1:])
    added = jnp.where(decoding, emitted.count, jnp.diff(batch.starts))
    lengths, index = first + added, jnp.arange(drawn.shape[1])
    place_new = jnp.where(index < emitted.count[:, None], drawn, state.counts.shape[1])  # out of range: dropped
    newest = jnp.take_along_axis(drawn, jnp.maximum(emitted.count - 1, 0)[:, None], axis=1)[:, 0]
    state = dataclasses.replace(
        state,
        cache=cache,
        lengths=state.lengths.at[slots].set(lengths, mode="drop"),
        last=state.last.at[slots].set(jnp.where(emitted.count > 0, newest, state.last[slots]), mode="drop"),
        counts=state.counts.at[slots[:, None], place_new].add(1, mode="drop"),
    )
    if state.drafts.shape[1]:
        # The token after each row: the next one of its chunk, what comes after the chunk, or what was drawn.
        after = jnp.where(batch.draws, drawn[:, 0], batch.after)
        ends = batch.starts[rows.sequence + 1] - 1 == jnp.arange(len(tokens))
        following = jnp.where(ends, after[rows.sequence], jnp.roll(tokens, -1))
        following = jnp.where(decoding[rows.sequence], drawn[rows.sequence, place], following)
        state = _draft(model, state, slots, rows, batch.starts[:-1] + added - 1, lengths, hidden, following)
    return state, emitted


def _draw(
    model: Transformer, state: ServingState, batch: Batch[jax.Array], rows: Rows, hidden: jax.Array, drafts: jax.Array
) -> tuple[jax.Array, Emitted]:
    """Tokens int32 `[A, k + 1]` drawn after the last row of a prompt or after each row that decodes, and how many hold."""
    decoding, slots = batch.first < 0, batch.slots
    count, k = jnp.diff(batch.starts), drafts.shape[1]
    pick = jnp.where(decoding, batch.starts[:-1], batch.starts[1:] - 1)
    pick = jnp.clip(pick[:, None] + jnp.arange(k + 1), 0, len(hidden) - 1)
    logits = model.logits(hidden[pick])
    drawn = _choose(logits, rows.positions[pick] + 1, state, slots, drafts, jnp.arange(k + 1))
    # Rows that a sequence has room for; a prompt's chunk has one drawn token, or none.
    room = jnp.clip(state.limits[slots] - rows.positions[pick[:, 0]], 0, count)
    most = jnp.where(decoding, room, batch.draws)
    agree = (drawn[:, :k] == drafts) & (jnp.arange(1, k + 1) < most[:, None])
    held = jnp.sum(jnp.cumprod(agree.astype(jnp.int32), axis=1), axis=1)
    number = jnp.where(most > 0, held + 1, 0)
    finite = jnp.all(jnp.isfinite(logits), axis=-1) | (jnp.arange(k + 1) >= number[:, None])
    return drawn, Emitted(drawn, number, jnp.all(finite, axis=1))


def _draft(
    model: Transformer,
    state: ServingState,
    slots: jax.Array,
    rows: Rows,
    last_rows: jax.Array,
    lengths: jax.Array,
    hidden: jax.Array,
    following: jax.Array,
) -> ServingState:
    """The MTP layer reads all rows, then proposes what comes after each sequence's newest token.

    What it writes of rejected rows and on its own lies past `lengths` and is written over by what is true.
    """
    out, cache = model.mtp_ragged_step(hidden, following, state.cache, rows)
    out = out[jnp.maximum(last_rows, 0)]
    ones = jnp.arange(len(slots) + 1, dtype=jnp.int32)

    def choose(out: jax.Array, drafts: jax.Array, j: jax.typing.ArrayLike) -> jax.Array:
        """The drafts with the one of index j."""
        position = (lengths + 1 + j)[:, None]
        token = _choose(model.logits(out[:, None]), position, state, slots, drafts, jnp.asarray(j)[None])
        return drafts.at[:, j].set(token[:, 0])

    def further(
        j: jax.Array, carry: tuple[jax.Array, PagedCache, jax.Array]
    ) -> tuple[jax.Array, PagedCache, jax.Array]:
        out, cache, drafts = carry
        single = Rows.of(rows.tables, rows.windows, ones, lengths + j - 1, len(slots))
        single = single.only(slots < len(state.limits))
        out, cache = model.mtp_ragged_step(out, drafts[:, j - 1], cache, single)
        return out, cache, choose(out, drafts, j)

    drafts = choose(out, jnp.zeros((len(slots), state.drafts.shape[1]), jnp.int32), 0)
    if drafts.shape[1] > 1:
        own = PagedCache((), cache.mtp)  # all that the loop writes
        _, own, drafts = jax.lax.fori_loop(1, drafts.shape[1], further, (out, own, drafts))
        cache = dataclasses.replace(cache, mtp=own.mtp)
    return dataclasses.replace(state, cache=cache, drafts=state.drafts.at[slots].set(drafts, mode="drop"))


def _choose(
    logits: jax.Array,
    position: jax.Array,
    state: ServingState,
    slots: jax.Array,
    drafts: jax.Array,
    before: jax.Array,
) -> jax.Array:
    """Tokens int32 `[A, n]` for these positions `[A, n]`, drawn from logits `[A, n, V]`, the i-th penalised as if the first
    before[i] of the drafts `[A, k]` had been generated."""
    (count, each, vocab), k = logits.shape, drafts.shape[1]
    rows = jnp.repeat(slots, each)
    sampling = jax.tree.map(lambda x: x[rows], state.sampling)

    def penalised(logits: jax.Array) -> jax.Array:
        index = jnp.where(jnp.arange(k) < before[:, None], drafts[:, None], vocab)  # [A, n, k]; out of range: dropped
        index = index.reshape(count * each, k)
        counts = state.counts[rows].at[jnp.arange(count * each)[:, None], index].add(1, mode="drop")
        return penalise(logits, counts, state.in_prompt[rows], sampling)

    harsh = (sampling.presence_penalty != 0) | (sampling.frequency_penalty != 0) | (sampling.repetition_penalty != 1)
    flat = logits.reshape(count * each, vocab)
    log_probs = log_distribution(jax.lax.cond(jnp.any(harsh), penalised, lambda x: x, flat), sampling)
    return draw(log_probs, sampling, position.reshape(-1), _TOKEN).reshape(count, each)
