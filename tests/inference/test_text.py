"""Prompts in, text out: stop strings, streams, whole characters, control tokens, and what is refused."""

import itertools
import json

import pytest
from flax import nnx
from hypothesis import given
from hypothesis import strategies as st

from exaone_jax.errors import CheckpointError, InputError
from exaone_jax.inference.sampling import SamplingParams, sampling_params
from exaone_jax.inference.text import (
    Completion,
    StopStrings,
    complete,
    generate,
    recommended_sampling,
    remember_source,
    stream,
    stream_chat,
    tokenizer_of,
)
from exaone_jax.model import Transformer
from exaone_jax.text import ChatTemplate, ReasoningPiece, TextPiece, Tokenizer, train_bpe
from tests.inference.small_models import reciting

CORPUS = [
    "the answer to the question is in the library; return the value of the function\n" * 20,
    "대한민국의 수도는 서울이다. 한국어 글자는 나뉘지 않는다. " * 20,
]
END, CONTEXT = 53, 256
KOREAN = "한국말"
GREEDY = SamplingParams(max_new_tokens=24)


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    return train_bpe(CORPUS, 800)


class Stories:
    """A model that knows three texts by heart and writes the one that a prompt begins; each ends with END.

    It looks at the newest token only, so that no token stands in two places.
    """

    def __init__(self, tokenizer: Tokenizer):
        single = {tokenizer.token_bytes(i): i for i in range(362, tokenizer.vocab_size)}
        think_end, newline = 55, single[b"\n"]
        self.english = [single[piece] for piece in (b"A", b"sw", b"er", b"B", b"libr", b"ary", b"C", b"D")]
        self.korean = [single[b"K"], *(single[bytes([byte])] for byte in KOREAN.encode()), single[b"L"]]
        self.thought = [newline, single[b"p"], single[b"q"], think_end, single[b"r"], single[b"x"]]
        scripts = [[*script, END] for script in (self.english, self.korean, self.thought)]
        assert len({token for script in scripts for token in script[:-1]}) == sum(len(s) - 1 for s in scripts)
        follows = dict(pair for script in scripts for pair in itertools.pairwise(script))
        self.model = reciting(follows, 800, max_position_embeddings=CONTEXT, eos_token_ids=(END,))


@pytest.fixture(scope="module")
def stories(tokenizer: Tokenizer) -> Stories:
    return Stories(tokenizer)


@pytest.fixture
def model(stories: Stories) -> Transformer:
    return stories.model


def one(model: Transformer, tokenizer: Tokenizer, prompt: str | list[int], drafts: int = 0, **params) -> Completion:
    return complete(model, tokenizer, [prompt], sampling_params(max_new_tokens=24, **params), drafts)[0]


def test_a_text_and_its_end(model: Transformer, tokenizer: Tokenizer, stories: Stories):
    out = one(model, tokenizer, "A")
    assert (out.text, out.finish_reason, out.prompt_tokens) == ("swerBlibraryCD", "stop", 1)
    assert out.tokens == [*stories.english[1:], END], "the text is without the stop id, the tokens are with it"
    assert out == one(model, tokenizer, stories.english[:1])
    assert out.to_dict()["text"] == out.text


STOPS = {
    "none": ((), "swerBlibraryCD", 8),
    "inside one token": (("ibr",), "swerBl", 4),
    "over three tokens": (("rBl",), "swe", 4),
    "over all": (("swerBlibraryCD",), "", 7),
    "only begun": (("CDE", "libraries"), "swerBlibraryCD", 8),
    "begun, then another": (("libraries", "brary"), "swerBli", 5),
    "the first to be complete": (("swerBlib", "er"), "sw", 2),
    "the longer of two that end together": (("rBlibrary", "ary"), "swe", 5),
    "at the end": (("D",), "swerBlibraryC", 7),
}


@pytest.mark.parametrize("drafts", [0, 3])
@pytest.mark.parametrize("name", STOPS)
def test_stop_strings(name: str, drafts: int, model: Transformer, tokenizer: Tokenizer):
    stop, text, tokens = STOPS[name]
    out = one(model, tokenizer, "A", drafts, stop=stop)
    assert (out.text, len(out.tokens), out.finish_reason) == (text, tokens, "stop")
    pieces = list(stream(model, tokenizer, "A", sampling_params(max_new_tokens=24, stop=stop), drafts))
    assert "".join(pieces) == text
    assert all(pieces)


def test_stop_strings_end_their_own_row_only(model: Transformer, tokenizer: Tokenizer):
    params = [sampling_params(max_new_tokens=24, stop=stop) for stop in (("er",), (), ("C",))]
    outputs = complete(model, tokenizer, ["A", "K", "A"], params)
    assert [out.text for out in outputs] == ["sw", KOREAN + "L", "swerBlibrary"]


def test_a_limit_before_a_stop_string_is_complete_gives_back_what_was_held(model: Transformer, tokenizer: Tokenizer):
    params = sampling_params(max_new_tokens=3, stop=("Blib",))
    out = complete(model, tokenizer, ["A"], params)[0]
    assert (out.text, out.finish_reason) == ("swerB", "length")
    assert "".join(stream(model, tokenizer, "A", params)) == "swerB"


ANY_STOPS = st.lists(st.text("ab", min_size=1, max_size=4), max_size=3)


@given(stops=ANY_STOPS, pieces=st.lists(st.text("ab", max_size=5), max_size=8))
def test_stop_strings_do_not_depend_on_the_pieces(stops: list[str], pieces: list[str]):
    """The stop string whose end comes first, the longest of those that end there, however the text was cut."""
    text = "".join(pieces)
    ends = [(text.find(stop) + len(stop), text.find(stop)) for stop in stops if stop in text]
    watch = StopStrings(stops)
    shown = [watch.feed(piece) for piece in pieces]
    assert watch.stopped == bool(ends)
    assert "".join([*shown, watch.flush()]) == (text[: min(ends)[1]] if ends else text)


@pytest.mark.parametrize("drafts", [0, 3])
def test_a_stream_never_breaks_a_character(drafts: int, model: Transformer, tokenizer: Tokenizer):
    """Nine tokens of one byte each for three characters, then a token of its own."""
    pieces = list(stream(model, tokenizer, "K", GREEDY, drafts))
    assert "".join(pieces) == KOREAN + "L"
    assert "\ufffd" not in "".join(pieces)
    assert drafts or pieces == [*KOREAN, "L"]
    assert one(model, tokenizer, "K", drafts).text == KOREAN + "L"


def test_a_character_cut_by_the_limit_is_shown_as_one_that_is_missing(model: Transformer, tokenizer: Tokenizer):
    params = sampling_params(max_new_tokens=4)
    assert complete(model, tokenizer, ["K"], params)[0].text == "한\ufffd"
    assert list(stream(model, tokenizer, "K", params)) == ["한", "\ufffd"]


def test_streams_equal_whole_texts_when_sampling(model: Transformer, tokenizer: Tokenizer):
    """Hot enough that the model leaves its texts."""
    for seed in range(3):
        params = sampling_params(max_new_tokens=24, temperature=3.0, top_p=0.99, seed=seed, ignore_eos=True)
        whole = complete(model, tokenizer, ["A"], params)[0].text
        assert "".join(stream(model, tokenizer, "A", params)) == whole
        assert whole != "swerBlibraryCD"


def test_generate_takes_one_prompt_or_several(model: Transformer, tokenizer: Tokenizer):
    assert generate(model, "A", tokenizer=tokenizer, max_new_tokens=24) == "swerBlibraryCD"
    texts = generate(model, ["K", "A"], tokenizer=tokenizer, max_new_tokens=24, draft_tokens=3, stop=("C",))
    assert texts == [KOREAN + "L", "swerBlibrary"]
    with pytest.raises(InputError, match="top_p"):
        generate(model, "A", tokenizer=tokenizer, top_p=2.0)


def test_the_tokenizer_comes_from_beside_the_weights(model: Transformer, tokenizer: Tokenizer, tmp_path):
    with pytest.raises(InputError, match="not loaded from a checkpoint"):
        generate(model, "A")
    tokenizer.save(tmp_path)
    loaded = nnx.merge(*nnx.split(model))
    remember_source(loaded, tmp_path)
    assert tokenizer_of(loaded).encode("A") == tokenizer.encode("A")
    assert generate(loaded, "A", max_new_tokens=24) == "swerBlibraryCD"


def test_control_tokens_spelled_in_a_prompt_stay_text(model: Transformer, tokenizer: Tokenizer):
    for spelled in ("<|endofturn|>", "<think>", "[PAD]"):
        assert tokenizer.encode(spelled, allow_special=True) == [tokenizer.control_tokens[spelled]]
        out = one(model, tokenizer, spelled + "A")
        assert out.prompt_tokens > 2
        assert out.text == "swerBlibraryCD"


def test_chat_tells_reasoning_from_answer(stories: Stories, tokenizer: Tokenizer):
    """The prompt ends in `<think>` and a newline, after which the model writes `pq</think>rx`."""
    template = ChatTemplate.for_generation("k")
    messages = [{"role": "user", "content": "A <think> B"}]
    for drafts in (0, 3):
        events = list(stream_chat(stories.model, tokenizer, template, messages, GREEDY, draft_tokens=drafts))
        reasoning = "".join(event.text for event in events if isinstance(event, ReasoningPiece))
        answer = "".join(event.text for event in events if isinstance(event, TextPiece))
        assert (reasoning, answer) == ("pq", "rx")
    silent = list(stream_chat(stories.model, tokenizer, template, messages, GREEDY, enable_thinking=False))
    assert all(isinstance(event, TextPiece) for event in silent), "reasoning was closed by the prompt"


@pytest.mark.parametrize(
    ("prompt", "message"),
    [
        ("", "prompt 0 is empty"),
        ([], "prompt 0 is empty"),
        ([5, 800], "token id 800"),
        ([-1], "token id -1"),
        ([0] * (CONTEXT - 23), f"{CONTEXT - 23} tokens and may generate 24 more: {CONTEXT + 1} is beyond"),
        ("A\ud800", "not valid Unicode"),
    ],
)
def test_prompts_that_cannot_be_served_are_refused(
    prompt: str | list[int], message: str, model: Transformer, tokenizer: Tokenizer
):
    with pytest.raises(InputError, match=message):
        complete(model, tokenizer, [prompt], GREEDY)
    with pytest.raises(InputError, match=message):
        next(stream(model, tokenizer, prompt, GREEDY))


def test_no_prompt_is_refused(model: Transformer, tokenizer: Tokenizer):
    with pytest.raises(InputError, match="at least one"):
        generate(model, [], tokenizer=tokenizer)


@pytest.mark.parametrize(
    ("found", "fields"),
    [
        ({}, {}),
        ({"do_sample": False, "top_p": 0.9}, {"temperature": 0.0}),
        ({"do_sample": True, "top_p": 0.95}, {"temperature": 1.0, "top_p": 0.95}),
        ({"temperature": 0.6, "top_k": 20, "bos_token_id": 1}, {"temperature": 0.6, "top_k": 20}),
    ],
)
def test_sampling_that_a_checkpoint_recommends(found: dict, fields: dict, model: Transformer, tmp_path):
    loaded = nnx.merge(*nnx.split(model))
    assert recommended_sampling(loaded) == {}
    remember_source(loaded, tmp_path)
    assert recommended_sampling(loaded) == {}
    (tmp_path / "generation_config.json").write_text(json.dumps(found))
    assert recommended_sampling(loaded) == fields
    (tmp_path / "generation_config.json").write_text("[]")
    with pytest.raises(CheckpointError, match="expected an object"):
        recommended_sampling(loaded)


def test_generate_says_that_it_takes_texts(model: Transformer, tokenizer: Tokenizer):
    with pytest.raises(InputError, match="found 1"):
        generate(model, [1, 2], tokenizer=tokenizer)  # type: ignore[list-item]
