"""Reports as people read them; pure: a report in, something to print out."""

from collections import Counter
from typing import TYPE_CHECKING

from infopt.cli.bench_summary import bench_rows
from infopt.cli.compared import check_table, compare_table, kernels_table
from infopt.cli.compressed import distill_rows, kv_heads_rows, medusa_rows, prune_rows
from infopt.cli.profiled import profile_rows
from infopt.core.reports.bench import BenchReport
from infopt.core.reports.check import CheckReport
from infopt.core.reports.compare import CompareReport
from infopt.core.reports.convert import ConvertReport
from infopt.core.reports.distill import DistillReport
from infopt.core.reports.doctor import DoctorReport
from infopt.core.reports.evaluate import EvaluateReport
from infopt.core.reports.kernels import KernelsReport
from infopt.core.reports.kv_heads import KvHeadsReport
from infopt.core.reports.medusa import MedusaReport
from infopt.core.reports.profile import ProfileReport
from infopt.core.reports.prune import PruneReport
from infopt.core.reports.quantize import Allocation, QuantizeReport, SensitivityReport
from infopt.core.reports.run import RunReport
from infopt.core.reports.schema import Plan, Report
from infopt.core.reports.serve import ServeReport
from infopt.core.reports.words import seconds, size

if TYPE_CHECKING:
    from rich.console import RenderableType

Row = tuple[str, str]


def summary(report: Report) -> "RenderableType":
    """The short form of any report."""
    match report:
        case SensitivityReport():
            return _table("sensitivity", _sensitivity_rows(report))
        case QuantizeReport():
            return _table(f"quantized: {report.output}", _quantize_rows(report))
        case PruneReport():
            return _table(f"pruned: {report.output}", prune_rows(report))
        case DistillReport():
            return _table(f"distilled: {report.output}", distill_rows(report))
        case MedusaReport():
            return _table(f"Medusa heads: {report.output}", medusa_rows(report))
        case KvHeadsReport():
            return _table(f"converted: {report.output}", kv_heads_rows(report))
        case ConvertReport():
            return _table(f"converted: {report.output}", _convert_rows(report))
        case EvaluateReport():
            return _table(f"quality of {_name(report)}", _evaluate_rows(report))
        case ProfileReport():
            return _table(f"profile of {_name(report)}", profile_rows(report))
        case BenchReport():
            return _table(f"bench of {report.target}", bench_rows(report))
        case CompareReport():
            return compare_table(report)
        case CheckReport():
            return check_table(report)
        case KernelsReport():
            return kernels_table(report)
        case ServeReport():
            return _table(f"served at {report.url}", _serve_rows(report))
        case RunReport():
            rows = [
                (step.verb, f"{step.model} -> {step.output}" if step.output else step.model)
                for step in report.steps
            ]
            return _table(f"ran {report.recipe} in {report.seconds:.0f} s", rows)
        case DoctorReport():
            return _doctor(report)
        case _:
            raise AssertionError(f"no summary for {type(report).__name__}")


def plan_summary(plan: Plan) -> "RenderableType":
    """What `--dry-run` shows."""
    unknown = "unknown: this device was not measured yet (infopt profile --mfu does)"
    expected = unknown if plan.seconds is None else f"about {seconds(plan.seconds)}"
    rows = [(f"{i}", action) for i, action in enumerate(plan.actions, 1)]
    rows += [("memory", f"about {size(plan.memory_bytes)}"), ("time", expected)]
    if plan.disk_bytes:
        rows.append(("disk", size(plan.disk_bytes)))
    return _table(f"infopt {plan.command} would", rows)


def _name(report: Report) -> str:
    return report.model.name if report.model else "?"


def _table(title: str, rows: list[Row]) -> "RenderableType":
    from rich.markup import escape
    from rich.table import Table

    table = Table(
        title=escape(title), title_justify="left", show_header=False, box=None, pad_edge=False
    )
    table.add_column(style="dim", no_wrap=True)
    table.add_column(overflow="fold")
    for key, value in rows:
        table.add_row(escape(key), escape(value))
    return table


def _quantize_rows(report: QuantizeReport) -> list[Row]:
    schemes = list(dict.fromkeys(layer.scheme for layer in report.layers)) or ["dense"]
    fallbacks = [layer for layer in report.layers if layer.fallback]
    rows = [
        ("method", f"{report.method}, {report.scheme}, format {report.format or 'dense'}"),
        ("layers", f"{len(report.layers)}: {'; '.join(schemes)}"),
        (
            "size",
            f"{size(report.original_bytes)} -> {size(report.bytes)} "
            f"({report.bits_per_weight:.2f} bits per quantized weight)",
        ),
        ("read back", f"logits differ by at most {report.logits_max_difference:.1e}"),
        ("cost", f"{seconds(report.seconds)}, peak memory {size(report.peak_memory_bytes)}"),
    ]
    if report.layers:
        worst = max(report.layers, key=lambda layer: layer.error)
        rows.insert(3, ("output error", f"at most {worst.error:.2%} ({worst.name})"))
    if report.calibration_tokens:
        rows.insert(3, ("calibration", f"{report.calibration_tokens} tokens"))
    if report.kv_cache is not None:
        rows.insert(2, ("kv cache", f"scales for {report.kv_cache} stored"))
    if report.allocation is not None:
        rows.insert(2, ("allocation", _allocation_words(report.allocation)))
    if fallbacks:
        rows.append(("fallbacks", ", ".join(f"{x.name}: {x.fallback}" for x in fallbacks)))
    return rows


def _allocation_words(allocation: Allocation) -> str:
    """How many units have how many bits."""
    counts = sorted(Counter(allocation.bits.values()).items())
    units = ", ".join(f"{count} units at {bits} bits" for bits, count in counts)
    increase = allocation.measured_ppl_increase
    kept = "" if increase is None else f"; perplexity {increase:+.2%} on held-out text"
    return f"{allocation.mean_bits:.2f} bits on average: {units}{kept}"


def _sensitivity_rows(report: SensitivityReport) -> list[Row]:
    rows: list[Row] = []
    for bits in sorted({row.bits for row in report.sensitivity}):
        found = sorted((r for r in report.sensitivity if r.bits == bits), key=lambda r: -r.kl)
        most = ", ".join(f"{r.unit} {r.kl:.4f}" for r in found[:2])
        total = sum(row.kl for row in found)
        rows.append((f"{bits} bits", f"KL of all units {total:.4f}; most: {most}"))
    if report.allocation is not None:
        rows.append(("allocation", _allocation_words(report.allocation)))
    rows.append(("cost", seconds(report.seconds)))
    return rows


def _convert_rows(report: ConvertReport) -> list[Row]:
    kinds = ", ".join(f"{count} x {scheme}" for scheme, count in report.schemes.items())
    return [
        ("format", f"{report.source_format} -> {report.format} {report.dtype or ''}".rstrip()),
        ("layers", kinds),
        ("size", f"{size(report.original_bytes)} -> {size(report.bytes)}"),
        (
            "read back",
            "every weight is what it was, bit by bit"
            if report.exact
            else f"weights differ by at most {report.largest_difference:.1e}",
        ),
        ("cost", f"{seconds(report.seconds)}, peak memory {size(report.peak_memory_bytes)}"),
    ]


def _evaluate_rows(report: EvaluateReport) -> list[Row]:
    rows = [
        ("perplexity", f"{report.perplexity:.4f} over {report.tokens} tokens of {report.text}"),
        ("protocol", report.protocol),
        ("speed", f"{report.tokens_per_s:.0f} tokens/s scored"),
        (
            "weights",
            f"{size(report.model.bytes) if report.model else '?'} on disk, "
            f"{size(report.memory_bytes)} in memory",
        ),
    ]
    if report.baseline is not None and report.delta_nll is not None:
        rows += [
            (
                "baseline",
                f"{report.baseline.model.name}: perplexity {report.baseline.perplexity:.4f}",
            ),
            (
                "change",
                f"{report.perplexity / report.baseline.perplexity - 1:+.2%} perplexity, "
                f"{report.delta_nll:+.4f} nats per token",
            ),
            (
                "divergence",
                f"KL {report.kl_divergence:.4f} nats, top-1 agreement {report.top1_agreement:.2%}",
            ),
        ]
    return rows


def _serve_rows(report: ServeReport) -> list[Row]:
    rows = [("ready after", seconds(report.startup_s))]
    for answer in report.answers:
        rows += [
            ("asked", answer.question),
            (
                "answered",
                f"{answer.answer!r} ({answer.completion_tokens} tokens, {seconds(answer.seconds)})",
            ),
        ]
    return rows


def _doctor(report: DoctorReport) -> "RenderableType":
    from rich.markup import escape
    from rich.table import Table

    table = Table(
        title="infopt doctor", title_justify="left", show_header=False, box=None, pad_edge=False
    )
    table.add_column(no_wrap=True)
    table.add_column(style="dim", no_wrap=True)
    table.add_column(overflow="fold")
    for found in report.findings:
        mark = "[green]ok[/]" if found.usable else "[yellow]--[/]"
        table.add_row(
            mark,
            found.name,
            escape(f"{found.detail}; {found.advice}" if found.advice else found.detail),
        )
    model = report.default_model
    mark = "[green]ok[/]" if model.path else "[red]no[/]"
    table.add_row(mark, "default model", f"{model.name}: {model.path or model.error}")
    table.add_row("", "cache", report.cache)
    table.add_row("", "computes", f"on {report.device} in {report.dtype}")
    return table
