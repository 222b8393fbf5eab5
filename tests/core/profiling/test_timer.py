"""What is warm-up is not timed; the budget bounds the runs."""

import time

import pytest

from infopt.core.profiling.timer import Times, repeat, repeat_for


def test_median_and_best() -> None:
    times = Times((3.0, 1.0, 2.0, 9.0))
    assert times.median == 2.5
    assert times.best == 1.0


def test_warm_up_does_not_count() -> None:
    pauses = iter([0.05, 0.05, 0.0, 0.0, 0.0])
    times = repeat(lambda: time.sleep(next(pauses)), warmup=2, runs=3)
    assert len(times.runs) == 3
    assert times.best < 0.05
    with pytest.raises(StopIteration):
        next(pauses)


def test_a_budget_bounds_the_runs() -> None:
    few = repeat_for(lambda: time.sleep(0.02), seconds=0.0, warmup=0, least=3, most=15)
    assert len(few.runs) == 3
    most = repeat_for(lambda: None, seconds=5.0, warmup=0, least=3, most=15)
    assert len(most.runs) == 15
