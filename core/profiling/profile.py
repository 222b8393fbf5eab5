"""Profile: what a model needs by arithmetic, what the runtime reaches of this device's peaks."""

from pathlib import Path

from infopt.core.artifact.read import Artifact
from infopt.core.hardware.probe import probe
from infopt.core.profiling.energy import energy_counter
from infopt.core.profiling.measure import Run, Runner, read_weights, run_phases
from infopt.core.profiling.memory import MemorySampler, memory_reader
from infopt.core.profiling.shape import ModelShape, shape_of
from infopt.core.profiling.static import dtype_size, kv_bytes_per_token
from infopt.core.profiling.subject import Target, static_of, target_of
from infopt.core.progress import ProgressCallback, silent
from infopt.core.recipe.profile import ProfileSettings
from infopt.core.reports.profile import (
    Drift,
    KvCache,
    MeasuredPhase,
    MemoryTimeline,
    Peaks,
    ProfileReport,
    StaticProfile,
)
from infopt.core.reports.schema import ModelSummary, Origin

# Runs are called unsteady if their median exceeds the fastest by this factor.
_UNSTEADY = 1.5
_DRIFT = 0.15
"""A speed that differs by more from that of the calibration is told."""


def profile(
    artifact: Artifact,
    settings: ProfileSettings,
    runner: Runner | None = None,
    progress: ProgressCallback = silent,
    peaks: Peaks | None = None,
) -> ProfileReport:
    """Count, and with `settings.mfu` or `mbu` measure, prefill and decode; the caller fills `made`.

    Without them no torch is imported and no weight read. Decode is measured at its longest
    context, prompt and output together. `peaks` stands in for those of the device. Raises
    UsageError if that context exceeds the model's positions.
    """
    assert runner is not None or not settings.measures, "measuring needs a runner"
    shape = shape_of(artifact.config)
    target = target_of(settings, probe())
    static = static_of(artifact, shape, settings, target)
    report = _counted(artifact, shape, settings, static, target)
    if runner is None or not settings.measures:
        return report
    energy = energy_counter(target.kind) if settings.energy else None
    if settings.trace is not None:
        from infopt.core.profiling.trace import write_trace

        write_trace(runner, settings, static.context, Path(settings.trace), progress)
        report = report.model_copy(update={"trace": settings.trace})
    if settings.memory:
        reader = memory_reader(target.kind)
        before = reader()
        with MemorySampler(reader) as sampler:
            runs = run_phases(runner, settings, static, progress, energy)
        report = report.model_copy(update={"memory": _memory(before, sampler, static, target)})
    else:
        runs = run_phases(runner, settings, static, progress, energy)
    return _with_runs(report, runs, runner, target, peaks, progress)


def _counted(
    artifact: Artifact,
    shape: ModelShape,
    settings: ProfileSettings,
    static: StaticProfile,
    target: Target,
) -> ProfileReport:
    origins: dict[str, Origin] = dict(_STATIC_ORIGINS)
    if settings.named_device is not None:
        origins["static.device_memory_bytes"] = "datasheet"
    if static.predicted is not None:
        by_kernels = static.predicted.source == "kernels"
        origins["static.predicted"] = "calibrated" if by_kernels else "assumed"
        origins["static.predicted.critical_batch"] = target.origin
        origins["static.predicted.critical_context"] = target.origin
    return ProfileReport(
        model=_summary(artifact, static),
        provenance=origins,
        warnings=(*_static_warnings(static, shape), *target.notes),
        static=static,
        kv_cache=_kv_cache(shape, settings, static),
        device=target.name,
        only="kv" if settings.kv else None,
    )


def _summary(artifact: Artifact, static: StaticProfile) -> ModelSummary:
    """Of a config alone, what it says."""
    summary = artifact.summary()
    if artifact.headers:
        return summary
    found = {"parameters": static.parameters, "bytes": static.weight_bytes}
    return summary.model_copy(update=found)


def _kv_cache(shape: ModelShape, settings: ProfileSettings, static: StaticProfile) -> KvCache:
    layer = shape.layers[0]
    plain = kv_bytes_per_token(shape, dtype_size(static.dtype))
    in_8_bits = static.kv_bytes_per_token != plain
    kept = settings.kv_dtype if settings.kv_dtype != "auto" else "8 bits"
    windows = sorted({one.window for one in shape.layers if one.window is not None})
    if layer.latent_pair_flops:
        kind = f"a latent of {layer.kv_width} elements a layer"
    else:
        kind = f"{layer.kv_vectors // 2} key and value heads of {layer.kv_width}"
    if windows:
        some = sum(one.window is not None for one in shape.layers)
        kind += f"; {some} of {len(shape.layers)} layers keep {windows[-1]} tokens at most"
    return KvCache(
        bytes=static.kv_bytes,
        bytes_per_token=static.kv_bytes_per_token,
        batch=static.batch,
        context=static.context,
        dtype=kept if in_8_bits else static.dtype,
        kind=kind,
        share_of_weights=static.kv_bytes / static.weight_bytes,
    )


def _memory(
    before: int, sampler: MemorySampler, static: StaticProfile, target: Target
) -> MemoryTimeline:
    """With what the runs took beyond weights and cache in place of the reserve assumed."""
    other = max(0, sampler.peak - static.memory.weights - static.memory.kv_cache)
    each = max(1, static.memory.kv_cache // static.batch)
    free = target.memory_bytes - static.memory.weights - other
    return MemoryTimeline(
        peak_bytes=sampler.peak,
        before_bytes=before,
        expected_bytes=static.memory_bytes,
        samples=sampler.timeline,
        largest_batch=max(0, free // each),
    )


def _with_runs(
    report: ProfileReport,
    runs: dict[str, Run],
    runner: Runner,
    target: Target,
    given: Peaks | None,
    progress: ProgressCallback,
) -> ProfileReport:
    if not runs:
        return report
    ceilings, origin, notes = _peaks(runs, target, runner.dtype, given, progress)
    predicted = report.static.predicted
    by_kernels = predicted is not None and predicted.source == "kernels"
    times = {
        "prefill": predicted.ttft_s if predicted is not None and by_kernels else None,
        "decode": predicted.tpot_s if predicted is not None and by_kernels else None,
    }
    phases = {phase: run.against(ceilings, times[phase]) for phase, run in runs.items()}
    drifted = _drift(target) if by_kernels else None
    return report.model_copy(
        update={
            **phases,
            "peaks": ceilings,
            "drift": drifted,
            "provenance": report.provenance | _measured_origins(phases, origin),
            "warnings": (
                *report.warnings,
                *_weight_warning(report.static, runner),
                *notes,
                *beyond(phases),
                *_unsteady(phases),
                *_drifted(drifted),
            ),
        }
    )


def _peaks(
    runs: dict[str, Run],
    target: Target,
    dtype: str,
    given: Peaks | None,
    progress: ProgressCallback,
) -> tuple[Peaks, Origin, tuple[str, ...]]:
    """The given peaks, else those of the device.

    Stored peaks that a phase has just passed were taken on a busy machine: they are measured again.
    """
    if given is not None:
        return given, "calibrated", ()
    from infopt.core.profiling.peaks import device_peaks

    known = device_peaks(target.kind, target.name, dtype, progress=progress)
    phases = {phase: run.against(known.peaks) for phase, run in runs.items()}
    if known.origin == "calibrated" and beyond(phases):
        known = device_peaks(
            target.kind, target.name, dtype, progress=progress, at_least=known.peaks
        )
    return known.peaks, known.origin, known.warnings


def _drift(target: Target) -> Drift | None:
    import torch

    from infopt.core.profiling.drift import drift

    assert target.kernels is not None
    return drift(target.kernels, torch.device(target.kind))


def _drifted(found: Drift | None) -> tuple[str, ...]:
    """A warning for each speed that has changed since the calibration."""
    if found is None:
        return ()
    return tuple(
        f"this device now {what} at {share:.0%} of its speed when it was calibrated "
        f"({found.calibrated_at}): predictions are of then; calibrate again on a quiet machine"
        for what, share in (("reads", found.reading), ("computes", found.computing))
        if abs(share - 1) > _DRIFT
    )


def beyond(phases: dict[str, MeasuredPhase]) -> tuple[str, ...]:
    """A warning for each utilization above 1; the number itself stays as it is."""
    return tuple(
        f"{phase}.{metric} is {value:.0%}, above the peak that was measured: that was on a busy "
        "machine, or the work stays within the cache; do not rely on it"
        for phase, found in phases.items()
        for metric, value in (("mfu", found.mfu), ("mbu", found.mbu))
        if value > 1
    )


def _unsteady(phases: dict[str, MeasuredPhase]) -> tuple[str, ...]:
    """A warning for each phase whose runs differ too much to stand for one another."""
    return tuple(
        f"{phase}: the median run took {found.seconds / found.seconds_min:.1f} times the fastest; "
        "the machine is busy, or has fewer free cores than threads"
        for phase, found in phases.items()
        if found.seconds > _UNSTEADY * found.seconds_min
    )


def _static_warnings(static: StaticProfile, shape: ModelShape) -> tuple[str, ...]:
    found = []
    if not static.fits:
        found.append("the model does not fit into the device's memory at this batch and context")
    if any(layer.experts for layer in shape.layers):
        found.append(
            "the experts that a step reads are expected as if all were equally likely to be chosen"
        )
    if static.predicted is not None and static.predicted.missing:
        kinds = ", ".join(static.predicted.missing)
        found.append(f"no kernel of {kinds} was measured here: their times follow the roofline")
    return tuple(found)


def _weight_warning(static: StaticProfile, runner: Runner) -> tuple[str, ...]:
    expected = read_weights(static.decode)
    if abs(runner.weight_bytes - expected) <= 0.01 * expected:
        return ()
    return (
        f"the runtime reads {runner.weight_bytes / 1e6:.1f} MB of weights a step, the artifact has "
        f"{expected / 1e6:.1f} MB: it holds them in another form, and mbu counts what it reads",
    )


_STATIC_ORIGINS: dict[str, Origin] = {
    "model": "computed",
    "static": "computed",
    "static.device_memory_bytes": "measured",
    "static.memory.reserve": "assumed",
    "kv_cache": "computed",
}


def _measured_origins(phases: dict[str, MeasuredPhase], peaks: Origin) -> dict[str, Origin]:
    found: dict[str, Origin] = {"peaks": peaks}
    for phase in phases:
        found[phase] = "measured"
        for key in ("tokens", "flops", "bytes", "roofline_seconds"):
            found[f"{phase}.{key}"] = "computed"
        found[f"{phase}.predicted_seconds"] = "calibrated"
    found["drift"] = "measured"
    return found
