"""Timing work that is done when its call returns."""

import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Times:
    """Seconds of each run, in the order they were made."""

    runs: tuple[float, ...]

    @property
    def median(self) -> float:
        return statistics.median(self.runs)

    @property
    def best(self) -> float:
        return min(self.runs)


def timed(work: Callable[[], object]) -> float:
    """Seconds that one call takes."""
    began = time.perf_counter()
    work()
    return time.perf_counter() - began


def repeat(work: Callable[[], object], *, warmup: int, runs: int) -> Times:
    """Time `runs` calls after `warmup` calls that do not count."""
    for _ in range(warmup):
        work()
    return Times(tuple(timed(work) for _ in range(runs)))


def repeat_for(
    work: Callable[[], object], *, seconds: float, warmup: int = 3, least: int = 3, most: int = 15
) -> Times:
    """Time `least` to `most` calls, as many as fit in `seconds`; the warm-up is not in them."""
    for _ in range(warmup):
        work()
    began = time.perf_counter()
    runs: list[float] = []
    while len(runs) < least or (
        len(runs) < most and time.perf_counter() - began + min(runs) < seconds
    ):
        runs.append(timed(work))
    return Times(tuple(runs))
