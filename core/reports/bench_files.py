"""What a bench leaves beside its report: every request, and tables for other programs."""

import csv
import io
from collections.abc import Sequence
from pathlib import Path

from infopt.core.files import write_atomically
from infopt.core.reports.bench import BenchReport, LoadFigures
from infopt.core.reports.requests import RequestRecord, write_requests
from infopt.core.reports.schema import Percentiles
from infopt.core.reports.words import number, seconds

REQUESTS, CSV, MARKDOWN = "requests.jsonl", "summary.csv", "summary.md"
_SPREADS = ("ttft_s", "ttfot_s", "tpot_s", "itl_s", "e2e_s", "lag_s")
_POINTS = ("mean", "p50", "p90", "p95", "p99", "min", "max")
_PLAIN = (
    *("concurrency", "request_rate", "requests", "completed", "failed", "duration_s"),
    *("output_tokens_per_s", "steady_output_tokens_per_s", "total_tokens_per_s", "requests_per_s"),
    *("goodput", "attainment", "cost_per_million_output_tokens", "valid"),
)


def write_files(folder: Path, report: BenchReport, records: Sequence[RequestRecord]) -> BenchReport:
    """Write the files into `folder`; the report that names them comes back."""
    write_requests(folder / REQUESTS, records)
    write_atomically(folder / CSV, to_csv(report))
    write_atomically(folder / MARKDOWN, to_markdown(report))
    return report.model_copy(update={"files": (REQUESTS, CSV, MARKDOWN)})


def to_csv(report: BenchReport) -> str:
    """A row a level; a value that is undefined is empty."""
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    keys = [f"{spread}.{point}" for spread in _SPREADS for point in _POINTS]
    writer.writerow(["level", *_PLAIN, *keys])
    for number_of, level in _levels(report):
        values = [getattr(level, key) for key in _PLAIN]
        for spread in _SPREADS:
            found = getattr(level, spread)
            values += [None if found is None else getattr(found, point) for point in _POINTS]
        writer.writerow([number_of, *("" if value is None else value for value in values)])
    return text.getvalue()


def to_markdown(report: BenchReport) -> str:
    """A table for a pull request: a row a level."""
    judged = report.slo != {}
    head = ["load", "requests", "TTFT p50 / p95 / p99", "TPOT p50 / p95 / p99", "E2E p95"]
    head += ["output tokens/s", "steady"] + (["goodput", "attainment"] if judged else [])
    rows = [head, ["---"] * len(head)]
    rows += [_row(level, judged) for _, level in _levels(report)]
    lines = [f"**infopt bench** of `{report.target}`: {report.load}, workload {report.workload}"]
    lines += ["", *("| " + " | ".join(row) + " |" for row in rows), ""]
    if report.capacity is not None:
        rate = number(report.capacity.request_rate)
        lines += [f"Capacity: {rate} requests/s. {report.capacity.note}".rstrip(), ""]
    lines += [f"INVALID: {reason}" for reason in report.invalid_reasons]
    return "\n".join(lines).rstrip() + "\n"


def _levels(report: BenchReport) -> list[tuple[int, LoadFigures]]:
    if report.levels:
        return [(level.level, level) for level in report.levels]
    return [(report.level, report)]


def _row(level: LoadFigures, judged: bool) -> list[str]:
    cells = [load_words(level), f"{level.completed} of {level.requests}"]
    cells += [_three(level.ttft_s), _three(level.tpot_s)]
    cells.append("–" if level.e2e_s is None else seconds(level.e2e_s.p95))
    cells.append(number(level.output_tokens_per_s, ".1f"))
    cells.append(number(level.steady_output_tokens_per_s, ".1f"))
    if judged:
        cells += [number(level.goodput, ".3g"), number(level.attainment, ".1%")]
    return cells


def _three(found: Percentiles | None) -> str:
    if found is None:
        return "–"
    return " / ".join(seconds(value) for value in (found.p50, found.p95, found.p99))


def load_words(level: LoadFigures) -> str:
    """'4 at once', '2.5 requests/s', '2.5 requests/s, at most 8 at once'."""
    if level.concurrency is not None:
        return f"{level.concurrency} at once"
    words = "a trace" if level.request_rate is None else f"{level.request_rate:.4g} requests/s"
    if level.max_concurrency is not None:
        words += f", at most {level.max_concurrency} at once"
    return words
