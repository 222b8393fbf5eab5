"""Blocks, weights, quantiles and intervals, against what is known of them."""

import math

import numpy as np
import pytest

from infopt.core.bench.compare_bootstrap import (
    LEAST_BLOCKS,
    binned_quantiles,
    block_length,
    choose_runs,
    draw,
    intervals,
    quantiles,
    student,
)


def autoregressive(correlation: float, count: int, seed: int) -> np.ndarray:
    generator = np.random.default_rng(seed)
    found = np.empty(count)
    state = generator.standard_normal()
    for at in range(count):
        state = correlation * state + math.sqrt(1 - correlation**2) * generator.standard_normal()
        found[at] = state
    return found


def test_blocks_grow_with_the_correlation() -> None:
    def usual(correlation: float) -> float:
        return float(
            np.median([block_length([autoregressive(correlation, 1000, s)]) for s in range(40)])
        )

    assert usual(0.0) <= 3
    # The best length for AR(1) is (2 n)^(1/3) (2 c / (1 - c^2))^(2/3) / (4/3)^(1/3): 21 at c = 0.6.
    assert 12 <= usual(0.6) <= 32
    assert usual(0.9) > 1.5 * usual(0.6)


def test_a_block_is_never_longer_than_a_tenth_of_a_run() -> None:
    wandering = np.cumsum(np.random.default_rng(0).standard_normal(100))
    assert block_length([wandering]) == 100 // LEAST_BLOCKS
    assert block_length([np.ones(100)]) == 1
    assert block_length([np.arange(5.0)]) == 1
    assert block_length([]) == 1


def test_the_longest_of_all_series_counts() -> None:
    plain, wandering = autoregressive(0.0, 500, 1), autoregressive(0.9, 500, 1)
    assert block_length([plain, wandering]) == block_length([wandering]) > block_length([plain])


@pytest.mark.parametrize(("length", "block"), [(10, 3), (10, 10), (7, 1), (100, 9), (1, 1)])
def test_a_draw_has_as_many_requests_as_the_run(length: int, block: int) -> None:
    weights = draw([length, 4], block, 50, np.random.default_rng(0))
    assert weights.shape == (50, length + 4)
    assert (weights >= 0).all() and (weights == np.round(weights)).all()
    assert (weights[:, :length].sum(axis=1) == length).all()
    assert (weights[:, length:].sum(axis=1) == 4).all()


def test_a_draw_takes_each_request_once_in_the_mean_and_neighbours_together() -> None:
    weights = draw([40], 8, 4000, np.random.default_rng(0))
    assert weights.mean(axis=0) == pytest.approx(np.ones(40), abs=0.1)
    correlation = np.corrcoef(weights.T)
    assert correlation[10, 11] > 0.7 and correlation[39, 0] > 0.7  # past the end comes the start
    assert correlation[10, 25] < 0


def test_chosen_runs_are_drawn_as_often_as_they_were_chosen() -> None:
    generator = np.random.default_rng(0)
    chosen = choose_runs(3, 30, generator)
    assert (chosen.sum(axis=1) == 3).all() and chosen.max() > 1 and chosen.min() == 0
    weights = draw([5, 6, 7], 2, 30, generator, chosen=chosen)
    by_run = np.stack([w.sum(axis=1) for w in np.split(weights, [5, 11], axis=1)], axis=1)
    assert (by_run == chosen * [5, 6, 7]).all()


def test_weighted_quantiles_are_those_of_the_drawn_sample() -> None:
    generator = np.random.default_rng(3)
    values = generator.exponential(size=50)
    values[7] = math.nan
    weights = draw([50], 4, 20, generator)
    shares = [0.0, 0.5, 0.95, 0.99, 1.0]
    found = quantiles(values, weights, shares)
    for row, weight in zip(found, weights, strict=True):
        sample = np.repeat(values, weight.astype(int))
        sample = sample[~np.isnan(sample)]
        assert row == pytest.approx(np.quantile(sample, shares))


def test_infinite_values_rank_last_and_none_gives_nan() -> None:
    values = np.array([1.0, 2.0, math.inf, math.nan])
    found = quantiles(values, np.ones((1, 4)), [0.5, 0.99])
    assert found[0, 0] == 2.0 and found[0, 1] == math.inf
    nothing = quantiles(values, np.array([[0.0, 0, 0, 1]]), [0.5])
    assert math.isnan(nothing[0, 0])


def test_binned_quantiles_are_within_a_bin_of_the_sample() -> None:
    generator = np.random.default_rng(5)
    values = generator.exponential(size=(30, 40))
    bins = np.quantile(values, np.linspace(0, 1, 512))
    at = np.searchsorted(bins, values)
    histograms = np.stack([np.bincount(row, minlength=512) for row in at]).astype(float)
    weights = draw([30], 3, 10, generator)
    found = binned_quantiles(bins, histograms, weights, [0.5, 0.95])
    for row, weight in zip(found, weights, strict=True):
        sample = np.repeat(values, weight.astype(int), axis=0).ravel()
        assert row == pytest.approx(np.quantile(sample, [0.5, 0.95]), rel=0.03)


@pytest.mark.parametrize(
    ("deviate", "freedom", "expected"),
    # Tables: t of 0.975 for 1, 2, 3, 4, 10 and 30 degrees of freedom; of 0.995 for 5.
    [
        (1.959964, 1, 12.7062),
        (1.959964, 2, 4.3027),
        (1.959964, 3, 3.1824),
        (1.959964, 4, 2.7764),
        (1.959964, 10, 2.2281),
        (1.959964, 30, 2.0423),
        (2.575829, 5, 4.0321),
        (1.959964, 5000, 1.959964),
        (0.0, 3, 0.0),
    ],
)
def test_students_t_is_that_of_the_tables(deviate: float, freedom: int, expected: float) -> None:
    assert student(deviate, freedom) == pytest.approx(expected, abs=2e-4)


def test_joint_intervals_hold_jointly_and_single_ones_singly() -> None:
    generator = np.random.default_rng(11)
    truth, family, draws = np.zeros(8), 8, 400
    alone = jointly = 0
    for _ in range(draws):
        estimate = truth + generator.standard_normal(family)
        resampled = estimate + generator.standard_normal((1000, family))
        found = intervals(estimate, resampled, 5000)
        alone += found[0].low <= 0 <= found[0].high
        jointly += all(each.joint_low <= 0 <= each.joint_high for each in found)
    assert 0.92 <= alone / draws <= 0.98
    assert 0.92 <= jointly / draws <= 0.98


def test_few_units_widen_the_intervals_and_infinities_are_ranked() -> None:
    generator = np.random.default_rng(2)
    estimate = np.array([0.1, math.inf])
    resampled = np.stack(
        [0.1 + 0.01 * generator.standard_normal(1000), np.where(np.arange(1000) < 900, np.inf, 2)],
        axis=1,
    )
    many, few = intervals(estimate, resampled, 1000), intervals(estimate, resampled, 5)
    assert few[0].high - few[0].low > 1.3 * (many[0].high - many[0].low)
    assert many[1].low == 2 and many[1].high == math.inf
    unknown = np.full((100, 1), math.nan)
    assert intervals(np.array([0.0]), unknown, 9)[0].high == math.inf


def test_what_never_moves_has_no_width() -> None:
    (found,) = intervals(np.array([0.5]), np.full((300, 1), 0.5), 20)
    assert (found.low, found.high, found.joint_low, found.joint_high) == (0.5,) * 4
