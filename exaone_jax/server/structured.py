"""What a request says of the form of its answer, as a grammar."""

import json
from collections.abc import Sequence
from typing import Any

from exaone_jax.inference.grammar import Grammar
from exaone_jax.server.errors import refused
from exaone_jax.server.protocol import (
    ChatRequest,
    Generation,
    JsonObjectFormat,
    JsonSchemaFormat,
    NamedTool,
    StructuredOutputs,
)
from exaone_jax.server.served import Served
from exaone_jax.text import Tokenizer

_CALL = ("<tool_call>", "</tool_call>")


def completion_grammar(asked: Generation) -> Grammar | None:
    """Of a text completion."""
    return None if asked.structured_outputs is None else _structured(asked.structured_outputs, None)


def chat_grammar(served: Served, asked: ChatRequest, starts_in_reasoning: bool) -> Grammar | None:
    """Of a turn: response_format, structured_outputs, or tool calls that must come. Reasoning before it is free.

    Raises ApiError where two of them are given, or where the checkpoint cannot do it.
    """
    forced = asked.tool_choice == "required" or isinstance(asked.tool_choice, NamedTool)
    formatted = isinstance(asked.response_format, JsonObjectFormat | JsonSchemaFormat)
    given = {
        "structured_outputs": asked.structured_outputs is not None,
        "response_format": formatted,
        "tool_choice": forced,
    }
    names = [name for name, present in given.items() if present]
    if not names:
        return None
    if len(names) > 1:
        raise refused(names[0], f"together with {names[1]}; expected one of them")
    if not forced and asked.tools and asked.tool_choice != "none":
        raise refused(names[0], "leaves no room for tool calls: expected tool_choice none")
    start = _reasoning_end(served, names[0]) if starts_in_reasoning else None
    if forced:
        return _tool_calls(served, asked, start)
    if isinstance(asked.response_format, JsonObjectFormat):
        return Grammar.json_object(start)
    if isinstance(asked.response_format, JsonSchemaFormat):
        schema = asked.response_format.json_schema.schema_
        return Grammar.json_object(start) if schema is None else Grammar.json_schema(schema, start)
    return None if asked.structured_outputs is None else _structured(asked.structured_outputs, start)


def _reasoning_end(served: Served, name: str) -> int:
    """The token after which the answer begins."""
    end = served.chat_template.rules.reasoning_end or ""
    token = served.tokenizer.control_tokens.get(end)
    if token is None:
        raise refused(
            name, f"not while thinking: {end!r} is no token of this checkpoint, so where thinking ends is not known"
        )
    return token


def _structured(asked: StructuredOutputs, start: int | None) -> Grammar:
    if asked.json_ is not None:
        return Grammar.json_schema(asked.json_, start)
    if asked.regex is not None:
        return Grammar.regex(asked.regex, start)
    if asked.choice is not None:
        return Grammar.choice(asked.choice, start)
    if asked.grammar is not None:
        return Grammar.lark(asked.grammar, start)
    return Grammar.json_object(start)


def _tool_calls(served: Served, asked: ChatRequest, start: int | None) -> Grammar:
    """One call or several of the tools, or one of the tool that is named, as JSON between the call's markers."""
    rules, tools, choice = served.chat_template.rules, asked.tools or [], asked.tool_choice
    if rules.tool_format != "json":
        raise refused("tool_choice", f"{rules.tool_format} calls cannot be forced; expected none or auto")
    if isinstance(choice, NamedTool):
        tools = [tool for tool in tools if tool.function.name == choice.function.name]
        if not tools:
            raise refused("tool_choice", f"{choice.function.name!r} is none of the tools")
    one = isinstance(choice, NamedTool) or asked.parallel_tool_calls is False
    calls = [_call_schema(tool.function.name, tool.function.parameters) for tool in tools]
    opening, closing = _markers(served.tokenizer)
    schema = json.dumps(calls[0] if len(calls) == 1 else {"anyOf": calls}, ensure_ascii=False)
    more = "" if one else ' ("\\n" call)*'
    return Grammar.lark(f"start: call{more}\ncall: {opening} body {closing}\nbody: %json {schema}\n", start)


def _call_schema(name: str, parameters: dict[str, Any] | None) -> dict[str, Any]:
    properties = {"name": {"const": name}, "arguments": parameters or {"type": "object"}}
    return {"type": "object", "properties": properties, "required": list(properties), "additionalProperties": False}


def _markers(tokenizer: Tokenizer) -> Sequence[str]:
    """A call's markers in Lark: as tokens where the checkpoint has them."""
    ids = [tokenizer.control_tokens.get(marker) for marker in _CALL]
    return [json.dumps(text) if token is None else f"<[{token}]>" for text, token in zip(_CALL, ids, strict=True)]
