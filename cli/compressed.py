"""Short forms of the reports of prune, distill and of joined heads; pure, as `summary`."""

from collections.abc import Sequence

from infopt.core.reports.distill import DistillReport
from infopt.core.reports.kv_heads import KvHeadsReport
from infopt.core.reports.medusa import MedusaReport
from infopt.core.reports.prune import PruneReport
from infopt.core.reports.words import seconds, size

Row = tuple[str, str]


def prune_rows(report: PruneReport) -> list[Row]:
    found = report.perplexity
    recovered = "" if found.recovered is None else f" -> {found.recovered:.4f} retrained"
    pattern = f", {report.pattern}" if report.pattern else ""
    rows = [
        ("method", f"{report.method}{pattern}"),
        ("sparsity", f"{report.sparsity:.2%} of {_of(report)}"),
        (
            "size",
            f"{_millions(report.original_parameters)} -> {_millions(report.parameters)} parameters,"
            f" {size(report.original_bytes)} -> {size(report.bytes)}",
        ),
        ("perplexity", f"{found.dense:.4f} dense -> {found.pruned:.4f} pruned{recovered}"),
    ]
    if report.retraining is not None:
        told = report.retraining
        share = told.recovered_share
        rows.append(
            (
                "retrained",
                f"{told.steps} steps, {told.tokens} tokens from the {told.source_words} in "
                f"{seconds(told.seconds)}"
                + ("" if share is None else f"; {share:.0%} of the lost nats came back"),
            )
        )
    return [*rows, _cost(report.seconds, report.peak_memory_bytes)]


def distill_rows(report: DistillReport) -> list[Row]:
    quality, drafts = report.perplexity, report.acceptance
    return [
        ("teacher", f"{report.teacher.name}, {_millions(report.parameters.teacher)} parameters"),
        (
            "student",
            f"{_millions(report.parameters.student)} parameters, {report.parameters.share:.1%} of "
            "the teacher's",
        ),
        ("loss", f"{report.loss}; {_course([point.parts['loss'] for point in report.losses])}"),
        (
            "perplexity",
            f"{quality.before:.4f} -> {quality.after:.4f}, teacher {quality.teacher:.4f}",
        ),
        (
            "as a draft",
            f"{drafts.before.greedy:.1%} -> {drafts.after.greedy:.1%} of greedy tokens accepted, "
            f"{drafts.after.mean_run:.2f} of {drafts.drafted} in a row",
        ),
        ("trained", f"{report.steps} steps, {report.tokens} tokens"),
        _cost(report.seconds, report.peak_memory_bytes),
    ]


def medusa_rows(report: MedusaReport) -> list[Row]:
    rows = [
        (
            "heads",
            f"{report.medusa_heads}, {_millions(report.parameters)} parameters, "
            f"{size(report.bytes)}; base frozen",
        ),
        ("trained", f"{report.steps} steps, {report.training_tokens} tokens"),
        (
            "choose among",
            f"{report.vocabulary} tokens, {report.covered:.1%} of the held-out text's",
        ),
    ]
    rows += [
        (
            f"head {head.head}" if head.head else "base",
            f"top-1 {head.top1:.1%}, top-5 {head.top5:.1%} (unigram {head.unigram_top1:.1%}, "
            f"{head.unigram_top5:.1%})",
        )
        for head in report.heads
    ]
    rows.append(("mean run", f"{report.mean_run:.2f} tokens beyond the base's own"))
    return [*rows, _cost(report.seconds, report.peak_memory_bytes)]


def kv_heads_rows(report: KvHeadsReport) -> list[Row]:
    found = report.perplexity
    trained = "" if found.uptrained is None else f" -> {found.uptrained:.4f} uptrained"
    return [
        ("KV heads", f"{report.original_kv_heads} -> {report.kv_heads} of {report.query_heads}"),
        (
            "KV cache",
            f"{report.original_kv_bytes_per_token:,} -> {report.kv_bytes_per_token:,} bytes a "
            "token",
        ),
        ("perplexity", f"{found.dense:.4f} -> {found.converted:.4f} joined{trained}"),
        ("size", f"{size(report.original_bytes)} -> {size(report.bytes)}"),
        _cost(report.seconds, report.peak_memory_bytes),
    ]


def _of(report: PruneReport) -> str:
    return "the parameters are gone" if report.pattern is None else "the pruned layers' weights"


def _millions(count: int) -> str:
    return f"{count / 1e6:.1f} M" if count >= 10**5 else f"{count:,}"


def _course(losses: Sequence[float]) -> str:
    return f"{losses[0]:.4f} -> {losses[-1]:.4f}" if losses else "no step was made"


def _cost(took: float, peak: int) -> Row:
    return "cost", f"{seconds(took)}, peak memory {size(peak)}"
