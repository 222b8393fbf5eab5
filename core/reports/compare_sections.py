"""The page of a comparison: each ratio with its intervals, drawn and in figures."""

import math
from collections.abc import Sequence

from infopt.core.reports.compare import ComparedMetric, CompareReport
from infopt.core.reports.figures import BOTTOM, HEIGHT, LEFT, RIGHT, TOP, WIDTH, Scale
from infopt.core.reports.page import (
    Block,
    Cell,
    Column,
    Fact,
    Facts,
    Figure,
    Key,
    Line,
    Mark,
    Notes,
    Section,
    Table,
)
from infopt.core.reports.words import number, seconds

COLOURS = {"better": 2, "worse": 1, "equivalent": 0, "no difference shown": -1}
_WIDEST = 8.0
"""Ratios are drawn to this factor at most; what lies beyond ends at the frame."""


def compare_sections(report: CompareReport) -> tuple[Section, ...]:
    drawn = ratios(report)
    blocks: tuple[Block, ...] = (_facts(report),)
    if report.forced:
        told = tuple(f"Compared by force: {text}" for text in report.forced)
        blocks = (Notes(told, grave=True), *blocks)
    return (
        Section("Verdict", blocks),
        Section("Ratios", (drawn, _table(report)) if drawn is not None else (_table(report),)),
    )


def figure_name(key: str) -> str:
    """'ttft_s.p95' -> 'ttft p95'."""
    names = {"output_tokens_per_s": "tokens/s"}
    return names.get(key, key.replace("_s.", " "))


def figure_value(key: str, value: float | None) -> str:
    """A figure in its unit; a dash where it has none that is finite."""
    if value is None:
        return "–"
    timed = "_s." in key or (key.endswith("_s") and not key.endswith("per_s"))
    return seconds(value) if timed else number(value)


def change(ratio: float | None) -> str:
    """1.034 -> '+3.4%'."""
    if ratio is None:
        return "–"
    if not math.isfinite(ratio):
        return "infinite"
    return f"{ratio - 1:+.1%}" if ratio < 10 else f"{ratio:.3g}×"


def _facts(report: CompareReport) -> Facts:
    units = "whole runs, and in them blocks" if report.runs_drawn else "blocks"
    together = "the same of both sides together" if report.paired else "of each side by itself"
    limits = ", ".join(f"{name} {seconds(limit)}" for name, limit in report.slo.items())
    return Facts(
        (
            Fact("verdict", report.verdict),
            Fact("A", ", ".join(report.a)),
            Fact("B", ", ".join(report.b)),
            Fact("threshold", f"{report.threshold:.3g} of a figure"),
            *((Fact("SLO of goodput", limits),) if limits else ()),
            Fact(
                "intervals",
                f"95%, from {report.resamples:,} resamples of {units} of {report.block_length} "
                f"consecutive requests, {together}; seed {report.seed}",
            ),
        )
    )


def _table(report: CompareReport) -> Table:
    columns = (
        Column("figure", False),
        Column("A"),
        Column("B"),
        Column("change", help="B over A, less one"),
        Column("95% interval", help="this figure looked at alone"),
        Column("95% of all jointly", help="all figures lie within theirs: the verdict is by this"),
        Column("samples", help="of A and of B"),
        Column("verdict", False),
    )
    return Table(
        "Every figure of both sides", columns, tuple(_row(metric) for metric in report.metrics)
    )


def _row(metric: ComparedMetric) -> tuple[Cell, ...]:
    texts = (
        figure_name(metric.key),
        figure_value(metric.key, metric.a),
        figure_value(metric.key, metric.b),
        change(metric.ratio),
        f"{change(metric.low)} to {change(metric.high)}" if metric.low is not None else "–",
        f"{change(metric.joint_low)} to {change(metric.joint_high)}"
        if metric.joint_low is not None
        else "–",
        f"{metric.samples_a:,} and {metric.samples_b:,}",
        metric.verdict,
    )
    return tuple(Cell(text) for text in texts)


def ratios(report: CompareReport) -> Figure | None:
    """Each ratio between its intervals on a logarithmic axis; None where no figure has one."""
    shown = [m for m in report.metrics if m.ratio is not None and m.joint_low is not None]
    if not shown:
        return None
    ends = [e for m in shown for e in (m.joint_low, m.joint_high) if e and math.isfinite(e)]
    reach = max((max(end, 1 / end) for end in ends), default=1.0)
    reach = min(max(1.05 * reach, (1 + report.threshold) ** 2, 1.02), _WIDEST)
    across = Scale(1 / reach, reach, LEFT, WIDTH - RIGHT, log=True)
    rows = Scale(-0.5, len(shown) - 0.5, TOP, HEIGHT - BOTTOM)
    lines = [_upright(across, 1.0, "no change", dashed=False)]
    for bound in (1 / (1 + report.threshold), 1 + report.threshold):
        lines.append(_upright(across, bound, f"threshold: {change(bound)}", dashed=True))
    marks = []
    for at, metric in enumerate(shown):
        colour, y = COLOURS.get(metric.verdict, -1), rows.place(at)
        told = f"{figure_name(metric.key)}: {change(metric.ratio)}, {metric.verdict}"
        for low, high, wide in (
            (metric.joint_low, metric.joint_high, False),
            (metric.low, metric.high, True),
        ):
            ends_at = tuple((_place(across, end), y) for end in (low, high))
            lines.append(Line(ends_at, colour, told, wide=wide))
        marks.append(Mark(_place(across, metric.ratio), y, "dot", colour, told))
    verdicts = [v for v in COLOURS if any(m.verdict == v for m in shown)]
    return Figure(
        title="Ratios of B to A",
        description="Each figure of B over that of A: the thick line holds the ratio with 95%, the "
        "thin one so that all figures lie within theirs; dashed lines are the threshold.",
        x_label="B over A; more is worse for latencies, better for tokens/s and goodput",
        y_label="",
        x_ticks=tuple((across.place(value), change(value)) for value in _ticks(reach)),
        y_ticks=tuple((rows.place(at), figure_name(m.key)) for at, m in enumerate(shown)),
        marks=tuple(marks),
        legend=tuple(Key("line", COLOURS[verdict], verdict) for verdict in verdicts),
        lines=tuple(lines),
    )


def _upright(across: Scale, value: float, title: str, *, dashed: bool) -> Line:
    at = _place(across, value)
    return Line(((at, TOP), (at, HEIGHT - BOTTOM)), -1, title, dashed)


def _place(across: Scale, value: float | None) -> float:
    return across.place(min(max(value or across.low, across.low), across.high))


def _ticks(reach: float) -> Sequence[float]:
    """Round ratios, an odd number of them, about one."""
    for step in (0.01, 0.02, 0.05, 0.1, 0.2, 0.5):
        count = int((reach - 1) / step)
        if count <= 5:
            above = [1 + step * at for at in range(1, count + 1)]
            return sorted([1.0, *above, *(1 / value for value in above)])
    powers = [2.0**at for at in range(1, int(math.log2(reach)) + 1)]
    return sorted([1.0, *powers, *(1 / value for value in powers)])
