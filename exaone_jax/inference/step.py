"""The serving step on the device: chunks of prompts, new tokens and drafts to verify in one program on one flat token axis.

What a request says depends on its own tokens, parameters and seed alone. The token at a position is drawn from the model's
distribution there with noise of (seed, position), always; a draft is kept where it is the token so drawn. So a seed gives
the same text with drafts and without, in any company, and after any interruption ("drafter-invariant" speculation,
Daliri et al. 2024, arXiv 2408.07978). The drafter draws with the same noise, which keeps a share of at least
(1 - t) / (1 + t) of its drafts where its distribution is a total variation of t away; greedy drafts are kept where they agree.
"""

import dataclasses
from collections.abc import Sequence
from typing import Generic, NamedTuple, TypeVar

import jax
import jax.numpy as jnp
import numpy as np

from exaone_jax.inference.sampling import MAX_LOGPROBS, RowSampling, draw, log_distribution, penalise
from exaone_jax.model import PagedCache, Rows, Transformer
from exaone_jax.model.paged import Window

Array = TypeVar("Array", np.ndarray, jax.Array)
_TOKEN = 0  # purpose of the random draws, as in `decode`
_SCORED_ROWS = 64  # of a prompt whose logits are in memory at once


class Terms(NamedTuple):
    """What is asked for in each of S slots.

    limits: int32 `[S]`, positions ever settled, as the last token is not read; 0 once a text has ended.
    min_lengths: int32 `[S]`, positions below which none of ends (int32 `[S, E]`, filled up with V) is drawn.
    counts int32 `[S, V]` of generated tokens and in_prompt bool `[S, V]` feed the penalties. bias: float32 `[S, V]`, added to
    logits; biased: bool `[S]`, whether any of it is not zero.
    """

    limits: jax.Array
    min_lengths: jax.Array
    ends: jax.Array
    counts: jax.Array
    in_prompt: jax.Array
    bias: jax.Array
    biased: jax.Array
    sampling: RowSampling


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class ServingState:
    """What stays on the device between steps; S slots, k drafts.

    lengths: int32 `[S]`, positions settled in the cache. last: int32 `[S]`, the newest token, not in the cache yet.
    drafts: int32 `[S, k]`, proposed to follow it.
    """

    cache: PagedCache
    lengths: jax.Array
    last: jax.Array
    drafts: jax.Array
    terms: Terms


class Batch(NamedTuple, Generic[Array]):
    """What one step is to do, from the host: N rows of A sequences, the rows of each in order; padding has no rows.

    tokens: int32 `[N]` of prompts; rows that decode take theirs from the state. starts: int32 `[A + 1]`, first rows.
    slots: int32 `[A]`; S for padding. first: int32 `[A]`, position of the first row of a prompt's chunk, -1 to decode.
    after: int32 `[A]`, the token after a chunk. draws: bool `[A]`, whether the chunk is the prompt's last.
    scored, prompt_scored: bool `[A]`, whether log-probabilities are wanted of what is drawn, and of what a chunk holds.
    constrained: bool `[A]`, whether masks has anything to say; masks: uint32 `[A, k + 1, W]`, tokens that may be drawn, for
    the first of its rows that are needed.
    """

    tokens: Array
    starts: Array
    slots: Array
    first: Array
    after: Array
    draws: Array
    scored: Array
    prompt_scored: Array
    constrained: Array
    masks: Array


class Scores(NamedTuple):
    """Log-probabilities under the model's own distribution: float32 `[…]` of a token, float32 `[…, n]` of the best ones with
    their ids int32 `[…, n]`. rank: int32 `[…]`, how many tokens are as likely as the token or likelier, itself included.
    Zeros where nobody wants them."""

    own: jax.Array
    rank: jax.Array
    best: jax.Array
    best_ids: jax.Array


class Emitted(NamedTuple):
    """tokens int32 `[A, k + 1]` of which the first `count` (int32 `[A]`) are new; finite bool `[A]`, their logits were.

    drafts: int32 `[A, k]`, what the next step verifies.
    scores `[A, k + 1]` of the tokens; prompt_scores `[N]`, at each row of a chunk those of the token after it.
    """

    tokens: jax.Array
    count: jax.Array
    finite: jax.Array
    drafts: jax.Array
    scores: Scores
    prompt_scores: Scores


def init_state(
    model: Transformer,
    pages: dict[Window, int],
    page_size: int,
    slots: int,
    drafts: int,
    terms: Terms,
    kv_dtype: str | None = None,
) -> ServingState:
    """A state in which nothing runs. terms: any, of one slot, to be written over by `admit`. kv_dtype: None: the model's."""

    def integers(*shape: int) -> jax.Array:
        return jnp.zeros((slots, *shape), jnp.int32)

    return ServingState(
        cache=model.init_paged_cache(pages, page_size, mtp=drafts > 0, dtype=kv_dtype),
        lengths=integers(),
        last=integers(),
        drafts=integers(drafts),
        terms=jax.tree.map(lambda own: jnp.repeat(own, slots, axis=0), terms),
    )


def admit(state: ServingState, slot: jax.Array, terms: Terms) -> ServingState:
    """Give a slot to a request. terms: of one slot."""
    written = jax.tree.map(lambda all_slots, own: all_slots.at[slot].set(own[0]), state.terms, terms)
    return dataclasses.replace(state, terms=written)


def serving_step(
    model: Transformer,
    state: ServingState,
    tables: tuple[jax.Array, ...],
    batch: Batch[jax.Array],
    windows: tuple[Window, ...],
    drafts: int,
) -> tuple[ServingState, Emitted]:
    """Run the batch. tables: int32 `[S, M]` for each of `windows`. drafts: how many of the state's k are verified, and drafted
    for the next step; where that verifies more, the others are of earlier steps and hardly kept."""
    slots, decoding = batch.slots, batch.first < 0
    own = jnp.concatenate([state.last[:, None], state.drafts[:, :drafts]], axis=1)[slots]
    first = jnp.where(decoding, state.lengths[slots], batch.first)
    rows = Rows.of(tuple(t[slots] for t in tables), windows, batch.starts, first, len(batch.tokens))
    place = jnp.arange(len(batch.tokens)) - batch.starts[rows.sequence]  # of a row among its sequence's
    place = jnp.minimum(place, own.shape[1] - 1)
    tokens = jnp.where(decoding[rows.sequence], own[rows.sequence, place], batch.tokens)
    hidden, cache = model.ragged_step(tokens, state.cache, rows)

    drawn, emitted = _draw(model, state, batch, rows, hidden, own[:, 1:])
    added = jnp.where(decoding, emitted.count, jnp.diff(batch.starts))
    lengths, index = first + added, jnp.arange(drawn.shape[1])
    counts = state.terms.counts
    place_new = jnp.where(index < emitted.count[:, None], drawn, counts.shape[1])  # out of range: dropped
    newest = jnp.take_along_axis(drawn, jnp.maximum(emitted.count - 1, 0)[:, None], axis=1)[:, 0]
    state = dataclasses.replace(
        state,
        cache=cache,
        lengths=state.lengths.at[slots].set(lengths, mode="drop"),
        last=state.last.at[slots].set(jnp.where(emitted.count > 0, newest, state.last[slots]), mode="drop"),
        terms=state.terms._replace(
            counts=counts.at[slots[:, None], place_new].add(1, mode="drop"),
            limits=state.terms.limits.at[slots].multiply(~_ends(state.terms, slots, place_new), mode="drop"),
        ),
    )
    # The token after each row: the next one of its chunk, what comes after the chunk, or what was drawn.
    after = jnp.where(batch.draws, drawn[:, 0], batch.after)
    ends = batch.starts[rows.sequence + 1] - 1 == jnp.arange(len(tokens))
    following = jnp.where(ends, after[rows.sequence], jnp.roll(tokens, -1))
    following = jnp.where(decoding[rows.sequence], drawn[rows.sequence, place], following)
    wanted = rows.real & batch.prompt_scored[rows.sequence]
    emitted = emitted._replace(prompt_scores=_score_prompts(model, hidden, following, wanted))
    if state.drafts.shape[1]:
        last_rows = batch.starts[:-1] + added - 1
        state = _draft(model, state, slots, rows, last_rows, lengths, hidden, following, drafts)
    return state, emitted._replace(drafts=state.drafts[slots])


def serving_steps(
    model: Transformer,
    state: ServingState,
    tables: tuple[jax.Array, ...],
    batch: Batch[jax.Array],
    windows: tuple[Window, ...],
    drafts: int,
    steps: int,
) -> tuple[ServingState, Emitted]:
    """Up to `steps` steps of requests that all decode, until none has anything left to say. Emitted has a further first
    axis for them, and no prompt_scores."""

    def one(state: ServingState) -> tuple[ServingState, Emitted]:
        state, emitted = serving_step(model, state, tables, batch, windows, drafts)
        return state, emitted._replace(prompt_scores=jax.tree.map(lambda x: x[:0], emitted.prompt_scores))

    def unfinished(carry: tuple[jax.Array, ServingState, Emitted]) -> jax.Array:
        i, state, _ = carry
        slots = jnp.minimum(batch.slots, len(state.lengths) - 1)
        left = (batch.slots < len(state.lengths)) & (state.lengths[slots] < state.terms.limits[slots])
        return (i < steps) & jnp.any(left)

    def further(carry: tuple[jax.Array, ServingState, Emitted]) -> tuple[jax.Array, ServingState, Emitted]:
        i, state, so_far = carry
        state, emitted = one(state)
        return i + 1, state, jax.tree.map(lambda all_steps, new: all_steps.at[i].set(new), so_far, emitted)

    _, shapes = jax.eval_shape(one, state)
    nothing = jax.tree.map(lambda x: jnp.zeros((steps, *x.shape), x.dtype), shapes)
    nothing = nothing._replace(finite=jnp.ones_like(nothing.finite))
    _, state, emitted = jax.lax.while_loop(unfinished, further, (jnp.int32(0), state, nothing))
    return state, emitted


def _ends(terms: Terms, slots: jax.Array, tokens: jax.Array) -> jax.Array:
    """Whether any of the tokens int32 `[A, n]` (V: none) ends its text, bool `[A]`."""
    ends = terms.ends[slots][:, None]
    return jnp.any((tokens[..., None] == ends) & (ends < terms.counts.shape[1]), axis=(1, 2))


def _draw(
    model: Transformer, state: ServingState, batch: Batch[jax.Array], rows: Rows, hidden: jax.Array, drafts: jax.Array
) -> tuple[jax.Array, Emitted]:
    """Tokens int32 `[A, k + 1]` drawn after the last row of a prompt or after each row that decodes, and how many hold."""
    decoding, slots = batch.first < 0, batch.slots
    count, k = jnp.diff(batch.starts), drafts.shape[1]
    pick = jnp.where(decoding, batch.starts[:-1], batch.starts[1:] - 1)
    pick = jnp.clip(pick[:, None] + jnp.arange(k + 1), 0, len(hidden) - 1)
    logits = model.logits(hidden[pick])
    allowed = jax.lax.cond(
        jnp.any(batch.constrained), _masked, lambda logits, _: logits, logits, batch.masks[:, : k + 1]
    )
    drawn = _choose(allowed, rows.positions[pick] + 1, state, slots, drafts, jnp.arange(k + 1))
    # Rows that a sequence has room for; a prompt's chunk has one drawn token, or none.
    room = jnp.clip(state.terms.limits[slots] - rows.positions[pick[:, 0]], 0, count)
    most = jnp.where(decoding, room, batch.draws)
    agree = (drawn[:, :k] == drafts) & (jnp.arange(1, k + 1) < most[:, None])
    held = jnp.sum(jnp.cumprod(agree.astype(jnp.int32), axis=1), axis=1)
    number = jnp.where(most > 0, held + 1, 0)
    finite = jnp.all(jnp.isfinite(logits), axis=-1) | (jnp.arange(k + 1) >= number[:, None])
    scores = _score_if(jnp.any(batch.scored), logits, drawn)
    return drawn, Emitted(drawn, number, jnp.all(finite, axis=1), drafts, scores, _no_scores(logits, (0,)))


def _masked(logits: jax.Array, masks: jax.Array) -> jax.Array:
    """logits `[…, V]` without the tokens whose bits are not set in masks uint32 `[…, W]`."""
    bits = masks[..., None] >> jnp.arange(32, dtype=jnp.uint32) & 1
    return jnp.where(bits.reshape(*masks.shape[:-1], -1)[..., : logits.shape[-1]] == 1, logits, -jnp.inf)


def _score_prompts(model: Transformer, hidden: jax.Array, following: jax.Array, wanted: jax.Array) -> Scores:
    """Scores `[N]` of the tokens following int32 `[N]`, where wanted bool `[N]`; a few rows of logits at a time."""
    count, size = len(hidden), min(len(hidden), _SCORED_ROWS)
    blocks = -(-count // size)

    def split(x: jax.Array) -> jax.Array:
        return jnp.pad(x, [(0, blocks * size - count), *[(0, 0)] * (x.ndim - 1)]).reshape(blocks, size, *x.shape[1:])

    def block(rows: Sequence[jax.Array]) -> Scores:
        hidden, following, wanted = rows
        return _score_if(jnp.any(wanted), model.logits(hidden), following)

    def score(*rows: jax.Array) -> Scores:
        scores = jax.lax.map(block, tuple(map(split, rows)))
        return jax.tree.map(lambda x: x.reshape(-1, *x.shape[2:])[:count], scores)

    logits = jax.eval_shape(model.logits, hidden)
    return jax.lax.cond(jnp.any(wanted), score, lambda *_: _no_scores(logits, (count,)), hidden, following, wanted)


def _score_if(wanted: jax.Array, logits: jax.Array, tokens: jax.Array) -> Scores:
    """Scores `[…]` of tokens int32 `[…]` by logits `[…, V]`, if wanted (bool, for all of them)."""

    def score(logits: jax.Array, tokens: jax.Array) -> Scores:
        best, ids = jax.lax.top_k(logits, _best(logits))
        total = jax.nn.logsumexp(logits, axis=-1, keepdims=True)
        own = jnp.take_along_axis(logits, tokens[..., None], axis=-1)
        rank = jnp.sum(logits >= own, axis=-1, dtype=jnp.int32)
        return Scores((own - total)[..., 0], rank, best - total, ids)

    return jax.lax.cond(wanted, score, lambda *_: _no_scores(logits, tokens.shape), logits, tokens)


def _no_scores(logits: jax.Array | jax.ShapeDtypeStruct, shape: tuple[int, ...]) -> Scores:
    best = (*shape, _best(logits))
    own, ids = jnp.zeros(shape, logits.dtype), jnp.zeros(best, jnp.int32)
    return Scores(own, jnp.zeros(shape, jnp.int32), jnp.zeros(best, logits.dtype), ids)


def _best(logits: jax.Array | jax.ShapeDtypeStruct) -> int:
    return min(MAX_LOGPROBS, logits.shape[-1])


def _draft(
    model: Transformer,
    state: ServingState,
    slots: jax.Array,
    rows: Rows,
    last_rows: jax.Array,
    lengths: jax.Array,
    hidden: jax.Array,
    following: jax.Array,
    count: int,
) -> ServingState:
    """The MTP layer reads all rows, then proposes `count` tokens to come after each sequence's newest one.

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
        single = single.only(slots < len(state.lengths))
        out, cache = model.mtp_ragged_step(out, drafts[:, j - 1], cache, single)
        return out, cache, choose(out, drafts, j)

    drafts = state.drafts[slots]
    if count:
        drafts = choose(out, drafts, 0)
    if count > 1:
        own = PagedCache((), cache.mtp)  # all that the loop writes
        _, own, drafts = jax.lax.fori_loop(1, count, further, (out, own, drafts))
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
    (count, each, vocab), k, terms = logits.shape, drafts.shape[1], state.terms
    rows, position = jnp.repeat(slots, each), position.reshape(-1)
    sampling = jax.tree.map(lambda x: x[rows], terms.sampling)
    early = position < terms.min_lengths[rows]

    def shaped(logits: jax.Array) -> jax.Array:
        row = jnp.arange(count * each)[:, None]
        ends = jnp.where(early[:, None], terms.ends[rows], vocab)  # out of range: dropped
        logits = (logits + terms.bias[rows]).at[row, ends].set(-jnp.inf, mode="drop")
        index = jnp.where(jnp.arange(k) < before[:, None], drafts[:, None], vocab)  # [A, n, k]
        counts = terms.counts[rows].at[row, index.reshape(count * each, k)].add(1, mode="drop")
        return penalise(logits, counts, terms.in_prompt[rows], sampling)

    penalised = (
        (sampling.presence_penalty != 0) | (sampling.frequency_penalty != 0) | (sampling.repetition_penalty != 1)
    )
    any_shaped = jnp.any(penalised | terms.biased[rows] | early)
    log_probs = log_distribution(
        jax.lax.cond(any_shaped, shaped, lambda x: x, logits.reshape(count * each, vocab)), sampling
    )
    return draw(log_probs, sampling, position, _TOKEN).reshape(count, each)
