import itertools
import math
from itertools import pairwise
from typing import Any

import numpy as np
import pytest

from infopt.core.bench.arrivals import arrivals

COUNT = 4000
ALWAYS = 1.63
"""Kolmogorov's bound at 1%: of sqrt(n) times the largest distance."""


def gaps(kind: Any, rate: float, **more: Any) -> np.ndarray:
    times = list(itertools.islice(arrivals(kind, rate, seed="s", **more), COUNT))
    return np.array([later - earlier for earlier, later in pairwise([0.0, *times])])


def distance_to_exponential(found: np.ndarray, rate: float) -> float:
    """Kolmogorov and Smirnov's, times sqrt(n)."""
    ranked = np.sort(found)
    expected = 1 - np.exp(-rate * ranked)
    n = len(ranked)
    steps = np.arange(n)
    apart = max(np.max(expected - steps / n), np.max((steps + 1) / n - expected))
    return float(apart) * math.sqrt(n)


@pytest.mark.parametrize("rate", [0.5, 8.0, 300.0])
def test_poisson_gaps_are_exponential(rate: float) -> None:
    assert distance_to_exponential(gaps("poisson", rate), rate) < ALWAYS


def test_the_test_finds_what_is_not_poisson() -> None:
    assert distance_to_exponential(gaps("constant", 8.0), 8.0) > 10 * ALWAYS
    assert distance_to_exponential(gaps("gamma", 8.0, burstiness=0.7), 8.0) > ALWAYS
    assert distance_to_exponential(gaps("poisson", 8.0), 9.0) > ALWAYS


def test_gamma_of_shape_one_is_poisson() -> None:
    assert distance_to_exponential(gaps("gamma", 8.0, burstiness=1.0), 8.0) < ALWAYS


@pytest.mark.parametrize("burstiness", [0.25, 0.5, 4.0])
def test_gamma_keeps_the_rate_and_has_its_burstiness(burstiness: float) -> None:
    found = gaps("gamma", 5.0, burstiness=burstiness)
    assert found.mean() == pytest.approx(0.2, rel=0.1)
    assert found.std() / found.mean() == pytest.approx(1 / math.sqrt(burstiness), rel=0.1)


def test_constant_arrivals_begin_at_once() -> None:
    found = list(itertools.islice(arrivals("constant", 10.0, seed="s"), 8))
    assert found == pytest.approx([n / 10 for n in range(8)])


def test_the_seed_decides() -> None:
    def first(seed: str) -> list[float]:
        return list(itertools.islice(arrivals("poisson", 1.0, seed=seed), 5))

    assert first("a") == first("a") != first("b")
