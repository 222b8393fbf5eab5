"""The server's own figures beside the load, read from its /metrics in Prometheus's text."""

import asyncio
import re
from collections.abc import Awaitable, Callable, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import pairwise
from statistics import median
from time import perf_counter

from infopt.core.reports.bench import ServerMetrics, ServerSample

INTERVAL_S = 0.5
_POINTS = 300
_LINE = re.compile(r"(?:infopt|vllm):([A-Za-z0-9_]+)(?:\{[^}]*\})?\s+([0-9.eE+-]+|NaN|[+-]?Inf)\b")
_RUNNING, _WAITING = "num_requests_running", "num_requests_waiting"
_KV = ("kv_cache_usage_perc", "gpu_cache_usage_perc")
_HITS = ("prefix_cache_hits_total", "gpu_prefix_cache_hits_total")
_QUERIES = ("prefix_cache_queries_total", "gpu_prefix_cache_queries_total")
_PREEMPTIONS = ("num_preemptions_total",)
Figures = Mapping[str, float]
Looks = Sequence[tuple[float, Figures]]
"""(seconds from the run's start, figures) of each look."""


def parse_metrics(text: str) -> dict[str, float]:
    """Gauges and counters of infopt and vLLM by their bare names, summed over their labels."""
    found: dict[str, float] = {}
    for line in text.splitlines():
        if match := _LINE.match(line):
            value = float(match[2])
            if value == value:
                found[match[1]] = found.get(match[1], 0.0) + value
    return found


@dataclass(slots=True)
class Scraper:
    """Asks again and again, beside the load."""

    ask: Callable[[], Awaitable[str | None]]
    origin: float
    seen: list[tuple[float, Figures]] = field(default_factory=list)

    async def run(self) -> None:
        """Ask until cancelled; an answer that fails is only one look less."""
        while True:
            await asyncio.sleep(INTERVAL_S)
            await self.look()

    async def look(self) -> bool:
        """Ask once; False where there is nothing of use to hear."""
        text = await self.ask()
        figures = parse_metrics(text) if text is not None else {}
        if figures:
            self.seen.append((perf_counter() - self.origin, figures))
        return bool(figures)

    async def mark(self) -> int:
        """Look, and say where in `seen` what is seen from now on begins."""
        first = len(self.seen)
        await self.look()
        return first


def summed(seen: Looks, *, timeline: bool = True) -> ServerMetrics | None:
    """Medians and maxima of gauges, increases of counters; None where nothing was seen."""
    if not seen:
        return None
    figures = [found for _, found in seen]
    running, waiting = _all(figures, (_RUNNING,)), _all(figures, (_WAITING,))
    kv = _all(figures, _KV)
    queries, hits = _increase(figures, _QUERIES), _increase(figures, _HITS)
    return ServerMetrics(
        samples=len(seen),
        running_median=_median(running),
        running_max=max(running, default=None),
        waiting_median=_median(waiting),
        waiting_max=max(waiting, default=None),
        kv_use_median=_median(kv),
        kv_use_max=max(kv, default=None),
        prefix_hit_share=hits / queries if hits is not None and queries else None,
        preemptions=_increase(figures, _PREEMPTIONS),
        timeline=tuple(_sample(*look) for look in _thinned(seen)) if timeline else (),
    )


def _sample(time: float, found: Figures) -> ServerSample:
    return ServerSample(
        time=time, running=found.get(_RUNNING), waiting=found.get(_WAITING), kv_use=_one(found, _KV)
    )


def _one(found: Figures, names: Sequence[str]) -> float | None:
    return next((found[name] for name in names if name in found), None)


def _all(figures: Sequence[Figures], names: Sequence[str]) -> list[float]:
    values = (_one(found, names) for found in figures)
    return [value for value in values if value is not None]


def _median(values: Sequence[float]) -> float | None:
    return median(values) if values else None


def _increase(figures: Sequence[Figures], names: Sequence[str]) -> float | None:
    """Of a counter over the run; one that fell began anew, and its whole value is new."""
    values = _all(figures, names)
    if len(values) < 2:
        return None
    return sum(b - a if b >= a else b for a, b in pairwise(values))


def _thinned(seen: Looks) -> Looks:
    """As many as a picture shows, evenly chosen, the first and the last among them."""
    if len(seen) <= _POINTS:
        return seen
    step = (len(seen) - 1) / (_POINTS - 1)
    return [seen[round(n * step)] for n in range(_POINTS)]
