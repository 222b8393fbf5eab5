import random
from typing import Any

import pytest

from infopt.core.bench.validity import MIN_SAMPLES, invalid_reasons, littles_law
from infopt.core.reports.requests import RequestRecord


def flew(sent: float, ended: float, **more: Any) -> RequestRecord:
    values = {"scheduled": sent, "first": sent + 0.1, "last": ended, "output_tokens": 4} | more
    return RequestRecord(index=0, sent=sent, ended=ended, **values)


def load(count: int = 100, residence: float = 1.5) -> list[RequestRecord]:
    return [flew(0.1 * n, 0.1 * n + residence) for n in range(count)]


def looked(records: list[RequestRecord], count: int = 1000) -> list[int]:
    rng, end = random.Random(0), max(record.ended for record in records)
    times = [rng.uniform(0, end) for _ in range(count)]
    return [sum(r.sent <= time < r.ended for r in records) for time in times]


def reasons(records: list[RequestRecord], **more: Any) -> list[str]:
    values: dict[str, Any] = {
        "open_loop": True,
        "loop_lags": [],
        "little": None,
        "max_failed": 0.05,
    }
    return list(invalid_reasons(records, **(values | more)))


def test_littles_law_holds_for_true_times() -> None:
    records = load()
    law = littles_law(records, looked(records), 0.0, max(r.ended for r in records))
    assert law is not None and law.holds is True
    assert law.computed == pytest.approx(100 * 1.5 / 11.4)


@pytest.mark.parametrize("factor", [0.9, 1.1])
def test_littles_law_breaks_for_times_that_are_wrong_by_a_tenth(factor: float) -> None:
    """The records' residence times are not those that the counter saw."""
    seen = looked(load())
    wrong = load(residence=1.5 * factor)
    law = littles_law(wrong, seen, 0.0, 11.4)
    assert law is not None and law.holds is False
    assert "Little's law does not hold" in reasons(wrong, little=law)[0]


def test_few_looks_say_nothing_of_littles_law() -> None:
    law = littles_law(load(), [50] * 20, 0.0, 11.4)
    assert law is not None and law.holds is None
    assert reasons(load(), little=law) == []
    assert littles_law(load(), [], 0.0, 11.4) is None


def test_a_good_run_is_valid() -> None:
    assert reasons(load()) == []


def test_too_many_failures() -> None:
    records = [*load(19), flew(0.0, 1.0, error="lost")]
    assert reasons(records) == [], "5% are allowed"
    (said,) = reasons([*records, flew(0.0, 1.0, error="lost")])
    assert said.startswith("2 of 21 requests failed, more than 5%")


def test_too_few_samples() -> None:
    (said,) = reasons(load(MIN_SAMPLES - 1))
    assert "9 requests completed: fewer than 10" in said


def test_requests_sent_late_by_the_client_itself() -> None:
    """p99 TTFT is 0.1 s: 5 ms of lag are allowed."""
    late = [flew(n + 0.006, n + 1.0, scheduled=float(n), released=float(n)) for n in range(50)]
    assert "sent 6.0 ms late" in reasons(late)[0]
    assert reasons(late, open_loop=False) == []


def test_a_wait_under_our_own_bound_is_no_fault_of_the_client() -> None:
    waited = [flew(n + 3.0, n + 4.0, scheduled=float(n), released=n + 3.0) for n in range(50)]
    assert reasons(waited) == []


def test_an_event_loop_that_wakes_late() -> None:
    lags = [0.0001] * 95 + [0.02] * 5
    assert "event loop woke 20.0 ms late" in reasons(load(), loop_lags=lags)[0]
    assert reasons(load(), loop_lags=[0.004] * 100) == [], "5 ms are nothing"
    slow = [flew(float(n), n + 5.0, first=n + 2.0) for n in range(50)]
    assert reasons(slow, loop_lags=lags) == [], "20 ms are less than 5% of 2 s"
