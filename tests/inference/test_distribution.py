"""Drafting does not change what is said: a chi-squared test against the model's exact distribution.

A model over 8 tokens continues one prompt under ROWS different seeds. The first token comes from the prompt alone, the
next two from rounds that draft, verify and settle, so that a cell is one of the 512 continuations of 3 tokens. Their
exact probabilities are computed in plain numpy from the model's logits over whole sequences.

Rules as they should be give a p-value that is uniform in [0, 1]: below 1e-3 once in a thousand choices of seeds, and the
seeds are fixed. A wrong rule shifts at least 1 % of the mass, which adds about ROWS * 0.01**2 / 0.1 = 30 to a statistic
of some 50 +- 10 where it falls on one cell in ten, and hundreds for those below; they must be found beyond any doubt.
"""

from collections.abc import Callable
from functools import cache

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from scipy import stats

from exaone_jax.config.model import LayerSpec, ModelConfig
from exaone_jax.inference import decode as decode_module
from exaone_jax.inference import engine as engine_module
from exaone_jax.inference import generate as generate_module
from exaone_jax.inference.decode import DecodeState, decode_round
from exaone_jax.inference.engine import Engine, EngineConfig
from exaone_jax.inference.generate import Decoding
from exaone_jax.inference.sampling import RowSampling, SamplingParams, draw
from exaone_jax.model import Transformer
from tests.inference import reference
from tests.inference.small_models import make

VOCAB, ROWS, NEW, DRAFTS = 8, 30_000, 3, 2
PROMPT = [3, 1, 4, 1, 5]
EDGE = 1e-5  # no filter may cut so close to a probability that float32 could decide otherwise
RIGHT, WRONG = 1e-3, 1e-12  # p-values: at least, at most

FILTERED = SamplingParams(max_new_tokens=NEW, temperature=1.3, top_p=0.85)
PENALISED = SamplingParams(
    max_new_tokens=NEW,
    temperature=1.4,
    top_k=7,
    top_p=0.9,
    min_p=0.05,
    presence_penalty=0.6,
    frequency_penalty=0.5,
    repetition_penalty=1.5,
)
BIASED = SamplingParams(
    max_new_tokens=NEW,
    temperature=0.6,
    top_p=0.95,
    frequency_penalty=0.5,
    logit_bias={0: 0.7, 2: -1.0, 5: 0.4},
    stop_token_ids=(6, 7),
    min_tokens=NEW,
)
ENGINE_ROWS = 6_000


@pytest.fixture(autouse=True, scope="module")
def small_caches():
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(generate_module, "PREFILL_CHUNK", 8)
        patch.setattr(generate_module, "_CAPACITY_STEP", 8)
        yield


@cache
def model() -> Transformer:
    window = LayerSpec(window=3)
    config = ModelConfig(
        model_type="exaone_moe",
        vocab_size=VOCAB,
        hidden_size=16,
        intermediate_size=16,
        num_heads=2,
        num_kv_heads=1,
        head_dim=8,
        layers=(window, LayerSpec(rope=False)),
        mtp_layer=window,
        max_position_embeddings=64,
        initializer_range=0.35,
    )
    return make(config, 1)


@cache
def exact(params: SamplingParams) -> np.ndarray:
    """Probability `[8, 8, 8]` of every continuation."""
    rows = [(first, second) for first in range(VOCAB) for second in range(VOCAB)]
    logits = np.asarray(model()(np.array([[*PROMPT, *row] for row in rows])), np.float64)[:, len(PROMPT) - 1 :]
    out = np.ones((VOCAB,) * NEW)
    for (first, second), row in zip(rows, logits, strict=True):
        for place, generated in enumerate(([], [first], [first, second])):
            inside = row[place].copy()
            inside[[token for token, _ in params.logit_bias]] += [bias for _, bias in params.logit_bias]
            if place < params.min_tokens:
                inside[list(params.stop_token_ids)] = -np.inf
            inside = reference.penalised(inside, PROMPT, generated, params)
            chances = _checked(inside, params)
            if place == 0:
                out[first, second] *= chances[first]
            elif place == 1:
                out[first, second] *= chances[second]
            else:
                out[first, second] *= chances
    assert out.sum() == pytest.approx(1)
    return out


def _checked(logits: np.ndarray, params: SamplingParams) -> np.ndarray:
    """The distribution, none of whose filters cuts too close."""
    chances = reference.distribution(logits, params)
    for nudge in (-EDGE, EDGE):
        nudged = params.model_copy(
            update={"top_p": min(1.0, params.top_p + nudge), "min_p": max(0.0, params.min_p + nudge)}
        )
        same = (reference.distribution(logits, nudged) > 0) == (chances > 0)
        assert same.all(), "choose another seed for the weights: a filter cuts too close to a probability"
    return chances


class Sampled:
    """ROWS continuations `[ROWS, 3]` by rounds of drafts; `patches` replace functions of the decoding round."""

    def __init__(self, params: SamplingParams, drafts: int, **patches: Callable):
        decoding = _prefilled(params, drafts)
        rows, graphdef, weights = decoding.rows, decoding.graphdef, decoding.weights

        def one(weights: nnx.State, state: DecodeState, rows: RowSampling) -> DecodeState:
            return decode_round(nnx.merge(graphdef, weights), state, rows, drafts, (VOCAB,))  # never drawn

        with pytest.MonkeyPatch.context() as patch:
            for name, function in patches.items():
                patch.setattr(decode_module, name, function)
            step, state = jax.jit(one), decoding.state  # traced here, so with the patches
            while not bool(state.done.all()):
                state = step(weights, state, rows)
        self.tokens = np.asarray(state.tokens[:, :NEW])
        self.acceptance = float(state.accepted.sum() / max(1, state.drafted.sum() * drafts))

    def p_value(self, expected: np.ndarray) -> float:
        return p_value(self.tokens, expected)


def p_value(tokens: np.ndarray, expected: np.ndarray) -> float:
    """Of Pearson's statistic over the cells that are expected 10 times or more; the rest are one cell."""
    counts = np.zeros((VOCAB,) * NEW)
    np.add.at(counts, tuple(tokens.T), 1)
    if counts[expected == 0].any():
        return 0.0  # what the filters remove may never be said
    often = expected * len(tokens) >= 10
    observed = np.append(counts[often], counts[~often].sum())
    mean = np.append(expected[often], expected[~often].sum()) * len(tokens)
    observed, mean = observed[mean > 0], mean[mean > 0]
    return float(stats.chi2.sf(((observed - mean) ** 2 / mean).sum(), len(mean) - 1))


@cache
def _prefilled(params: SamplingParams, drafts: int) -> Decoding:
    rows = [params.model_copy(update={"seed": seed}) for seed in range(ROWS)]
    return Decoding(model(), [PROMPT] * ROWS, rows, drafts)


@pytest.mark.parametrize(
    ("params", "drafts"),
    [(FILTERED, 1), (FILTERED, DRAFTS), (PENALISED, 0), (PENALISED, DRAFTS)],
    ids=["filtered-1", "filtered-2", "penalised-0", "penalised-2"],
)
def test_drafting_keeps_the_distribution(params: SamplingParams, drafts: int):
    sampled = Sampled(params, drafts)
    assert drafts == 0 or 0.2 < sampled.acceptance < 0.9, "drafts must be kept and rejected"
    assert sampled.p_value(exact(params)) > RIGHT


# The engine, whose drafts are verified in another way


def test_the_engine_keeps_the_distribution():
    """With a bias, tokens that may not be drawn yet, a penalty and a filter, all of them at every draft position."""
    settings = EngineConfig(
        max_requests=256,
        max_length=16,
        rows_per_step=1024,
        page_size=4,
        draft_tokens=DRAFTS,
        adaptive_drafts=False,
        fused_steps=1,
        kv_bytes=2_000_000,
    )
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(engine_module, "_buckets", lambda settings: [(settings.rows_per_step, settings.max_requests)])
        engine = Engine(model(), settings)
    rows = [BIASED.model_copy(update={"seed": seed}) for seed in range(ENGINE_ROWS)]
    tokens = np.array([tokens for tokens, *_ in engine.run([PROMPT] * ENGINE_ROWS, rows)])
    assert 0.2 < engine.stats.accepted[0] / engine.stats.drafted[0] < 0.9, "drafts must be kept and rejected"
    assert p_value(tokens, exact(BIASED)) > RIGHT
    for wrong in ({"logit_bias": ()}, {"min_tokens": 1}, {"temperature": 0.9}, {"frequency_penalty": 0.0}):
        assert p_value(tokens, exact(BIASED.model_copy(update=wrong))) < WRONG


# Verifiers that are wrong as rivals' are, or as ours could be

TARGETS, SETTLE = decode_module._targets, decode_module._settle


def _top_p_before_temperature(logits: jax.Array, rows: RowSampling) -> jax.Array:
    order = jnp.argsort(-logits, axis=-1)
    probs = jax.nn.softmax(jnp.take_along_axis(logits, order, axis=-1), axis=-1)
    kept_in_order = jnp.cumsum(probs, axis=-1) - probs < rows.top_p[:, None]
    kept = jnp.take_along_axis(kept_in_order, jnp.argsort(order, axis=-1), axis=-1)
    return jax.nn.log_softmax(jnp.where(kept, logits / rows.temperature[:, None], -jnp.inf), axis=-1)


def _targets_not_renormalised(logits: jax.Array, state: DecodeState, rows: RowSampling, proposed: jax.Array):
    """What is left after the filters keeps its share of the whole; the drafts' own distribution is renormalised."""
    right = TARGETS(logits, state, rows, proposed)
    whole = jax.nn.log_softmax(logits / rows.temperature[:, None, None], axis=-1)
    return jnp.where(right > -jnp.inf, whole, -jnp.inf)


def _rejected_are_redrawn_from_the_target(target, proposal, proposed, rows, start):
    kept, _ = SETTLE(target, proposal, proposed, rows, start)
    after = jnp.take_along_axis(target, kept[:, None, None], axis=1)[:, 0]
    return kept, draw(after, rows, start + 1 + kept, 0)


def _everything_is_kept(target, proposal, proposed, rows, start):
    return SETTLE(target, proposal.at[:].set(-50.0), proposed, rows, start)


MISTAKES = {
    "top-p before temperature": (FILTERED, {"log_distribution": _top_p_before_temperature}),
    "not renormalised": (FILTERED, {"_targets": _targets_not_renormalised}),
    "rejected drafts redrawn from the target": (FILTERED, {"_settle": _rejected_are_redrawn_from_the_target}),
    "every draft kept": (FILTERED, {"_settle": _everything_is_kept}),
    "drafts not counted by penalties": (PENALISED, {"_count": lambda counts, token: counts}),
    "no penalties": (PENALISED, {"penalise": lambda logits, *_: logits}),
}


@pytest.mark.parametrize("mistake", MISTAKES)
def test_the_test_finds_a_wrong_verifier(mistake: str):
    params, patches = MISTAKES[mistake]
    assert Sampled(params, DRAFTS, **patches).p_value(exact(params)) < WRONG
