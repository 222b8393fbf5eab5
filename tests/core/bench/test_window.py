import pytest

from infopt.core.bench.window import closed_window, flight_integral, open_window
from infopt.core.reports.requests import RequestRecord


def flew(sent: float, last: float, *, error: str | None = None) -> RequestRecord:
    return RequestRecord(
        index=0, scheduled=sent, sent=sent, first=last, last=last, ended=last, error=error
    )


def test_the_steady_window_leaves_ramp_and_drain_out() -> None:
    """Two workers: full from 1 to 4; the first starts alone, the last ends alone."""
    assert closed_window([flew(0.0, 2.0), flew(1.0, 4.0), flew(2.0, 9.0)], 2) == (1.0, 4.0)


def test_no_steady_window_if_the_load_was_never_full() -> None:
    assert closed_window([flew(0.0, 2.0)], 4) is None
    assert closed_window([], 4) is None


def test_a_failed_request_keeps_the_load_full() -> None:
    assert closed_window([flew(0.0, 2.0), flew(0.0, 2.0, error="lost")], 2) == (0.0, 2.0)


def test_an_open_loop_s_window_is_that_of_its_arrivals() -> None:
    records = [flew(float(n), n + 20.0) for n in range(11)]
    assert open_window(records) == (2.0, 10.0), "the ramp and the drain are left out"
    assert open_window(records[:1]) is None and open_window([]) is None


def test_request_seconds_in_flight() -> None:
    records = [flew(0.0, 2.0), flew(1.0, 4.0), flew(5.0, 6.0)]
    assert flight_integral(records, 0.0, 6.0) == pytest.approx(6.0)
    assert flight_integral(records, 1.0, 3.0) == pytest.approx(1.0 + 2.0)
