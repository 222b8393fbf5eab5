"""Two ways to load a server: so many at once, or so many a second."""

import asyncio
from collections.abc import Callable, Iterable, Iterator
from contextlib import suppress
from time import perf_counter

from infopt.core.bench.client import Session
from infopt.core.bench.runner import Runner

_LOOK_S = 0.05
"""How often an open loop asks whether it is to be broken off."""


async def closed_loop(
    runner: Runner, sessions: Iterator[Session], concurrency: int, duration: float | None = None
) -> None:
    """Workers that each begin the next conversation when their last one ended."""
    end = None if duration is None else perf_counter() + duration

    async def work() -> None:
        for session in sessions:
            await runner.session(session)
            if end is not None and perf_counter() >= end:
                return

    async with asyncio.TaskGroup() as group:
        for _ in range(concurrency):
            group.create_task(work())


class OpenLoop:
    """Conversations begun when they are due, whatever became of those before.

    With a bound on those in flight the others wait here, in their order; they are late from when
    they were due.
    """

    def __init__(self, runner: Runner, bound: int | None = None) -> None:
        self._runner = runner
        self._bound = None if bound is None else asyncio.Semaphore(bound)
        self._tasks: set[asyncio.Task[None]] = set()
        self.stopped: str | None = None

    @property
    def outstanding(self) -> int:
        """Begun or waiting here."""
        return len(self._tasks)

    async def run(
        self,
        plan: Iterable[tuple[float, Session]],
        stop: Callable[[], str | None] | None = None,
    ) -> None:
        """Send what is planned at its seconds from now; `stop` may say why to break off."""
        start = perf_counter()
        watch = None if stop is None else asyncio.create_task(self._watch(stop))
        try:
            async with asyncio.TaskGroup() as group:
                for offset, session in plan:
                    due = start + offset
                    await asyncio.sleep(max(0.0, due - perf_counter()))
                    if self.stopped is not None:
                        break
                    task = group.create_task(self._one(session, due))
                    self._tasks.add(task)
                    task.add_done_callback(self._tasks.discard)
        finally:
            if watch is not None:
                watch.cancel()
                with suppress(asyncio.CancelledError):
                    await watch

    async def _one(self, session: Session, due: float) -> None:
        if self._bound is None:
            await self._runner.session(session, due, due)
            return
        async with self._bound:
            await self._runner.session(session, due, max(due, perf_counter()))

    async def _watch(self, stop: Callable[[], str | None]) -> None:
        while self.stopped is None:
            await asyncio.sleep(_LOOK_S)
            self.stopped = stop()
        for task in list(self._tasks):
            task.cancel()
