"""Text from a model: prefill in chunks, decode on the device, stop strings and streaming on the host."""

import dataclasses
from collections.abc import Sequence
from functools import partial
from typing import Literal

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from exaone_jax.config.model import ModelConfig
from exaone_jax.errors import CheckpointError, InputError
from exaone_jax.inference.decode import DecodeState, Pending, decode, first_token
from exaone_jax.inference.sampling import RowSampling, SamplingParams
from exaone_jax.model import KVCache, Transformer

PREFILL_CHUNK = 512  # most tokens of a prompt that one step takes: bounds activations and the rings' size
_SMALLEST_CHUNK = 16
# Cache capacities are rounded up to this, so that prompts of similar length share a compiled program.
_CAPACITY_STEP = 256

_ENGINE_ONLY = ("stop_token_ids", "min_tokens", "logit_bias", "logprobs", "prompt_logprobs", "grammar")

FinishReason = Literal["stop", "length"]


@dataclasses.dataclass(frozen=True)
class TokenOutput:
    """What one row generated: token ids (a stop id included), why it ended, and how its drafts fared.

    drafted: rounds that drafted; accepted: for each draft of a round, how often it was kept.
    """

    tokens: list[int]
    finish_reason: FinishReason
    drafted: int = 0
    accepted: tuple[int, ...] = ()


class Decoding:
    """Rows being decoded together. Iterating is `advance` until `finished`; what a row says never depends on its
    neighbours.

    Args:
        model: with its weights; split once here.
        prompts: token ids of each row, none empty, none with an id outside the vocabulary.
        params: sampling parameters of each row.
        drafts: tokens that the MTP layer proposes each round; 0 decodes plainly.
        stop_ids: token ids that end a row; None: the configuration's end-of-sequence ids.

    Raises InputError on prompts that are empty, hold ids outside the vocabulary, or leave no room in the context, and
    CheckpointError on a model whose logits are not finite.
    """

    def __init__(
        self,
        model: Transformer,
        prompts: Sequence[Sequence[int]],
        params: Sequence[SamplingParams],
        drafts: int = 0,
        stop_ids: Sequence[int] | None = None,
    ):
        _check(model, prompts, params, drafts)
        self.graphdef, self.weights = nnx.split(model)
        self.config, self.drafts = model.config, drafts
        self.rows = RowSampling.of(params)
        ignoring = [p.ignore_eos for p in params]
        if len(set(ignoring)) != 1:
            raise InputError("rows of one batch must agree on ignore_eos")
        self.stop_ids = () if ignoring[0] else tuple(self.config.eos_token_ids if stop_ids is None else stop_ids)
        self.state = self._prefill(model, prompts, params)

    def advance(self, rounds: int) -> None:
        """Run up to `rounds` rounds on the device; each settles 1 to drafts + 1 tokens of every unfinished row."""
        self.state = decode(
            self.graphdef,
            self.weights,
            self.state,
            self.rows,
            jnp.int32(rounds),
            drafts=self.drafts,
            stop_ids=self.stop_ids,
        )

    @property
    def finished(self) -> bool:
        return bool(jnp.all(self.state.done))

    def stop(self, row: int) -> None:
        """End one row from outside, as a stop string does."""
        self.state = dataclasses.replace(self.state, done=self.state.done.at[row].set(True))

    def tokens(self) -> list[list[int]]:
        """What each row has generated so far. Raises CheckpointError where logits were not finite."""
        _check_finite(self.state)
        tokens, generated = np.asarray(self.state.tokens), np.asarray(self.state.generated)
        return [row[:count].tolist() for row, count in zip(tokens, generated, strict=True)]

    def outputs(self) -> list[TokenOutput]:
        drafted, accepted = np.asarray(self.state.drafted).tolist(), np.asarray(self.state.accepted).tolist()
        limit = np.asarray(self.state.limit).tolist()
        return [
            TokenOutput(row, _finish_reason(row, most, self.stop_ids), d, tuple(a))
            for row, most, d, a in zip(self.tokens(), limit, drafted, accepted, strict=True)
        ]

    def _prefill(
        self, model: Transformer, prompts: Sequence[Sequence[int]], params: Sequence[SamplingParams]
    ) -> DecodeState:
        batch = len(prompts)
        lengths = np.array([len(p) for p in prompts], np.int32)
        limits = np.array([p.max_new_tokens for p in params], np.int32)
        longest = int(lengths.max())
        chunk = min(PREFILL_CHUNK, max(_SMALLEST_CHUNK, _power_of_two(longest)))
        needed = int((lengths + limits).max()) + self.drafts + 1
        capacity = _round_up(needed, _CAPACITY_STEP)
        padded = np.zeros((batch, _round_up(longest, chunk) + 1), np.int32)  # one more: the MTP layer looks ahead
        for row, prompt in enumerate(prompts):
            padded[row, : len(prompt)] = prompt
        cache = model.init_cache(batch, capacity, chunk)
        mtp_cache = model.init_mtp_cache(batch, capacity, chunk) if self.drafts else None
        last = jnp.zeros((batch, self.config.hidden_size), model.dtype)
        for start in range(0, longest, chunk):
            valid = np.clip(lengths - start, 0, chunk)
            last, cache, mtp_cache = _prefill_chunk(
                self.graphdef,
                self.weights,
                padded[:, start : start + chunk + 1],
                valid,
                start + valid < lengths,
                last,
                cache,
                mtp_cache,
            )
        return self._first(prompts, params, last, cache, mtp_cache, limits)

    def _first(
        self,
        prompts: Sequence[Sequence[int]],
        params: Sequence[SamplingParams],
        last: jax.Array,
        cache: KVCache,
        mtp_cache: KVCache | None,
        limits: np.ndarray,
    ) -> DecodeState:
        batch, vocab = len(prompts), self.config.vocab_size if any(p.penalised for p in params) else 0
        in_prompt = np.zeros((batch, vocab), bool)
        if vocab:
            for row, prompt in enumerate(prompts):
                in_prompt[row, list(prompt)] = True
        state = DecodeState(
            cache=cache,
            last=jnp.zeros((batch,), jnp.int32),
            tokens=jnp.zeros((batch, _round_up(int(limits.max()), _CAPACITY_STEP)), jnp.int32),
            generated=jnp.zeros((batch,), jnp.int32),
            limit=jnp.asarray(limits),
            done=jnp.zeros((batch,), bool),
            counts=jnp.zeros((batch, vocab), jnp.int32),
            in_prompt=jnp.asarray(in_prompt),
            drafted=jnp.zeros((batch,), jnp.int32),
            accepted=jnp.zeros((batch, self.drafts), jnp.int32),
            finite=jnp.ones((batch,), bool),
            mtp_cache=mtp_cache,
        )
        state = _first(self.graphdef, self.weights, state, last, self.rows, drafts=self.drafts, stop_ids=self.stop_ids)
        _check_finite(state)
        return state


def generate_tokens(
    model: Transformer, prompts: Sequence[Sequence[int]], params: Sequence[SamplingParams], drafts: int = 0
) -> list[TokenOutput]:
    """Generate for every prompt until a stop id or its max_new_tokens; stop strings are for `complete`."""
    decoding = Decoding(model, prompts, params, drafts)
    while not decoding.finished:
        decoding.advance(1 << 30)
    return decoding.outputs()


@partial(jax.jit, static_argnums=(0,), donate_argnums=(5, 6, 7))
def _prefill_chunk(
    graphdef: nnx.GraphDef[Transformer],
    params: nnx.State,
    tokens: jax.Array,
    valid: jax.Array,
    more: jax.Array,
    last: jax.Array,
    cache: KVCache,
    mtp_cache: KVCache | None,
) -> tuple[jax.Array, KVCache, KVCache | None]:
    """One chunk of every prompt, tokens `[B, C+1]` of which the last is only looked ahead at.

    valid int32 `[B]` of the C are real; more bool `[B]`: the prompt goes on after this chunk. Returns the hidden state
    `[B, D]` of each row's newest position and the caches; the MTP layer's stops one short of the end of the prompt.
    """
    model = nnx.merge(graphdef, params)
    hidden, cache = model.step(tokens[:, :-1], cache, valid)
    newest = jnp.take_along_axis(hidden, jnp.maximum(valid - 1, 0)[:, None, None], axis=1)[:, 0]
    if mtp_cache is not None:
        known = jnp.where(more, valid, jnp.maximum(valid - 1, 0))
        _, mtp_cache = model.mtp_step(hidden, tokens[:, 1:], mtp_cache, known)
    return jnp.where((valid > 0)[:, None], newest, last), cache, mtp_cache


@partial(jax.jit, static_argnums=(0,), static_argnames=("drafts", "stop_ids"), donate_argnums=(2,))
def _first(
    graphdef: nnx.GraphDef[Transformer],
    params: nnx.State,
    state: DecodeState,
    last: jax.Array,
    rows: RowSampling,
    *,
    drafts: int,
    stop_ids: tuple[int, ...],
) -> DecodeState:
    state = first_token(nnx.merge(graphdef, params), last, state, rows, stop_ids)
    if not drafts:
        return state
    batch, size = last.shape
    hidden = jnp.zeros((batch, drafts + 1, size), last.dtype).at[:, 0].set(last)
    tokens = jnp.zeros((batch, drafts + 1), jnp.int32).at[:, 0].set(state.last)
    return dataclasses.replace(state, pending=Pending(hidden, tokens, jnp.ones((batch,), jnp.int32)))


def _check_finite(state: DecodeState) -> None:
    if not jnp.all(state.finite):
        raise CheckpointError(
            "the model's logits are NaN or infinite: `exaone-jax convert verify` says which weights are"
        )


def _check(model: Transformer, prompts: Sequence[Sequence[int]], params: Sequence[SamplingParams], drafts: int) -> None:
    config = model.config
    if not prompts or len(prompts) != len(params):
        raise InputError(
            f"need as many sampling parameters as prompts, at least one; found {len(params)} and {len(prompts)}"
        )
    if drafts and config.mtp_layer is None:
        raise InputError(f"this {config.model_type} model has no MTP layer to draft with; decode without (drafts=0)")
    if type(drafts) is not int or not 0 <= drafts <= 15:
        raise InputError(f"drafts must be a whole number in [0, 15], found {drafts!r}")
    for row, (prompt, sampling) in enumerate(zip(prompts, params, strict=True)):
        check_request(config, f"prompt {row}", prompt, sampling, config.max_position_embeddings)
        if asked := [
            name for name in _ENGINE_ONLY if getattr(sampling, name) != SamplingParams.model_fields[name].default
        ]:
            raise InputError(f"prompt {row} asks for {', '.join(asked)}, which the serving engine alone has")


def check_request(config: ModelConfig, name: str, prompt: Sequence[int], params: SamplingParams, room: int) -> None:
    """Raises InputError for a prompt that is empty or has no room for its answer, and ids outside the vocabulary."""
    if not len(prompt):
        raise InputError(f"{name} is empty: it needs at least one token")
    for token in prompt:
        if not isinstance(token, int | np.integer) or not 0 <= token < config.vocab_size:
            raise InputError(
                f"{name} has token id {token!r}, expected integers in the vocabulary [0, {config.vocab_size})"
            )
    named = {"stop_token_ids": params.stop_token_ids, "logit_bias": [token for token, _ in params.logit_bias]}
    for field, ids in named.items():
        if outside := [token for token in ids if token >= config.vocab_size]:
            raise InputError(
                f"{field} has token id {outside[0]}, expected ids in the vocabulary [0, {config.vocab_size})"
            )
    total = len(prompt) + params.max_new_tokens
    if total > room:
        raise InputError(
            f"{name} has {len(prompt)} tokens and may generate {params.max_new_tokens} more: {total} is "
            f"beyond the context of {room}"
        )


def _finish_reason(tokens: Sequence[int], limit: int, stop_ids: tuple[int, ...]) -> FinishReason:
    ended = bool(tokens) and tokens[-1] in stop_ids
    return "stop" if ended or len(tokens) < limit else "length"


def _power_of_two(n: int) -> int:
    return 1 << (n - 1).bit_length()


def _round_up(n: int, step: int) -> int:
    return -(-n // step) * step
