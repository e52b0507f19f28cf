"""POST /v1/chat/completions: from a conversation to the model's next turn, with reasoning and tool calls told apart."""

import asyncio
import dataclasses
import secrets
import time
from collections.abc import AsyncGenerator, Sequence
from typing import Any

from fastapi import Request, Response
from fastapi.responses import JSONResponse

from exaone_jax.inference.engine import Update
from exaone_jax.inference.scheduler import TokenLogprobs
from exaone_jax.server.errors import grammar_of, refused
from exaone_jax.server.protocol import ChatRequest, ChatTemplateKwargs, Tool
from exaone_jax.server.served import Ask, Job, Served, token_text
from exaone_jax.server.stream import EventStream, event, whole
from exaone_jax.server.structured import chat_grammar, forms
from exaone_jax.text import (
    EncodedChat,
    GenerationRules,
    ReasoningPiece,
    ResponseParser,
    TextPiece,
    ToolCall,
    encode_chat,
)
from exaone_jax.text.response import Event
from exaone_jax.text.tokenizer import Tokenizer

_MESSAGE_FIELDS = {
    "system": {"role", "content"},
    "user": {"role", "content"},
    "assistant": {"role", "content", "tool_calls", "reasoning_content", "reasoning", "thinking"},
    "tool": {"role", "content", "tool_call_id"},
}


def check_messages(messages: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """The messages in the roles that templates know. What they hold is checked where they are rendered.

    Raises ApiError for a field that no template reads, and for a tool's result that answers no call.
    """
    checked, calls = [], set[str]()
    for index, message in enumerate(messages):
        where = f"messages[{index}]"
        given = {key: value for key, value in message.items() if value is not None}
        if given.get("role") == "developer":
            given["role"] = "system"
        known = _MESSAGE_FIELDS.get(str(given.get("role")))
        if known and (unknown := sorted(given.keys() - known)):
            raise refused(f"{where}.{unknown[0]}", f"not supported in a message of role {given['role']}")
        call = given.pop("tool_call_id", None) if given.get("role") == "tool" else ""
        if given.get("role") == "tool" and not (isinstance(call, str) and call in calls):
            raise refused(f"{where}.tool_call_id", f"{call!r} is no id of a tool call before")
        if isinstance(given.get("tool_calls"), list):
            ids = [call.get("id") for call in given["tool_calls"] if isinstance(call, dict)]
            calls |= {each for each in ids if isinstance(each, str)}
        checked.append(given)
    return checked


def encode(
    served: Served,
    messages: Sequence[dict[str, Any]],
    tools: Sequence[Tool] | None,
    kwargs: ChatTemplateKwargs | None,
    add_generation_prompt: bool = True,
) -> EncodedChat:
    """The prompt of a conversation. Takes its time where that is long: not for the event loop."""
    return encode_chat(
        served.tokenizer,
        check_messages(messages),
        served.chat_template,
        tools=as_dicts(tools),
        add_generation_prompt=add_generation_prompt,
        most_tokens=served.max_length,
        **({} if kwargs is None else kwargs.model_dump(exclude_none=True)),
    )


def as_dicts(tools: Sequence[Tool] | None) -> list[dict[str, Any]] | None:
    """Tools as templates print them."""
    unprinted = {"function": {"strict"}}  # how arguments are held to their schema is no business of the model's
    return [tool.model_dump(exclude_none=True, exclude=unprinted) for tool in tools] if tools else None


@dataclasses.dataclass(frozen=True)
class Piece:
    """What an update of one choice says: delta as OpenAI's stream has it, and the reason why the choice ends, if it does."""

    delta: dict[str, Any]
    finish_reason: str | None


class ChatChoice:
    """One choice. Feeds on the engine's updates, in whatever pieces they come; the deltas joined do not depend on them.

    one_call: the turn ends after its first tool call.
    """

    def __init__(
        self,
        rules: GenerationRules,
        *,
        starts_in_reasoning: bool,
        tools: Sequence[dict[str, Any]] | None,
        one_call: bool = False,
        reasoning_end: int | None = None,
    ):
        self._parser = ResponseParser(rules, starts_in_reasoning=starts_in_reasoning, tools=tools)
        self._one_call, self._reasoning_end = one_call, reasoning_end
        self._called = False
        self.done = False
        self.reasoning_tokens = 0

    def read(self, update: Update) -> Piece:
        """What is new. After `done` nothing is."""
        if self.done:
            return Piece({}, None)
        was_reasoning = self._parser.in_reasoning
        events = self._parser.feed(update.text)
        if was_reasoning:
            self.reasoning_tokens += self._reasoning_part(update.tokens)
        if update.finish_reason is not None:
            events += self._parser.flush()
        delta = self._delta(events)
        if update.finish_reason is None and not self.done:
            return Piece(delta, None)
        self.done = True
        stopped = update.finish_reason in ("stop", None)
        return Piece(delta, "tool_calls" if self._called and stopped else update.finish_reason)

    def _reasoning_part(self, tokens: Sequence[int]) -> int:
        """How many of the tokens are reasoning, its end marker included, of an update that begins in it."""
        end = self._reasoning_end
        return len(tokens) if self._parser.in_reasoning or end not in tokens else [*tokens, end].index(end) + 1

    def _delta(self, events: Sequence[Event]) -> dict[str, Any]:
        reasoning, content, calls = "", "", []
        for each in events:
            if self.done:
                break
            if isinstance(each, ReasoningPiece):
                reasoning += each.text
            elif isinstance(each, TextPiece):
                content += each.text
            elif isinstance(each, ToolCall):
                calls.append(_tool_call(each))
                self._called, self.done = True, self._one_call
        parts = {"reasoning_content": reasoning, "content": content, "tool_calls": calls}
        return {name: part for name, part in parts.items() if part}


def _tool_call(call: ToolCall) -> dict[str, Any]:
    name = {"name": call.name, "arguments": call.arguments}
    return {"index": call.index, "id": f"call_{secrets.token_hex(12)}", "type": "function", "function": name}


def join(deltas: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """The message that the deltas of a stream make."""
    message: dict[str, Any] = {"role": "assistant", "content": "".join(d.get("content", "") for d in deltas)}
    if reasoning := "".join(d.get("reasoning_content", "") for d in deltas):
        message["reasoning_content"] = reasoning
    if calls := [call for d in deltas for call in d.get("tool_calls", ())]:
        message["tool_calls"] = [{key: call[key] for key in ("id", "type", "function")} for call in calls]
    if not message["content"] and len(message) > 2:
        message["content"] = None
    return message


class Chat:
    """One request for a chat completion."""

    def __init__(self, served: Served, asked: ChatRequest, prompt: EncodedChat):
        rules, tokenizer = served.chat_template.rules, served.tokenizer
        tools = None if asked.tool_choice == "none" else as_dicts(asked.tools)
        end = tokenizer.control_tokens.get(rules.reasoning_end or "")
        form = next(iter(forms(asked)), None)
        with grammar_of(form):
            grammar = chat_grammar(served, asked, prompt.starts_in_reasoning)
        params = served.sampling(
            asked,
            len(prompt.ids),
            asked.max_completion_tokens or asked.max_tokens,
            logprobs=(asked.top_logprobs or 0) if asked.logprobs else None,
            grammar=grammar,
        )
        self.asked, self.tokenizer, self.prompt = asked, tokenizer, prompt
        self.choices = [
            ChatChoice(
                rules,
                starts_in_reasoning=prompt.starts_in_reasoning,
                tools=tools,
                one_call=asked.parallel_tool_calls is False,
                reasoning_end=end,
            )
            for _ in params
        ]
        self.job = Job(
            served,
            [Ask(prompt.ids, each) for each in params],
            cache_salt=asked.cache_salt,
            form=form,
        )
        self.head = {
            "id": f"chatcmpl-{secrets.token_hex(12)}",
            "created": int(time.time()),
            "model": served.check_model(asked.model),
        }

    async def pieces(self) -> AsyncGenerator[tuple[int, Update, Piece]]:
        """What each update says, of the choices that have not ended."""
        async for index, update in self.job.updates():
            choice = self.choices[index]
            if choice.done:
                continue
            piece = choice.read(update)
            self.job.usage.reasoning_tokens = sum(each.reasoning_tokens for each in self.choices)
            if choice.done and update.finish_reason is None:
                self.job.cancel(index)
            yield index, update, piece

    async def answer(self) -> dict[str, Any]:
        """The whole completion."""
        found: list[list[tuple[Update, Piece]]] = [[] for _ in self.choices]
        async for index, update, piece in self.pieces():
            found[index].append((update, piece))
        choices = []
        for index, parts in enumerate(found):
            choice = {
                "index": index,
                "message": join([piece.delta for _, piece in parts]),
                "logprobs": self.logprobs([update for update, _ in parts]),
                "finish_reason": parts[-1][1].finish_reason,
            }
            choices.append(choice | self._ids([update for update, _ in parts]))
        body = {**self.head, "object": "chat.completion", "choices": choices, "usage": self.job.usage.to_dict()}
        return body | self._of_prompt([update for update, _ in found[0]])

    async def events(self) -> AsyncGenerator[str]:
        """The completion in chunks."""
        options = self.asked.stream_options
        always = options is not None and bool(options.continuous_usage_stats)
        at_end = options is not None and bool(options.include_usage)
        begun: set[int] = set()

        def chunk(choices: list[dict[str, Any]], *, usage: bool, **more: object) -> str:
            body = {**self.head, "object": "chat.completion.chunk", "choices": choices, **more}
            if at_end or always:
                body["usage"] = self.job.usage.to_dict() if usage else None
            return event(body)

        async for index, update, piece in self.pieces():
            if index not in begun:
                begun.add(index)
                first = {"index": index, "delta": {"role": "assistant", "content": ""}, "logprobs": None}
                prompt = self._of_prompt([update]) if len(begun) == 1 else {}
                yield chunk([first | {"finish_reason": None}], usage=always, **prompt)
            logprobs, ids = self.logprobs([update]), self._ids([update])
            if piece.delta or piece.finish_reason or logprobs or ids:
                choice = {"index": index, "delta": piece.delta, "logprobs": logprobs}
                yield chunk([choice | {"finish_reason": piece.finish_reason} | ids], usage=always)
        if at_end:
            yield chunk([], usage=True)

    def _ids(self, updates: Sequence[Update]) -> dict[str, Any]:
        return {"token_ids": [t for u in updates for t in u.tokens]} if self.asked.return_token_ids else {}

    def _of_prompt(self, updates: Sequence[Update]) -> dict[str, Any]:
        """What was asked for of the prompt."""
        told: dict[str, Any] = {"prompt_token_ids": self.prompt.ids} if self.asked.return_token_ids else {}
        if self.asked.prompt_logprobs is not None:
            told["prompt_logprobs"] = prompt_logprobs(self.tokenizer, updates)
        return told

    def logprobs(self, updates: Sequence[Update]) -> dict[str, Any] | None:
        """OpenAI's logprobs of the tokens of some updates, if they were asked for."""
        if not self.asked.logprobs:
            return None
        return {"content": [self._logprob(each) for update in updates for each in update.logprobs]}

    def _logprob(self, found: Any) -> dict[str, Any]:
        def entry(token: int, logprob: float) -> dict[str, Any]:
            raw = self.tokenizer.token_bytes(token)
            return {"token": token_text(self.tokenizer, token), "logprob": logprob, "bytes": list(raw)}

        return entry(found.token, found.logprob) | {"top_logprobs": [entry(*each) for each in found.top]}


def prompt_logprobs(tokenizer: Tokenizer, updates: Sequence[Update]) -> list[Any] | None:
    """As vLLM: for each token of the prompt {id: {logprob, rank, decoded_token}} of itself and the best, None for the first."""
    told = next((update.prompt_logprobs for update in updates if update.prompt_logprobs is not None), None)
    if told is None:
        return None

    def entries(each: TokenLogprobs) -> dict[str, Any]:
        best = [(token, logprob, rank) for rank, (token, logprob) in enumerate(each.top, 1)]
        return {
            str(token): {"logprob": logprob, "rank": rank, "decoded_token": token_text(tokenizer, token)}
            for token, logprob, rank in [(each.token, each.logprob, each.rank), *best]
        }

    return [None if each is None else entries(each) for each in told]


async def start_chat(served: Served, asked: ChatRequest, request: Request) -> Chat:
    """Check a request and queue it."""
    served.check_model(asked.model)
    tools = None if asked.tool_choice == "none" else asked.tools
    kwargs = asked.chat_template_kwargs
    if asked.reasoning_effort is not None:
        if kwargs is not None and kwargs.enable_thinking:
            raise refused("reasoning_effort", "none, but chat_template_kwargs ask for thinking")
        kwargs = (kwargs or ChatTemplateKwargs()).model_copy(update={"enable_thinking": False})
    prompt = await asyncio.to_thread(encode, served, asked.messages, tools, kwargs)
    chat = Chat(served, asked, prompt)
    request.state.log |= {"user": asked.user, "job": chat.job}
    await chat.job.submit()
    return chat


async def chat_completion(served: Served, asked: ChatRequest, request: Request) -> Response:
    """The answer to a request."""
    chat = await start_chat(served, asked, request)
    if asked.stream:
        return EventStream(chat.events(), chat.job.close, chat.job.deadline)
    try:
        return JSONResponse(await whole(request, chat.answer(), chat.job.deadline))
    finally:
        chat.job.close()
