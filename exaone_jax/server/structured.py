"""What a request says of the form of its answer, as a grammar."""

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
from exaone_jax.server.tool_grammar import tool_grammar


def forms(asked: Generation) -> list[str]:
    """The fields that say of what form the answer must be."""
    given = {"structured_outputs": asked.structured_outputs is not None}
    if isinstance(asked, ChatRequest):
        forced = asked.tool_choice == "required" or isinstance(asked.tool_choice, NamedTool)
        strict = asked.tool_choice != "none" and any(tool.function.strict for tool in asked.tools or ())
        given["response_format"] = isinstance(asked.response_format, JsonObjectFormat | JsonSchemaFormat)
        given |= {"tool_choice": forced, "tools": strict and not forced}
    return [name for name, present in given.items() if present]


def completion_grammar(asked: Generation) -> Grammar | None:
    """Of a text completion."""
    return None if asked.structured_outputs is None else _structured(asked.structured_outputs, None)


def chat_grammar(served: Served, asked: ChatRequest, starts_in_reasoning: bool) -> Grammar | None:
    """Of a turn: response_format, structured_outputs, tool calls that must come, or tools that are strict. Reasoning before it
    is free.

    Raises ApiError where two of them are given, or where the checkpoint cannot do it.
    """
    may_call = bool(asked.tools) and asked.tool_choice != "none"
    names = forms(asked)
    forced, strict = "tool_choice" in names, "tools" in names
    if not names:
        return None
    if len(names) > 1:
        raise refused(names[0], f"together with {names[1]}; expected one of them")
    if may_call and not (forced or strict):
        raise refused(names[0], "leaves no room for tool calls: expected tool_choice none")
    start = _reasoning_end(served, names[0]) if starts_in_reasoning else None
    if forced or strict:
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
    """Calls that must come, of any tool or of the one that is named; or text with calls of tools that are strict."""
    tools, choice = asked.tools or [], asked.tool_choice
    form = served.chat_template.rules.tool_format
    if form is None:
        raise refused("tools", "this checkpoint's generation calls no tools")
    named = isinstance(choice, NamedTool)
    if isinstance(choice, NamedTool):
        tools = [tool for tool in tools if tool.function.name == choice.function.name]
        if not tools:
            raise refused("tool_choice", f"{choice.function.name!r} is none of the tools")
    must_call, one_call = named or choice == "required", named or asked.parallel_tool_calls is False
    return Grammar.lark(tool_grammar(tools, form, served.tokenizer, must_call=must_call, one_call=one_call), start)
