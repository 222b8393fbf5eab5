"""The numbers behind the pictures, against records whose picture is known."""

import numpy as np
import pytest

from infopt.core.bench.series import LEVELS, POINTS, SLICES, series
from infopt.core.reports.requests import RequestRecord


def request(index: int, sent: float, ended: float, **more: object) -> RequestRecord:
    values: dict[str, object] = {
        "index": index,
        "scheduled": sent,
        "sent": sent,
        "first": sent + 0.1,
        "last": ended,
        "ended": ended,
        "output_tokens": 3,
        "tokens_at_first": 1,
        "arrivals": ((sent + 0.1, 1.0), (ended, 2.0)),
    }
    return RequestRecord.model_validate(values | more)


def test_the_timeline_integrates_to_what_was_in_flight_and_arrived() -> None:
    records = [request(n, 0.3 * n, 0.3 * n + 1.0 + 0.1 * (n % 3)) for n in range(50)]
    timeline = series(records).timeline
    assert timeline is not None and len(timeline.in_flight) == SLICES
    flown = sum(record.ended - record.sent for record in records)
    assert sum(timeline.in_flight) * timeline.slice_s == pytest.approx(flown, rel=1e-3)
    tokens = sum(timeline.output_tokens_per_s) * timeline.slice_s
    assert tokens == pytest.approx(50 * 3, rel=1e-3)
    middle = timeline.in_flight[SLICES // 2]
    assert middle == pytest.approx(1.1 / 0.3, rel=0.35)  # Little's law
    assert sum(timeline.failed) == 0


def test_one_request_is_in_flight_all_along() -> None:
    timeline = series([request(0, 5.0, 7.0)]).timeline
    assert timeline is not None and timeline.start_s == 5.0
    assert timeline.in_flight == pytest.approx([1.0] * SLICES)
    assert timeline.output_tokens_per_s[-1] == pytest.approx(2.0 / timeline.slice_s, rel=1e-3)


def test_failures_are_in_the_timeline_and_in_no_distribution() -> None:
    broken = request(1, 0.5, 1.5, error="gone", last=None)
    found = series([request(0, 0.0, 2.0), broken])
    assert found.timeline is not None and sum(found.timeline.failed) == 1
    assert {curve.name: len(curve.values) for curve in found.distributions} == {
        "ttft": 1,
        "tpot": 1,
        "e2e": 1,
    }
    assert series([]).timeline is None and series([]).distributions == ()
    assert series([request(0, 1.0, 1.0, first=None, last=None, arrivals=())]).timeline is None


def test_a_distribution_is_its_quantiles_and_bounded() -> None:
    generator = np.random.default_rng(0)
    times = generator.exponential(size=5000)
    records = [request(n, 0.0, 0.2 + time) for n, time in enumerate(times)]
    curve = next(c for c in series(records).distributions if c.name == "e2e")
    assert len(curve.values) == POINTS
    expected = np.quantile(times + 0.2, np.linspace(0, 1, POINTS))
    assert curve.values == pytest.approx(expected, rel=1e-5)
    assert curve.values == tuple(sorted(curve.values))


def test_each_level_has_its_own_and_no_more_than_colours() -> None:
    records = [request(n, 0.0, 1.0 + level, level=level) for level in range(20) for n in range(2)]
    found = series(records)
    levels = sorted({curve.level for curve in found.distributions})
    assert len(levels) <= LEVELS and levels[0] == 0
    for curve in found.distributions:
        if curve.name == "e2e":
            assert curve.values == (1.0 + curve.level,) * 2
    assert len(found.model_dump_json()) < 60_000


def test_a_run_of_any_length_has_a_series_of_the_same_size() -> None:
    short = series([request(n, 0.1 * n, 0.1 * n + 1) for n in range(200)])
    long = series([request(n, 0.1 * n, 0.1 * n + 1) for n in range(5000)])
    assert len(long.model_dump_json()) < 1.3 * len(short.model_dump_json())
