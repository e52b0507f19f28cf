"""From the text a model writes to reasoning, answer and tool calls: the splitter and the call parser in one."""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from exaone_jax.text.generation import RULES, Generation, GenerationRules
from exaone_jax.text.reasoning import ReasoningSplitter, Split
from exaone_jax.text.tool_calls import TextPiece, ToolCall, ToolCallParser


@dataclass(frozen=True)
class ReasoningPiece:
    """A piece of the reasoning."""

    text: str


Event = ReasoningPiece | TextPiece | ToolCall


@dataclass(frozen=True)
class Response:
    """A whole response. `reasoning` and `content` are None where the model wrote none."""

    reasoning: str | None
    content: str | None
    tool_calls: tuple[ToolCall, ...]
    errors: tuple[str, ...]  # of tool calls that could not be read; their text is in content


class ResponseParser:
    """Feed it the model's text in any pieces, then flush. Tool calls are looked for only where tools were offered."""

    def __init__(
        self,
        rules: GenerationRules | Generation | str,
        *,
        starts_in_reasoning: bool,
        tools: Sequence[Mapping[str, Any]] | None = None,
    ) -> None:
        rules = rules if isinstance(rules, GenerationRules) else RULES[Generation(rules)]
        self._splitter = ReasoningSplitter(rules, starts_in_reasoning)
        self._calls = ToolCallParser(rules.tool_format, tools) if tools and rules.tool_format else None

    @property
    def in_reasoning(self) -> bool:
        """Whether the end of the reasoning has not been seen yet."""
        return self._splitter.in_reasoning

    def feed(self, text: str) -> list[Event]:
        """What this further text settles, in order."""
        return self._events(self._splitter.feed(text))

    def flush(self) -> list[Event]:
        """End the response."""
        events = self._events(self._splitter.flush())
        return events + (self._calls.flush() if self._calls else [])

    def _events(self, split: Split) -> list[Event]:
        events: list[Event] = [ReasoningPiece(split.reasoning)] if split.reasoning else []
        if self._calls is not None:
            return events + (self._calls.feed(split.content) if split.content else [])
        return events + ([TextPiece(split.content)] if split.content else [])


def parse_response(
    text: str | Iterable[str],
    rules: GenerationRules | Generation | str,
    *,
    starts_in_reasoning: bool,
    tools: Sequence[Mapping[str, Any]] | None = None,
) -> Response:
    """The whole response of a text, or of its pieces."""
    parser = ResponseParser(rules, starts_in_reasoning=starts_in_reasoning, tools=tools)
    pieces = [text] if isinstance(text, str) else text
    events = [event for piece in pieces for event in parser.feed(piece)] + parser.flush()
    reasoning = "".join(event.text for event in events if isinstance(event, ReasoningPiece))
    content = "".join(event.text for event in events if isinstance(event, TextPiece))
    return Response(
        reasoning or None,
        content or None,
        tuple(event for event in events if isinstance(event, ToolCall)),
        tuple(event.error for event in events if isinstance(event, TextPiece) and event.error),
    )
