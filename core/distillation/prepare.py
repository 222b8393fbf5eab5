"""Before the first step: the student to begin with, the windows, what the teacher is asked once.

All of it is kept with the unfinished work, and what is there already is not made again.
"""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from transformers import PreTrainedModel

from infopt.core.artifact.read import Artifact, read_artifact
from infopt.core.compression.quality import held_out
from infopt.core.distillation.acceptance import Original, judge, look_at
from infopt.core.distillation.cache import fill_cache
from infopt.core.distillation.plan import DistillJob
from infopt.core.distillation.student import cut_student, write_student
from infopt.core.distillation.teacher import load_teacher, taught_windows
from infopt.core.models.hf import load_transformers
from infopt.core.progress import Progress, ProgressCallback
from infopt.core.reports.distill import Draft
from infopt.core.training.data import Windows

_WATCHED_TOKENS = 4096
"""Held-out tokens that are looked at as the training goes on."""

Stage = Callable[[str], Path]
"""Where work of a name is kept until all is done."""


@dataclass(frozen=True, slots=True)
class Ready:
    """All that the training begins with; `layers`: those of the teacher that a cut student has."""

    student: Artifact
    layers: tuple[int, ...] | None
    windows: Windows


def prepare(job: DistillJob, windows: Windows, stage: Stage, progress: ProgressCallback) -> Ready:
    """Cut the student and choose the windows, or let the teacher write them."""
    settings = job.settings
    student, layers = job.student, None
    if job.shape is not None:
        folder = stage("student")
        progress(Progress("cutting the student"))
        cut = cut_student(job.teacher, job.shape)
        layers = cut.layers
        if not folder.exists():
            random = settings.student_init == "random"
            write_student(folder, job.teacher, cut, random=random, seed=settings.seed)
        student = read_artifact(folder, name=f"student of {job.teacher.name}")
    assert student is not None
    train = windows.train
    if settings.top_k is not None or settings.sequence_level:
        train = train[: job.windows_seen]
    watched = windows.held_out[: max(1, _WATCHED_TOKENS // settings.sequence_length)]
    chosen = Windows(train, watched, windows.name, windows.hash)
    if settings.sequence_level:
        chosen = taught_windows(
            job.teacher,
            chosen,
            stage("written"),
            temperature=settings.sequence_temperature,
            seed=settings.seed,
            dtype=job.dtype,
            device=job.device,
            progress=progress,
        )
    return Ready(student, layers, chosen)


def needs_teacher(job: DistillJob) -> bool:
    """Whether the teacher is asked at every step."""
    settings = job.settings
    if settings.top_k is not None:
        return False
    return bool(settings.alpha or settings.hidden_weight or settings.attention_weight)


def live_teacher(job: DistillJob) -> PreTrainedModel:
    """The teacher as a model that tells all that it is asked for."""
    attention = job.settings.attention_weight > 0
    return load_teacher(job.teacher, job.dtype, job.device, attention=attention)


def measure(
    job: DistillJob, ready: Ready, progress: ProgressCallback
) -> tuple[PreTrainedModel, Original, tuple[float, Draft]]:
    """The teacher, what it makes of held-out text, and the student before it learns."""
    progress(Progress("measuring the teacher"))
    teacher = live_teacher(job)
    original = look_at(teacher, held_out(job.teacher))
    progress(Progress("measuring the student"))
    before = judge(load_transformers(ready.student, job.dtype, job.device), original)
    return teacher, original, before


def keep_logits(
    job: DistillJob,
    ready: Ready,
    teacher: PreTrainedModel,
    stage: Stage,
    progress: ProgressCallback,
) -> None:
    """Ask the teacher about every window, where that is done once (top_k)."""
    if job.settings.top_k is None:
        return
    fill_cache(
        stage("logits"),
        ready.windows.train,
        lambda tokens: teacher(input_ids=tokens.to(job.device), use_cache=False).logits,
        k=job.settings.top_k,
        temperature=job.settings.temperature,
        progress=progress,
    )
