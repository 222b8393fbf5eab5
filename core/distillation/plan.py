"""What a distillation will do, resolved before any weight is read, and what it needs and takes."""

import json
import time
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path

import torch

from infopt.core.artifact.positions import check_length
from infopt.core.artifact.read import Artifact
from infopt.core.distillation.cache import cache_bytes
from infopt.core.distillation.heads import plan_heads
from infopt.core.distillation.student import plan_student
from infopt.core.distillation.teacher import check_vocabularies
from infopt.core.errors import ResourceError, UnsupportedError, UsageError
from infopt.core.files import require_disk
from infopt.core.hardware.choose import choose_device, choose_dtype
from infopt.core.hardware.probe import probe
from infopt.core.recipe.distill import DistillSettings, StudentShape, shape_of
from infopt.core.reports.schema import Plan
from infopt.core.training.devices import local_device
from infopt.core.training.loop import precision_of

_PROCESS_BYTES = 600 * 2**20
"""Python, torch and transformers themselves."""
_GEMM = 1024
_LEARNING_BYTES = 16
"""Of a parameter that learns: itself, its gradient and two moments, in float32."""
_STATE_BYTES = 12
_LOGITS = 4
"""Copies of a pass's logits that are there at once, in float32."""
_STATES = 40
"""Floats that the backward pass needs of a token, in hidden widths a layer."""
_EFFICIENCY = 0.5
"""Of a training's products against a large one's: its matrices are thin, and not all is products.
"""


@dataclass(frozen=True, slots=True)
class DistillJob:
    """A teacher, its student, the settings, and what follows from them."""

    teacher: Artifact
    student: Artifact | None
    """None where it is cut out of the teacher."""
    shape: StudentShape | None
    settings: DistillSettings
    dtype: torch.dtype
    """Of the teacher's passes and the measurements."""
    device: torch.device

    @property
    def precision(self) -> torch.dtype:
        """What the student computes in as it learns."""
        return precision_of(self.settings, self.device)

    @property
    def windows_seen(self) -> int:
        """At most, over all steps, each counted as often as it is seen."""
        settings = self.settings
        return settings.steps * max(1, settings.batch_tokens // settings.sequence_length)

    def identity(self, windows_hash: str) -> dict[str, str]:
        """What must be equal for unfinished work to be continued; equal work has equal results."""
        named = {"teacher"} if self.student is None else {"teacher", "student"}
        settings = self.settings.model_dump(mode="json", exclude=named)
        return {
            "teacher": self.teacher.fingerprint(),
            "student": "cut" if self.student is None else self.student.fingerprint(),
            "windows": windows_hash,
            "infopt version": version("infopt"),
            "torch version": torch.__version__,
            "device": self.device.type,
            "compute dtype": str(self.dtype),
            **{f"setting {key}": json.dumps(value) for key, value in settings.items()},
        }


def resolve_job(
    teacher: Artifact, settings: DistillSettings, student: Artifact | None
) -> DistillJob:
    """See that teacher and student fit each other; raises UsageError or UnsupportedError."""
    shape = shape_of(settings.student) if settings.student is not None else None
    if (student is None) == (shape is None):
        raise UsageError(
            "the student is missing" if student is None else "there are two students",
            "a student is a model, or sizes to cut out of the teacher such as layers=6",
        )
    learner = student or teacher
    if learner.quantization is not None:
        raise UnsupportedError(
            f"{learner.name} is quantized, and codes do not learn",
            "distill the model it was made from, then quantize",
        )
    if student is not None:
        check_vocabularies(teacher, student)
    known = int(teacher.config.get("vocab_size", 0))
    if settings.top_k is not None and 0 < known < settings.top_k:
        raise UsageError(f"{teacher.name} knows {known} tokens, not the {settings.top_k} of top_k")
    for artifact in (teacher, learner):
        check_length(artifact, settings.sequence_length)
    word = choose_device(settings.device)
    dtype: torch.dtype = getattr(torch, choose_dtype(settings.dtype, word))
    device = local_device(torch.device(word))
    return DistillJob(teacher, student, shape, settings, dtype, device)


def plan_distill(
    artifact: Artifact, settings: DistillSettings, *, student: Artifact | None = None
) -> Plan:
    """Sizes, memory, disk and time; multiplies two matrices to know this device's speed."""
    if settings.medusa_heads is not None:
        return plan_heads(artifact, settings)
    job = resolve_job(artifact, settings, student)
    learning, taught = student_parameters(job), artifact.summary().parameters
    tokens = job.windows_seen * settings.sequence_length
    actions = [
        f"teach a student of {learning / 1e6:.1f}M parameters, "
        f"{learning / taught:.0%} of {artifact.name}'s, by {loss_words(settings)}",
        f"{settings.steps} steps of {tokens // settings.steps} tokens of {settings.text}, "
        f"in {_word(job.precision)} on {job.device.type}",
    ]
    if settings.sequence_level:
        actions.insert(1, "let the teacher write the second half of every window")
    if settings.on_policy:
        actions.append(f"{settings.on_policy:.0%} of windows are continued by the student")
    if settings.top_k is not None:
        actions.insert(1, f"keep the teacher's {settings.top_k} likeliest tokens on disk")
    actions.append("measure both on held-out text, and the student as a draft of its teacher")
    return Plan(
        command="distill",
        actions=tuple(actions),
        memory_bytes=_memory(job, learning),
        disk_bytes=_disk(job, learning),
        seconds=_seconds(job, learning),
    )


def check_resources(job: DistillJob, output: Path) -> None:
    """Raise ResourceError where memory or disk have no room for the work."""
    learning = student_parameters(job)
    require_disk(output, _disk(job, learning), f"distilling {job.teacher.name}")
    needed, free = _memory(job, learning), probe().memory_available_bytes
    if job.device.type == "cpu" and needed - _PROCESS_BYTES > free:
        raise ResourceError(
            f"distilling {job.teacher.name} needs about {needed / 2**20:.0f} MiB of memory, and "
            f"{free / 2**20:.0f} are free",
            "lower micro_tokens or set gradient_checkpointing; or take a smaller student",
        )


def student_parameters(job: DistillJob) -> int:
    """How many parameters the student has."""
    if job.student is not None:
        return job.student.summary().parameters
    assert job.shape is not None
    return plan_student(job.teacher, job.shape).shrunk.parameters


def loss_words(settings: DistillSettings) -> str:
    """What is minimized, for people."""
    words = []
    if settings.alpha > 0:
        beta = f", beta {settings.beta:g}" if settings.loss == "jsd" else ""
        top = f", top {settings.top_k}" if settings.top_k else ""
        share = f"{settings.alpha:.0%} " if settings.alpha < 1 else ""
        words.append(f"{share}{settings.loss} at T={settings.temperature:g}{beta}{top}")
    if settings.alpha < 1:
        words.append("cross-entropy" if settings.alpha == 0 else f"{1 - settings.alpha:.0%} CE")
    if settings.hidden_weight:
        words.append(f"{settings.hidden_weight:g} hidden states")
    if settings.attention_weight:
        words.append(f"{settings.attention_weight:g} attention")
    return " + ".join(words)


def _memory(job: DistillJob, learning: int) -> int:
    settings, config = job.settings, job.teacher.config
    micro = max(settings.micro_tokens, settings.sequence_length)
    logits = micro * int(config.get("vocab_size", 0)) * 4 * _LOGITS
    layers = int(config.get("num_hidden_layers", config.get("n_layer", 1)))
    width = int(config.get("hidden_size", config.get("n_embd", 1)))
    states = micro * width * _STATES * 4 * (2 if settings.gradient_checkpointing else layers)
    teacher = job.teacher.summary().parameters * job.dtype.itemsize
    return _PROCESS_BYTES + learning * _LEARNING_BYTES + teacher + logits + states


def _disk(job: DistillJob, learning: int) -> int:
    """The student before and after, and a shard of it on its way; two states of the training."""
    weights = job.teacher.weight_bytes / max(1, job.teacher.summary().parameters) * learning
    kept = 0
    if job.settings.top_k is not None:
        kept = cache_bytes(job.windows_seen, job.settings.sequence_length, job.settings.top_k)
    return int(4 * weights + 2 * _STATE_BYTES * learning + kept)


def _seconds(job: DistillJob, learning: int) -> float | None:
    """Of the training alone; what models write for it is not predicted."""
    settings = job.settings
    if settings.on_policy or settings.sequence_level:
        return None
    tokens = job.windows_seen * settings.sequence_length
    student = (8.0 if settings.gradient_checkpointing else 6.0) * learning * tokens
    teacher = 2.0 * job.teacher.summary().parameters * tokens if settings.alpha else 0.0
    speed = _EFFICIENCY * _flops_per_second(job.precision, job.device)
    taught = _EFFICIENCY * _flops_per_second(job.dtype, job.device)
    return student / speed + teacher / taught


def _flops_per_second(dtype: torch.dtype, device: torch.device) -> float:
    """Of a square product: the best of six."""
    a = torch.ones(_GEMM, _GEMM, dtype=dtype, device=device)
    best = float("inf")
    for _ in range(6):
        started = time.perf_counter()
        float((a @ a)[0, 0])
        best = min(best, time.perf_counter() - started)
    return 2.0 * _GEMM**3 / best


def _word(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")
