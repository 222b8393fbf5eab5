"""The door: quantize a model and write it as an artifact."""

import dataclasses
import time
from collections import Counter
from pathlib import Path

import torch
from torch import Tensor

from infopt.core.artifact.quantized import stored_names
from infopt.core.artifact.read import Artifact
from infopt.core.compression.calibration import (
    calibration_tokens,
    token_hash,
    unread_settings,
)
from infopt.core.compression.checkpoint import open_checkpoint
from infopt.core.compression.finite import all_finite
from infopt.core.compression.output import publish
from infopt.core.errors import GateError, NumericsError
from infopt.core.files import check_output
from infopt.core.formats.number import IntegerFormat
from infopt.core.hardware.probe import peak_memory
from infopt.core.progress import Progress, ProgressCallback, silent
from infopt.core.quantization.job import Job, resolve_job
from infopt.core.quantization.made import LayerCheckpoint, Made
from infopt.core.quantization.mixed import make_mixed, sensitivity_tokens
from infopt.core.quantization.plan import check_disk, check_memory
from infopt.core.quantization.rotate import check_rotatable
from infopt.core.quantization.rotated import make_rotated, rotated_job
from infopt.core.quantization.trained import make_trained
from infopt.core.quantization.walked import make_walked
from infopt.core.recipe.quantize import QuantizeSettings
from infopt.core.reports.quantize import LayerError, QuantizeReport
from infopt.core.reports.schema import Origin

_PROVENANCE: dict[str, Origin] = {
    "bits": "computed",
    "bits_per_weight": "measured",
    "bytes": "measured",
    "original_bytes": "measured",
    "calibration_tokens": "measured",
    "resumed_blocks": "measured",
    "seconds": "measured",
    "peak_memory_bytes": "measured",
    "logits_max_difference": "measured",
    "allocation": "computed",
    "allocation.measured_ppl_increase": "measured",
    "layers": "measured",
    "model": "measured",
}


def quantize(
    artifact: Artifact,
    output: Path,
    settings: QuantizeSettings,
    *,
    resume: bool = False,
    replace: bool = False,
    progress: ProgressCallback = silent,
) -> QuantizeReport:
    """Quantize the linear layers of the model's blocks and write the artifact to `output`.

    A finished block is durable: after an interrupt or a kill, `resume` continues there, and the
    artifact is byte for byte that of an uninterrupted run. The report's `made` is for the caller.
    Raises UsageError (settings, output), UnsupportedError (model), ResumeError (unfinished work),
    NumericsError (weights or activations not finite), ResourceError (disk, memory), GateError (no
    allocation of bits keeps the bound that was given).
    """
    started = time.monotonic()
    output = output.expanduser().absolute()
    check_output(output, replace=replace)
    job = resolve_job(artifact, settings)
    check_disk(job, output)
    check_memory(job)
    if settings.method == "rotate":
        check_rotatable(artifact)
    tokens = calibration_tokens(artifact, settings.calibration, settings.seed)
    identity = job.identity(token_hash(tokens))
    with open_checkpoint(
        output, identity, LayerError, resume=resume, replace=replace
    ) as checkpoint:
        resumed = checkpoint.finished
        try:
            _check_weights(job, progress)
            made = _make(job, tokens, checkpoint, progress)
        except (NumericsError, GateError):
            # It would come again: there is nothing to continue.
            checkpoint.discard()
            raise
        told = (*made.warnings, *_told(made.job, tokens), *_warnings(made.rows))
        written = publish(made.staged, output, replace=replace)
        checkpoint.discard()
    return QuantizeReport(
        model=artifact.summary(),
        provenance=_PROVENANCE,
        warnings=told,
        output=str(output),
        method=settings.method,
        scheme=str(settings.scheme),
        bits=settings.bits,
        group_size=_group_size(made.job),
        symmetric=bool(settings.symmetric),
        format=settings.format,
        kv_cache=settings.kv_cache,
        bits_per_weight=_bits_per_weight(written, made.job),
        bytes=written.weight_bytes,
        original_bytes=artifact.weight_bytes,
        calibration_tokens=_tokens_seen(job, tokens),
        resumed_blocks=resumed,
        seconds=time.monotonic() - started,
        peak_memory_bytes=_peak_memory(job.device),
        logits_max_difference=made.difference,
        allocation=made.allocation,
        layers=made.rows,
    )


def _make(
    job: Job, tokens: Tensor, checkpoint: LayerCheckpoint, progress: ProgressCallback
) -> Made:
    """Stage the artifact in the way that method and scheme ask for."""
    settings = job.settings
    told: tuple[str, ...] = ()
    if settings.method == "rotate":
        if settings.scheme == "W16A16":
            return make_rotated(job, checkpoint, progress)
        job, told = rotated_job(job, checkpoint, progress)
    make = make_trained if settings.how == "qat" else make_walked
    if settings.scheme == "mixed":
        made = make_mixed(job, tokens, checkpoint, progress, make)
    else:
        made = make(job, tokens, checkpoint, progress)
    return dataclasses.replace(made, warnings=(*made.warnings, *told))


def _check_weights(job: Job, progress: ProgressCallback) -> None:
    """Raise NumericsError naming the first tensor that is not finite: now, not hours from now."""
    names = job.artifact.names()
    for index, name in enumerate(names):
        progress(Progress("checking weights", index, len(names)))
        tensor = job.artifact.tensor(name)
        if tensor.is_floating_point() and not all_finite(tensor):
            raise NumericsError(
                f"{job.artifact.files[name]}: tensor {name!r} has values that are not finite",
                "the checkpoint is broken; nothing was written",
            )


def _bits_per_weight(staged: Artifact, job: Job) -> float:
    """Stored bits of the targets' weights: codes, scales, zeros and what else they come with."""
    stored = sum(
        staged.headers[part].nbytes for name in job.stored for part in stored_names(staged, name)
    )
    weights = sum(target.outputs * target.inputs for target in job.targets)
    return 8 * stored / weights


def _group_size(job: Job) -> int | None:
    forms = [scheme.weight for scheme in job.schemes.values()]
    return next((f.group_size for f in forms if isinstance(f, IntegerFormat)), None)


def _tokens_seen(job: Job, tokens: Tensor) -> int:
    if job.calibrates or job.settings.how == "qat":
        return tokens.numel()
    return sensitivity_tokens(tokens).numel() if job.settings.scheme == "mixed" else 0


def _told(job: Job, tokens: Tensor) -> tuple[str, ...]:
    """What a user of the artifact should know of its loaders, and of settings without effect."""
    unread = () if _tokens_seen(job, tokens) else unread_settings(job.settings.calibration)
    if job.settings.format == "gptq" and job.experts:
        return (
            *unread,
            "plain transformers leaves experts in the gptq format uninitialised; gptqmodel and "
            "vLLM read them, or choose --format compressed-tensors",
        )
    return unread


def _warnings(rows: tuple[LayerError, ...]) -> tuple[str, ...]:
    fallbacks = Counter(row.fallback for row in rows if row.fallback)
    return tuple(
        f"{count} layer{'s' if count > 1 else ''}: {fallback}"
        for fallback, count in fallbacks.items()
    )


def _peak_memory(device: torch.device) -> int:
    """Of the process on a CPU, of torch's allocations on a GPU; bytes."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    return peak_memory()
