"""The pages of prune, distill, Medusa heads and joined heads."""

from collections.abc import Iterable

from infopt.core.reports.curves import curves
from infopt.core.reports.distill import DistillReport
from infopt.core.reports.kv_heads import KvHeadsReport
from infopt.core.reports.medusa import MedusaReport
from infopt.core.reports.page import Block, Cell, Column, Fact, Facts, Figure, Section, Table
from infopt.core.reports.provenance import origin
from infopt.core.reports.prune import PrunedPart, PruneReport
from infopt.core.reports.schema import Report
from infopt.core.reports.words import number, seconds, size


def prune_sections(report: PruneReport) -> tuple[Section, ...]:
    found = report.perplexity
    facts = [
        Fact("method", report.method),
        Fact("pattern", report.pattern or "whole parts"),
        _fact(report, "sparsity", f"{report.sparsity:.3%}", "sparsity"),
        _fact(report, "parameters", f"{report.original_parameters:,} → {report.parameters:,}"),
        _fact(report, "bytes", f"{size(report.original_bytes)} → {size(report.bytes)}"),
        _fact(report, "perplexity dense", number(found.dense), "perplexity.dense"),
        _fact(report, "perplexity pruned", number(found.pruned), "perplexity.pruned"),
    ]
    parts = []
    if report.retraining is not None:
        told = report.retraining
        facts.append(
            _fact(report, "perplexity recovered", number(found.recovered), "perplexity.recovered")
        )
        facts.append(Fact("share of lost nats recovered", number(told.recovered_share, ".1%")))
        lines = {
            f"loss, learning from the {told.source_words}": list(enumerate(told.losses, 1)),
            "held-out NLL": [(point.step, point.nll) for point in told.held_out],
        }
        parts.append(_drawn("Retraining", curves("Retraining", "nats a token", lines)))
    facts += [_fact(report, "took", seconds(report.seconds), "seconds"), _written(report.output)]
    return (
        Section("The artifact", (Facts(tuple(facts)),)),
        *parts,
        Section("What was removed", (_parts(report.layers),)),
    )


def distill_sections(report: DistillReport) -> tuple[Section, ...]:
    facts = Facts(
        (
            Fact("teacher", report.teacher.name),
            Fact("student", f"{report.student.name}, {report.parameters.student:,} parameters"),
            _fact(report, "share of the teacher", f"{report.parameters.share:.1%}", "parameters"),
            Fact("loss", report.loss),
            _fact(report, "trained on", f"{report.tokens:,} tokens", "tokens"),
            _fact(report, "took", seconds(report.seconds), "seconds"),
            _written(report.output),
        )
    )
    names = dict.fromkeys(name for point in report.losses for name in point.parts)
    names.pop("gradient", None)  # its norm is no loss
    lines = {
        name: [(p.step, p.parts[name]) for p in report.losses if name in p.parts] for name in names
    }
    lines["held-out NLL"] = [(point.step, point.nll) for point in report.held_out]
    drafts, nll = report.acceptance, report.nll
    rows = (
        ("NLL, nats a token", nll.before, nll.after, nll.teacher),
        (
            "perplexity",
            report.perplexity.before,
            report.perplexity.after,
            report.perplexity.teacher,
        ),
        ("same token, held-out text", drafts.before.text, drafts.after.text, None),
        ("greedy tokens accepted", drafts.before.greedy, drafts.after.greedy, None),
        (f"accepted of {drafts.drafted}", drafts.before.mean_run, drafts.after.mean_run, None),
    )
    table = Table(
        "The student",
        (Column("", False), Column("before"), Column("after"), Column("teacher")),
        tuple(_row(name, *values) for name, *values in rows),
    )
    return (
        Section("The artifact", (facts,)),
        Section("Quality", (table,)),
        _drawn("Training", curves("Loss", "loss", lines)),
    )


def medusa_sections(report: MedusaReport) -> tuple[Section, ...]:
    facts = Facts(
        (
            Fact("heads", f"{report.medusa_heads} of {report.medusa_layers} layers"),
            Fact("projection", report.projection),
            Fact("learned", f"the {report.targets} tokens"),
            _fact(report, "parameters", f"{report.parameters:,}", "parameters"),
            _fact(report, "choose among", f"{report.vocabulary:,} tokens", "vocabulary"),
            _fact(report, "of the held-out text", number(report.covered, ".1%"), "covered"),
            _fact(report, "mean run", number(report.mean_run), "mean_run"),
            _fact(report, "took", seconds(report.seconds), "seconds"),
            _written(report.output),
        )
    )
    columns = ("top-1", "top-5", "unigram top-1", "unigram top-5", "agrees with the base")
    table = Table(
        f"Accuracy on {report.held_out_tokens:,} held-out tokens",
        (Column("head", False), *(Column(name) for name in columns)),
        tuple(
            (
                Cell(str(head.head) if head.head else "base"),
                *(
                    Cell(number(value, ".1%"))
                    for value in (
                        head.top1,
                        head.top5,
                        head.unigram_top1,
                        head.unigram_top5,
                        head.agreement,
                    )
                ),
            )
            for head in report.heads
        ),
    )
    lines = {
        "loss": list(enumerate(report.losses, 1)),
        "held-out loss": [(point.step, point.loss) for point in report.held_out],
    }
    return (
        Section("The heads", (facts, table)),
        _drawn("Training", curves("Loss", "weighted loss", lines)),
    )


def kv_heads_sections(report: KvHeadsReport) -> tuple[Section, ...]:
    found = report.perplexity
    facts = Facts(
        (
            Fact("KV heads", f"{report.original_kv_heads} → {report.kv_heads}"),
            _fact(
                report,
                "KV cache",
                f"{report.original_kv_bytes_per_token:,} → {report.kv_bytes_per_token:,} bytes a "
                "token",
                "kv_bytes_per_token",
            ),
            _fact(report, "perplexity before", number(found.dense), "perplexity"),
            _fact(report, "perplexity joined", number(found.converted), "perplexity"),
            _fact(report, "perplexity uptrained", number(found.uptrained), "perplexity"),
            _fact(report, "took", seconds(report.seconds), "seconds"),
            _written(report.output),
        )
    )
    spread = Table(
        "How far joined heads were from their mean",
        (Column("tensor", False), Column("||W - mean||² / ||W||²")),
        tuple((Cell(layer.name), Cell(number(layer.spread, ".3f"))) for layer in report.layers),
    )
    parts = [Section("The artifact", (facts,))]
    if report.losses:
        lines = {
            "loss": list(enumerate(report.losses, 1)),
            "held-out NLL": [(point.step, point.loss) for point in report.held_out],
        }
        parts.append(_drawn("Uptraining", curves("Uptraining", "nats a token", lines)))
    return (*parts, Section("Heads", (spread,)))


def _parts(layers: Iterable[PrunedPart]) -> Table:
    columns = (
        Column("part", False),
        Column("kind", False),
        Column("of"),
        Column("removed"),
        Column("error", help="||(W - P) X||² / ||W X||² on the calibration text, or the weight's"),
        Column("magnitude's", help="of removing as many of the smallest weights"),
        Column("note", False),
    )
    rows = tuple(
        (
            Cell(part.name),
            Cell(part.kind),
            Cell(f"{part.total:,}"),
            Cell(f"{part.removed:,} ({part.removed / part.total:.1%})" if part.total else "–"),
            Cell(number(part.error, ".3e")),
            Cell(number(part.magnitude_error, ".3e")),
            Cell(part.fallback or _numbers(part.gone)),
        )
        for part in layers
    )
    return Table("Removed", columns, rows)


def _numbers(gone: tuple[int, ...]) -> str:
    shown = ", ".join(map(str, gone[:16]))
    return f"{shown} and {len(gone) - 16} more" if len(gone) > 16 else shown


def _row(name: str, *values: float | None) -> tuple[Cell, ...]:
    return (Cell(name), *(Cell(number(value)) for value in values))


def _fact(report: Report, term: str, value: str, key: str | None = None) -> Fact:
    return Fact(term, value, origin(report, key or term))


def _written(output: str) -> Fact:
    return Fact("written to", output)


def _drawn(heading: str, figure: Figure | None) -> Section:
    blocks: tuple[Block, ...] = (figure,) if figure is not None else ()
    return Section(heading, blocks)
