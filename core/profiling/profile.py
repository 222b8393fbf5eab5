"""Profile: what a model needs by arithmetic, what the runtime reaches of this device's peaks."""

import math
from dataclasses import dataclass
from typing import Protocol

from infopt.core.artifact.read import Artifact
from infopt.core.errors import UsageError
from infopt.core.hardware.calibration import load_calibration
from infopt.core.hardware.choose import choose_device, choose_dtype
from infopt.core.hardware.probe import Machine, probe
from infopt.core.models.config import ModelConfig
from infopt.core.profiling.static import TABLES, static_profile
from infopt.core.profiling.timer import Times, repeat
from infopt.core.progress import Progress, ProgressCallback, silent
from infopt.core.recipe.profile import ProfileSettings
from infopt.core.recipe.serve import EngineSettings
from infopt.core.reports.profile import (
    MeasuredPhase,
    Peaks,
    PhaseCost,
    ProfileReport,
    StaticProfile,
)
from infopt.core.reports.schema import Origin, Plan

# Bytes for the interpreter, the libraries and the allocator: assumed.
_RESERVE = {"cpu": 512 * 2**20, "cuda": 3_500_000_000}
# The share of a peak that the runtime reaches, for the time that a plan tells: assumed.
_UTILIZATION = 0.4
# Runs are called unsteady if their median exceeds the fastest by this factor.
_UNSTEADY = 1.5
_DECODE_WARMUP = 3
_PREFILL_WARMUP = 1


class Runner(Protocol):
    """The runtime, one phase at a time; each call returns when its work is done."""

    dtype: str
    weight_bytes: int
    """Bytes of weights that a decode step reads."""

    def prefill(self, batch: int, tokens: int) -> None:
        """Compute `batch` prompts of `tokens` tokens, up to the logits of their last."""

    def prepare_decode(self, batch: int, context: int) -> None:
        """Make ready for `batch` sequences of `context` tokens, the one to be computed included."""

    def decode_step(self) -> None:
        """One token for each sequence, at that same context."""


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
    assert runner is not None or not (settings.mfu or settings.mbu), "measuring needs a runner"
    config, machine = ModelConfig.from_hf(artifact.config), probe()
    device = choose_device(settings.device)
    dtype = runner.dtype if runner else choose_dtype(settings.dtype, device)
    static = _static(artifact, config, settings, device, dtype, machine)
    warnings = _static_warnings(static)
    report = ProfileReport(
        model=artifact.summary(), provenance=_STATIC_ORIGINS, warnings=warnings, static=static
    )
    if runner is None or not (settings.mfu or settings.mbu):
        return report
    runs = _run(runner, settings, static, progress)
    ceilings, origin, notes = _peaks(runs, device, _name(device, machine), dtype, peaks, progress)
    phases = {phase: run.against(ceilings) for phase, run in runs.items()}
    return report.model_copy(
        update={
            **phases,
            "peaks": ceilings,
            "provenance": _STATIC_ORIGINS | _measured_origins(phases, origin),
            "warnings": (
                *warnings,
                *_weight_warning(static, runner),
                *notes,
                *beyond(phases),
                *_unsteady(phases),
            ),
        }
    )


def plan_profile(artifact: Artifact, settings: ProfileSettings) -> Plan:
    """What `profile` would do: the memory and, on a calibrated device, the time it would take."""
    config, machine = ModelConfig.from_hf(artifact.config), probe()
    device = choose_device(settings.device)
    dtype = choose_dtype(settings.dtype, device)
    static = _static(artifact, config, settings, device, dtype, machine)
    actions = ["count parameters, FLOPs, bytes and memory from the config and the weights' headers"]
    seconds = 0.0
    threads = machine.physical_cores if device == "cpu" else 1
    record, _ = load_calibration(_name(device, machine), dtype, threads)
    flops, rate = (record.flops_per_s, record.bytes_per_s) if record else (math.nan, math.nan)
    if settings.mfu:
        runs = _PREFILL_WARMUP + settings.repeats
        actions.append(f"run {runs} prefills of {settings.batch} x {settings.prompt_tokens} tokens")
        seconds += runs * static.prefill.flops / flops / _UTILIZATION
    if settings.mbu:
        runs = _DECODE_WARMUP + settings.output_tokens
        actions.append(f"run {runs} decode steps of {settings.batch} x 1 token")
        seconds += runs * static.decode.bytes / rate / _UTILIZATION
    if settings.mfu or settings.mbu:
        stored = f"of {record.measured_at}" if record else "measured now and stored"
        actions.append(f"compare with the peaks of {_name(device, machine)} in {dtype}, {stored}")
    measured = settings.mfu or settings.mbu
    return Plan(
        command="profile",
        actions=tuple(actions),
        memory_bytes=static.memory_bytes if measured else _RESERVE[device],
        seconds=None if math.isnan(seconds) else seconds,
    )


@dataclass(frozen=True, slots=True)
class _Run:
    """A phase as it ran, and what it needed with the weights as the runtime holds them."""

    tokens: int
    flops: float
    bytes: float
    times: Times

    def against(self, peaks: Peaks) -> MeasuredPhase:
        seconds = self.times.median
        rate, bandwidth = self.flops / seconds, self.bytes / seconds
        return MeasuredPhase(
            seconds=seconds,
            seconds_min=self.times.best,
            predicted_seconds=max(self.flops / peaks.flops_per_s, self.bytes / peaks.bytes_per_s),
            tokens=self.tokens,
            flops=self.flops,
            bytes=self.bytes,
            tokens_per_s=self.tokens / seconds,
            flops_per_s=rate,
            bytes_per_s=bandwidth,
            mfu=rate / peaks.flops_per_s,
            mbu=bandwidth / peaks.bytes_per_s,
        )


def _run(
    runner: Runner, settings: ProfileSettings, static: StaticProfile, progress: ProgressCallback
) -> dict[str, _Run]:
    runs: dict[str, _Run] = {}
    batch = settings.batch
    if settings.mfu:
        progress(Progress("prefill", note=f"{batch} x {settings.prompt_tokens} tokens"))
        times = repeat(
            lambda: runner.prefill(batch, settings.prompt_tokens),
            warmup=_PREFILL_WARMUP,
            runs=settings.repeats,
        )
        runs["prefill"] = _as_run(static.prefill, runner, times)
    if settings.mbu:
        progress(Progress("decode", note=f"{batch} x 1 token at context {static.context}"))
        runner.prepare_decode(batch, static.context)
        times = repeat(runner.decode_step, warmup=_DECODE_WARMUP, runs=settings.output_tokens)
        runs["decode"] = _as_run(static.decode, runner, times)
    return runs


def _as_run(cost: PhaseCost, runner: Runner, times: Times) -> _Run:
    own = _read_weights(cost)
    return _Run(cost.tokens, cost.flops, cost.bytes - own + runner.weight_bytes, times)


def _read_weights(cost: PhaseCost) -> float:
    """Bytes of weights that every pass reads: all but the rows of the embedding tables."""
    return sum(o.weight_bytes for o in cost.operators if o.name not in TABLES)


def _peaks(
    runs: dict[str, _Run],
    device: str,
    name: str,
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

    known = device_peaks(device, name, dtype, progress=progress)
    phases = {phase: run.against(known.peaks) for phase, run in runs.items()}
    if known.origin == "calibrated" and beyond(phases):
        known = device_peaks(device, name, dtype, progress=progress, at_least=known.peaks)
    return known.peaks, known.origin, known.warnings


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


def _static(
    artifact: Artifact,
    config: ModelConfig,
    settings: ProfileSettings,
    device: str,
    dtype: str,
    machine: Machine,
) -> StaticProfile:
    context = settings.prompt_tokens + settings.output_tokens
    if context > config.max_positions:
        raise UsageError(
            f"{settings.prompt_tokens} prompt and {settings.output_tokens} output tokens exceed "
            f"the model's {config.max_positions} positions",
            "lower --prompt-tokens or --output-tokens",
        )
    return static_profile(
        config,
        dtype=dtype,
        batch=settings.batch,
        prompt_tokens=settings.prompt_tokens,
        context=context,
        device_memory=machine.gpus[0].memory_bytes
        if device == "cuda"
        else machine.memory_total_bytes,
        step_tokens=EngineSettings().max_batch_tokens,
        reserve=_RESERVE[device],
        headers=artifact.headers,
        kv_8bit=_kv_in_8_bits(artifact),
    )


def _kv_in_8_bits(artifact: Artifact) -> bool:
    """Whether the runtime caches keys and values as the artifact says, and it says 8 bits."""
    table = artifact.quantization
    if table is None or not table.get("kv_cache_scheme"):
        return False
    from infopt.core.artifact.schemes import kv_format_of  # it knows torch, this room may not

    return kv_format_of(table, str(artifact.path)) is not None


def _name(device: str, machine: Machine) -> str:
    return machine.gpus[0].name if device == "cuda" else machine.cpu


def _static_warnings(static: StaticProfile) -> tuple[str, ...]:
    if static.fits:
        return ()
    return ("the model does not fit into the device's memory at this batch and context",)


def _weight_warning(static: StaticProfile, runner: Runner) -> tuple[str, ...]:
    expected = _read_weights(static.decode)
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
}


def _measured_origins(phases: dict[str, MeasuredPhase], peaks: Origin) -> dict[str, Origin]:
    found: dict[str, Origin] = {"peaks": peaks}
    for phase in phases:
        found[phase] = "measured"
        for key in ("tokens", "flops", "bytes", "predicted_seconds"):
            found[f"{phase}.{key}"] = "computed"
    return found
