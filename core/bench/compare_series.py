"""One side of a comparison as arrays, and its figures under any weighting of its requests."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise

import numpy as np
from numpy.typing import NDArray

from infopt.core.bench.compare_bootstrap import Floats, binned_quantiles, quantiles
from infopt.core.bench.slo import is_good
from infopt.core.reports.requests import RequestRecord

SHARES = {"p50": 0.50, "p95": 0.95, "p99": 0.99}
LATENCIES = ("ttft", "ttfot", "tpot", "e2e")
"""One value a request; `itl` has one a token."""
RATES = ("output_tokens_per_s", "goodput")
LEAST_SAMPLES = 20
LEAST_BEYOND = 10
"""Samples beyond a percentile, without which no interval for it is given: p99 wants 1,000."""
_BINS = 512


@dataclass(frozen=True, slots=True)
class Side:
    """All requests of one side's runs, one after the other, each run in its load's order."""

    lengths: tuple[int, ...]
    latencies: Mapping[str, Floats]
    """Seconds by name; infinite for a failed request, NaN where it has none."""
    gaps: Floats
    """Seconds to each token after its request's first read."""
    gap_owners: Floats
    """Which request each gap is of."""
    tokens: Floats
    elapsed: Floats
    """Seconds from the completion before a request's own to it; in all, how long the runs took."""
    good: Floats | None
    """Which kept every limit; None where there are none."""


def side(runs: Sequence[Sequence[RequestRecord]], limits: Mapping[str, float]) -> Side:
    """The arrays of a side's runs; `limits` are of latencies, in seconds."""
    ordered = [sorted(run, key=lambda record: record.index) for run in runs]
    records = [record for run in ordered for record in run]
    gaps = [
        ((time - before) / tokens, tokens, owner)
        for owner, record in enumerate(records)
        if record.completed
        for (before, _), (time, tokens) in pairwise(record.arrivals)
        if tokens > 0
    ]
    counts = np.array([max(1, round(tokens)) for _, tokens, _ in gaps], np.int64)
    return Side(
        lengths=tuple(len(run) for run in ordered),
        latencies={name: _latency(records, name) for name in LATENCIES},
        gaps=np.repeat(np.array([gap for gap, _, _ in gaps]), counts),
        gap_owners=np.repeat(np.array([float(owner) for _, _, owner in gaps]), counts),
        tokens=np.array([float(record.output_tokens) for record in records]),
        elapsed=np.concatenate([_elapsed(run) for run in ordered]),
        good=np.array([float(is_good(record, limits)) for record in records]) if limits else None,
    )


def _latency(records: Sequence[RequestRecord], name: str) -> Floats:
    values = [
        getattr(record, name) if record.completed else math.inf  # a broken-off answer never came
        for record in records
    ]
    return np.array([math.nan if value is None else value for value in values], np.float64)


def _elapsed(run: Sequence[RequestRecord]) -> Floats:
    ended = np.array([record.ended for record in run])
    order = np.argsort(ended, kind="stable")
    found = np.empty(len(run))
    found[order] = np.diff(ended[order], prepend=min(record.scheduled for record in run))
    return found


@dataclass(frozen=True, slots=True)
class Figures:
    """What is compared: keys of a bench report, and how each is computed of a side."""

    keys: tuple[str, ...]
    bins: Floats
    """Upper ends of bins for the gaps of both sides, each with as many of them as any other."""

    def exact(self, of: Side, binned: Floats) -> Floats:
        """The figures of a side as it was measured, given what `of` finds of all its requests."""
        found = binned.copy()
        if len(of.gaps):
            ranked = np.quantile(of.gaps, list(SHARES.values()))
            for name, value in zip(SHARES, ranked, strict=True):
                if (key := f"itl_s.{name}") in self.keys:
                    found[self.keys.index(key)] = value
        return found

    def of(self, of: Side, weights: Floats) -> Floats:
        """The figures of a side under each row of weights: (rows, keys)."""
        found: dict[str, Floats] = {}
        shares = list(SHARES.values())
        for name, values in of.latencies.items():
            columns = quantiles(values, weights, shares)
            found |= {f"{name}_s.{p}": columns[:, n] for n, p in enumerate(SHARES)}
        if len(self.bins):
            columns = binned_quantiles(self.bins, self._histograms(of), weights, shares)
            found |= {f"itl_s.{p}": columns[:, n] for n, p in enumerate(SHARES)}
        took = weights @ of.elapsed
        with np.errstate(divide="ignore", invalid="ignore"):
            found["output_tokens_per_s"] = (weights @ of.tokens) / took
            if of.good is not None:
                found["goodput"] = (weights @ of.good) / took
        return np.stack([found[key] for key in self.keys], axis=1)

    def _histograms(self, of: Side) -> NDArray[np.float32]:
        at = np.minimum(np.searchsorted(self.bins, of.gaps), len(self.bins) - 1)
        count = len(self.bins)
        flat = of.gap_owners.astype(np.int64) * count + at
        counted = np.bincount(flat, minlength=len(of.tokens) * count)
        return counted.reshape(len(of.tokens), count).astype(np.float32)


def figures(a: Side, b: Side) -> Figures:
    """What two sides both have, in the order of a report."""
    pooled = np.concatenate([a.gaps, b.gaps])
    both = len(a.gaps) > 0 and len(b.gaps) > 0
    bins = np.unique(np.quantile(pooled, np.linspace(0, 1, _BINS))) if both else np.array([])
    names = [
        name
        for name in LATENCIES
        if not np.isnan(a.latencies[name]).all() and not np.isnan(b.latencies[name]).all()
    ]
    if both:
        names.insert(len(names) - (names[-1:] == ["e2e"]), "itl")
    keys = [f"{name}_s.{p}" for name in names for p in SHARES]
    keys += [key for key in RATES if key != "goodput" or a.good is not None]
    return Figures(tuple(keys), bins)


def samples(of: Side, key: str) -> int:
    """How many values a figure is made of."""
    name = key.partition("_s.")[0]
    if name in of.latencies:
        return int((~np.isnan(of.latencies[name])).sum())
    return len(of.gaps) if name == "itl" else len(of.tokens)


def enough(of: Side, key: str) -> bool:
    """Whether an interval can be given: some samples, and some beyond the percentile."""
    count = samples(of, key)
    share = SHARES.get(key.rpartition(".")[2])
    beyond = count if share is None else round(count * (1 - share), 6)
    return min(count, len(of.tokens)) >= LEAST_SAMPLES and beyond >= LEAST_BEYOND


def series(of: Side) -> list[Floats]:
    """What correlates in time, run by run: the latencies that every request has, and the pace."""
    found = []
    start = 0
    for length in of.lengths:
        part = slice(start, start + length)
        found += [values[part] for values in of.latencies.values()]
        found.append(of.elapsed[part])
        start += length
    return found
