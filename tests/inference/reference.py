"""Sampling in plain numpy, float64, one row at a time: what the filters and penalties mean."""

from collections.abc import Callable, Collection, Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from exaone_jax.inference.sampling import RowSampling, SamplingParams, draw
from exaone_jax.model import Transformer
from tests.inference.small_models import padded_logits

_draw = jax.jit(draw, static_argnums=3)


def softmax(logits: np.ndarray) -> np.ndarray:
    weights = np.exp(logits - logits.max())
    return weights / weights.sum()


def penalised(logits: np.ndarray, prompt: Sequence[int], generated: Sequence[int], p: SamplingParams) -> np.ndarray:
    out = np.array(logits, np.float64)
    for token in {*prompt, *generated}:
        out[token] = out[token] / p.repetition_penalty if out[token] > 0 else out[token] * p.repetition_penalty
    for token in generated:
        out[token] -= p.frequency_penalty
    for token in set(generated):
        out[token] -= p.presence_penalty
    return out


def distribution(logits: np.ndarray, p: SamplingParams) -> np.ndarray:
    """Probabilities `[V]` after temperature, top-k, top-p and min-p, in this order."""
    scaled = np.asarray(logits, np.float64) / p.temperature
    kept = sorted(range(len(scaled)), key=lambda token: (-scaled[token], token))
    kept = kept[: p.top_k or None]
    mass = np.cumsum(softmax(scaled[kept]))
    kept = [token for token, before in zip(kept, [0.0, *mass], strict=False) if p.top_p == 1.0 or before < p.top_p]
    chances = softmax(scaled[kept])
    kept = [token for token, chance in zip(kept, chances, strict=True) if chance >= p.min_p * chances[0]]
    out = np.zeros(len(scaled))
    out[kept] = softmax(scaled[kept])
    return out


class Said(NamedTuple):
    """Tokens of one request, and what the model thought: log-probabilities `[V]` before each of them and of the prompt's."""

    tokens: list[int]
    thought: list[np.ndarray]
    thought_of_prompt: list[np.ndarray]


def say(
    model: Transformer,
    rows: Sequence[Sequence[int]],
    params: Sequence[SamplingParams],
    ends: Collection[int],
    allowed: Sequence[Callable[[list[int]], np.ndarray]] | None = None,
    length: int = 96,
) -> list[Said]:
    """Every request token by token, each from a forward pass over the whole sequence.

    ends: of the model. allowed: for each request, which tokens (bool `[V]`) may follow those generated.
    """
    sequences, out, alive = [list(row) for row in rows], [], set(range(len(rows)))
    for row, logits in zip(rows, padded_logits(model, rows, length), strict=True):
        out.append(Said([], [], [log_softmax(x) for x in logits[: len(row) - 1]]))
    while alive:
        logits = padded_logits(model, sequences, length)
        for i in sorted(alive):
            p, said = params[i], out[i]
            own_ends = {*p.stop_token_ids, *(() if p.ignore_eos else ends)}
            raw = np.asarray(logits[i, len(sequences[i]) - 1], np.float64)
            said.thought.append(log_softmax(raw))
            inside = raw.copy()
            for token, bias in p.logit_bias:
                inside[token] += bias
            if allowed is not None:
                inside[~allowed[i](said.tokens)] = -np.inf
            if len(said.tokens) < p.min_tokens:
                inside[list(own_ends)] = -np.inf
            inside = penalised(inside, rows[i], said.tokens, p)
            said.tokens.append(_drawn(inside, p, len(sequences[i])))
            sequences[i].append(said.tokens[-1])
            if said.tokens[-1] in own_ends or len(said.tokens) == p.max_new_tokens:
                alive.remove(i)
    return out


def _drawn(logits: np.ndarray, p: SamplingParams, position: int) -> int:
    if p.temperature == 0:
        return int(logits.argmax())
    with np.errstate(divide="ignore"):
        chances = np.log(distribution(logits, p))
    return int(_draw(jnp.asarray(chances, jnp.float32)[None], RowSampling.of([p]), jnp.array([position]), 0)[0])


def log_softmax(logits: np.ndarray) -> np.ndarray:
    return np.log(softmax(np.asarray(logits, np.float64)))
