"""The steady window: the part of a run that is neither ramp nor drain."""

from collections.abc import Sequence

from infopt.core.reports.requests import RequestRecord

STEADY_SHARE = 0.95
"""In a closed loop's window at least this share of the concurrency is in flight."""
RAMP_SHARE = 0.2
"""Of the span of an open loop's arrivals, left out at its start."""
Window = tuple[float, float]


def closed_window(records: Sequence[RequestRecord], concurrency: int) -> Window | None:
    """From the first to the last moment at which 95% of the concurrency was in flight."""
    full: list[float] = []
    flying = 0
    for time, change in _edges(records):
        before, flying = flying, flying + change
        if max(before, flying) >= STEADY_SHARE * concurrency:
            full.append(time)
    return (full[0], full[-1]) if full and full[-1] > full[0] else None


def open_window(records: Sequence[RequestRecord]) -> Window | None:
    """From a fifth of the arrivals' span to the last arrival, after which the queue only drains."""
    due = [record.scheduled for record in records]
    if not due:
        return None
    start, end = min(due), max(due)
    return (start + RAMP_SHARE * (end - start), end) if end > start else None


def flight_integral(records: Sequence[RequestRecord], start: float, end: float) -> float:
    """Request seconds in flight between two moments: the sum of what each spent there."""
    spans = ((record.sent, record.ended) for record in records)
    return sum(max(0.0, min(to, end) - max(since, start)) for since, to in spans)


def _edges(records: Sequence[RequestRecord]) -> list[tuple[float, int]]:
    """When the number in flight changed, and by how much; who ends makes room first."""
    begun = [(record.sent, 1) for record in records]
    over = [(_over(record), -1) for record in records]
    return sorted(begun + over)


def _over(record: RequestRecord) -> float:
    """The last token of a completed request; the frames after it are no load."""
    return record.last if record.completed and record.last is not None else record.ended
