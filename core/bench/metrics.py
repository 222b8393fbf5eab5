"""From records to figures: pure arithmetic over what was kept of each request."""

import math
from collections.abc import Callable, Iterable, Sequence
from itertools import pairwise

import numpy as np

from infopt.core.reports.bench import TailPercentiles
from infopt.core.reports.requests import RequestRecord
from infopt.core.reports.schema import Percentiles

LATENCIES: dict[str, Callable[[RequestRecord], float | None]] = {
    "ttft": lambda record: record.ttft,
    "ttfot": lambda record: record.ttfot,
    "tpot": lambda record: record.tpot,
    "e2e": lambda record: record.e2e,
}
"""One time a request, by the name that limits and keys give it."""

_SHARES = {"p50": 0.50, "p90": 0.90, "p95": 0.95, "p99": 0.99}


def completed(records: Iterable[RequestRecord]) -> list[RequestRecord]:
    """Those that did not fail."""
    return [record for record in records if record.completed]


def values(records: Iterable[RequestRecord], latency: str) -> list[float]:
    """A latency of each completed request that has it: weighted by requests."""
    found = (LATENCIES[latency](record) for record in records if record.completed)
    return [value for value in found if value is not None]


def token_gaps(records: Iterable[RequestRecord]) -> list[float]:
    """Seconds to each token after a request's first read: weighted by tokens.

    A read that brings n tokens after a gap g gives n times g / n.
    """
    gaps: list[float] = []
    for record in records:
        if record.completed:
            for (before, _), (time, tokens) in pairwise(record.arrivals):
                gaps += [(time - before) / tokens] * int(tokens)
    return gaps


def chunk_gaps(records: Iterable[RequestRecord]) -> list[float]:
    """Seconds between the reads of each request, however many tokens they brought."""
    return [
        time - before
        for record in records
        if record.completed
        for (before, _), (time, _) in pairwise(record.arrivals)
    ]


def percentiles(found: Sequence[float]) -> Percentiles | None:
    """Of a sample, interpolated linearly between the nearest ranks (Hyndman and Fan, type 7)."""
    if not found:
        return None
    p50, p90, p95, p99 = (float(p) for p in np.percentile(found, [50, 90, 95, 99]))
    return Percentiles(
        mean=float(np.mean(found)), p50=p50, p90=p90, p95=p95, p99=p99, min=min(found),
        max=max(found),
    )  # fmt: skip


def tail_percentiles(found: Sequence[float], failed: int) -> TailPercentiles | None:
    """The same with `failed` more that are infinite; None where there are none at all."""
    if not found and not failed:
        return None
    ranked = sorted(found) + [math.inf] * failed
    at = {key: _type_7(ranked, share) for key, share in _SHARES.items()}
    finite = {key: value if math.isfinite(value) else None for key, value in at.items()}
    infinite = tuple(key for key, value in finite.items() if value is None)
    return TailPercentiles(
        p50=finite["p50"],
        p90=finite["p90"],
        p95=finite["p95"],
        p99=finite["p99"],
        infinite=infinite,
    )


def _type_7(ranked: Sequence[float], share: float) -> float:
    """By hand: numpy makes NaN between two infinities."""
    place = (len(ranked) - 1) * share
    low = math.floor(place)
    part = place - low
    if part == 0 or ranked[low] == ranked[low + 1]:
        return ranked[low]
    return ranked[low] + part * (ranked[low + 1] - ranked[low])


def tokens_between(records: Iterable[RequestRecord], start: float, end: float) -> float:
    """Output tokens of completed requests that arrived in (start, end]."""
    return sum(
        tokens
        for record in records
        if record.completed
        for time, tokens in record.arrivals
        if start < time <= end
    )
