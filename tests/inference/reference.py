"""Sampling in plain numpy, float64, one row at a time: what the filters and penalties mean."""

from collections.abc import Sequence

import numpy as np

from exaone_jax.inference.sampling import SamplingParams


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
