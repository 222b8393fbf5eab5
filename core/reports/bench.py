"""The report of `infopt bench`."""

from typing import Literal

from pydantic import Field

from infopt.core.reports.bench_series import BenchSeries
from infopt.core.reports.schema import Percentiles, Record, Report


class TailPercentiles(Record):
    """Of all requests, failed ones counted as infinitely late; None stands for infinite."""

    p50: float | None
    p90: float | None
    p95: float | None
    p99: float | None
    infinite: tuple[str, ...] = ()
    """Which of them are."""


class LittlesLaw(Record):
    """L = λW over the whole run: two ways to the mean number of requests in flight."""

    sampled: float
    """L: of samples of a counter that the load keeps."""
    computed: float
    """λW: of the times in the records."""
    samples: int
    holds: bool | None
    """Within 5%, and beyond what so many samples can err by; None: too few to say."""


class ServerSample(Record):
    """One look at the server's /metrics; None where it does not tell."""

    time: float
    """Seconds from the run's start."""
    running: float | None
    waiting: float | None
    kv_use: float | None


class ServerMetrics(Record):
    """What the server said of itself beside the load."""

    samples: int
    running_median: float | None
    running_max: float | None
    waiting_median: float | None
    waiting_max: float | None
    kv_use_median: float | None
    kv_use_max: float | None
    prefix_hit_share: float | None
    """Prompt tokens found in the prefix cache of those looked for, during the run."""
    preemptions: float | None
    """During the run."""
    timeline: tuple[ServerSample, ...] = ()
    """A few hundred at most, evenly chosen."""


class LoadFigures(Record):
    """What one level of load came to."""

    requests: int
    completed: int
    failed: int
    errors: dict[str, int]
    """Failures by their message."""
    concurrency: int | None
    """Of a closed loop."""
    request_rate: float | None = None
    """Of an open loop, asked for."""
    max_concurrency: int | None = None
    duration_s: float
    ttft_s: Percentiles | None
    """Time to first token of any kind, from when the request was due (closed loop: sent)."""
    ttfot_s: Percentiles | None = None
    """The same to the first token of the answer itself: not of reasoning."""
    tpot_s: Percentiles | None
    """(last - first token) / (tokens - those in the first read), each request once; one token alone
    has none."""
    itl_s: Percentiles | None = None
    """Inter-token latency, each token after the first read once: gap / tokens that ended it."""
    chunk_gap_s: Percentiles | None = None
    """Between two reads with tokens, however many each brought."""
    e2e_s: Percentiles | None
    lag_s: Percentiles | None = None
    """From when a request was due to when it was sent."""
    with_failures: dict[str, TailPercentiles] = Field(default_factory=dict)
    """The same latencies by their keys, failed requests counted as infinitely late."""
    prompt_tokens: int
    output_tokens: int
    output_tokens_per_s: float
    """Over the whole run, ramp and drain included."""
    steady_output_tokens_per_s: float | None = None
    """In the steady window: closed loop, from the first to the last moment at which 95% of the
    concurrency was in flight; open loop, from a fifth of the arrivals' span to the last one."""
    steady_window_s: tuple[float, float] | None = None
    """Seconds from the run's start."""
    total_tokens_per_s: float
    requests_per_s: float | None = None
    """Completed, over the whole run."""
    goodput: float | None = None
    """Requests a second that kept every limit."""
    attainment: float | None = None
    """Share of all requests, failed ones among them, that did."""
    good_without_tpot: int | None = None
    """Of the good ones, those whose TPOT is undefined: its limit asks nothing of them."""
    cost_per_million_output_tokens: float | None = None
    littles_law: LittlesLaw | None = None
    loop_lag_s: Percentiles | None = None
    """How late this client's event loop woke when it had asked to be woken."""
    stopped_early: str | None = None
    """Why the level was broken off."""
    valid: bool = True
    invalid_reasons: tuple[str, ...] = ()
    notes: tuple[str, ...] = ()
    """What to keep in mind reading the numbers."""
    token_count_source: str
    """'usage' if the server counted, 'engine' if the engine here did, else 'chunks'; 'mixed'."""


class LevelReport(LoadFigures):
    """One level of a sweep, or one probe for the capacity."""

    level: int
    met: bool | None = None
    """Whether the attainment was reached; None where there are no limits."""
    server: ServerMetrics | None = None
    """What the server said of itself during this level."""


class Capacity(Record):
    """The highest request rate at which the attainment is reached."""

    request_rate: float | None
    """The highest rate that met it below all that did not."""
    attainment: float
    """Asked for."""
    met_up_to: float | None
    missed_from: float | None
    found: bool
    """Bracketed within 5%, confirmed, and by probes that agree."""
    contradictions: tuple[str, ...] = ()
    note: str = ""
    """Why it was not found."""


class BenchReport(LoadFigures, Report):
    """The figures at the top are those of `level`, where there are several."""

    command: str = "bench"
    target: str
    """The URL, or 'engine' for the engine in this process."""
    engine_command: str | None = None
    """The command that started the server, where it was started for this run."""
    load: Literal["closed loop", "open loop", "trace"] = "closed loop"
    workload: str = "synthetic"
    endpoint: str | None = None
    """'completions' or 'chat'; None for the engine in this process."""
    slo: dict[str, float] = Field(default_factory=dict)
    """Limits in seconds."""
    level: int = 0
    levels: tuple[LevelReport, ...] = ()
    """All levels of a sweep or a search, in the order they were run; one level alone is not
    repeated here."""
    max_goodput: float | None = None
    """Of the levels that reached the attainment."""
    capacity: Capacity | None = None
    server: ServerMetrics | None = None
    """None where the server has no /metrics, or they were not asked for."""
    files: tuple[str, ...] = ()
    """What lies beside the report."""
    series: BenchSeries | None = None
    """What the page is drawn from."""
