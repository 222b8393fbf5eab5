import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from infopt.core.bench.metrics import (
    chunk_gaps,
    percentiles,
    tail_percentiles,
    token_gaps,
    tokens_between,
    values,
)
from infopt.core.reports.requests import RequestRecord

TIMES = st.lists(st.floats(0.001, 100), max_size=40)


def answered(
    *arrivals: tuple[float, float], scheduled: float = 0.0, error: str | None = None
) -> RequestRecord:
    """A request with these reads of tokens."""
    return RequestRecord(
        index=0,
        scheduled=scheduled,
        sent=scheduled,
        first=arrivals[0][0],
        first_output=arrivals[0][0],
        last=arrivals[-1][0],
        ended=arrivals[-1][0],
        output_tokens=int(sum(tokens for _, tokens in arrivals)),
        tokens_at_first=int(arrivals[0][1]),
        arrivals=arrivals,
        error=error,
    )


def test_percentiles_interpolate_linearly() -> None:
    found = percentiles([4.0, 1.0, 3.0, 2.0])
    assert found is not None
    assert (found.mean, found.p50, found.min, found.max) == (2.5, 2.5, 1.0, 4.0)
    assert math.isclose(found.p90, 3.7) and math.isclose(found.p99, 3.97)
    assert percentiles([]) is None
    single = percentiles([2.0])
    assert single is not None and single.p50 == single.p99 == 2.0


def test_tpot_weighs_requests_and_itl_weighs_tokens() -> None:
    """A short slow answer and a long fast one: half the requests, a tenth of the tokens."""
    slow = answered((1.0, 1), (2.0, 1))
    fast = answered((1.0, 1), *((1.0 + 0.1 * n, 1) for n in range(1, 10)))
    assert sorted(values([slow, fast], "tpot")) == pytest.approx([0.1, 1.0])
    assert np.mean(token_gaps([slow, fast])) == pytest.approx((1.0 + 9 * 0.1) / 10)


def test_a_read_of_several_tokens_is_one_chunk_gap_and_several_token_gaps() -> None:
    """sglang#12064: under speculation the gaps of chunks are not those of tokens."""
    record = answered((1.0, 3), (1.4, 4), (1.6, 2))
    assert chunk_gaps([record]) == pytest.approx([0.4, 0.2])
    assert token_gaps([record]) == pytest.approx([0.1] * 4 + [0.1] * 2)
    assert values([record], "tpot") == pytest.approx([0.1])


def test_failures_are_in_no_percentile_and_at_the_end_of_the_tails() -> None:
    good = [answered((1.0 + n, 1)) for n in range(9)]
    broken = answered((0.1, 1), error="lost")
    assert len(values([*good, broken], "ttft")) == 9
    tail = tail_percentiles(values([*good, broken], "ttft"), 1)
    assert tail is not None and tail.p50 == 5.5
    assert tail.p90 is tail.p95 is tail.p99 is None and tail.infinite == ("p90", "p95", "p99")
    assert tail_percentiles([], 0) is None
    only = tail_percentiles([], 3)
    assert only is not None and only.infinite == ("p50", "p90", "p95", "p99")


@given(TIMES)
def test_without_failures_tails_are_percentiles(found: list[float]) -> None:
    plain, tail = percentiles(found), tail_percentiles(found, 0)
    if plain is None or tail is None:
        assert plain is tail is None
        return
    assert tail.infinite == ()
    for key in ("p50", "p90", "p95", "p99"):
        assert getattr(tail, key) == pytest.approx(getattr(plain, key))


@given(TIMES, st.integers(0, 20))
def test_failures_only_make_tails_longer(found: list[float], failed: int) -> None:
    before, after = tail_percentiles(found, failed), tail_percentiles(found, failed + 1)
    assert after is not None
    for key in ("p50", "p90", "p95", "p99") if before is not None else ():
        low, high = getattr(before, key), getattr(after, key)
        assert high is None or (low is not None and high >= low)


@given(st.lists(st.tuples(st.floats(0.01, 1), st.integers(1, 5)), min_size=1, max_size=20))
def test_token_gaps_add_up_to_the_time_after_the_first_read(
    reads: list[tuple[float, int]],
) -> None:
    time, arrivals = 0.0, []
    for gap, tokens in reads:
        time += gap
        arrivals.append((time, float(tokens)))
    record = answered(*arrivals)
    gaps = token_gaps([record])
    assert sum(gaps) == pytest.approx(arrivals[-1][0] - arrivals[0][0])
    assert len(gaps) == record.output_tokens - record.tokens_at_first
    if record.tpot is not None:
        assert record.tpot == pytest.approx(float(np.mean(gaps)))


def test_tokens_in_a_window() -> None:
    records = [answered((1.0, 2), (2.0, 3), (3.0, 5)), answered((2.5, 7), error="lost")]
    assert tokens_between(records, 1.0, 2.5) == 3, "its start is not of it, and failures are not"
    assert tokens_between(records, 0.0, 3.0) == 10
