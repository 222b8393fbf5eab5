"""What the pictures of a bench are drawn from: a few hundred numbers, however long the run."""

from infopt.core.reports.schema import Record


class Distribution(Record):
    """Values at evenly spaced shares of the requests, from the least (0) to the greatest (1)."""

    level: int
    """Of a sweep."""
    name: str
    """The latency: ttft, tpot, ..."""
    values: tuple[float, ...]
    """Seconds."""


class Timeline(Record):
    """The run in slices of equal length."""

    start_s: float
    slice_s: float
    in_flight: tuple[float, ...]
    """Requests sent and not ended, in the mean over each slice."""
    output_tokens_per_s: tuple[float, ...]
    """Tokens that arrived in each slice, over its length."""
    failed: tuple[int, ...]
    """Requests that failed in each slice."""


class BenchSeries(Record):
    distributions: tuple[Distribution, ...]
    timeline: Timeline | None
