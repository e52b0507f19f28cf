"""POST /v1/responses: OpenAI's newer protocol over the same turns. Nothing is stored: every request brings its conversation."""

import secrets
import time
from collections.abc import AsyncGenerator, Iterator, Mapping, Sequence
from typing import Any

from fastapi import Request, Response
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse
from pydantic import ValidationError

from exaone_jax.server.chat import Chat, start_chat
from exaone_jax.server.errors import api_error, refused
from exaone_jax.server.protocol import ChatRequest, ResponsesRequest, Sampling
from exaone_jax.server.served import Served
from exaone_jax.server.stream import EventStream, event, whole

_PART_FIELDS = {"type", "text", "annotations", "logprobs"}
_ITEM_FIELDS = {
    "message": {"type", "role", "content", "id", "status", "phase"},
    "function_call": {"type", "call_id", "name", "arguments", "id", "status"},
    "function_call_output": {"type", "call_id", "output", "id", "status"},
    "reasoning": {"type", "summary", "content", "id", "status"},
}
_SHARED = (
    "model",
    "stream",
    "user",
    "cache_salt",
    "parallel_tool_calls",
    "chat_template_kwargs",
    *Sampling.model_fields,
)


def to_chat(asked: ResponsesRequest) -> ChatRequest:
    """The same request as a chat completion's. Raises ApiError naming what of the input is wrong."""
    messages = [{"role": "system", "content": asked.instructions}] if asked.instructions else []
    given = [{"role": "user", "content": asked.input}] if isinstance(asked.input, str) else asked.input
    for index, item in enumerate(given):
        _add_item(messages, item, f"input[{index}]")
    tools = [{"type": "function", "function": tool.model_dump(exclude={"type"})} for tool in asked.tools or ()]
    choice: Any = asked.tool_choice
    if choice is not None and not isinstance(choice, str):
        choice = {"type": "function", "function": {"name": choice.name}}
    wants_logprobs = bool(asked.include)
    if asked.top_logprobs is not None and not wants_logprobs:
        raise refused("top_logprobs", "given without message.output_text.logprobs in include")
    format = None if asked.text is None else asked.text.response_format()
    fields = {name: getattr(asked, name) for name in _SHARED} | {
        "messages": messages,
        "tools": tools or None,
        "tool_choice": choice,
        "max_completion_tokens": asked.max_output_tokens,
        "logprobs": wants_logprobs or None,
        "top_logprobs": asked.top_logprobs,
        "reasoning_effort": None if asked.reasoning is None else asked.reasoning.effort,
        "response_format": format,
    }
    chosen = {k: v.model_dump(exclude_none=True) if hasattr(v, "model_dump") else v for k, v in fields.items()}
    try:
        return ChatRequest.model_validate({name: value for name, value in chosen.items() if value is not None})
    except ValidationError as error:
        raise RequestValidationError(error.errors()) from error


def _add_item(messages: list[dict[str, Any]], item: Mapping[str, Any], where: str) -> None:
    """Add an item of the input to the messages; what the assistant thought, said and called is one message of its."""
    kind = item.get("type", "message")
    if kind not in _ITEM_FIELDS:
        raise refused("input", f"{where}: type is {kind!r}; expected one of {', '.join(_ITEM_FIELDS)}")
    if unknown := sorted(key for key, value in item.items() if value is not None and key not in _ITEM_FIELDS[kind]):
        raise refused("input", f"{where}.{unknown[0]}: not supported in an item of type {kind}")
    if kind == "function_call_output":
        output = _text(item.get("output"), f"{where}.output")
        messages.append({"role": "tool", "tool_call_id": item.get("call_id"), "content": output})
    elif kind == "message" and item.get("role") != "assistant":
        messages.append({"role": item.get("role"), "content": _text(item.get("content"), f"{where}.content")})
    else:
        _add_to_turn(messages, kind, item, where)


def _add_to_turn(messages: list[dict[str, Any]], kind: str, item: Mapping[str, Any], where: str) -> None:
    last: dict[str, Any] | None = messages[-1] if messages and messages[-1]["role"] == "assistant" else None
    if last is None or (kind == "message" and "content" in last) or (kind == "reasoning" and len(last) > 1):
        last = {"role": "assistant"}
        messages.append(last)
    if kind == "message":
        last["content"] = _text(item.get("content"), f"{where}.content")
    elif kind == "reasoning":
        last["reasoning_content"] = _text(item.get("content") or item.get("summary") or "", f"{where}.content")
    else:
        function = {"name": item.get("name"), "arguments": item.get("arguments")}
        last.setdefault("tool_calls", []).append({"id": item.get("call_id"), "type": "function", "function": function})


def _text(content: Any, where: str) -> str:
    if isinstance(content, str):
        return content
    if not isinstance(content, list):
        raise refused("input", f"{where}: expected a string or a list of text parts")
    for index, part in enumerate(content):
        known = isinstance(part, dict) and part.get("type") in (
            "input_text",
            "output_text",
            "reasoning_text",
            "summary_text",
        )
        if not known or not isinstance(part.get("text"), str) or part.keys() - _PART_FIELDS:
            raise refused("input", f"{where}[{index}]: expected a text part; images and files are not supported")
    return "".join(part["text"] for part in content)


class _Turn:
    """The output items of a response as they grow, and the events that tell of it."""

    def __init__(self) -> None:
        self.items: list[dict[str, Any]] = []
        self._open: dict[str, Any] | None = None

    def read(self, delta: Mapping[str, Any], logprobs: Sequence[Any]) -> Iterator[dict[str, Any]]:
        """Events of what a chat completion's delta adds."""
        if text := delta.get("reasoning_content"):
            yield from self._write("reasoning", text, [])
        if text := delta.get("content"):
            yield from self._write("message", text, logprobs)
        for call in delta.get("tool_calls", ()):
            yield from self._call(call)

    def close(self, status: str = "completed") -> Iterator[dict[str, Any]]:
        """End the item that grows."""
        item, self._open = self._open, None
        if item is None:
            return
        item["status"] = status
        part, kind = item["content"][0], _DELTAS[item["type"]]
        at = {"item_id": item["id"], "output_index": len(self.items) - 1, "content_index": 0}
        more = {"logprobs": part["logprobs"]} if kind == "output_text" else {}
        yield {"type": f"response.{kind}.done", **at, "text": part["text"], **more}
        yield {"type": "response.content_part.done", **at, "part": dict(part)}
        yield {"type": "response.output_item.done", "output_index": len(self.items) - 1, "item": item}

    def _write(self, kind: str, text: str, logprobs: Sequence[Any]) -> Iterator[dict[str, Any]]:
        if self._open is None or self._open["type"] != kind:
            yield from self.close()
            yield from self._begin(kind)
        item = self._open or {}
        part = item["content"][0]
        part["text"] += text
        more = {}
        if _DELTAS[kind] == "output_text":
            part["logprobs"] += logprobs
            more = {"logprobs": list(logprobs)}
        at = {"item_id": item["id"], "output_index": len(self.items) - 1, "content_index": 0}
        yield {"type": f"response.{_DELTAS[kind]}.delta", **at, "delta": text, **more}

    def _begin(self, kind: str) -> Iterator[dict[str, Any]]:
        if kind == "reasoning":
            item: dict[str, Any] = {
                "type": kind,
                "id": f"rs_{secrets.token_hex(12)}",
                "summary": [],
                "status": "in_progress",
            }
            part: dict[str, Any] = {"type": "reasoning_text", "text": ""}
        else:
            item = {"type": kind, "id": f"msg_{secrets.token_hex(12)}", "role": "assistant", "status": "in_progress"}
            part = {"type": "output_text", "text": "", "annotations": [], "logprobs": []}
        self._open = item
        self.items.append(item)
        at = {"output_index": len(self.items) - 1}
        yield {"type": "response.output_item.added", **at, "item": {**item, "content": []}}
        item["content"] = [part]
        yield {
            "type": "response.content_part.added",
            "item_id": item["id"],
            **at,
            "content_index": 0,
            "part": {**part, **({"logprobs": []} if "logprobs" in part else {})},
        }

    def _call(self, call: Mapping[str, Any]) -> Iterator[dict[str, Any]]:
        yield from self.close()
        function = call["function"]
        item = {
            "type": "function_call",
            "id": f"fc_{secrets.token_hex(12)}",
            "call_id": call["id"],
            "name": function["name"],
        }
        self.items.append({**item, "arguments": function["arguments"], "status": "completed"})
        at = {"output_index": len(self.items) - 1}
        yield {"type": "response.output_item.added", **at, "item": {**item, "arguments": "", "status": "in_progress"}}
        told = {"item_id": item["id"], **at}
        yield {"type": "response.function_call_arguments.delta", **told, "delta": function["arguments"]}
        done = {"arguments": function["arguments"], "name": function["name"]}
        yield {"type": "response.function_call_arguments.done", **told, **done}
        yield {"type": "response.output_item.done", **at, "item": self.items[-1]}


_DELTAS = {"reasoning": "reasoning_text", "message": "output_text"}


class _Answer:
    """One response."""

    def __init__(self, served: Served, asked: ResponsesRequest, chat: Chat):
        self.chat, self._turn = chat, _Turn()
        sampling = chat.job.asks[0].params
        self._head = {
            "id": f"resp_{secrets.token_hex(16)}",
            "object": "response",
            "created_at": int(time.time()),
            "model": served.check_model(asked.model),
            "instructions": asked.instructions,
            "max_output_tokens": asked.max_output_tokens,
            "metadata": asked.metadata or {},
            "parallel_tool_calls": asked.parallel_tool_calls is not False,
            "previous_response_id": None,
            "reasoning": {"effort": asked.reasoning and asked.reasoning.effort, "summary": None},
            "store": False,
            "temperature": sampling.temperature,
            "top_p": sampling.top_p,
            "text": {"format": {"type": "text"}, **(_plain(asked.text) or {})},
            "tool_choice": _plain(asked.tool_choice) or "auto",
            "tools": [_plain(tool) for tool in asked.tools or ()],
            "truncation": "disabled",
            "user": asked.user,
        }
        self.last: dict[str, Any] = {}  # the response as a whole, when all events were given out

    async def events(self) -> AsyncGenerator[dict[str, Any]]:
        """The events, without their numbers."""
        yield {"type": "response.created", "response": self._response("in_progress")}
        yield {"type": "response.in_progress", "response": self._response("in_progress")}
        reason = None
        async for _, update, piece in self.chat.pieces():
            logprobs = (self.chat.logprobs([update]) or {"content": []})["content"]
            for each in self._turn.read(piece.delta, logprobs):
                yield each
            reason = piece.finish_reason or reason
        status = "incomplete" if reason == "length" else "completed"
        for each in self._turn.close(status):
            yield each
        self.last = self._response(status)
        yield {"type": f"response.{status}", "response": self.last}

    async def whole(self) -> dict[str, Any]:
        async for _ in self.events():
            pass
        return self.last

    async def stream(self) -> AsyncGenerator[str]:
        number = 0
        try:
            async for each in self.events():
                yield event({**each, "sequence_number": number}, each["type"])
                number += 1
        except Exception as error:  # noqa: BLE001 (told to the client; api_error logs what is a fault of ours)
            told = api_error(error)
            failed = self._response("failed") | {
                "error": {"code": told.code or "server_error", "message": told.message}
            }
            yield event({"type": "response.failed", "response": failed, "sequence_number": number}, "response.failed")

    def _response(self, status: str) -> dict[str, Any]:
        ended = status in ("completed", "incomplete")
        return {
            **self._head,
            "status": status,
            "error": None,
            "incomplete_details": {"reason": "max_output_tokens"} if status == "incomplete" else None,
            "output": [dict(item) for item in self._turn.items],
            "usage": self._usage() if ended else None,
        }

    def _usage(self) -> dict[str, Any]:
        usage = self.chat.job.usage
        return {
            "input_tokens": usage.prompt_tokens,
            "input_tokens_details": {"cached_tokens": usage.cached_tokens, "cache_write_tokens": 0},
            "output_tokens": usage.completion_tokens,
            "output_tokens_details": {"reasoning_tokens": usage.reasoning_tokens},
            "total_tokens": usage.prompt_tokens + usage.completion_tokens,
        }


def _plain(value: Any) -> Any:
    return value.model_dump(exclude_none=True, by_alias=True) if hasattr(value, "model_dump") else value


async def response(served: Served, asked: ResponsesRequest, request: Request) -> Response:
    """The answer to a request."""
    answer = _Answer(served, asked, await start_chat(served, to_chat(asked), request))
    job = answer.chat.job
    if asked.stream:
        return EventStream(answer.stream(), job.close, job.deadline, end="")
    try:
        return JSONResponse(await whole(request, answer.whole(), job.deadline))
    finally:
        job.close()
