"""JSON schemas that clients bring: whether they are sound, before anything is made of them."""

import json
from collections.abc import Iterator
from typing import Any

from infopt.core.errors import UsageError
from infopt.core.runtime.grammar import Grammar, check_multiples
from infopt.core.server.structured import Schema

OBJECT: Schema = {"type": "object"}
MAX_SCHEMA_DEPTH = 64
_TYPES = frozenset({"object", "array", "string", "number", "integer", "boolean", "null"})
_HELD_AS_ONE = ("additionalProperties", "items", "not", "if", "then", "else", "contains")
_HELD_IN_LISTS = ("anyOf", "allOf", "oneOf", "prefixItems")
_HELD_BY_NAME = ("properties", "patternProperties", "$defs", "definitions")


def schema_fault(schema: Schema) -> str | None:
    """What is wrong with a schema of arguments, if something is: it must be that of an object."""
    if schema.get("type") != "object":
        return "must be a schema of type object"
    if _is_deep(schema):
        return f"is nested more than {MAX_SCHEMA_DEPTH} deep"
    todo: list[tuple[str, Any]] = [("", schema)]
    while todo:
        path, node = todo.pop()
        if isinstance(node, bool):
            continue
        if not isinstance(node, dict):
            return f"has no schema at {path[1:]}"
        if fault := _node_fault(node):
            return f"{fault} at {path[1:]}" if path else fault
        todo += [(f"{path}.{key}", part) for key, part in _parts(node)]
    return None


def refusal(schema: Schema) -> str | None:
    """Why no grammar can be made of a sound schema, if so; without llguidance that is not known."""
    try:
        check_multiples(Grammar.json_schema(schema))
    except UsageError as error:
        return f"does not work: {error.message}"
    try:
        from llguidance import LLMatcher
    except ImportError:
        return None  # the engine says so
    said = LLMatcher.validate_grammar(LLMatcher.grammar_from_json_schema(json.dumps(schema)))
    return f"is refused: {' '.join(said.split())[:300]}" if said else None


def compact(schema: Schema) -> Schema:
    """The same for llguidance, which then lets answers have no white space but that of a line."""
    spaced = {"whitespace_flexible": False, "item_separator": ", ", "key_separator": ": "}
    return {**schema, "x-guidance": spaced}


def _is_deep(value: Any) -> bool:
    todo = [(value, 0)]
    while todo:
        node, depth = todo.pop()
        if depth > MAX_SCHEMA_DEPTH:
            return True
        parts = node.values() if isinstance(node, dict) else node if isinstance(node, list) else ()
        todo += [(part, depth + 1) for part in parts]
    return False


def _node_fault(node: Schema) -> str | None:
    """What is wrong with one schema, those in it aside."""
    kinds = node.get("type", [])
    for kind in kinds if isinstance(kinds, list) else [kinds]:
        if not isinstance(kind, str) or kind not in _TYPES:
            return f"has the unknown type {str(kind)[:40]!r}"
    needed = node.get("required", [])
    if not isinstance(needed, list) or not all(isinstance(name, str) for name in needed):
        return "has a required that is no list of names"
    if not isinstance(node.get("enum", []), list) or node.get("enum") == []:
        return "has an enum that is no list of values"
    for key in _HELD_IN_LISTS:
        if not isinstance(node.get(key, []), list):
            return f"has {key} that is no list"
    for key in _HELD_BY_NAME:
        if not isinstance(node.get(key, {}), dict):
            return f"has {key} that are no object"
    return None


def _parts(node: Schema) -> Iterator[tuple[str, Any]]:
    """The schemas in a schema, by where they are."""
    for key in _HELD_AS_ONE:
        if key in node and not isinstance(node[key], list):  # a list of items was once allowed
            yield key, node[key]
    for key in (*_HELD_IN_LISTS, "items"):
        if isinstance(node.get(key), list):
            yield from ((f"{key}.{n}", part) for n, part in enumerate(node[key]))
    for key in _HELD_BY_NAME:
        yield from ((f"{key}.{name}", part) for name, part in node.get(key, {}).items())
