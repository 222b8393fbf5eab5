"""The report of `infopt bench compare`."""

from typing import Literal

from infopt.core.reports.schema import Record, Report

Verdict = Literal[
    "better", "worse", "equivalent", "no difference shown", "too few samples", "undefined"
]
"""better, worse: the whole joint interval lies beyond the threshold; equivalent: all of it lies
within; too few samples: no interval can be given; undefined: a side has no finite value."""


class ComparedMetric(Record):
    """One figure of both sides."""

    key: str
    """As in a bench report."""
    a: float | None
    b: float | None
    ratio: float | None
    """B over A."""
    low: float | None
    high: float | None
    """Between which the ratio lies with 95%, this figure looked at alone."""
    joint_low: float | None
    joint_high: float | None
    """The same so that all figures lie within theirs with 95%: what the verdict is by."""
    samples_a: int
    samples_b: int
    verdict: Verdict


class CompareReport(Report):
    command: str = "compare"
    a: tuple[str, ...]
    """The runs of side A, in their order."""
    b: tuple[str, ...]
    level: int
    """Of a sweep."""
    threshold: float
    """Share by which a figure may differ."""
    slo: dict[str, float]
    """Limits of goodput, in seconds."""
    metrics: tuple[ComparedMetric, ...]
    verdict: Verdict
    """worse if any figure is, else better if any is, else equivalent if all are that have one."""
    paired: bool
    """Whether the same requests of both sides were drawn together."""
    runs_drawn: bool
    """Whether whole runs were drawn as well as blocks within: with four or more a side."""
    block_length: int
    """Consecutive requests that were drawn together."""
    resamples: int
    seed: int
    forced: tuple[str, ...] = ()
    """Why this comparison would have been refused."""
