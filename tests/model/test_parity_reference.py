"""What transformers 5.23 gets wrong or drops, against the numpy model: K-EXAONE 2.0's windows and clamps, and MTP. No torch."""

from collections.abc import Iterator
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

import exaone_jax
from tests import reference_model
from tests.golden.cases import CASES, LENGTHS, REFERENCE_ONLY, batch
from tests.golden.weights import random_tensors, write_checkpoint
from tests.model.parity import assert_parity, chunked_logits, left_padded, oracle_logits

MTP_CASES = [*REFERENCE_ONLY, "exaone4_5"]
LENGTH = 201  # of the MTP tests: several of the windows of 16; beyond the 128 of 4.5


class Case:
    def __init__(self, name: str, directory):
        self.config, self.tokens = CASES[name], batch(name)
        self.tensors = random_tensors(self.config, 0)
        self.model = exaone_jax.load(write_checkpoint(directory, self.config, self.tensors), dtype="float32")


@pytest.fixture(scope="module", params=MTP_CASES)
def mtp_case(request, tmp_path_factory) -> Iterator[Case]:
    yield Case(request.param, tmp_path_factory.mktemp("model"))
    jax.clear_caches()  # nothing compiled for one case serves another


def test_windows_and_clamps(tmp_path):
    """K-EXAONE 2.0, which transformers loads and computes wrongly: rows padded on the left, and through the cache."""
    case = Case("k-exaone-2.0", tmp_path)
    oracle = oracle_logits(case.config, case.tensors, case.tokens)
    padded, mask = left_padded(case.tokens)
    ours = np.asarray(case.model(padded, segment_ids=jnp.asarray(mask, jnp.int32)))
    for row, real in enumerate(mask.astype(bool)):
        assert_parity(ours[row, real], oracle[row])
    for chunk, decode in ((130, 24), (12, 0)):  # longer than every window (96, 16), and shorter
        for ours_row, theirs in zip(
            chunked_logits(case.model, case.tokens, LENGTHS, chunk, decode), oracle, strict=True
        ):
            assert_parity(ours_row, theirs)


def test_mtp_teacher_forced(mtp_case: Case):
    """Two applications of the MTP layer, the second on the first one's output, over a whole sequence."""
    model, tokens = mtp_case.model, mtp_case.tokens[0, :LENGTH]
    ours = _teacher_forced(*nnx.split(model), jnp.asarray(tokens[None], jnp.int32), 2)
    for found, theirs in zip(
        ours, reference_model.mtp_logits(mtp_case.config, mtp_case.tensors, tokens, steps=2), strict=True
    ):
        assert_parity(found[0], theirs)


def test_mtp_drafts_through_its_cache(mtp_case: Case):
    """As in serving: chunked prefill of both caches, then four drafts, each fed the MTP layer's own output."""
    model, tokens, steps, chunk = mtp_case.model, mtp_case.tokens[0, :LENGTH], 4, 100
    graphdef, params = nnx.split(model)
    prompt, next_token = jnp.asarray(tokens[None, :-1], jnp.int32), tokens[-1]
    next_tokens = jnp.asarray(tokens[None, 1:], jnp.int32)
    cache, mtp_cache = model.init_cache(1, LENGTH, chunk), model.init_mtp_cache(1, LENGTH + steps, chunk)
    for start in range(0, LENGTH - 1, chunk):
        hidden, cache = _main(graphdef, params, prompt[:, start : start + chunk], cache)
        drafted, mtp_cache = _draft(graphdef, params, hidden, next_tokens[:, start : start + chunk], mtp_cache)
    ours = [np.asarray(model.logits(drafted[0, -1]))]
    for _ in range(steps - 1):
        token = jnp.asarray([[int(np.argmax(ours[-1]))]], jnp.int32)
        drafted, mtp_cache = _draft(graphdef, params, drafted[:, -1:], token, mtp_cache)
        ours.append(np.asarray(model.logits(drafted[0, -1])))
    theirs = reference_model.mtp_draft(mtp_case.config, mtp_case.tensors, tokens[:-1], next_token, steps)
    assert_parity(np.stack(ours), theirs)


@pytest.mark.parametrize("name", ["exaone_moe", "exaone_moe-groups"])
def test_router_statistics(name: str, tmp_path):
    """Loads and balance loss of every sparse layer, which training balances the experts by."""
    case = Case(name, tmp_path)
    tokens = case.tokens[0, :300]
    theirs = reference_model.run(case.config, case.tensors, tokens).routing
    stats = _stats(*nnx.split(case.model), jnp.asarray(tokens[None], jnp.int32))
    ours = [layer for segment in stats for layer in _layers(segment)]
    assert len(ours) == len(theirs)
    for (load, loss), layer in zip(ours, theirs, strict=True):
        np.testing.assert_array_equal(load, layer.load)
        # Means of 300 shares in float32.
        assert loss == pytest.approx(reference_model.sequence_balance_loss(layer.scores, layer.chosen), rel=1e-5)


def _layers(segment) -> list[tuple[np.ndarray, float]]:
    """(load, balance loss) of the sparse layers of one segment, in the model's order: repeats outside, pattern inside."""
    sparse = [place for place in segment if place is not None]
    repeats = len(sparse[0].load) if sparse else 0
    return [(np.asarray(place.load[r]), float(place.balance_loss[r])) for r in range(repeats) for place in sparse]


@partial(jax.jit, static_argnums=(0, 3))
def _teacher_forced(graphdef, params, tokens, steps: int):
    model = nnx.merge(graphdef, params)
    hidden, out = model.forward(tokens).hidden, []
    for step in range(steps):
        next_tokens = tokens[:, 1 + step :]
        hidden = model.mtp_forward(hidden[:, : next_tokens.shape[1]], next_tokens)
        out.append(model.logits(hidden))
    return out


@partial(jax.jit, static_argnums=0)
def _stats(graphdef, params, tokens):
    return nnx.merge(graphdef, params).forward(tokens).stats


@partial(jax.jit, static_argnums=0)
def _main(graphdef, params, tokens, cache):
    return nnx.merge(graphdef, params).step(tokens, cache)


@partial(jax.jit, static_argnums=0)
def _draft(graphdef, params, hidden, next_tokens, cache):
    return nnx.merge(graphdef, params).mtp_step(hidden, next_tokens, cache)
