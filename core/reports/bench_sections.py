"""The page of a bench: what its clients saw, drawn."""

from collections.abc import Mapping, Sequence
from typing import Any

from infopt.core.reports.bench import BenchReport
from infopt.core.reports.bench_figures import distribution, latency_throughput, timeline
from infopt.core.reports.bench_series import BenchSeries
from infopt.core.reports.page import Block, Cell, Column, Fact, Facts, Notes, Section, Table
from infopt.core.reports.provenance import origin
from infopt.core.reports.words import number, seconds

_ROWS = (
    ("ttft_s", "time to first token (TTFT)"),
    ("ttfot_s", "time to first token of the answer (TTFOT)"),
    ("tpot_s", "time per output token (TPOT)"),
    ("itl_s", "inter-token latency (ITL)"),
    ("chunk_gap_s", "gap between chunks"),
    ("e2e_s", "end to end"),
    ("lag_s", "sent after it was due"),
)
_COLUMNS = ("mean", "p50", "p90", "p95", "p99", "min", "max")


def bench_sections(report: BenchReport) -> tuple[Section, ...]:
    # As JSON: the page draws what there is, and a report that lacks a part lacks its picture.
    found = report.model_dump(mode="json")
    parts = [Section("The run", (*_invalid(found), _facts(report, found), _percentiles(found)))]
    levels = found.get("levels") or ()
    names = {level["level"]: _level_name(level) for level in levels}
    if len(levels) > 1:
        curve = latency_throughput(levels, names)
        drawn: tuple[Block, ...] = () if curve is None else (curve,)
        parts.append(
            Section("Latency and throughput", (*drawn, _levels(levels), *_servers(levels)))
        )
    if found.get("series"):
        parts += _pictures(found, names)
    if found.get("errors"):
        rows = tuple((Cell(text), Cell(f"{count:,}")) for text, count in found["errors"].items())
        table = Table("Failed requests", (Column("message", False), Column("requests")), rows)
        parts.append(Section("Failures", (table,)))
    return tuple(parts)


def bench_title(report: BenchReport) -> str:
    name = report.model.name if report.model is not None else report.target
    return f"Bench of {name}"


def _invalid(found: Mapping[str, Any]) -> tuple[Block, ...]:
    """Why the run does not count, and what to keep in mind."""
    parts: list[Block] = []
    if found.get("valid") is False:
        reasons = found.get("invalid_reasons") or ("no reason is told",)
        parts.append(Notes(tuple(f"Not a valid run: {text}" for text in reasons), grave=True))
    if found.get("notes"):
        parts.append(Notes(tuple(found["notes"])))
    return tuple(parts)


def _facts(report: BenchReport, found: Mapping[str, Any]) -> Facts:
    def fact(term: str, key: str, form: str = ",.4g", unit: str = "") -> list[Fact]:
        value = found.get(key)
        if value is None:
            return []
        return [Fact(term, f"{number(value, form)}{unit}", origin(report, key))]

    slo = ", ".join(f"{name} {seconds(limit)}" for name, limit in (found.get("slo") or {}).items())
    return Facts(
        (
            Fact("target", report.target),
            Fact("load", _load(found)),
            Fact(
                "requests",
                f"{report.completed:,} completed, {report.failed:,} failed",
                origin(report, "completed"),
            ),
            *fact("took", "duration_s", ".4g", " s"),
            *fact("output", "output_tokens_per_s", unit=" tokens/s"),
            *fact("output, steady", "steady_output_tokens_per_s", unit=" tokens/s"),
            *fact("with prompts", "total_tokens_per_s", unit=" tokens/s"),
            *([Fact("SLO", slo)] if slo else []),
            *fact("goodput", "goodput", unit=" requests/s"),
            *fact("attainment", "attainment", ".1%"),
            *fact("max goodput", "max_goodput", unit=" requests/s"),
            Fact("tokens counted by", report.token_count_source),
        )
    )


def _load(found: Mapping[str, Any]) -> str:
    if found.get("request_rate"):
        return f"{number(found['request_rate'])} requests/s"
    if found.get("concurrency"):
        return f"{found['concurrency']} requests in flight"
    return str(found.get("load") or "–")


def _level_name(level: Mapping[str, Any]) -> str:
    """Short enough to stand beside its mark."""
    if level.get("request_rate"):
        return f"{number(level['request_rate'], '.3g')}/s"
    if level.get("concurrency"):
        return f"{level['concurrency']} in flight"
    return f"level {level['level']}"


def _percentiles(found: Mapping[str, Any]) -> Table:
    rows = []
    for key, words in _ROWS:
        if values := found.get(key):
            rows.append((Cell(words), *(Cell(_time(values.get(p))) for p in _COLUMNS)))
        if tail := (found.get("with_failures") or {}).get(key):
            if not tail.get("infinite") and not found.get("failed"):
                continue  # the same numbers again
            cells = (
                Cell("infinite" if p in tail["infinite"] else _time(tail.get(p))) for p in _COLUMNS
            )
            rows.append((Cell(f"{words}, failures counted"), *cells))
    columns = (Column("", False), *(Column(name) for name in _COLUMNS))
    return Table("Latencies", columns, tuple(rows))


_WHICH = ("median", "max")


def _time(value: float | None) -> str:
    return "–" if value is None else seconds(value)


def _levels(levels: Sequence[Mapping[str, Any]]) -> Table:
    columns = (
        Column("load", False),
        Column("completed"),
        Column("failed"),
        Column("output tokens/s"),
        Column("TTFT p50"),
        Column("TTFT p95"),
        Column("TPOT p50"),
        Column("TPOT p95"),
        Column("goodput", help="requests a second that kept every limit"),
        Column("attainment"),
        Column("", False),
    )
    rows = tuple(
        (
            Cell(_level_name(level)),
            Cell(f"{level.get('completed') or 0:,}"),
            Cell(f"{level.get('failed') or 0:,}"),
            Cell(number(level.get("output_tokens_per_s"))),
            *(
                Cell(_time((level.get(key) or {}).get(p)))
                for key in ("ttft_s", "tpot_s")
                for p in ("p50", "p95")
            ),
            Cell(number(level.get("goodput"))),
            Cell(number(level.get("attainment"), ".1%")),
            Cell("; ".join(_remarks(level))),
        )
        for level in levels
    )
    return Table("Levels of the load", columns, rows)


def _servers(levels: Sequence[Mapping[str, Any]]) -> tuple[Table, ...]:
    if not any(level.get("server") for level in levels):
        return ()
    columns = (
        Column("load", False),
        *(Column(f"{name}, {which}") for name in ("running", "waiting") for which in _WHICH),
        *(Column(f"KV cache, {which}") for which in _WHICH),
        Column("prefix hits", help="prompt tokens found in the prefix cache of those looked for"),
        Column("preemptions"),
    )
    counts = [f"{name}_{which}" for name in ("running", "waiting") for which in _WHICH]
    shares = [*(f"kv_use_{which}" for which in _WHICH), "prefix_hit_share"]
    rows = []
    for level in levels:
        found = level.get("server") or {}
        rows.append(
            (
                Cell(_level_name(level)),
                *(Cell(number(found.get(key))) for key in counts),
                *(Cell(number(found.get(key), ".1%")) for key in shares),
                Cell(number(found.get("preemptions"))),
            )
        )
    return (Table("What the server said of itself", columns, tuple(rows)),)


def _remarks(level: Mapping[str, Any]) -> list[str]:
    told = []
    if level.get("stopped_early"):
        told.append(f"stopped early: {level['stopped_early']}")
    if level.get("valid") is False:
        told += [f"not valid: {text}" for text in level.get("invalid_reasons") or ()]
    return told


def _pictures(found: Mapping[str, Any], names: Mapping[int, str]) -> list[Section]:
    series = BenchSeries.model_validate(found["series"])
    levels = {level["level"]: level for level in found.get("levels") or ()}
    parts = []
    for name, limit in _limited(found):
        curves = [curve for curve in series.distributions if curve.name == name]
        if not curves:
            continue
        labels = {c.level: names.get(c.level, "all requests") for c in curves}
        figures = {c.level: (levels.get(c.level) or found).get(f"{name}_s") or {} for c in curves}
        parts.append(distribution(name, curves, labels, figures, limit))
    drawn = [Section("Distributions", tuple(parts))] if parts else []
    if series.timeline is not None:
        drawn.append(Section("Over time", timeline(series.timeline)))
    return drawn


def _limited(found: Mapping[str, Any]) -> list[tuple[str, float | None]]:
    limits = found.get("slo") or {}
    return [(name, limits.get(name)) for name in ("ttft", "tpot", "e2e")]
