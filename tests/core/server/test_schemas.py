from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from infopt.core.server.schemas import MAX_SCHEMA_DEPTH, compact, refusal, schema_fault


def of(**parts: Any) -> Any:
    return {"type": "object", **parts}


SOUND: list[Any] = [
    of(),
    of(properties={"a": {}, "b": True, "type": {"type": ["string", "null"]}}),
    of(properties={"a": {"items": [{"type": "integer"}], "enum": [None]}}),
    of(**{"$defs": {"x": {"type": "integer"}}}, properties={"a": {"$ref": "#/$defs/x"}}),
    of(anyOf=[{"required": ["a"]}, False], additionalProperties={"type": "number"}),
    of(properties={"a": {"not": {"const": {"type": "any"}}, "default": {"type": 3}}}),
]
UNSOUND: list[tuple[Any, str]] = [
    ({}, "must be a schema of type object"),
    ({"type": ["object"]}, "must be a schema of type object"),
    (of(properties={"a": {"type": "int"}}), "unknown type 'int' at properties.a"),
    (of(properties={"a": {"items": {"type": None}}}), "unknown type 'None' at properties.a.items"),
    (of(required=[1]), "a required that is no list of names"),
    (of(properties={"a": {"enum": "x"}}), "an enum that is no list of values at properties.a"),
    (of(allOf={}), "has allOf that is no list"),
    (of(anyOf=[3]), "no schema at anyOf.0"),
    (of(patternProperties=[]), "patternProperties that are no object"),
    (of(**{"if": "x"}), "no schema at if"),
]


@pytest.mark.parametrize("schema", SOUND, ids=str)
def test_sound_schemas(schema: Any) -> None:
    assert schema_fault(schema) is None


@pytest.mark.parametrize(("schema", "said"), UNSOUND, ids=str)
def test_what_is_wrong_is_said_and_where(schema: Any, said: str) -> None:
    fault = schema_fault(schema)
    assert fault is not None and said in fault


def test_depth_is_bounded_wherever_it_is() -> None:
    deep: Any = {}
    for _ in range(100_000):
        deep = {"x": deep}
    assert schema_fault(of(properties={"a": {"default": deep}})) == (
        f"is nested more than {MAX_SCHEMA_DEPTH} deep"
    )


def test_why_no_grammar_can_be_made() -> None:
    assert refusal(SOUND[3]) is None and refusal(compact(SOUND[3])) is None
    assert "Unimplemented" in (refusal(of(properties={"a": {"uniqueItems": True}})) or "")
    assert "multipleOf" in (refusal(of(properties={"a": {"multipleOf": 999_983}})) or "")
    assert "longer than" in (refusal(of(title="x" * 70_000)) or "")


values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.sampled_from(["object", "string", "a"]),
    lambda inner: (
        st.lists(inner, max_size=3)
        | st.dictionaries(
            st.sampled_from(["type", "properties", "items", "anyOf", "required", "enum", "$defs"]),
            inner,
            max_size=3,
        )
    ),
)


@given(st.dictionaries(st.sampled_from(["properties", "items", "anyOf", "enum"]), values))
def test_anything_is_sound_or_not(parts: Any) -> None:
    assert isinstance(schema_fault(of(**parts)), str | None)
