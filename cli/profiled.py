"""A profile as people read it: rows of a table."""

from collections.abc import Iterator

from infopt.core.reports.profile import (
    KvCache,
    MeasuredPhase,
    Prediction,
    ProfileReport,
    StaticProfile,
)
from infopt.core.reports.words import seconds, size

Row = tuple[str, str]
_SHOWN = 5


def profile_rows(report: ProfileReport) -> list[Row]:
    if report.only == "kv":
        return _kv_rows(report.kv_cache, report.static)
    return [
        *_static_rows(report),
        *_phase_rows("prefill", report.prefill),
        *_phase_rows("decode", report.decode),
        *_device_rows(report),
    ]


def _kv_rows(cache: KvCache, static: StaticProfile) -> list[Row]:
    fit = "fits" if static.fits else "does NOT fit"
    return [
        ("KV cache", f"{size(cache.bytes)} at batch {cache.batch}, context {cache.context}"),
        ("per token", f"{size(cache.bytes_per_token)} in {cache.dtype}: {cache.kind}"),
        (
            "weights",
            f"{size(static.weight_bytes)}; the cache is {cache.share_of_weights:.2f} of it",
        ),
        ("memory", f"{size(static.memory_bytes)} of {size(static.device_memory_bytes)}: {fit}"),
    ]


def _static_rows(report: ProfileReport) -> Iterator[Row]:
    static = report.static
    fit = "fits" if static.fits else "does NOT fit"
    active = (
        f"; {static.active_parameters / 1e6:.1f} M for a token"
        if static.active_parameters != static.parameters
        else ""
    )
    yield (
        "parameters",
        f"{static.parameters / 1e6:.1f} M "
        f"({static.parameters_without_embedding / 1e6:.1f} M without embedding{active})",
    )
    yield "weights", size(static.weight_bytes)
    yield (
        "KV cache",
        f"{size(static.kv_bytes_per_token)} per token; {size(static.kv_bytes)} "
        f"at batch {static.batch}, context {static.context}",
    )
    margin = 1 - static.memory_bytes / static.device_memory_bytes
    yield (
        "memory",
        f"{size(static.memory_bytes)} of {size(static.device_memory_bytes)}: {fit}, "
        f"margin {margin:.0%}; largest batch {static.largest_batch}, "
        f"longest context {static.longest_context:,}",
    )
    yield (
        "prefill needs",
        f"{static.prefill.flops / 1e9:.4g} GFLOP, {size(static.prefill.bytes)} "
        f"for {static.prefill.tokens} tokens",
    )
    yield (
        "decode needs",
        f"{static.decode.flops / 1e9:.4g} GFLOP, {size(static.decode.bytes)} per step",
    )
    if static.predicted is not None:
        yield from _prediction_rows(static.predicted, report.device)


def _prediction_rows(found: Prediction, device: str) -> Iterator[Row]:
    by = (
        "from its measured kernels"
        if found.compute_share is None or found.bandwidth_share is None
        else f"at {found.bandwidth_share:.0%} of its bandwidth, {found.compute_share:.0%} of its "
        "FLOP/s, assumed"
    )
    yield "predicted for", f"{device}, {by}"
    yield "TTFT", f"{seconds(found.ttft_s)}, bound by {found.prefill_bound}"
    yield (
        "TPOT",
        f"{seconds(found.tpot_s)}, bound by {found.decode_bound}; "
        f"{found.output_tokens_per_s:.1f} output tokens/s",
    )
    batch = found.critical_batch
    yield (
        "critical batch",
        "none at this context: reading the cache takes longer than computing on it"
        if batch is None
        else f"{batch:.0f}: above it decode is bound by compute",
    )
    yield "critical context", f"{found.critical_context:.0f} tokens: beyond it at no batch"


def _phase_rows(name: str, phase: MeasuredPhase | None) -> Iterator[Row]:
    if phase is None:
        return
    yield (
        name,
        f"{seconds(phase.seconds)}, {phase.tokens_per_s:.1f} tokens/s; "
        f"MFU {phase.mfu:.1%} ({phase.flops_per_s / 1e9:.1f} GFLOP/s), "
        f"MBU {phase.mbu:.1%} ({phase.bytes_per_s / 1e9:.1f} GB/s)",
    )
    if phase.predicted_seconds is not None:
        off = phase.seconds / phase.predicted_seconds - 1
        yield f"{name} predicted", f"{seconds(phase.predicted_seconds)}; measured {off:+.0%}"
    if phase.joules is not None:
        yield f"{name} energy", f"{phase.joules:.3g} J, {phase.joules_per_token:.3g} J a token"
    shares = ", ".join(f"{one.name} {one.share:.0%}" for one in phase.operators[:_SHOWN])
    if shares:
        yield f"{name} time", shares


def _device_rows(report: ProfileReport) -> Iterator[Row]:
    if report.peaks is not None:
        peaks = report.peaks
        yield (
            "peaks",
            f"{peaks.flops_per_s / 1e9:.0f} GFLOP/s, {peaks.bytes_per_s / 1e9:.1f} GB/s "
            f"({peaks.dtype}, measured {peaks.measured_at})",
        )
    if report.memory is not None:
        memory = report.memory
        yield (
            "memory measured",
            f"peak {size(memory.peak_bytes)}, expected {size(memory.expected_bytes)}; "
            f"largest batch by it {memory.largest_batch}",
        )
    if report.trace is not None:
        yield "trace", report.trace
    if report.calibration is not None:
        found = report.calibration
        yield (
            "calibrated",
            f"{found.products} products, {found.layers} layers, {found.steps} steps in "
            f"{found.seconds:.0f} s: {found.file}",
        )
