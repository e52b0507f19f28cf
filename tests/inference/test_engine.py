"""The engine: a request says the same whatever happens around it, as `generate` says it, and nothing is left behind."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import cache
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from exaone_jax.config.model import LayerSpec
from exaone_jax.errors import ConfigError, InputError
from exaone_jax.inference import engine as engine_module
from exaone_jax.inference import generate as generate_module
from exaone_jax.inference.drafting import Drafting
from exaone_jax.inference.engine import Engine, EngineConfig, Update
from exaone_jax.inference.generate import generate_tokens
from exaone_jax.inference.sampling import SamplingParams
from exaone_jax.model import Transformer
from exaone_jax.parallel import MeshShape, make_mesh
from tests.inference.small_models import K_EXAONE, VOCAB, WITH_MTP, agreeing, make, prompts, reciting

SEEDS = {"k-exaone": 1, "4.5": 1, "k-exaone-2.0": 0}  # of weights whose greedy drafts are right and wrong
BUCKETS = engine_module._buckets
SMALL = {
    "fused_steps": 1,
    "adaptive_drafts": False,
    "max_requests": 3,
    "max_length": 160,
    "rows_per_step": 24,
    "page_size": 4,
    "typical_length": 80,
}
COUNT = 32


@pytest.fixture(autouse=True, scope="module")
def one_size():
    """Short chunks in `generate`; and steps of one size only, which compiles in a quarter of the time."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(generate_module, "PREFILL_CHUNK", 16)
        patch.setattr(engine_module, "_buckets", lambda settings: [(settings.rows_per_step, settings.max_requests)])
        yield


@cache
def model_of(name: str) -> Transformer:
    return agreeing(WITH_MTP[name], SEEDS[name])


@cache
def engine_of(name: str, drafts: int, kv_bytes: int = 400_000, **changes) -> Engine:
    return Engine(model_of(name), EngineConfig(**{**SMALL, "draft_tokens": drafts, "kv_bytes": kv_bytes, **changes}))


def requests() -> tuple[list[list[int]], list[SamplingParams]]:
    """32 of every kind: greedy, sampled, filtered and penalised; of unequal lengths, some of which begin alike."""
    rng = np.random.default_rng(7)
    rows = prompts(rng.integers(1, 60, COUNT).tolist(), seed=3)
    for i in range(0, COUNT, 4):
        rows[i] = rows[0][: 5 + 3 * i] + rows[i]
    kinds = [
        {},
        {"temperature": 0.9},
        {"temperature": 1.3, "top_k": 20, "top_p": 0.9, "min_p": 0.02},
        {"temperature": 0.8, "presence_penalty": 1.0, "frequency_penalty": 0.4, "repetition_penalty": 1.4},
    ]
    lengths = rng.integers(1, 40, COUNT)
    return rows, [
        SamplingParams(max_new_tokens=int(n), seed=100 + i, **kinds[i // 2 % 4]) for i, n in enumerate(lengths)
    ]


PROMPTS, PARAMS = requests()


@cache
def expected(name: str) -> list[list[int]]:
    """What `generate` says, without drafts."""
    return [out.tokens for out in generate_tokens(model_of(name), PROMPTS, PARAMS)]


def tokens_of(engine: Engine, rows: Sequence[Sequence[int]], params: Sequence[SamplingParams]) -> list[list[int]]:
    return [tokens for tokens, _, _ in engine.run(rows, params)]


def check_empty(engine: Engine) -> None:
    assert not engine.scheduler.running and not engine.scheduler.waiting
    assert len(engine.scheduler.free_slots) == engine.settings.max_requests
    while engine.busy:  # a step too many may be in flight
        assert engine.step() == []
    assert engine.pools.used() == [0.0] * len(engine.pools.groups)


@contextmanager
def no_compiles() -> Iterator[None]:
    compiles: list[str] = []

    def listen(event: str, duration: float, **_: object) -> None:
        if "backend_compile" in event:
            compiles.append(event)

    jax.monitoring.register_event_duration_secs_listener(listen)
    yield
    jax.monitoring.unregister_event_duration_listener(listen)
    assert not compiles


# The same request gives the same tokens


def test_a_mixed_batch_of_32_says_what_generate_says(monkeypatch: pytest.MonkeyPatch):
    """All at once, greedy and sampled, in steps of every size: what is drawn does not depend on the drafts."""
    monkeypatch.setattr(engine_module, "_buckets", BUCKETS)
    engine = engine_of("k-exaone", 2, 4_000_000, max_requests=COUNT, rows_per_step=128)
    assert [(rows, n) for steps, _, rows, n in engine._device._steps if steps == 1] == [
        *((3, 1), (12, 4), (16, 1), (16, 4), (48, 16), (96, 32), (128, 1), (128, 4), (128, 16), (128, 32))
    ]
    wanted = expected("k-exaone")
    with no_compiles():
        assert tokens_of(engine, PROMPTS, PARAMS) == wanted
    assert engine.stats.preemptions == 0
    check_empty(engine)


# Bytes that are too few for three requests, by model and drafts.
LITTLE = {
    ("k-exaone", 0): 36_000,
    ("k-exaone", 2): 65_000,
    ("4.5", 1): 65_000,
    ("k-exaone-2.0", 0): 36_000,
    ("k-exaone-2.0", 3): 55_000,
}


@pytest.mark.parametrize(("name", "drafts"), LITTLE)
def test_three_at_a_time_in_little_memory(name: str, drafts: int):
    """Requests wait, are put off and computed again; the order they end in is not theirs."""
    engine = engine_of(name, drafts, LITTLE[name, drafts])
    wanted = expected(name)
    with no_compiles():
        assert tokens_of(engine, PROMPTS, PARAMS) == wanted
    stats = engine.stats
    assert stats.preemptions > 0
    assert stats.generated_tokens == sum(map(len, wanted))
    assert stats.prompt_tokens == sum(map(len, PROMPTS))
    if drafts:
        assert sum(stats.accepted) > 0.1 * stats.drafted[0]
        assert stats.accepted == sorted(stats.accepted, reverse=True)
    check_empty(engine)


@pytest.mark.parametrize("drafts", [0, 2])
def test_several_steps_as_one_program(drafts: int):
    """By threes nobody waits, so the programs are few; and a request that comes meanwhile finds its place."""
    engine = engine_of("k-exaone", drafts, fused_steps=4)
    expected("k-exaone")
    with no_compiles():
        for i in range(0, COUNT - 2, 3):
            assert tokens_of(engine, PROMPTS[i : i + 3], PARAMS[i : i + 3]) == expected("k-exaone")[i : i + 3]
        assert engine.stats.programs < 0.6 * engine.stats.steps
        said: dict[int, list[int]] = {}
        for i in range(COUNT):
            said[engine.submit(PROMPTS[i], PARAMS[i])] = []
            for _ in range(3):
                for update in engine.step():
                    said[update.request] += update.tokens
        while engine.busy:
            for update in engine.step():
                said[update.request] += update.tokens
    assert list(said.values()) == expected("k-exaone")
    check_empty(engine)


@pytest.mark.parametrize("drafts", [0, 4])
def test_a_program_of_several_steps_ends_where_all_texts_do(drafts: int):
    engine = counting(drafts, fused=16)
    programs = engine.stats.programs
    assert [out[0] for out in engine.run([[7], [10]], [SamplingParams(max_new_tokens=30)] * 2)] == [
        list(range(8, END + 1)),
        list(range(11, END + 1)),
    ]
    assert engine.stats.programs - programs <= 3
    lengths = np.asarray(engine._device._state.lengths)
    assert lengths.max() <= END - 7 + drafts, "nobody went on"
    check_empty(engine)


@pytest.mark.parametrize("drafts", [0, 2])
def test_alone(drafts: int):
    engine = engine_of("k-exaone", drafts, LITTLE["k-exaone", drafts])
    for i in range(6):
        assert tokens_of(engine, PROMPTS[i : i + 1], PARAMS[i : i + 1]) == expected("k-exaone")[i : i + 1]


def test_prompts_read_whole_or_in_chunks():
    """24 rows a step elsewhere; here none of the prompts is cut, and then every one is, token by token."""
    for rows in (96, 3):
        engine = engine_of("k-exaone-2.0", 0, rows_per_step=rows)
        assert tokens_of(engine, PROMPTS[:8], PARAMS[:8]) == expected("k-exaone-2.0")[:8]


@pytest.mark.parametrize(("name", "drafts"), [("k-exaone", 0), ("k-exaone", 2), ("k-exaone-2.0", 2)])
def test_a_prefix_that_is_remembered_changes_nothing(name: str, drafts: int):
    """Again, longer, shorter, and parted from at every place around a page's end."""
    engine = engine_of(name, drafts)
    page = engine.settings.page_size
    base, params = prompts([41], seed=11)[0], SamplingParams(max_new_tokens=6, temperature=0.7, seed=3)
    ends = [*range(8 * page - 2, 8 * page + 3)]
    rows = [base, base, *(base[:end] for end in ends), *([*base[:end], (base[end] + 1) % VOCAB, 5] for end in ends)]
    rows.append(base + tokens_of(engine, [base], [params])[0] + [7, 7])
    wanted = [out.tokens for out in generate_tokens(model_of(name), rows, [params] * len(rows))]
    for i, (row, want) in enumerate(zip(rows, wanted, strict=True)):
        before = engine.stats.cached_tokens
        assert tokens_of(engine, [row], [params]) == [want]
        found = engine.stats.cached_tokens - before
        said = [rows[-1][:-2], *(earlier + more for earlier, more in zip(rows[:i], wanted[:i], strict=True))]
        alike = [next((n for n, (a, b) in enumerate(zip(row, old, strict=False)) if a != b), len(row)) for old in said]
        assert found <= max(alike)
        if row[: len(base)] == base:  # and what was said after it is remembered too
            assert found >= (len(base) - 1) // page * page
    check_empty(engine)


def test_a_parting_that_was_seen_once_is_found_by_window_layers_too():
    """Global pages know a common beginning at once; windows before it are kept from the second request on."""
    engine = engine_of("k-exaone", 2)
    common, params = prompts([36], seed=21)[0], SamplingParams(max_new_tokens=4)
    rows = [common + tail for tail in prompts([30, 30, 30], seed=22)]
    found = []
    for row in rows:
        before = engine.stats.cached_tokens
        assert tokens_of(engine, [row], [params]) == [generate_tokens(model_of("k-exaone"), [row], [params])[0].tokens]
        found.append(engine.stats.cached_tokens - before)
    assert found[0] == 0 and found[2] == 32  # of 36: with drafts a page is known by one token more, and there they part
    check_empty(engine)


def test_a_salt_keeps_prefixes_apart():
    engine, prompt = engine_of("k-exaone", 2), prompts([40], seed=31)[0]
    found = []
    for salt in ("a", "b", "a"):
        before = engine.stats.cached_tokens
        engine.submit(prompt, SamplingParams(max_new_tokens=2), cache_salt=salt)
        while engine.busy:
            engine.step()
        found.append(engine.stats.cached_tokens - before)
    assert found == [0, 0, 36]


def test_without_prefix_caching_nothing_is_remembered():
    engine = engine_of("k-exaone", 0, prefix_caching=False)
    for _ in range(2):
        assert tokens_of(engine, PROMPTS[:3], PARAMS[:3]) == expected("k-exaone")[:3]
    assert engine.stats.cached_tokens == 0


def test_as_many_drafts_as_any_rule_chooses(monkeypatch: pytest.MonkeyPatch):
    """None, one, two, as it comes: what is said stays, and the counts know which drafts the step before made."""
    rng = np.random.default_rng(0)
    monkeypatch.setattr(Drafting, "choose", lambda self, running: int(rng.integers(0, 3)))
    engine = engine_of("k-exaone", 2, adaptive_drafts=True, fused_steps=3)
    expected("k-exaone")
    with no_compiles():
        for i in (*range(0, 12, 3), 12):
            chosen = slice(i, i + 3 if i < 12 else COUNT)
            assert tokens_of(engine, PROMPTS[chosen], PARAMS[chosen]) == expected("k-exaone")[chosen]
    first, second = engine.stats.drafted
    assert 0 < second < first < engine.stats.generated_tokens
    assert [a > 0.2 * d for a, d in zip(engine.stats.accepted, engine.stats.drafted, strict=True)] == [True, True]
    check_empty(engine)


def test_a_shorter_look_back_drafts_and_changes_nothing():
    engine = engine_of("k-exaone", 2, draft_window=8)
    assert [group.window for group in engine.pools.groups] == [None, 4, 8]
    assert tokens_of(engine, PROMPTS[:8], PARAMS[:8]) == expected("k-exaone")[:8]
    assert sum(engine.stats.accepted) > 0.1 * engine.stats.drafted[0]


def test_pages_in_8_bits_keep_what_a_seed_says():
    """The same alone, in company, with drafts, and put off; but for values on the edge of two steps, of which few decide."""
    plain, drafting = (engine_of("k-exaone", drafts, 26_000, kv_dtype="int8") for drafts in (0, 2))
    alone = [tokens_of(plain, [row], [params])[0] for row, params in zip(PROMPTS[:8], PARAMS[:8], strict=True)]
    assert tokens_of(drafting, PROMPTS, PARAMS)[:8] == alone
    assert drafting.stats.preemptions > 0
    check_empty(drafting)


@pytest.mark.parametrize("drafts", [0, 2])
def test_random_arrivals_and_departures(drafts: int):
    """Requests come and are cancelled between any two steps, in memory that is too small for three: all others are right,
    nothing is compiled, and nothing is left."""
    engine, rng = engine_of("k-exaone", drafts, LITTLE["k-exaone", drafts]), np.random.default_rng(drafts)
    wanted, said, cancelled, todo = {}, {}, set(), [i for i in range(COUNT) for _ in range(3)]
    rng.shuffle(todo)
    expected("k-exaone")
    with no_compiles():
        while todo or engine.busy:
            for _ in range(rng.integers(0, 3)):
                if todo and len(wanted) - len(cancelled) < 12:
                    i = todo.pop()
                    number = engine.submit(PROMPTS[i], PARAMS[i])
                    wanted[number], said[number] = expected("k-exaone")[i], []
            if wanted and rng.random() < 0.05:
                number = int(rng.choice(list(wanted)))
                engine.cancel(number)
                cancelled.add(number)
            for update in engine.step():
                said[update.request] += update.tokens
                if update.finish_reason == "length":
                    assert said[update.request] == wanted.pop(update.request)
                    cancelled.discard(update.request)  # too late
                elif update.finish_reason == "cancelled":
                    assert said[update.request] == wanted[update.request][: len(said[update.request])]
                    wanted.pop(update.request)
    assert not wanted
    check_empty(engine)


# transformers


def test_greedy_is_that_of_transformers(tmp_path):
    """K-EXAONE's form, from a Hugging Face directory. Its weights are random, so choices are far from close."""
    torch = pytest.importorskip("torch")
    pytest.importorskip("transformers")
    import exaone_jax
    from tests.model.hf_models import build

    hf = build("exaone_moe", tmp_path)
    model = exaone_jax.load(hf.published, dtype="float32")
    drafts = 2 if model.config.mtp_layer else 0
    settings = EngineConfig(
        max_requests=3,
        max_length=512,
        rows_per_step=64,
        page_size=16,
        draft_tokens=drafts,
        kv_bytes=64 << 20,
        fused_steps=1,
    )
    engine = Engine(model, settings)
    rows, new = prompts([200, 37, 150, 33], model.config.vocab_size, seed=5), 40
    params = SamplingParams(max_new_tokens=new, ignore_eos=True)
    for _ in range(2):
        for row, said in zip(rows, tokens_of(engine, rows, [params] * 4), strict=True):
            theirs = hf.model.generate(
                torch.tensor([row]),
                attention_mask=torch.ones(1, len(row), dtype=torch.long),  # else it hides what equals the padding token
                do_sample=False,
                max_new_tokens=new,
                min_new_tokens=new,
                eos_token_id=None,
            )
            assert said == theirs[0, len(row) :].tolist()
    assert engine.stats.cached_tokens > 0


# Where a request ends

STOP, END = 19, 20


@cache
def counting(drafts: int, fused: int = 1) -> Engine:
    """Tokens count up by one and wrap at VOCAB; 20 ends the text."""
    model = reciting({t: (t + 1) % VOCAB for t in range(VOCAB)}, VOCAB, eos_token_ids=(END,))
    settings = EngineConfig(
        max_requests=3,
        max_length=64,
        rows_per_step=24,
        page_size=4,
        draft_tokens=drafts,
        fused_steps=fused,
        kv_bytes=100_000,
    )
    return Engine(model, settings)


@pytest.mark.parametrize("drafts", [0, 4])
def test_where_requests_end(drafts: int):
    def params(n: int, **more) -> SamplingParams:
        return SamplingParams(max_new_tokens=n, **more)

    cases = [
        ([17], params(9), [18, 19, 20], "stop"),
        ([17], params(2), [18, 19], "length"),
        ([17], params(3), [18, 19, 20], "stop"),
        ([19], params(1), [20], "stop"),
        ([17], params(6, ignore_eos=True), [18, 19, 20, 21, 22, 23], "length"),
        ([5], params(1), [6], "length"),
        ([token % 15 for token in range(60)], params(4), None, "length"),  # up to the last token of the context
    ]
    rows = [list(row) for row, *_ in cases]
    for (_, _, want, why), (said, text, reason) in zip(
        cases, counting(drafts).run(rows, [p for _, p, *_ in cases]), strict=True
    ):
        assert text == ""
        assert reason == why
        assert len(said) == 4 if want is None else said == want
    check_empty(counting(drafts))


def test_updates_are_told_as_they_come():
    engine = counting(4)
    number = engine.submit([21], SamplingParams(max_new_tokens=12))
    updates: list[Update] = []
    while engine.busy:
        updates += engine.step()
    assert [u.request for u in updates] == [number] * len(updates)
    assert [len(u.tokens) for u in updates] == [1, 5, 5, 1]
    assert [u.finish_reason for u in updates] == [None, None, None, "length"]
    assert [token for u in updates for token in u.tokens] == [(22 + i) % VOCAB for i in range(12)]


@pytest.mark.parametrize("steps", range(5))
def test_cancelling(steps: int):
    """Waiting, being read, decoding: nothing is told after, and nothing is kept."""
    engine = counting(0)
    numbers = [engine.submit([21] * 40, SamplingParams(max_new_tokens=8)) for _ in range(5)]
    updates = [update for _ in range(steps) for update in engine.step()]
    for number in numbers:
        engine.cancel(number)
        engine.cancel(number)
    engine.cancel(10_000)
    last = []
    while engine.busy:
        last += engine.step()
    assert {u.request for u in last if u.finish_reason == "cancelled"} == set(numbers)
    assert not any(u.tokens for u in last)
    assert all(u.finish_reason is None for u in updates)
    check_empty(engine)


@pytest.mark.parametrize("drafts", [0, 2])
def test_numbers_that_are_not_finite_end_their_request_alone(drafts: int):
    model = reciting({t: (t + 1) % VOCAB for t in range(VOCAB)}, VOCAB)
    model.embed.embedding[...] = model.embed.embedding[...].at[9, 3].set(jnp.nan)
    settings = EngineConfig(
        max_requests=3,
        max_length=64,
        rows_per_step=24,
        page_size=4,
        draft_tokens=drafts,
        fused_steps=1 + drafts,
        kv_bytes=100_000,
    )
    engine, params = Engine(model, settings), SamplingParams(max_new_tokens=8)
    for _ in range(2):  # and what they wrote is not found again
        out = engine.run([[1, 2, 3], [21, 22], [9] * 12], [params] * 3)
        assert [reason for *_, reason in out] == ["error", "length", "error"]
        assert out[0][0] == [4, 5, 6, 7, 8, 9][: len(out[0][0])]
        assert out[1][0] == [23 + i for i in range(8)]
    check_empty(engine)


# Memory


@pytest.mark.parametrize("drafts", [0, 2])
def test_no_step_copies_the_pages(drafts: int):
    """They are donated and written in place: what a step needs beside them is less than one layer's keys. In float32:
    XLA:CPU computes bfloat16 in float32, and copies for that."""
    layers = (K_EXAONE.layers[0], LayerSpec(rope=False)) * 2
    model = make(K_EXAONE.model_copy(update={"layers": layers}), dtype=jnp.float32)
    settings = EngineConfig(
        max_requests=4, max_length=1024, rows_per_step=16, page_size=16, draft_tokens=drafts, kv_bytes=60_000_000
    )
    device = Engine(model, settings)._device
    cache = jax.tree.leaves(device._state.cache)
    largest = max(x.nbytes for x in cache) // 2  # two global layers in a stack
    for sizes, program in device._steps.items():
        memory = program.memory_analysis()
        assert memory.alias_size_in_bytes >= sum(x.nbytes for x in cache), sizes
        assert memory.temp_size_in_bytes < largest, sizes


# On a mesh


def test_on_a_mesh():
    from flax import nnx

    from exaone_jax.parallel import init_model
    from tests.parallel.small_model import moved

    mesh = make_mesh(MeshShape.parse("expert=2,tensor=2"), devices=jax.devices()[:4])
    model = init_model(K_EXAONE, mesh)
    nnx.update(model, moved(nnx.state(model_of("k-exaone")), nnx.state(model), mesh))
    engine = Engine(model, EngineConfig(**SMALL, draft_tokens=2, kv_bytes=400_000))
    assert tokens_of(engine, PROMPTS[:8], PARAMS[:8]) == expected("k-exaone")[:8]


def test_memory_is_that_of_its_own_devices():
    """Weights of another engine on a device are none of this one's; the fullest of its devices decides."""

    def device(used: int) -> SimpleNamespace:
        return SimpleNamespace(memory_stats=lambda: {"bytes_limit": 1_000_000, "bytes_in_use": used})

    share = int(1_000_000 * engine_module._MEMORY_SHARE)
    assert engine_module._free_memory([device(100_000), device(300_000)], 1000, 1) == share - 300_000 - 1000
    assert engine_module._free_memory([device(100_000)], 1000, 2) == share - 100_000 - 1000
    assert engine_module._free_memory([device(999_999)], 1000, 1) == 0


# What is refused


@pytest.mark.parametrize(
    ("prompt", "message"),
    [
        ([], "the prompt is empty"),
        ([VOCAB], rf"token id {VOCAB}, expected integers in the vocabulary \[0, {VOCAB}\)"),
        ([-1], "token id -1"),
        ([1.5], "token id 1.5"),
        ([1] * 61, "61 tokens and may generate 4 more: 65 is beyond the context of 64"),
        ("a text", "no tokenizer"),
    ],
)
def test_requests_that_cannot_be_served(prompt, message: str):
    engine = counting(0)
    with pytest.raises(InputError, match=message):
        engine.submit(prompt, SamplingParams(max_new_tokens=4))
    assert not engine.busy


def test_stop_strings_need_a_tokenizer():
    with pytest.raises(InputError, match="no stop strings"):
        counting(0).submit([1], SamplingParams(max_new_tokens=4, stop=("x",)))


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"rows_per_step": 5, "draft_tokens": 1}, "3 requests with 1 drafts decode in 6 rows; found 5"),
        ({"max_length": 2048}, "found 2048, and the model's context is 1024"),
        ({"kv_bytes": 5000}, "one sequence of 160 positions needs 40 pages"),
        ({"draft_window": 8}, "found 8 without draft_tokens"),
    ],
)
def test_settings_that_cannot_be_served(settings: dict, message: str):
    with pytest.raises(ConfigError, match=message):
        Engine(model_of("k-exaone"), EngineConfig(**{**SMALL, "kv_bytes": 400_000, **settings}))


def test_drafts_need_an_mtp_layer():
    model = make(K_EXAONE.model_copy(update={"mtp_layer": None}))
    with pytest.raises(ConfigError, match="no MTP layer"):
        Engine(model, EngineConfig(**SMALL, draft_tokens=1))
