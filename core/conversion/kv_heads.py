"""The door: fewer key/value heads (MHA to GQA or MQA), and training to do with them."""

import math
import os
import time
from pathlib import Path

import torch
from torch import Tensor

from infopt.core.artifact.read import Artifact, read_artifact
from infopt.core.artifact.write import keep_the_source, write_artifact
from infopt.core.compression.checkpoint import Checkpoint, open_checkpoint
from infopt.core.compression.output import publish
from infopt.core.compression.quality import held_out, mean_nll
from infopt.core.compression.walk import Walk
from infopt.core.conversion.grouped_query import within_groups
from infopt.core.conversion.kv_job import KvJob, resolve_kv
from infopt.core.conversion.uptrain import Uptrained, uptrain
from infopt.core.errors import NumericsError, ResourceError, UnsupportedError, UsageError
from infopt.core.files import check_output, require_disk
from infopt.core.hardware.probe import peak_memory, probe
from infopt.core.progress import Progress, ProgressCallback, silent
from infopt.core.recipe.kv_heads import KvHeadsSettings
from infopt.core.recipe.recipe import Recipe, Step, dump_recipe
from infopt.core.reports.kv_heads import KvHeadsReport, KvLayer, KvPerplexity, UptrainLoss
from infopt.core.reports.schema import Origin, Plan
from infopt.core.training.data import Windows, training_windows
from infopt.core.training.loop import TrainResult

_PROVENANCE: dict[str, Origin] = {
    "model": "measured",
    "kv_bytes_per_token": "computed",
    "original_kv_bytes_per_token": "computed",
    "perplexity": "measured",
    "training_tokens": "measured",
    "resumed_steps": "measured",
    "losses": "measured",
    "held_out": "measured",
    "layers": "measured",
    "bytes": "measured",
    "original_bytes": "measured",
    "logits_max_difference": "measured",
    "seconds": "measured",
    "peak_memory_bytes": "measured",
}
_PROBE = 24
"""Tokens on which the joined model is held against the original with its heads made equal."""
_PROCESS_BYTES = 600 * 2**20


def convert_kv_heads(
    artifact: Artifact,
    output: Path,
    settings: KvHeadsSettings,
    *,
    resume: bool = False,
    replace: bool = False,
    progress: ProgressCallback = silent,
) -> KvHeadsReport:
    """Write the model with `settings.kv_heads` key/value heads to `output`, and uptrain it.

    Heads are joined by their mean (GQA, https://arxiv.org/abs/2305.13245). Before anything else
    the joined model, read back from disk, is held against the original with the heads of each
    group made equal: block by block they must compute the same. Training goes on with `resume`
    where it was interrupted, to the same bits. The report's `made` is for the caller.

    Raises UsageError (heads that do not divide, output), UnsupportedError (a model whose keys and
    values cannot be told apart), ResumeError (unfinished work), NumericsError, ResourceError.
    """
    started = time.monotonic()
    output = output.expanduser().absolute()
    keep_the_source(output, artifact)
    check_output(output, replace=replace)
    _check_alone()
    job = resolve_kv(artifact, settings)
    _check_room(job, output)
    windows = (
        training_windows(artifact, settings.train, settings.seed) if settings.uptrain else None
    )
    identity = job.identity() | {"training windows": windows.hash if windows else "none"}
    with open_checkpoint(output, identity, KvLayer, resume=resume, replace=replace) as checkpoint:
        try:
            joined, difference = _joined(job, checkpoint, progress)
            trained: Uptrained | None = None
            if windows is not None:
                trained = _uptrained(job, joined, windows, identity, checkpoint, progress)
            staged = joined if trained is None else trained.staged
            perplexity = _perplexities(job, joined, trained, progress)
        except (NumericsError, UnsupportedError):
            # It would come again: there is nothing to continue.
            checkpoint.discard()
            raise
        written = publish(staged, output, replace=replace)
        checkpoint.discard()
    report = _report(job, written, perplexity, trained.result if trained else TrainResult())
    return report.model_copy(
        update={
            "logits_max_difference": trained.difference if trained else difference,
            "seconds": time.monotonic() - started,
        }
    )


def plan_kv_heads(artifact: Artifact, settings: KvHeadsSettings) -> Plan:
    """What would be joined and trained, and what it needs; the time is not predicted."""
    job = resolve_kv(artifact, settings)
    before, after = job.kv_bytes(job.heads), job.kv_bytes(job.groups)
    actions = [
        f"join {job.heads} key/value heads into {job.groups} in {job.layers} layers by their mean",
        f"the KV cache takes {after:,} bytes a token instead of {before:,}",
        "hold the joined model against the original with its heads made equal",
    ]
    if settings.uptrain:
        actions.append(
            f"uptrain {settings.uptrain} steps of {settings.batch_tokens} tokens of "
            f"{settings.text} towards the original's predictions"
        )
    actions.append("measure perplexity on held-out text, write the artifact")
    return Plan(
        command="convert",
        actions=tuple(actions),
        memory_bytes=_memory(job),
        disk_bytes=_disk(job),
    )


def _joined(
    job: KvJob, checkpoint: Checkpoint[KvLayer], progress: ProgressCallback
) -> tuple[Artifact, float]:
    """The artifact with joined heads, kept for a resume, and how it differs from its proof."""
    place = checkpoint.stage("joined")
    if not place.exists():
        progress(Progress("joining heads"))
        write_artifact(
            place,
            source=job.artifact,
            tensors=job.tensors(),
            config=job.config,
            extra={"recipe.yaml": _recipe(job)},
        )
    joined = read_artifact(place)
    return joined, _prove(job, joined, progress)


@torch.no_grad()
def _prove(job: KvJob, joined: Artifact, progress: ProgressCallback) -> float:
    """The largest difference between the blocks of two models that must compute the same: the
    joined one, and the original with each group's heads replaced by what they were joined to.

    So it is seen, whatever the architecture, that the right rows were joined and that the config
    is read as it is meant. Raises UnsupportedError where they differ by more than rounding.
    """
    size = int(job.artifact.config.get("vocab_size", _PROBE))
    generator = torch.Generator().manual_seed(0)
    tokens = torch.randint(size, (1, _PROBE), generator=generator)
    old = Walk(job.artifact, tokens, (), torch.float32, job.device)
    new = Walk(joined, tokens, (), torch.float32, job.device)
    old.start()
    new.start()
    worst = 0.0
    for index, name in enumerate(old.names):
        progress(Progress("proving", index, len(old.names)))
        equal = {
            part.name: part.spread(joined.tensor(part.stored), job.heads, job.groups).to(
                job.device, torch.float32
            )
            for part in job.parts
            if part.name.startswith(f"{name}.")
        }
        old.load()
        wanted = old.run(0, equal).cpu()
        old.advance()
        new.load()
        new.advance()
        found, effect = new.hidden[0], float((old.hidden[0] - wanted).abs().max())
        difference = float((found - wanted).abs().max())
        if not difference <= 1e-2 * effect + 1e-5 * float(wanted.abs().max()):
            raise UnsupportedError(
                f"{name} of {job.artifact.name} does not compute with joined heads what it should: "
                f"it is off by {difference:.3g}",
                "its keys and values are laid out in a way that infopt does not know",
            )
        worst = max(worst, difference)
        old.skip_to(index + 1, [found])
    return worst


def _uptrained(
    job: KvJob,
    joined: Artifact,
    windows: Windows,
    identity: dict[str, str],
    checkpoint: Checkpoint[KvLayer],
    progress: ProgressCallback,
) -> Uptrained:
    return uptrain(
        job,
        joined,
        windows,
        identity,
        folder=checkpoint.stage("uptrain"),
        staging=checkpoint.staging(),
        extra={"recipe.yaml": _recipe(job)},
        progress=progress,
    )


def _perplexities(
    job: KvJob, joined: Artifact, trained: Uptrained | None, progress: ProgressCallback
) -> KvPerplexity:
    stream = held_out(job.artifact)

    def measured(artifact: Artifact) -> float:
        return math.exp(mean_nll(artifact, stream, job.dtype, job.device))

    progress(Progress("measuring perplexity"))
    dense = measured(job.artifact)
    return KvPerplexity(
        dense=dense,
        converted=dense if job.groups == job.heads else measured(joined),
        uptrained=None if trained is None else measured(trained.staged),
    )


def _report(
    job: KvJob, written: Artifact, perplexity: KvPerplexity, result: TrainResult
) -> KvHeadsReport:
    """All but what the door alone knows: the time and the last comparison."""
    return KvHeadsReport(
        model=job.artifact.summary(),
        provenance=_PROVENANCE,
        warnings=_warnings(job, perplexity),
        output=str(written.path),
        kv_heads=job.groups,
        original_kv_heads=job.heads,
        query_heads=job.queries,
        kv_bytes_per_token=job.kv_bytes(job.groups),
        original_kv_bytes_per_token=job.kv_bytes(job.heads),
        perplexity=perplexity,
        uptrain_steps=result.steps,
        training_tokens=result.tokens,
        resumed_steps=result.resumed,
        losses=tuple(row["loss"] for row in result.losses),
        held_out=tuple(UptrainLoss(step=step, loss=loss) for step, loss in result.held_out),
        layers=_rows(job),
        bytes=written.weight_bytes,
        original_bytes=job.artifact.weight_bytes,
        logits_max_difference=0.0,
        seconds=0.0,
        peak_memory_bytes=_peak_memory(job.device),
    )


def _rows(job: KvJob) -> tuple[KvLayer, ...]:
    """How far the heads of each tensor were apart."""
    found = []
    for part in job.parts:
        value: Tensor = job.artifact.tensor(part.stored)[part.before or 0 :]
        # Keys and values of a fused tensor are groups of their own.
        sides = 1 if part.before is None else 2
        spread = within_groups(value, sides * job.heads, sides * job.groups)
        found.append(KvLayer(name=part.stored, spread=spread))
    return tuple(found)


def _warnings(job: KvJob, perplexity: KvPerplexity) -> tuple[str, ...]:
    if job.groups == job.heads:
        return (f"the model has {job.heads} key/value heads already: nothing was joined",)
    if perplexity.uptrained is None and perplexity.converted > 2 * perplexity.dense:
        return (
            f"perplexity rose from {perplexity.dense:.4g} to {perplexity.converted:.4g}: joined "
            "heads need training, --uptrain STEPS",
        )
    return ()


def _recipe(job: KvJob) -> str:
    """The recipe that makes this artifact again."""
    step = Step(verb="convert", settings=job.settings)
    return dump_recipe(Recipe(name="convert", steps=(step,)))


def _parameters(job: KvJob) -> int:
    return job.artifact.summary().parameters


def _memory(job: KvJob) -> int:
    """The measured model, or in training the teacher, the student, its gradient and moments."""
    width, count = job.dtype.itemsize, _parameters(job)
    if not job.settings.uptrain:
        return _PROCESS_BYTES + width * count
    logits = 4 * job.settings.micro_tokens * int(job.artifact.config.get("vocab_size", 0))
    return _PROCESS_BYTES + (width + 16) * count + 3 * logits


def _disk(job: KvJob) -> int:
    """The joined artifact and the trained one, and the training's state twice."""
    size = job.artifact.weight_bytes
    return 4 * size + 24 * _parameters(job) if job.settings.uptrain else 2 * size


def _check_room(job: KvJob, output: Path) -> None:
    """Raise ResourceError where disk or memory do not suffice."""
    doing = f"giving {job.artifact.name} {job.groups} key/value heads"
    require_disk(output, _disk(job), doing)
    needed, free = _memory(job) - _PROCESS_BYTES, probe().memory_available_bytes
    if job.device.type == "cpu" and needed > free:
        raise ResourceError(
            f"{doing} needs about {needed / 2**20:.0f} MiB of memory, and {free / 2**20:.0f} are "
            "free",
            "leave --uptrain away, or use a machine with more",
        )


def _check_alone() -> None:
    """Raise UsageError under torchrun: the processes would convert beside each other."""
    if (count := os.environ.get("WORLD_SIZE", "1")) != "1":
        raise UsageError(
            f"heads are joined and uptrained in one process, and there are {count}",
            "start it without torchrun",
        )


def _peak_memory(device: torch.device) -> int:
    """Of the process on a CPU, of torch's allocations on a GPU; bytes."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    return peak_memory()
