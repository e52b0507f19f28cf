"""What the JSON schema of a tool's parameters says of each: needed where calls are XML, which has no types of its own."""

import itertools
from collections.abc import Iterator, Mapping
from typing import Any

MOST_LEAVES = 64  # of one schema that are looked at
_DEEPEST = 32  # references and unions in each other
_UNIONS = ("anyOf", "oneOf")
_STRING = frozenset(("string",))


def leaves(schema: Any, root: Mapping[str, Any]) -> Iterator[Mapping[str, Any] | None]:
    """The schemas of which a value must obey one, without references and unions of their own; None for one that cannot be read.

    At most MOST_LEAVES and one: unions in each other can be exponentially many.
    """
    return itertools.islice(_leaves(schema, root, 0), MOST_LEAVES + 1)


def _leaves(schema: Any, root: Mapping[str, Any], depth: int) -> Iterator[Mapping[str, Any] | None]:
    found = resolve(schema, root) if depth < _DEEPEST else None
    union = None if found is None else next((key for key in _UNIONS if isinstance(found.get(key), list)), None)
    if found is None or union is None:
        yield found
        return
    beside = {key: value for key, value in found.items() if key != union}
    for option in found[union]:
        yield from _leaves({**beside, **option} if isinstance(option, Mapping) else option, root, depth + 1)


def resolve(schema: Any, root: Mapping[str, Any]) -> Mapping[str, Any] | None:
    """A schema without a reference, or an `allOf` of one, at its top, keywords beside it kept; None where it leads nowhere."""
    for _ in range(_DEEPEST):
        if not isinstance(schema, Mapping):
            return {} if schema is True else None
        if "$ref" in schema:
            key, target = "$ref", _pointed(schema["$ref"], root)
        elif isinstance(schema.get("allOf"), list) and len(schema["allOf"]) == 1:
            key, target = "allOf", schema["allOf"][0]
        else:
            return schema
        if not isinstance(target, Mapping):
            return None
        schema = {**target, **{name: value for name, value in schema.items() if name != key}}
    return None


def _pointed(reference: Any, root: Mapping[str, Any]) -> Any:
    if not isinstance(reference, str) or not (reference == "#" or reference.startswith("#/")):
        return None
    found: Any = root
    for part in reference.split("/")[1:]:
        found = found.get(part.replace("~1", "/").replace("~0", "~")) if isinstance(found, Mapping) else None
    return found


def types(leaf: Mapping[str, Any] | None) -> frozenset[str]:
    """The JSON types that a leaf allows; one that does not say is taken for a string's."""
    if leaf is None:
        return _STRING
    values = [leaf["const"]] if "const" in leaf else leaf.get("enum")
    if isinstance(values, list) and values:
        return frozenset(map(type_of, values))
    declared = leaf.get("type")
    named = frozenset(
        name for name in (declared if isinstance(declared, list) else [declared]) if isinstance(name, str)
    )
    if named:
        return named
    return frozenset(("object",)) if "properties" in leaf else frozenset(("array",)) if "items" in leaf else _STRING


def type_of(value: Any) -> str:
    """A JSON value's type; a number without a fraction is an integer."""
    if isinstance(value, float):
        return "integer" if value.is_integer() else "number"
    names = {str: "string", bool: "boolean", int: "integer", type(None): "null", list: "array", dict: "object"}
    return names[type(value)]


def is_of(value: Any, allowed: frozenset[str]) -> bool:
    """Whether a JSON value is of one of the types."""
    found = type_of(value)
    return found in allowed or (found == "integer" and "number" in allowed)


class Parameters:
    """The parameters of one tool.

    schema: as OpenAI's format has it, or None. others: the schema of those that it does not name.
    """

    def __init__(self, schema: Any):
        self.root: Mapping[str, Any] = schema if isinstance(schema, Mapping) else {}
        self.schema = resolve(self.root, self.root) or {}
        properties = self.schema.get("properties")
        self.properties: Mapping[str, Any] = properties if isinstance(properties, Mapping) else {}
        self.others: Any = self.schema.get("additionalProperties", True)

    def types(self, name: str) -> frozenset[str]:
        """The JSON types of a parameter, by its name."""
        schema = self.properties.get(name, self.others)
        return frozenset[str]().union(*map(types, leaves(schema, self.root))) or _STRING
