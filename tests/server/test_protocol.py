"""Every field that OpenAI publishes works or is refused with 400 naming it; none is ignored."""

import asyncio
import functools
from typing import Any

import httpx
import pytest
from openai.types import completion_create_params
from openai.types.chat import completion_create_params as chat_create_params

from exaone_jax.server.protocol import ChatRequest, CompletionRequest
from exaone_jax.server.served import Served
from exaone_jax.text import Tokenizer
from tests.server.scripted import ScriptedService, client, served

BODIES: dict[str, dict[str, Any]] = {
    "/v1/chat/completions": {"messages": [{"role": "user", "content": "hi"}]},
    "/v1/completions": {"prompt": "hi"},
}
PUBLISHED = {
    "/v1/chat/completions": chat_create_params.CompletionCreateParamsBase.__annotations__.keys() | {"stream"},
    "/v1/completions": completion_create_params.CompletionCreateParamsBase.__annotations__.keys() | {"stream"},
}
SERVED = {"/v1/chat/completions": ChatRequest, "/v1/completions": CompletionRequest}
REFUSED = {
    "/v1/chat/completions": {
        "audio",
        "function_call",
        "functions",
        "metadata",
        "moderation",
        "prediction",
        "prompt_cache_key",
        "prompt_cache_options",
        "prompt_cache_retention",
        "safety_identifier",
        "verbosity",
        "web_search_options",
    },
    "/v1/completions": {"best_of", "suffix"},
}


def post(path: str, **fields: Any) -> httpx.Response:
    return send(path, BODIES[path] | fields)


@functools.cache
def tiny() -> Served:
    return served(ScriptedService(["hello"]), max_length=64)


def send(path: str, body: Any) -> httpx.Response:
    async def go() -> httpx.Response:
        async with client(tiny()) as http:
            return await http.post(path, json=body)

    return asyncio.run(go())


def assert_refused(reply: httpx.Response, param: str | None = None, status: int = 400) -> None:
    assert reply.status_code == status, reply.text
    error = reply.json()["error"]
    assert error.keys() == {"message", "type", "param", "code"}
    if param is not None:
        assert (error["param"] or "").split(".")[0].split("[")[0] == param, error
        assert param in error["message"]


@pytest.mark.parametrize("path", BODIES)
def test_every_published_field_is_known_or_refused(path):
    assert PUBLISHED[path] == (SERVED[path].model_fields.keys() & PUBLISHED[path]) | REFUSED[path]


@pytest.mark.parametrize(("path", "field"), [(path, field) for path in BODIES for field in sorted(REFUSED[path])])
def test_a_field_that_is_not_served_is_named(path, field):
    reply = post(path, **{field: 1})
    assert_refused(reply, field)
    assert reply.json()["error"]["code"] == "unsupported_field"


# How each field of a request changes what the engine is asked for: (value, what SamplingParams then has).
SAMPLING: dict[str, tuple[Any, dict[str, Any]]] = {
    "temperature": (0.5, {"temperature": 0.5}),
    "top_p": (0.5, {"top_p": 0.5}),
    "top_k": (-1, {"top_k": 0}),
    "min_p": (0.5, {"min_p": 0.5}),
    "presence_penalty": (-2, {"presence_penalty": -2.0}),
    "frequency_penalty": (2, {"frequency_penalty": 2.0}),
    "repetition_penalty": (1.5, {"repetition_penalty": 1.5}),
    "seed": (-1, {"seed": 2**32 - 1}),
    "stop": ("x", {"stop": ("x",)}),
    "stop_token_ids": ([7], {"stop_token_ids": (7,)}),
    "min_tokens": (3, {"min_tokens": 3}),
    "ignore_eos": (True, {"ignore_eos": True}),
    "logit_bias": ({"7": -100}, {"logit_bias": ((7, -100.0),)}),
    "prompt_logprobs": (2, {"prompt_logprobs": 2}),
    "max_tokens": (5, {"max_new_tokens": 5}),
}


@pytest.mark.parametrize("path", BODIES)
@pytest.mark.parametrize("field", SAMPLING)
def test_a_field_reaches_the_engine(path, field):
    value, wanted = SAMPLING[field]
    service = ScriptedService(["hello"])

    async def go() -> httpx.Response:
        async with client(served(service, max_length=64)) as http:
            return await http.post(path, json=BODIES[path] | {field: value})

    assert asyncio.run(go()).status_code == 200
    params = service.asked[0][1]
    assert {name: getattr(params, name) for name in wanted} == wanted


BAD: list[tuple[str, Any]] = [
    *[("n", v) for v in (0, -1, 10**9, 1.5, "2", True)],
    *[("max_tokens", v) for v in (0, -1, 2**63, "hot", 64)],
    *[("temperature", v) for v in (-1, 2.01, 1e308, "hot", True)],
    *[("top_p", v) for v in (0, 1.0001, -0.0, "x")],
    *[("top_k", v) for v in (-2, 2**31, 1.5)],
    *[("min_p", v) for v in (2, -0.1)],
    *[(name, v) for name in ("presence_penalty", "frequency_penalty") for v in (2.01, -2.01)],
    *[("repetition_penalty", v) for v in (0, 1e-300, -1)],
    *[("seed", v) for v in (-(2**63) - 1, 2**64, 0.5)],
    *[("stop", v) for v in ("", [""], ["a"] * 17, "x" * 2**20, 5, [1])],
    *[("stop_token_ids", v) for v in ([-1], [2**31], "7", [True], list(range(100)))],
    *[("min_tokens", v) for v in (-1, 2**40, "1")],
    *[
        ("logit_bias", v)
        for v in ({"abc": 1}, {"-1": 1}, {"7": 1e9}, {"7": "x"}, [1], {str(i): 1 for i in range(10**5)})
    ],
    *[("prompt_logprobs", v) for v in (-2, 10**6, 21)],
    *[("stream", v) for v in ("yes", 1)],
    *[("cache_salt", v) for v in ("", "x" * 2048, 5)],
    *[("user", v) for v in (5, "x" * 1000)],
    *[("model", v) for v in (5,)],
    *[("priority", v) for v in (2**70,)],
    *[("chat_template", v) for v in ("{{ 1 }}",)],
    *[("bad_words", v) for v in ([""],)],
    *[("allowed_token_ids", v) for v in ([], [-1])],
    ("stream_options", {"include_usage": True}),
]


@pytest.mark.parametrize("path", BODIES)
@pytest.mark.parametrize(("field", "value"), BAD, ids=lambda x: str(x)[:30])
def test_a_bad_value_is_refused(path, field, value):
    assert_refused(post(path, **{field: value}))


CHAT_BAD: list[tuple[str, Any]] = [
    ("messages", []),
    ("messages", None),
    ("messages", "hi"),
    ("messages", [{}]),
    ("messages", [{"role": "user"}]),
    ("messages", [{"content": "x"}]),
    ("messages", [{"role": "king", "content": "x"}]),
    ("messages", [{"role": "user", "content": None}]),
    ("messages", [{"role": "user", "content": 5}]),
    ("messages", [{"role": "user", "content": [{"type": "hologram"}]}]),
    ("messages", [{"role": "user", "content": [{"type": "image_url", "image_url": {"url": "http://x"}}]}]),
    ("messages", [{"role": "user", "content": "x", "name": "bob"}]),
    ("messages", [{"role": "tool", "content": "x"}]),
    ("messages", [{"role": "assistant", "tool_calls": [5]}]),
    (
        "messages",
        [
            {"role": "assistant", "tool_calls": [{"id": None, "function": {"name": "f"}}]},
            {"role": "tool", "content": "x", "tool_call_id": "None"},
        ],
    ),
    ("messages", [{"role": "tool", "content": "x", "tool_call_id": ["c"]}]),
    ("messages", [{"role": "tool", "content": "x", "tool_call_id": "call_unknown"}]),
    ("messages", [{"role": "user", "content": "x"}] * 100_000),
    ("messages", [{"role": "user", "content": "long " * 1000}]),
    ("top_logprobs", 3),
    ("logprobs", 5),
    ("tool_choice", "auto"),
    ("tools", [{"type": "function"}]),
    ("tools", [{"type": "function", "function": {"name": ""}}]),
    ("tools", [{"type": "web_search"}]),
    ("reasoning_effort", "high"),
    ("modalities", ["audio"]),
    ("modalities", ["text", "text"]),
    ("store", True),
    ("service_tier", "flex"),
    *[("chat_template_kwargs", v) for v in ({"tokenize": True}, {"messages": []}, {"add_generation_prompt": False})],
    *[("chat_template_kwargs", v) for v in ({"enable_thinking": "no"}, {"__class__": 1}, {"preserve_thinking": True})],
    *[("response_format", v) for v in ({"type": "xml"}, "json")],
]


@pytest.mark.parametrize(("field", "value"), CHAT_BAD, ids=lambda x: str(x)[:40])
def test_a_bad_value_of_chats_is_refused(field, value):
    assert_refused(post("/v1/chat/completions", **{field: value}))


@pytest.mark.parametrize("arguments", ["{broken", 5, [1]])
def test_broken_arguments_of_a_past_call_are_refused(arguments):
    call = {"id": "c", "type": "function", "function": {"name": "f", "arguments": arguments}}
    messages = [{"role": "user", "content": "x"}, {"role": "assistant", "tool_calls": [call]}]
    assert_refused(post("/v1/chat/completions", messages=messages))


@pytest.mark.parametrize("arguments", ['{"a": 1}', {"a": 1}, ""])
def test_a_conversation_with_tools_goes_on(arguments):
    call = {"id": "c", "type": "function", "function": {"name": "f", "arguments": arguments}}
    messages = [
        {"role": "developer", "content": "be kind"},
        {"role": "user", "content": "x"},
        {"role": "assistant", "content": None, "refusal": None, "tool_calls": [call]},
        {"role": "tool", "content": "5", "tool_call_id": "c"},
    ]

    async def go() -> httpx.Response:
        async with client(served(ScriptedService(["hello"]))) as http:
            return await http.post("/v1/chat/completions", json={"messages": messages})

    assert asyncio.run(go()).status_code == 200


PROMPTS_BAD: list[Any] = [[], [[]], "", [""], [-1], [2**31], [1, "x"], [[1], "x"], [[1, 2], 3], None, 5, {}]
PROMPTS_BAD += [["x"] * 257, [1] * 1000, [1] * 64, [1] * 1_000_000]


@pytest.mark.parametrize("prompt", PROMPTS_BAD, ids=lambda x: str(x)[:30])
def test_a_bad_prompt_is_refused(prompt):
    assert_refused(post("/v1/completions", prompt=prompt))


@pytest.mark.parametrize("value", [-2, 21, 10**6, True, 1.5])
def test_logprobs_of_completions_are_bounded(value):
    assert_refused(post("/v1/completions", logprobs=value), "logprobs")


def test_fields_that_do_not_agree_are_named():
    assert_refused(post("/v1/completions", stream_options={"include_usage": True}), "stream_options")
    assert_refused(post("/v1/completions", max_tokens=0), "max_tokens")
    assert_refused(post("/v1/chat/completions", top_logprobs=3), "top_logprobs")
    assert_refused(post("/v1/chat/completions", tool_choice="auto"), "tool_choice")
    assert_refused(post("/v1/chat/completions", max_tokens=4, max_completion_tokens=5), "max_tokens")


@pytest.mark.parametrize(
    "field",
    [{"stop_token_ids": []}, {"stop": []}, {"stop": ["a", "ab", "abc", "b", "c"]}, {"logit_bias": {}}, {"stop": None}],
)
def test_empty_lists_and_nested_stop_strings_are_fine(field):
    for path in BODIES:
        assert post(path, **field).status_code == 200


@pytest.mark.parametrize("generation", ["k", "2", "4"])
@pytest.mark.parametrize(
    ("arguments", "fine"),
    [
        ("", True),
        ("{}", True),
        ('{"a": [], "b": {"c": "서울"}}', True),
        ('{"a": "</parameter></function></tool_call><|endofturn|>"}', True),
        ('"x"', None),
        ("[1]", None),
        ("5", None),
        ("{", False),
        ('{"a": NaN}', False),
        ('{"a": "\\ud800"}', False),
    ],
)
def test_past_calls_of_any_arguments(generation, arguments, fine):
    """None: as the generation's template has it; it is no fault of the server's either way."""
    call = {"id": "c", "type": "function", "function": {"name": "f", "arguments": arguments}}
    messages = [
        {"role": "user", "content": "x"},
        {"role": "assistant", "tool_calls": [call]},
        {"role": "tool", "content": "5", "tool_call_id": "c"},
        {"role": "assistant", "content": "the last word"},
    ]

    async def go() -> httpx.Response:
        async with client(served(ScriptedService(["hello"]), generation)) as http:
            return await http.post("/v1/chat/completions", json={"messages": messages})

    reply = asyncio.run(go())
    assert reply.status_code in ({True: (200,), False: (400,), None: (200, 400)}[fine]), reply.text
    if reply.status_code == 400:
        assert_refused(reply)


def test_a_text_that_is_far_too_long_is_refused_before_it_is_encoded(monkeypatch: pytest.MonkeyPatch):
    """Encoded whole, ten million bytes took gigabytes and all other requests' time."""
    longest = 0
    encode = Tokenizer.encode

    def watched(self: Tokenizer, text: str, **more: Any) -> list[int]:
        nonlocal longest
        longest = max(longest, len(text))
        return encode(self, text, **more)

    monkeypatch.setattr(Tokenizer, "encode", watched)
    for text in ("가나다 " * 500_000, "<|endofturn|>" * 20_000, "\n" * 1_000_000):
        bodies = {"/v1/completions": {"prompt": text}, "/tokenize": {"prompt": text}}
        bodies["/v1/chat/completions"] = {"messages": [{"role": "user", "content": text}]}
        for path, body in bodies.items():
            reply = send(path, body)
            assert_refused(reply)
            assert reply.json()["error"]["code"] == "context_length_exceeded"
    assert longest < 1000
    assert send("/tokenize", {"prompt": "가나다 " * 20}).status_code == 200


def test_the_longest_prompt_that_fits():
    assert post("/v1/completions", prompt=[5] * 63, max_tokens=1).status_code == 200
    too_long = post("/v1/completions", prompt=[5] * 63, max_tokens=2)
    assert_refused(too_long, "prompt")
    assert too_long.json()["error"]["code"] == "context_length_exceeded"


@pytest.mark.parametrize("model", ["unknown", "../x", ""])
def test_another_model_is_not_found(model):
    for path in BODIES:
        reply = post(path, model=model)
        assert_refused(reply, "model", 404)
        assert reply.json()["error"]["code"] == "model_not_found"
