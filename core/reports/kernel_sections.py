"""The page of `infopt bench kernels`: each product beside its limits and torch."""

from infopt.core.reports.kernels import KernelRow, KernelsReport, RowOpRow
from infopt.core.reports.page import Cell, Column, Fact, Facts, Section, Table
from infopt.core.reports.words import seconds, size

HEADINGS = (
    "format", "rows", "weight", "time", "moved", "of reading", "of product", "× torch", "error",
)  # fmt: skip
OP_HEADINGS = ("op", "rows", "columns", "time", "moved", "of reading", "× torch", "error")


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
    columns = tuple(Column(heading, number > 0) for number, heading in enumerate(HEADINGS))
    rows = tuple(tuple(Cell(text) for text in cells(row)) for row in report.rows)
    products = Section("Products", (Table("", columns, rows),))
    if not report.ops:
        return (Section("Limits", (facts,)), products)
    columns = tuple(Column(heading, number > 0) for number, heading in enumerate(OP_HEADINGS))
    rows = tuple(tuple(Cell(text) for text in op_cells(op)) for op in report.ops)
    ops = Section("Row by row", (Table("", columns, rows),))
    return (Section("Limits", (facts,)), products, ops)


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
        f"{row.ratio:.2f}",
        f"{row.error:.1e}" + ("" if row.right else " WRONG"),
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
        f"{op.ratio:.2f}",
        f"{op.error:.1e}" + ("" if op.right else " WRONG"),
    )
