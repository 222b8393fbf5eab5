"""What the API process and the engine process say to each other: msgpack maps over a local socket.

API to engine:  add {id, prompt, params}, abort {id, index}, stats {}, stop {}
Engine to API:  ready {limits}, failed {error, message, hint}, outputs {outputs, joined},
                rejected {id, error, message, hint}, stats {stats}
"""

from dataclasses import asdict, dataclass
from typing import Any

import msgpack

from infopt.core.errors import (
    ArtifactError,
    EngineError,
    InfoptError,
    NumericsError,
    ResourceError,
    UnsupportedError,
    UsageError,
)
from infopt.core.runtime.grammar import Grammar
from infopt.core.runtime.request import Joined, SamplingParams, StepOutput, TokenLogprob

Message = dict[str, Any]

_ERRORS: dict[str, type[InfoptError]] = {
    kind.__name__: kind
    for kind in (ArtifactError, NumericsError, ResourceError, UnsupportedError, UsageError)
}


@dataclass(frozen=True, slots=True)
class Limits:
    """What a request must keep to."""

    max_model_len: int
    """Prompt and output tokens together."""
    cache_tokens: int
    """What the KV cache holds at a time."""


def pack(kind: str, **content: Any) -> bytes:
    """A message as bytes."""
    packed: bytes = msgpack.packb({"kind": kind, **content})
    return packed


def unpack(data: bytes) -> Message:
    """The message in these bytes."""
    message: Message = msgpack.unpackb(data)
    return message


def params_to_map(params: SamplingParams) -> Message:
    return asdict(params)


def params_from_map(values: Message) -> SamplingParams:
    """Raises UsageError for a value out of its range."""
    grammar = values["grammar"]
    whole = {
        "stop": tuple(values["stop"]),
        "stop_token_ids": tuple(values["stop_token_ids"]),
        "logit_bias": tuple(map(tuple, values["logit_bias"])),
        "grammar": None if grammar is None else Grammar(**grammar),
    }
    return SamplingParams(**{**values, **whole})


def output_to_map(output: StepOutput) -> Message:
    return asdict(output)


def output_from_map(values: Message) -> StepOutput:
    return StepOutput(
        request_id=values["request_id"],
        token_ids=tuple(values["token_ids"]),
        finish_reason=values["finish_reason"],
        error=values["error"],
        logprobs=_logprobs_from_list(values["logprobs"]),
        index=values["index"],
        prompt_logprobs=_logprobs_from_list(values["prompt_logprobs"]),
        end=None if values["end"] is None else _logprob(values["end"]),
        refused=values["refused"],
        embedding=None if values["embedding"] is None else tuple(values["embedding"]),
    )


def joined_to_map(joined: Joined) -> Message:
    return asdict(joined)


def joined_from_map(values: Message) -> Joined:
    return Joined(**values)


def _logprobs_from_list(entries: list[Message] | None) -> tuple[TokenLogprob, ...] | None:
    return None if entries is None else tuple(map(_logprob, entries))


def _logprob(entry: Message) -> TokenLogprob:
    return TokenLogprob(entry["token_id"], entry["logprob"], tuple(map(tuple, entry["top"])))


def failed(error: Exception) -> bytes:
    """The message that the engine is no more, and why."""
    if isinstance(error, InfoptError):
        kind, message, hint = type(error).__name__, error.message, error.hint
    else:
        kind, message, hint = "EngineError", f"{type(error).__name__}: {error}", None
    return pack("failed", error=kind, message=message, hint=hint)


def rejected(name: str, error: InfoptError) -> bytes:
    """The message that a request is not taken, and why."""
    kind = type(error).__name__
    return pack("rejected", id=name, error=kind, message=error.message, hint=error.hint)


def error_from_map(values: Message) -> InfoptError:
    """The error that the engine process told of."""
    kind = _ERRORS.get(values["error"], EngineError)
    return kind(values["message"], values["hint"])
