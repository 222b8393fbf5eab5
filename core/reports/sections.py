"""What the page of each report says, in its order."""

import math
from collections.abc import Mapping, Sequence
from typing import Any

from infopt.core.reports import figures
from infopt.core.reports.artifacts import artifact_blocks
from infopt.core.reports.bench import BenchReport
from infopt.core.reports.bench_sections import bench_sections, bench_title
from infopt.core.reports.compare import CompareReport
from infopt.core.reports.compare_sections import compare_sections
from infopt.core.reports.distill import DistillReport
from infopt.core.reports.evaluate import EvaluateReport
from infopt.core.reports.kernel_sections import kernel_sections
from infopt.core.reports.kernels import KernelsReport
from infopt.core.reports.kv_heads import KvHeadsReport
from infopt.core.reports.medusa import MedusaReport
from infopt.core.reports.page import (
    Block,
    Cell,
    Column,
    Fact,
    Facts,
    Notes,
    Section,
    Table,
)
from infopt.core.reports.profile import ProfileReport
from infopt.core.reports.profile_sections import profile_sections
from infopt.core.reports.provenance import origin
from infopt.core.reports.prune import PruneReport
from infopt.core.reports.quantize import (
    Allocation,
    LayerError,
    QuantizeReport,
    SensitivityReport,
    SensitivityRow,
)
from infopt.core.reports.run import RunReport
from infopt.core.reports.schema import Report
from infopt.core.reports.trained import (
    distill_sections,
    kv_heads_sections,
    medusa_sections,
    prune_sections,
)
from infopt.core.reports.words import number, seconds, size

_HEAD = {"schema_version", "command", "model", "provenance", "warnings", "made"}


def title(report: Report) -> str:
    """What the page is called."""
    match report:
        case QuantizeReport():
            return f"Quantized: {report.output.rpartition('/')[2]}"
        case PruneReport():
            return f"Pruned: {report.output.rpartition('/')[2]}"
        case DistillReport():
            return f"Distilled: {report.output.rpartition('/')[2]}"
        case SensitivityReport():
            return f"Sensitivity of {_name(report)}"
        case EvaluateReport():
            return f"Quality of {_name(report)}"
        case BenchReport():
            return bench_title(report)
        case CompareReport():
            return "Comparison of two sides of runs"
        case KernelsReport():
            return "Native kernels"
        case RunReport():
            return f"Run: {report.recipe}"
    return f"infopt {report.command}" + (f": {report.model.name}" if report.model else "")


def sections(report: Report) -> tuple[Section, ...]:
    """The parts of the page between its head and how it was made."""
    match report:
        case QuantizeReport():
            return _quantize(report)
        case PruneReport():
            return prune_sections(report)
        case DistillReport():
            return distill_sections(report)
        case MedusaReport():
            return medusa_sections(report)
        case KvHeadsReport():
            return kv_heads_sections(report)
        case ProfileReport():
            return profile_sections(report)
        case SensitivityReport():
            return _sensitivity(report)
        case EvaluateReport():
            table = Section("Size and quality", artifact_blocks(report))
            return (table, Section("Measured", (_plain(report),)))
        case BenchReport():
            return bench_sections(report)
        case CompareReport():
            return compare_sections(report)
        case KernelsReport():
            return kernel_sections(report)
        case RunReport():
            return _run(report)
    return (Section("Findings", (_plain(report),)),)


def _run(report: RunReport) -> tuple[Section, ...]:
    steps = Table(
        "Steps",
        (
            Column("step", False),
            Column("verb", False),
            Column("read", False),
            Column("wrote", False),
        ),
        tuple(
            tuple(Cell(text) for text in (str(n), step.verb, step.model, step.output or "–"))
            for n, step in enumerate(report.steps, 1)
        ),
    )
    found = artifact_blocks(report)
    parts = [Section("Size and quality", found)] if found else []
    whole = Facts((Fact("took", seconds(report.seconds), origin(report, "seconds")),))
    parts.append(Section("Steps", (whole, steps)))
    for n, step in enumerate(report.steps, 1):
        warned = _warnings(step.report)
        for index, part in enumerate(sections(step.report)):
            blocks = (*warned, *part.blocks) if index == 0 else part.blocks
            parts.append(Section(f"{n}. {step.verb}: {part.heading}", blocks))
    return tuple(parts)


def _warnings(report: Report) -> tuple[Block, ...]:
    return (Notes(report.warnings, grave=True),) if report.warnings else ()


def _quantize(report: QuantizeReport) -> tuple[Section, ...]:
    parts = [Section("The artifact", (_quantize_facts(report),))]
    fallen = [f"{layer.name}: {layer.fallback}" for layer in report.layers if layer.fallback]
    if fallen:
        parts.append(Section("Fallbacks", (Notes(tuple(fallen)),)))
    if report.layers:
        parts.append(Section("Error by layer", (figures.layer_errors(report.layers),)))
    if report.allocation is not None:
        parts.append(_allocation(report.allocation))
    if report.layers:
        parts.append(Section("Layers", (_layers(report.layers),)))
    return tuple(parts)


def _quantize_facts(report: QuantizeReport) -> Facts:
    def fact(term: str, value: str, key: str) -> Fact:
        return Fact(term, value, origin(report, key))

    group = f"groups of {report.group_size}" if report.group_size else "one group a row"
    kind = "symmetric" if report.symmetric else "asymmetric"
    share = report.bytes / report.original_bytes if report.original_bytes else math.nan
    facts = [
        Fact("method", report.method),
        Fact("scheme", report.scheme or f"{report.bits} bits, {group}, {kind}"),
        Fact("format", report.format or "dense"),
        fact("size before", size(report.original_bytes), "original_bytes"),
        fact("size after", f"{size(report.bytes)} ({number(share, '.1%')})", "bytes"),
        fact("bits per weight", number(report.bits_per_weight, ".3f"), "bits_per_weight"),
        fact("took", seconds(report.seconds), "seconds"),
        fact("peak memory", size(report.peak_memory_bytes), "peak_memory_bytes"),
        fact(
            "read back",
            f"logits differ by at most {number(report.logits_max_difference, '.1e')}",
            "logits_max_difference",
        ),
    ]
    if report.kv_cache:
        facts.insert(2, Fact("KV cache", report.kv_cache))
    if report.calibration_tokens:
        tokens = f"{report.calibration_tokens:,} tokens"
        facts.append(fact("calibrated on", tokens, "calibration_tokens"))
    if report.resumed_blocks:
        facts.append(fact("resumed", f"{report.resumed_blocks} blocks", "resumed_blocks"))
    return Facts((*facts, Fact("written to", report.output)))


def _layers(layers: Sequence[LayerError]) -> Table:
    columns = (
        Column("layer", numeric=False),
        Column("scheme", numeric=False),
        Column("error", help="||(W - Q) X||² / ||W X||² on the calibration text, or the weight's"),
        Column("RTN error", help="of rounding the same layer to nearest"),
        Column("ratio", help="error over RTN error"),
        Column("damp", help="share of the mean Hessian diagonal that was added"),
        Column("tokens", help="rows of calibration inputs that the layer saw"),
        Column("time"),
        Column("fallback", numeric=False),
    )
    return Table("Quantized layers", columns, tuple(_layer(layer) for layer in layers))


def _layer(layer: LayerError) -> tuple[Cell, ...]:
    group = f"g{layer.group_size}" if layer.group_size else "channel"
    ratio = layer.error / layer.rtn_error if layer.rtn_error else math.nan
    texts = (
        layer.name,
        layer.scheme or f"int{layer.bits} {group}",
        number(layer.error, ".3e"),
        number(layer.rtn_error, ".3e"),
        "–" if math.isnan(ratio) else number(ratio, ".3f"),
        number(layer.damp, ".3g"),
        f"{layer.tokens:,}",
        seconds(layer.seconds),
        layer.fallback or "",
    )
    return tuple(Cell(text) for text in texts)


def _allocation(found: Allocation) -> Section:
    facts = [
        Fact("mean bits", number(found.mean_bits, ".3f")),
        Fact("predicted KL", f"{number(found.predicted_kl)} nats a token"),
        Fact("rounds", str(found.rounds)),
    ]
    if found.target_bits is not None:
        facts.insert(0, Fact("asked for", f"{found.target_bits:g} bits a weight"))
    if found.max_ppl_increase is not None:
        facts.insert(0, Fact("asked for", f"at most {found.max_ppl_increase:+.2%} perplexity"))
    if found.measured_ppl_increase is not None:
        facts.append(Fact("measured", f"{number(found.measured_ppl_increase, '+.2%')} perplexity"))
    widest = max(found.bits.values(), default=1)
    rows = tuple((Cell(u), Cell(str(b), 0.8 * b / widest)) for u, b in found.bits.items())
    table = Table("Bits by unit", (Column("unit", numeric=False), Column("bits")), rows)
    return Section("Allocation of bits", (Facts(tuple(facts)), table))


def _sensitivity(report: SensitivityReport) -> tuple[Section, ...]:
    rows = report.sensitivity
    facts = Facts(
        (
            Fact("units", str(len({row.unit for row in rows}))),
            Fact(
                "calibrated on",
                f"{report.calibration_tokens:,} tokens",
                origin(report, "calibration_tokens"),
            ),
            Fact("took", seconds(report.seconds), origin(report, "seconds")),
        )
    )
    if not rows:
        return (Section("Measured", (facts,)),)
    parts = [Section("KL by unit", (facts, figures.sensitivity(rows)))]
    if report.allocation is not None:
        parts.append(_allocation(report.allocation))
    return (*parts, Section("Units", (_units(rows),)))


def _units(rows: Sequence[SensitivityRow]) -> Table:
    widths = sorted({row.bits for row in rows})
    shades = _shades([row.kl for row in rows])
    found: dict[str, dict[int, SensitivityRow]] = {}
    for row in rows:
        found.setdefault(row.unit, {})[row.bits] = row
    lines = []
    for unit, by_bits in found.items():
        any_row = next(iter(by_bits.values()))
        cells = [Cell(unit), Cell(f"{any_row.parameters:,}")]
        at = [by_bits.get(bits) for bits in widths]
        cells += [
            Cell(number(row.kl, ".2e"), shades.get(row.kl)) if row else Cell("–") for row in at
        ]
        cells += [Cell(number(row.delta_nll, "+.2e")) if row else Cell("–") for row in at]
        lines.append(tuple(cells))
    columns = [Column("unit", numeric=False), Column("parameters")]
    columns += [Column(f"KL at {bits}", help="nats a token") for bits in widths]
    columns += [Column(f"ΔNLL at {bits}", help="nats a token") for bits in widths]
    return Table("What each unit costs when it alone is quantized", tuple(columns), tuple(lines))


def _shades(values: Sequence[float]) -> dict[float, float]:
    """Each value's place in 0..1 between the least and the greatest, by their logarithms."""
    logs = {value: math.log(value) for value in values if figures.drawable(value)}
    if not logs:
        return {}
    low, high = min(logs.values()), max(logs.values())
    return {value: (at - low) / ((high - low) or 1.0) for value, at in logs.items()}


def _plain(report: Report) -> Block:
    """Every finding of a report that has no page of its own, in the order of its fields."""
    columns = (Column("finding", False), Column("value"), Column("origin", False))
    values = report.model_dump(mode="python", exclude=_HEAD)
    rows = [
        tuple(Cell(text) for text in (key.replace("_", " "), text, origin(report, key) or ""))
        for key, text in _flat(values, "")
    ]
    return Table("Findings", columns, tuple(rows))


def _flat(value: Any, key: str) -> list[tuple[str, str]]:
    """Dotted keys and values as text; a long list is only counted."""
    match value:
        case Mapping():
            inner = [(f"{key}.{name}" if key else str(name), v) for name, v in value.items()]
            return [line for name, v in inner for line in _flat(v, name)]
        case list() | tuple():
            if len(value) > 20:
                return [(key, f"{len(value)} entries")]
            return [line for n, v in enumerate(value) for line in _flat(v, f"{key}.{n}")]
        case bool() | str():
            return [(key, str(value))]
        case int():
            return [(key, f"{value:,}")]
        case None:
            return [(key, "–")]
        case float():
            return [(key, number(value, ".6g"))]
    return [(key, str(value))]


def _name(report: Report) -> str:
    return report.model.name if report.model else "?"
