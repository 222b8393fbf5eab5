"""The door: prune a model, let it recover, and write it as an artifact."""

import json
import math
import os
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor

from infopt.core.artifact.read import Artifact
from infopt.core.compression.calibration import (
    calibration_tokens,
    token_hash,
    unread_settings,
)
from infopt.core.compression.checkpoint import open_checkpoint
from infopt.core.compression.output import publish
from infopt.core.compression.quality import held_out, mean_nll
from infopt.core.errors import NumericsError, UnsupportedError, UsageError
from infopt.core.files import check_output, write_atomically
from infopt.core.hardware.probe import peak_memory
from infopt.core.models.hf import skeleton
from infopt.core.models.unfused import unfused
from infopt.core.progress import Progress, ProgressCallback, silent
from infopt.core.pruning.job import PartCheckpoint, PruneJob, Staged, resolve_job
from infopt.core.pruning.mask import zeros
from infopt.core.pruning.plan import check_disk, check_memory
from infopt.core.pruning.retrain import Retrained, check_text, retrain
from infopt.core.pruning.structured import make_structured
from infopt.core.pruning.walked import make_walked
from infopt.core.recipe.prune import PruneSettings
from infopt.core.reports.prune import PrunedPart, PrunePerplexity, PruneReport, Retraining
from infopt.core.reports.schema import Origin

_PROVENANCE: dict[str, Origin] = {
    "sparsity": "measured",
    "parameters": "measured",
    "original_parameters": "measured",
    "bytes": "measured",
    "original_bytes": "measured",
    "perplexity": "measured",
    "calibration_tokens": "measured",
    "resumed_blocks": "measured",
    "seconds": "measured",
    "peak_memory_bytes": "measured",
    "logits_max_difference": "measured",
    "retraining": "measured",
    "layers": "measured",
    "model": "measured",
}
_NO_GAIN = (
    "no engine is faster for these zeros: this artifact is as large and as fast as the dense one"
)
_ONLY_NVIDIA = (
    "only NVIDIA GPUs from Ampere on gain from 2:4, through torch's semi-structured kernels "
    "(infopt.core.layers.sparse); engines load no 2:4 checkpoints any more, so in them, and on "
    "CPUs, this artifact is as large and as fast as the dense one"
)


def prune(
    artifact: Artifact,
    output: Path,
    settings: PruneSettings,
    *,
    resume: bool = False,
    replace: bool = False,
    progress: ProgressCallback = silent,
) -> PruneReport:
    """Prune the model, retrain it where that is asked for, and write the artifact to `output`.

    A finished block and a saved step of training are durable: after an interrupt or a kill,
    `resume` continues there, to the same bytes. The report's `made` is for the caller. Raises
    UsageError (settings, output), UnsupportedError (model), ResumeError (unfinished work),
    NumericsError (weights, activations or a loss not finite), ResourceError (disk, memory).
    """
    started = time.monotonic()
    output = output.expanduser().absolute()
    _check_alone()
    check_output(output, replace=replace)
    progress(Progress("finding the layers and parts"))
    job = resolve_job(artifact, settings)
    check_text(job)
    check_disk(job, output)
    check_memory(job)
    tokens = calibration_tokens(artifact, settings.calibration, settings.seed)
    identity = job.identity(token_hash(tokens))
    with open_checkpoint(
        output, identity, PrunedPart, resume=resume, replace=replace
    ) as checkpoint:
        resumed = checkpoint.finished
        try:
            _check_weights(artifact, progress)
            make = make_structured if settings.method == "structured" else make_walked
            made = make(job, tokens, checkpoint, progress)
            perplexity, retrained = _recover(job, made, tokens, checkpoint, progress)
        except (NumericsError, UnsupportedError, UsageError):
            # It would come again: there is nothing to continue.
            checkpoint.discard()
            raise
        final = retrained.staged if retrained else made.staged
        written = publish(final, output, replace=replace)
        checkpoint.discard()
    report = _report(job, made, retrained, perplexity, written)
    return report.model_copy(
        update={
            "calibration_tokens": tokens.numel() if job.calibrates else 0,
            "resumed_blocks": resumed,
            "seconds": time.monotonic() - started,
        }
    )


def _report(
    job: PruneJob,
    made: Staged,
    retrained: Retrained | None,
    perplexity: PrunePerplexity,
    written: Artifact,
) -> PruneReport:
    """What was found; what only the door knows (text, time, blocks resumed) is left at 0."""
    settings, summary = job.settings, written.summary()
    original = job.artifact.summary()
    return PruneReport(
        model=original,
        provenance=_PROVENANCE,
        warnings=(*made.warnings, *_told(job), *_fallbacks(made.rows)),
        output=str(written.path),
        method=str(settings.method),
        pattern=settings.sparsity,
        allocation=settings.allocation if settings.sparsity else None,
        sparsity=_sparsity(job, written),
        parameters=summary.parameters,
        original_parameters=original.parameters,
        bytes=written.weight_bytes,
        original_bytes=job.artifact.weight_bytes,
        perplexity=perplexity,
        calibration_tokens=0,
        resumed_blocks=0,
        seconds=0.0,
        peak_memory_bytes=_peak_memory(job.device),
        logits_max_difference=retrained.difference if retrained else made.difference,
        retraining=_with_share(retrained.told, perplexity) if retrained else None,
        layers=made.rows,
    )


def _recover(
    job: PruneJob,
    made: Staged,
    tokens: Tensor,
    checkpoint: PartCheckpoint,
    progress: ProgressCallback,
) -> tuple[PrunePerplexity, Retrained | None]:
    """The perplexity before and after, and the retrained model where steps are asked for."""
    stream = held_out(job.artifact)
    known = checkpoint.stage("perplexity.json")

    def measured(artifact: Artifact, word: str) -> float:
        progress(Progress("measuring perplexity", note=word))
        return math.exp(
            _once(known, word, lambda: mean_nll(artifact, stream, job.dtype, job.device))
        )

    dense, pruned = measured(job.artifact, "dense"), measured(made.staged, "pruned")
    if not job.settings.retrain:
        return PrunePerplexity(dense=dense, pruned=pruned), None
    retrained = retrain(job, made.staged, tokens, checkpoint, progress)
    recovered = measured(retrained.staged, "recovered")
    return PrunePerplexity(dense=dense, pruned=pruned, recovered=recovered), retrained


def _once(place: Path, word: str, measure: Callable[[], float]) -> float:
    """A number that an interrupted run need not measure again."""
    known: dict[str, float] = json.loads(place.read_bytes()) if place.exists() else {}
    if word not in known:
        known[word] = measure()
        write_atomically(place, json.dumps(known))
    return known[word]


def _with_share(told: Retraining, perplexity: PrunePerplexity) -> Retraining:
    """With how much of what pruning cost in nats a token came back."""
    assert perplexity.recovered is not None
    lost = math.log(perplexity.pruned / perplexity.dense)
    back = math.log(perplexity.pruned / perplexity.recovered)
    return told.model_copy(update={"recovered_share": back / lost if lost > 0 else None})


def _check_alone() -> None:
    """Raise UsageError under torchrun: the processes would prune beside each other."""
    if (count := os.environ.get("WORLD_SIZE", "1")) != "1":
        raise UsageError(
            f"pruning and its retraining run in one process, and there are {count}",
            "start it without torchrun",
        )


def _check_weights(artifact: Artifact, progress: ProgressCallback) -> None:
    """Raise NumericsError naming the first tensor that is not finite: now, not hours from now."""
    names = artifact.names()
    for index, name in enumerate(names):
        progress(Progress("checking weights", index, len(names)))
        tensor = artifact.tensor(name)
        if tensor.is_floating_point() and not bool(torch.isfinite(tensor).all()):
            raise NumericsError(
                f"{artifact.files[name]}: tensor {name!r} has values that are not finite",
                "the checkpoint is broken; nothing was written",
            )


def _sparsity(job: PruneJob, written: Artifact) -> float:
    """As counted in the file: zeros among the pruned weights, or the parameters that are gone."""
    if not job.targets:
        return 1 - written.summary().parameters / job.artifact.summary().parameters
    apart = unfused(skeleton(written), written)
    gone = sum(zeros(apart.tensor(stored)) for stored in job.stored)
    return gone / sum(target.outputs * target.inputs for target in job.targets)


def _told(job: PruneJob) -> tuple[str, ...]:
    """What a user of the artifact should know of its speed, and of settings without effect."""
    unread: tuple[str, ...] = ()
    if not job.calibrates:
        read = ("text", "chat") if job.settings.retrain else ()
        unread = unread_settings(job.settings.calibration, read=read)
    if job.settings.method == "structured":
        return unread
    pattern = job.settings.pattern
    return (
        *unread,
        _ONLY_NVIDIA if (pattern.kept, pattern.of) == (2, 4) else _NO_GAIN,
    )


def _fallbacks(rows: tuple[PrunedPart, ...]) -> tuple[str, ...]:
    found = Counter(row.fallback for row in rows if row.fallback)
    return tuple(
        f"{count} layer{'s' if count > 1 else ''}: {fallback}" for fallback, count in found.items()
    )


def _peak_memory(device: torch.device) -> int:
    """Of the process on a CPU, of torch's allocations on a GPU; bytes."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    return peak_memory()
