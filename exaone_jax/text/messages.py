"""Checks a conversation and brings it into the one shape that chat templates are given."""

import json
from collections.abc import Mapping, Sequence
from typing import Any

from exaone_jax.errors import InputError
from exaone_jax.text.tokenizer import check_encodable

ROLES = ("system", "user", "assistant", "tool")
_REASONING_FIELDS = ("reasoning_content", "thinking", "reasoning")
_MAX_DEPTH = 64  # of JSON in tools and arguments; templates and tojson recurse


def check_messages(messages: Any) -> list[dict[str, Any]]:
    """A fresh copy of the messages as plain JSON data, checked.

    Content given as a list of text parts becomes the joined string. Arguments of tool calls, a JSON string in the
    OpenAI format, become the value they spell, so that templates do not encode them twice. Reasoning given as
    `thinking` or `reasoning` becomes `reasoning_content`.

    Raises:
      InputError: naming the index of the message that is wrong, what was found and what was expected.
    """
    if isinstance(messages, str | bytes | Mapping) or not isinstance(messages, Sequence):
        raise InputError(f"messages: expected a list, found {type(messages).__name__}")
    if not messages:
        raise InputError("messages: empty; expected at least one message")
    return [_check_message(message, f"messages[{index}]") for index, message in enumerate(messages)]


def check_tools(tools: Any) -> list[dict[str, Any]] | None:
    """A fresh copy of the tools as plain JSON data; None where there are none. Raises InputError with the index."""
    if tools is None:
        return None
    if isinstance(tools, str | bytes | Mapping) or not isinstance(tools, Sequence):
        raise InputError(f"tools: expected a list, found {type(tools).__name__}")
    return [_check_tool(tool, f"tools[{index}]") for index, tool in enumerate(tools)] or None


def _check_message(message: Any, where: str) -> dict[str, Any]:
    if not isinstance(message, Mapping):
        raise InputError(f"{where}: expected an object with role and content, found {type(message).__name__}")
    if "role" not in message:
        raise InputError(f"{where}: role is missing; expected one of {', '.join(ROLES)}")
    role = message["role"]
    if not isinstance(role, str) or role not in ROLES:
        raise InputError(f"{where}: role is {role!r}; expected one of {', '.join(ROLES)}")
    checked = {key: plain_json(value, f"{where}.{key}") for key, value in message.items() if value is not None}
    if role == "assistant":
        _check_assistant(checked, where)
    elif "tool_calls" in checked:
        raise InputError(f"{where}: tool_calls in a message of role {role}; only the assistant calls tools")
    if "content" not in checked:
        raise InputError(f"{where}: content is missing; expected a string or a list of text parts")
    checked["content"] = _check_content(checked["content"], role, where)
    return checked


def _check_content(content: Any, role: str, where: str) -> Any:
    if isinstance(content, str):
        return content
    if isinstance(content, list) and content and all(_is_part(part) for part in content):
        return "".join(_part_text(part, f"{where}.content[{index}]") for index, part in enumerate(content))
    if role == "tool" and isinstance(content, dict | list):
        return content  # a result as JSON; templates print it as such
    if isinstance(content, list) and content:
        raise InputError(f"{where}.content: a part is not an object with a type; expected text parts")
    raise InputError(f"{where}: content is {_name(content)}; expected a string or a list of text parts")


def _is_part(part: Any) -> bool:
    return isinstance(part, dict) and "type" in part


def _part_text(part: dict[str, Any], where: str) -> str:
    if part["type"] != "text":
        raise InputError(f"{where}: type is {part['type']!r}; only text parts are supported")
    if not isinstance(part.get("text"), str):
        raise InputError(f"{where}: text is {_name(part.get('text'))}; expected a string")
    return part["text"]


def _check_assistant(message: dict[str, Any], where: str) -> None:
    """Checks reasoning and tool calls, in place. An answer that only thinks or only calls may lack content."""
    given = [field for field in _REASONING_FIELDS if field in message]
    for field in given:
        if not isinstance(message[field], str):
            raise InputError(f"{where}: {field} is {_name(message[field])}; expected a string")
    if given:
        message["reasoning_content"] = message[given[0]]
    calls = message.get("tool_calls")
    if calls is not None:
        if not isinstance(calls, list):
            raise InputError(f"{where}: tool_calls is {_name(calls)}; expected a list")
        message["tool_calls"] = [_check_call(c, f"{where}.tool_calls[{i}]") for i, c in enumerate(calls)]
    if calls or given:
        message.setdefault("content", "")


def _check_call(call: Any, where: str) -> dict[str, Any]:
    function = call.get("function") if isinstance(call, dict) else None
    if not isinstance(function, dict) or not isinstance(function.get("name"), str) or not function["name"]:
        raise InputError(f"{where}: expected an object with function.name and function.arguments")
    arguments = function.get("arguments", {})
    if isinstance(arguments, str):
        try:
            # An empty string is how some clients write a call without arguments.
            arguments = plain_json(json.loads(arguments), f"{where}.function.arguments") if arguments.strip() else {}
        except (ValueError, RecursionError) as error:
            raise InputError(f"{where}.function.arguments: not JSON: {error}") from error
    elif not isinstance(arguments, dict):
        raise InputError(f"{where}.function.arguments: {_name(arguments)}; expected an object or its JSON string")
    return {**call, "type": "function", "function": {**function, "arguments": arguments}}


def _check_tool(tool: Any, where: str) -> dict[str, Any]:
    checked = plain_json(tool, where)
    function = checked.get("function", checked) if isinstance(checked, dict) else None
    if not isinstance(function, dict) or not isinstance(function.get("name"), str) or not function["name"]:
        raise InputError(f"{where}: expected an object with function.name")
    return checked


def plain_json(value: Any, where: str, depth: int = 0) -> Any:
    """A copy of a value made only of exact JSON types, so that a template can reach no method of a caller's object."""
    if depth > _MAX_DEPTH:
        raise InputError(f"{where}: nested more than {_MAX_DEPTH} deep")
    if value is None or isinstance(value, bool):
        return value
    if isinstance(value, str):
        check_encodable(value, where)
        return str.__str__(value)
    if isinstance(value, int):
        return int.__int__(value)
    if isinstance(value, float):
        if value != value or value in (float("inf"), float("-inf")):
            raise InputError(f"{where}: {value} is not JSON")
        return float.__float__(value)
    if isinstance(value, Mapping):
        return {_key(key, where): plain_json(item, where, depth + 1) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [plain_json(item, where, depth + 1) for item in value]
    raise InputError(f"{where}: {type(value).__name__} is not JSON")


def _key(key: Any, where: str) -> str:
    if not isinstance(key, str):
        raise InputError(f"{where}: key {key!r} is not a string")
    check_encodable(key, where)
    return str.__str__(key)


def _name(value: Any) -> str:
    return "null" if value is None else type(value).__name__
