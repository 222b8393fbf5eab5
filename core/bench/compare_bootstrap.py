"""Resampling requests in blocks, and intervals for several ratios at once: pure arithmetic."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from statistics import NormalDist

import numpy as np
from numpy.typing import NDArray

Floats = NDArray[np.float64]
CONFIDENCE = 0.95
LEAST_BLOCKS = 10
"""Blocks that a side is cut into at least, however long its correlations."""


@dataclass(frozen=True, slots=True)
class Interval:
    """Of a logarithm of a ratio: for it alone, and so that all of its family hold jointly."""

    low: float
    high: float
    joint_low: float
    joint_high: float


def block_length(series: Sequence[Floats]) -> int:
    """How many consecutive requests stay together: enough to keep what they share.

    Of each run's series the length that Politis and White's rule gives (2004, with the correction
    of 2009, for circular blocks), on ranks, so that a rare long request does not hide the
    correlation of the rest; the longest of them counts, at most a tenth of all requests of a run.
    """
    longest = max((_politis_white(_ranks(values)) for values in series), default=1.0)
    shortest = min((len(values) for values in series), default=1)
    return max(1, min(math.ceil(longest), shortest // LEAST_BLOCKS))


def _ranks(values: Floats) -> Floats:
    _, places, counts = np.unique(
        values[~np.isnan(values)], return_inverse=True, return_counts=True
    )
    # Equal values share the mean of their ranks: their order must make no trend.
    found: Floats = (np.cumsum(counts) - (counts - 1) / 2)[places]
    return found


def _politis_white(values: Floats) -> float:
    """The block length of least squared error of the variance of the mean."""
    count = len(values)
    if count < 8:
        return 1.0
    centred = values - values.mean()
    most = min(count - 1, math.ceil(math.sqrt(count)) + 5)
    covariance = np.array([centred[: count - lag] @ centred[lag:] for lag in range(most + 1)])
    covariance /= count
    if covariance[0] <= 0:
        return 1.0
    needed = max(5, math.ceil(math.sqrt(math.log10(count))))
    small = np.abs(covariance[1:] / covariance[0]) < 2 * math.sqrt(math.log10(count) / count)
    # The last lag before `needed` small ones in a row.
    last = next(
        (at for at in range(len(small) - needed + 1) if small[at : at + needed].all()), len(small)
    )
    reach = min(2 * max(last, 1), most)
    lags = np.arange(1, reach + 1)
    taper = np.minimum(1.0, 2 * (1 - lags / reach))
    spectrum = covariance[0] + 2 * float(taper @ covariance[1 : reach + 1])
    slope = 2 * float((taper * lags) @ covariance[1 : reach + 1])
    if spectrum <= 0:
        return 1.0
    best = (2 * slope**2 / (4 / 3 * spectrum**2)) ** (1 / 3) * count ** (1 / 3)
    return float(min(best, 3 * math.sqrt(count), count / 3))


def draw(
    lengths: Sequence[int],
    block: int,
    resamples: int,
    generator: np.random.Generator,
    *,
    chosen: NDArray[np.int64] | None = None,
) -> Floats:
    """How often each request is drawn in each resample: (resamples, all requests).

    Within a run, blocks of consecutive requests, as many requests as it has; past its end a block
    goes on at its beginning. `chosen` (resamples, runs) says how often each run is taken.
    """
    parts = []
    for run, length in enumerate(lengths):
        times = np.ones(resamples, np.int64) if chosen is None else chosen[:, run]
        parts.append(_draw_run(length, min(block, length), times, generator))
    return np.concatenate(parts, axis=1)


def choose_runs(runs: int, resamples: int, generator: np.random.Generator) -> NDArray[np.int64]:
    """How often each run is taken when as many as there are get drawn with replacement."""
    return generator.multinomial(runs, np.full(runs, 1 / runs), size=resamples)


def _draw_run(
    length: int, block: int, times: NDArray[np.int64], generator: np.random.Generator
) -> Floats:
    resamples, slots = len(times), int(times.max(initial=0))
    width = length + block
    edges = np.zeros(resamples * (width + 1))
    blocks = -(-length // block)
    rows = np.arange(resamples)[:, None] * (width + 1)
    for slot in range(slots):
        taken = np.repeat((times > slot).astype(np.float64)[:, None], blocks, axis=1)
        starts = generator.integers(length, size=(resamples, blocks))
        ends = starts + block
        ends[:, -1] = starts[:, -1] + length - (blocks - 1) * block
        for at, sign in ((starts, 1.0), (ends, -1.0)):
            edges += sign * np.bincount(
                (rows + at).ravel(), weights=taken.ravel(), minlength=len(edges)
            )
    counts = edges.reshape(resamples, width + 1).cumsum(axis=1)[:, :width]
    found: Floats = counts[:, :length].copy()
    found[:, : width - length] += counts[:, length:]
    return found


def quantiles(values: Floats, weights: Floats, shares: Sequence[float]) -> Floats:
    """Weighted quantiles (type 7) of one value a request: (resamples, shares).

    A NaN has no weight; an infinite value ranks last. A resample with no value gives NaN.
    """
    known = np.flatnonzero(~np.isnan(values))
    order = known[np.argsort(values[known], kind="stable")]
    return _read_off(values[order], weights[:, order].cumsum(axis=1), shares)


def binned_quantiles(
    bins: Floats,
    histograms: NDArray[np.float32],
    weights: Floats,
    shares: Sequence[float],
) -> Floats:
    """The same of many values a request: `histograms` (requests, bins) counts them by their bin."""
    counted = weights.astype(np.float32) @ histograms  # whole numbers: exact up to 2^24
    return _read_off(bins, counted.astype(np.float64).cumsum(axis=1), shares)


def _read_off(ranked: Floats, cumulative: Floats, shares: Sequence[float]) -> Floats:
    resamples, count = cumulative.shape
    found = np.full((resamples, len(shares)), math.nan)
    if count == 0:
        return found
    totals = cumulative[:, -1]
    full = totals > 0
    # Rows one behind the other rise all along: one search finds a place in each.
    stride = float(totals.max()) + 2.0
    offsets = np.arange(resamples) * stride
    flat = (cumulative + offsets[:, None]).ravel()
    starts = np.arange(resamples) * count
    for column, share in enumerate(shares):
        place = np.maximum(totals - 1, 0) * share
        low = np.floor(place)
        part = place - low
        ends = []
        for rank in (low, np.minimum(low + 1, np.maximum(totals - 1, 0))):
            at = np.searchsorted(flat, rank + offsets, side="right") - starts
            ends.append(ranked[np.clip(at, 0, count - 1)])
        with np.errstate(invalid="ignore"):
            between = np.where(
                (part == 0) | (ends[0] == ends[1]), ends[0], ends[0] * (1 - part) + ends[1] * part
            )
        found[:, column] = np.where(full, between, math.nan)
    return found


def intervals(estimates: Floats, resampled: Floats, units: int) -> list[Interval]:
    """Of each logarithm of a ratio, given its resamples (resamples, ratios).

    The interval is symmetric about the estimate, in units of the resamples' deviation; the joint
    one is as wide as the largest of all deviations wants it (max-t), so that all ratios lie within
    with 95%. Few blocks or runs (`units`) widen both as Student's t does a normal deviate. Where
    resamples are infinite, the interval is read off their ranks, shared out to all (Bonferroni).
    """
    finite = np.isfinite(resampled).all(axis=0) & np.isfinite(estimates)
    spread = np.where(finite, np.std(np.where(finite, resampled, 0.0), axis=0, ddof=1), 0.0)
    moving = finite & (spread > 0)
    away = np.abs(resampled[:, moving] - estimates[moving]) / spread[moving]
    joint = float(np.quantile(away.max(axis=1), CONFIDENCE)) if moving.any() else 0.0
    alone = dict(
        zip(
            np.flatnonzero(moving),
            np.quantile(away, CONFIDENCE, axis=0) if moving.any() else [],
            strict=True,
        )
    )
    found = []
    for at, estimate in enumerate(estimates):
        if not finite[at]:
            found.append(_by_rank(resampled[:, at], len(estimates)))
            continue
        one = student(float(alone.get(at, 0.0)), units - 1) * spread[at]
        all_ = student(max(joint, float(alone.get(at, 0.0))), units - 1) * spread[at]
        found.append(Interval(estimate - one, estimate + one, estimate - all_, estimate + all_))
    return found


def _by_rank(values: Floats, family: int) -> Interval:
    ranked = np.sort(values[~np.isnan(values)])
    if len(ranked) < 0.99 * len(values):
        return Interval(-math.inf, math.inf, -math.inf, math.inf)
    ends = []
    for tail in ((1 - CONFIDENCE) / 2, (1 - CONFIDENCE) / 2 / family):
        low = ranked[math.floor(tail * (len(ranked) - 1))]
        high = ranked[math.ceil((1 - tail) * (len(ranked) - 1))]
        ends += [float(low), float(high)]
    return Interval(*ends)


def student(deviate: float, freedom: int) -> float:
    """The t of that many degrees of freedom as likely to be passed as a normal deviate."""
    if deviate <= 0 or freedom > 1000:
        return max(deviate, 0.0)
    tail = 1 - NormalDist().cdf(deviate)
    low, high = deviate, deviate
    while _student_tail(high, max(freedom, 1)) > tail:
        high *= 2
    for _ in range(40):
        middle = (low + high) / 2
        low, high = (
            (middle, high) if _student_tail(middle, max(freedom, 1)) > tail else (low, middle)
        )
    return high


def _student_tail(t: float, freedom: int) -> float:
    """P(T > t), by the finite series for whole degrees of freedom (Abramowitz and Stegun 26.7)."""
    angle = math.atan2(t, math.sqrt(freedom))
    cosine, sine = math.cos(angle), math.sin(angle)
    odd = freedom % 2 == 1
    term = cosine if odd else 1.0
    total = 0.0
    for step in range(1 if odd else 0, freedom - 1, 2):
        total += term
        term *= cosine**2 * (step + 1) / (step + 2)
    within = 2 / math.pi * (angle + sine * total) if odd else sine * total
    return (1 - within) / 2
