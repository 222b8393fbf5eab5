"""Comparisons: right on loads whose truth is known, and refused where nothing can be said."""

import math
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

from infopt.core.bench.compare import compare, judge
from infopt.core.bench.compare_inputs import Run
from infopt.core.errors import UsageError
from infopt.core.reports.compare import ComparedMetric, CompareReport
from infopt.core.reports.requests import RequestRecord

Floats = NDArray[np.float64]
TOKENS = 4
CONCURRENCY = 8


def records(ttft: Floats, tpot: Floats, sent: Floats) -> list[RequestRecord]:
    """One run: each request with TOKENS tokens, one a read."""
    found = []
    for index, (first, rest, at) in enumerate(zip(ttft, tpot, sent, strict=True)):
        times = [at + first + n * rest for n in range(TOKENS)]
        found.append(
            RequestRecord.model_construct(
                index=index,
                level=0,
                scheduled=float(at),
                sent=float(at),
                first=times[0],
                first_output=times[0],
                last=times[-1],
                ended=times[-1],
                output_tokens=TOKENS,
                tokens_at_first=1,
                arrivals=tuple((time, 1.0) for time in times),
                error=None,
            )
        )
    return found


def autoregressive(
    seeds: int, requests: int, *, slower: float = 1.0, correlation: float = 0.6, first_seed: int = 0
) -> Iterator[list[RequestRecord]]:
    """Closed loops whose latencies wander: AR(1) in their logarithms, a deviation of 25%.

    `slower` multiplies every time, so that every latency's true ratio is `slower` itself.
    """
    generator = np.random.default_rng([first_seed, seeds, requests])
    state = generator.standard_normal((2, seeds))
    path = np.empty((2, seeds, requests))
    for at in range(requests):
        fresh = generator.standard_normal((2, seeds)) * np.sqrt(1 - correlation**2)
        state = correlation * state + fresh
        path[:, :, at] = state
    # What the two latencies share, and what each has of its own.
    ttft = 0.1 * slower * np.exp(0.25 * path[0])
    tpot = 0.02 * slower * np.exp(0.25 * (0.6 * path[0] + 0.8 * path[1]))
    sent = np.cumsum(ttft + (TOKENS - 1) * tpot, axis=1) / CONCURRENCY
    sent = np.pad(sent, ((0, 0), (1, 0)))[:, :-1]
    for each in range(seeds):
        yield records(ttft[each], tpot[each], sent[each])


def queued(
    seeds: int, requests: int, *, slower: float = 1.0, load: float = 0.6, first_seed: int = 0
) -> Iterator[list[RequestRecord]]:
    """Open loops, Poisson at one server: the queue makes bursts of late requests (Lindley)."""
    generator = np.random.default_rng([first_seed, seeds, requests, 1])
    gaps = generator.exponential(0.1 / load, (seeds, requests + 200))
    services = slower * 0.1 * generator.gamma(4.0, 0.25, (seeds, requests + 200))
    waits = np.zeros((seeds, requests + 200))
    for at in range(1, requests + 200):
        waits[:, at] = np.maximum(0.0, waits[:, at - 1] + services[:, at - 1] - gaps[:, at])
    sent = np.cumsum(gaps, axis=1)[:, 200:]  # the beginning, when the queue was empty, is left out
    sent -= sent[:, :1]
    ttft = waits[:, 200:] + 0.4 * services[:, 200:]
    tpot = 0.6 * services[:, 200:] / (TOKENS - 1)
    for each in range(seeds):
        yield records(ttft[each], tpot[each], sent[each])


def run_of(records: Sequence[RequestRecord], name: str = "run", **more: Any) -> Run:
    failed = sum(not record.completed for record in records)
    settings = {"requests": len(records), "concurrency": CONCURRENCY, "seed": 0, "dtype": "auto"}
    report = {
        "command": "bench",
        "completed": len(records) - failed,
        "failed": failed,
        "valid": True,
        "made": {"settings": settings, "created": "2026-01-01T00:00:00+00:00"},
        **more,
    }
    return Run(Path(name), report, tuple(records))


def one(slower: float = 1.0, requests: int = 300, seed: int = 0) -> list[RequestRecord]:
    return next(autoregressive(1, requests, slower=slower, first_seed=seed))


def metric(report: CompareReport, key: str) -> ComparedMetric:
    return next(each for each in report.metrics if each.key == key)


def changed(record: RequestRecord, **values: Any) -> RequestRecord:
    return record.model_copy(update=values)


SEEDS = 200
LIMITS = {"ttft": 0.15, "tpot": 0.03}


def compared(
    a: Iterator[list[RequestRecord]], b: Iterator[list[RequestRecord]], limits: dict[str, float]
) -> list[CompareReport]:
    return [
        judge([x], [y], resamples=200, seed=seed, limits=limits)
        for seed, (x, y) in enumerate(zip(a, b, strict=True))
    ]


def share(of: Sequence[bool]) -> float:
    return sum(of) / len(of)


def covered(report: CompareReport, truth: float, *, jointly: bool) -> list[bool]:
    """Which of the latencies' intervals hold the true ratio."""
    found = [m for m in report.metrics if m.low is not None and m.key.partition("_s.")[1]]
    ends = [(m.joint_low, m.joint_high) if jointly else (m.low, m.high) for m in found]
    return [bool(low and high and low <= truth <= high) for low, high in ends]


@pytest.mark.slow
@pytest.mark.parametrize("load", [autoregressive, queued], ids=lambda load: load.__name__)
def test_two_runs_of_the_same_are_rarely_told_apart(load: Any) -> None:
    """A/A: over the whole family of figures, at most 5% false verdicts."""
    reports = compared(load(SEEDS, 300, first_seed=1), load(SEEDS, 300, first_seed=2), LIMITS)
    false = share([report.verdict in ("worse", "better") for report in reports])
    assert len(reports) == SEEDS and all(len(report.metrics) == 17 for report in reports)
    assert false <= 0.05, f"false verdicts in {false:.1%}"


@pytest.fixture(scope="module")
def slowed() -> list[CompareReport]:
    """A closed loop beside one that takes a fifth longer for everything."""
    return compared(
        autoregressive(SEEDS // 2, 400, first_seed=3),
        autoregressive(SEEDS // 2, 400, first_seed=4, slower=1.2),
        LIMITS,
    )


@pytest.mark.slow
def test_a_slowdown_of_a_fifth_is_found(slowed: list[CompareReport]) -> None:
    found = share([report.verdict == "worse" for report in slowed])
    assert len(slowed) == SEEDS // 2 and found >= 0.80, f"found in {found:.1%}"
    assert share([any(m.verdict == "better" for m in r.metrics) for r in slowed]) <= 0.05


@pytest.mark.slow
def test_a_slower_server_is_found_by_its_queue() -> None:
    queues = queued(60, 600, first_seed=3), queued(60, 600, first_seed=4, slower=1.2)
    found = share([report.verdict == "worse" for report in compared(*queues, LIMITS)])
    assert found >= 0.80, f"found in {found:.1%}"


@pytest.mark.slow
def test_intervals_hold_what_they_promise(slowed: list[CompareReport]) -> None:
    alone = share([each for report in slowed for each in covered(report, 1.2, jointly=False)])
    jointly = share([all(covered(report, 1.2, jointly=True)) for report in slowed])
    assert alone >= 0.91, f"{alone:.1%}"
    assert jointly >= 0.91, f"{jointly:.1%}"


@pytest.mark.slow
def test_runs_that_differ_among_themselves_are_not_told_apart() -> None:
    """Five rounds a side, each run by up to some percent faster or slower for no reason of ours."""
    generator = np.random.default_rng(9)
    false = []
    for seed in range(60):
        paces = np.exp(0.05 * generator.standard_normal(10))
        runs = [
            next(autoregressive(1, 100, slower=float(pace), first_seed=1000 + 10 * seed + at))
            for at, pace in enumerate(paces)
        ]
        report = judge(runs[:5], runs[5:], resamples=200, seed=seed)
        assert report.runs_drawn
        false.append(report.verdict in ("worse", "better"))
    assert share(false) <= 0.05, f"{share(false):.1%}"


def test_a_run_beside_itself_is_equivalent_and_twice_the_time_is_worse() -> None:
    same = judge([one()], [one()], resamples=200)
    assert same.verdict == "equivalent" and same.paired and not same.runs_drawn
    assert {m.ratio for m in same.metrics} == {1.0}
    double = judge([one()], [one(2.0)], resamples=200)
    for key in ("ttft_s.p50", "tpot_s.p50", "itl_s.p95", "e2e_s.p95"):
        found = metric(double, key)
        assert found.ratio == pytest.approx(2.0) and found.verdict == "worse"
        assert found.low and found.high and found.low <= 2.0 <= found.high
    pace = metric(double, "output_tokens_per_s")
    assert pace.ratio == pytest.approx(0.5) and pace.verdict == "worse"
    back = judge([one(2.0)], [one()], resamples=200)
    assert back.verdict == "better" and metric(back, "output_tokens_per_s").verdict == "better"


def test_figures_are_those_of_the_whole_run() -> None:
    run = one(requests=120)
    report = judge([run], [run], resamples=200, limits={"ttft": 0.1})
    ttft = [r.ttft for r in run]
    assert metric(report, "ttft_s.p95").a == pytest.approx(np.quantile(ttft, 0.95))  # type: ignore[arg-type]
    gaps = np.concatenate([np.diff([time for time, _ in r.arrivals]) for r in run])
    assert metric(report, "itl_s.p95").a == pytest.approx(np.quantile(gaps, 0.95))
    span = max(r.ended for r in run) - min(r.scheduled for r in run)
    assert metric(report, "output_tokens_per_s").a == pytest.approx(120 * TOKENS / span)
    good = sum(r.ttft <= 0.1 for r in run if r.ttft is not None)
    assert 0 < good < 120 and metric(report, "goodput").a == pytest.approx(good / span)
    assert metric(report, "ttft_s.p95").samples_a == 120
    assert metric(report, "itl_s.p95").samples_a == 120 * (TOKENS - 1)


def test_a_percentile_without_samples_beyond_it_has_no_interval() -> None:
    report = judge([one(requests=199)], [one(2.0, requests=199)], resamples=200)
    for key, verdict in (("ttft_s.p50", "worse"), ("ttft_s.p95", "too few samples")):
        assert metric(report, key).verdict == verdict
    assert metric(report, "ttft_s.p95").low is None and metric(report, "ttft_s.p95").ratio
    tiny = judge([one(requests=16)], [one(2.0, requests=16)], resamples=200)
    assert {m.verdict for m in tiny.metrics} == {"too few samples"} == {tiny.verdict}


def test_a_failed_request_is_infinitely_late() -> None:
    """A side that drops its slow requests is not the better for it."""
    whole = one(requests=400)
    slow = sorted(whole, key=lambda r: r.ttft or 0)[-80:]
    dropped = {r.index for r in slow}
    broken = [changed(r, error="gone", last=None) if r.index in dropped else r for r in whole]
    report = judge([whole], [broken], resamples=300)
    found = metric(report, "ttft_s.p95")
    assert found.b is None and found.ratio is None and found.verdict == "worse"
    assert found.low == math.inf or (found.low and found.low > 1.05)
    both = judge([broken], [broken], resamples=300)
    assert metric(both, "ttft_s.p95").verdict == "undefined"


def test_answers_of_one_token_have_no_tpot_and_no_itl() -> None:
    short = [
        changed(r, output_tokens=1, last=r.first, ended=r.first, arrivals=r.arrivals[:1])
        for r in one(requests=100)
    ]
    report = judge([short], [short], resamples=200)
    assert {m.key.partition(".")[0] for m in report.metrics} == {
        "ttft_s",
        "ttfot_s",
        "e2e_s",
        "output_tokens_per_s",
    }


def test_the_same_seed_gives_the_same_report() -> None:
    a, b = one(seed=1), one(1.1, seed=2)
    first = judge([a], [b], resamples=300, seed=7)
    assert first == judge([a], [b], resamples=300, seed=7)
    assert first != judge([a], [b], resamples=300, seed=8)


def test_the_order_in_which_records_were_written_says_nothing() -> None:
    a, b = one(seed=1), one(1.1, seed=2)
    assert judge([a[::-1]], [b], resamples=200) == judge([a], [b], resamples=200)


def test_the_threshold_decides() -> None:
    a, b = one(requests=600), one(1.1, requests=600)  # the same noise on both sides
    assert judge([a], [b], resamples=200).verdict == "worse"
    assert judge([a], [b], resamples=200, threshold=0.2).verdict == "equivalent"
    assert judge([a], [b], resamples=200, threshold=0.1001).verdict != "worse"


def test_four_runs_a_side_are_drawn_whole_and_three_are_not() -> None:
    runs = [one(requests=60, seed=seed) for seed in range(8)]
    assert judge(runs[:4], runs[4:], resamples=200).runs_drawn
    assert not judge(runs[:3], runs[4:7], resamples=200).runs_drawn


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"valid": False, "invalid_reasons": ["the client was saturated"]}, "client was saturated"),
        ({"completed": 12}, "12 requests in the report, 40 in requests.jsonl"),
        ({"made": {"settings": {"requests": 41, "seed": 0}}}, "requests (40 and 41)"),
        ({"made": {"settings": {"requests": 40, "concurrency": 8, "seed": 5}}}, "seed (0 and 5)"),
    ],
)
def test_what_cannot_be_compared_is_refused_unless_forced(
    change: dict[str, Any], words: str
) -> None:
    a, b = run_of(one(requests=40), "a"), run_of(one(requests=40), "b", **change)
    with pytest.raises(UsageError, match="--force") as caught:
        compare([a], [b])
    assert words in str(caught.value) and "\n" not in str(caught.value)
    report = compare([a], [b], force=True, resamples=200)
    assert any(words in text for text in report.forced)
    assert any(words in text for text in report.warnings)


def test_what_the_target_is_may_differ() -> None:
    settings = {"requests": 40, "concurrency": CONCURRENCY, "seed": 0, "dtype": "float32"}
    other = run_of(one(requests=40), "b", made={"settings": settings, "created": ""})
    report = compare([run_of(one(requests=40), "a")], [other], resamples=200)
    assert report.forced == () and (report.a, report.b) == (("a",), ("b",))


def test_requests_and_runs_without_partner_are_refused() -> None:
    whole = one(requests=40)
    asked = {"settings": {"requests": 40, "seed": 0}, "created": ""}
    a = run_of(whole, "a", made=asked)
    with pytest.raises(UsageError, match="1 requests have no partner"):
        compare([a], [run_of(whole[:-1], "b", made=asked)])
    with pytest.raises(UsageError, match="2 runs of A and 1 of B"):
        compare([a, a], [a])
    report = compare([a], [run_of(whole[:-1], "b", made=asked)], force=True, resamples=200)
    assert not report.paired
    timed = {"settings": {"duration": 5.0, "seed": 0}, "created": ""}  # ends where it ends
    sides = [run_of(whole, "a", made=timed), run_of(whole[:-1], "b", made=timed)]
    assert not compare(sides[:1], sides[1:], resamples=200).paired


def test_runs_that_were_not_interleaved_are_told() -> None:
    def at(hour: int, seed: int) -> Run:
        made = {"settings": {"seed": 0}, "created": f"2026-01-01T{hour:02d}:00:00+00:00"}
        return run_of(one(requests=40, seed=seed), str(hour), made=made)

    apart = compare([at(1, 1), at(2, 2)], [at(3, 3), at(4, 4)], resamples=200)
    assert any("drifted" in text for text in apart.warnings)
    turns = compare([at(1, 1), at(3, 2)], [at(2, 3), at(4, 4)], resamples=200)
    assert not any("drifted" in text for text in turns.warnings)
    assert any("fewer than four runs" in text for text in turns.warnings)
    alone = compare([at(1, 1)], [at(2, 2)], resamples=200)
    assert any("one run a side" in text for text in alone.warnings)


def test_goodput_wants_the_same_limits_on_both_sides() -> None:
    a = run_of(one(requests=40), "a", slo={"ttft": 0.1})
    same = compare([a], [run_of(one(requests=40), "b", slo={"ttft": 0.1})], resamples=200)
    assert metric(same, "goodput").a and same.slo == {"ttft": 0.1}
    other = compare([a], [run_of(one(requests=40), "b")], resamples=200)
    assert other.slo == {} and "goodput" not in {m.key for m in other.metrics}
