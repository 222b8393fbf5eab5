"""Let a model with joined key/value heads learn to predict what the model it came from predicts."""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor
from transformers import PreTrainedModel

from infopt.core.artifact.read import Artifact
from infopt.core.artifact.write import write_artifact
from infopt.core.compression.output import compare_with_disk
from infopt.core.conversion.kv_job import KvJob
from infopt.core.models.hf import load_transformers, resolve
from infopt.core.progress import Progress, ProgressCallback
from infopt.core.training.artifact import trained_tensors
from infopt.core.training.causal import CausalLearner, held_out_nll
from infopt.core.training.data import Windows
from infopt.core.training.loop import TrainResult, train

_PROBE_TOKENS = 64
_WATCHED = 4096
"""Held-out tokens that the loss is measured on during the training."""


@dataclass(frozen=True, slots=True)
class Uptrained:
    """The trained artifact, compared with what was computed, and how its training went."""

    staged: Artifact
    result: TrainResult
    difference: float


def uptrain(
    job: KvJob,
    joined: Artifact,
    windows: Windows,
    identity: Mapping[str, str],
    *,
    folder: Path,
    staging: Path,
    extra: Mapping[str, str],
    progress: ProgressCallback,
) -> Uptrained:
    """Train all parameters of `joined` towards the distributions of `job.artifact` (forward KL).

    The state of the training lies in `folder`, and a training begun there goes on; the artifact is
    built at `staging`. Raises NumericsError where the loss or what is written is not finite.
    """
    progress(Progress("loading"))
    teacher = load_transformers(job.artifact, job.dtype, job.device)
    student = load_transformers(joined, torch.float32, job.device)
    trained_tensors(student, joined)  # what cannot be written back is refused before the work
    few = max(1, _WATCHED // windows.held_out.shape[1])
    watched = Windows(windows.train[:0], windows.held_out[:few], windows.name, windows.hash)
    result = train(
        CausalLearner(student, teacher=teacher),
        windows,
        job.settings.train,
        seed=job.settings.seed,
        device=job.device,
        identity=identity,
        folder=folder,
        evaluate=lambda: held_out_nll(student, watched),
        progress=progress,
    )
    del teacher
    progress(Progress("writing"))
    tensors = trained_tensors(student, joined)
    kept = {name: joined.tensor(name) for name in joined.names() if name not in tensors}
    staged = write_artifact(
        staging,
        source=job.artifact,
        tensors=sorted({**tensors, **kept}.items()),
        config=joined.config,
        extra=extra,
    )
    progress(Progress("comparing with what was written"))
    shown = windows.held_out[:1, :_PROBE_TOKENS].clamp(min=0)
    expected = _logits_as_stored(student, joined, shown)
    difference = compare_with_disk(staged, shown, expected, torch.float32, job.device)
    return Uptrained(staged, result, difference)


@torch.no_grad()
def _logits_as_stored(model: PreTrainedModel, joined: Artifact, shown: Tensor) -> Tensor:
    """The logits of the model, its parameters rounded to what they were stored in."""
    for name, parameter in model.named_parameters(remove_duplicate=False):
        for stored in resolve(model, joined, name):
            parameter.copy_(parameter.to(getattr(torch, joined.dtype(stored))))
    logits: Tensor = model(input_ids=shown.to(model.device), use_cache=False).logits
    return logits.cpu()
