from typing import Any

import pytest

from infopt.core.bench.slo import is_good, kept
from infopt.core.reports.requests import RequestRecord


def request(**more: Any) -> RequestRecord:
    """Due at 0, first token at 0.2, then 10 a second, 5 tokens in all."""
    values = {"first": 0.2, "first_output": 0.3, "last": 0.6, "output_tokens": 5} | more
    return RequestRecord(index=0, scheduled=0.0, sent=0.0, ended=0.6, tokens_at_first=1, **values)


@pytest.mark.parametrize(
    ("limits", "good"),
    [
        ({}, True),
        ({"ttft": 0.2}, True),
        ({"ttft": 0.19}, False),
        ({"ttfot": 0.3}, True),
        ({"ttfot": 0.29}, False),
        ({"tpot": 0.1001}, True),
        ({"tpot": 0.0999}, False),
        ({"e2e": 0.6}, True),
        ({"e2e": 0.59}, False),
        ({"ttft": 1.0, "tpot": 0.05}, False),
    ],
    ids=str,
)
def test_every_limit_must_be_kept(limits: dict[str, float], good: bool) -> None:
    assert is_good(request(), limits) is good


def test_an_undefined_tpot_keeps_its_limit_and_is_told() -> None:
    single = request(last=0.2, output_tokens=1)
    assert single.tpot is None and is_good(single, {"tpot": 1e-9})
    found = kept([single, request()], {"tpot": 0.2})
    assert (found.good, found.attainment, found.without_tpot) == (2, 1.0, 1)
    assert kept([single], {"ttft": 0.2}).without_tpot == 0


def test_failures_are_in_the_denominator() -> None:
    records = [request(), request(), request(), request(error="lost")]
    found = kept(records, {"ttft": 1.0})
    assert (found.good, found.attainment) == (3, 0.75)


def test_an_answer_that_never_came_misses_its_limit() -> None:
    assert not is_good(request(first_output=None), {"ttfot": 10.0})
