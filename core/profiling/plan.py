"""What `profile` would do, the memory and, on a calibrated device, the time that it would take."""

from pathlib import Path

from infopt.core.artifact.read import Artifact
from infopt.core.files import require_writable
from infopt.core.hardware.probe import probe
from infopt.core.profiling.energy import energy_counter
from infopt.core.profiling.measure import DECODE_WARMUP, PREFILL_WARMUP
from infopt.core.profiling.shape import shape_of
from infopt.core.profiling.subject import RESERVE, static_of, target_of
from infopt.core.recipe.profile import ProfileSettings
from infopt.core.reports.schema import Plan

# The share of a peak that the runtime reaches, for the time that a plan tells: assumed.
_UTILIZATION = 0.4
_CALIBRATION_SECONDS = 180.0


def plan_profile(artifact: Artifact, settings: ProfileSettings) -> Plan:
    """Raises what `profile` would raise of settings and model."""
    target = target_of(settings, probe())
    static = static_of(artifact, shape_of(artifact.config), settings, target)
    if settings.energy:
        energy_counter(target.kind)
    actions = ["count parameters, FLOPs, bytes and memory from the config and the weights' headers"]
    seconds: float | None = 0.0
    speed = target.speed
    if settings.calibrate:
        actions.insert(0, f"measure the peaks and the kernels of {target.name} in {target.dtype}")
        seconds = _CALIBRATION_SECONDS
    with_prefill, with_decode = settings.phases
    if with_prefill:
        runs = PREFILL_WARMUP + settings.repeats
        actions.append(f"run {runs} prefills of {settings.batch} x {settings.prompt_tokens} tokens")
        seconds = _add(seconds, runs * static.prefill.flops, speed.flops_per_s if speed else None)
    if with_decode:
        runs = DECODE_WARMUP + settings.output_tokens
        actions.append(f"run {runs} decode steps of {settings.batch} x 1 token")
        seconds = _add(seconds, runs * static.decode.bytes, speed.bytes_per_s if speed else None)
    if with_prefill or with_decode:
        known = target.measured_at
        stored = f"of {known}" if known else "measured now and stored"
        actions.append(f"compare with the peaks of {target.name} in {target.dtype}, {stored}")
    if settings.trace is not None:
        require_writable(Path(settings.trace))
        actions.append(f"write a trace to {settings.trace}")
    return Plan(
        command="profile",
        actions=tuple(actions),
        memory_bytes=static.memory_bytes if settings.measures else RESERVE["cpu"],
        seconds=seconds,
    )


def _add(seconds: float | None, work: float, rate: float | None) -> float | None:
    """None where nothing is known to tell the time from."""
    if seconds is None or not rate:
        return None
    return seconds + work / rate / _UTILIZATION
