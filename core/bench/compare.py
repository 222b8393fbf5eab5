"""The door: two sides of runs, and what can be said of their difference."""

import math
from collections.abc import Sequence

import numpy as np

from infopt.core.bench.compare_bootstrap import (
    Floats,
    Interval,
    block_length,
    choose_runs,
    draw,
    intervals,
)
from infopt.core.bench.compare_inputs import Run, objections, remarks
from infopt.core.bench.compare_series import (
    RATES,
    Figures,
    Side,
    enough,
    figures,
    samples,
    series,
    side,
)
from infopt.core.errors import UsageError
from infopt.core.progress import Progress, ProgressCallback, silent
from infopt.core.reports.compare import ComparedMetric, CompareReport, Verdict
from infopt.core.reports.requests import RequestRecord

RESAMPLES = 2000
THRESHOLD = 0.05
RUNS_DRAWN = 4
"""Runs a side from which on whole runs are drawn too."""
_AT_ONCE = 4_000_000
"""Weights that are held at a time."""
_GRAVEST: tuple[Verdict, ...] = ("worse", "better", "no difference shown", "equivalent")


def compare(
    a: Sequence[Run],
    b: Sequence[Run],
    *,
    threshold: float = THRESHOLD,
    resamples: int = RESAMPLES,
    seed: int = 0,
    level: int | None = None,
    force: bool = False,
    progress: ProgressCallback = silent,
) -> CompareReport:
    """The figures of side B over those of side A, each with its interval and verdict.

    `threshold` is the share by which a figure may differ. Raises UsageError where the runs are
    invalid, unlike or without partners, unless `force`; the report then says so.
    """
    against = tuple(objections(a, b, level))
    if against and not force:
        more = f", and {len(against) - 1} more such" if len(against) > 1 else ""
        raise UsageError(f"{against[0]}{more}", "--force compares even so, and the report says it")
    limits = a[0].limits if a[0].limits == b[0].limits else {}
    report = judge(
        [run.records for run in a],
        [run.records for run in b],
        threshold=threshold,
        resamples=resamples,
        seed=seed,
        limits=limits,
        progress=progress,
    )
    return report.model_copy(
        update={
            "a": tuple(str(run.path) for run in a),
            "b": tuple(str(run.path) for run in b),
            "level": a[0].records[0].level,
            "forced": against,
            "warnings": (*(f"compared by force: {text}" for text in against), *remarks(a, b)),
        }
    )


def judge(
    a: Sequence[Sequence[RequestRecord]],
    b: Sequence[Sequence[RequestRecord]],
    *,
    threshold: float = THRESHOLD,
    resamples: int = RESAMPLES,
    seed: int = 0,
    limits: dict[str, float] | None = None,
    progress: ProgressCallback = silent,
) -> CompareReport:
    """The same of records alone, run by run: a pure function of them and of the seed."""
    one, other = side(a, limits or {}), side(b, limits or {})
    found = figures(one, other)
    block = block_length([*series(one), *series(other)])
    paired = [[r.index for r in run] for run in map(_ordered, a)] == [
        [r.index for r in run] for run in map(_ordered, b)
    ]
    runs_drawn = min(len(a), len(b)) >= RUNS_DRAWN and len(a) == len(b)
    binned = [found.of(each, np.ones((1, len(each.tokens))))[0] for each in (one, other)]
    first, second = found.exact(one, binned[0]), found.exact(other, binned[1])
    judged = np.array([enough(one, key) and enough(other, key) for key in found.keys])
    with np.errstate(divide="ignore", invalid="ignore"):
        estimates = np.log(second / first)
        shift = np.log(binned[1] / binned[0]) - estimates
        drawn = _resampled(found, one, other, block, resamples, seed, paired, runs_drawn, progress)
        drawn -= np.where(np.isfinite(shift), shift, 0.0)  # what binning moves them by
    judged &= ~np.isnan(estimates)
    units = (
        len(a)
        if runs_drawn
        else sum(min(lengths) // block for lengths in zip(one.lengths, other.lengths, strict=False))
    )
    told = iter(intervals(estimates[judged], drawn[:, judged], units) if judged.any() else [])
    metrics = tuple(
        _metric(
            key,
            (float(first[at]), float(second[at])),
            (samples(one, key), samples(other, key)),
            next(told) if judged[at] else None,
            threshold,
        )
        for at, key in enumerate(found.keys)
    )
    return CompareReport(
        provenance={"metrics": "computed", "block_length": "computed"},
        a=(),
        b=(),
        level=0,
        threshold=threshold,
        slo=limits or {},
        metrics=metrics,
        verdict=_overall(metrics),
        paired=paired,
        runs_drawn=runs_drawn,
        block_length=block,
        resamples=resamples,
        seed=seed,
    )


def _ordered(run: Sequence[RequestRecord]) -> list[RequestRecord]:
    return sorted(run, key=lambda record: record.index)


def _resampled(
    found: Figures,
    a: Side,
    b: Side,
    block: int,
    resamples: int,
    seed: int,
    paired: bool,
    runs_drawn: bool,
    progress: ProgressCallback,
) -> Floats:
    """The logarithms of the ratios: (resamples, figures).

    Runs are drawn by rounds, one of each side together: what both sides saw of the machine in a
    round stays together. Of requests with a partner, both are drawn.
    """
    generator = np.random.default_rng(seed)
    rows = max(1, min(resamples, _AT_ONCE // max(len(a.tokens), len(b.tokens))))
    parts = []
    for start in range(0, resamples, rows):
        count = min(rows, resamples - start)
        chosen = choose_runs(len(a.lengths), count, generator) if runs_drawn else None
        weights = draw(a.lengths, block, count, generator, chosen=chosen)
        others = weights if paired else draw(b.lengths, block, count, generator, chosen=chosen)
        parts.append(np.log(found.of(b, others) / found.of(a, weights)))
        progress(Progress("resampling", start + count, resamples))
    return np.concatenate(parts)


def _metric(
    key: str,
    values: tuple[float, float],
    counts: tuple[int, int],
    interval: Interval | None,
    threshold: float,
) -> ComparedMetric:
    a, b = values
    ratio = b / a if a and math.isfinite(a) and math.isfinite(b) else None
    ends = (None,) * 4 if interval is None else _ends(interval)
    return ComparedMetric(
        key=key,
        a=a if math.isfinite(a) else None,
        b=b if math.isfinite(b) else None,
        ratio=ratio,
        low=ends[0],
        high=ends[1],
        joint_low=ends[2],
        joint_high=ends[3],
        samples_a=counts[0],
        samples_b=counts[1],
        verdict=_verdict(key, values, interval, threshold),
    )


def _ends(interval: Interval) -> tuple[float, float, float, float]:
    low, high, joint_low, joint_high = (
        math.exp(min(end, 700.0)) if end < 700 else math.inf
        for end in (interval.low, interval.high, interval.joint_low, interval.joint_high)
    )
    return low, high, joint_low, joint_high


def _verdict(
    key: str, values: tuple[float, float], interval: Interval | None, threshold: float
) -> Verdict:
    if interval is None:
        # Both infinite, or both nothing: a ratio of which nothing can be said.
        defined = not math.isnan(values[1] / values[0] if values[0] else math.nan)
        return "too few samples" if defined else "undefined"
    bound = math.log1p(threshold)
    low, high = interval.joint_low, interval.joint_high
    if key in RATES:  # more is better
        low, high = -high, -low
    if low > bound:
        return "worse"
    if high < -bound:
        return "better"
    return "equivalent" if -bound <= low and high <= bound else "no difference shown"


def _overall(metrics: Sequence[ComparedMetric]) -> Verdict:
    told = {metric.verdict for metric in metrics}
    return next((verdict for verdict in _GRAVEST if verdict in told), "too few samples")
