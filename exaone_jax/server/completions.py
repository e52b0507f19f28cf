"""POST /v1/completions: one or several prompts, as text or token ids, gone on with."""

import asyncio
import secrets
import time
from collections.abc import AsyncGenerator, Sequence
from typing import Any

from fastapi import Request, Response
from fastapi.responses import JSONResponse

from exaone_jax.inference.engine import Update
from exaone_jax.server.chat import prompt_logprobs
from exaone_jax.server.errors import grammar_of, refused
from exaone_jax.server.protocol import CompletionRequest
from exaone_jax.server.served import Ask, Job, Served, token_text
from exaone_jax.server.stream import EventStream, event, whole
from exaone_jax.server.structured import completion_grammar, forms
from exaone_jax.text import IncrementalDecoder


def prompt_ids(
    served: Served, prompt: str | Sequence[int] | Sequence[str] | Sequence[Sequence[int]]
) -> list[list[int]]:
    """Every prompt as token ids. Takes its time where they are long: not for the event loop."""
    several: Any = [prompt] if isinstance(prompt, str) or isinstance(prompt[0], int) else prompt
    ids = [encode_text(served, each) if isinstance(each, str) else list(each) for each in several]
    if [] in ids:
        raise refused("prompt", "empty; expected at least one token")
    return ids


def encode_text(served: Served, text: str, *, add_special: bool = False) -> list[int]:
    """A text as token ids. Raises TooLongError for one that is far longer than the context."""
    served.tokenizer.check_length(text, served.max_length)
    return served.tokenizer.encode(text, add_special=add_special)


class _Choice:
    """One choice: what of the prompt and of the answer is to be told."""

    def __init__(self, served: Served, asked: CompletionRequest, prompt: Sequence[int]):
        self._tokenizer, self._asked, self._prompt = served.engine.tokenizer, asked, prompt
        self._offset = 0  # characters told about in logprobs
        self._begun = False
        if self._tokenizer is not None:
            self._echoed = IncrementalDecoder(self._tokenizer)
            self._said = IncrementalDecoder(self._tokenizer, skip_special=True)

    def read(self, update: Update) -> dict[str, Any]:
        """The choice as OpenAI has it, of this update alone."""
        asked, first = self._asked, not self._begun
        self._begun = True
        silent = asked.max_tokens == 0  # one token was drawn, for the engine draws at least one
        echoed = _decoded(self._tokenizer, self._prompt) if first and asked.echo else ""
        choice: dict[str, Any] = {
            "text": echoed + ("" if silent else update.text),
            "logprobs": self._logprobs(update, first, silent),
            "finish_reason": "length" if silent else update.finish_reason,
        }
        if first and asked.prompt_logprobs is not None:
            choice["prompt_logprobs"] = prompt_logprobs(self._tokenizer, [update]) if self._tokenizer else None
        if asked.return_token_ids:
            choice["token_ids"] = [] if silent else update.tokens
            if first:
                choice["prompt_token_ids"] = list(self._prompt)
        return choice

    def _logprobs(self, update: Update, first: bool, silent: bool) -> dict[str, Any] | None:
        if self._asked.logprobs is None or self._tokenizer is None:
            return None
        echoed = first and self._asked.echo
        told = list(zip(self._prompt, update.prompt_logprobs or (), strict=True)) if echoed else []
        decoders = [self._echoed] * len(told) + [self._said] * len(update.logprobs)
        told += [] if silent else [(each.token, each) for each in update.logprobs]
        found: dict[str, list[Any]] = {"tokens": [], "token_logprobs": [], "top_logprobs": [], "text_offset": []}
        for decoder, (token, each) in zip(decoders, told, strict=False):
            found["tokens"].append(token_text(self._tokenizer, token))
            found["token_logprobs"].append(None if each is None else each.logprob)
            best = [] if each is None else [*each.top, (each.token, each.logprob)]
            found["top_logprobs"].append({token_text(self._tokenizer, t): p for t, p in best} or None)
            found["text_offset"].append(self._offset)
            self._offset += len(decoder.feed(token))
        return found


def _decoded(tokenizer: Any, ids: Sequence[int]) -> str:
    return "" if tokenizer is None else tokenizer.decode(ids)


def _joined(parts: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """One choice of all that its updates told."""
    whole = {**parts[0], "text": "".join(part["text"] for part in parts), "finish_reason": parts[-1]["finish_reason"]}
    if parts[0]["logprobs"] is not None:
        whole["logprobs"] = {key: [x for part in parts for x in part["logprobs"][key]] for key in parts[0]["logprobs"]}
    if "token_ids" in whole:
        whole["token_ids"] = [token for part in parts for token in part["token_ids"]]
    return whole


class Completion:
    """One request for completions: of each prompt n choices."""

    def __init__(self, served: Served, asked: CompletionRequest, prompts: Sequence[Sequence[int]]):
        form = next(iter(forms(asked)), None)
        with grammar_of(form):
            more: dict[str, Any] = {"logprobs": asked.logprobs, "grammar": completion_grammar(asked)}
        if asked.echo and asked.logprobs is not None:
            more["prompt_logprobs"] = max(asked.logprobs, asked.prompt_logprobs or 0)
        asks = [
            Ask(prompt, params)
            for prompt in prompts
            for params in served.sampling(asked, len(prompt), max(1, asked.max_tokens or 16), **more)
        ]
        self.asked = asked
        self.choices = [_Choice(served, asked, ask.prompt) for ask in asks]
        self.job = Job(served, asks, cache_salt=asked.cache_salt, form=form)
        self.head = {
            "id": f"cmpl-{secrets.token_hex(12)}",
            "object": "text_completion",
            "created": int(time.time()),
            "model": served.check_model(asked.model),
        }

    async def answer(self) -> dict[str, Any]:
        found: list[list[dict[str, Any]]] = [[] for _ in self.choices]
        async for index, update in self.job.updates():
            found[index].append(self.choices[index].read(update))
        choices = [{"index": index, **_joined(parts)} for index, parts in enumerate(found)]
        return {**self.head, "choices": choices, "usage": self._usage()}

    async def events(self) -> AsyncGenerator[str]:
        options = self.asked.stream_options
        always = options is not None and bool(options.continuous_usage_stats)
        at_end = options is not None and bool(options.include_usage)
        async for index, update in self.job.updates():
            body: dict[str, Any] = {**self.head, "choices": [{"index": index, **self.choices[index].read(update)}]}
            if at_end or always:
                body["usage"] = self._usage() if always else None
            yield event(body)
        if at_end:
            yield event({**self.head, "choices": [], "usage": self._usage()})

    def _usage(self) -> dict[str, Any]:
        if self.asked.max_tokens == 0:
            self.job.usage.completion_tokens = 0
        return self.job.usage.to_dict()


async def completion(served: Served, asked: CompletionRequest, request: Request) -> Response:
    """The answer to a request."""
    served.check_model(asked.model)
    needs_text = {"echo": asked.echo, "logprobs": asked.logprobs, "prompt_logprobs": asked.prompt_logprobs}
    if served.engine.tokenizer is None and (
        wanted := [name for name, value in needs_text.items() if value is not None]
    ):
        raise refused(wanted[0], "this checkpoint has no tokenizer, so tokens have no text")
    prompts = await asyncio.to_thread(prompt_ids, served, asked.prompt)
    completion = Completion(served, asked, prompts)
    request.state.log |= {"user": asked.user, "job": completion.job}
    await completion.job.submit()
    if asked.stream:
        return EventStream(completion.events(), completion.job.close, completion.job.deadline)
    try:
        return JSONResponse(await whole(request, completion.answer(), completion.job.deadline))
    finally:
        completion.job.close()
