"""Decoding: what comes out is what the model says, whatever the batch, the chunks, the drafts and the rings."""

from functools import cache

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from exaone_jax.errors import CheckpointError, InputError
from exaone_jax.inference import decode as decode_module
from exaone_jax.inference import generate as generate_module
from exaone_jax.inference.generate import Decoding, TokenOutput, generate_tokens
from exaone_jax.inference.sampling import SamplingParams
from exaone_jax.model import Transformer
from tests.inference.small_models import (
    K_EXAONE,
    VOCAB,
    WITH_MTP,
    agreeing,
    all_finite,
    make,
    padded_logits,
    prompts,
    reciting,
)

CHUNK = 8  # of prefill: rings then have 10 to 13 slots, and NEW tokens go round them several times
LENGTHS, NEW = (29, 5, 16), 48
PROMPTS = prompts(LENGTHS)
# float32 through a few small layers is good to 1e-5; two ways of computing one model may choose differently only where
# the best two logits are closer than this.
CLEAR = 1e-3
GREEDY = SamplingParams(max_new_tokens=NEW)
MIXED = [
    SamplingParams(max_new_tokens=NEW, temperature=0.9, seed=5),
    SamplingParams(max_new_tokens=NEW, temperature=1.3, top_k=20, top_p=0.9, min_p=0.02, seed=6),
    SamplingParams(max_new_tokens=NEW),
]


@pytest.fixture(autouse=True, scope="module")
def small_chunks():
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(generate_module, "PREFILL_CHUNK", CHUNK)
        yield


SEEDS = {"k-exaone": 1, "4.5": 1, "k-exaone-2.0": 0}  # of weights whose greedy drafts are right and wrong


@cache
def model_of(name: str) -> Transformer:
    return agreeing(WITH_MTP[name], SEEDS[name])


@cache
def plain(name: str) -> list[TokenOutput]:
    return generate_tokens(model_of(name), PROMPTS, [GREEDY] * len(PROMPTS))


def tokens_of(outputs: list[TokenOutput]) -> list[list[int]]:
    return [out.tokens for out in outputs]


def acceptance(outputs: list[TokenOutput]) -> float:
    """Share of the drafts that were kept."""
    kept = sum(sum(out.accepted) for out in outputs)
    return kept / sum(out.drafted * len(out.accepted) for out in outputs)


@pytest.mark.parametrize("name", WITH_MTP)
def test_greedy_is_the_loop_over_the_whole_sequence(name: str):
    """By induction: every token is the best after those before it, by the model without a cache."""
    outputs = plain(name)
    rows = [prompt + out.tokens for prompt, out in zip(PROMPTS, outputs, strict=True)]
    logits = padded_logits(model_of(name), rows, max(LENGTHS) + NEW)
    for row, (length, out) in enumerate(zip(LENGTHS, outputs, strict=True)):
        assert len(out.tokens) == NEW
        assert out.finish_reason == "length"
        before = logits[row, length - 1 : length + NEW - 1]
        second, first = np.sort(before, axis=-1)[:, -2:].T
        assert (first - second).min() > CLEAR, "choose another seed for the weights: a choice is too close"
        np.testing.assert_array_equal(out.tokens, before.argmax(axis=-1))


@pytest.mark.parametrize("drafts", [1, 2, 3, 4])
@pytest.mark.parametrize("name", WITH_MTP)
def test_greedy_with_drafts_is_plain_greedy(name: str, drafts: int):
    outputs = generate_tokens(model_of(name), PROMPTS, [GREEDY] * len(PROMPTS), drafts=drafts)
    assert tokens_of(outputs) == tokens_of(plain(name))
    assert 0.1 < acceptance(outputs) < 0.9, "the drafts must be right and wrong"
    for out in outputs:
        assert all(now >= later for now, later in zip(out.accepted, out.accepted[1:], strict=False))
        # Every round settles one token more than it keeps; the first token comes from the prompt, the last may be cut.
        assert 0 <= out.drafted + sum(out.accepted) + 1 - NEW <= drafts


@pytest.mark.parametrize("drafts", [0, 2])
def test_a_row_says_the_same_alone(drafts: int):
    """Greedy and sampled, from prompts of unequal lengths."""
    model = model_of("k-exaone")
    together = generate_tokens(model, PROMPTS, MIXED, drafts=drafts)
    assert together[2].tokens == plain("k-exaone")[2].tokens
    for prompt, params, out in zip(PROMPTS, MIXED, together, strict=True):
        assert generate_tokens(model, [prompt], [params], drafts=drafts)[0] == out


def test_a_penalised_neighbour_changes_nothing():
    model = model_of("k-exaone")
    harsh = SamplingParams(max_new_tokens=NEW, temperature=0.9, presence_penalty=2.0, repetition_penalty=2.0, seed=5)
    outputs = generate_tokens(model, PROMPTS, [harsh, *MIXED[1:]])
    unpenalised = generate_tokens(model, PROMPTS, MIXED)
    assert outputs[1:] == unpenalised[1:]
    assert len(set(outputs[0].tokens)) > len(set(unpenalised[0].tokens))


def test_a_seed_is_repeatable_and_another_differs():
    model = model_of("k-exaone")
    one, same, other = (SamplingParams(max_new_tokens=NEW, temperature=1.5, seed=seed) for seed in (11, 11, 12))
    outputs = tokens_of(generate_tokens(model, [PROMPTS[0]] * 3, [one, same, other]))
    assert outputs[0] == outputs[1] != outputs[2]


def test_chunks_of_the_prefill_change_nothing(monkeypatch: pytest.MonkeyPatch):
    """24 at a time, longer than the windows and shorter than one of the prompts; 8 elsewhere."""
    monkeypatch.setattr(generate_module, "PREFILL_CHUNK", 24)
    found = generate_tokens(model_of("k-exaone-2.0"), PROMPTS, [GREEDY] * len(PROMPTS), drafts=4)
    assert tokens_of(found) == tokens_of(plain("k-exaone-2.0"))


@pytest.mark.parametrize("name", WITH_MTP)
def test_drafts_equal_the_mtp_layer_over_the_whole_sequence(name: str):
    """After many rounds of kept and rejected drafts and several turns of the rings, the MTP cache is as if never wrong."""
    model, drafts, rounds = model_of(name), 3, 14
    most = 1 + rounds * (drafts + 1)
    params = [SamplingParams(max_new_tokens=most + 1, temperature=1.0, seed=seed) for seed in range(3)]
    decoding = Decoding(model, PROMPTS, params, drafts)
    decoding.advance(rounds)
    assert 0.1 < acceptance(decoding.outputs()) < 0.9
    sequences = [prompt + new for prompt, new in zip(PROMPTS, decoding.tokens(), strict=True)]
    ends = np.array([len(sequence) - 2 for sequence in sequences])  # position whose MTP output is the first draft's
    np.testing.assert_array_equal(decoding.state.cache.lengths, ends + 1)

    graphdef, weights = nnx.split(model)
    _, proposed, proposal = jax.jit(
        lambda weights, state: decode_module._draft(nnx.merge(graphdef, weights), state, decoding.rows, drafts)
    )(weights, decoding.state)
    expected = _drafts_without_a_cache(model, sequences, ends, np.asarray(proposed))
    # Log-probabilities; the same sums in other orders.
    np.testing.assert_allclose(proposal, expected, atol=1e-3)


def _drafts_without_a_cache(
    model: Transformer, sequences: list[list[int]], ends: np.ndarray, proposed: np.ndarray
) -> np.ndarray:
    """Log-distributions `[B, k, V]` of the drafts, each from mtp_forward over everything before it."""
    batch, drafts = proposed.shape
    length, row = max(map(len, sequences)) + drafts, np.arange(batch)
    tokens = np.zeros((batch, length + 1), np.int32)
    for index, sequence in enumerate(sequences):
        tokens[index, : len(sequence)] = sequence
    for j in range(drafts):
        tokens[row, ends + 2 + j] = proposed[:, j]
    graphdef, weights = nnx.split(model)
    hidden = jax.jit(lambda w, t: nnx.merge(graphdef, w).forward(t).hidden)(weights, tokens[:, :-1])
    mtp = jax.jit(lambda w, h, t: nnx.merge(graphdef, w).mtp_forward(h, t))
    out = []
    for j in range(drafts):
        last = mtp(weights, hidden, tokens[:, 1:])[row, ends + j]
        out.append(jax.nn.log_softmax(model.logits(last)))
        hidden = hidden.at[row, ends + j + 1].set(last)
    return np.stack(out, axis=1)


def test_one_round_at_a_time_is_the_same():
    """Streaming looks after every round."""
    model = model_of("k-exaone")
    decoding = Decoding(model, PROMPTS, [GREEDY] * 3, 2)
    seen = decoding.tokens()
    assert [len(row) for row in seen] == [1, 1, 1]
    while not decoding.finished:
        decoding.advance(1)
        now = decoding.tokens()
        assert all(
            new[: len(old)] == old and len(new) - len(old) in (0, 1, 2, 3) for old, new in zip(seen, now, strict=True)
        )
        seen = now
    assert seen == tokens_of(plain("k-exaone"))


def test_bfloat16_with_drafts_is_finite_and_ends():
    """No more is promised: rounding differs between one token a step and five, so close choices may differ."""
    model = make(K_EXAONE, dtype=jnp.bfloat16)
    decoding = Decoding(model, PROMPTS, MIXED, 4)
    decoding.advance(1 << 30)
    assert [len(row) for row in decoding.tokens()] == [NEW] * 3
    assert all_finite(decoding.state)


# Where rows end: a model that counts up and is sure of it, so that every draft is kept.

STOP, SMALL = 20, 32
COUNTING = {token: (token + 1) % SMALL for token in range(SMALL)}


@cache
def counting(wrong: bool = False) -> Transformer:
    """wrong: its MTP layer misjudges what follows every third token."""
    wrong_drafts = {token: (token + 9) % SMALL for token in range(0, SMALL, 3)} if wrong else None
    return reciting(COUNTING, SMALL, wrong_drafts=wrong_drafts, eos_token_ids=(STOP,), max_position_embeddings=64)


def count(first: int, how_many: int) -> list[int]:
    return [(first + i) % SMALL for i in range(how_many)]


def up_to(limits: list[int], **params) -> list[SamplingParams]:
    return [SamplingParams(max_new_tokens=limit, **params) for limit in limits]


@pytest.mark.parametrize("drafts", [0, 4])
def test_a_row_ends_at_its_stop_id(drafts: int):
    """Also in the middle of drafts that were kept: after 13, a round settles 15 to 19; after 16, 18 to 22, cut at 20."""
    starts = [13, 14, 15, 16, 17, 18]
    outputs = generate_tokens(counting(), [[start] for start in starts], up_to([12] * 6), drafts=drafts)
    for start, out in zip(starts, outputs, strict=True):
        assert out.tokens == count(start + 1, STOP - start)
        assert out.finish_reason == "stop"
        assert sum(out.accepted) == drafts * out.drafted


@pytest.mark.parametrize("drafts", [0, 4])
def test_a_row_ends_at_its_limit(drafts: int):
    limits = [1, 2, 3, 5, 6, 11]
    outputs = generate_tokens(counting(), [[21]] * 6, up_to(limits), drafts=drafts)
    assert tokens_of(outputs) == [count(22, limit) for limit in limits]
    assert {out.finish_reason for out in outputs} == {"length"}


def test_a_stop_id_at_the_limit_is_a_stop_and_the_first_token_may_be_one():
    outputs = generate_tokens(counting(), [[17]] * 2 + [[19]] * 2 + [[18]] * 2, up_to([3, 2, 1, 9, 2, 1]), drafts=4)
    assert tokens_of(outputs) == [[18, 19, 20], [18, 19], [20], [20], [19, 20], [19]]
    assert [out.finish_reason for out in outputs] == ["stop", "length", "stop", "stop", "stop", "length"]


def test_ignore_eos_runs_to_the_limit():
    limits = [9, 3, 30, 30, 30, 30]
    outputs = generate_tokens(counting(), [[16]] * 6, up_to(limits, ignore_eos=True), drafts=4)
    assert tokens_of(outputs) == [count(17, limit) for limit in limits]
    assert {out.finish_reason for out in outputs} == {"length"}


def test_given_stop_ids_replace_those_of_the_configuration():
    decoding = Decoding(counting(), [[16]] * 6, up_to([9] * 6), 4, stop_ids=[22, 24])
    decoding.advance(1 << 30)
    assert decoding.tokens() == [count(17, 6)] * 6


def test_mixed_drafts_end_where_plain_ones_do():
    """Rows of one batch settle 1 to 5 tokens a round, end at different times, and stay as they are from then on."""
    rows = [[start] for start in (21, 0, 7, 12, 17, 19)]
    limits = [20, 25, 6, 30, 30, 30]
    decoding = Decoding(counting(wrong=True), rows, up_to(limits), 4)
    ended: dict[int, list[int]] = {}
    while not decoding.finished:
        decoding.advance(1)
        for row, done in enumerate(np.asarray(decoding.state.done)):
            if done:
                now = decoding.tokens()[row]
                assert ended.setdefault(row, now) == now
    assert ended == {0: count(22, 20), 1: count(1, 20), 2: count(8, 6), 3: count(13, 8), 4: count(18, 3), 5: [20]}
    assert 0.1 < acceptance(decoding.outputs()) < 0.9
    assert all_finite(decoding.state), "rows that are done take part with no token of their own"


def test_a_row_can_be_stopped_from_outside():
    decoding = Decoding(counting(), [[21]] * 6, up_to([20] * 6), 4)
    decoding.advance(1)
    decoding.stop(1)
    stopped = decoding.tokens()[1]
    decoding.advance(1 << 30)
    assert decoding.tokens() == [count(22, 20), stopped, *[count(22, 20)] * 4]
    assert [out.finish_reason for out in decoding.outputs()] == ["length", "stop", *["length"] * 4]


def test_random_rows_that_end_at_different_times_stay_finite():
    """Padding, empty chunks and rows that are done attend to nothing; that must not make a NaN anywhere in the state."""
    params = up_to([1, 40, 7], temperature=1.0)
    for drafts in (0, 3):
        decoding = Decoding(model_of("k-exaone"), PROMPTS, params, drafts)
        decoding.advance(1 << 30)
        assert [len(row) for row in decoding.tokens()] == [1, 40, 7]
        assert all_finite(decoding.state)


# What is refused, before anything is computed

GOOD = SamplingParams(max_new_tokens=4)


@pytest.mark.parametrize(
    ("rows", "params", "drafts", "message"),
    [
        ([], [], 0, "at least one"),
        ([[1]], [GOOD, GOOD], 0, "found 2 and 1"),
        ([[1], []], [GOOD, GOOD], 0, "prompt 1 is empty"),
        ([[1, VOCAB]], [GOOD], 0, rf"prompt 0 has token id {VOCAB}.*\[0, {VOCAB}\)"),
        ([[-1]], [GOOD], 0, "token id -1"),
        ([[1.5]], [GOOD], 0, "token id 1.5"),
        ([["a"]], [GOOD], 0, "token id 'a'"),
        (
            [[1] * 1021],
            [GOOD],
            0,
            "prompt 0 has 1021 tokens and may generate 4 more: 1025 is beyond the context of 1024",
        ),
        ([[1]], [GOOD], 16, r"drafts must be a whole number in \[0, 15\], found 16"),
        ([[1]], [GOOD], -1, "found -1"),
        ([[1], [1]], [GOOD, GOOD.model_copy(update={"ignore_eos": True})], 0, "ignore_eos"),
    ],
)
def test_what_cannot_be_served_is_refused(rows, params, drafts: int, message: str):
    with pytest.raises(InputError, match=message):
        Decoding(model_of("k-exaone"), rows, params, drafts)


def test_drafting_needs_an_mtp_layer():
    model = make(K_EXAONE.model_copy(update={"mtp_layer": None}))
    with pytest.raises(InputError, match="no MTP layer"):
        Decoding(model, [[1]], [GOOD], 1)


def test_the_whole_context_can_be_used():
    rows = [[token % STOP for token in range(60)]] * 6
    outputs = generate_tokens(counting(), rows, up_to([4] * 6, ignore_eos=True), drafts=4)
    assert tokens_of(outputs) == [count(STOP, 4)] * 6


def test_a_model_that_is_not_finite_is_refused():
    broken = make(K_EXAONE)
    broken.lm_head.weight[...] = broken.lm_head.weight[...].at[5, 3].set(jnp.nan)
    with pytest.raises(CheckpointError, match="NaN or infinite"):
        generate_tokens(broken, [[1, 2, 3]], [SamplingParams(max_new_tokens=4)])


@pytest.mark.parametrize("drafts", [0, 2])
def test_a_token_whose_embedding_is_not_finite_ends_the_text(drafts: int):
    """Generated on the way, long after the first token."""
    broken = reciting({token: token + 1 for token in range(31)}, 32)
    prompt, params = [[1, 2, 3]], [SamplingParams(max_new_tokens=12, ignore_eos=True)]
    assert len(generate_tokens(broken, prompt, params, drafts)[0].tokens) == 12
    broken.embed.embedding[...] = broken.embed.embedding[...].at[9, 3].set(jnp.nan)
    with pytest.raises(CheckpointError, match="NaN or infinite"):
        generate_tokens(broken, prompt, params, drafts)


def test_float16_models_generate():
    params = SamplingParams(max_new_tokens=6, ignore_eos=True)
    half, single = (make(K_EXAONE, dtype=dtype) for dtype in (jnp.float16, jnp.float32))
    out = generate_tokens(half, [[1, 2, 3]], [params])[0]
    assert len(out.tokens) == 6
    assert out.tokens[0] == generate_tokens(single, [[1, 2, 3]], [params])[0].tokens[0]


@pytest.mark.parametrize("drafts", [1.5, True, -1, 16])
def test_drafts_that_are_no_number_of_drafts(drafts):
    with pytest.raises(InputError, match="whole number"):
        Decoding(make(K_EXAONE), [[1]], [SamplingParams()], drafts)
