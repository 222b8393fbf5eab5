import csv
import io
from pathlib import Path
from typing import Any

from infopt.core.reports.bench import BenchReport, Capacity, LevelReport
from infopt.core.reports.bench_files import load_words, to_csv, to_markdown, write_files
from infopt.core.reports.requests import RequestRecord, read_requests
from infopt.core.reports.schema import Percentiles

SPREAD = Percentiles(mean=0.2, p50=0.1, p90=0.3, p95=0.4, p99=0.5, min=0.05, max=0.6)
FIGURES: dict[str, Any] = {
    "requests": 8, "completed": 7, "failed": 1, "errors": {"lost": 1}, "duration_s": 2.0,
    "ttft_s": SPREAD, "tpot_s": None, "e2e_s": SPREAD, "prompt_tokens": 10, "output_tokens": 20,
    "output_tokens_per_s": 10.0, "total_tokens_per_s": 15.0, "token_count_source": "usage",
}  # fmt: skip


def report(**more: Any) -> BenchReport:
    values = {"concurrency": 4, "target": "http://x", "provenance": {}} | FIGURES | more
    return BenchReport(**values)


def swept() -> BenchReport:
    levels = tuple(
        LevelReport(**FIGURES, level=n, concurrency=None, request_rate=rate, goodput=rate / 2)
        for n, rate in enumerate((1.0, 2.5))
    )
    capacity = Capacity(
        request_rate=2.5, attainment=0.9, met_up_to=2.5, missed_from=None, found=False, note="Why."
    )
    return report(
        concurrency=None, request_rate=2.5, slo={"ttft": 0.2}, levels=levels, capacity=capacity
    )


def test_a_row_a_level() -> None:
    rows = list(csv.DictReader(io.StringIO(to_csv(swept()))))
    assert [row["request_rate"] for row in rows] == ["1.0", "2.5"]
    assert rows[1]["goodput"] == "1.25" and rows[1]["ttft_s.p95"] == "0.4"
    assert rows[0]["tpot_s.p50"] == rows[0]["concurrency"] == "" and rows[0]["valid"] == "True"
    (row,) = csv.DictReader(io.StringIO(to_csv(report())))
    assert row["concurrency"] == "4" and row["level"] == "0"


def test_a_table_for_a_pull_request() -> None:
    text = to_markdown(swept())
    lines = [line for line in text.splitlines() if line.startswith("|")]
    assert len(lines) == 4 and len({line.count("|") for line in lines}) == 1
    assert "| 2.5 requests/s | 7 of 8 | 100 ms / 400 ms / 500 ms | – |" in lines[3]
    assert "goodput" in lines[0] and "Capacity: 2.5 requests/s. Why." in text
    plain = to_markdown(report(valid=False, invalid_reasons=("too few",)))
    assert "goodput" not in plain and plain.endswith("INVALID: too few\n")


def test_the_files_and_their_names(tmp_path: Path) -> None:
    record = RequestRecord(index=0, scheduled=0.0, sent=0.1, ended=1.0, released=0.05)
    found = write_files(tmp_path / "out", report(), [record])
    assert found.files == ("requests.jsonl", "summary.csv", "summary.md")
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == sorted(found.files)
    assert list(read_requests(tmp_path / "out" / "requests.jsonl")) == [record]


def test_loads_in_words() -> None:
    assert load_words(report()) == "4 at once"
    assert load_words(report(concurrency=None, max_concurrency=3)) == "a trace, at most 3 at once"
