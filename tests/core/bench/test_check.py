"""The gate: keys, units, limits, baselines, and what cannot be judged."""

import json
from pathlib import Path
from typing import Any

import pytest

from infopt.core.bench.check import check, check_passed
from infopt.core.bench.check_keys import find, more_is_better, parse_quantity, parse_share
from infopt.core.errors import GateError, UsageError
from infopt.core.reports.check import CheckedLimit

FIGURES = {"mean": 0.1, "p50": 0.1, "p90": 0.15, "p95": 0.18, "p99": 0.25, "min": 0.05, "max": 0.3}
REPORT: dict[str, Any] = {
    "command": "bench",
    "valid": True,
    "completed": 300,
    "failed": 3,
    "ttft_s": FIGURES,
    "tpot_s": None,
    "e2e_s": FIGURES,
    "output_tokens_per_s": 120.0,
    "goodput": 4.0,
    "attainment": 0.93,
    "duration_s": 12.0,
    "with_failures": {"ttft_s": {"p50": 0.1, "p99": None, "infinite": ["p99"]}},
    "levels": [{"level": 0, "completed": 10, "ttft_s": FIGURES, "output_tokens_per_s": 50.0}],
    "made": {"settings": {"requests": 303, "seed": 0}},
}


def laid(folder: Path, name: str = "report.json", **more: Any) -> Path:
    (folder / name).write_text(json.dumps(REPORT | more))
    return folder / name


def only(file: Path, **limits: Any) -> CheckedLimit:
    (found,) = check(file, **limits).limits
    return found


@pytest.mark.parametrize(
    ("kind", "limit", "holds", "margin"),
    [
        ("most", "ttft_s.p95=200ms", True, 0.1),
        ("most", "ttft.p95=200ms", True, 0.1),
        ("most", "ttft.p95=0.18", True, 0.0),
        ("most", "ttft.p95=170000us", False, -1 / 17),
        ("most", "e2e.p99 = 0.5s", True, 0.5),
        ("least", "output_tokens_per_s=0.1k", True, 0.2),
        ("least", "goodput=5", False, -0.2),
        ("least", "attainment=93%", True, 0.0),
        ("most", "duration=1min", True, 0.8),
        ("most", "failed=0", False, None),
        ("least", "levels.0.output_tokens_per_s=40", True, 0.25),
    ],
)
def test_a_limit_holds_or_not(
    tmp_path: Path, kind: str, limit: str, holds: bool, margin: float | None
) -> None:
    found = only(laid(tmp_path), **{kind: [limit]})
    assert found.holds is holds
    assert found.margin == (None if margin is None else pytest.approx(margin, abs=1e-9))


def test_the_report_says_all_and_the_gate_names_what_is_missed(tmp_path: Path) -> None:
    report = check(laid(tmp_path), most=["ttft.p95=0.1", "e2e.p50=1"], least=["goodput=9"])
    assert [limit.holds for limit in report.limits] == [False, True, False]
    assert not report.passed
    with pytest.raises(GateError, match=r"2 of 3 limits missed: ttft_s.p95 0.18 > 0.1, and 1 more"):
        check_passed(report)
    check_passed(check(laid(tmp_path), most=["ttft.p95=0.2"]))


def test_failures_make_a_percentile_infinite_and_miss_every_limit(tmp_path: Path) -> None:
    found = only(laid(tmp_path), most=["with_failures.ttft_s.p99=1000s"])
    assert found.value is None and not found.holds
    with pytest.raises(GateError, match="infinite"):
        check_passed(check(laid(tmp_path), most=["with_failures.ttft_s.p99=1000s"]))


@pytest.mark.parametrize(
    ("limits", "words"),
    [
        ({}, "nothing to check"),
        ({"most": ["ttft.p59=1s"]}, "did you mean 'ttft"),
        ({"most": ["output_token_per_s=1"]}, "did you mean 'output_tokens_per_s'"),
        ({"most": ["zzz=1"]}, "known: "),
        ({"most": ["tpot.p95=1s"]}, "tpot.p95 has no value"),
        ({"most": ["ttft.p95"]}, "is no limit"),
        ({"most": ["ttft.p95=fast"]}, "ttft_s.p95=fast"),
        ({"most": ["ttft.p95=5%"]}, "us, ms, s or min"),
        ({"least": ["goodput=5ms"]}, "k, M or %"),
        ({"most": ["ttft.p95=1e999"]}, "not a finite number"),
        ({"most": ["made.seed=1"]}, "no number 'made.seed'"),
        ({"most": ["valid=1"]}, "no number 'valid'"),
        ({"most": ["levels.0.ttft_s.p95=1s"]}, "rests on 10 requests, and 59 are wanted"),
        ({"most": ["ttft.p95=1s"], "min_samples": 301}, "rests on 300 requests, and 301"),
        ({"max_regression": ["5%"]}, "--baseline is missing"),
        ({"most": ["ttft.p95=1s"], "baseline": Path("x")}, "--max-regression is missing"),
    ],
)
def test_what_cannot_be_judged_is_one_line(
    tmp_path: Path, limits: dict[str, Any], words: str
) -> None:
    with pytest.raises(UsageError) as caught:
        check(laid(tmp_path), **limits)
    assert words in str(caught.value) and "\n" not in str(caught.value)


def test_an_invalid_run_is_not_judged(tmp_path: Path) -> None:
    file = laid(tmp_path, valid=False, invalid_reasons=["sent late", "too short"])
    with pytest.raises(UsageError, match="no valid run: sent late; too short"):
        check(file, most=["ttft.p95=1000s"])


@pytest.mark.parametrize(("percentile", "least"), [("p50", 5), ("p90", 29), ("p95", 59)])
def test_a_percentile_wants_samples(tmp_path: Path, percentile: str, least: int) -> None:
    """Wilks: with fewer, not even the greatest value bounds the percentile with 95%."""
    limit = [f"ttft.{percentile}=1s"]
    assert only(laid(tmp_path, completed=least), most=limit).holds
    with pytest.raises(UsageError, match=f"and {least} are wanted"):
        check(laid(tmp_path, completed=least - 1), most=limit)
    assert only(laid(tmp_path, completed=1), most=limit, min_samples=1).holds


def test_a_baseline_bounds_each_figure_in_its_direction(tmp_path: Path) -> None:
    stored = laid(
        tmp_path, "stored.json", ttft_s=FIGURES | {"p50": 0.0951}, output_tokens_per_s=127.0
    )
    report = check(laid(tmp_path), baseline=stored, max_regression=["5%", "goodput=0%"])
    told = {limit.key: limit for limit in report.limits}
    assert set(told) == {
        "ttft_s.p50",
        "ttft_s.p95",
        "e2e_s.p50",
        "e2e_s.p95",
        "output_tokens_per_s",
        "goodput",
    }
    assert not told["ttft_s.p50"].holds and told["ttft_s.p95"].holds  # 0.1 > 1.05 * 0.0951
    assert not told["output_tokens_per_s"].holds  # 120 < 0.95 * 127
    assert told["output_tokens_per_s"].kind == "min" and told["ttft_s.p50"].kind == "max"
    assert told["goodput"].holds and told["goodput"].limit == 4.0
    assert told["ttft_s.p50"].baseline == 0.0951 and report.baseline == str(stored)


def test_a_baseline_of_another_load_is_refused(tmp_path: Path) -> None:
    stored = laid(tmp_path, "stored.json", made={"settings": {"requests": 16, "seed": 0}})
    with pytest.raises(UsageError, match=r"requests \(303 and 16\)"):
        check(laid(tmp_path), baseline=stored, max_regression=["5%"])
    invalid = laid(tmp_path, "stored.json", valid=False)
    with pytest.raises(UsageError, match=r"stored\.json is no valid run"):
        check(laid(tmp_path), baseline=invalid, max_regression=["5%"])


@pytest.mark.parametrize(
    ("text", "key", "value"),
    [
        ("200ms", "ttft_s.p95", 0.2),
        ("1.5", "ttft_s.p95", 1.5),
        ("3 us", "tpot_s.p50", 3e-6),
        ("1k", "output_tokens_per_s", 1000.0),
        ("2e3", "output_tokens_per_s", 2000.0),
        ("95%", "attainment", 0.95),
        (".5", "goodput", 0.5),
    ],
)
def test_units(text: str, key: str, value: float) -> None:
    assert parse_quantity(text, key) == pytest.approx(value)


@pytest.mark.parametrize(("text", "value"), [("5%", 0.05), ("0.05", 0.05), ("0", 0.0)])
def test_shares(text: str, value: float) -> None:
    assert parse_share(text, "--x") == pytest.approx(value)


@pytest.mark.parametrize("text", ["much", "-1%", "5", "5ms", ""])
def test_what_is_no_share_is_refused(text: str) -> None:
    with pytest.raises(UsageError, match="--x"):
        parse_share(text, "--x")


def test_directions() -> None:
    assert more_is_better("goodput") and more_is_better("steady_output_tokens_per_s")
    assert not more_is_better("ttft_s.p95") and not more_is_better("failed")
    assert more_is_better("levels.3.requests_per_s") and not more_is_better("duration_s")
    with pytest.raises(UsageError, match="cannot be told"):
        more_is_better("concurrency")


def test_a_key_is_found_as_it_is_first() -> None:
    report = {"command": "bench", "ttft": 1.0, "ttft_s": 2.0}
    assert find(report, "ttft", "f") == ("ttft", 1.0)
    assert find({"ttft_s": 2.0}, "ttft", "f") == ("ttft_s", 2.0)
