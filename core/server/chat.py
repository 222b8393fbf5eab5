"""Chats as OpenAI's clients send them: messages, tools, and what the answer is to be like."""

import json
from collections.abc import Sequence
from typing import Annotated, Any, ClassVar, Literal

from pydantic import BaseModel, ConfigDict, Field, model_validator

from infopt.core.runtime.grammar import Grammar
from infopt.core.runtime.request import MAX_LOGPROBS, SamplingParams
from infopt.core.server.protocol import Body, is_text
from infopt.core.server.structured import refused
from infopt.core.server.tools import Tool, ToolChoice, Tools, check_tools

MAX_CALLS = 128
"""Of one message."""


class TextPart(BaseModel):
    model_config = ConfigDict(extra="forbid", strict=True)

    type: Literal["text"]
    text: str


class CalledFunction(BaseModel):
    model_config = ConfigDict(extra="forbid", strict=True)

    name: Annotated[str, Field(min_length=1)]
    arguments: str
    """A JSON object."""


class ToolCall(BaseModel):
    """A call that an earlier answer consisted of."""

    model_config = ConfigDict(extra="forbid", strict=True)

    id: Annotated[str, Field(min_length=1)]
    type: Literal["function"] = "function"
    function: CalledFunction


class ChatMessage(BaseModel):
    model_config = ConfigDict(extra="forbid", strict=True)

    # Clients send answers back as they came: with fields that say nothing.
    NEUTRAL: ClassVar[dict[str, tuple[Any, ...]]] = {
        "refusal": (None,),
        "annotations": (None, []),
        "audio": (None,),
        "function_call": (None,),
    }

    role: Literal["system", "developer", "user", "assistant", "tool"]
    content: str | list[TextPart] | None = None
    tool_calls: Annotated[list[ToolCall], Field(max_length=MAX_CALLS)] | None = None
    tool_call_id: str | None = None
    name: str | None = None
    """Of the tool."""

    @model_validator(mode="before")
    @classmethod
    def _without_neutral_fields(cls, values: Any) -> Any:
        if not isinstance(values, dict):
            return values
        neutral = cls.NEUTRAL
        return {k: v for k, v in values.items() if k not in neutral or v not in neutral[k]}

    def text(self) -> str:
        if isinstance(self.content, list):
            return "".join(part.text for part in self.content)
        return self.content or ""

    def plain(self) -> dict[str, Any]:
        """As chat templates take it; `developer` is OpenAI's newer word for `system`."""
        told: dict[str, Any] = {
            "role": "system" if self.role == "developer" else self.role,
            "content": self.text(),
        }
        if self.tool_calls:
            told["tool_calls"] = [
                {
                    "id": call.id,
                    "type": "function",
                    "function": {
                        "name": call.function.name,
                        "arguments": arguments(call.function.arguments),
                    },
                }
                for call in self.tool_calls
            ]
        if self.role == "tool":
            told["tool_call_id"] = self.tool_call_id
            if self.name is not None:
                told["name"] = self.name
        return told


def arguments(text: str) -> dict[str, Any] | None:
    """The object that a call's arguments are, if they are one; an empty text is an empty one.

    Templates write them as JSON, and would write text with its quotes.
    """
    try:
        found = json.loads(text or "{}")
    except (ValueError, RecursionError):
        return None
    return found if isinstance(found, dict) and is_text(found) else None


Messages = Annotated[list[ChatMessage], Field(min_length=1)]


class ChatRequest(Body):
    """POST /v1/chat/completions."""

    NEUTRAL: ClassVar[dict[str, tuple[Any, ...]]] = {
        **Body.NEUTRAL,
        "functions": (None, []),
        "function_call": (None, "none"),
        "modalities": (None, ["text"]),
        "reasoning_effort": (None,),
        "verbosity": (None,),
        "prediction": (None,),
        "audio": (None,),
        "web_search_options": (None,),
    }

    messages: Messages
    logprobs: bool | None = None
    top_logprobs: Annotated[int, Field(ge=0, le=MAX_LOGPROBS)] | None = None
    tools: Tools | None = None
    tool_choice: ToolChoice | None = None
    parallel_tool_calls: bool | None = None

    @model_validator(mode="after")
    def _agree(self) -> "ChatRequest":
        if self.top_logprobs is not None and not self.logprobs:
            raise refused("top_logprobs", "needs logprobs: true")
        return self

    @model_validator(mode="after")
    def _tools_agree(self) -> "ChatRequest":
        check_messages(self.messages)
        check_tools(self.tools or (), self.tool_choice)
        if self.usable_tools:
            for key in ("response_format", "structured_outputs"):
                asked = getattr(self, key)
                if asked is not None and self.asked_grammar() is not None:
                    raise refused(key, "would keep tools from being called: set tool_choice: none")
        return self

    @property
    def usable_tools(self) -> Sequence[Tool]:
        return () if self.tool_choice == "none" else self.tools or ()

    def params(self, max_tokens: int, grammar: Grammar | None = None) -> SamplingParams:
        """With the `grammar` that tools need."""
        logprobs = (self.top_logprobs or 0) if self.logprobs else None
        return self.sampling(max_tokens, logprobs, grammar=grammar)


def check_messages(messages: Sequence[ChatMessage]) -> None:
    """Raise what a validator raises for a message that lacks something or has what is not its."""
    called: set[str] = set()
    for index, message in enumerate(messages):
        where, role = f"messages.{index}", message.role
        of_tool = (message.tool_call_id, message.name)
        if message.tool_calls and role != "assistant":
            raise refused(f"{where}.tool_calls", f"is not for the role {role}")
        if role != "tool" and of_tool != (None, None):
            key = "tool_call_id" if message.name is None else "name"
            raise refused(f"{where}.{key}", f"is not for the role {role}")
        if message.content is None and not message.tool_calls:
            raise refused(f"{where}.content", f"is required with the role {role}")
        if role == "tool" and message.tool_call_id not in called:
            raise refused(f"{where}.tool_call_id", "is not that of a tool call before")
        for n, call in enumerate(message.tool_calls or ()):
            called.add(call.id)
            if arguments(call.function.arguments) is None:
                key = f"{where}.tool_calls.{n}.function.arguments"
                raise refused(key, "is no JSON object")
