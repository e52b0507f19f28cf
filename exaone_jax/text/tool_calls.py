"""Finds tool calls in an answer, as it arrives: JSON (EXAONE 4.0, K-EXAONE, 4.5) or XML-like (K-EXAONE 2.0).

A call is given out whole, once its end marker has come. A call that cannot be read is given out as the text it was,
with the error beside it: nothing that the model wrote is lost.
"""

import json
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from exaone_jax.text.generation import TOOL_CALL, ToolFormat
from exaone_jax.text.markers import held_back
from exaone_jax.text.messages import check_tools
from exaone_jax.text.tool_schemas import Parameters, is_of

_OPEN, _CLOSE = TOOL_CALL
_SPACE = " \t\r\n"


@dataclass(frozen=True)
class TextPiece:
    """A piece of the answer. `error` says why, where it is a tool call that could not be read."""

    text: str
    error: str | None = None


@dataclass(frozen=True)
class ToolCall:
    """One call. `index` counts the calls of this answer; `arguments` is JSON text, as in the OpenAI format."""

    index: int
    name: str
    arguments: str


class _BadCall(ValueError):
    """Why a call cannot be read."""


class ToolCallParser:
    """Feed it an answer (without its reasoning) in any pieces, then flush.

    The calls, and the text pieces joined, do not depend on how the answer was cut. Text before, between and after calls
    is kept, whitespace before a call or after the last one dropped. An end marker inside a JSON string or a parameter
    does not end the call. A call that is still open when the answer ends counts if it is complete.
    """

    def __init__(self, tool_format: ToolFormat, tools: Sequence[Mapping[str, Any]] | None = None) -> None:
        """`tools`, in the OpenAI format, give the types of XML parameters: strings are taken raw, others are JSON.

        Raises:
          InputError: a tool is malformed.
        """
        functions = [tool.get("function", tool) for tool in check_tools(tools) or ()]
        known = {function["name"]: Parameters(function.get("parameters")) for function in functions}
        self._parse: Callable[[str], tuple[str, Any]] = (
            _parse_json_call if tool_format == "json" else lambda body: _parse_xml_call(body, known)
        )
        self._new_scan = _JsonScan if tool_format == "json" else _XmlScan
        self._scan: _JsonScan | _XmlScan | None = None  # inside a call
        self._buffer = ""
        self._space = ""  # whitespace that a call may yet swallow
        self._calls = 0
        self._wrote_text = self._last_was_call = False

    def feed(self, text: str) -> list[TextPiece | ToolCall]:
        """What this further text settles."""
        self._buffer += text
        return self._advance(final=False)

    def flush(self) -> list[TextPiece | ToolCall]:
        """End the answer."""
        events = self._advance(final=True)
        if self._space and not self._last_was_call:
            events.append(TextPiece(self._space))
        self._space = ""
        return events

    def _advance(self, final: bool) -> list[TextPiece | ToolCall]:
        events: list[TextPiece | ToolCall] = []
        while True:
            if self._scan is None:
                inside = self._read_text(final, events)
                if not inside:
                    return events
            elif not self._read_call(final, events):
                return events

    def _read_text(self, final: bool, events: list[TextPiece | ToolCall]) -> bool:
        """Take text up to the next call. True if a call begins."""
        start = self._buffer.find(_OPEN)
        hold = 0 if final else held_back(self._buffer, _OPEN)
        end = start if start >= 0 else len(self._buffer) - hold
        self._write_text(self._buffer[:end], events)
        self._buffer = self._buffer[end:].removeprefix(_OPEN) if start >= 0 else self._buffer[end:]
        self._scan = self._new_scan() if start >= 0 else None
        return start >= 0

    def _write_text(self, text: str, events: list[TextPiece | ToolCall]) -> None:
        text = self._space + text
        body = text.rstrip(_SPACE)
        self._space = text[len(body) :]
        if self._last_was_call and not self._wrote_text:
            body = body.lstrip(_SPACE)  # an answer that begins with a call does not begin with a blank
        if body:
            events.append(TextPiece(body))
            self._wrote_text, self._last_was_call = True, False

    def _read_call(self, final: bool, events: list[TextPiece | ToolCall]) -> bool:
        """Take one call off the buffer. False if it is not complete yet."""
        scan = self._scan
        end = scan.find_end(self._buffer) if scan is not None else None
        if end is not None:
            self._write_call(self._buffer[:end], _CLOSE if self._buffer.startswith(_CLOSE, end) else "", events)
            self._buffer = self._buffer[end:].removeprefix(_CLOSE)
            return True
        if not final:
            return False
        # Open to the end: whole, or else broken at the first end marker, which a stray quote may have hidden.
        body, close = self._buffer, ""
        if _CLOSE in body and not self._is_call(body):
            body, close, rest = body.partition(_CLOSE)
            self._buffer = rest
        else:
            self._buffer = ""
        self._write_call(body, close, events)
        return True

    def _is_call(self, body: str) -> bool:
        try:
            self._parse(body)
        except _BadCall:
            return False
        return True

    def _write_call(self, body: str, close: str, events: list[TextPiece | ToolCall]) -> None:
        self._scan = None
        try:
            name, arguments = self._parse(body)
        except _BadCall as error:
            events.append(TextPiece(self._space + _OPEN + body + close, error=str(error)))
            self._wrote_text, self._last_was_call = True, False
        else:
            events.append(ToolCall(self._calls, name, arguments))
            self._calls += 1
            self._last_was_call = True
        self._space = ""


class _JsonScan:
    """Where a JSON call ends: at a marker outside its strings."""

    _OUTSIDE = re.compile(f'"|{_CLOSE}|{_OPEN}')
    _INSIDE = re.compile(r'["\\]')

    def __init__(self) -> None:
        self._position = 0
        self._in_string = False

    def find_end(self, text: str) -> int | None:
        """Index of the marker that ends the call, or None if it has not come. `text` only ever grows."""
        while True:
            found = (self._INSIDE if self._in_string else self._OUTSIDE).search(text, self._position)
            if found is None:
                hold = 0 if self._in_string else held_back(text, _CLOSE, _OPEN)
                self._position = max(self._position, len(text) - hold)
                return None
            if found.group() in (_CLOSE, _OPEN):
                return found.start()
            if found.group() == "\\":
                if found.end() == len(text):
                    self._position = found.start()
                    return None
                self._position = found.end() + 1
            else:
                self._in_string = not self._in_string
                self._position = found.end()


class _XmlScan:
    """Where an XML call ends: at a marker outside its parameters."""

    _OUTSIDE = re.compile(f"<parameter=|{_CLOSE}|{_OPEN}")
    _PARAMETER_END = "</parameter>"

    def __init__(self) -> None:
        self._position = 0
        self._in_parameter = False

    def find_end(self, text: str) -> int | None:
        """As _JsonScan.find_end."""
        while True:
            if self._in_parameter:
                end = text.find(self._PARAMETER_END, self._position)
                if end < 0:
                    self._position = max(self._position, len(text) - held_back(text, self._PARAMETER_END))
                    return None
                self._position = end + len(self._PARAMETER_END)
                self._in_parameter = False
                continue
            found = self._OUTSIDE.search(text, self._position)
            if found is None:
                hold = held_back(text, "<parameter=", _CLOSE, _OPEN)
                self._position = max(self._position, len(text) - hold)
                return None
            if found.group() in (_CLOSE, _OPEN):
                return found.start()
            self._in_parameter = True
            self._position = found.end()


_FENCES = ("```json", "```")


def _unfenced(body: str) -> str:
    """A call without the Markdown fence that it may stand in. No regular expression: many blanks would take one for ever."""
    inner = body.strip()
    fence = next((fence for fence in _FENCES if inner.startswith(fence)), "")
    first, _, rest = inner.removeprefix(fence).partition("\n")
    call, _, last = rest.rpartition("\n")
    return call if fence and not first.strip() and last.strip() == "```" else body


def _parse_json_call(body: str) -> tuple[str, str]:
    """(name, arguments as JSON text) of `{"name": …, "arguments": …}`, which may stand in a Markdown fence."""
    call = _load_json(_unfenced(body))
    if not isinstance(call, dict) or not isinstance(call.get("name"), str) or not call["name"]:
        raise _BadCall("expected a JSON object with a name")
    arguments = call.get("arguments", {})
    if isinstance(arguments, str):
        try:  # arguments encoded twice; any other string is a bare value, which EXAONE 4.0's tool prompt allows
            decoded = _load_json(arguments)
        except _BadCall:
            decoded = None
        arguments = decoded if isinstance(decoded, dict) else arguments
    return call["name"], _dump_json(arguments)


_FUNCTION = re.compile(r"\s*<function=([^>\n]+)>")
_PARAMETER = re.compile(r"\s*<parameter=([^>\n]+)>(.*?)</parameter>(?=\s*<parameter=|\s*</function>)", re.DOTALL)
_FUNCTION_END = re.compile(r"\s*</function>\s*")


def _parse_xml_call(body: str, known: Mapping[str, Parameters]) -> tuple[str, str]:
    """(name, arguments as JSON text) of `<function=NAME>` with `<parameter=K>` blocks."""
    head = _FUNCTION.match(body)
    if head is None:
        raise _BadCall("expected <function=NAME>")
    name, position = head.group(1).strip(), head.end()
    parameters = known.get(name, Parameters(None))
    arguments: dict[str, Any] = {}
    while (found := _PARAMETER.match(body, position)) is not None:
        key = found.group(1).strip()
        value = found.group(2).removeprefix("\n").removesuffix("\n")
        arguments[key] = _typed(value, parameters.types(key), key)
        position = found.end()
    if _FUNCTION_END.fullmatch(body, position) is None:
        raise _BadCall("expected <parameter=NAME>…</parameter> blocks and </function>")
    return name, _dump_json(arguments)


def _typed(text: str, allowed: frozenset[str], key: str) -> Any:
    """A parameter's value: raw if only a string may be, else JSON; if a string may be too, JSON that is no string, else raw."""
    if allowed == {"string"}:
        return text
    try:
        value = _load_json(text)
    except _BadCall as error:
        if "string" in allowed:
            return text
        raise _BadCall(f"parameter {key}: {error}") from error
    return text if "string" in allowed and not is_of(value, allowed - {"string"}) else value


def _load_json(text: str) -> Any:
    try:
        value = json.loads(text, parse_constant=_refuse_constant)
        # A lone surrogate could not be sent on, and 1e999 is read as an infinity.
        json.dumps(value, ensure_ascii=False, allow_nan=False).encode()
    except (ValueError, RecursionError) as error:
        raise _BadCall(f"not JSON: {error}") from error
    return value


def _refuse_constant(name: str) -> None:
    raise ValueError(f"{name} is not JSON")


def _dump_json(value: Any) -> str:
    return json.dumps(value, ensure_ascii=False)
