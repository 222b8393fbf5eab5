"""The report of `infopt bench` as people read it."""

from infopt.core.reports.bench import BenchReport
from infopt.core.reports.bench_files import load_words
from infopt.core.reports.schema import Percentiles
from infopt.core.reports.words import number, seconds

Row = tuple[str, str]


def bench_rows(report: BenchReport) -> list[Row]:
    """Term and finding, the grave ones first."""
    rows = [("INVALID", reason) for reason in report.invalid_reasons]
    if report.engine_command is not None:
        rows.append(("engine", report.engine_command))
    rows += [
        (
            "requests",
            f"{report.completed} completed, {report.failed} failed, "
            f"{load_words(report)}, in {report.duration_s:.1f} s",
        ),
        ("TTFT", _spread(report.ttft_s)),
        ("TPOT", _spread(report.tpot_s)),
        ("ITL", _spread(report.itl_s)),
        ("end to end", _spread(report.e2e_s)),
    ]
    if report.load != "closed loop":
        rows.append(("send lag", _spread(report.lag_s)))
    rows.append(("throughput", _throughput(report)))
    if report.slo and report.goodput is not None:
        limits = ", ".join(f"{key} {seconds(limit)}" for key, limit in report.slo.items())
        good = f"{report.goodput:.3g} requests/s kept {limits} ({number(report.attainment, '.1%')})"
        rows.append(("goodput", good))
    if report.cost_per_million_output_tokens is not None:
        rows.append(("cost", f"{report.cost_per_million_output_tokens:.4g} per million tokens"))
    rows += _levels(report)
    rows += _server(report)
    rows += [("failed", f"{count} x {message}") for message, count in report.errors.items()]
    return rows + [("note", note) for note in report.notes]


def _throughput(report: BenchReport) -> str:
    steady = report.steady_output_tokens_per_s
    said = f"{report.output_tokens_per_s:.1f} output tokens/s"
    said += "" if steady is None else f" ({steady:.1f} in the steady window)"
    return f"{said}, {report.total_tokens_per_s:.1f} with prompts"


def _levels(report: BenchReport) -> list[Row]:
    rows = []
    for level in report.levels:
        ttft = "undefined" if level.ttft_s is None else seconds(level.ttft_s.p95)
        said = f"{level.output_tokens_per_s:.1f} output tokens/s, TTFT p95 {ttft}"
        if level.attainment is not None:
            said += f", {level.attainment:.1%} kept the limits"
        if level.server is not None and level.server.waiting_max:
            said += f", up to {number(level.server.waiting_max)} waiting in the server"
        if level.stopped_early is not None:
            said += f"; broken off: {level.stopped_early}"
        rows.append((load_words(level), said))
    if report.capacity is not None:
        found = report.capacity
        word = "capacity" if found.found else "capacity?"
        rate = number(found.request_rate)
        rows.append((word, f"{rate} requests/s at {found.attainment:.0%} attainment"))
        rows += [("capacity?", said) for said in (*found.contradictions, found.note) if said]
    if report.max_goodput is not None:
        rows.append(("max goodput", f"{report.max_goodput:.3g} requests/s"))
    return rows


def _server(report: BenchReport) -> list[Row]:
    found = report.server
    if found is None:
        return []
    said = (
        f"running {number(found.running_median)} (at most {number(found.running_max)}), "
        f"waiting {number(found.waiting_median)} (at most {number(found.waiting_max)}), "
        f"KV cache {number(found.kv_use_median, '.1%')} (at most {number(found.kv_use_max, '.1%')})"
    )
    more = (
        f"prefix hits {number(found.prefix_hit_share, '.1%')}, "
        f"preemptions {number(found.preemptions)}"
    )
    return [("server", said), ("", more)]


def _spread(values: Percentiles | None) -> str:
    if values is None:
        return "undefined"
    return f"p50 {seconds(values.p50)}, p95 {seconds(values.p95)}, p99 {seconds(values.p99)}"
