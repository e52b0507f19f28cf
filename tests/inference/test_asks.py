"""What a request may ask for beside sampling: biases, where it ends, log-probabilities; at every draft position, in any
company, after any interruption. The reference runs the whole sequence for every token and knows none of the engine."""

import itertools
from functools import cache

import numpy as np
import pytest

from exaone_jax.errors import InputError
from exaone_jax.inference import engine as engine_module
from exaone_jax.inference.engine import Engine, EngineConfig, Update
from exaone_jax.inference.generate import generate_tokens
from exaone_jax.inference.sampling import SamplingParams, sampling_params
from exaone_jax.inference.scheduler import TokenLogprobs
from exaone_jax.model import Transformer
from exaone_jax.text import Tokenizer, train_bpe
from tests.inference.reference import Said, say
from tests.inference.small_models import K_EXAONE, VOCAB, agreeing, prompts, reciting
from tests.inference.test_engine import check_empty, no_compiles

ENDS = (7, 23)
# float32 log-probabilities of logits of some 10, whose sums over heads and experts come in another order.
TOLERANCE = 1e-4


@pytest.fixture(autouse=True, scope="module")
def one_size():
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(engine_module, "_buckets", lambda settings: [(settings.rows_per_step, settings.max_requests)])
        yield


@cache
def model() -> Transformer:
    return agreeing(K_EXAONE.model_copy(update={"eos_token_ids": ENDS}), 1)


@cache
def engine_of(drafts: int, fused: int = 1) -> Engine:
    settings = EngineConfig(
        max_requests=3,
        fused_steps=fused,
        adaptive_drafts=False,
        max_length=160,
        rows_per_step=24,
        page_size=4,
        typical_length=80,
        draft_tokens=drafts,
        kv_bytes=400_000,
    )
    return Engine(model(), settings)


def requests() -> tuple[list[list[int]], list[SamplingParams]]:
    bias = {3: 4.0, 11: -100.0, 23: 3.5, 31: 100.0 / 30}
    kinds = [
        {"logit_bias": bias, "logprobs": 4},
        {"logit_bias": bias, "temperature": 0.9, "prompt_logprobs": 2},
        {"logit_bias": {**bias, 7: 50.0, 23: 50.0}, "min_tokens": 13},
        {"logit_bias": {7: 4.0}, "min_tokens": 6, "temperature": 1.2, "top_p": 0.9, "stop_token_ids": (1, 2, 4, 30)},
        {"stop_token_ids": tuple(range(8, 14)), "logprobs": 0, "prompt_logprobs": 0, "ignore_eos": True},
        {"min_tokens": 20, "temperature": 0.8, "presence_penalty": 1.0, "repetition_penalty": 1.4, "logprobs": 20},
        {"temperature": 1.0, "logprobs": 1, "prompt_logprobs": 20, "logit_bias": bias, "frequency_penalty": 0.7},
        {"min_tokens": 24, "ignore_eos": True},
    ]
    rows = prompts([33, 1, 50, 8, 57, 29, 44, 12], seed=5)
    rows[6] = rows[2][:40] + rows[6][:5]
    return rows, [SamplingParams(max_new_tokens=24, seed=40 + i, **kind) for i, kind in enumerate(kinds)]


PROMPTS, PARAMS = requests()


@cache
def expected() -> list[Said]:
    return say(model(), PROMPTS, PARAMS, ENDS)


def told(engine: Engine, chosen: list[int], *, interrupted: bool = False) -> list[list[Update]]:
    numbers = [engine.submit(PROMPTS[i], PARAMS[i]) for i in chosen]
    updates: dict[int, list[Update]] = {number: [] for number in numbers}
    for step in itertools.count():
        if not engine.busy:
            return list(updates.values())
        new = engine.step()
        if interrupted and step % 3 == 0:
            new += engine._collect()
            if engine.scheduler.running:
                engine.scheduler._put_off(engine.scheduler.running[step // 3 % len(engine.scheduler.running)])
        for update in new:
            updates[update.request].append(update)
    raise AssertionError("unreachable")


def check(updates: list[Update], i: int) -> None:
    """They are what the reference says of request i."""
    said, params = expected()[i], PARAMS[i]
    tokens = [token for update in updates for token in update.tokens]
    assert tokens == said.tokens
    found = [each for update in updates for each in update.logprobs]
    if params.logprobs is None:
        assert found == []
    else:
        check_logprobs(found, tokens, said.thought, params.logprobs)
    first, *others = (update.prompt_logprobs for update in updates if update.tokens)
    assert others == [None] * len(others)
    if params.prompt_logprobs is None:
        assert first is None
    else:
        assert first is not None and first[0] is None
        check_logprobs(first[1:], PROMPTS[i][1:], said.thought_of_prompt, params.prompt_logprobs)


def check_logprobs(found, tokens: list[int], thought: list[np.ndarray], count: int) -> None:
    assert len(found) == len(tokens) == len(thought)
    for each, token, logprobs in zip(found, tokens, thought, strict=True):
        assert isinstance(each, TokenLogprobs)
        best = np.argsort(-logprobs, kind="stable")[:count]
        assert each.token == token
        own = logprobs[token]  # tokens nearly tied with it may count or not
        assert (logprobs > own + TOLERANCE).sum() < each.rank <= (logprobs >= own - TOLERANCE).sum()
        assert [other for other, _ in each.top] == best.tolist()
        np.testing.assert_allclose(each.logprob, logprobs[token], atol=TOLERANCE)
        np.testing.assert_allclose([logprob for _, logprob in each.top], logprobs[best], atol=TOLERANCE)


def test_the_requests_are_of_every_kind():
    """Else the tests below would not be of it."""
    reasons = [said.tokens[-1] in (*ENDS, *p.stop_token_ids) for said, p in zip(expected(), PARAMS, strict=True)]
    assert True in reasons and False in reasons
    assert len(expected()[2].tokens) == 14, "an end that is biased comes as soon as it may"
    plain = say(model(), PROMPTS, [p.model_copy(update={"logit_bias": ()}) for p in PARAMS], ENDS)
    changed = [p.logit_bias != () for p in PARAMS]
    assert [a.tokens != b.tokens for a, b in zip(plain, expected(), strict=True)] == changed


@pytest.mark.parametrize(("drafts", "fused"), [(0, 1), (2, 1), (2, 3)])
def test_together_put_off_and_again(drafts: int, fused: int):
    """Prompts of up to 57 tokens in chunks of 24; after every third step somebody is put off, wherever they are. Then again
    with all that is remembered, and at last by threes."""
    engine = engine_of(drafts, fused)
    expected()
    with no_compiles():
        for interrupted in (True, False):
            for i, updates in enumerate(told(engine, list(range(len(PROMPTS))), interrupted=interrupted)):
                check(updates, i)
        for chosen in ([0, 1, 2], [3, 4, 5], [6, 7]):
            for i, updates in zip(chosen, told(engine, chosen), strict=True):
                check(updates, i)
    assert engine.stats.preemptions > 5
    assert (engine.stats.programs < engine.stats.steps) == (fused > 1)
    assert engine.stats.cached_tokens > 0
    if drafts:
        assert 0.1 < sum(engine.stats.accepted) / sum(engine.stats.drafted) < 0.9
    check_empty(engine)


@pytest.mark.parametrize("drafts", [0, 2])
def test_alone_and_again(drafts: int):
    """Of a prompt whose log-probabilities are asked for nothing is taken from memory, though it is there."""
    for i in (0, 4, 6):
        for again in (False, True):
            updates = told(engine_of(drafts), [i])[0]
            check(updates, i)
            summary = updates[-1].summary
            assert summary is not None
            assert (summary.prompt_tokens, summary.generated_tokens) == (len(PROMPTS[i]), len(expected()[i].tokens))
            if PARAMS[i].prompt_logprobs is not None:
                assert summary.cached_tokens == 0
            elif again:
                assert summary.cached_tokens >= (len(PROMPTS[i]) - 1) // 4 * 4


def test_who_asks_for_no_log_probabilities_gets_none_from_a_neighbour():
    for i, updates in zip((6, 7, 3), told(engine_of(2), [6, 7, 3]), strict=True):
        assert any(update.logprobs for update in updates) == (i == 6)
        assert any(update.prompt_logprobs is not None for update in updates) == (i == 6)


def test_the_summary_tells_when_things_happened():
    for (*_, last), i in zip(told(engine_of(2), [0, 1]), (0, 1), strict=True):
        s = last.summary
        assert s is not None and s.started is not None and s.first_token is not None
        assert s.arrived <= s.started <= s.first_token <= s.finished
        assert (s.prompt_tokens, s.preemptions) == (len(PROMPTS[i]), 0)
    number = engine_of(2).submit([1], SamplingParams())
    engine_of(2).cancel(number)
    (update,) = engine_of(2).step()
    s = update.summary
    assert s is not None and (s.started, s.first_token, s.generated_tokens) == (None, None, 0)


def test_the_load_tells_who_runs_and_waits_and_the_pages_held():
    engine = engine_of(0)
    for prompt in prompts([40] * 5):
        engine.submit(prompt, SamplingParams(max_new_tokens=4))
    engine.step()
    load = engine.load()
    assert load.running >= 1 and load.running + load.waiting == 5
    assert list(load.pages) == [None, 4]
    assert all(0 < share < 1 for share in load.pages.values())
    while engine.busy:
        engine.step()
    assert (engine.load().running, engine.load().waiting, set(engine.load().pages.values())) == (0, 0, {0.0})


# Texts that end


@cache
def tokenizer() -> Tokenizer:
    return train_bpe(["the answer to the question is in the library; 대한민국의 수도는 서울이다. " * 20], 640)


def test_stop_strings_pass_until_min_tokens():
    ids = list(dict.fromkeys(tokenizer().encode("the library 서울")))
    follows = {token: ids[(i + 1) % len(ids)] for i, token in enumerate(ids)}
    speaker = reciting(follows, tokenizer().vocab_size, max_position_embeddings=256)
    settings = EngineConfig(
        max_requests=2, adaptive_drafts=False, rows_per_step=24, page_size=4, draft_tokens=2, kv_bytes=10_000_000
    )
    engine = Engine(speaker, settings, tokenizer=tokenizer())
    said = [ids[(i + 1) % len(ids)] for i in range(6 * len(ids))]

    def text(params: SamplingParams) -> tuple[str, int]:
        ((tokens, text, _),) = engine.run([ids[:1]], [params])
        assert tokens == said[: len(tokens)]
        return text, len(tokens)

    for stop in ("rar", "울", "y 서", "울the"):
        for least in (0, 1, len(ids), 2 * len(ids) + 1):
            found, count = text(SamplingParams(max_new_tokens=50, stop=(stop,), min_tokens=least, ignore_eos=True))
            whole = tokenizer().decode(said)
            early = len(tokenizer().decode(said[:least]).rstrip("\ufffd"))
            end = next(e for e in range(len(whole)) if e > early and whole[:e].endswith(stop))
            assert found == whole[: end - len(stop)]
            assert count > least
    stopped, _ = text(SamplingParams(max_new_tokens=50, stop_token_ids=(said[4],)))
    assert stopped == tokenizer().decode(said[:4]), "a token that ends the text is not in it"


# What is refused


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"stop_token_ids": (VOCAB,)}, rf"stop_token_ids has token id {VOCAB}, .* \[0, {VOCAB}\)"),
        ({"logit_bias": {3: 1.0, VOCAB: 1.0}}, f"logit_bias has token id {VOCAB}"),
    ],
)
def test_ids_outside_the_vocabulary(fields: dict, message: str):
    with pytest.raises(InputError, match=message):
        engine_of(0).submit([1], sampling_params(**fields))


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"stop_token_ids": (-1,)}, "stop_token_ids.0"),
        ({"stop_token_ids": ("a",)}, "stop_token_ids.0"),
        ({"stop_token_ids": tuple(range(65))}, "stop_token_ids: .* at most 64"),
        ({"min_tokens": -1}, "min_tokens"),
        ({"min_tokens": 9, "max_new_tokens": 8}, "min_tokens: .* at most max_new_tokens, 8"),
        ({"logit_bias": {1: 100.5}}, "logit_bias.0.1"),
        ({"logit_bias": {1: float("nan")}}, "logit_bias.0.1"),
        ({"logit_bias": {-1: 0.0}}, "logit_bias.0.0"),
        ({"logit_bias": {"abc": 1.0}}, "logit_bias.0.0"),
        ({"logit_bias": {"1": 1.0, 1: 2.0}}, "logit_bias: .* more than once"),
        ({"logit_bias": 3}, "logit_bias"),
        ({"logprobs": 21}, "logprobs"),
        ({"logprobs": -1}, "logprobs"),
        ({"prompt_logprobs": 10**6}, "prompt_logprobs"),
    ],
)
def test_values_that_no_engine_serves(fields: dict, message: str):
    with pytest.raises(InputError, match=message):
        sampling_params(**fields)


@pytest.mark.parametrize(
    "fields",
    [{"stop_token_ids": (1,)}, {"min_tokens": 1}, {"logit_bias": {1: 1.0}}, {"logprobs": 0}, {"prompt_logprobs": 0}],
)
def test_generate_refuses_what_it_does_not_do(fields: dict):
    with pytest.raises(InputError, match=f"asks for {next(iter(fields))}, which the serving engine alone has"):
        generate_tokens(model(), [[1]], [SamplingParams(**fields)])


def test_a_bias_keeps_its_order_and_can_be_hashed():
    one, other = sampling_params(logit_bias={5: 1.0, 2: -1}), sampling_params(logit_bias=[(2, -1.0), ("5", 1)])
    assert one == other and hash(one) == hash(other)
    assert one.logit_bias == ((2, -1.0), (5, 1.0))
