"""Looks at a running level from beside it: how many are in flight, and how late this client is."""

import asyncio
import random
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from statistics import median
from time import perf_counter

from infopt.core.progress import Progress, ProgressCallback
from infopt.core.reports.requests import RequestRecord

INTERVAL_S = 0.01
_TELL_S = 1.0
_RECENT = 200
"""Latest requests that the live view speaks of."""


@dataclass(frozen=True, slots=True)
class Look:
    """What was seen at one moment."""

    time: float
    in_flight: int
    outstanding: int
    """In flight, or waiting in a queue of ours."""


class Monitor:
    """As a task beside the load; its waits vary, so that no rhythm of the load hides from it."""

    def __init__(
        self, in_flight: Callable[[], int], outstanding: Callable[[], int], tell: Callable[[], None]
    ) -> None:
        self.looks: list[Look] = []
        self.lags: list[float] = []
        self._in_flight, self._outstanding, self._tell = in_flight, outstanding, tell
        self._rng = random.Random(0)

    async def run(self) -> None:
        """Look until cancelled."""
        told = perf_counter()
        while True:
            wait = INTERVAL_S * self._rng.uniform(0.5, 1.5)
            before = perf_counter()
            await asyncio.sleep(wait)
            now = perf_counter()
            self.lags.append(now - before - wait)
            self.looks.append(Look(now, self._in_flight(), self._outstanding()))
            if now - told >= _TELL_S:
                told = now
                self._tell()


class LiveView:
    """What of a running level is shown: in flight, completed, failed, TTFT, tokens a second."""

    def __init__(
        self,
        stage: str,
        total: int | None,
        progress: ProgressCallback,
        in_flight: Callable[[], int],
    ) -> None:
        self._stage, self._total, self._progress = stage, total, progress
        self._in_flight = in_flight
        self._completed = self._failed = 0
        self._recent: deque[RequestRecord] = deque(maxlen=_RECENT)

    def ended(self, record: RequestRecord) -> None:
        """Count one more request, and show it."""
        if record.completed:
            self._completed += 1
            self._recent.append(record)
        else:
            self._failed += 1
        self.tell()

    def tell(self) -> None:
        """Show where the level stands."""
        done = self._completed + self._failed
        self._progress(Progress(self._stage, done, self._total, self._note()))

    def _note(self) -> str:
        parts = [f"{self._in_flight()} in flight, {self._completed} completed"]
        parts += [f"{self._failed} failed"] if self._failed else []
        ttfts = [record.ttft for record in self._recent if record.ttft is not None]
        if ttfts:
            parts.append(f"TTFT p50 {median(ttfts) * 1000:.0f} ms")
        if rate := _rate(self._recent):
            parts.append(f"{rate:.0f} tokens/s")
        return ", ".join(parts)


def _rate(recent: Sequence[RequestRecord]) -> float | None:
    """Output tokens a second of the latest requests."""
    if not recent:
        return None
    span = max(r.ended for r in recent) - min(r.sent for r in recent)
    return sum(r.output_tokens for r in recent) / span if span > 0 else None
