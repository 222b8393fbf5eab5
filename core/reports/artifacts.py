"""The size/quality table: what the steps of a run found of each artifact."""

import math
from collections.abc import Iterable
from dataclasses import dataclass

from infopt.core.reports.bench import BenchReport
from infopt.core.reports.evaluate import EvaluateReport
from infopt.core.reports.figures import size_quality
from infopt.core.reports.page import Block, Cell, Column, Table
from infopt.core.reports.quantize import QuantizeReport
from infopt.core.reports.run import RunReport
from infopt.core.reports.schema import ModelSummary, Report
from infopt.core.reports.words import number, seconds, size


@dataclass(slots=True)
class _Row:
    """One artifact; None is what no step measured."""

    name: str
    model: ModelSummary | None = None
    method: str = ""
    bytes: int | None = None
    quantized_bits: float | None = None
    perplexity: float | None = None
    delta_nll: float | None = None
    kl: float | None = None
    top1: float | None = None
    tokens_per_s: float | None = None
    seconds: float | None = None
    peak_memory_bytes: int | None = None

    @property
    def bits(self) -> float | None:
        """Stored bits over all parameters of the model."""
        if self.model is None or not self.model.parameters:
            return None
        return 8 * self.model.bytes / self.model.parameters


_COLUMNS = (
    Column("artifact", numeric=False),
    Column("weights", numeric=False, help="how the weights are stored"),
    Column("size", help="bytes of the weight files"),
    Column("bits/parameter", help="stored bits over all parameters, the dense ones included"),
    Column("bits/weight", help="over the quantized layers alone, scales and zeros included"),
    Column("perplexity"),
    Column("ΔNLL", help="nats a token more than the baseline"),
    Column("KL", help="KL(baseline || model), nats a token"),
    Column("top-1", help="share of positions whose likeliest token is the baseline's"),
    Column("tokens/s", help="output tokens of a bench step, else tokens read while evaluating"),
    Column("made in"),
    Column("peak memory", help="while it was made"),
)


def artifact_blocks(report: Report) -> tuple[Block, ...]:
    """A row for every artifact that the report, or a step of the run, measured; and its plot."""
    rows: dict[str, _Row] = {}
    for part in _parts(report):
        _note(rows, part)
    if not rows:
        return ()
    table = Table(
        "Every artifact that was measured", _COLUMNS, tuple(_cells(row) for row in rows.values())
    )
    points = [
        (row.name, row.bytes, row.delta_nll)
        for row in rows.values()
        if row.bytes is not None and row.delta_nll is not None and math.isfinite(row.delta_nll)
    ]
    return (table, size_quality(points)) if len(points) > 1 else (table,)


def _parts(report: Report) -> Iterable[Report]:
    return [step.report for step in report.steps] if isinstance(report, RunReport) else [report]


def _note(rows: dict[str, _Row], report: Report) -> None:
    match report:
        case QuantizeReport():
            if report.model is not None:
                _row(rows, report.model)
            row = rows.setdefault(report.output, _Row(report.output.rpartition("/")[2]))
            row.method = f"{report.method} {report.scheme}".strip()
            row.bytes, row.quantized_bits = report.bytes, report.bits_per_weight
            row.seconds, row.peak_memory_bytes = report.seconds, report.peak_memory_bytes
        case EvaluateReport(model=ModelSummary() as model):
            if report.baseline is not None:
                base = _row(rows, report.baseline.model)
                base.perplexity, base.delta_nll, base.kl = report.baseline.perplexity, 0.0, 0.0
            row = _row(rows, model)
            row.perplexity = report.perplexity
            row.tokens_per_s = row.tokens_per_s or report.tokens_per_s
            if report.baseline is not None:
                row.delta_nll, row.kl = report.delta_nll, report.kl_divergence
                row.top1 = report.top1_agreement
        case BenchReport(model=ModelSummary() as model):
            _row(rows, model).tokens_per_s = report.output_tokens_per_s


def _row(rows: dict[str, _Row], model: ModelSummary) -> _Row:
    row = rows.setdefault(model.path, _Row(model.name))
    row.model, row.bytes = model, model.bytes
    row.method = row.method or model.quantization or "not quantized"
    return row


def _cells(row: _Row) -> tuple[Cell, ...]:
    texts = (
        row.name,
        row.method,
        "–" if row.bytes is None else size(row.bytes),
        number(row.bits, ".2f"),
        number(row.quantized_bits, ".3f"),
        number(row.perplexity, ".3f"),
        number(row.delta_nll, "+.4f"),
        number(row.kl, ".4f"),
        number(row.top1, ".2%"),
        number(row.tokens_per_s, ".0f"),
        "–" if row.seconds is None else seconds(row.seconds),
        "–" if row.peak_memory_bytes is None else size(row.peak_memory_bytes),
    )
    return tuple(Cell(text) for text in texts)
