"""What a pruning would do, need and take, before it is done (`--dry-run`)."""

import math
import time
from pathlib import Path

import torch

from infopt.core.artifact.read import Artifact
from infopt.core.compression.calibration import BATCH_TOKENS, keep_bytes
from infopt.core.compression.quality import TOKENS as MEASURED_TOKENS
from infopt.core.errors import ResourceError
from infopt.core.files import require_disk
from infopt.core.hardware.probe import probe
from infopt.core.pruning.job import PruneJob, resolve_job
from infopt.core.pruning.retrain import train_settings
from infopt.core.pruning.target import parameter_cost
from infopt.core.recipe.prune import BUDGETS, SIZES, PruneSettings
from infopt.core.reports.schema import Plan

_PROCESS_BYTES = 600 * 2**20
"""Python, torch and transformers themselves."""
_GEMM = 1024
_WINDOW = 1024
"""Tokens whose logits are in memory while perplexity is measured."""
_PASSES = 2.5
"""Of the calibration text through a block, attention and all that is computed again included."""
_SLACK = 1.6
"""What the allocator holds over what lives in it at once."""
_DISK_RESERVE = 1.05


def plan_prune(artifact: Artifact, settings: PruneSettings) -> Plan:
    """What is removed, memory, disk and time; multiplies matrices to know this device's speed."""
    job = resolve_job(artifact, settings)
    calibration = settings.calibration
    actions = [
        _what(job),
        f"computing in {str(job.dtype).removeprefix('torch.')} on {job.device.type}",
    ]
    if job.calibrates:
        actions.append(
            f"calibration: {calibration.samples} windows of {calibration.sequence_length} tokens "
            f"of {calibration.text}"
        )
    if settings.retrain:
        source = "the dense model" if settings.retrain_from == "dense" else "the text"
        actions.append(
            f"retrain {settings.retrain} steps of {settings.retrain_tokens} tokens from {source}"
        )
    actions.append(f"measure perplexity on {MEASURED_TOKENS} held-out tokens")
    actions.append("write a dense artifact, read it back and compare its logits")
    return Plan(
        command="prune",
        actions=tuple(actions),
        memory_bytes=memory_of(job),
        disk_bytes=_disk(job),
        seconds=_seconds(job),
    )


def _what(job: PruneJob) -> str:
    settings = job.settings
    if settings.method != "structured":
        how = " on average (owl)" if settings.allocation == "owl" else ""
        return (
            f"{settings.method}: {len(job.targets)} linear layers in {len(job.blocks)} blocks to "
            f"a sparsity of {settings.sparsity}{how}"
        )
    wanted = {key: getattr(settings, key) for key in (*SIZES, *BUDGETS)}
    words = ", ".join(f"{key} {value}" for key, value in wanted.items() if value is not None)
    rounds = f" in {settings.iterations} rounds" if settings.iterations > 1 else ""
    parts, shape = job.parts, job.shape
    assert parts is not None and shape is not None
    found = [f"{shape.layers} of {len(parts.blocks)} layers"]
    if "heads" not in parts.why_not:
        heads, whole = (groups * parts.queries for groups in (shape.groups, parts.kv_groups))
        found.append(f"{heads} of {whole} heads")
    if "ffn" not in parts.why_not:
        found.append(f"{shape.ffn} of {parts.ffn_size} feed-forward channels")
    found.append(f"{shape.hidden} of {parts.hidden_size} hidden channels")
    return f"structured: what stays is {words}{rounds}: {', '.join(found)}"


def check_memory(job: PruneJob) -> None:
    """Raise ResourceError where the memory that is free cannot hold the work."""
    needed, free = memory_of(job), probe().memory_available_bytes
    if job.device.type == "cpu" and needed - _PROCESS_BYTES > free:
        raise ResourceError(
            f"pruning {job.artifact.name} by {job.settings.method} needs about "
            f"{needed / 2**20:.0f} MiB of memory, and {free / 2**20:.0f} are free",
            "use fewer or shorter --samples, or no --retrain",
        )


def check_disk(job: PruneJob, output: Path) -> None:
    """Raise ResourceError where the disk has no room for the artifact and the work towards it."""
    require_disk(output, _disk(job) * _DISK_RESERVE, f"pruning {job.artifact.name}")


def memory_of(job: PruneJob) -> int:
    """At the peak: the walk, the whole model while it is measured, or its training."""
    width, whole = job.dtype.itemsize, _parameters(job)
    vocabulary = int(job.artifact.config.get("vocab_size", 0))
    needed = [whole * width + _WINDOW * vocabulary * (width + 8)]
    if job.calibrates and job.targets:
        needed.append(_walk_bytes(job))
    if job.settings.retrain:
        settings = train_settings(job.settings)
        rows = max(settings.micro_tokens, settings.sequence_length)
        teacher = whole * width if job.settings.retrain_from == "dense" else 0
        # Weight, gradient and two moments in float32; logits of both, a gradient, and copies.
        needed.append(teacher + 16 * _left(job) + 6 * 4 * rows * vocabulary)
    return _PROCESS_BYTES + max(needed)


def _walk_bytes(job: PruneJob) -> int:
    """All hidden states, one block, and the workspace of its largest layer."""
    width, tokens = job.dtype.itemsize, _tokens(job)
    inside = sum(t.outputs * t.inputs for t in job.targets)
    around = (_parameters(job) - inside) * width
    columns = max(t.inputs for t in job.targets)
    solving = 6 * 4 * columns * columns + 8 * 4 * max(t.outputs * t.inputs for t in job.targets)
    largest = max(sum(t.outputs * t.inputs for t in block.targets) for block in job.blocks)
    outputs = tokens * width * max(sum(t.outputs for t in b.targets) for b in job.blocks)
    kept = min(outputs, keep_bytes(job.device))
    passing = 3 * outputs * min(1, BATCH_TOKENS / tokens)
    block = largest * (width + 4) + solving + kept + passing
    return int(_SLACK * (_hidden_bytes(job) + max(around, block)))


def _disk(job: PruneJob) -> int:
    """The artifact, its tensors among the unfinished work, hidden states, a training's states."""
    size = job.artifact.weight_bytes
    # Pruned blocks; the staged artifact, spooled before it is in place; and the one retrained.
    stages = 3 * size + 2 * _hidden_bytes(job)
    if job.settings.retrain:
        stages += 2 * size + 2 * 12 * _parameters(job)
    return stages


def _parameters(job: PruneJob) -> int:
    return sum(math.prod(job.artifact.shape(name)) for name in job.artifact.names())


def _left(job: PruneJob) -> int:
    """Parameters that are trained on, at most."""
    if job.parts is None or job.shape is None:
        return _parameters(job)
    return int(parameter_cost(job.artifact, job.parts).of(job.shape))


def _tokens(job: PruneJob) -> int:
    """Calibration tokens that are run through the model."""
    calibration = job.settings.calibration
    return calibration.samples * calibration.sequence_length if job.calibrates else 0


def _hidden_bytes(job: PruneJob) -> int:
    parts = job.parts
    size = parts.hidden_size if parts is not None else min(t.inputs for t in job.targets)
    return _tokens(job) * size * job.dtype.itemsize


def _seconds(job: PruneJob) -> float | None:
    """Products at the speed of one product: calibration, perplexities and training.

    What structured pruning measures is not predicted.
    """
    if not job.targets:
        return None
    settings, tokens, whole = job.settings, _tokens(job), _parameters(job)
    work = 2 * 2.0 * MEASURED_TOKENS * whole
    if job.calibrates:
        inputs = {(t.name.rpartition(".")[0], t.inputs) for t in job.targets}
        forward = 2.0 * tokens * sum(t.outputs * t.inputs for t in job.targets)
        hessians = sum(1.25 * tokens * columns**2 for _, columns in inputs)
        rounds = 2 if settings.allocation == "owl" else 1
        work += rounds * (_PASSES * forward + hessians)
        # The error of this method and of magnitude: tr(E H E^T), and of the weight.
        work += sum(6.0 * t.outputs * t.inputs**2 for t in job.targets)
    if settings.method == "sparsegpt":
        work += sum(4.0 * t.outputs * t.inputs**2 for t in job.targets)
    seconds = work / _flops_per_second(job, job.dtype)
    if settings.retrain:
        passes = 6.0 + (2.0 if settings.retrain_from == "dense" else 0.0)
        training = passes * whole * settings.retrain * settings.retrain_tokens
        seconds += training / _flops_per_second(job, torch.float32)
    return seconds


def _flops_per_second(job: PruneJob, dtype: torch.dtype) -> float:
    """Of a square product: the best of twelve."""
    a = torch.ones(_GEMM, _GEMM, dtype=dtype, device=job.device)
    best = float("inf")
    for _ in range(12):
        started = time.perf_counter()
        float((a @ a)[0, 0])
        best = min(best, time.perf_counter() - started)
    return 2.0 * _GEMM**3 / best
