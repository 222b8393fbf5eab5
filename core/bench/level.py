"""One level of load, run and looked at from beside."""

import asyncio
import itertools
from collections.abc import Callable, Iterator
from contextlib import suppress
from dataclasses import dataclass
from time import perf_counter

from infopt.core.bench.client import Client, Session
from infopt.core.bench.loops import OpenLoop, closed_loop
from infopt.core.bench.monitor import LiveView, Look, Monitor
from infopt.core.bench.runner import Runner
from infopt.core.errors import InfoptError
from infopt.core.progress import ProgressCallback
from infopt.core.reports.requests import RequestRecord


@dataclass(frozen=True, slots=True)
class Load:
    """What a level asks for: a closed loop, or an open one with the times at which it sends."""

    level: int
    requests: int | None
    """In all; None: as many as begin within `duration`."""
    duration: float | None = None
    concurrency: int | None = None
    request_rate: float | None = None
    max_concurrency: int | None = None
    offsets: Iterator[float] | None = None
    """Seconds from the level's start at which an open loop's conversations are due."""

    @property
    def is_open(self) -> bool:
        return self.offsets is not None


@dataclass(frozen=True, slots=True)
class Ran:
    """What was seen of a level; times are seconds from the run's start."""

    load: Load
    records: tuple[RequestRecord, ...]
    looks: tuple[Look, ...]
    """Their times are the clock's."""
    loop_lags: tuple[float, ...]
    start: float
    end: float
    stopped: str | None = None


Stop = Callable[[Runner, list[Look]], str | None]
"""Why to break a level off, from what was seen of it so far."""


async def run_level(
    client: Client,
    load: Load,
    sessions: Iterator[Session],
    *,
    timeout: float,
    origin: float,
    stage: str,
    progress: ProgressCallback,
    stop: Stop | None = None,
) -> Ran:
    """Send a level's requests and wait for all of them.

    Raises the first fault of infopt's own that is not a request's.
    """
    view = LiveView(stage, load.requests, progress, lambda: runner.in_flight)
    runner = Runner(client, level=load.level, timeout=timeout, origin=origin, ended=view.ended)
    loop = OpenLoop(runner, load.max_concurrency)
    monitor = Monitor(
        lambda: runner.in_flight, lambda: max(runner.in_flight, loop.outstanding), view.tell
    )
    beside = asyncio.create_task(monitor.run())
    began = perf_counter()
    try:
        await _send(load, runner, loop, sessions, monitor, stop)
    except ExceptionGroup as failed:
        if (fault := _known(failed)) is None:
            raise
        raise fault from fault.__cause__
    finally:
        ended = perf_counter()
        beside.cancel()
        with suppress(asyncio.CancelledError):
            await beside
    return Ran(
        load,
        tuple(runner.records),
        tuple(look for look in monitor.looks if look.time <= ended),
        tuple(monitor.lags),
        began - origin,
        ended - origin,
        loop.stopped,
    )


async def _send(
    load: Load,
    runner: Runner,
    loop: OpenLoop,
    sessions: Iterator[Session],
    monitor: Monitor,
    stop: Stop | None,
) -> None:
    if load.requests is not None:
        sessions = limited(sessions, load.requests)
    if load.offsets is None:
        assert load.concurrency is not None, "a closed loop has one"
        await closed_loop(runner, sessions, load.concurrency, load.duration)
        return
    offsets = load.offsets
    if load.duration is not None:
        end = load.duration
        offsets = itertools.takewhile(lambda offset: offset < end, offsets)
    # The session is drawn only where there is a time for it.
    plan = ((offset, session) for offset, session in zip(offsets, sessions, strict=False))
    await loop.run(plan, None if stop is None else lambda: stop(runner, monitor.looks))


def limited(sessions: Iterator[Session], requests: int) -> Iterator[Session]:
    """Conversations with `requests` turns in all: the last may be cut short."""
    left = requests
    while left > 0 and (session := next(sessions, None)) is not None:
        yield session[:left]
        left -= len(session)


def _known(failed: ExceptionGroup) -> InfoptError | None:
    """The first fault of infopt's own in a group, at any depth."""
    for error in failed.exceptions:
        found = _known(error) if isinstance(error, ExceptionGroup) else error
        if isinstance(found, InfoptError):
            return found
    return None
