"""What a quantization would do, need and take, before it is done (`--dry-run`)."""

import time
from pathlib import Path

import torch

from infopt.core.artifact.read import Artifact
from infopt.core.compression.calibration import BATCH_TOKENS, keep_bytes
from infopt.core.errors import ResourceError
from infopt.core.files import require_disk
from infopt.core.hardware.probe import probe
from infopt.core.quantization.job import Job, resolve_job
from infopt.core.quantization.mixed import SENSITIVITY_TOKENS
from infopt.core.quantization.qat import qat_memory
from infopt.core.quantization.trained import BATCH_TOKENS as TRAINING_TOKENS
from infopt.core.recipe.quantize import QuantizeSettings
from infopt.core.reports.schema import Plan

_PROCESS_BYTES = 600 * 2**20
"""Python, torch and transformers themselves."""
_GEMM = 1024
# Measured on two cores with a model of 135M parameters, 16 to 128 windows of 512 tokens. Linear
# layers are computed once where their outputs can be kept; attention, norms and all else of a
# block, repeated for its stages, took half as long again as these.
_PASSES = 2.5
_SECONDS_PER_COLUMN = 2e-4
"""Of GPTQ's sweep, which goes by columns and is bound by the calls, not by what they compute."""
_SLACK = 1.6
"""What the allocator holds over what lives in it at once."""
_DISK_RESERVE = 1.05


def plan_quantize(artifact: Artifact, settings: QuantizeSettings) -> Plan:
    """Targets, memory, disk and time; multiplies two matrices to know this device's speed."""
    job = resolve_job(artifact, settings)
    calibration = settings.calibration
    actions = [
        f"{settings.method}: {len(job.targets)} linear layers in {len(job.blocks)} blocks to "
        f"{_scheme_words(job)}",
        f"computing in {str(job.dtype).removeprefix('torch.')} on {job.device.type}",
    ]
    if settings.scheme == "mixed":
        actions.append(
            f"measure every unit of layers at {', '.join(map(str, settings.mixed_bits))} bits "
            f"on {SENSITIVITY_TOKENS} tokens, and allocate bits"
        )
    if job.calibrates or settings.how == "qat":
        actions.append(
            f"calibration: {calibration.samples} windows of {calibration.sequence_length} tokens "
            f"of {calibration.text}"
        )
    if job.offloaded:
        actions.append(f"keep its {job.hidden_bytes / 2**20:.0f} MiB of hidden states on disk")
    if settings.how == "qat":
        actions.append(f"train {settings.steps} steps from the codes that gptq finds")
    words = "a dense" if settings.format is None else f"a {settings.format}"
    actions.append(f"write {words} artifact, read it back and compare its logits")
    return Plan(
        command="quantize",
        actions=tuple(actions),
        memory_bytes=memory_of(job),
        disk_bytes=_disk(job),
        seconds=_seconds(job),
    )


def _scheme_words(job: Job) -> str:
    if job.settings.scheme in ("mixed", "W16A16"):
        return str(job.settings.scheme)
    return "; ".join(sorted({scheme.describe() for scheme in job.schemes.values()}))


def check_memory(job: Job) -> None:
    """Raise ResourceError where the memory that is free cannot hold the work."""
    needed, free = memory_of(job), probe().memory_available_bytes
    if job.device.type == "cpu" and needed - _PROCESS_BYTES > free:
        raise ResourceError(
            f"quantizing {job.artifact.name} by {job.settings.method} needs about "
            f"{needed / 2**20:.0f} MiB of memory, and {free / 2**20:.0f} are free",
            "use fewer or shorter --samples, or a method that holds less (rtn, nf4, fp8)",
        )


def check_disk(job: Job, output: Path) -> None:
    """Raise ResourceError where the disk has no room for the artifact and the work towards it."""
    require_disk(output, _disk(job) * _DISK_RESERVE, f"quantizing {job.artifact.name}")


def memory_of(job: Job) -> int:
    """At the peak: all hidden states but those on disk, one block, and the workspace of its
    largest layer."""
    width = job.dtype.itemsize
    largest = max(sum(t.outputs * t.inputs for t in block.targets) for block in job.blocks)
    outside = [job.artifact.shape(name) for name in job.artifact.names() if name not in job.stored]
    around = sum(torch.Size(shape).numel() for shape in outside) * width
    whole = sum(torch.Size(job.artifact.shape(n)).numel() for n in job.artifact.names())
    if job.settings.how == "qat":
        vocabulary = int(job.artifact.config.get("vocab_size", 0))
        return _PROCESS_BYTES + qat_memory(
            whole, dtype_bytes=width, micro_tokens=TRAINING_TOKENS, vocabulary=vocabulary
        )
    held = whole * width if job.settings.scheme == "mixed" else 0
    if not job.calibrates:
        return _PROCESS_BYTES + max(held, around, largest * (width + 12))
    tokens = job.tokens
    columns = max(t.inputs for t in job.targets)
    solving = 6 * 4 * columns * columns + 6 * 4 * max(t.outputs * t.inputs for t in job.targets)
    batch = min(1, BATCH_TOKENS / tokens)
    hidden = job.hidden_bytes * (batch if job.offloaded else 1)
    outputs = tokens * width * max(sum(t.outputs for t in b.targets) for b in job.blocks)
    kept = min(outputs, keep_bytes(job.device))
    passing = 3 * outputs * batch
    block = largest * (width + 4) * (2 if job.refers else 1) + solving + kept + passing
    return _PROCESS_BYTES + max(held, int(_SLACK * (hidden + max(around, block))))


def _disk(job: Job) -> int:
    """The artifact, its tensors among the unfinished work, and the hidden states of two blocks,
    of a third where they are kept on disk."""
    quantized = 0.0
    for target in job.targets:
        size = target.outputs * target.inputs
        if job.schemes:
            quantized += size * job.schemes[target.name].weight.bits_per_weight(target.inputs) / 8
            quantized += 4 * target.inputs
        else:
            quantized += 4 * size
    dense = sum(
        torch.Size(job.artifact.shape(name)).numel()
        * getattr(torch, job.artifact.dtype(name)).itemsize
        for name in job.artifact.names()
        if name not in job.stored
    )
    hidden = job.hidden_bytes * (3 if job.offloaded else 2)
    stages = job.artifact.weight_bytes if job.settings.method == "rotate" else 0
    if job.settings.how == "qat":
        # Weights and Adam's moments in float32, twice while one replaces the other; GPTQ's codes.
        stages += 2 * 12 * sum(t.outputs * t.inputs for t in job.targets) + int(quantized)
    if job.settings.max_ppl_increase is not None:
        stages += int(quantized + dense)
    # The writer spools a shard before it copies it into place.
    return int(2 * (quantized + dense) + quantized + hidden + 2 * stages)


def _seconds(job: Job) -> float | None:
    """Forward passes, Hessians, factorizations, sweeps and errors, at the speed of a product.

    Rounding alone is no matter of products, and short; searches and training are not predicted.
    """
    if job.settings.how != "gptq" or job.scales or job.settings.scheme == "mixed":
        return None
    tokens = job.tokens
    forward = 2.0 * tokens * sum(t.outputs * t.inputs for t in job.targets)
    inputs = {(t.name.rpartition(".")[0], t.inputs) for t in job.targets}
    hessians = sum(1.25 * tokens * columns**2 for _, columns in inputs)
    solving = sum(10.0 * t.outputs * t.inputs**2 for t in job.targets)
    sweeps = _SECONDS_PER_COLUMN * sum(columns for _, columns in inputs)
    passes = _PASSES * (2 if job.refers else 1)
    return (passes * forward + hessians + solving) / _flops_per_second(job) + sweeps


def _flops_per_second(job: Job) -> float:
    """Of a square product in the compute dtype: the best of twelve."""
    a = torch.ones(_GEMM, _GEMM, dtype=job.dtype, device=job.device)
    best = float("inf")
    for _ in range(12):
        started = time.perf_counter()
        float((a @ a)[0, 0])
        best = min(best, time.perf_counter() - started)
    return 2.0 * _GEMM**3 / best
