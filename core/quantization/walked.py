"""Quantize block by block on a walk through the model."""

from itertools import islice

from torch import Tensor

from infopt.core.compression.calibration import BATCH_TOKENS, batches, keep_bytes
from infopt.core.compression.checkpoint import Commit, committing
from infopt.core.compression.offload import OnDisk, Store, in_memory
from infopt.core.compression.output import compare_with_disk
from infopt.core.compression.walk import Walk
from infopt.core.models.experts import Calibration
from infopt.core.progress import Progress, ProgressCallback
from infopt.core.quantization.block import quantize_block
from infopt.core.quantization.job import Job
from infopt.core.quantization.made import PROBE_TOKENS, LayerCheckpoint, Made
from infopt.core.quantization.output import stage_artifact
from infopt.core.reports.quantize import LayerError


def make_walked(
    job: Job, tokens: Tensor, checkpoint: LayerCheckpoint, progress: ProgressCallback
) -> Made:
    """Quantize every block that is not finished yet, and stage the artifact."""
    shown = tokens[:1, :PROBE_TOKENS]
    expected = _walk(job, tokens, shown, checkpoint, progress)
    progress(Progress("writing"))
    staged = stage_artifact(job, checkpoint)
    progress(Progress("comparing with what was written"))
    difference = compare_with_disk(staged, shown, expected, job.dtype, job.device)
    return Made(staged, job, tuple(checkpoint.rows), difference)


def _walk(
    job: Job, tokens: Tensor, shown: Tensor, checkpoint: LayerCheckpoint, progress: ProgressCallback
) -> Tensor:
    """Quantize the blocks that are not finished yet; returns the probe's logits at the end."""
    data = batches(tokens, BATCH_TOKENS) if job.calibrates else ()
    store = OnDisk(checkpoint.folder) if job.offloaded else in_memory
    walk = _started(job, shown, data, keep_bytes(job.device), store, progress)
    reference = _started(job, shown, data, 0, store, progress) if job.refers else None
    if checkpoint.finished:
        kept = checkpoint.hidden()
        walk.skip_to(checkpoint.finished, islice(kept, len(walk.tokens)))
        if reference is not None:
            reference.skip_to(checkpoint.finished, kept)
    with committing(checkpoint, beside=not job.offloaded) as commit:
        _quantize_blocks(walk, reference, job, checkpoint, commit, progress)
    return walk.probe_logits()


def _quantize_blocks(
    walk: Walk,
    reference: Walk | None,
    job: Job,
    checkpoint: LayerCheckpoint,
    commit: Commit[LayerError],
    progress: ProgressCallback,
) -> None:
    """Those that are not finished yet."""
    total, resumed = len(job.targets), len(checkpoint.rows)
    done = resumed
    for index in range(checkpoint.finished, len(walk.names)):
        note = f"block {index + 1} of {len(walk.names)}"

        def tick(_: str, note: str = note) -> None:
            nonlocal done
            done += 1
            progress(Progress("quantizing layers", done, total, note, resumed))

        progress(Progress("quantizing layers", done, total, note, resumed))
        for each in (walk, reference):
            if each is not None:
                each.load()
        result = quantize_block(walk, reference, index, job, tick)
        walk.advance()
        if reference is not None and reference.position == index:
            reference.advance()
        hidden = [*walk.hidden, *(reference.hidden if reference is not None else ())]
        commit(result.tensors, result.rows, hidden)


def _started(
    job: Job,
    shown: Tensor,
    data: tuple[Tensor, ...],
    keep: int,
    store: Store,
    progress: ProgressCallback,
) -> Walk:
    experts: Calibration = "all" if job.settings.calibrate_all_experts else "routed"
    walk = Walk(
        job.artifact,
        shown,
        data,
        job.dtype,
        job.device,
        keep_bytes=keep,
        experts=experts,
        store=store,
    )
    progress(Progress("embedding the calibration text"))
    walk.start()
    return walk
