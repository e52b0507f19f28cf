import json
import time
from itertools import pairwise

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from exaone_jax.errors import InputError
from exaone_jax.text import ChatTemplate, TextPiece, ToolCall, ToolCallParser, parse_response, render_chat

TOOLS = [
    {
        "type": "function",
        "function": {
            "name": "weather",
            "parameters": {
                "type": "object",
                "properties": {
                    "city": {"type": "string"},
                    "days": {"type": "integer"},
                    "exact": {"type": "boolean"},
                    "tags": {"type": "array", "items": {"type": "string"}},
                    "mixed": {"type": ["string", "integer", "null"]},
                    "any": {"anyOf": [{"type": "number"}, {"type": "string"}]},
                    "choice": {"enum": ["1", "2"]},
                    "odd": {"type": 5, "anyOf": 3},
                },
            },
        },
    }
]


def run(tool_format, pieces, tools=TOOLS):
    parser = ToolCallParser(tool_format, tools)
    events = [event for piece in pieces for event in parser.feed(piece)] + parser.flush()
    return merge(events)


def merge(events):
    """Text pieces joined, so that cuts do not show."""
    merged = []
    for event in events:
        last = merged[-1] if merged else None
        if isinstance(event, TextPiece) and isinstance(last, TextPiece) and not (event.error or last.error):
            merged[-1] = TextPiece(last.text + event.text)
        else:
            merged.append(event)
    return merged


def json_call(name="weather", arguments='{"city": "서울"}'):
    return f'<tool_call>{{"name": "{name}", "arguments": {arguments}}}</tool_call>'


def xml_call(**parameters):
    blocks = "".join(f"<parameter={key}>\n{value}\n</parameter>\n" for key, value in parameters.items())
    return f"<tool_call>\n<function=weather>\n{blocks}</function>\n</tool_call>"


SEOUL = ToolCall(0, "weather", '{"city": "서울"}')


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        (json_call(), [SEOUL]),
        ("보자.\n\n" + json_call() + "\n", [TextPiece("보자."), SEOUL]),
        (json_call() + "\n" + json_call(), [SEOUL, ToolCall(1, "weather", '{"city": "서울"}')]),
        ("\n" + json_call() + "\n\nafter ", [SEOUL, TextPiece("after ")]),
        ("a " + json_call() + "\nb", [TextPiece("a"), SEOUL, TextPiece("\nb")]),
        (json_call()[: -len("</tool_call>")], [SEOUL]),
        (json_call(arguments='"{\\"city\\": \\"서울\\"}"'), [SEOUL]),
        (json_call(arguments="5"), [ToolCall(0, "weather", "5")]),
        (json_call(arguments='"x"'), [ToolCall(0, "weather", '"x"')]),
        ('<tool_call>\n{"name": "weather"}\n</tool_call>', [ToolCall(0, "weather", "{}")]),
        ("<tool_call>\n```json\n" + json_call()[11:-12] + "\n```\n</tool_call>", [SEOUL]),
        (
            json_call(arguments='{"a": "</tool_call> \\" <tool_call>"}'),
            [ToolCall(0, "weather", '{"a": "</tool_call> \\" <tool_call>"}')],
        ),
        ("no call\n", [TextPiece("no call\n")]),
        (" \n", [TextPiece(" \n")]),
        ("a <tool_ca", [TextPiece("a <tool_ca")]),
        ("", []),
    ],
)
def test_json(text, expected):
    assert run("json", [text]) == expected
    assert run("json", list(text)) == expected


BAD = {
    "broken": '<tool_call>{"name": "weather", "arguments": {</tool_call>',
    "no name": '<tool_call>{"arguments": {}}</tool_call>',
    "list": "<tool_call>[1]</tool_call>",
    "empty": "<tool_call></tool_call>",
    "nan": json_call(arguments='{"a": NaN}'),
    "surrogate": json_call(arguments='{"a": "\\ud800"}'),
    "deep": json_call(arguments="[" * 100_000),
    "digits": json_call(arguments="9" * 5000),
    "open": '<tool_call>{"name": "wea',
    "stray quote": '<tool_call>{"name": "weather}</tool_call>',
}


@pytest.mark.parametrize("case", BAD)
def test_a_malformed_json_call_stays_text(case):
    (event,) = run("json", [BAD[case]])
    assert event.text == BAD[case]
    assert event.error


def test_good_calls_around_a_malformed_one_survive():
    text = "a\n" + BAD["stray quote"] + "\n" + json_call() + " b"
    events = run("json", [text])
    assert [e for e in events if isinstance(e, ToolCall)] == [SEOUL]
    assert events[1].text == "\n" + BAD["stray quote"]
    assert events[1].error
    opened_twice = '<tool_call>{"name": ' + json_call()
    first, second = run("json", [opened_twice])
    assert (first.text, second) == ('<tool_call>{"name": ', SEOUL)


def test_xml_values_are_typed_by_the_schema():
    call = xml_call(
        city="5", days="3", exact="true", tags='["a", "나"]', mixed="null", any="1.5", choice="1", odd="7", unknown="8"
    )
    (event,) = run("xml", [call])
    assert json.loads(event.arguments) == {
        "city": "5",
        "days": 3,
        "exact": True,
        "tags": ["a", "나"],
        "mixed": None,
        "any": 1.5,
        "choice": "1",
        "odd": "7",
        "unknown": "8",
    }
    (event,) = run("xml", [xml_call(mixed="서울", any='"quoted"')])
    assert json.loads(event.arguments) == {"mixed": "서울", "any": '"quoted"'}


@pytest.mark.parametrize(
    "value", ["", "\n", "a\nb", "  x ", "</tool_call>", "<parameter=x>", "</parameter>", "<tool_call>"]
)
def test_xml_strings_are_raw(value):
    (event,) = run("xml", list(xml_call(city=value, days="1")))
    assert json.loads(event.arguments) == {"city": value, "days": 1}


@pytest.mark.parametrize(
    "text",
    [
        xml_call(days="three"),
        xml_call(days="1").replace("</function>\n", ""),
        xml_call(days="1")[: -len("</parameter>\n</function>\n</tool_call>")],
        "<tool_call>weather</tool_call>",
        xml_call(days="1").replace("<parameter=days>", "<parameter=days"),
        "<tool_call>\n<function=weather>\n<parameter=city>\ncut",
    ],
)
def test_a_malformed_xml_call_stays_text(text):
    (event,) = run("xml", [text])
    assert event.text == text
    assert event.error


def test_bad_tools():
    with pytest.raises(InputError, match=r"tools\[0\]"):
        ToolCallParser("xml", [{"function": {}}])


TAGS = ("<tool_call>", "</tool_call>", "<function=weather>", "</function>", "<parameter=city>", "</parameter>")
CALLS = (json_call(), xml_call(city="x"), xml_call(days="1"), BAD["no name"])
WORDS = st.sampled_from([*TAGS, *CALLS, "\n", " ", '"', "\\", "{", "}", "가", "<", "tool_call>"])


@settings(max_examples=400, deadline=None)
@given(
    words=st.lists(WORDS, max_size=7),
    cuts=st.sets(st.integers(0, 300), max_size=30),
    tool_format=st.sampled_from(["json", "xml"]),
)
def test_streaming_equals_whole_over_every_cut_and_loses_nothing(words, cuts, tool_format):
    text = "".join(words)
    places = sorted({0, len(text), *(cut for cut in cuts if cut < len(text))})
    pieces = [text[i:j] for i, j in pairwise(places)]
    whole = run(tool_format, [text])
    assert run(tool_format, pieces) == whole
    assert run(tool_format, list(text)) == whole
    if not any(isinstance(event, ToolCall) for event in whole):
        assert "".join(event.text for event in whole) == text


def test_hostile_output_does_not_take_quadratic_time():
    text = '<tool_call>{"a": "' + "</tool_call>" * 3000
    parser = ToolCallParser("json", TOOLS)
    for start in range(0, len(text), 4):
        parser.feed(text[start : start + 4])
    events = parser.flush()
    assert "".join(event.text for event in events if isinstance(event, TextPiece)) == text


JSON_VALUES = st.recursive(
    st.one_of(
        st.none(), st.booleans(), st.integers(-(2**53), 2**53), st.text(st.characters(exclude_categories=["Cs"]))
    ),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text("abc", min_size=1), inner, max_size=3),
    max_leaves=6,
)


@settings(max_examples=100, deadline=None)
@given(
    arguments=st.dictionaries(st.text("가bc", min_size=1), JSON_VALUES, max_size=3),
    generation=st.sampled_from(["4", "k", "4.5"]),
    step=st.integers(1, 9),
)
def test_what_a_template_prints_is_read_back(arguments, generation, step):
    call = {"function": {"name": "f", "arguments": arguments}}
    history = [{"role": "user", "content": "q"}]
    answer = {"role": "assistant", "content": "", "reasoning_content": "hm", "tool_calls": [call, call]}
    template = ChatTemplate.for_generation(generation)
    before = render_chat(history, template, enable_thinking=True)
    kept = {"skip_think": False} if generation == "4" else {}
    after = render_chat([*history, answer], template, enable_thinking=True, add_generation_prompt=False, **kept)
    assert after.startswith(before)
    written = after.removeprefix(before).removesuffix(template.rules.end_of_turn + "\n")
    pieces = [written[i : i + step] for i in range(0, len(written), step)]
    response = parse_response(pieces, generation, starts_in_reasoning=True, tools=[{"function": {"name": "f"}}])
    assert (response.reasoning, response.content, response.errors) == ("hm", None, ())
    assert [json.loads(c.arguments) for c in response.tool_calls] == [arguments, arguments]


REFERRING = {
    "type": "object",
    "properties": {
        "home": {"$ref": "#/$defs/Address"},
        "name": {"allOf": [{"$ref": "#/$defs/Name"}]},
        "maybe": {"anyOf": [{"$ref": "#/$defs/Address"}, {"type": "null"}]},
        "note": {"type": ["string", "null"]},
        "id": {"type": ["string", "integer"]},
        "loop": {"$ref": "#/$defs/Loop"},
        "missing": {"$ref": "#/$defs/Missing"},
        "nothing": {"anyOf": []},
    },
    "additionalProperties": {"type": "number"},
    "$defs": {
        "Address": {"type": "object", "properties": {"no": {"type": "integer"}}},
        "Name": {"type": "string"},
        "Loop": {"anyOf": [{"$ref": "#/$defs/Loop"}, {"$ref": "#/$defs/Loop"}]},
    },
}


@pytest.mark.parametrize(
    ("key", "text", "value"),
    [
        ("home", '{"no": 5}', {"no": 5}),
        ("name", "5", "5"),
        ("maybe", "null", None),
        ("maybe", '{"no": 5}', {"no": 5}),
        ("note", "null", None),
        ("note", "5", "5"),
        ("note", '{"a": 1}', '{"a": 1}'),
        ("id", "5", 5),
        ("id", "5.5", "5.5"),
        ("id", "five", "five"),
        ("loop", "5", "5"),
        ("missing", "5", "5"),
        ("nothing", "5", "5"),
        ("other", "1.5", 1.5),
    ],
)
def test_xml_values_of_referring_and_mixed_schemas(key, text, value):
    """As generators of schemas write them: references, unions with null, and what those may stand for in each other."""
    tools = [{"type": "function", "function": {"name": "f", "parameters": REFERRING}}]
    parser = ToolCallParser("xml", tools)
    call = f"<tool_call>\n<function=f>\n<parameter={key}>\n{text}\n</parameter>\n</function>\n</tool_call>"
    (found,) = parser.feed(call)
    assert isinstance(found, ToolCall)
    assert json.loads(found.arguments) == {key: value}


@pytest.mark.parametrize("number", ["1e999", "-1e999", "NaN"])
def test_a_number_that_is_not_json_makes_no_call(number):
    parser = ToolCallParser("json", TOOLS)
    events = parser.feed(f'<tool_call>{{"name": "f", "arguments": {{"a": {number}}}}}</tool_call>') + parser.flush()
    (piece,) = events
    assert isinstance(piece, TextPiece) and "not JSON" in (piece.error or "")


@pytest.mark.parametrize("body", ["```" + "\n" * 20_000, "```json" + "\n " * 20_000, "```\n" + "\n```" * 10_000])
def test_a_call_of_blanks_is_read_soon(body):
    """A regular expression took half a minute for 3000 newlines."""
    parser = ToolCallParser("json", TOOLS)
    started = time.monotonic()
    events = parser.feed(f"<tool_call>{body}</tool_call>") + parser.flush()
    assert time.monotonic() - started < 5
    assert [type(event) for event in events] == [TextPiece]


@pytest.mark.parametrize(
    "fenced", ["```json\n{}\n```", "```\n{}\n```", "\n```json  \n\n{}\n  ```\n", "```json\n{}\n\n```"], ids=repr
)
def test_a_call_may_stand_in_a_fence(fenced):
    call = fenced.replace("{}", '{"name": "f", "arguments": {"a": "```"}}')
    parser = ToolCallParser("json", TOOLS)
    (found,) = parser.feed(f"<tool_call>{call}</tool_call>") + parser.flush()
    assert isinstance(found, ToolCall) and json.loads(found.arguments) == {"a": "```"}
