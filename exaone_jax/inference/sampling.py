"""From logits to tokens: penalties, temperature, filters and draws that depend on a row's seed and position alone."""

from collections.abc import Mapping, Sequence
from typing import Annotated, NamedTuple

import jax
import jax.numpy as jnp
from pydantic import (
    AfterValidator,
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    ValidationError,
    ValidationInfo,
    field_validator,
)

from exaone_jax.errors import InputError
from exaone_jax.inference.grammar import Grammar

_REMOVED = -jnp.inf
GREEDY_EPSILON = 1e-5  # a temperature below this is greedy, as in vLLM: dividing by it would overflow
MAX_LOGPROBS = 20  # most tokens beside the chosen one whose log-probabilities can be asked for
MAX_STOP_IDS = 64


def _sorted_by_id(bias: tuple[tuple[int, float], ...]) -> tuple[tuple[int, float], ...]:
    if len({token for token, _ in bias}) < len(bias):
        raise ValueError("a token id comes more than once")
    return tuple(sorted(bias))


TokenId = Annotated[int, Field(ge=0, lt=2**31)]
LogitBias = Annotated[  # a mapping, or its items; kept as items, which can be hashed
    tuple[tuple[TokenId, Annotated[float, Field(ge=-100.0, le=100.0)]], ...],
    BeforeValidator(lambda given: tuple(given.items()) if isinstance(given, Mapping) else given),
    AfterValidator(_sorted_by_id),
]


class SamplingParams(BaseModel):
    """How to choose tokens, when to end, and what to tell of it. The default is greedy.

    Logits change in this order: logit_bias, penalties, temperature, top-k, top-p, min-p, as in transformers and vLLM.
    presence and frequency penalties look at generated tokens, the repetition penalty at the prompt too.

    stop: texts that end it and are left out. stop_token_ids: tokens that end it beside those of the model.
    min_tokens: so many tokens come before anything but max_new_tokens ends it: until then tokens that would are not drawn, and
    stop strings pass.
    logit_bias: token id -> what is added to its logit.
    logprobs: tell each new token's log-probability and those of so many best ones, under the model's own distribution,
    before anything above changes it; prompt_logprobs: the same of the prompt's tokens. None: do not.
    grammar: what the text must obey. Not together with min_tokens or ignore_eos: a grammar says where the text may end.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    max_new_tokens: int = Field(default=128, ge=1)
    temperature: float = Field(default=0.0, ge=0.0, allow_inf_nan=False)
    top_k: int = Field(default=0, ge=0, lt=2**31)  # 0: off
    top_p: float = Field(default=1.0, gt=0.0, le=1.0)
    min_p: float = Field(default=0.0, ge=0.0, le=1.0)
    presence_penalty: float = Field(default=0.0, ge=-2.0, le=2.0)
    frequency_penalty: float = Field(default=0.0, ge=-2.0, le=2.0)
    repetition_penalty: float = Field(default=1.0, ge=0.01, le=100.0)
    seed: int = Field(default=0, ge=0, lt=2**32)
    stop: tuple[str, ...] = ()
    stop_token_ids: tuple[TokenId, ...] = Field(default=(), max_length=MAX_STOP_IDS)
    min_tokens: int = Field(default=0, ge=0)
    ignore_eos: bool = False
    logit_bias: LogitBias = ()
    logprobs: int | None = Field(default=None, ge=0, le=MAX_LOGPROBS)
    prompt_logprobs: int | None = Field(default=None, ge=0, le=MAX_LOGPROBS)
    grammar: Grammar | None = None

    @field_validator("min_tokens")
    @classmethod
    def _at_most_all(cls, value: int, info: ValidationInfo) -> int:
        if value > (most := info.data.get("max_new_tokens", value)):
            raise ValueError(f"at most max_new_tokens, {most}, may be asked for")
        return value

    @field_validator("grammar")
    @classmethod
    def _alone(cls, value: Grammar | None, info: ValidationInfo) -> Grammar | None:
        if value is not None and (others := [name for name in ("min_tokens", "ignore_eos") if info.data.get(name)]):
            raise ValueError(f"a grammar says where the text may end, so it cannot be served with {', '.join(others)}")
        return value

    @property
    def penalised(self) -> bool:
        return (self.presence_penalty, self.frequency_penalty, self.repetition_penalty) != (0.0, 0.0, 1.0)


def sampling_params(**fields: object) -> SamplingParams:
    """SamplingParams; raises InputError that names the field, what was found and what is allowed."""
    try:
        params = SamplingParams.model_validate(fields)
    except ValidationError as error:
        problems = (f"{'.'.join(map(str, e['loc']))}: {e['msg']}, found {e['input']!r}" for e in error.errors())
        raise InputError("sampling parameters: " + "; ".join(problems)) from error
    if any(not text for text in params.stop):
        raise InputError("sampling parameters: stop: a stop string must not be empty")
    return params


class RowSampling(NamedTuple):
    """The sampling parameters of B rows as arrays `[B]`: float32, but top_k int32 and seed uint32."""

    temperature: jax.Array
    top_k: jax.Array
    top_p: jax.Array
    min_p: jax.Array
    presence_penalty: jax.Array
    frequency_penalty: jax.Array
    repetition_penalty: jax.Array
    seed: jax.Array

    @classmethod
    def of(cls, rows: Sequence[SamplingParams]) -> "RowSampling":
        dtypes = {"top_k": jnp.int32, "seed": jnp.uint32}
        return cls(*(jnp.array([getattr(r, f) for r in rows], dtypes.get(f, jnp.float32)) for f in cls._fields))


def penalise(logits: jax.Array, counts: jax.Array, in_prompt: jax.Array, rows: RowSampling) -> jax.Array:
    """Penalised logits float32 `[B, V]`; counts int32 `[B, V]` of generated tokens, in_prompt bool `[B, V]`."""
    repetition = rows.repetition_penalty[:, None]
    repeated = jnp.where(logits > 0, logits / repetition, logits * repetition)
    logits = jnp.where(in_prompt | (counts > 0), repeated, logits)
    return logits - rows.frequency_penalty[:, None] * counts - rows.presence_penalty[:, None] * (counts > 0)


def log_distribution(logits: jax.Array, rows: RowSampling) -> jax.Array:
    """Log-probabilities float32 `[B, V]` of the tokens that may be drawn, the others at -inf.

    Temperature, then top-k, top-p, min-p. A greedy row is a distribution too: all its mass on the first best token.
    """
    greedy = rows.temperature < GREEDY_EPSILON
    scaled = logits / jnp.where(greedy, 1.0, rows.temperature)[:, None]
    filtering = jnp.any(~greedy & ((rows.top_k > 0) | (rows.top_p < 1.0) | (rows.min_p > 0.0)))
    scaled = jax.lax.cond(filtering, lambda x: _filter(x, rows), lambda x: x, scaled)
    best = jnp.argmax(logits, axis=-1)[:, None]
    only_best = jnp.where(jnp.arange(logits.shape[-1]) == best, 0.0, _REMOVED)
    return jnp.where(greedy[:, None], only_best, jax.nn.log_softmax(scaled, axis=-1))


def _filter(logits: jax.Array, rows: RowSampling) -> jax.Array:
    """logits `[B, V]` with what top-k, top-p and min-p remove at -inf. The best token always stays."""
    vocab = logits.shape[-1]
    order = jnp.argsort(logits, axis=-1, descending=True, stable=True)
    sorted_logits = jnp.take_along_axis(logits, order, axis=-1)
    rank = jnp.arange(vocab)
    k = jnp.where(rows.top_k > 0, rows.top_k, vocab)[:, None]
    sorted_logits = jnp.where(rank < k, sorted_logits, _REMOVED)
    probs = jax.nn.softmax(sorted_logits, axis=-1)
    mass_before = jnp.cumsum(probs, axis=-1) - probs  # top-p keeps a token while those better than it have less than p
    outside = (rows.top_p[:, None] < 1.0) & (mass_before >= rows.top_p[:, None])
    sorted_logits = jnp.where(outside & (rank > 0), _REMOVED, sorted_logits)
    unlikely = probs < rows.min_p[:, None] * probs[:, :1]
    sorted_logits = jnp.where(unlikely & (rank > 0), _REMOVED, sorted_logits)
    row = jnp.arange(logits.shape[0])[:, None]
    return jnp.zeros_like(logits).at[row, order].set(sorted_logits, unique_indices=True)


def row_keys(seed: jax.Array, position: jax.Array, purpose: int) -> jax.Array:
    """A random key for each row: of its seed, the drawn token's position (int32 `[B]`) and what is drawn."""

    def key(seed: jax.Array, position: jax.Array) -> jax.Array:
        return jax.random.fold_in(jax.random.fold_in(jax.random.key(seed), position), purpose)

    return jax.vmap(key)(seed, position)


def draw(log_probs: jax.Array, rows: RowSampling, position: jax.Array, purpose: int) -> jax.Array:
    """Tokens int32 `[B]` drawn from log_probs `[B, V]` (Gumbel's trick), for the given position of each row."""

    def noisy(log_probs: jax.Array) -> jax.Array:
        keys = row_keys(rows.seed, position, purpose)
        return log_probs + jax.vmap(lambda key: jax.random.gumbel(key, log_probs.shape[1:]))(keys)

    any_random = jnp.any(rows.temperature >= GREEDY_EPSILON)
    return jnp.argmax(jax.lax.cond(any_random, noisy, lambda x: x, log_probs), axis=-1).astype(jnp.int32)
