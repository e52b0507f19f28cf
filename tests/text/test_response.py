from hypothesis import given, settings
from hypothesis import strategies as st

from exaone_jax.text import Response, ToolCall, parse_response

TOOLS = [{"function": {"name": "f", "parameters": {"properties": {"n": {"type": "integer"}}}}}]
JSON = '<tool_call>{"name": "f", "arguments": {"n": 1}}</tool_call>'
XML = "<tool_call>\n<function=f>\n<parameter=n>\n1\n</parameter>\n</function>\n</tool_call>"


def test_reasoning_answer_and_call():
    for generation, call in (("k", JSON), ("4.5", JSON), ("2", XML)):
        text = f"hm {JSON}\n</think>\n\n보자.\n{call}"
        assert parse_response(text, generation, starts_in_reasoning=True, tools=TOOLS) == Response(
            reasoning=f"hm {JSON}",  # a call inside reasoning is no call
            content="보자.",
            tool_calls=(ToolCall(0, "f", '{"n": 1}'),),
            errors=(),
        )


def test_without_tools_nothing_is_looked_for():
    assert parse_response(JSON, "k", starts_in_reasoning=False).content == JSON
    assert parse_response(JSON, "3", starts_in_reasoning=False, tools=TOOLS).content == JSON


def test_unfinished_reasoning_has_no_content():
    response = parse_response("hm", "k", starts_in_reasoning=True, tools=TOOLS)
    assert response == Response("hm", None, (), ())


def test_a_call_that_cannot_be_read_is_content_with_an_error():
    response = parse_response("<tool_call>{</tool_call>", "4", starts_in_reasoning=False, tools=TOOLS)
    assert response.content == "<tool_call>{</tool_call>"
    assert len(response.errors) == 1


WORDS = st.sampled_from(["<think>", "</think>", "\n", JSON, XML, "<tool_call>", "</tool_call>", "가", "<", " "])


@settings(max_examples=200, deadline=None)
@given(
    words=st.lists(WORDS, max_size=7),
    step=st.integers(1, 12),
    generation=st.sampled_from(["4", "k", "2"]),
    starts=st.booleans(),
)
def test_streaming_equals_whole(words, step, generation, starts):
    text = "".join(words)
    pieces = [text[i : i + step] for i in range(0, len(text), step)]
    whole = parse_response(text, generation, starts_in_reasoning=starts, tools=TOOLS)
    assert parse_response(pieces, generation, starts_in_reasoning=starts, tools=TOOLS) == whole
