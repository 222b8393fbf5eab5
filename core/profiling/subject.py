"""What a profile speaks of: a model's shape, and the device that it is set against."""

import os
from dataclasses import dataclass

from infopt.core.artifact.read import Artifact
from infopt.core.errors import UsageError
from infopt.core.hardware.calibration import load_calibration
from infopt.core.hardware.choose import choose_device, choose_dtype
from infopt.core.hardware.devices import find_device
from infopt.core.hardware.kernel_times import KernelTimes, load_kernel_times
from infopt.core.hardware.probe import Machine
from infopt.core.profiling.predict import Speed, predict
from infopt.core.profiling.shape import ModelShape
from infopt.core.profiling.static import static_profile
from infopt.core.profiling.stored import runtime_format, stored_bits
from infopt.core.recipe.profile import ProfileSettings
from infopt.core.recipe.serve import EngineSettings
from infopt.core.reports.profile import StaticProfile
from infopt.core.reports.schema import Origin

# Bytes for the interpreter, the libraries and the allocator: assumed.
RESERVE = {"cpu": 512 * 2**20, "cuda": 3_500_000_000}
_PREFERRED = ("bfloat16", "float16", "float32")


@dataclass(frozen=True, slots=True)
class Target:
    """A device: this one, or one known by its datasheet."""

    name: str
    kind: str
    """'cpu' or 'cuda', whose reserve is assumed."""
    dtype: str
    memory_bytes: int
    speed: Speed | None
    kernels: KernelTimes | None
    origin: Origin
    """Of its speed."""
    measured_at: str | None = None
    """When that was, where it was measured."""
    notes: tuple[str, ...] = ()


def target_of(settings: ProfileSettings, machine: Machine) -> Target:
    """The device that the settings name; raises UnsupportedError for one that is not known."""
    if settings.named_device is not None:
        return _named(settings)
    kind = choose_device(settings.device)
    dtype = choose_dtype(settings.dtype, kind)
    name = device_name(kind, machine)
    threads = expected_threads(machine) if kind == "cpu" else 1
    record, _ = load_calibration(name, dtype, threads)
    return Target(
        name=name,
        kind=kind,
        dtype=dtype,
        memory_bytes=machine.gpus[0].memory_bytes if kind == "cuda" else machine.memory_total_bytes,
        speed=Speed(record.flops_per_s, record.bytes_per_s) if record else None,
        kernels=load_kernel_times(name, dtype, threads) if record else None,
        origin="calibrated",
        measured_at=record.measured_at if record else None,
    )


def _named(settings: ProfileSettings) -> Target:
    peaks = find_device(settings.device)
    known = [dtype for dtype in _PREFERRED if dtype in peaks.flops_per_s]
    dtype = settings.dtype if settings.dtype != "auto" else (known or ["float16"])[0]
    memory = peaks.memory_bytes
    if settings.device_memory_gb is not None:
        memory = int(settings.device_memory_gb * 10**9)
    if memory is None:
        raise UsageError(
            f"{peaks.name} is sold with memories of several sizes", "say --device-memory-gb"
        )
    flops = peaks.flops_per_s.get(dtype)
    notes = []
    if flops is None:
        notes.append(f"no {dtype} rate of {peaks.name} is known: no times are predicted")
    elif dtype in peaks.unverified:
        notes.append(f"the {dtype} rate of {peaks.name} is not from its maker's datasheet")
    return Target(
        name=peaks.name,
        kind="cuda",
        dtype=dtype,
        memory_bytes=memory,
        speed=Speed(flops, peaks.bytes_per_s) if flops else None,
        kernels=None,
        origin="datasheet",
        notes=tuple(notes),
    )


def device_name(kind: str, machine: Machine) -> str:
    """What this machine's processor or first GPU is called."""
    return machine.gpus[0].name if kind == "cuda" else machine.cpu


def expected_threads(machine: Machine) -> int:
    """The threads that torch will have, told without it."""
    said = os.environ.get("OMP_NUM_THREADS", "").split(",")[0]
    return int(said) if said.isdigit() and int(said) > 0 else machine.physical_cores


def static_of(
    artifact: Artifact, shape: ModelShape, settings: ProfileSettings, target: Target
) -> StaticProfile:
    """The static profile with its prediction; raises UsageError beyond the model's positions."""
    context = settings.prompt_tokens + settings.output_tokens
    if context > shape.max_positions:
        raise UsageError(
            f"{settings.prompt_tokens} prompt and {settings.output_tokens} output tokens exceed "
            f"the model's {shape.max_positions} positions",
            "lower --context, --prompt-tokens or --output-tokens",
        )
    quantization = artifact.quantization
    bits = settings.weight_bits
    supposed = bits is not None or not artifact.headers
    static = static_profile(
        shape,
        dtype=target.dtype,
        batch=settings.batch,
        prompt_tokens=settings.prompt_tokens,
        context=context,
        device_memory=target.memory_bytes,
        step_tokens=EngineSettings().max_batch_tokens,
        reserve=RESERVE[target.kind],
        headers=None if supposed else artifact.headers,
        bits=bits if bits is not None else stored_bits(quantization),
        kv_8bit=settings.kv_dtype != "auto" or _kv_in_8_bits(artifact),
    )
    if target.speed is None:
        return static
    predicted = predict(
        shape,
        static,
        target.speed,
        kernels=target.kernels if bits is None else None,
        formats=_formats(runtime_format(quantization)),
    )
    return static.model_copy(update={"predicted": predicted})


def _formats(layers: str) -> dict[str, str]:
    """By operator; dense projections of one input are fused, and lie otherwise in memory."""
    fused = "dense-fused" if layers == "dense" else layers
    return {"qkv": fused, "gate_up": fused, "o": layers, "down": layers, "lm_head": "dense"}


def _kv_in_8_bits(artifact: Artifact) -> bool:
    """Whether the runtime caches keys and values as the artifact says, and it says 8 bits."""
    table = artifact.quantization
    if table is None or not table.get("kv_cache_scheme"):
        return False
    from infopt.core.artifact.schemes import kv_format_of  # it knows torch, this room may not

    return kv_format_of(table, str(artifact.path)) is not None
