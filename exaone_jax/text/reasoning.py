"""Splits what a model writes into reasoning and answer, as it arrives.

Where the text starts is known from the prompt (`EncodedChat.starts_in_reasoning`): a template that opens `<think>`
makes the model's text begin inside it. It is never guessed from the text, so an answer that quotes a tag stays an
answer.
"""

from enum import Enum, auto
from typing import NamedTuple

from exaone_jax.errors import InputError
from exaone_jax.text.generation import RULES, Generation, GenerationRules
from exaone_jax.text.markers import held_back

_SPACE = " \t\r\n"


class Split(NamedTuple):
    """A piece of output; either part may be empty."""

    reasoning: str
    content: str


class _State(Enum):
    START = auto()  # reasoning, nothing of it seen: a repeated start marker is still dropped
    REASONING = auto()
    GAP = auto()  # after the end marker: up to two newlines belong to the template, not to the answer
    CONTENT = auto()


class ReasoningSplitter:
    """Feed it text in any pieces, then flush; the parts joined do not depend on how the text was cut.

    In reasoning: everything up to the first end marker is reasoning, without the one newline before the marker that the
    templates put there; up to two newlines after it are dropped. A start marker that the model repeats at its very
    beginning is dropped once, with one newline. With no end marker all is reasoning. Not in reasoning: all is content.
    """

    def __init__(self, rules: GenerationRules | Generation | str, starts_in_reasoning: bool) -> None:
        """Raises InputError where a generation without reasoning is said to start in it."""
        rules = rules if isinstance(rules, GenerationRules) else RULES[Generation(rules)]
        if starts_in_reasoning and (rules.reasoning_start is None or rules.reasoning_end is None):
            raise InputError(f"generation {rules.generation}: has no reasoning to start in")
        self._start_marker, self._end_marker = rules.reasoning_start or "", rules.reasoning_end or ""
        self._state = _State.START if starts_in_reasoning else _State.CONTENT
        self._buffer = ""
        self._newlines = 0

    @property
    def in_reasoning(self) -> bool:
        """Whether the end of the reasoning has not been seen yet."""
        return self._state in (_State.START, _State.REASONING)

    def feed(self, text: str) -> Split:
        """The parts that this further text settles."""
        self._buffer += text
        if self._state is _State.START:
            self._skip_start_marker()
        reasoning = self._take_reasoning() if self._state is _State.REASONING else ""
        if self._state is _State.GAP:
            self._skip_gap()
        content = self._take_buffer() if self._state is _State.CONTENT else ""
        return Split(reasoning, content)

    def flush(self) -> Split:
        """End the text: what was held back belongs to the part that was open."""
        if self._state is _State.START and self._buffer.strip(_SPACE) == self._start_marker:
            self._buffer = ""
        rest = self._take_buffer()
        return Split(rest, "") if self.in_reasoning else Split("", rest)

    def _take_buffer(self) -> str:
        taken, self._buffer = self._buffer, ""
        return taken

    def _skip_start_marker(self) -> None:
        body = self._buffer.lstrip(_SPACE)
        marker = self._start_marker + "\n"
        if len(body) < len(marker) and marker.startswith(body):
            return  # may still become the marker
        if body.startswith(self._start_marker):
            self._buffer = body.removeprefix(self._start_marker).removeprefix("\n")
        self._state = _State.REASONING

    def _take_reasoning(self) -> str:
        end = self._buffer.find(self._end_marker)
        if end >= 0:
            reasoning = self._buffer[:end].removesuffix("\n")
            self._buffer = self._buffer[end + len(self._end_marker) :]
            self._state = _State.GAP
            return reasoning
        keep = len(self._buffer) - held_back(self._buffer, "\n" + self._end_marker, self._end_marker)
        reasoning, self._buffer = self._buffer[:keep], self._buffer[keep:]
        return reasoning

    def _skip_gap(self) -> None:
        while self._newlines < 2 and self._buffer.startswith("\n"):
            self._buffer = self._buffer[1:]
            self._newlines += 1
        if self._buffer or self._newlines == 2:
            self._state = _State.CONTENT
