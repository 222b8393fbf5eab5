"""What may come in: bounds on what waits, and on each client's rate and concurrency; no I/O.

A request beyond a bound is refused at once, with the time after which it is worth another try: a
queue without bounds answers nobody in time.
"""

import math
import time
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

from infopt.core.server.faults import ApiError

_RECENT = 64
"""Departures from the queue by which its pace is judged."""
_LEAST_S, _MOST_S = 1, 60
"""Limits of Retry-After."""


@dataclass(frozen=True, slots=True)
class Bounds:
    """What may wait for its first token at a time, and what each client may ask."""

    queued_requests: int
    queued_tokens: int
    """Prompt tokens of those that wait."""
    rate: float | None = None
    """Requests a minute of one client."""
    concurrency: int | None = None
    """Requests at a time of one client."""


@dataclass(slots=True)
class _Client:
    running: int = 0
    allowance: float | None = None
    """Requests that it may make at once; None: it made none yet."""
    counted: float = 0.0
    """When that was."""


@dataclass(slots=True, eq=False)
class Place:
    """One prompt's place in the queue: given up with its first token, or when it is over."""

    gate: "Gate"
    tokens: int
    left: bool = False

    def leave(self) -> None:
        """May be called again."""
        if not self.left:
            self.left = True
            self.gate.left(self)


@dataclass(slots=True)
class Gate:
    """Counts what waits and what each client does; `bounds` may be replaced at any time."""

    bounds: Bounds
    clock: Callable[[], float] = time.monotonic
    queued_requests: int = field(default=0, init=False)
    queued_tokens: int = field(default=0, init=False)
    _clients: dict[str, _Client] = field(default_factory=dict, init=False)
    _departures: deque[float] = field(
        default_factory=lambda: deque(maxlen=_RECENT), init=False, repr=False
    )

    def enter(
        self, name: str, *, rate: float | None = None, concurrency: int | None = None
    ) -> Callable[[], None]:
        """Count a request of a client, whose own limits go before the bounds'; call the answer when
        it is over. Raises ApiError (429) for one too many."""
        client = self._clients.setdefault(name, _Client())
        most = concurrency or self.bounds.concurrency
        if most is not None and client.running >= most:
            raise _refusal(
                f"{client.running} requests of this client are running, as many as it may have",
                code="concurrency_limit_exceeded",
                after=self._queue_s(1),
            )
        self._spend(client, rate or self.bounds.rate)
        client.running += 1
        left = False

        def leave() -> None:
            nonlocal left
            if not left:
                left = True
                client.running -= 1

        return leave

    def queue(self, tokens: Sequence[int]) -> list[Place]:
        """Places for the prompts of one request, of so many tokens each; ApiError (429) where the
        queue has no room for all of them.

        A request that alone is more than may wait is let in where nothing waits.
        """
        bounds, wanted = self.bounds, sum(tokens)
        if self.queued_requests and self.queued_requests + len(tokens) > bounds.queued_requests:
            raise self._full(
                f"{self.queued_requests} prompts are waiting: with {len(tokens)} more they are "
                f"beyond the {bounds.queued_requests} that may"
            )
        if self.queued_requests and self.queued_tokens + wanted > bounds.queued_tokens:
            raise self._full(
                f"{self.queued_tokens} prompt tokens are waiting: with {wanted} more they are "
                f"beyond the {bounds.queued_tokens} that may"
            )
        self.queued_requests += len(tokens)
        self.queued_tokens += wanted
        return [Place(self, count) for count in tokens]

    def _full(self, message: str) -> ApiError:
        return _refusal(message, code="queue_full", after=self._queue_s(self.queued_requests))

    def left(self, place: Place) -> None:
        """For `Place.leave` alone."""
        self.queued_requests -= 1
        self.queued_tokens -= place.tokens
        self._departures.append(self.clock())

    def _spend(self, client: _Client, rate: float | None) -> None:
        """A bucket of one minute's requests that fills evenly."""
        now = self.clock()
        if rate is None:
            return
        had = max(rate, 1.0) if client.allowance is None else client.allowance
        have = min(max(rate, 1.0), had + (now - client.counted) * rate / 60)
        client.allowance, client.counted = have, now
        if have < 1:
            raise _refusal(
                f"more than {rate:g} requests a minute of this client",
                code="rate_limit_exceeded",
                after=(1 - have) * 60 / rate,
            )
        client.allowance = have - 1

    def _queue_s(self, waiting: int) -> float:
        """How long so many may take to get their first token, at the pace of late."""
        if len(self._departures) < 2:
            return _LEAST_S
        spent = self.clock() - self._departures[0]
        return waiting * spent / len(self._departures)


def _refusal(message: str, *, code: str, after: float) -> ApiError:
    seconds = min(max(math.ceil(after), _LEAST_S), _MOST_S)
    return ApiError(
        429,
        message,
        kind="rate_limit_error",
        code=code,
        headers={"retry-after": str(seconds)},
    )
