"""Answers of a form that was asked for, from a real server with drafts. Its model says anything: the form is the grammar's."""

import json
import re
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest

from exaone_jax.text import ChatTemplate
from tests.server.checkpoints import tokenizer
from tests.server.processes import Server, serving
from tests.server.test_chat import TOOLS

USER = [{"role": "user", "content": "서울?"}]
OFF = {"chat_template_kwargs": {"enable_thinking": False}}
SCHEMA = {
    "type": "object",
    "properties": {"city": {"enum": ["서울", "부산"]}, "warm": {"type": "boolean"}},
    "required": ["city", "warm"],
    "additionalProperties": False,
}


def chat(server: Server, **body: Any) -> dict[str, Any]:
    with server.client() as http:
        asked = {"messages": USER, "max_tokens": 400, "temperature": 1.0, "seed": 5, **body}
        reply = http.post("/v1/chat/completions", json=asked)
    assert reply.status_code == 200, reply.text
    return reply.json()["choices"][0]


def refused(server: Server, path: str = "/v1/chat/completions", **body: Any) -> dict[str, Any]:
    with server.client() as http:
        given = {"messages": USER} if path.endswith("chat/completions") else {"prompt": "x"}
        reply: httpx.Response = http.post(path, json=given | body)
    assert reply.status_code == 400, reply.text
    return reply.json()["error"]


def check_city(text: str) -> None:
    found = json.loads(text)
    assert found.keys() == {"city", "warm"} and found["city"] in ("서울", "부산") and isinstance(found["warm"], bool)


def test_a_json_schema(server: Server):
    format = {"type": "json_schema", "json_schema": {"name": "city", "schema": SCHEMA, "strict": True}}
    choice = chat(server, response_format=format, **OFF)
    check_city(choice["message"]["content"])
    assert choice["finish_reason"] == "stop"


def test_a_json_schema_through_responses(server: Server):
    with server.client() as http:
        format = {"type": "json_schema", "name": "city", "schema": SCHEMA}
        body = {
            "input": "x",
            "text": {"format": format},
            "seed": 2,
            "max_output_tokens": 400,
            "reasoning": {"effort": "none"},
        }
        reply = http.post("/v1/responses", json=body)
    assert reply.status_code == 200, reply.text
    check_city(reply.json()["output"][0]["content"][0]["text"])


def test_any_json_object(server: Server):
    choice = chat(server, response_format={"type": "json_object"}, logit_bias=_favour('"}:'), **OFF)
    text = choice["message"]["content"]
    assert text.startswith("{")
    if choice["finish_reason"] == "stop":
        assert isinstance(json.loads(text), dict)


def _favour(characters: str) -> dict[str, int]:
    """Make the model likely to come to an end of what it opened."""
    return {str(tokenizer().encode(character)[0]): 6 for character in characters}


@pytest.mark.parametrize(
    ("form", "pattern"),
    [
        ({"regex": "[가-힣]{2,4}[0-9]{3}"}, "[가-힣]{2,4}[0-9]{3}"),
        ({"choice": ["서울", "부산입니다"]}, "서울|부산입니다"),
        ({"grammar": 'start: "(" NUMBER ")"\nNUMBER: /[0-9]{1,3}/'}, r"\([0-9]{1,3}\)"),
        ({"json": {"type": "array", "items": {"type": "boolean"}, "minItems": 2, "maxItems": 2}}, r"\[[\sa-z,]+\]"),
    ],
    ids=["regex", "choice", "grammar", "json"],
)
def test_structured_outputs(server: Server, form: dict[str, Any], pattern: str):
    """Of chats and of completions, several at once."""
    choice = chat(server, structured_outputs=form, **OFF)
    assert re.fullmatch(pattern, choice["message"]["content"])
    assert choice["finish_reason"] == "stop"
    with server.client() as http:
        body = {"prompt": "서울", "structured_outputs": form, "n": 3, "max_tokens": 100, "temperature": 1.0}
        reply = http.post("/v1/completions", json=body)
    assert reply.status_code == 200, reply.text
    for each in reply.json()["choices"]:
        assert re.fullmatch(pattern, each["text"])


def test_thinking_comes_before_the_form(server: Server):
    """What is thought is free, and the answer begins where the thinking ends."""
    choice = chat(server, structured_outputs={"choice": ["서울", "부산"]}, logit_bias={"55": 5})
    assert choice["finish_reason"] == "stop", choice
    assert choice["message"]["content"] in ("서울", "부산")


@pytest.fixture(scope="module", params=["json", "xml"])
def caller(request: pytest.FixtureRequest, server: Server, checkpoint: Path, tmp_path_factory: Any) -> Iterator[Server]:
    """A server of each form of calls: K-EXAONE's JSON, and K-EXAONE 2.0's XML, which its template tells."""
    if request.param == "json":
        yield server
        return
    second = shutil.copytree(checkpoint, tmp_path_factory.mktemp("second") / "model")
    (second / "chat_template.jinja").write_text(ChatTemplate.for_generation("2").source, encoding="utf-8")
    with serving(second, "--draft-tokens", "2") as other:
        yield other


CITY = {"type": "function", "function": {**TOOLS[0]["function"], "parameters": SCHEMA, "strict": True}}


@pytest.mark.parametrize("thinking", [False, True])
@pytest.mark.parametrize(
    "tool_choice", ["required", {"type": "function", "function": {"name": "get_weather"}}], ids=["required", "named"]
)
def test_a_tool_call_that_must_come(caller: Server, tool_choice: Any, thinking: bool):
    """Also after thinking, to whose end a bias drives the model."""
    more = {"logit_bias": {"55": 5}} if thinking else OFF
    choice = chat(caller, tools=[CITY], tool_choice=tool_choice, parallel_tool_calls=False, **more)
    assert choice["finish_reason"] == "tool_calls"
    (call,) = choice["message"]["tool_calls"]
    assert call["function"]["name"] == "get_weather"
    check_city(call["function"]["arguments"])


def test_a_strict_tool_is_called_by_its_schema_or_not_at_all(caller: Server):
    """Text may come first; a bias drives the model to a call."""
    body = {"tools": [CITY], **OFF, "n": 4}
    bias = {str(tokenizer().control_tokens["<tool_call>"]): 4}
    with caller.client() as http:
        asked = {"messages": USER, "max_tokens": 300, "temperature": 1.0, "seed": 3, "parallel_tool_calls": False}
        reply = http.post("/v1/chat/completions", json=asked | body | {"logit_bias": bias})
        assert reply.status_code == 200, reply.text
    ended = [choice for choice in reply.json()["choices"] if choice["finish_reason"] != "length"]
    calls = [call for choice in ended for call in choice["message"].get("tool_calls", ())]
    assert calls
    for call in calls:
        assert call["function"]["name"] == "get_weather"
        check_city(call["function"]["arguments"])
    assert not any("<tool_call>" in (choice["message"]["content"] or "") for choice in ended)


def test_a_strict_tool_through_responses(caller: Server):
    with caller.client() as http:
        tool = {"type": "function", "name": "city", "parameters": SCHEMA, "strict": True}
        body = {"input": "x", "tools": [tool], "tool_choice": "required", "parallel_tool_calls": False}
        body |= {"reasoning": {"effort": "none"}, "max_output_tokens": 400, "seed": 1}
        reply = http.post("/v1/responses", json=body)
    assert reply.status_code == 200, reply.text
    (call,) = reply.json()["output"]
    check_city(call["arguments"])


def test_a_strict_tool_and_a_form_are_not_asked_for_at_once(server: Server):
    error = refused(server, tools=[CITY], response_format={"type": "json_object"}, **OFF)
    assert error["param"] == "response_format" and "tools" in error["message"]


BAD: list[Any] = [
    {"regex": "(?=a)b"},
    {"regex": r"(a)\1"},
    {"regex": "["},
    {"regex": ""},
    {"regex": "a" * 100_000},
    {"grammar": "start: nothing"},
    {"grammar": "%%%"},
    {"json": {"type": "foo"}},
    {"json": {"type": "string", "pattern": 5}},
    {"json": "{broken"},
    {"json": {"type": "string", "minLength": 5, "maxLength": 2}},
    {"json": {"$ref": "#/$defs/missing"}},
    {"choice": []},
    {"choice": [""]},
    {"json_object": False},
    {"regex": "a", "choice": ["a"]},
    {},
    {"backend": "xgrammar"},
]


@pytest.mark.parametrize("form", BAD, ids=lambda form: str(form)[:40])
def test_a_form_that_cannot_be_followed_is_refused(server: Server, form: dict[str, Any]):
    for path in ("/v1/chat/completions", "/v1/completions"):
        error = refused(server, path, structured_outputs=form)
        assert error["param"].startswith("structured_outputs") and error["message"].startswith("structured_outputs")


LINKS = {f"a{i}": {"$ref": f"#/$defs/a{i + 1}"} for i in range(3000)}
SCHEMAS: list[Any] = [
    {"$ref": "#"},
    {"$ref": "#/$defs/a", "$defs": {"a": {"$ref": "#/$defs/a"}}},
    {"$ref": "#/$defs/a0", "$defs": {**LINKS, "a3000": {"type": "integer"}}},
    {"$ref": "http://127.0.0.1:9/schema.json"},
    {"$ref": "file:///etc/passwd"},
    {"enum": [f"v{i}" for i in range(100_000)]},
    '{"items":' * 3000 + "{}" + "}" * 3000,
]


@pytest.mark.parametrize("schema", SCHEMAS, ids=lambda schema: str(schema)[:30])
def test_a_schema_without_an_end_is_refused(server: Server, schema: Any):
    """The chain of references overflows the stack of who compiles it: not the server's."""
    assert refused(server, "/v1/completions", structured_outputs={"json": schema})["message"]
    if isinstance(schema, dict):
        format = {"type": "json_schema", "json_schema": {"name": "a", "schema": schema}}
        assert refused(server, response_format=format, **OFF)["param"] == "response_format"


def test_the_schema_of_a_tool_that_cannot_be_followed_is_named(caller: Server):
    tool = json.loads(json.dumps(CITY))
    tool["function"]["parameters"] = {"type": "object", "properties": {"a": {"type": "string", "pattern": "(?=a)"}}}
    assert refused(caller, tools=[tool], **OFF)["param"] == "tools"
    assert refused(caller, tools=[tool], tool_choice="required", **OFF)["param"] in ("tools", "tool_choice")


def test_nested_and_recursive_schemas_are_followed(server: Server):
    tree = {"type": "object", "properties": {"kids": {"type": "array", "items": {"$ref": "#"}, "maxItems": 1}}}
    tree |= {"required": ["kids"], "additionalProperties": False}
    many = {"enum": [f"v{i}" for i in range(10_000)]}
    form = {"type": "object", "properties": {"tree": tree | {"$id": "tree"}, "one": many}, "required": ["one"]}
    for schema in (tree, many, form):
        found = chat(server, structured_outputs={"json": schema}, logit_bias=_favour('"]}'), **OFF)
        assert found["finish_reason"] in ("stop", "length")


def test_many_different_schemas_are_served(server: Server):
    """Each is compiled anew, and only the latest are remembered."""
    with server.client() as http:
        for i in range(100):
            body = {"prompt": "x", "structured_outputs": {"choice": [f"answer {i}"]}, "max_tokens": 40}
            assert http.post("/v1/completions", json=body).json()["choices"][0]["text"] == f"answer {i}"


@pytest.mark.parametrize("pattern", ["(a+)+b", "(x+x+)+y", "a{1,100000}"])
def test_a_costly_pattern_is_served_or_refused_soon(server: Server, pattern: str):
    with server.client() as http:
        body = {"prompt": "x", "structured_outputs": {"regex": pattern}, "max_tokens": 4}
        assert http.post("/v1/completions", json=body, timeout=20).status_code in (200, 400)
        assert http.get("/health").status_code == 200


def test_two_forms_at_once_are_refused(server: Server):
    form = {"regex": "a"}
    assert refused(server, structured_outputs=form, response_format={"type": "json_object"}, **OFF)["param"]
    assert refused(server, structured_outputs=form, tools=TOOLS)["param"] == "structured_outputs"
    assert refused(server, structured_outputs=form, tools=TOOLS, tool_choice="required")["param"]
    assert "min_tokens" in refused(server, structured_outputs=form, min_tokens=2, **OFF)["message"]
    named = {"type": "function", "function": {"name": "nobody"}}
    assert refused(server, tools=TOOLS, tool_choice=named)["param"] == "tool_choice"
