"""Whether a run's figures can be believed: pure judgements, each with its reason."""

import math
from collections.abc import Iterator, Sequence
from statistics import fmean, pstdev

import numpy as np

from infopt.core.bench.metrics import values
from infopt.core.bench.window import flight_integral
from infopt.core.reports.bench import LittlesLaw
from infopt.core.reports.requests import RequestRecord

LITTLE = 0.05
LAG_SHARE = 0.05
"""How late the client may be, of the 99th percentile of TTFT."""
LOOP_LAG_S = 0.005
"""An event loop that wakes no later than this is idle enough, however short the TTFT."""
MIN_SAMPLES = 10
"""Fewer completed requests say nothing of a distribution."""
MIN_LOOKS = 100
"""Fewer looks at the load say nothing of Little's law."""
P99_SAMPLES = 1000
"""MLPerf asks for as many before it speaks of a 99th percentile."""
_ERRORS = 3.0
"""Standard errors that the sampled mean may be off by."""


def littles_law(
    records: Sequence[RequestRecord], in_flight: Sequence[int], start: float, end: float
) -> LittlesLaw | None:
    """Compare the sampled number in flight with the records' own times; None for an empty run."""
    if end <= start or not in_flight:
        return None
    computed = flight_integral(records, start, end) / (end - start)
    sampled = fmean(in_flight)
    error = pstdev(in_flight) / math.sqrt(len(in_flight))
    allowed = max(LITTLE * computed, _ERRORS * error)
    holds = abs(sampled - computed) <= allowed if len(in_flight) >= MIN_LOOKS else None
    return LittlesLaw(sampled=sampled, computed=computed, samples=len(in_flight), holds=holds)


def invalid_reasons(
    records: Sequence[RequestRecord],
    *,
    open_loop: bool,
    loop_lags: Sequence[float],
    little: LittlesLaw | None,
    max_failed: float,
) -> Iterator[str]:
    """Why the figures of a level are not to be used; nothing where they are."""
    ttfts = values(records, "ttft")
    failed = sum(not record.completed for record in records)
    if failed > max_failed * len(records):
        yield (
            f"{failed} of {len(records)} requests failed, more than {max_failed:.0%} (--max-failed)"
        )
    if len(ttfts) < MIN_SAMPLES:
        yield f"{len(ttfts)} requests completed: fewer than {MIN_SAMPLES} say nothing"
    if ttfts:
        yield from _late(records, _p99(ttfts), open_loop, loop_lags)
    if little is not None and little.holds is False:
        yield (
            f"Little's law does not hold: {little.sampled:.3g} in flight by samples, "
            f"{little.computed:.3g} by the times of requests"
        )


def _late(
    records: Sequence[RequestRecord], ttft: float, open_loop: bool, loop_lags: Sequence[float]
) -> Iterator[str]:
    """Whether the client itself was the slow one."""
    limit = LAG_SHARE * ttft
    lag = _p99(loop_lags) if loop_lags else 0.0
    if lag > max(limit, LOOP_LAG_S):
        yield (
            f"the client was saturated: its event loop woke {lag * 1e3:.1f} ms late (p99), "
            f"more than {LAG_SHARE:.0%} of p99 TTFT, {ttft * 1e3:.0f} ms"
        )
    own = [r.sent - r.released for r in records if r.released is not None]
    if open_loop and own and (late := _p99(own)) > limit:
        yield (
            f"the client was saturated: requests were sent {late * 1e3:.1f} ms late (p99), "
            f"more than {LAG_SHARE:.0%} of p99 TTFT, {ttft * 1e3:.0f} ms"
        )


def _p99(found: Sequence[float]) -> float:
    return float(np.percentile(found, 99))
