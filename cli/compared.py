"""Comparisons, checks and kernels as people read them."""

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, TypeVar

from infopt.core.reports.check import CheckedLimit, CheckReport
from infopt.core.reports.compare import CompareReport
from infopt.core.reports.compare_sections import change, figure_name, figure_value
from infopt.core.reports.kernel_sections import (
    ATTENTION_HEADINGS,
    HEADINGS,
    OP_HEADINGS,
    attention_cells,
    cells,
    op_cells,
)
from infopt.core.reports.kernels import KernelsReport, Raced

if TYPE_CHECKING:
    from rich.console import RenderableType

Row = TypeVar("Row", bound=Raced)
_STYLES = {"worse": "red", "better": "green", "equivalent": "cyan"}


def compare_table(report: CompareReport) -> "RenderableType":
    from rich.markup import escape
    from rich.table import Table

    title = f"B over A: {report.verdict} (threshold {report.threshold:.3g})"
    table = Table(title=title, title_justify="left", box=None, pad_edge=False)
    for heading in ("", "A", "B", "change", "95%", "95% of all jointly"):
        table.add_column(heading, justify="right" if heading else "left", no_wrap=True)
    table.add_column("verdict")
    for metric in report.metrics:
        alone = f"{change(metric.low)} to {change(metric.high)}"
        joint = f"{change(metric.joint_low)} to {change(metric.joint_high)}"
        table.add_row(
            escape(figure_name(metric.key)),
            figure_value(metric.key, metric.a),
            figure_value(metric.key, metric.b),
            change(metric.ratio),
            "–" if metric.low is None else alone,
            "–" if metric.joint_low is None else joint,
            metric.verdict,
            style=_STYLES.get(metric.verdict, ""),
        )
    return table


def check_table(report: CheckReport) -> "RenderableType":
    from rich.markup import escape
    from rich.table import Table

    verdict = "all limits hold" if report.passed else "a limit is missed"
    # Of the file nothing: a title is broken to the width of the table.
    table = Table(title=verdict, title_justify="left", box=None, pad_edge=False)
    for heading in ("", "value", "limit", "margin"):
        table.add_column(heading, justify="right" if heading else "left", no_wrap=True)
    table.add_column("")
    for limit in report.limits:
        sign = "<=" if limit.kind == "max" else ">="
        table.add_row(
            escape(limit.key),
            "infinite" if limit.value is None else figure_value(limit.key, limit.value),
            f"{sign} {figure_value(limit.key, limit.limit)}",
            "–" if limit.margin is None else f"{limit.margin:+.1%}",
            _words(limit),
            style="" if limit.holds else "red",
        )
    return table


def _words(limit: CheckedLimit) -> str:
    before = figure_value(limit.key, limit.baseline)
    told = f" (baseline {before})" if limit.baseline is not None else ""
    return f"{'holds' if limit.holds else 'MISSED'}{told}"


def kernels_table(report: KernelsReport) -> "RenderableType":
    from rich.console import Group

    read = report.read_bytes_per_s / 1e9
    title = f"native kernels ({report.isa}, {report.threads} threads); reading {read:.1f} GB/s"
    tables = [_raced(title, HEADINGS, report.rows, cells)]
    if report.attention:
        tables.append(_raced("attention", ATTENTION_HEADINGS, report.attention, attention_cells))
    if report.ops:
        tables.append(_raced("row by row", OP_HEADINGS, report.ops, op_cells))
    return tables[0] if len(tables) == 1 else Group(*tables)


def _raced(
    title: str,
    headings: Sequence[str],
    rows: Sequence[Row],
    words: Callable[[Row], tuple[str, ...]],
) -> "RenderableType":
    from rich.table import Table

    table = Table(title=title, title_justify="left", box=None, pad_edge=False)
    for number, heading in enumerate(headings):
        table.add_column(heading, justify="right" if number else "left", no_wrap=True)
    for row in rows:
        table.add_row(*words(row), style="" if row.right else "red")
    return table
