"""Is it the same model? One check for all parity tests, and the ways of running ours."""

from dataclasses import dataclass
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from tests import reference_model
from tests.golden.cases import LENGTHS, ROUTER_MARGIN

MAX_KL = 1e-6  # a token, in nats: what noise of 1.4e-3 on every logit would give. float32 rounding gives 1e-8 at most.
CLEAR_GAP = (
    2e-3  # logits closer than this at the top may change places: 5 times the largest float32 difference seen (4e-4)
)
MAX_UNCLEAR = (
    0.02  # of the tokens, or one. Expected: the density of the gap at 0, about 1 a unit, times CLEAR_GAP: 0.2 %
)


@dataclass(frozen=True)
class Parity:
    """max_kl: of any of `tokens`. argmax_errors: those whose clear first choice differs. unclear: those not so compared."""

    max_kl: float
    argmax_errors: int
    unclear: int
    tokens: int

    @property
    def ok(self) -> bool:
        return self.max_kl <= MAX_KL and self.argmax_errors == 0 and self.unclear <= max(1, MAX_UNCLEAR * self.tokens)


def kl_divergence(ours: np.ndarray, oracle: np.ndarray) -> np.ndarray:
    """KL(oracle || ours) of every token, float64 `[...]`, from logits `[..., V]`."""
    p, q = _log_softmax(oracle), _log_softmax(ours)
    return np.sum(np.exp(p) * (p - q), axis=-1)


def _log_softmax(logits: np.ndarray) -> np.ndarray:
    shifted = logits.astype(np.float64) - logits.max(axis=-1, keepdims=True)
    return shifted - np.log(np.exp(shifted).sum(axis=-1, keepdims=True))


def kl_and_argmax(ours: np.ndarray, oracle: np.ndarray) -> Parity:
    """Compare logits `[N, V]`, N tokens. A NaN anywhere is a KL of infinity."""
    if ours.shape != oracle.shape:
        raise ValueError(f"logits {ours.shape} and {oracle.shape} are not of the same tokens")
    kl = np.nan_to_num(kl_divergence(ours, oracle), nan=np.inf)
    second, first = np.sort(oracle, axis=-1)[:, -2:].T
    clear = first - second > CLEAR_GAP
    wrong = (np.argmax(ours, axis=-1) != np.argmax(oracle, axis=-1)) & clear
    return Parity(float(kl.max()), int(wrong.sum()), int((~clear).sum()), len(clear))


def assert_parity(ours, oracle) -> None:
    parity = kl_and_argmax(np.asarray(ours, np.float64), np.asarray(oracle, np.float64))
    assert parity.ok, parity


def oracle_logits(config: dict, tensors: dict[str, np.ndarray], tokens: np.ndarray) -> list[np.ndarray]:
    """float64 logits `[LENGTHS[i], V]` of every row, by the numpy model; every choice of experts is clear of rounding."""
    outputs = [reference_model.run(config, tensors, row[:length]) for row, length in zip(tokens, LENGTHS, strict=True)]
    margin = min((layer.margin for out in outputs for layer in out.routing), default=np.inf)
    assert margin >= ROUTER_MARGIN, f"choose another seed for the tokens: an expert is chosen by a margin of {margin}"
    return [out.logits for out in outputs]


def left_padded(tokens: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """(tokens, mask of the real ones), each int64 `[3, LENGTH]`, with every row's tokens at its right end."""
    padded, mask = np.zeros_like(tokens), np.zeros_like(tokens)
    for row, length in enumerate(LENGTHS):
        padded[row, tokens.shape[1] - length :] = tokens[row, :length]
        mask[row, tokens.shape[1] - length :] = 1
    return padded, mask


def chunked_logits(
    model, tokens: np.ndarray, lengths: tuple[int, ...], chunk: int, decode: int = 0
) -> list[np.ndarray]:
    """Logits `[lengths[i], V]` of every row through the cache: all but the last `decode` tokens by chunks, those one by one.

    Rows of unequal length go together; a row that has ended has no valid tokens left.
    """
    graphdef, params = nnx.split(model)
    cache = model.init_cache(len(tokens), max(lengths), chunk)
    out: list[list[np.ndarray]] = [[] for _ in tokens]
    done, prompt = np.zeros(len(tokens), np.int64), np.array(lengths) - decode
    while (done < lengths).any():
        width = chunk if (done < prompt).any() else 1
        valid = np.clip((prompt if width == chunk else np.array(lengths)) - done, 0, width)
        block = np.zeros((len(tokens), width), np.int64)
        for row, (start, count) in enumerate(zip(done, valid, strict=True)):
            block[row, :count] = tokens[row, start : start + count]
        logits, cache = _step(graphdef, params, jnp.asarray(block, jnp.int32), cache, jnp.asarray(valid, jnp.int32))
        for row, n in enumerate(valid):
            out[row].append(np.asarray(logits[row, :n]))
        done += valid
    return [np.concatenate(row) for row in out]


@partial(jax.jit, static_argnums=0)
def _step(graphdef, params, tokens, cache, valid):
    model = nnx.merge(graphdef, params)
    hidden, cache = model.step(tokens, cache, valid)
    return model.logits(hidden), cache
