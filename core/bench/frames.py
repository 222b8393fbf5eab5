"""What the frames of a streamed answer mean: completions and chats alike."""

import json
from typing import Any

from infopt.core.bench.client import Chunk
from infopt.core.errors import EngineError

REASONING = ("reasoning_content", "reasoning")
"""Where servers put the tokens of a model's reasoning."""


def said(body: bytes) -> str:
    """The reason in an error's body, in one line."""
    text = body.decode(errors="replace")
    try:
        return reason_of(json.loads(text))
    except ValueError:
        if text.lstrip().startswith("<"):  # a page for people
            return "the server did not answer as an OpenAI server"
        return " ".join(text.split())[:200] or "no reason given"


def reason_of(content: Any) -> str:
    """The reason in an error's object, in one line."""
    error = content.get("error", content) if isinstance(content, dict) else content
    if isinstance(error, dict):
        words = [str(error[key]) for key in ("message", "detail", "param") if error.get(key)]
        error = "; ".join(words) or json.dumps(error)
    return " ".join(str(error).split())[:300]


def frame_of(payload: bytes) -> dict[str, Any]:
    """The object of a frame; raises EngineError where it is none, or tells of an error."""
    try:
        frame = json.loads(payload)
    except ValueError:
        raise EngineError("a frame of the stream is not JSON") from None
    if not isinstance(frame, dict):
        raise EngineError("a frame of the stream is not an object")
    if frame.get("error"):
        raise EngineError(f"the server failed in mid-stream: {reason_of(frame)}")
    return frame


def _choices(frame: dict[str, Any]) -> list[dict[str, Any]]:
    return [choice for choice in frame.get("choices") or [] if isinstance(choice, dict)]


def finished(frame: dict[str, Any]) -> bool:
    """Whether the frame says why the answer ended."""
    return any(choice.get("finish_reason") for choice in _choices(frame))


def chunk_of(frame: dict[str, Any], now: float) -> Chunk:
    """A frame that was read at `now`: a role, an empty text or a finish reason is no content."""
    usage = frame.get("usage")
    usage = usage if isinstance(usage, dict) else {}
    text, thought, called = "", False, False
    for choice in _choices(frame):
        delta = choice.get("delta")
        delta = delta if isinstance(delta, dict) else {}
        text += _text(choice.get("text"))
        text += _text(delta.get("content")) + _text(delta.get("refusal"))
        thought = thought or any(_text(delta.get(key)) for key in REASONING)
        called = called or bool(delta.get("tool_calls") or delta.get("function_call"))
    answer = bool(text) or called
    return Chunk(
        now,
        answer or thought,
        _tokens(usage, "completion_tokens"),
        _tokens(usage, "prompt_tokens"),
        answer,
        text,
    )


def _text(value: Any) -> str:
    return value if isinstance(value, str) else ""


def _tokens(usage: dict[str, Any], key: str) -> int | None:
    value = usage.get(key)
    return value if isinstance(value, int) and not isinstance(value, bool) and value >= 0 else None
