"""Lark grammars of tool calls, for calls that must come and for tools whose arguments must obey their schemas.

Calls have the form in which templates print them, parameters the order of their schema. Arguments in JSON are llguidance's
`%json` of the schema. In XML a parameter is JSON too, but a string is raw text, so it becomes a regular expression. Where a
parameter may be a string or something else, texts that would be read as something else are left out of it, and other scalars
are regular expressions beside it, as the lexer is greedy.
"""

import json
import re
from collections.abc import Mapping, Sequence
from typing import Any

from exaone_jax.inference.grammar import check_regex
from exaone_jax.server.errors import refused
from exaone_jax.server.protocol import Tool
from exaone_jax.text import Tokenizer
from exaone_jax.text.generation import TOOL_CALL, ToolFormat
from exaone_jax.text.tool_schemas import MOST_LEAVES, Parameters, leaves, types

_OPEN, _CLOSE = TOOL_CALL
_TEXT = r"/(?s:.)+/"  # no control token, so no call
_END = "</parameter>"
_AFTER = r'"\n</parameter>\n"'
_NO_END = r"~/(?s:.*)<\/parameter>(?s:.*)/"
_NUMBER = r"-?(0|[1-9][0-9]*)(\.[0-9]+)?([eE][+\-]?[0-9]+)?"
_SCALARS = {"null": "null", "boolean": "(true|false)", "integer": "-?(0|[1-9][0-9]*)", "number": _NUMBER}
# Texts that are read as a value of a type; of objects and arrays, those that may be one.
_READ_AS = {**_SCALARS, "integer": _NUMBER, "object": r"\{(?s:.*)", "array": r"\[(?s:.*)"}
_DEFINITIONS = ("$defs", "definitions")
_NOTES = frozenset(("title", "description", "default", "examples", "deprecated", "readOnly", "writeOnly", "$comment"))
_OF_OBJECTS = _NOTES | frozenset(
    ("type", "properties", "required", "additionalProperties", "$schema", "$id", *_DEFINITIONS)
)
_OF_STRINGS = _NOTES | frozenset(("type", "enum", "const", "pattern", "minLength", "maxLength"))


def tool_grammar(
    tools: Sequence[Tool], form: ToolFormat, tokenizer: Tokenizer, *, must_call: bool, one_call: bool
) -> str:
    """The grammar of an answer: of calls alone, if there must be one, or of text with calls in it.

    Raises ApiError for a schema that cannot be followed in this form.
    """
    opening, closing = _markers(tokenizer)
    if not must_call and not opening.startswith("<["):
        raise refused("tools", f"strict: {_OPEN!r} is no token of this checkpoint, so where a call begins is not known")
    between = '"\\n"' if form == "xml" else ""
    calls = [f"call_{i}" for i in range(len(tools))]
    if must_call:
        start = "call" if one_call else 'call ("\\n" call)*'
    else:
        start = "TEXT? call?" if one_call else "(TEXT | call)*"
    rules = [f"start: {start}", f"call: {opening} {between} ({' | '.join(calls)}) {closing}"]
    rules += [] if must_call else [f"TEXT: {_TEXT}"]
    for name, tool in zip(calls, tools, strict=True):
        rules += (_xml_call if form == "xml" else _json_call)(name, tool)
    return "\n".join(rules) + "\n"


def _markers(tokenizer: Tokenizer) -> list[str]:
    """A call's markers in Lark: as tokens where the checkpoint has them."""
    ids = [tokenizer.control_tokens.get(marker) for marker in (_OPEN, _CLOSE)]
    return [
        _literal(text) if token is None else f"<[{token}]>" for text, token in zip((_OPEN, _CLOSE), ids, strict=True)
    ]


def _literal(text: str) -> str:
    return json.dumps(text, ensure_ascii=False)


def _json(schema: Any) -> str:
    return f"%json {json.dumps(schema, ensure_ascii=False)}"


def _json_call(name: str, tool: Tool) -> list[str]:
    head = _literal(f'{{"name": {json.dumps(tool.function.name)}, "arguments": ')
    schema = tool.function.parameters or {"type": "object"}
    return [f'{name}: {head} {name}_arguments "}}"', f"{name}_arguments: {_json(schema)}"]


def _xml_call(name: str, tool: Tool) -> list[str]:
    parameters = Parameters(tool.function.parameters)
    schema, where = parameters.schema, f"the parameters of tool {tool.function.name!r}"
    if schema.get("type", "object") != "object":
        raise refused("tools", f"{where} are of type {schema['type']!r}; expected object")
    if tool.function.strict and (unknown := sorted(schema.keys() - _OF_OBJECTS)):
        raise refused("tools", f"strict: {where} have {unknown[0]!r}, to which XML calls cannot be held")
    required = schema.get("required")
    required = required if isinstance(required, list) else []
    names = list(dict.fromkeys([*parameters.properties, *map(str, required)]))
    parts, rules = [], []
    for index, key in enumerate(names):
        if not key or key != key.strip() or set(key) & set(">\r\n"):
            raise refused("tools", f"{where} include {key!r}, a name that XML calls cannot spell")
        parts.append(f"{name}_{index}{'' if key in required else '?'}")
        value = _Value(f"{name}_{index}", tool, key, parameters)
        rules += value.rules(_literal(f"<parameter={key}>\n"))
    if not names and parameters.others is not False:
        parts.append(f"{name}_any*")
        rules += _Value(f"{name}_any", tool, "", parameters).rules('"<parameter=" /[^>\\s]+/ ">\\n"')
    head = _literal(f"<function={tool.function.name}>\n")
    return [f'{name}: {head} {" ".join(parts)} "</function>\\n"', *rules]


class _Value:
    """The rules of one parameter of an XML call."""

    def __init__(self, name: str, tool: Tool, key: str, parameters: Parameters):
        self._name, self._key, self._tool, self._root = name, key, tool, parameters.root
        self._schema = parameters.properties.get(key, parameters.others)
        self._leaves = list(leaves(self._schema, parameters.root))
        self._types = parameters.types(key)
        if len(self._leaves) > MOST_LEAVES:
            raise self._refused(f"more than {MOST_LEAVES} alternatives")

    def rules(self, opening: str) -> list[str]:
        """opening: what comes before the value, in Lark."""
        if "string" not in self._types:
            return [
                f"{self._name}: {opening} {self._name}_json {_AFTER}",
                f"{self._name}_json: {self._json(self._schema)}",
            ]
        ways, rules = [], []
        for leaf in self._leaves:
            if leaf is None:
                raise self._refused("a schema that cannot be read")
            texts, schema = self._texts(leaf), self._containers(leaf)
            if texts:
                ways.append(f"{self._name}_{len(ways)}_TEXT".upper())
                rules.append(f"{ways[-1]}: ({' | '.join(texts)}) {_AFTER}")
            if schema is not None:
                ways.append(f"{self._name}_{len(ways)}")
                rules += [f"{ways[-1]}: {ways[-1]}_json {_AFTER}", f"{ways[-1]}_json: {self._json(schema)}"]
        if not ways:
            raise self._refused("a schema that allows nothing")
        return [f"{self._name}: {opening} ({' | '.join(ways)})", *rules]

    def _refused(self, why: str) -> Exception:
        return refused("tools", f"parameter {self._key!r} of tool {self._tool.function.name!r} has {why}")

    def _json(self, schema: Any) -> str:
        """In Lark, a schema with what its references may lead to."""
        definitions = {key: self._root[key] for key in _DEFINITIONS if key in self._root}
        return _json({**definitions, **schema} if isinstance(schema, Mapping) else schema)

    def _containers(self, leaf: Mapping[str, Any]) -> dict[str, Any] | None:
        """The schema of the leaf's objects and arrays, if it has any."""
        values = _values(leaf)
        if values is not None:
            kept = [value for value in values if isinstance(value, list | dict)]
            return {"enum": kept} if kept else None
        found = sorted(types(leaf) & {"object", "array"})
        return {**leaf, "type": found} if found else None

    def _texts(self, leaf: Mapping[str, Any]) -> list[str]:
        """The leaf's strings and other scalars, each kind as a Lark expression of terminals."""
        values = _values(leaf)
        if values is not None:
            raw = [
                value if isinstance(value, str) else json.dumps(value)
                for value in values
                if not isinstance(value, list | dict)
            ]
            return [_literal(text) for text in raw if _END not in text]
        self._check_keywords(leaf)
        kinds = types(leaf)
        return [self._string(leaf)] * ("string" in kinds) + [
            f"/{_SCALARS[kind]}/" for kind in sorted(kinds) if kind in _SCALARS
        ]

    def _check_keywords(self, leaf: Mapping[str, Any]) -> None:
        """Of a tool that is strict."""
        known = _OF_STRINGS if "string" in types(leaf) else _NOTES | {"type"}
        containers = types(leaf) <= {"object", "array"}
        if self._tool.function.strict and not containers and (unknown := sorted(leaf.keys() - known)):
            raise self._refused(
                f"{unknown[0]!r}, to which the raw text of XML calls cannot be held; and the tool is strict"
            )

    def _string(self, leaf: Mapping[str, Any]) -> str:
        """The raw texts that the leaf allows."""
        least, most, pattern = leaf.get("minLength", 0), leaf.get("maxLength", ""), leaf.get("pattern", "")
        for name, value, kind in (("minLength", least, int), ("maxLength", most or 0, int), ("pattern", pattern, str)):
            if not isinstance(value, kind) or isinstance(value, bool):
                raise self._refused(f"{name} {value!r}")
        parts = [f"/(?s:.{{{least},{most}}})/", _NO_END]
        if pattern:
            parts.append(_search(pattern))
        others = sorted(self._types & _READ_AS.keys())
        parts += [rf"~/[ \t\r\n]*{_READ_AS[other]}[ \t\r\n]*/" for other in others]
        return f"({' & '.join(parts)})"


def _values(leaf: Mapping[str, Any]) -> list[Any] | None:
    """The values that a leaf allows, where it names them."""
    values = [leaf["const"]] if "const" in leaf else leaf.get("enum")
    return values if isinstance(values, list) else None


_ESCAPES = re.compile(r"\\.|/|\n|\r", re.DOTALL)


def _search(pattern: str) -> str:
    """A Lark regular expression of the texts in which a pattern is found, as JSON schemas mean it. Raises InputError."""
    begins, ends = pattern.startswith("^"), bool(re.search(r"(?<!\\)(\\\\)*\$$", pattern))
    core = pattern.removeprefix("^")
    core = core[:-1] if ends else core
    check_regex(core)
    escapes = {"/": r"\/", "\n": r"\n", "\r": r"\r"}
    core = _ESCAPES.sub(lambda found: escapes.get(found.group(), found.group()), core)
    return f"/{'' if begins else '(?s:.*)'}({core}){'' if ends else '(?s:.*)'}/"
