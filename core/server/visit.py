"""One HTTP request from its first byte to its last: who asked, and what came of it."""

import asyncio
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

from starlette.requests import Request

from infopt.core.server.faults import timed_out
from infopt.core.server.keys import Key

ANYONE = "anyone"
"""Whoever asks a server without keys."""


@dataclass(slots=True)
class Passage:
    """One prompt's way through the engine, in times of the steady clock; None did not happen."""

    began: float
    waited: float | None = None
    """Seconds in the engine's queue."""
    first: float | None = None
    """When the first token of any of its answers came."""
    ended: float | None = None


@dataclass(slots=True, eq=False)
class Visit:
    """Told by the routes, read by logs and metrics; `close` gives back all that it held."""

    id: str
    method: str
    path: str
    key: Key | None = None
    trace: Mapping[str, str] = field(default_factory=dict)
    """The headers that say which trace it belongs to."""
    received: float = field(default_factory=time.monotonic)
    until: "asyncio.Future[Exception]" = field(
        default_factory=lambda: asyncio.get_running_loop().create_future()
    )
    """What ends its work before it is done: its time is over, or the server's."""
    status: int | None = None
    prompt_tokens: int = 0
    cached_tokens: int = 0
    output_tokens: int = 0
    first_token: float | None = None
    """When the first token of any answer came."""
    passages: list[Passage] = field(default_factory=list)
    """Of its prompts."""
    finish_reasons: list[str] = field(default_factory=list)
    fault: str | None = None
    working: bool = False
    """Whether it has, or will have, work for the engine."""
    _closers: list[Callable[[], None]] = field(default_factory=list)

    @property
    def client(self) -> str:
        return ANYONE if self.key is None else self.key.name

    @property
    def outcome(self) -> int:
        """Its status; 499 where the client left before there was one."""
        return self.status or 499

    @property
    def ttft(self) -> float | None:
        """Seconds to the first token of any answer; None where there was none."""
        return None if self.first_token is None else self.first_token - self.received

    @property
    def age(self) -> float:
        """Seconds."""
        return time.monotonic() - self.received

    def salt(self, asked: str) -> str:
        """What its prefixes are named by: nobody shares those of another key."""
        return asked if self.key is None else self.key.salt(asked)

    def end_after(self, seconds: float) -> None:
        """Its work ends then, with status 408 where nothing was sent yet."""
        timer = asyncio.get_running_loop().call_later(seconds, self.end, timed_out(seconds))
        self.on_close(timer.cancel)

    def end(self, fault: Exception) -> None:
        """End its work now, with this; the first fault stays."""
        if not self.until.done():
            self.until.set_result(fault)

    def on_close(self, closer: Callable[[], None]) -> None:
        self._closers.append(closer)

    def close(self) -> None:
        while self._closers:
            self._closers.pop()()


def visit_of(request: Request) -> Visit:
    """The visit that a request is; the doorway began it."""
    visit: Visit = request.state.visit
    return visit
