"""/v1/responses: the same turns in OpenAI's newer protocol, read by the SDK's own types."""

import asyncio
import json
from typing import Any

import httpx
import openai
import pytest
from openai.types.responses import Response, ResponseStreamEvent, response_create_params
from pydantic import TypeAdapter

from exaone_jax.server.protocol import ResponsesRequest
from tests.server.checkpoints import tokenizer
from tests.server.processes import Server
from tests.server.scripted import ScriptedService, client, served
from tests.server.test_chat import JSON_CALL

TOOL = {
    "type": "function",
    "name": "get_weather",
    "parameters": {"type": "object", "properties": {"city": {"type": "string"}}},
}
SAID = f"생각.\n</think>\n\n맑음.\n{JSON_CALL}"
REFUSED = {
    "access_programs",
    "background_options",
    "context_management",
    "conversation",
    "image",
    "max_tool_calls",
    "moderation",
    "previous_response_id",
    "prompt",
    "prompt_cache_key",
    "prompt_cache_options",
    "prompt_cache_retention",
    "safety_identifier",
}


def post(body: dict[str, Any], text: str = SAID, cut: int = 1) -> tuple[httpx.Response, ScriptedService]:
    service = ScriptedService([text], cut)

    async def go() -> httpx.Response:
        async with client(served(service)) as http:
            return await http.post("/v1/responses", json={"input": "날씨는?", **body})

    return asyncio.run(go()), service


def output(reply: httpx.Response) -> Response:
    assert reply.status_code == 200, reply.text
    return Response.model_validate(reply.json())


def test_every_published_field_is_known_or_refused():
    published = response_create_params.ResponseCreateParamsBase.__annotations__.keys() | {"stream"}
    assert published == (ResponsesRequest.model_fields.keys() & published) | REFUSED


@pytest.mark.parametrize("field", sorted(REFUSED))
def test_a_field_that_is_not_served_is_named(field):
    reply, _ = post({field: "x"})
    assert reply.status_code == 400
    assert reply.json()["error"]["param"] == field


def test_reasoning_text_and_calls_are_items():
    reply, _ = post({"tools": [TOOL]})
    found = output(reply)
    assert [item.type for item in found.output] == ["reasoning", "message", "function_call"]
    assert found.output_text == "맑음."
    assert found.output[0].content[0].text == "생각."
    assert found.output[2].name == "get_weather"
    assert json.loads(found.output[2].arguments) == {"city": "서울"}
    assert found.status == "completed"
    assert reply.json()["store"] is False
    assert 0 < found.usage.output_tokens_details.reasoning_tokens < found.usage.output_tokens


@pytest.mark.parametrize("cut", [1, 5, 1000])
def test_a_stream_tells_what_the_whole_response_is(cut):
    """Event after event as the SDK knows them, numbered, and what they add up to."""
    whole = output(post({"tools": [TOOL]}, cut=cut)[0])
    reply, _ = post({"tools": [TOOL], "stream": True}, cut=cut)
    lines = [line.removeprefix("data: ") for line in reply.text.splitlines() if line.startswith("data: ")]
    names = [line.removeprefix("event: ") for line in reply.text.splitlines() if line.startswith("event: ")]
    events = [TypeAdapter(ResponseStreamEvent).validate_python(json.loads(line)) for line in lines]
    assert [event.type for event in events] == names
    assert [event.sequence_number for event in events] == list(range(len(events)))
    assert names[:2] == ["response.created", "response.in_progress"] and names[-1] == "response.completed"
    texts: dict[str, str] = {}
    for each in events:
        if each.type.endswith(".delta"):
            texts[each.item_id] = texts.get(each.item_id, "") + each.delta
    items = [event.item for event in events if event.type == "response.output_item.done"]
    assert [item.type for item in items] == [item.type for item in whole.output]
    assert list(texts) == [item.id for item in items]
    assert list(texts.values()) == ["생각.", "맑음.", '{"city": "서울"}']
    last = events[-1].response
    assert [item.model_dump() for item in last.output] == [item.model_dump() for item in items]
    assert last.output_text == whole.output_text
    assert last.usage == whole.usage


def test_a_conversation_goes_in_as_items():
    """As the SDK gives back what it got, with the result of the call."""
    first = output(post({"tools": [TOOL]})[0])
    again = [item.model_dump(exclude_none=True) for item in first.output]
    result = {"type": "function_call_output", "call_id": first.output[2].call_id, "output": "맑음"}
    items = [{"role": "user", "content": [{"type": "input_text", "text": "날씨는?"}]}, *again, result]
    reply, service = post({"input": items, "tools": [TOOL], "instructions": "Be kind."}, text="네.\n</think>\n\n끝.")
    assert output(reply).output_text == "끝."
    prompt = tokenizer().decode(service.asked[0][0])
    for part in ("Be kind.", "날씨는?", "get_weather", "맑음"):
        assert part in prompt


@pytest.mark.parametrize(
    "wrong",
    [
        {"input": []},
        {"input": None},
        {"input": [{"role": "user"}]},
        {"input": [{"type": "item_reference", "id": "x"}]},
        {"input": [{"role": "user", "content": [{"type": "input_image", "image_url": "http://x"}]}]},
        {"input": [{"type": "function_call_output", "call_id": "unknown", "output": "x"}]},
        {"input": [{"role": "user", "content": "x", "colour": "red"}]},
        {"previous_response_id": "resp_1"},
        {"store": True},
        {"background": True},
        {"truncation": "auto"},
        {"include": ["reasoning.encrypted_content"]},
        {"top_logprobs": 3},
        {"tool_choice": "auto"},
        {"reasoning": {"effort": "high"}},
        {"text": {"verbosity": "low"}},
        {"metadata": {"a": 5}},
        {"max_output_tokens": 0},
        {"temperature": 3},
        {"stream_options": {"include_obfuscation": True}, "stream": True},
    ],
    ids=str,
)
def test_a_bad_request_is_refused(wrong):
    reply, service = post(wrong)
    assert reply.status_code == 400, reply.text
    assert reply.json()["error"].keys() == {"message", "type", "param", "code"}
    assert not service.asked


def test_thinking_can_be_turned_off():
    found = output(post({"reasoning": {"effort": "none"}}, text="a </think> b")[0])
    assert [item.type for item in found.output] == ["message"]
    assert found.output_text == "a </think> b"


def test_the_sdk_against_a_real_server(server: Server):
    sdk = openai.OpenAI(base_url=f"{server.url}/v1", api_key="none", max_retries=0, timeout=60)
    body: dict[str, Any] = {"model": "tiny", "input": "대한민국의 수도는?", "max_output_tokens": 24}
    body |= {"extra_body": {"seed": 3}, "include": ["message.output_text.logprobs"]}
    whole = sdk.responses.create(**body)
    assert whole.status == "incomplete" and whole.incomplete_details.reason == "max_output_tokens"
    with sdk.responses.stream(**body) as stream:
        events = list(stream)
    assert "response.reasoning_text.delta" in {event.type for event in events}
    assert events[-1].type == "response.incomplete"
    texts = [item.content[0].text for item in events[-1].response.output]
    assert texts == [item.content[0].text for item in whole.output]
