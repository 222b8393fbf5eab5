"""What a quantization would do, need and take, before it is done (`--dry-run`)."""

import shutil
import time
from pathlib import Path

import torch

from infopt.core.artifact.read import Artifact
from infopt.core.errors import ResourceError
from infopt.core.quantization.job import BATCH_TOKENS, Job, keep_bytes, resolve_job
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
    tokens = calibration.samples * calibration.sequence_length
    group = job.number_format.group_size
    actions = [
        f"{settings.method}: {len(job.targets)} linear layers in {len(job.blocks)} blocks to "
        f"{settings.bits} bits, {f'groups of {group}' if group else 'one group a row'}, "
        f"{'symmetric' if settings.symmetric else 'asymmetric'}",
        f"computing in {str(job.dtype).removeprefix('torch.')} on {job.device.type}",
    ]
    if settings.method == "gptq":
        actions.append(
            f"calibration: {calibration.samples} windows of {calibration.sequence_length} tokens "
            f"of {calibration.text}"
        )
    actions.append("write a gptq v1 artifact, read it back and compare its logits")
    return Plan(
        command="quantize",
        actions=tuple(actions),
        memory_bytes=_memory(job, tokens),
        disk_bytes=_disk(job, tokens),
        seconds=_seconds(job, tokens),
    )


def check_disk(job: Job, output: Path) -> None:
    """Raise ResourceError where the disk has no room for the artifact and the work towards it."""
    folder = next(p for p in output.parents if p.exists())
    calibration = job.settings.calibration
    needed = int(_disk(job, calibration.samples * calibration.sequence_length) * _DISK_RESERVE)
    free = shutil.disk_usage(folder).free
    if free < needed:
        raise ResourceError(
            f"quantizing {job.artifact.name} needs {needed / 2**20:.0f} MiB of disk, "
            f"{folder} has {free / 2**20:.0f}",
            "free some space or choose another --output",
        )


def _memory(job: Job, tokens: int) -> int:
    """At the peak: all hidden states, one block, and the workspace of its largest layer."""
    width = job.dtype.itemsize
    largest = max(sum(t.outputs * t.inputs for t in block.targets) for block in job.blocks)
    outside = [job.artifact.shape(name) for name in job.artifact.names() if name not in job.stored]
    around = sum(torch.Size(shape).numel() for shape in outside) * width
    if job.settings.method == "rtn":
        return _PROCESS_BYTES + max(around, largest * (width + 12))
    columns = max(t.inputs for t in job.targets)
    solving = 6 * 4 * columns * columns + 6 * 4 * max(t.outputs * t.inputs for t in job.targets)
    hidden = tokens * _hidden_size(job) * width
    outputs = tokens * width * max(sum(t.outputs for t in b.targets) for b in job.blocks)
    kept = min(outputs, keep_bytes(job.device))
    passing = 3 * outputs * min(1, BATCH_TOKENS / tokens)
    block = largest * (width + 4) + solving + kept + passing
    return _PROCESS_BYTES + int(_SLACK * (hidden + max(around, block)))


def _disk(job: Job, tokens: int) -> int:
    """The artifact, its tensors among the unfinished work, and the hidden states of two blocks."""
    sizes = [(t.outputs * t.inputs, t.inputs) for t in job.targets]
    quantized = sum(n * job.number_format.bits_per_weight(columns) / 8 for n, columns in sizes)
    quantized += sum(4 * columns for _, columns in sizes)
    dense = sum(
        torch.Size(job.artifact.shape(name)).numel()
        * getattr(torch, job.artifact.dtype(name)).itemsize
        for name in job.artifact.names()
        if name not in job.stored
    )
    hidden = tokens * _hidden_size(job) * job.dtype.itemsize if job.settings.method == "gptq" else 0
    # The writer spools a shard before it copies it into place.
    return int(2 * (quantized + dense) + quantized + 2 * hidden)


def _hidden_size(job: Job) -> int:
    return min(t.inputs for t in job.targets)


def _seconds(job: Job, tokens: int) -> float | None:
    """Forward passes, Hessians, factorizations, sweeps and errors, at the speed of a product.

    Rounding alone is no matter of products, and short.
    """
    if job.settings.method == "rtn":
        return None
    forward = 2.0 * tokens * sum(t.outputs * t.inputs for t in job.targets)
    inputs = {(t.name.rpartition(".")[0], t.inputs) for t in job.targets}
    hessians = sum(1.25 * tokens * columns**2 for _, columns in inputs)
    solving = sum(10.0 * t.outputs * t.inputs**2 for t in job.targets)
    sweeps = _SECONDS_PER_COLUMN * sum(columns for _, columns in inputs)
    return (_PASSES * forward + hessians + solving) / _flops_per_second(job) + sweeps


def _flops_per_second(job: Job) -> float:
    """Of a square product in the compute dtype: the best of twelve."""
    a = torch.ones(_GEMM, _GEMM, dtype=job.dtype, device=job.device)
    best = float("inf")
    for _ in range(12):
        started = time.perf_counter()
        float((a @ a)[0, 0])
        best = min(best, time.perf_counter() - started)
    return 2.0 * _GEMM**3 / best
