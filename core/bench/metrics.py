"""From the times of chunks to latencies: pure arithmetic, no clock."""

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise

import numpy as np

from infopt.core.bench.client import Chunk
from infopt.core.reports.schema import Percentiles

STEADY_SHARE = 0.95
"""In the steady window at least this share of the concurrency is in flight."""


@dataclass(frozen=True, slots=True)
class Sample:
    """One completed request; times are `perf_counter` seconds."""

    sent: float
    first: float
    last: float
    tokens: int
    tokens_at_first: int
    """Tokens that came with the first read; the clock of TPOT starts after them."""
    prompt_tokens: int | None
    counted: bool
    """The target said how many tokens there were; else each chunk with content counts as one."""
    guessed_first: bool
    """Chunks held several tokens and nobody said how many the first one held: taken as one each."""
    arrivals: tuple[tuple[float, float], ...]
    """(time, tokens) of each read that brought content."""

    @property
    def ttft(self) -> float:
        """Seconds from sending to the first content."""
        return self.first - self.sent

    @property
    def e2e(self) -> float:
        """Seconds from sending to the last content."""
        return self.last - self.sent

    @property
    def tpot(self) -> float | None:
        """Seconds per token after those of the first read; None, never 0, where none came after."""
        rest = self.tokens - self.tokens_at_first
        return (self.last - self.first) / rest if rest > 0 and self.last > self.first else None


@dataclass(frozen=True, slots=True)
class Failure:
    """One request that broke off."""

    sent: float
    ended: float
    error: str


def measure(sent: float, chunks: Sequence[Chunk]) -> Sample | None:
    """A completed request from its chunks; None if no chunk had content."""
    contents = [chunk for chunk in chunks if chunk.content]
    if not contents:
        return None
    said = [c.completion_tokens for c in chunks if c.completion_tokens is not None]
    # A count below the chunks that came is a wrong one: each held a token at least.
    counted = bool(said) and said[-1] >= len(contents)
    tokens = said[-1] if counted else len(contents)
    totals = _running_totals(contents, tokens)
    first, last = contents[0].time, contents[-1].time
    at_first = sum(chunk.time == first for chunk in contents)
    if totals is None:
        tokens_at_first, share = at_first, tokens / len(contents)
        arrivals = [(chunk.time, share) for chunk in contents]
    else:
        tokens_at_first = totals[at_first - 1]
        before = [0, *totals[:-1]]
        arrivals = [
            (c.time, float(n - m)) for c, n, m in zip(contents, totals, before, strict=True)
        ]
    prompt = [chunk.prompt_tokens for chunk in chunks if chunk.prompt_tokens is not None]
    return Sample(
        sent=sent,
        first=first,
        last=last,
        tokens=tokens,
        tokens_at_first=tokens_at_first,
        prompt_tokens=prompt[-1] if prompt else None,
        counted=counted,
        guessed_first=totals is None and len(contents) > 1,
        arrivals=tuple(arrivals),
    )


def _running_totals(contents: Sequence[Chunk], tokens: int) -> list[int] | None:
    """Tokens up to and with each chunk; None where chunks held several and none said how many."""
    if tokens == len(contents):
        return list(range(1, tokens + 1))
    said = [chunk.completion_tokens for chunk in contents]
    totals = [count for count in said if count is not None]
    if len(totals) < len(said) or totals[0] < 1 or totals[-1] > tokens:
        return None
    if any(later < earlier for earlier, later in pairwise(totals)):
        return None
    return totals


def percentiles(values: Sequence[float]) -> Percentiles | None:
    """Of a sample, interpolated linearly between the nearest ranks (Hyndman and Fan, type 7)."""
    if not values:
        return None
    p50, p90, p95, p99 = (float(p) for p in np.percentile(values, [50, 90, 95, 99]))
    return Percentiles(
        mean=float(np.mean(values)),
        p50=p50,
        p90=p90,
        p95=p95,
        p99=p99,
        min=min(values),
        max=max(values),
    )


def steady_rate(
    samples: Sequence[Sample], failures: Sequence[Failure], concurrency: int
) -> float | None:
    """Output tokens per second without ramp and drain; None if the load was never full."""
    spans = [(s.sent, s.last) for s in samples] + [(f.sent, f.ended) for f in failures]
    edges = sorted([(start, 1) for start, _ in spans] + [(end, -1) for _, end in spans])
    full: list[float] = []
    flying = 0
    for time, change in edges:
        before, flying = flying, flying + change
        if max(before, flying) >= STEADY_SHARE * concurrency:
            full.append(time)
    if not full or full[-1] <= full[0]:
        return None
    tokens = sum(n for s in samples for t, n in s.arrivals if full[0] < t <= full[-1])
    return tokens / (full[-1] - full[0])
