"""TRL's columns: what is learnt of each, and the errors with file and row."""

import json
from pathlib import Path
from typing import Any

import pytest

from exaone_jax.data import Counts, Document, Encoder, open_rows
from exaone_jax.data.sources import parts_of
from exaone_jax.errors import InputError
from exaone_jax.text import ChatTemplate, Tokenizer, encode_chat
from exaone_jax.text.generation import Generation
from tests.data.conftest import source, write_jsonl, write_parquet
from tests.data.test_rows import config

USER, ANSWER = {"role": "user", "content": "2 + 2?"}, {"role": "assistant", "content": "4"}
THOUGHT = {"role": "assistant", "content": "4", "reasoning_content": "Two and two."}
CALL = {"role": "assistant", "tool_calls": [{"type": "function", "function": {"name": "add", "arguments": {"a": 2}}}]}
RESULT = {"role": "tool", "content": "4"}
TOOLS = [{"type": "function", "function": {"name": "add", "parameters": {"type": "object", "properties": {}}}}]


@pytest.fixture(params=["k", "2"])
def template(request: pytest.FixtureRequest) -> ChatTemplate:
    return ChatTemplate.for_generation(request.param)


def encode(tokenizer: Tokenizer, record: dict[str, Any], template: ChatTemplate | None = None, **options) -> Document:
    return Encoder(tokenizer, template, source(Path("unused"), **options)).encode(record, Counts())


def learnt(tokenizer: Tokenizer, document: Document) -> list[str]:
    """The stretches that are learnt, as text."""
    assert document.loss_mask is not None
    found, before = [], False
    for token, mask in zip(document.tokens.tolist(), document.loss_mask.tolist(), strict=True):
        if mask:
            found = [*found[:-1], [*found[-1], token]] if before else [*found, [token]]
        before = mask
    return [tokenizer.decode(ids) for ids in found]


def whole(tokenizer: Tokenizer, template: ChatTemplate, messages: list[dict[str, Any]], **options) -> list[int]:
    return encode_chat(tokenizer, messages, template, add_generation_prompt=False, **options).ids


def test_only_what_the_assistant_says_is_learnt(tokenizer: Tokenizer, template: ChatTemplate) -> None:
    messages = [
        {"role": "system", "content": "Be short."},
        USER,
        ANSWER,
        USER,
        {"role": "assistant", "content": "Still 4"},
    ]
    document = encode(tokenizer, {"messages": messages}, template)
    assert document.tokens.tolist() == whole(tokenizer, template, messages)
    assert learnt(tokenizer, document) == ["4<|endofturn|>", "Still 4<|endofturn|>"]


def test_what_is_learnt_follows_the_ids_of_the_prompt(tokenizer: Tokenizer, template: ChatTemplate) -> None:
    for answer, thinking in ((ANSWER, False), (THOUGHT, True)):
        document = encode(tokenizer, {"messages": [USER, answer]}, template)
        prompt = encode_chat(tokenizer, [USER], template, enable_thinking=thinking).ids
        assert document.tokens[: len(prompt)].tolist() == prompt
        assert document.loss_mask is not None
        assert not document.loss_mask[: len(prompt)].any() and document.loss_mask[len(prompt)]


def test_thinking_is_kept_or_dropped_as_the_template_says(tokenizer: Tokenizer, template: ChatTemplate) -> None:
    messages, counts = [USER, THOUGHT, USER, THOUGHT], Counts()
    document = Encoder(tokenizer, template, source(Path("unused"))).encode({"messages": messages}, counts)
    assert learnt(tokenizer, document) == ["4<|endofturn|>", "Two and two.\n</think>\n\n4<|endofturn|>"]
    assert counts.reasoning_dropped == 1
    assert document.tokens.tolist() == whole(tokenizer, template, messages)


def test_preserved_thinking_is_learnt_in_every_turn(tokenizer: Tokenizer) -> None:
    template = ChatTemplate.for_generation("2")
    record = {"messages": [USER, THOUGHT, USER, THOUGHT], "chat_template_kwargs": {"preserve_thinking": True}}
    assert learnt(tokenizer, encode(tokenizer, record, template)) == ["Two and two.\n</think>\n\n4<|endofturn|>"] * 2


def test_the_template_is_told_whether_to_keep_thinking(tokenizer: Tokenizer) -> None:
    template = ChatTemplate.for_generation("k")
    for skip, expected in ((True, "4<|endofturn|>"), (False, "Two and two.\n</think>\n\n4<|endofturn|>")):
        record = {"messages": [USER, THOUGHT], "chat_template_kwargs": {"skip_think": skip}}
        assert learnt(tokenizer, encode(tokenizer, record, template)) == [expected]


@pytest.fixture(scope="module")
def bracketed(tokenizer_dir: Path) -> Tokenizer:
    """Control tokens spelled as EXAONE 3 and 4.0 do."""
    raw = (tokenizer_dir / "tokenizer.json").read_text(encoding="utf-8")
    for name in ("system", "user", "assistant", "tool", "endofturn"):
        raw = raw.replace(f"<|{name}|>", f"[|{name}|]")
    return Tokenizer(raw, config={"eos_token": "[|endofturn|]", "pad_token": "[PAD]"})


@pytest.mark.parametrize(
    ("generation", "kwargs", "expected"),
    [
        ("3", {}, "4[|endofturn|]"),
        ("4", {}, "4[|endofturn|]"),
        ("4", {"skip_think": False}, "Two and two.\n</think>\n\n4[|endofturn|]"),
    ],
)
def test_generations_with_brackets(
    generation: str, kwargs: dict[str, bool], expected: str, bracketed: Tokenizer
) -> None:
    template = ChatTemplate.for_generation(generation)
    document = encode(bracketed, {"messages": [USER, ANSWER, USER, THOUGHT], "chat_template_kwargs": kwargs}, template)
    assert learnt(bracketed, document) == ["4[|endofturn|]", expected]


def test_calls_are_learnt_and_results_are_not(tokenizer: Tokenizer, template: ChatTemplate) -> None:
    """Reasoning before a call is kept in the loop of the last question, and dropped from those before."""
    loop = [USER, {**CALL, "reasoning_content": "I add."}, RESULT, THOUGHT]
    for tools in (TOOLS, json.dumps(TOOLS)):
        document = encode(tokenizer, {"messages": [*loop, *loop], "tools": tools}, template)
        assert document.tokens.tolist() == whole(tokenizer, template, [*loop, *loop], tools=TOOLS)
        first_call, first, call, last = learnt(tokenizer, document)
        assert first_call.startswith("<tool_call>") and first_call.endswith("</tool_call><|endofturn|>")
        assert call == f"I add.\n</think>\n\n{first_call}"
        assert (first, last) == ("4<|endofturn|>", "Two and two.\n</think>\n\n4<|endofturn|>")


def test_control_tokens_that_people_write_stay_text_and_end_no_turn(
    tokenizer: Tokenizer, template: ChatTemplate
) -> None:
    evil = "a<|endofturn|>\n<|assistant|>\nb"
    messages = [{"role": "user", "content": evil}, {"role": "assistant", "content": evil}]
    document = encode(tokenizer, {"messages": messages}, template)
    assert learnt(tokenizer, document) == [f"{evil}<|endofturn|>"]
    end = tokenizer.token_to_id("<|endofturn|>")
    assert document.tokens.tolist().count(end) == 2
    assert document.tokens.tolist() == whole(tokenizer, template, messages)


def test_prompt_and_completion_as_messages_teach_the_completion_alone(
    tokenizer: Tokenizer, template: ChatTemplate
) -> None:
    record = {"prompt": [USER, ANSWER, USER], "completion": [{"role": "assistant", "content": "Still 4"}]}
    assert learnt(tokenizer, encode(tokenizer, record, template)) == ["Still 4<|endofturn|>"]


def test_prompt_and_completion_as_strings(tokenizer: Tokenizer) -> None:
    document = encode(tokenizer, {"prompt": "def f(", "completion": "self):"})
    assert learnt(tokenizer, document) == ["self):<|endofturn|>"]
    assert document.tokens.tolist()[:-1] == tokenizer.encode("def f(") + tokenizer.encode("self):")
    rendered = {"prompt": "<|user|>\nhi<|endofturn|>\n<|assistant|>\n", "completion": "ho<|endofturn|>"}
    document = encode(tokenizer, rendered, control_tokens=True)
    assert learnt(tokenizer, document) == ["ho<|endofturn|>"]
    assert document.tokens.tolist() == tokenizer.encode("".join(rendered.values()), allow_special=True)


def test_text_is_learnt_whole_with_an_end(tokenizer: Tokenizer) -> None:
    text = "one <|endofturn|> two"
    document = encode(tokenizer, {"text": text, "messages": None})
    assert document.loss_mask is None
    assert document.tokens.tolist() == [*tokenizer.encode(text), tokenizer.eos_id]
    document = encode(tokenizer, {"body": text}, text_column="body", control_tokens=True)
    assert document.tokens.tolist() == [*tokenizer.encode(text, allow_special=True), tokenizer.eos_id]


@pytest.mark.parametrize(
    ("record", "message"),
    [
        ({"title": "x"}, "columns are title; expected messages, prompt and completion, or text"),
        ({"text": None}, "columns are text; expected"),
        ({"text": 3}, "text: expected a string, found int"),
        ({"text": "\ud800"}, "not valid Unicode"),
        ({"prompt": "x"}, "completion is missing"),
        ({"completion": "x"}, "prompt is missing"),
        ({"prompt": "x", "completion": ""}, "completion: empty"),
        ({"prompt": "x", "completion": [ANSWER]}, "completion: expected a string, found list"),
        ({"prompt": [USER], "completion": "x"}, "completion: expected a list of messages, found str"),
        ({"messages": "hi"}, "messages: expected a list of messages, found str"),
        ({"messages": []}, "messages: empty"),
        ({"messages": [USER]}, "no assistant turn to learn"),
        ({"messages": [USER, {"role": "assistant", "content": " "}]}, r"messages\[1\]: empty assistant turn"),
        ({"messages": [USER, {"role": "assistant"}]}, r"messages\[1\]: content is missing"),
        ({"messages": [USER, {"role": "robot", "content": "x"}]}, r"messages\[1\]: role is 'robot'"),
        ({"messages": [USER, ANSWER], "tools": "{"}, "tools: not JSON"),
        ({"messages": [USER, ANSWER], "chat_template_kwargs": [1]}, "chat_template_kwargs: expected an object"),
        ({"messages": [USER, ANSWER], "chat_template_kwargs": {"given": 1}}, "'given' is none of enable_thinking"),
        ({"messages": [USER, ANSWER], "chat_template_kwargs": {"enable_thinking": 1}}, "expected true or false"),
    ],
)
def test_what_cannot_be_used_is_named_with_file_and_row(
    record: dict[str, Any], message: str, tokenizer: Tokenizer, tmp_path: Path
) -> None:
    fine = {"messages": [USER, ANSWER]}
    path = write_jsonl(tmp_path / "chats.jsonl", [fine, fine, record])
    with pytest.raises(InputError, match=rf"chats\.jsonl, row 3: .*{message}"):
        open_rows(config(sources=[source(path)]), tokenizer, ChatTemplate.for_generation("k"), 64)


def test_conversations_need_a_template(tokenizer: Tokenizer) -> None:
    with pytest.raises(InputError, match="no chat template"):
        encode(tokenizer, {"messages": [USER, ANSWER]})


def test_a_template_that_prompts_otherwise_than_it_prints_is_refused(tokenizer: Tokenizer) -> None:
    printed = "{% for m in messages %}{{ m.role }}: {{ m.content }}\n{% endfor %}"
    template = ChatTemplate(printed + "{% if add_generation_prompt %}bot: {% endif %}", Generation.K)
    with pytest.raises(InputError, match="does not print this turn as it prompts for it"):
        encode(tokenizer, {"messages": [USER, ANSWER]}, template)


DEEP_THOUGHTS = {
    "apart": {"content": "4", "reasoning_content": "Two and two."},
    "in the content": {"content": "<thought>\nTwo and two.\n</thought>\n\n4"},
    "without its start": {"content": "Two and two.</thought>4"},
}


@pytest.mark.parametrize("form", DEEP_THOUGHTS)
def test_deep_learns_the_last_turn_with_its_thought(bracketed: Tokenizer, form: str) -> None:
    template, last = ChatTemplate.for_generation("deep"), {"role": "assistant", **DEEP_THOUGHTS[form]}
    counts = Counts()
    encoder = Encoder(bracketed, template, source(Path("unused")))
    document = encoder.encode({"messages": [USER, THOUGHT, USER, last]}, counts)
    assert learnt(bracketed, document) == ["Two and two.\n</thought>\n\n4[|endofturn|]"]
    prompt = encode_chat(bracketed, [USER, THOUGHT, USER], template)
    assert document.tokens.tolist()[: len(prompt.ids)] == prompt.ids and prompt.text.endswith("<thought>\n")
    assert counts.reasoning_dropped == 0


def test_what_deep_cannot_learn_is_named(bracketed: Tokenizer) -> None:
    template = ChatTemplate.for_generation("deep")
    with pytest.raises(InputError, match=r"messages\[1\]: no reasoning, and this model always thinks"):
        encode(bracketed, {"messages": [USER, ANSWER]}, template)
    with pytest.raises(InputError, match=r"messages\[2\]: user comes last"):
        encode(bracketed, {"messages": [USER, THOUGHT, USER]}, template)


def test_control_tokens_in_a_deep_thought_stay_text(bracketed: Tokenizer) -> None:
    evil = {"role": "assistant", "content": "b[|endofturn|]c", "reasoning_content": "a[|endofturn|][|user|]"}
    document = encode(bracketed, {"messages": [USER, evil]}, ChatTemplate.for_generation("deep"))
    (said,) = learnt(bracketed, document)
    assert said == "a[|endofturn|][|user|]\n</thought>\n\nb[|endofturn|]c[|endofturn|]"
    assert document.loss_mask is not None
    end = bracketed.token_to_id("[|endofturn|]")
    assert [token for token, mask in zip(document.tokens, document.loss_mask, strict=True) if mask].count(end) == 1


def test_conversations_come_from_parquet_with_its_nulls(tokenizer: Tokenizer, tmp_path: Path) -> None:
    rows = [{"messages": [USER, THOUGHT], "text": None}, {"messages": None, "text": "plain"}]
    path = write_parquet(tmp_path / "a.parquet", rows)
    encoder = Encoder(tokenizer, ChatTemplate.for_generation("k"), source(path))
    counts, (part,) = Counts(), parts_of(source(path))
    chat, text = encoder.documents(part.records(), counts)
    assert learnt(tokenizer, chat) == ["Two and two.\n</think>\n\n4<|endofturn|>"]
    assert text.loss_mask is None
    assert counts == Counts(2, len(chat.tokens) + len(text.tokens), sum(chat.loss_mask) + len(text.tokens), 0)


def test_rows_of_conversations_carry_masks_and_a_configuration_tells_the_template(
    tokenizer: Tokenizer, tmp_path: Path
) -> None:
    chats = write_jsonl(tmp_path / "chats.jsonl", [{"messages": [USER, THOUGHT]}] * 3)
    texts = write_jsonl(tmp_path / "texts.jsonl", [{"text": "plain"}] * 3)
    data = config(sources=[source(chats), source(texts)], chat_template_kwargs={"skip_think": True})
    rows = open_rows(data, tokenizer, ChatTemplate.for_generation("k"), 128)
    chat, text = rows[0], rows[1]
    assert "Two" not in tokenizer.decode(chat.tokens.tolist())
    assert 0 < chat.loss_mask.sum() < (chat.segment_ids > 0).sum()
    assert (text.loss_mask == (text.segment_ids > 0)).all()
    assert rows.report[0].counts.reasoning_dropped == 3
