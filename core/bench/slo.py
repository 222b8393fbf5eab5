"""Which requests kept the limits, and what share of all did."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from infopt.core.bench.metrics import LATENCIES
from infopt.core.reports.requests import RequestRecord

Limits = Mapping[str, float]
"""Seconds by latency: ttft, ttfot, tpot, e2e."""


def is_good(record: RequestRecord, limits: Limits) -> bool:
    """Whether a request completed and kept every limit.

    A TPOT that is undefined keeps its limit: there was no second token to wait for. A missing first
    token of the answer does not: it never came.
    """
    return record.completed and all(_kept(record, key, limit) for key, limit in limits.items())


def _kept(record: RequestRecord, key: str, limit: float) -> bool:
    value = LATENCIES[key](record)
    return key == "tpot" if value is None else value <= limit


@dataclass(frozen=True, slots=True)
class Kept:
    """How a level kept the limits."""

    good: int
    attainment: float
    """Good over all, failed ones among them."""
    without_tpot: int
    """Of the good ones, those of which a TPOT limit asked nothing."""


def kept(records: Sequence[RequestRecord], limits: Limits) -> Kept:
    """Judge every request of a level; there is at least one."""
    good = [record for record in records if is_good(record, limits)]
    asked_nothing = sum(record.tpot is None for record in good) if "tpot" in limits else 0
    return Kept(len(good), len(good) / len(records), asked_nothing)
