"""The search for the highest request rate that keeps the limits: pure, from probe to probe."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from statistics import fmean

from infopt.core.reports.bench import Capacity

PRECISION = 1.05
"""The bracket is narrow enough when its ends are this factor apart."""
MAX_PROBES = 20
START_RATE = 1.0
_PIECES = 6
_MIN_LOOKS = 60
_GROWTH = 1.5


@dataclass(frozen=True, slots=True)
class Probe:
    """One level of the search."""

    rate: float
    met: bool


def next_rate(probes: Sequence[Probe], start: float) -> float | None:
    """The rate to try now; None where the search is over.

    Doubling and halving find a bracket, its geometric middle narrows it, and its lower end is tried
    once more at last: a load that is met by chance is found out.
    """
    if not probes:
        return start
    if len(probes) >= MAX_PROBES:
        return None
    met = [probe.rate for probe in probes if probe.met]
    missed = [probe.rate for probe in probes if not probe.met]
    if not missed:
        return max(met) * 2
    if not met:
        return min(missed) / 2
    low, high = max(met), min(missed)
    if low >= high:
        return None
    if high > low * PRECISION:
        return math.sqrt(low * high)
    return low if met.count(low) < 2 else None


def judge(probes: Sequence[Probe], attainment: float) -> Capacity:
    """What the probes say together."""
    missed = [probe.rate for probe in probes if not probe.met]
    high = min(missed, default=None)
    below = [p.rate for p in probes if p.met and (high is None or p.rate < high)]
    low = max(below, default=None)
    above = sorted({p.rate for p in probes if p.met and high is not None and p.rate >= high})
    contradictions = tuple(
        f"{rate:.4g} requests/s met the limits, {high:.4g} did not" for rate in above
    )
    narrow = low is not None and high is not None and high <= low * PRECISION
    confirmed = sum(probe.rate == low for probe in probes) > 1
    note = _note(low, high, narrow, confirmed, bool(contradictions))
    return Capacity(
        request_rate=low,
        attainment=attainment,
        met_up_to=low,
        missed_from=high,
        found=not note,
        contradictions=contradictions,
        note=note,
    )


def _note(
    low: float | None, high: float | None, narrow: bool, confirmed: bool, contradicted: bool
) -> str:
    if contradicted:
        return "probes contradict each other: use more requests a probe, or an idler machine"
    if high is None:
        return f"no rate was too high, up to {low:.4g} requests/s: the capacity is above it"
    if low is None:
        return f"no rate was low enough, down to {high:.4g} requests/s: the limits are not kept"
    if not narrow or not confirmed:
        return f"the bracket is not narrow yet: between {low:.4g} and {high:.4g} requests/s"
    return ""


def only_grows(outstanding: Sequence[int]) -> bool:
    """Whether a queue, looked at evenly since the load's start, did nothing but grow.

    The first sixth, in which every load fills up, is left out; of the rest each piece holds more in
    the mean than the one before, and the last half as much again as the first.
    """
    if len(outstanding) < _MIN_LOOKS:
        return False
    ends = [len(outstanding) * n // _PIECES for n in range(1, _PIECES + 1)]
    means = [fmean(outstanding[a:b]) for a, b in pairwise(ends)]
    rising = all(later > earlier for earlier, later in pairwise(means))
    return rising and means[-1] >= _GROWTH * means[0] and means[-1] >= means[0] + 1
