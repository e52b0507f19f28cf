"""From a conversation to token ids, with the template's control tokens as ids and the user's spellings of them as text.

Encoding the rendered prompt whole would let a user end a turn by writing `<|endofturn|>`. Rendering with placeholders
in place of the content would break templates that look at it (`.split('</think>')`, `| trim`). So:

- Where no string of the request spells a control token, the rendered prompt is encoded whole: exactly the ids that
  transformers gives.
- Otherwise a random mark is put inside each spelling (and only there), the template renders the marked strings, and the
  result is cut at the control tokens that are not interrupted by a mark. Those are the template's; the text
  between is freed of marks and encoded by an encoder that has no control tokens. The tokenizer itself cuts its input at
  added tokens before any merge, so everything but the spellings gets the ids it would have had.
- A string that only begins or ends with a part of a spelling is marked too, so that two fields which a template prints
  side by side cannot make a token between them.
- An assistant message's reasoning markers are left alone where the template demonstrably reads them (rendering with and
  without the marks differs): that is how templates take past reasoning out of the history.
"""

import secrets
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import Any

from exaone_jax.text.generation import GenerationRules
from exaone_jax.text.templates import ChatRequest, ChatTemplate, prepare
from exaone_jax.text.tokenizer import Tokenizer


@dataclass(frozen=True)
class EncodedChat:
    """A prompt.

    Attributes:
      ids: its token ids.
      text: the rendered prompt, for people.
      starts_in_reasoning: whether what the model writes next is reasoning (see ReasoningSplitter).
    """

    ids: list[int]
    text: str
    starts_in_reasoning: bool


def encode_chat(
    tokenizer: Tokenizer,
    messages: Any,
    template: ChatTemplate,
    *,
    tools: Any = None,
    enable_thinking: bool | None = None,
    add_generation_prompt: bool = True,
    most_tokens: int | None = None,
    **template_kwargs: Any,
) -> EncodedChat:
    """The prompt's token ids; what users write can never become a control token.

    Arguments and errors are those of `render_chat`. `template` must be made for this tokenizer. most_tokens: of a prompt that
    has far more (see `Tokenizer.check_length`) TooLongError is raised, and not all are made.
    """
    request = prepare(messages, template, tools, enable_thinking, template_kwargs)
    marker = Marker(tokenizer, template, request)
    if not marker.needed:
        text = template.render(request.messages, request.tools, add_generation_prompt, request.kwargs)
        if most_tokens is not None:
            tokenizer.check_length(text, most_tokens)
        ids = tokenizer.encode(text, allow_special=True)
        return EncodedChat(ids, text, prompt_opens_reasoning(text, template.rules))
    marked = marker.render(add_generation_prompt)
    text = marked.replace(marker.mark, "")
    if most_tokens is not None:
        tokenizer.check_length(text, most_tokens)
    ids = tokenizer.encode_marked(marked, marker.mark)
    return EncodedChat(ids, text, prompt_opens_reasoning(marked, template.rules))


def prompt_opens_reasoning(prompt: str, rules: GenerationRules) -> bool:
    """Whether a rendered prompt ends inside an open reasoning block, so that the model goes on reasoning."""
    if rules.reasoning_start is None or rules.reasoning_end is None:
        return False
    return prompt.rfind(rules.reasoning_start) > prompt.rfind(rules.reasoning_end)


class Marker:
    """Marks the control spellings in the strings of one request."""

    def __init__(self, tokenizer: Tokenizer, template: ChatTemplate, request: ChatRequest) -> None:
        self._template, self._request, self._tokenizer = template, request, tokenizer
        rules = template.rules
        self._reasoning = tuple(m for m in (rules.reasoning_start, rules.reasoning_end) if m is not None)
        spellings = {*tokenizer.control_tokens, *self._reasoning}
        strings = list(_strings([request.messages, request.tools]))
        strings += [normal for string in strings if (normal := tokenizer.normalize(string)) != string]
        everything = "\x00".join(strings)
        self._spellings = [spelling for spelling in spellings if spelling in everything]
        self._heads = {s[:n] for s in spellings for n in range(2, len(s))}
        self._tails = {s[n:] for s in spellings for n in range(1, len(s) - 1)}
        self._longest = max(map(len, spellings), default=0)
        self.mark = _unused_mark(everything + template.source)
        self.needed = bool(self._spellings) or any(self._split_points(string) for string in strings)

    def render(self, add_generation_prompt: bool) -> str:
        """The rendered prompt, marks and all."""
        request = self._request
        return self.render_part(request.messages, add_generation_prompt, request.kwargs, self.reads_reasoning)

    @cached_property
    def reads_reasoning(self) -> bool:
        """Whether the template reads the reasoning markers in what the assistant said."""
        if not set(self._reasoning) & set(self._spellings):
            return False
        request = self._request
        strict, lenient = (
            self.render_part(request.messages, False, request.kwargs, keep_reasoning).replace(self.mark, "")
            for keep_reasoning in (False, True)
        )
        return strict != lenient

    def render_part(
        self,
        messages: list[dict[str, Any]],
        add_generation_prompt: bool,
        kwargs: Mapping[str, Any],
        keep_reasoning: bool,
    ) -> str:
        """Messages of the request, or some of them, rendered with marks."""
        marked = [self._mark_message(message, keep_reasoning) for message in messages]
        tools = _map_strings(self._request.tools, self.mark_text)
        return self._template.render(marked, tools, add_generation_prompt, kwargs)

    def _mark_message(self, message: dict[str, Any], keep_reasoning: bool) -> dict[str, Any]:
        marked = {key: _map_strings(value, self.mark_text) for key, value in message.items() if key != "role"}
        if keep_reasoning and message["role"] == "assistant":
            marked["content"] = self.mark_text(message["content"], self._reasoning)
        return {"role": message["role"], **marked}

    def mark_text(self, text: str, kept: tuple[str, ...] = ()) -> str:
        """A string of the request with its control spellings interrupted, but for those `kept`."""
        normal = self._tokenizer.normalize(text)
        if normal != text and self._spells_more(normal, text):
            text = normal  # compatibility characters that normalise into a spelling; the ids of the text are the same
        points = self._spelled_points(text, kept) | self._split_points(text)
        pieces = [text[i:j] for i, j in zip([0, *sorted(points)], [*sorted(points), len(text)], strict=True)]
        return self.mark.join(pieces)

    def _spells_more(self, normal: str, text: str) -> bool:
        more = any(normal.count(spelling) > text.count(spelling) for spelling in self._spellings)
        return more or self._split_points(normal) != self._split_points(text)

    def _spelled_points(self, text: str, kept: tuple[str, ...]) -> set[int]:
        """Where to interrupt: after the first character of each spelling, overlapping ones included."""
        points: set[int] = set()
        for spelling in self._spellings:
            start = -1 if spelling in kept else text.find(spelling)
            while start >= 0:
                points.add(start + 1)
                start = text.find(spelling, start + 1)
        return points

    def _split_points(self, text: str) -> set[int]:
        """Where to interrupt a spelling that only starts at the end of the text, or only ends at its beginning."""
        lengths = range(2, min(self._longest, len(text) + 1))
        points = {len(text) - n + 1 for n in lengths if text[-n:] in self._heads}
        return points | {1 for n in lengths if text[:n] in self._tails}


def _unused_mark(text: str) -> str:
    """Random letters and digits: no user can foresee them, JSON does not escape them, no normaliser changes them."""
    while True:
        mark = f"x{secrets.token_hex(8)}x"
        if mark not in text:
            return mark


def _strings(value: Any) -> Iterator[str]:
    """Every string in JSON data, keys included."""
    if isinstance(value, str):
        yield value
    elif isinstance(value, dict):
        for key, item in value.items():
            yield key
            yield from _strings(item)
    elif isinstance(value, list):
        for item in value:
            yield from _strings(item)


def _map_strings(value: Any, change: Callable[[str], str]) -> Any:
    """JSON data with every string changed, keys included."""
    if isinstance(value, str):
        return change(value)
    if isinstance(value, dict):
        return {change(key): _map_strings(item, change) for key, item in value.items()}
    if isinstance(value, list):
        return [_map_strings(item, change) for item in value]
    return value
