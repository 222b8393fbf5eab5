"""Prune linear layers block by block on a walk through the model."""

import json
import time
from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from infopt.core.artifact.write import write_artifact
from infopt.core.compression.calibration import BATCH_TOKENS, batches, keep_bytes
from infopt.core.compression.gather import Group, gather
from infopt.core.compression.output import compare_with_disk
from infopt.core.compression.statistics import InputStatistics, relative_error
from infopt.core.compression.targets import stages
from infopt.core.compression.walk import Walk
from infopt.core.files import write_atomically
from infopt.core.models.conv1d import is_transposed
from infopt.core.models.hf import resolve
from infopt.core.progress import Progress, ProgressCallback
from infopt.core.pruning.allocate import outlier_share, owl_shares
from infopt.core.pruning.job import PROBE_TOKENS, PartCheckpoint, PruneJob, Staged
from infopt.core.pruning.magnitude import magnitude_mask
from infopt.core.pruning.output import recipe_files, whole_tensors
from infopt.core.pruning.sparsegpt import SparseGptResult, sparsegpt
from infopt.core.pruning.wanda import wanda_mask, wanda_scores
from infopt.core.recipe.prune import Pattern
from infopt.core.reports.prune import PrunedPart


def make_walked(
    job: PruneJob, tokens: Tensor, checkpoint: PartCheckpoint, progress: ProgressCallback
) -> Staged:
    """Prune every block that is not finished yet, and stage the artifact."""
    shown = tokens[:1, :PROBE_TOKENS]
    patterns = _patterns(job, tokens, checkpoint, progress)
    expected = _walk(job, patterns, tokens, checkpoint, progress)
    progress(Progress("writing"))
    staged = write_artifact(
        checkpoint.staging(),
        source=job.artifact,
        tensors=whole_tensors(job.artifact, checkpoint.names(), checkpoint.tensor),
        config=job.artifact.config,
        extra=recipe_files(job.settings),
    )
    progress(Progress("comparing with what was written"))
    difference = compare_with_disk(staged, shown, expected, job.dtype, job.device)
    return Staged(staged, tuple(checkpoint.rows), (), difference)


def _walk(
    job: PruneJob,
    patterns: Sequence[Pattern],
    tokens: Tensor,
    checkpoint: PartCheckpoint,
    progress: ProgressCallback,
) -> Tensor:
    """Prune the blocks that are not finished yet; returns the probe's logits at the end."""
    walk = _started(job, tokens, progress)
    if checkpoint.finished:
        walk.skip_to(checkpoint.finished, checkpoint.hidden())
    total, resumed = len(job.targets), len(checkpoint.rows)
    done = resumed
    for index in range(checkpoint.finished, len(walk.names)):
        note = f"block {index + 1} of {len(walk.names)}"
        progress(Progress("pruning layers", done, total, note, resumed))
        walk.load()
        tensors: dict[str, Tensor] = {}
        rows: list[PrunedPart] = []
        for row, stored, value in _prune_block(walk, index, patterns[index], job):
            rows.append(row)
            tensors[stored] = value
            done += 1
            progress(Progress("pruning layers", done, total, note, resumed))
        walk.advance()
        checkpoint.commit(tensors, rows, walk.hidden)
    return walk.probe_logits()


def _started(job: PruneJob, tokens: Tensor, progress: ProgressCallback) -> Walk:
    data = batches(tokens, BATCH_TOKENS) if job.calibrates else ()
    walk = Walk(
        job.artifact,
        tokens[:1, :PROBE_TOKENS],
        data,
        job.dtype,
        job.device,
        keep_bytes=keep_bytes(job.device),
        experts="all",
    )
    progress(Progress("embedding the calibration text"))
    walk.start()
    return walk


@torch.no_grad()
def _prune_block(
    walk: Walk, index: int, pattern: Pattern, job: PruneJob
) -> Iterator[tuple[PrunedPart, str, Tensor]]:
    """Prune the loaded block in place; of each layer its row, its stored name and stored weight.

    With `true_sequential` each group's inputs are observed after those before it were pruned.
    """
    groups = walk.input_groups(job.blocks[index].targets)
    in_turn = job.calibrates and job.settings.true_sequential
    for stage in stages(walk.model, groups) if in_turn else [groups]:
        known = gather(walk, stage) if job.calibrates else {}
        for group in stage:
            for name in group:
                yield _prune_layer(walk, name, known.get(group), pattern, job)
        walk.settle([name for group in stage for name in group])


def _prune_layer(
    walk: Walk, name: str, seen: InputStatistics | None, pattern: Pattern, job: PruneJob
) -> tuple[PrunedPart, str, Tensor]:
    started = time.perf_counter()
    module, transposed = walk.layer(name), is_transposed(walk.model, name)
    stored = resolve(walk.model, job.artifact, f"{name}.weight")[0]
    # From the file: a dtype that is computed in may be narrower than the one that is stored.
    original = job.artifact.tensor(stored).to(job.device)
    weight = (original.T if transposed else original).to(torch.float32)
    smallest = magnitude_mask(weight, pattern)
    hessian = seen.hessian if seen is not None and seen.rows else None
    found = _pruned(weight, smallest, hessian, pattern, job)
    # As it will be read back: what the artifact stores, in the dtype that is computed in.
    kept = found.weight.to(original.dtype)
    module.weight.copy_(kept)
    row = PrunedPart(
        name=name,
        total=weight.numel(),
        removed=weight.numel() - int(found.mask.sum()),
        error=relative_error(weight, found.weight, hessian),
        magnitude_error=relative_error(weight, weight * smallest, hessian),
        damp=found.damp,
        fallback=found.fallback,
        seconds=time.perf_counter() - started,
        tokens=seen.rows if seen is not None else 0,
    )
    return row, stored, (kept.T if transposed else kept).to("cpu").contiguous()


def _pruned(
    weight: Tensor, smallest: Tensor, hessian: Tensor | None, pattern: Pattern, job: PruneJob
) -> SparseGptResult:
    """The weight float32 [N, K] as the method leaves it; `smallest` is magnitude's mask."""
    method = job.settings.method
    if method == "magnitude" or hessian is None:
        why = None if method == "magnitude" else "magnitude: no token reached this layer"
        return SparseGptResult(weight * smallest, smallest, 0.0, why)
    if method == "wanda":
        mask = wanda_mask(weight, hessian, pattern)
        return SparseGptResult(weight * mask, mask, 0.0, None)
    return sparsegpt(weight, hessian, pattern, damp=job.settings.damp_percent)


def _patterns(
    job: PruneJob, tokens: Tensor, checkpoint: PartCheckpoint, progress: ProgressCallback
) -> list[Pattern]:
    """What each block loses; OWL measures the dense model first, a stage that `resume` keeps."""
    pattern = job.settings.pattern
    if job.settings.allocation == "uniform":
        return [pattern] * len(job.blocks)
    place = checkpoint.stage("owl.json")
    if not place.exists():
        write_atomically(place, json.dumps(_outliers(job, tokens, progress)))
    outliers: list[float] = json.loads(place.read_bytes())
    sizes = [sum(t.outputs * t.inputs for t in block.targets) for block in job.blocks]
    shares = owl_shares(outliers, sizes, pattern.share, job.settings.owl_spread)
    return [Pattern(share) for share in shares]


@torch.no_grad()
def _outliers(job: PruneJob, tokens: Tensor, progress: ProgressCallback) -> list[float]:
    """The share of outliers among each block's scores, in the dense model."""
    walk = _started(job, tokens, progress)
    found = []
    for index in range(len(walk.names)):
        progress(Progress("measuring outliers", index, len(walk.names)))
        walk.load()
        groups: list[Group] = walk.input_groups(job.blocks[index].targets)
        known = gather(walk, groups)
        scores = [
            wanda_scores(walk.layer(name).weight.to(torch.float32), known[group].hessian)
            for group in groups
            for name in group
        ]
        found.append(outlier_share(scores, job.settings.owl_outlier) if scores else 0.0)
        walk.settle([name for group in groups for name in group])
        walk.advance()
    return found
