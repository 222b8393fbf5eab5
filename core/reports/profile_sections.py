"""What the page of a profile says."""

from collections.abc import Iterator, Sequence

from infopt.core.reports.page import Block, Cell, Column, Fact, Facts, Section, Table
from infopt.core.reports.profile import MeasuredPhase, PhaseCost, ProfileReport
from infopt.core.reports.provenance import origin
from infopt.core.reports.roofline import memory_figure, roofline
from infopt.core.reports.words import number, seconds, size


def profile_sections(report: ProfileReport) -> tuple[Section, ...]:
    """Fit, prediction, what was measured, and the counting behind it."""
    found = [Section("Does it fit?", (_fit(report),))]
    if report.static.predicted is not None:
        found.append(Section(f"Predicted for {report.device}", (_predicted(report),)))
    for name, phase in (("Prefill", report.prefill), ("Decode", report.decode)):
        if phase is not None:
            found.append(Section(f"{name}, measured", tuple(_measured(report, name, phase))))
    if report.peaks is not None:
        found.append(Section("Roofline", (roofline(report),)))
    if report.memory is not None:
        found.append(Section("Memory over time", (memory_figure(report.memory),)))
    counted = (
        _operators("Prefill, by arithmetic", report.static.prefill),
        _operators("A decode step, by arithmetic", report.static.decode),
    )
    return (*found, Section("Counted", counted))


def _fit(report: ProfileReport) -> Block:
    static, need = report.static, report.static.memory
    parts = ("weights", "kv_cache", "activations", "logits", "reserve")
    facts = [
        Fact("parameters", f"{static.parameters:,}", origin(report, "static.parameters")),
        Fact("for a token", f"{static.active_parameters:,}", origin(report, "static.parameters")),
        *(
            Fact(
                part.replace("_", " "),
                size(getattr(need, part)),
                origin(report, f"static.memory.{part}"),
            )
            for part in parts
        ),
        Fact("together", size(need.total), origin(report, "static.memory_bytes")),
        Fact(
            "the device has",
            size(static.device_memory_bytes),
            origin(report, "static.device_memory_bytes"),
        ),
        Fact("fits", "yes" if static.fits else "no"),
        Fact("largest batch", f"{static.largest_batch:,}", origin(report, "static.largest_batch")),
        Fact(
            "longest context",
            f"{static.longest_context:,}",
            origin(report, "static.longest_context"),
        ),
        Fact(
            "cache of a token",
            f"{size(report.kv_cache.bytes_per_token)}: {report.kv_cache.kind}",
            origin(report, "kv_cache"),
        ),
    ]
    return Facts(tuple(facts))


def _predicted(report: ProfileReport) -> Block:
    found = report.static.predicted
    assert found is not None
    key = "static.predicted"
    batch = "none" if found.critical_batch is None else f"{found.critical_batch:.0f}"
    return Facts(
        (
            Fact(
                "TTFT",
                f"{seconds(found.ttft_s)}, bound by {found.prefill_bound}",
                origin(report, key),
            ),
            Fact(
                "TPOT",
                f"{seconds(found.tpot_s)}, bound by {found.decode_bound}",
                origin(report, key),
            ),
            Fact("output tokens/s", f"{found.output_tokens_per_s:.1f}", origin(report, key)),
            Fact("critical batch", batch, origin(report, f"{key}.critical_batch")),
            Fact(
                "critical context",
                f"{found.critical_context:.0f} tokens",
                origin(report, f"{key}.critical_context"),
            ),
        )
    )


def _measured(report: ProfileReport, name: str, phase: MeasuredPhase) -> Iterator[Block]:
    key = name.lower()
    facts = [
        Fact(
            "time",
            f"{seconds(phase.seconds)} (best {seconds(phase.seconds_min)})",
            origin(report, key),
        ),
        Fact("tokens/s", f"{phase.tokens_per_s:.1f}", origin(report, key)),
        Fact("MFU", f"{phase.mfu:.1%}", origin(report, key)),
        Fact("MBU", f"{phase.mbu:.1%}", origin(report, key)),
        Fact(
            "bound of the roofline",
            seconds(phase.roofline_seconds),
            origin(report, f"{key}.roofline_seconds"),
        ),
    ]
    if phase.predicted_seconds is not None:
        off = phase.seconds / phase.predicted_seconds - 1
        facts.append(
            Fact(
                "predicted",
                f"{seconds(phase.predicted_seconds)}, measured {off:+.0%}",
                origin(report, f"{key}.predicted_seconds"),
            )
        )
    if phase.joules is not None:
        facts.append(Fact("energy", f"{phase.joules:.3g} J", origin(report, key)))
    yield Facts(tuple(facts))
    if phase.operators:
        yield _by_operator(phase)


def _by_operator(phase: MeasuredPhase) -> Table:
    return Table(
        "With a clock at each operator",
        (
            Column("operator", False),
            Column("time"),
            Column("share"),
            Column("GFLOP"),
            Column("bytes"),
            Column("MFU"),
            Column("MBU"),
        ),
        tuple(
            (
                Cell(one.name),
                Cell(seconds(one.seconds)),
                Cell(f"{one.share:.1%}", one.share),
                Cell(number(one.flops / 1e9)),
                Cell(size(one.bytes)),
                Cell(_percent(one.mfu if one.flops else None)),
                Cell(_percent(one.mbu if one.bytes else None)),
            )
            for one in phase.operators
        ),
    )


def _percent(value: float | None) -> str:
    return "–" if value is None else f"{value:.1%}"


def _operators(caption: str, cost: PhaseCost) -> Table:
    rows: Sequence[tuple[Cell, ...]] = [
        (
            Cell(one.name),
            Cell(number(one.flops / 1e9)),
            Cell(size(one.weight_bytes)),
            Cell(size(one.activation_bytes)),
            Cell(number(one.flops / moved if moved else None)),
        )
        for one in cost.operators
        for moved in (one.weight_bytes + one.activation_bytes,)
    ]
    columns = (
        Column("operator", False),
        Column("GFLOP"),
        Column("weights"),
        Column("cache"),
        Column("FLOP a byte"),
    )
    return Table(caption, columns, tuple(rows))
