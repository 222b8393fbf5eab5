"""Chats that ask for JSON of a schema, or for calls of tools."""

from typing import Any

from infopt.core.bench.client import Message

ANSWER_FORMAT: dict[str, Any] = {
    "type": "json_schema",
    "json_schema": {
        "name": "description",
        "strict": True,
        "schema": {
            "type": "object",
            "properties": {
                "title": {"type": "string", "maxLength": 40},
                "kind": {"type": "string", "enum": ["place", "person", "thing"]},
                "count": {"type": "integer"},
                "known": {"type": "boolean"},
            },
            "required": ["title", "kind", "count", "known"],
            "additionalProperties": False,
        },
    },
}


def _tool(name: str, told: str, argument: str) -> dict[str, Any]:
    return {
        "type": "function",
        "function": {
            "name": name,
            "description": told,
            "parameters": {
                "type": "object",
                "properties": {argument: {"type": "string"}},
                "required": [argument],
            },
        },
    }


TOOLS: list[dict[str, Any]] = [
    _tool("get_weather", "The weather in a city.", "city"),
    _tool("get_time", "The time in a time zone.", "zone"),
]
CHOICES = ("auto", "required")
"""Of tool_choice, in turns."""


def question(context: str, asked: str) -> tuple[Message, ...]:
    """One message: some text, then what is asked of it."""
    return ({"role": "user", "content": f"{context}\n\n{asked}"},)
