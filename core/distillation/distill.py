"""The door: a student learns from its teacher and is written as an artifact of its own.

Hinton et al., 2015, Distilling the knowledge in a neural network, arXiv 1503.02531.
"""

import math
import time
from functools import partial
from pathlib import Path

import torch
from torch import Tensor
from transformers import PreTrainedModel

from infopt.core.artifact.read import Artifact
from infopt.core.artifact.write import keep_the_source, write_artifact
from infopt.core.compression.checkpoint import Checkpoint, open_checkpoint
from infopt.core.compression.output import compare_with_disk, publish
from infopt.core.distillation.acceptance import DRAFTED, Original, judge
from infopt.core.distillation.cache import TeacherCache
from infopt.core.distillation.heads import make_heads
from infopt.core.distillation.learner import Student, Write
from infopt.core.distillation.on_policy import learning, written_windows
from infopt.core.distillation.plan import DistillJob, check_resources, loss_words, resolve_job
from infopt.core.distillation.prepare import (
    Ready,
    Stage,
    keep_logits,
    live_teacher,
    measure,
    needs_teacher,
    prepare,
)
from infopt.core.distillation.teacher import show_attention
from infopt.core.errors import NumericsError, UnsupportedError
from infopt.core.files import check_output
from infopt.core.hardware.probe import peak_memory
from infopt.core.models.hf import load_transformers, resolve
from infopt.core.progress import Progress, ProgressCallback, silent
from infopt.core.recipe.distill import DistillSettings
from infopt.core.recipe.recipe import Recipe, Step, dump_recipe
from infopt.core.reports.distill import (
    Acceptance,
    DistillReport,
    Draft,
    HeldOutPoint,
    LossPoint,
    Parameters,
    Quality,
)
from infopt.core.reports.medusa import MedusaReport
from infopt.core.reports.schema import Origin
from infopt.core.runtime.limits import read_eos_token_ids
from infopt.core.training.artifact import trained_tensors
from infopt.core.training.causal import held_out_nll
from infopt.core.training.data import training_windows
from infopt.core.training.devices import process_group
from infopt.core.training.loop import TrainResult, train

_PROVENANCE: dict[str, Origin] = {
    "model": "measured",
    "teacher": "measured",
    "student": "measured",
    "parameters": "measured",
    "nll": "measured",
    "perplexity": "measured",
    "acceptance": "measured",
    "steps": "measured",
    "tokens": "measured",
    "resumed_steps": "measured",
    "losses": "measured",
    "held_out": "measured",
    "bytes": "measured",
    "original_bytes": "measured",
    "seconds": "measured",
    "peak_memory_bytes": "measured",
    "logits_max_difference": "measured",
}
_PROBE_TOKENS = 64
_LARGEST_NLL = 700.0
"""The exponential of more is beyond a float."""


def distill(
    artifact: Artifact,
    output: Path,
    settings: DistillSettings,
    *,
    student: Artifact | None = None,
    resume: bool = False,
    replace: bool = False,
    progress: ProgressCallback = silent,
) -> DistillReport | MedusaReport:
    """Teach `student`, or one that is cut out of `artifact`, and write it to `output`.

    With `medusa_heads` heads are trained instead, on `artifact` as it is. After an interrupt or a
    kill `resume` goes on at the last saved step, to the same bits. The report's `made` is for the
    caller. Raises UsageError (settings, output), UnsupportedError (models that do not fit each
    other), ResumeError (unfinished work), NumericsError (a loss that is not finite), ResourceError
    (disk, memory).
    """
    if settings.medusa_heads is not None:
        return make_heads(
            artifact, output, settings, resume=resume, replace=replace, progress=progress
        )
    started = time.monotonic()
    output = output.expanduser().absolute()
    for read in (artifact, student):
        if read is not None:
            keep_the_source(output, read)
    check_output(output, replace=replace)
    job = resolve_job(artifact, settings, student)
    check_resources(job, output)
    windows = training_windows(artifact, settings.train, settings.seed)
    identity = job.identity(windows.hash)
    with (
        process_group(job.device) as group,
        open_checkpoint(output, identity, LossPoint, resume=resume, replace=replace) as checkpoint,
    ):
        try:
            ready = prepare(job, windows, checkpoint.stage, progress)
            teacher, original, before = measure(job, ready, progress)
            keep_logits(job, ready, teacher, checkpoint.stage, progress)
            group.add_up([0.0])  # the other processes wait for what was prepared
            model, result = _learn(job, ready, teacher, checkpoint.stage, progress)
            del teacher
            staged, difference = _stage(job, ready, model, checkpoint)
        except NumericsError:
            # It would come again: there is nothing to continue.
            checkpoint.discard()
            raise
        progress(Progress("measuring the student"))
        after = judge(load_transformers(staged, job.dtype, job.device), original)
        written = publish(staged, output, replace=replace)
        checkpoint.discard()
    report = _report(job, ready, result, written, original, before, after)
    seconds = time.monotonic() - started
    return report.model_copy(update={"seconds": seconds, "logits_max_difference": difference})


def follow(
    artifact: Artifact, output: Path, settings: DistillSettings, *, student: Artifact | None = None
) -> None:
    """Take part, as a further process of torchrun's, in the training that the first one leads.

    Writes no artifact and shows nothing. Raises as `distill` does.
    """
    if settings.medusa_heads is not None:
        raise UnsupportedError("heads are trained by one process", "start one process alone")
    job = resolve_job(artifact, settings, student)
    windows = training_windows(artifact, settings.train, settings.seed)
    whole = output.expanduser().absolute()
    with process_group(job.device) as group:
        group.add_up([0.0])
        stage = Checkpoint(whole.parent / f".{whole.name}.infopt-partial", LossPoint).stage
        ready = prepare(job, windows, stage, silent)
        teacher = live_teacher(job) if needs_teacher(job) else None
        _learn(job, ready, teacher, stage, silent)


def _learn(
    job: DistillJob,
    ready: Ready,
    teacher: PreTrainedModel | None,
    stage: Stage,
    progress: ProgressCallback,
) -> tuple[PreTrainedModel, TrainResult]:
    """Train the student; a state that an interrupted training left is gone on from.

    What was pruned of it stays zero.
    """
    settings = job.settings
    model = load_transformers(ready.student, torch.float32, job.device)
    if settings.attention_weight:
        show_attention(model)
    cached = settings.top_k is not None
    learner = Student(
        model,
        settings,
        teacher=teacher if needs_teacher(job) else None,
        cache=TeacherCache(stage("logits"), ready.windows.train) if cached else None,
        ends=read_eos_token_ids(ready.student),
        write=_writer(job, ready.student, model) if settings.on_policy else None,
    )
    result = train(
        learner,
        ready.windows,
        settings.train,
        seed=settings.seed,
        device=job.device,
        identity={"student": ready.student.fingerprint()},
        folder=stage("training"),
        evaluate=partial(held_out_nll, model, ready.windows),
        progress=progress,
    )
    return model, result


def _writer(job: DistillJob, artifact: Artifact, model: PreTrainedModel) -> Write:
    """How the student, as it is at a step, writes the second halves of windows."""

    def write(windows: Tensor, seeds: list[int]) -> Tensor:
        newest = learning(artifact, model)
        dtype, device = job.precision, job.device
        return written_windows(newest, windows, seeds, temperature=1.0, dtype=dtype, device=device)

    return write


def _stage(
    job: DistillJob, ready: Ready, model: PreTrainedModel, checkpoint: Checkpoint[LossPoint]
) -> tuple[Artifact, float]:
    """Write the student into the folder of the unfinished work, and compare it with what it was."""
    begun = ready.student
    tensors = trained_tensors(model, begun)
    step = Step(verb="distill", settings=job.settings)
    staged = write_artifact(
        checkpoint.staging(),
        source=begun,
        tensors=(
            (name, tensors[name] if name in tensors else begun.tensor(name))
            for name in begun.names()
        ),
        config=begun.config,
        extra={"recipe.yaml": dump_recipe(Recipe(name="distill", steps=(step,)))},
    )
    probe = ready.windows.train[:1, :_PROBE_TOKENS].clamp(min=0)
    expected = _logits(job, begun, model, probe)
    return staged, compare_with_disk(staged, probe, expected, job.dtype, job.device)


@torch.no_grad()
def _logits(job: DistillJob, begun: Artifact, trained: PreTrainedModel, probe: Tensor) -> Tensor:
    """What the trained weights make of a probe [1, length], rounded as they will be stored."""
    model = load_transformers(begun, job.dtype, job.device)
    newer = dict(trained.named_parameters(remove_duplicate=False))
    for name, parameter in model.named_parameters():
        stored = resolve(model, begun, name)
        dtype = getattr(torch, begun.dtype(stored[0])) if stored else torch.float32
        parameter.copy_(newer[name].to(dtype))
    logits: Tensor = model(input_ids=probe.to(job.device), use_cache=False).logits
    return logits.cpu()


def _report(
    job: DistillJob,
    ready: Ready,
    result: TrainResult,
    written: Artifact,
    text: Original,
    before: tuple[float, Draft],
    after: tuple[float, Draft],
) -> DistillReport:
    """What was found; how long it took is not known here yet."""
    teacher, student = job.teacher.summary(), written.summary()
    nll = {"teacher": text.read.nll, "before": before[0], "after": after[0]}
    perplexity = {key: math.exp(min(value, _LARGEST_NLL)) for key, value in nll.items()}
    sizes = (teacher.parameters, student.parameters)
    return DistillReport(
        model=teacher,
        provenance=_PROVENANCE,
        output=str(written.path),
        teacher=teacher,
        student=student,
        student_layers=ready.layers,
        loss=loss_words(job.settings),
        parameters=Parameters(teacher=sizes[0], student=sizes[1], share=sizes[1] / sizes[0]),
        nll=Quality(**nll),
        perplexity=Quality(**perplexity),
        acceptance=Acceptance(
            drafted=DRAFTED,
            text_tokens=len(text.read.choices),
            greedy_tokens=text.written[:, text.prompt :].numel(),
            before=before[1],
            after=after[1],
        ),
        steps=result.steps,
        tokens=result.tokens,
        stopped=result.stopped,
        resumed_steps=result.resumed,
        losses=tuple(LossPoint(step=n, parts=row) for n, row in enumerate(result.losses, 1)),
        held_out=tuple(HeldOutPoint(step=step, nll=value) for step, value in result.held_out),
        bytes=written.weight_bytes,
        original_bytes=job.teacher.weight_bytes,
        seconds=0.0,
        peak_memory_bytes=_peak_memory(job.device),
        logits_max_difference=0.0,
    )


def _peak_memory(device: torch.device) -> int:
    """Of the process on a CPU, of torch's allocations on a GPU; bytes."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    return peak_memory()
