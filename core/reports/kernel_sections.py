"""The page of `infopt bench kernels`: each product beside its limits and torch."""

from collections.abc import Callable, Sequence
from typing import TypeVar

from infopt.core.reports.figures import kernel_shares
from infopt.core.reports.kernels import AttentionRow, KernelRow, KernelsReport, Raced, RowOpRow
from infopt.core.reports.page import Cell, Column, Fact, Facts, Section, Table
from infopt.core.reports.words import seconds, size

Row = TypeVar("Row", bound=Raced)
HEADINGS = (
    "format", "rows", "weight", "time", "moved", "of reading", "of product", "× torch", "error",
)  # fmt: skip
OP_HEADINGS = ("op", "rows", "columns", "time", "moved", "of reading", "× torch", "error")
ATTENTION_HEADINGS = (
    "attention", "requests", "queries", "context", "cache", "time", "of reading", "of product",
    "TFLOP/s", "× torch", "torch's best", "error",
)  # fmt: skip


def kernel_sections(report: KernelsReport) -> tuple[Section, ...]:
    peaks = ", ".join(f"{k} {v / 1e9:.0f} GFLOP/s" for k, v in report.product_flops_per_s.items())
    facts = Facts(
        (
            Fact("instructions", report.isa),
            Fact("threads", str(report.threads)),
            Fact("reading", f"{report.read_bytes_per_s / 1e9:.1f} GB/s", "measured"),
            Fact("torch's products", peaks, "measured"),
        )
    )
    rows = (*report.attention, *report.rows, *report.ops)
    found = [Section("Limits", (facts, *([kernel_shares(rows)] if rows else [])))]
    found += _table("Attention", ATTENTION_HEADINGS, report.attention, attention_cells)
    found += _table("Products", HEADINGS, report.rows, cells)
    found += _table("Row by row", OP_HEADINGS, report.ops, op_cells)
    return tuple(found)


def _table(
    title: str,
    headings: Sequence[str],
    rows: Sequence[Row],
    words: Callable[[Row], tuple[str, ...]],
) -> list[Section]:
    if not rows:
        return []
    columns = tuple(Column(heading, number > 0) for number, heading in enumerate(headings))
    told = tuple(tuple(Cell(text) for text in words(row)) for row in rows)
    return [Section(title, (Table("", columns, told),))]


def cells(row: KernelRow) -> tuple[str, ...]:
    """A row in words, under `HEADINGS`."""
    return (
        row.format,
        str(row.m),
        f"{row.n} × {row.k}",
        seconds(row.seconds),
        size(row.bytes),
        f"{row.of_bandwidth:.0%}",
        f"{row.of_product:.0%}",
        _ratio(row),
        _error(row),
    )


def op_cells(op: RowOpRow) -> tuple[str, ...]:
    """The same under `OP_HEADINGS`."""
    return (
        op.op,
        str(op.rows),
        str(op.columns),
        seconds(op.seconds),
        size(op.bytes),
        f"{op.of_bandwidth:.0%}",
        _ratio(op),
        _error(op),
    )


def attention_cells(row: AttentionRow) -> tuple[str, ...]:
    """The same under `ATTENTION_HEADINGS`."""
    return (
        row.op,
        str(row.requests),
        str(row.queries),
        str(row.context),
        row.cache,
        seconds(row.seconds),
        f"{row.of_bandwidth:.0%}",
        f"{row.of_product:.0%}",
        f"{row.flops_per_s / 1e12:.1f}",
        _ratio(row),
        row.torch_kernel,
        _error(row),
    )


def _ratio(row: Raced) -> str:
    return "–" if row.ratio is None else f"{row.ratio:.2f}"


def _error(row: Raced) -> str:
    return f"{row.error:.1e}" + ("" if row.right else " WRONG")
