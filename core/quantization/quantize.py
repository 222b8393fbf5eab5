"""The door: quantize a model and write it as an artifact."""

import resource
import sys
import time
from collections import Counter
from pathlib import Path

import torch
from torch import Tensor

from infopt.core.artifact.read import Artifact
from infopt.core.compression.calibration import batches, calibration_tokens, token_hash
from infopt.core.compression.walk import Walk
from infopt.core.errors import NumericsError
from infopt.core.files import check_output
from infopt.core.formats.gptq import to_gptq
from infopt.core.progress import Progress, ProgressCallback, silent
from infopt.core.quantization.block import quantize_block
from infopt.core.quantization.checkpoint import Checkpoint, open_checkpoint
from infopt.core.quantization.job import BATCH_TOKENS, Job, keep_bytes, resolve_job
from infopt.core.quantization.output import compare_with_disk, publish, stage_artifact
from infopt.core.quantization.plan import check_disk
from infopt.core.recipe.quantize import QuantizeSettings
from infopt.core.reports.quantize import QuantizeReport
from infopt.core.reports.schema import Origin

_PROBE_TOKENS = 64
_PROVENANCE: dict[str, Origin] = {
    "bits_per_weight": "computed",
    "bytes": "measured",
    "original_bytes": "measured",
    "calibration_tokens": "measured",
    "resumed_blocks": "measured",
    "seconds": "measured",
    "peak_memory_bytes": "measured",
    "logits_max_difference": "measured",
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
    """Quantize the linear layers of the model's blocks and write a GPTQ v1 artifact to `output`.

    A finished block is durable: after an interrupt or a kill, `resume` continues there, and the
    artifact is byte for byte that of an uninterrupted run. The report's `made` is for the caller.
    Raises UsageError (settings, output), UnsupportedError (model), ResumeError (unfinished work),
    NumericsError (weights or activations not finite), ResourceError (disk).
    """
    started = time.monotonic()
    output = output.expanduser().absolute()
    check_output(output, replace=replace)
    job = resolve_job(artifact, settings)
    check_disk(job, output)
    tokens = calibration_tokens(artifact, settings.calibration, settings.seed)
    identity = job.identity(token_hash(tokens))
    with open_checkpoint(output, identity, resume=resume, replace=replace) as checkpoint:
        resumed = checkpoint.finished
        try:
            _check_weights(job, progress)
            shown = tokens[:1, :_PROBE_TOKENS]
            expected = _walk(job, tokens, shown, checkpoint, progress)
            progress(Progress("writing"))
            staged = stage_artifact(job, checkpoint)
            progress(Progress("comparing with what was written"))
            difference = compare_with_disk(job, staged, shown, expected)
        except NumericsError:
            # It would come again: there is nothing to continue.
            checkpoint.discard()
            raise
        written = publish(staged, output, replace=replace)
        rows = tuple(checkpoint.rows)
        checkpoint.discard()
    return QuantizeReport(
        model=artifact.summary(),
        provenance=_PROVENANCE,
        warnings=_warnings(Counter(row.fallback for row in rows if row.fallback)),
        output=str(output),
        method=settings.method,
        bits=settings.bits,
        group_size=job.number_format.group_size,
        symmetric=settings.symmetric,
        format=settings.format,
        bits_per_weight=_bits_per_weight(job),
        bytes=written.weight_bytes,
        original_bytes=artifact.weight_bytes,
        calibration_tokens=tokens.numel() if settings.method == "gptq" else 0,
        resumed_blocks=resumed,
        seconds=time.monotonic() - started,
        peak_memory_bytes=_peak_memory(job.device),
        logits_max_difference=difference,
        layers=rows,
    )


def _walk(
    job: Job, tokens: Tensor, shown: Tensor, checkpoint: Checkpoint, progress: ProgressCallback
) -> Tensor:
    """Quantize the blocks that are not finished yet; returns the probe's logits at the end."""
    data = batches(tokens, BATCH_TOKENS) if job.settings.method == "gptq" else ()
    keep = keep_bytes(job.device)
    walk = Walk(job.artifact, shown, data, job.dtype, job.device, keep_bytes=keep)
    progress(Progress("embedding the calibration text"))
    walk.start()
    if checkpoint.finished:
        walk.skip_to(checkpoint.finished, checkpoint.hidden())
    total, resumed = len(job.targets), len(checkpoint.rows)
    done = resumed
    for index in range(checkpoint.finished, len(walk.names)):
        note = f"block {index + 1} of {len(walk.names)}"
        progress(Progress("quantizing layers", done, total, note, resumed))
        walk.load()
        tensors, rows = {}, []
        for layer in quantize_block(walk, index, job):
            parts = to_gptq(layer.weight)
            tensors.update({f"{layer.row.name}.{key}": part.cpu() for key, part in parts.items()})
            rows.append(layer.row)
            done += 1
            progress(Progress("quantizing layers", done, total, note, resumed))
        walk.advance()
        checkpoint.commit(tensors, rows, walk.hidden)
    return walk.probe_logits()


def _check_weights(job: Job, progress: ProgressCallback) -> None:
    """Raise NumericsError naming the first tensor that is not finite: now, not hours from now."""
    names = job.artifact.names()
    for index, name in enumerate(names):
        progress(Progress("checking weights", index, len(names)))
        tensor = job.artifact.tensor(name)
        if tensor.is_floating_point() and not bool(torch.isfinite(tensor).all()):
            raise NumericsError(
                f"{job.artifact.files[name]}: tensor {name!r} has values that are not finite",
                "the checkpoint is broken; nothing was written",
            )


def _bits_per_weight(job: Job) -> float:
    sizes = [t.outputs * t.inputs for t in job.targets]
    bits = [job.number_format.bits_per_weight(t.inputs) for t in job.targets]
    return sum(b * size for b, size in zip(bits, sizes, strict=True)) / sum(sizes)


def _warnings(fallbacks: Counter[str | None]) -> tuple[str, ...]:
    return tuple(
        f"{count} layer{'s' if count > 1 else ''}: {fallback}"
        for fallback, count in fallbacks.items()
    )


def _peak_memory(device: torch.device) -> int:
    """Of the process on a CPU, of torch's allocations on a GPU; bytes."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024
