"""The levels of a run: one, a sweep's, or those of a search for the capacity."""

from collections.abc import Awaitable, Callable, Sequence
from pathlib import Path
from time import perf_counter

from infopt.core.bench.arrivals import arrivals
from infopt.core.bench.capacity import START_RATE, Probe, judge, next_rate, only_grows
from infopt.core.bench.level import Load, Ran, Stop
from infopt.core.bench.monitor import Look
from infopt.core.bench.runner import Runner
from infopt.core.bench.slo import is_good, kept
from infopt.core.bench.trace import TraceRow, read_trace
from infopt.core.errors import UsageError
from infopt.core.recipe.bench import CONCURRENCY, REQUESTS, REQUESTS_OF_A_PROBE, BenchSettings
from infopt.core.recipe.load import parse_sweep
from infopt.core.reports.bench import Capacity

_REQUESTS_OF_A_WORKER = 4
"""Of a closed loop's sweep, where the number of requests was not said."""


def loads(settings: BenchSettings) -> list[Load]:
    """Every level that is known beforehand: all but those of a search and of a trace."""
    if settings.sweep is None:
        if settings.request_rate is not None:
            return [open_load(settings, 0, settings.request_rate, _requests(settings, REQUESTS))]
        concurrency = CONCURRENCY if settings.concurrency is None else settings.concurrency
        return [closed_load(settings, 0, concurrency, _requests(settings, REQUESTS))]
    key, values = parse_sweep(settings.sweep)
    if key == "request-rate":
        count = _requests(settings, REQUESTS)
        return [open_load(settings, n, value, count) for n, value in enumerate(values)]
    return [
        closed_load(
            settings,
            n,
            int(value),
            _requests(settings, max(REQUESTS, _REQUESTS_OF_A_WORKER * int(value))),
        )
        for n, value in enumerate(values)
    ]


def closed_load(
    settings: BenchSettings, level: int, concurrency: int, requests: int | None
) -> Load:
    """A level with so many in flight."""
    return Load(level, requests, duration=settings.duration, concurrency=concurrency)


def open_load(settings: BenchSettings, level: int, rate: float, requests: int | None) -> Load:
    """A level with so many a second."""
    offsets = arrivals(
        settings.arrival or "poisson",
        rate,
        seed=f"{settings.seed}/arrivals/{level}",
        burstiness=settings.burstiness,
    )
    return Load(
        level,
        requests,
        duration=settings.duration,
        request_rate=rate,
        max_concurrency=settings.max_concurrency,
        offsets=offsets,
    )


def trace_load(settings: BenchSettings) -> tuple[Load, list[TraceRow]]:
    """A trace's one level, and its rows; raises UsageError where it cannot be read."""
    assert settings.trace is not None
    rows = read_trace(Path(settings.trace), speedup=settings.speedup or 1.0)
    rows = rows if settings.requests is None else rows[: settings.requests]
    load = Load(
        0,
        None if settings.duration is not None else len(rows),
        duration=settings.duration,
        max_concurrency=settings.max_concurrency,
        offsets=iter([row.time for row in rows]),
    )
    return load, rows


def _requests(settings: BenchSettings, default: int) -> int | None:
    if settings.duration is not None:
        return None
    return default if settings.requests is None else settings.requests


RunProbe = Callable[[Load, Stop], Awaitable[Ran]]


async def search(settings: BenchSettings, run: RunProbe) -> tuple[list[Ran], Capacity]:
    """Probe until the capacity is bracketed; a probe whose queue only grows is broken off.

    Raises UsageError where a probe's duration is too short for one request.
    """
    start = START_RATE if settings.request_rate is None else settings.request_rate
    probes: list[Probe] = []
    done: list[Ran] = []
    while (rate := next_rate(probes, start)) is not None:
        load = open_load(settings, len(probes), rate, _requests(settings, REQUESTS_OF_A_PROBE))
        ran = await run(load, _stopper(settings, load))
        if not ran.records:
            raise UsageError(
                f"no request was begun within {settings.duration:g} s at {rate:.3g} requests/s",
                "raise --duration, or say --requests",
            )
        done.append(ran)
        probes.append(Probe(rate, probe_met(ran, settings)))
    return done, judge(probes, settings.target_attainment)


def probe_met(ran: Ran, settings: BenchSettings) -> bool:
    """Whether a probe ended by itself and reached the attainment."""
    if ran.stopped is not None:
        return False
    return kept(ran.records, settings.limits).attainment >= settings.target_attainment


def _stopper(settings: BenchSettings, load: Load) -> Stop:
    """Says when a probe's verdict is sure, or its queue only grows."""
    limits = settings.limits
    bad = seen = 0

    def stop(runner: Runner, looks: Sequence[Look]) -> str | None:
        nonlocal bad, seen
        fresh = runner.records[seen:]
        bad += sum(not is_good(record, limits) for record in fresh)
        seen += len(fresh)
        if load.requests is not None:
            late = bad + _overdue(runner, limits)
            if late > (1 - settings.target_attainment) * load.requests:
                return f"{late} of {load.requests} requests missed the limits already"
        if only_grows([look.outstanding for look in looks]):
            return "its queue only grows"
        return None

    return stop


def _overdue(runner: Runner, limits: dict[str, float]) -> int:
    """Requests in flight that cannot keep their limits any more."""
    now = perf_counter()
    first, end = limits.get("ttft"), limits.get("e2e")
    return sum(
        (end is not None and now - trip.scheduled > end)
        or (
            first is not None
            and now - trip.scheduled > first
            and not any(chunk.content for chunk in trip.chunks)
        )
        for trip in runner.flying.values()
    )
