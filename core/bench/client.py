"""What a load is sent through: the interface that the bench needs, whatever stands behind it."""

from collections.abc import AsyncGenerator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Protocol, Self

Message = Mapping[str, Any]
"""Of a chat: role and content."""


@dataclass(frozen=True, slots=True)
class Request:
    """One prompt, as token ids or as text, and how many tokens to answer it with."""

    prompt: tuple[int, ...] | str
    output_tokens: int
    messages: tuple[Message, ...] = ()
    """In place of the prompt, for a chat; of a later turn, only what is new in it."""
    extra: Mapping[str, Any] = field(default_factory=dict)
    """More fields of the body, such as tools."""

    def after(self, history: tuple[Message, ...]) -> "Request":
        """The same turn with the conversation before it."""
        return replace(self, messages=(*history, *self.messages)) if history else self


Session = tuple[Request, ...]
"""A conversation's turns, each sent when the one before was answered; most have one."""


@dataclass(frozen=True, slots=True)
class Chunk:
    """One frame of an answer.

    `time` is `perf_counter` when its last byte was read, in seconds; frames of one read share it.
    `content` is False for frames without tokens: the role, the finish reason, the usage.
    `completion_tokens` counts from the start of the answer and is None where the target is silent.
    """

    time: float
    content: bool
    completion_tokens: int | None = None
    prompt_tokens: int | None = None
    answer: bool = True
    """Whether its content is of the answer itself, not only of reasoning."""
    text: str = ""


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

    async def server_metrics(self) -> str | None:
        """The target's own metrics in Prometheus's text; None where it has none."""
        ...
