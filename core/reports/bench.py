"""The report of `infopt bench`."""

from infopt.core.reports.bench_series import BenchSeries
from infopt.core.reports.schema import Percentiles, Report


class BenchReport(Report):
    command: str = "bench"
    target: str
    """The URL, or 'engine' for the engine in this process."""
    requests: int
    completed: int
    failed: int
    errors: dict[str, int]
    """Failures by their message."""
    concurrency: int
    duration_s: float
    ttft_s: Percentiles | None
    """Time to first token, from sending; None if no request completed."""
    tpot_s: Percentiles | None
    """(last - first token) / (tokens - those in the first chunk); one token alone has none."""
    e2e_s: Percentiles | None
    prompt_tokens: int
    output_tokens: int
    output_tokens_per_s: float
    """Over the whole run, ramp and drain included."""
    steady_output_tokens_per_s: float | None = None
    """From the first to the last moment at which 95% of the concurrency was in flight."""
    total_tokens_per_s: float
    token_count_source: str
    """'usage' if the server counted, 'engine' if the engine here did, else 'chunks'; 'mixed'."""
    series: BenchSeries | None = None
    """What the page is drawn from."""
