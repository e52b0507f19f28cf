"""Tool calls that must obey their schemas: whatever a model says under the grammar can be read, and is what the schema allows."""

import functools
import json
import random
import re
from typing import Any

import numpy as np
import pytest

from exaone_jax.errors import InputError
from exaone_jax.inference.grammar import Grammar, Grammars
from exaone_jax.server.errors import ApiError
from exaone_jax.server.protocol import Tool
from exaone_jax.server.tool_grammar import tool_grammar
from exaone_jax.text import ToolCall, train_bpe
from exaone_jax.text.tool_calls import TextPiece, ToolCallParser
from tests.server.checkpoints import CORPUS, END, tokenizer

ADDRESS = {
    "type": "object",
    "properties": {"street": {"type": "string"}, "no": {"type": "integer"}},
    "required": ["street"],
    "additionalProperties": False,
}
SCHEMAS: dict[str, Any] = {
    "strings": {
        "properties": {
            "city": {"type": "string", "description": "도시"},
            "unit": {"enum": ["섭씨", "F"]},
            "code": {"type": "string", "pattern": "^[a-z]{2}/[0-9]$"},
            "holds": {"type": "string", "pattern": "b", "maxLength": 4},
            "short": {"type": "string", "minLength": 2, "maxLength": 3},
            "always": {"const": "한 줄\n두 줄"},
        },
        "required": ["city", "code", "holds", "short", "always"],
    },
    "scalars": {
        "properties": {
            "n": {"type": "integer", "minimum": 3, "maximum": 7},
            "x": {"type": "number"},
            "yes": {"type": "boolean"},
            "level": {"enum": [1, 2]},
        },
        "required": ["n", "yes", "level"],
    },
    "either": {
        "properties": {
            "a": {"type": ["string", "null"]},
            "b": {"anyOf": [{"type": "string", "maxLength": 6}, {"type": "integer"}, {"type": "null"}]},
            "c": {"oneOf": [{"type": "boolean"}, {"type": "string", "minLength": 1, "maxLength": 3}]},
            "d": {"anyOf": [{"$ref": "#/$defs/Address"}, {"type": "string", "maxLength": 3}]},
            "e": {"enum": ["a", 1, None]},
        },
        "required": ["a", "b", "c", "d", "e"],
        "$defs": {"Address": ADDRESS},
    },
    "references": {
        "properties": {
            "home": {"$ref": "#/$defs/Address"},
            "name": {"allOf": [{"$ref": "#/$defs/Name"}], "description": "whose"},
            "all": {"type": "array", "items": {"$ref": "#/$defs/Address"}, "maxItems": 2},
        },
        "required": ["home", "name", "all"],
        "$defs": {"Address": ADDRESS, "Name": {"type": "string", "maxLength": 5}},
    },
}
_AFTER = "\n</parameter>\n"


def tool(parameters: Any, name: str = "f", *, strict: bool = True) -> Tool:
    function = {"name": name, "parameters": parameters, "strict": strict}
    return Tool.model_validate({"type": "function", "function": function})


@functools.cache
def grammars() -> Grammars:
    return Grammars(tokenizer(), tokenizer().vocab_size, [END])


def allows(grammar: Grammar, text: str) -> bool:
    ids = [*tokenizer().encode(text, allow_special=True), END]
    return grammars().constraint(grammar)._matcher.validate_tokens(ids) == len(ids)


def lark(*tools: Tool, form: Any = "xml", must_call: bool = True, one_call: bool = True) -> Grammar:
    return Grammar.lark(tool_grammar(tools, form, tokenizer(), must_call=must_call, one_call=one_call))


def say(grammar: Grammar, seed: int, most: int = 1500) -> str | None:
    """What a model says that draws tokens at random, a little inclined to come to an end; None if it does not."""
    rng = random.Random(seed)
    constraint, text, masks = (
        grammars().constraint(grammar),
        "",
        np.zeros((1, -(-tokenizer().vocab_size // 32)), np.uint32),
    )
    closing = {tokenizer().encode(character)[0] for character in '"}]\n'}
    for _ in range(most):
        constraint.masks([], masks)
        bits = np.unpackbits(masks.view(np.uint8), bitorder="little")[: tokenizer().vocab_size]
        allowed = np.flatnonzero(bits).tolist()
        begun = next((n for n in range(len(_AFTER) - 1, 0, -1) if text.endswith(_AFTER[:n])), 0)
        wanted = set(tokenizer().encode(_AFTER[begun])[:1]) if begun else closing
        if END in allowed and rng.random() < 0.3:
            return text
        likely = [token for token in allowed if token in wanted]
        token = rng.choice(likely if likely and rng.random() < 0.7 else allowed)
        if token == END:
            return text
        constraint.advance([token])
        assert not constraint.error
        text += tokenizer().token_bytes(token).decode("utf-8", "surrogateescape")
    return None


def read(text: str, *tools: Tool, form: Any = "xml") -> list[TextPiece | ToolCall]:
    parser = ToolCallParser(form, [each.model_dump(exclude_none=True) for each in tools])
    whole = text.encode("utf-8", "surrogateescape").decode("utf-8")
    return parser.feed(whole) + parser.flush()


def obeys(value: Any, schema: dict[str, Any], root: dict[str, Any]) -> bool:
    """Whether a value is what a schema of the words used above allows."""
    if "$ref" in schema:
        return obeys(value, root["$defs"][schema["$ref"].split("/")[-1]], root)
    kinds = {"string": str, "integer": int, "boolean": bool, "null": type(None), "array": list, "object": dict}
    kinds["number"] = (int, float)
    declared = schema.get("type", [])
    names = declared if isinstance(declared, list) else [declared]
    if names and not any(isinstance(value, kinds[n]) and (n == "boolean") == isinstance(value, bool) for n in names):
        return False
    holds = ["enum" not in schema or any(value == each and type(value) is type(each) for each in schema["enum"])]
    holds += ["const" not in schema or value == schema["const"]]
    holds += [sum(obeys(value, each, root) for each in schema[key]) == 1 for key in ("oneOf",) if key in schema]
    holds += [any(obeys(value, each, root) for each in schema[key]) for key in ("anyOf",) if key in schema]
    holds += [all(obeys(value, each, root) for each in schema.get("allOf", ()))]
    if isinstance(value, str):
        holds += [schema.get("minLength", 0) <= len(value) <= schema.get("maxLength", 10**9)]
        holds += [re.search(schema.get("pattern", ""), value) is not None]
    elif isinstance(value, int | float):
        holds += [schema.get("minimum", -(10**99)) <= value <= schema.get("maximum", 10**999)]
    elif isinstance(value, list):
        holds += [len(value) <= schema.get("maxItems", 10**9)]
        holds += [obeys(each, schema.get("items", {}), root) for each in value]
    elif isinstance(value, dict):
        properties = schema.get("properties", {})
        holds += [value.keys() >= set(schema.get("required", ()))]
        holds += [schema.get("additionalProperties", True) or properties.keys() >= value.keys()]
        holds += [obeys(each, properties.get(key, {}), root) for key, each in value.items()]
    return all(holds)


def test_the_judge_of_schemas():
    """Else the test below would not be of anything."""
    schema = SCHEMAS["either"]
    good = {"a": None, "b": "x", "c": True, "d": {"street": "s"}, "e": 1}
    assert obeys(good, schema, schema)
    for change in (
        {"a": 1},
        {"b": "1234567"},
        {"c": ""},
        {"c": None},
        {"d": {"no": 1}},
        {"d": {"street": 1}},
        {"e": True},
    ):
        assert not obeys(good | change, schema, schema), change
    assert not obeys({key: good[key] for key in "abcd"}, schema, schema)


@pytest.mark.parametrize("form", ["xml", "json"])
@pytest.mark.parametrize("name", SCHEMAS)
def test_what_must_be_called_obeys_its_schema(name: str, form: str):
    schema = {"type": "object", "additionalProperties": False, **SCHEMAS[name]}
    asked = tool(schema)
    ended = 0
    for seed in range(40):
        if (text := say(lark(asked, form=form), seed)) is None:
            continue
        ended += 1
        (call,) = read(text, asked, form=form)
        assert isinstance(call, ToolCall), (text, call)
        assert call.name == "f"
        assert obeys(json.loads(call.arguments), schema, schema), (text, call.arguments)
    assert ended > 20


@pytest.mark.parametrize("form", ["xml", "json"])
def test_text_may_come_around_the_calls_of_strict_tools(form: str):
    """Of several tools; a spelled marker is text, and so is what comes without a call."""
    tools = tool(SCHEMAS["scalars"] | {"type": "object"}, "first"), tool(None, "second", strict=False)
    grammar = lark(*tools, form=form, must_call=False, one_call=False)
    call = {
        "xml": "<tool_call>\n<function=second>\n<parameter=q>\n서울 <b>\n</parameter>\n</function>\n</tool_call>",
        "json": '<tool_call>{"name": "second", "arguments": {"q": "서울 <b>"}}</tool_call>',
    }[form]
    for text in ("", "안녕 </tool> {", f"좋아요.\n{call}\n{call}", call):
        assert allows(grammar, text), text
    assert not allows(grammar, call.replace("second", "third"))
    assert not allows(grammar, call.replace("second", "first"))
    (text, found) = read(f"좋아요.\n{call}", *tools, form=form)
    assert isinstance(found, ToolCall) and json.loads(found.arguments) == {"q": "서울 <b>"}
    assert not allows(lark(*tools, form=form, must_call=False), call + call), "one call is enough"
    assert not allows(lark(*tools, form=form), "text"), "a call must come"


def test_a_parameter_without_a_name_in_the_schema_has_the_type_of_the_others():
    asked = tool({"type": "object", "additionalProperties": {"type": "integer"}})
    text = "<tool_call>\n<function=f>\n<parameter=any>\n5\n</parameter>\n</function>\n</tool_call>"
    assert allows(lark(asked), text) and not allows(lark(asked), text.replace("5", "five"))
    (call,) = read(text, asked)
    assert isinstance(call, ToolCall) and json.loads(call.arguments) == {"any": 5}


REFUSED: dict[str, Any] = {
    "an array": {"type": "array"},
    "a pattern that is none": {"properties": {"a": {"type": "string", "pattern": 5}}},
    "a length that is none": {"properties": {"a": {"type": "string", "maxLength": "3}|x"}}},
    "a look-ahead": {"properties": {"a": {"type": "string", "pattern": "(?=a)b"}}},
    "a pattern that closes": {"properties": {"a": {"type": "string", "pattern": "a) | (b"}}},
    "a format": {"properties": {"a": {"type": "string", "format": "date"}}},
    "a type that is none": {"properties": {"a": {"type": "foo"}}},
    "nothing there": {"properties": {"a": {"$ref": "#/$defs/missing"}}},
    "itself": {"properties": {"a": {"$ref": "#/$defs/a"}}, "$defs": {"a": {"$ref": "#/$defs/a"}}},
    "unions without an end": {
        "properties": {"a": {"$ref": "#/$defs/a"}},
        "$defs": {"a": {"anyOf": [{"$ref": "#/$defs/a"}, {"$ref": "#/$defs/a"}]}},
    },
    "a name with a bracket": {"properties": {"a>b": {"type": "string"}}},
    "an empty name": {"properties": {"": {"type": "string"}}},
    "a schema of the whole": {"properties": {"a": {"type": "string"}}, "minProperties": 1},
    "no schema": {"properties": {"a": "string"}},
    "nothing allowed": {"properties": {"a": {"enum": ["</parameter>"]}}},
    "a lone surrogate": {"properties": {"a": {"const": "\ud800"}}},
}


@pytest.mark.parametrize("schema", REFUSED.values(), ids=REFUSED)
def test_a_schema_that_cannot_be_followed_is_refused(schema: Any):
    with pytest.raises((ApiError, InputError)):
        grammars().constraint(lark(tool(schema)))


def test_a_long_schema_is_answered_soon():
    """A thousand tools, and unions that multiply."""
    many = [tool({"properties": {"a": {"type": "string"}}}, f"f{i}") for i in range(1000)]
    assert "f999" in lark(*many).text
    deep: Any = {"type": "string"}
    for _ in range(20):
        deep = {"anyOf": [deep, deep]}
    with pytest.raises(ApiError, match="alternatives"):
        lark(tool({"properties": {"a": deep}}))


def test_without_a_token_for_calls_strict_tools_are_refused():
    plain = train_bpe(CORPUS, 640)
    assert plain.control_tokens.pop("<tool_call>")
    with pytest.raises(ApiError, match="strict"):
        tool_grammar([tool(None)], "json", plain, must_call=False, one_call=True)
