"""Constrained decoding: what comes of masking the model token by token, with drafts and without, and what grammars are refused.

The reference asks a new matcher for every token. That whole texts are what their grammars say is seen with Python's own `re`
and `json`.
"""

import itertools
import json
import re
import threading
from collections.abc import Callable
from functools import cache

import numpy as np
import pytest

from exaone_jax.errors import InputError
from exaone_jax.inference import engine as engine_module
from exaone_jax.inference.engine import Engine, EngineConfig, Update
from exaone_jax.inference.generate import generate_tokens
from exaone_jax.inference.grammar import Grammar, Grammars, _compile
from exaone_jax.inference.grammar_rehearsal import Rehearsal
from exaone_jax.inference.sampling import SamplingParams, sampling_params
from exaone_jax.model import Transformer
from exaone_jax.text import Tokenizer, train_bpe
from tests.inference.reference import Said, say
from tests.inference.small_models import K_EXAONE, agreeing, prompts, reciting
from tests.inference.test_engine import check_empty, no_compiles

pytest.importorskip("llguidance")

END, THINK_END = 53, 55
CORPUS = [
    'the answer is in the library; {"name": "서울", "size": [1, 2.5, true, null]} 대한민국의 수도는 서울이다. ' * 20
]
SCHEMA = {
    "type": "object",
    "properties": {"name": {"enum": ["서울", "the answer"]}, "size": {"type": "integer", "minimum": 0, "maximum": 99}},
    "required": ["name", "size"],
    "additionalProperties": False,
}


@cache
def tokenizer() -> Tokenizer:
    return train_bpe(CORPUS, 640)


VOCAB = 650  # more logits than the tokenizer has tokens, as checkpoints have


@cache
def model() -> Transformer:
    config = K_EXAONE.model_copy(update={"vocab_size": VOCAB, "eos_token_ids": (END,)})
    return agreeing(config, 3)


@pytest.fixture(autouse=True, scope="module")
def one_size():
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(engine_module, "_buckets", lambda settings: [(settings.rows_per_step, settings.max_requests)])
        yield


@cache
def engine_of(drafts: int) -> Engine:
    settings = EngineConfig(
        max_requests=3,
        fused_steps=3,
        adaptive_drafts=False,
        max_length=160,
        rows_per_step=24,
        page_size=4,
        typical_length=80,
        draft_tokens=drafts,
        kv_bytes=400_000,
    )
    return Engine(model(), settings, tokenizer=tokenizer())


def obeys_schema(text: str) -> bool:
    found = json.loads(text)
    return list(found) == ["name", "size"] and found["name"] in ("서울", "the answer") and 0 <= found["size"] <= 99


KINDS: dict[str, tuple[Grammar, Callable[[str], object]]] = {
    "schema": (Grammar.json_schema(SCHEMA), obeys_schema),
    "regex": (Grammar.regex("[a-z ]{3,24}(서울|수도)+"), lambda t: re.fullmatch("[a-z ]{3,24}(서울|수도)+", t)),
    "choice": (Grammar.choice(["the", 'the "library"', "서울"]), lambda t: t in ("the", 'the "library"', "서울")),
    "lark": (Grammar.lark('start: "(" start ")" | /[0-9a-f]+/'), lambda t: re.fullmatch(r"(\()*[0-9a-f]+(\))*", t)),
    "object": (Grammar.json_object(), lambda t: isinstance(json.loads(t), dict)),
    "thinking": (Grammar.regex("[0-9]{1,3}", THINK_END), lambda t: re.fullmatch("(?s:.*)</think>[0-9]{1,3}", t)),
}


def requests() -> tuple[list[list[int]], list[SamplingParams]]:
    """Every grammar, greedy and sampled, and some without any."""
    params = [SamplingParams(max_new_tokens=20, temperature=0.8, seed=5), SamplingParams(max_new_tokens=9)]
    for i, (name, (grammar, _)) in enumerate(KINDS.items()):
        thinks = {"logit_bias": {THINK_END: 6.0}} if name == "thinking" else {}
        for temperature in (0.0, 0.9):
            more = {"temperature": temperature, "seed": i, "frequency_penalty": 0.3, **thinks}
            params.append(SamplingParams(max_new_tokens=32, grammar=grammar, **more))
    return prompts(np.random.default_rng(1).integers(1, 50, len(params)).tolist(), 640, seed=8), params


PROMPTS, PARAMS = requests()


def allowed(grammar: Grammar | None) -> Callable[[list[int]], np.ndarray]:
    """Which tokens may follow, by a matcher that reads everything anew."""
    words, _ = Grammars(tokenizer(), VOCAB, (END,))._build()

    def follow(generated: list[int]) -> np.ndarray:
        everything = np.ones(VOCAB, bool)
        if grammar is None:
            return everything
        inside = list(generated)
        if grammar.start_after is not None:
            if grammar.start_after not in generated:
                everything[END] = False
                return everything
            inside = generated[generated.index(grammar.start_after) + 1 :]
        matcher = _compile(words, grammar)
        assert matcher.consume_tokens(inside)
        bits = np.unpackbits(np.frombuffer(matcher.compute_bitmask(), np.uint8), bitorder="little")
        return np.pad(bits, (0, max(0, VOCAB - len(bits))))[:VOCAB].astype(bool)

    return follow


@cache
def expected() -> list[Said]:
    return say(model(), PROMPTS, PARAMS, (END,), [allowed(p.grammar) for p in PARAMS])


def run(engine: Engine, chosen: list[int], *, interrupted: bool = False) -> list[list[Update]]:
    numbers = [engine.submit(PROMPTS[i], PARAMS[i]) for i in chosen]
    updates: dict[int, list[Update]] = {number: [] for number in numbers}
    steps = itertools.count()
    while engine.busy:
        new = engine.step()
        if interrupted and next(steps) % 4 == 0:
            new += engine._collect()
            if engine.scheduler.running:
                engine.scheduler._put_off(engine.scheduler.running[-1])
        for update in new:
            updates[update.request].append(update)
    return list(updates.values())


def tokens_of(updates: list[Update]) -> list[int]:
    return [token for update in updates for token in update.tokens]


def test_the_texts_obey_their_grammars():
    """Of the reference, so of all that equals it."""
    ended = 0
    for said, params in zip(expected()[2:], PARAMS[2:], strict=True):
        obeyed = next(check for grammar, check in KINDS.values() if grammar == params.grammar)
        if said.tokens[-1] == END:
            ended += 1
            assert obeyed(tokenizer().decode(said.tokens[:-1]))
        else:
            assert len(said.tokens) == params.max_new_tokens
    assert ended >= 8
    free = say(model(), PROMPTS, [p.model_copy(update={"grammar": None}) for p in PARAMS], (END,))
    assert [a.tokens != b.tokens for a, b in zip(free, expected(), strict=True)] == [False] * 2 + [True] * (
        len(PARAMS) - 2
    )


@pytest.mark.parametrize("drafts", [0, 2])
def test_the_engine_says_what_masking_the_model_gives(drafts: int):
    engine, everyone = engine_of(drafts), list(range(len(PARAMS)))
    expected()
    for interrupted in (True, False):
        with no_compiles():
            told = run(engine, everyone, interrupted=interrupted)
        for i, updates in enumerate(told):
            assert tokens_of(updates) == expected()[i].tokens, f"request {i}"
            assert updates[-1].finish_reason == ("stop" if expected()[i].tokens[-1] == END else "length")
    assert engine.stats.preemptions > 5
    check_empty(engine)


def test_drafts_are_kept_under_a_grammar():
    """Where the model says the sentence by itself: every draft inside it is kept, and the end is where the grammar has it."""
    ids = list(dict.fromkeys(tokenizer().encode("the answer is in the library")))
    follows = {token: ids[(i + 1) % len(ids)] for i, token in enumerate(ids)}
    speaker = reciting(follows, tokenizer().vocab_size, eos_token_ids=(END,), max_position_embeddings=256)
    settings = EngineConfig(
        max_requests=2,
        rows_per_step=24,
        page_size=4,
        draft_tokens=3,
        kv_bytes=10_000_000,
        fused_steps=1,
        adaptive_drafts=False,
    )
    engine = Engine(speaker, settings, tokenizer=tokenizer())
    whole = tokenizer().decode(ids[1:] + ids + ids)
    params = SamplingParams(max_new_tokens=60, grammar=Grammar.regex(re.escape(whole)))
    ((tokens, text, reason),) = engine.run([ids[:1]], [params])
    assert (text, reason) == (whole, "stop")
    assert tokens == [*ids[1:], *ids, *ids, END]
    assert engine.stats.steps <= 3 + len(tokens) // 4
    assert sum(engine.stats.accepted) >= len(tokens) - 2 - engine.stats.drafted[0]  # the end is nobody's draft


def test_a_text_ends_only_where_its_grammar_does():
    """The model wants to end at once, and is biased to."""
    params = SamplingParams(max_new_tokens=30, logit_bias={END: 100.0}, grammar=Grammar.regex("(abc){2,}"))
    for drafts in (0, 2):
        ((_, text, reason),) = engine_of(drafts).run([[400]], [params])
        assert (text, reason) == ("abcabc", "stop")


def test_a_grammar_that_becomes_too_much_ends_its_request_alone(monkeypatch: pytest.MonkeyPatch):
    """llguidance gives up on a text; its neighbour goes on."""
    engine, number = engine_of(2), 2
    numbers = [engine.submit(PROMPTS[i], PARAMS[i]) for i in (number, 0)]
    monkeypatch.setattr(engine._requests[numbers[0]].constraint, "error", "grammar: parser too complex")
    told: dict[int, list[Update]] = {n: [] for n in numbers}
    while engine.busy:
        for update in engine.step():
            told[update.request].append(update)
    (update,) = told[numbers[0]]
    assert (update.finish_reason, update.error, update.tokens) == ("error", "grammar: parser too complex", [])
    assert tokens_of(told[numbers[1]]) == expected()[0].tokens
    check_empty(engine)


# What is refused


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: Grammar.regex("(?=a)b"), "look-around, including look-ahead"),
        (lambda: Grammar.regex(r"(a)\1"), "backreferences are not supported"),
        (lambda: Grammar.regex("["), "unclosed character class"),
        (lambda: Grammar.lark("start: foo"), 'unknown name: "foo"'),
        (lambda: Grammar.json_schema('{"type":'), "the schema is not JSON"),
        (lambda: Grammar.json_schema("3"), "a JSON schema is an object, found int"),
        (lambda: Grammar.json_schema({"type": "foo"}), "Invalid type: foo"),
        (lambda: Grammar.json_schema({"pattern": 3}), "Expected string for 'pattern'"),
        (lambda: Grammar.json_schema({"allOf": [{"type": "string"}, {"type": "integer"}]}), "Unsatisfiable schema"),
        (lambda: Grammar.json_schema({"$ref": "http://x/y"}), "does not fetch resources"),
        (lambda: Grammar.json_schema('{"type":"array","items":' * 900 + "{}" + "}" * 900), "recursion limit"),
        (lambda: Grammar.choice([]), "at least one text"),
        (lambda: Grammar.choice([3]), "at least one text"),
        (lambda: Grammar.regex("a", start_after=VOCAB), f"start_after is token id {VOCAB}"),
    ],
)
def test_bad_grammars_are_refused_with_the_reason(make: Callable[[], Grammar], message: str):
    with pytest.raises(InputError, match=re.escape(message)):
        engine_of(0).submit([400], SamplingParams(grammar=make()))
    assert not engine_of(0).busy


@pytest.mark.parametrize(
    ("pattern", "simpler"),
    [("(a+)+b", "a+b"), ("(x+x+)+y", "x{2,}y"), ("a{1,100000}", "a+"), ("(.*a){60}b", "(?!)")],
)
def test_hard_expressions_are_served(pattern: str, simpler: str):
    params = SamplingParams(max_new_tokens=4, grammar=Grammar.regex(pattern))
    ((tokens, text, reason),) = engine_of(0).run([[400]], [params])
    assert len(tokens) == 4 if reason == "length" else re.fullmatch(simpler, text)


CHAIN = "start: r0\n" + "".join(f"r{i}: r{i + 1}\n" for i in range(4000)) + 'r4000: "a"'
ENDLESS = "start: A\nA: " + " & ".join(f"/(?s:.*)a(?s:.){{{i}}}(?s:.*)/" for i in range(1, 60))


def test_a_grammar_that_would_take_the_process_along_is_refused():
    """A chain of rules overflows the stack of who compiles it, also as references of a JSON schema."""
    grammars = Grammars(tokenizer(), VOCAB, (END,))
    links = {f"a{i}": {"$ref": f"#/$defs/a{i + 1}"} for i in range(4000)}
    schema = {"$ref": "#/$defs/a0", "$defs": {**links, "a4000": {"type": "integer"}}}
    for grammar in (Grammar.lark(CHAIN), Grammar.json_schema(schema)):
        with pytest.raises(InputError, match="grammar: it nests too deeply"):
            grammars.constraint(grammar)
        assert grammars.constraint(Grammar.regex("a")), "the next one is served"


def test_a_grammar_that_never_compiles_is_refused():
    """While others are served."""
    with pytest.raises(InputError, match="takes too long"):
        Rehearsal([b"a", b"b", b"<end>"], [2], [2], seconds=1).check("lark", ENDLESS)
    rehearsal, refused = Rehearsal([b"a", b"b", b"<end>"], [2], [2], seconds=3), []

    def never() -> None:
        with pytest.raises(InputError, match="takes too long"):
            rehearsal.check("lark", ENDLESS)
        refused.append(1)

    threads = [threading.Thread(target=never) for _ in range(2)]
    for thread in threads:
        thread.start()
    rehearsal.check("regex", "ab")
    assert refused == []
    for thread in threads:
        thread.join()
    assert refused == [1, 1]


def test_a_grammar_is_so_long_at_most():
    with pytest.raises(InputError, match="characters long"):
        Grammars(tokenizer(), VOCAB, (END,)).constraint(Grammar.regex("a" * (1 << 20)))


def test_a_grammar_that_cannot_be_followed_from_the_start_is_refused():
    """Not in the middle of an answer: a schema that is its own."""
    with pytest.raises(InputError, match="grammar: "):
        Grammars(tokenizer(), VOCAB, (END,)).constraint(Grammar.json_schema({"$ref": "#"}))


def test_what_a_grammar_cannot_be_combined_with():
    for fields in ({"min_tokens": 2}, {"ignore_eos": True}):
        with pytest.raises(InputError, match=f"grammar: .* {next(iter(fields))}"):
            sampling_params(grammar=Grammar.regex("a"), **fields)
    with pytest.raises(InputError, match="grammar"):
        sampling_params(grammar={"kind": "poem", "text": "a"})
    with pytest.raises(InputError, match="asks for grammar, which the serving engine alone has"):
        generate_tokens(model(), [[1]], [SamplingParams(grammar=Grammar.regex("a"))])


def test_a_grammar_needs_a_tokenizer_and_an_end(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(engine_of(0), "tokenizer", None)
    with pytest.raises(InputError, match="no tokenizer, so it takes no stop strings and no grammar"):
        engine_of(0).submit([1], SamplingParams(grammar=Grammar.regex("a")))
    with pytest.raises(InputError, match="a token that ends the text"):
        Grammars(tokenizer(), VOCAB, ()).constraint(Grammar.regex("a"))


def test_the_latest_grammars_are_remembered():
    grammars = Grammars(tokenizer(), VOCAB, (END,))
    for n in range(100):
        grammars.constraint(Grammar.regex(f"a{{{n + 1}}}"))
    assert len(grammars._compiled) == 64
    again = grammars._compiled["regex", "a{100}"]
    grammars.constraint(Grammar.regex("a{100}"))
    assert grammars._compiled["regex", "a{100}"] is again


def test_control_tokens_are_not_part_of_any_text():
    """Though one spells what the expression wants."""
    mask = np.zeros((1, -(-VOCAB // 32)), np.uint32)
    Grammars(tokenizer(), VOCAB, (END,)).constraint(Grammar.regex("</think>|<[|]user[|]>")).masks([], mask)
    bits = np.unpackbits(mask.view(np.uint8), bitorder="little").nonzero()[0]
    assert [tokenizer().token_bytes(i) for i in bits] == [b"<"]
