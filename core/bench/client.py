"""What a load is sent through: the interface that the bench needs, whatever stands behind it."""

from collections.abc import AsyncGenerator, Sequence
from dataclasses import dataclass
from typing import Protocol, Self


@dataclass(frozen=True, slots=True)
class Request:
    """One prompt, as token ids or as text, and how many tokens to answer it with."""

    prompt: tuple[int, ...] | str
    output_tokens: int


@dataclass(frozen=True, slots=True)
class Chunk:
    """One frame of an answer.

    `time` is `perf_counter` when its last byte was read, in seconds; frames of one read share it.
    `content` is False for frames without text: the role, the finish reason, the usage.
    `completion_tokens` counts from the start of the answer and is None where the target is silent.
    """

    time: float
    content: bool
    completion_tokens: int | None = None
    prompt_tokens: int | None = None


class Client(Protocol):
    """A target; entered before the load, so that a dead one is told at once."""

    vocab_size: int | None
    """Token ids below this may be sent as a prompt; None: only text may."""
    max_model_len: int | None
    """Longest prompt plus output, where known."""
    count_source: str
    """Who counts the tokens: 'usage' or 'engine'."""

    @property
    def warnings(self) -> Sequence[str]:
        """What the reader of the figures must know of this target."""
        ...

    async def __aenter__(self) -> Self: ...

    async def __aexit__(self, *failure: object) -> None: ...

    def send(self, request: Request) -> AsyncGenerator[Chunk, None]:
        """The frames of the answer; raises EngineError when the target fails or breaks off."""
        ...
