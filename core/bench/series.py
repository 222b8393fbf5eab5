"""From records to the few numbers that pictures are drawn from: pure arithmetic."""

from collections.abc import Iterator, Sequence

import numpy as np
from numpy.typing import NDArray

from infopt.core.bench.metrics import values
from infopt.core.reports.bench_series import BenchSeries, Distribution, Timeline
from infopt.core.reports.requests import RequestRecord

LATENCIES = ("ttft", "tpot", "e2e")
POINTS = 101
"""Of each distribution, at most."""
SLICES = 200
LEVELS = 8
"""Levels whose distributions are kept: the page has as many colours."""


def series(records: Sequence[RequestRecord]) -> BenchSeries:
    """The distributions of each level, and how the run went on."""
    return BenchSeries(distributions=tuple(_distributions(records)), timeline=_timeline(records))


def _distributions(records: Sequence[RequestRecord]) -> Iterator[Distribution]:
    levels = sorted({record.level for record in records})
    step = -(-len(levels) // LEVELS) or 1
    for level in levels[::step]:
        of_level = [record for record in records if record.level == level]
        for name in LATENCIES:
            found = values(of_level, name)
            if found:
                shares = np.linspace(0, 1, min(POINTS, len(found)))
                at = tuple(float(f"{value:.6g}") for value in np.quantile(found, shares))
                yield Distribution(level=level, name=name, values=at)


def _timeline(records: Sequence[RequestRecord]) -> Timeline | None:
    if not records:
        return None
    start = min(record.sent for record in records)
    end = max(max(record.ended, record.sent) for record in records)
    if end <= start:
        return None
    edges: NDArray[np.float64] = np.linspace(start, end, SLICES + 1, dtype=np.float64)
    width = (end - start) / SLICES
    # The integral of the number in flight up to each edge, less that up to the one before.
    sent = np.array([record.sent for record in records])
    ended = np.array([max(record.ended, record.sent) for record in records])
    flown = _flown(edges, sent) - _flown(edges, ended)
    arrivals = [(time, n) for record in records for time, n in record.arrivals]
    times, tokens = np.array(arrivals).reshape(-1, 2).T
    arrived, _ = np.histogram(times, edges, weights=tokens)
    failed, _ = np.histogram([r.ended for r in records if not r.completed], edges)
    return Timeline(
        start_s=start,
        slice_s=width,
        in_flight=_rounded(np.diff(flown) / width),
        output_tokens_per_s=_rounded(arrived / width),
        failed=tuple(int(count) for count in failed),
    )


def _flown(edges: NDArray[np.float64], since: NDArray[np.float64]) -> NDArray[np.float64]:
    """The seconds from each moment of `since` to each edge behind it, summed."""
    ordered = np.sort(since)
    sums = np.concatenate([[0.0], np.cumsum(ordered)])
    before = np.searchsorted(ordered, edges)
    found: NDArray[np.float64] = before * edges - sums[before]
    return found


def _rounded(values: NDArray[np.float64]) -> tuple[float, ...]:
    return tuple(float(f"{value:.4g}") for value in values)
