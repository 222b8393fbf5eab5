"""Train a pruned model to recover; what was removed stays removed."""

import dataclasses
import json
from collections.abc import Collection, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor
from transformers import PreTrainedModel

from infopt.core.artifact.read import Artifact
from infopt.core.artifact.write import write_artifact
from infopt.core.compression.output import compare_with_disk
from infopt.core.errors import NumericsError
from infopt.core.models.conv1d import is_transposed
from infopt.core.models.hf import blocks, load_transformers, resolve
from infopt.core.progress import Progress, ProgressCallback
from infopt.core.pruning.job import PROBE_TOKENS, PartCheckpoint, PruneJob
from infopt.core.pruning.output import recipe_files, whole_tensors
from infopt.core.recipe.prune import PruneSettings
from infopt.core.recipe.train import TrainSettings
from infopt.core.reports.prune import HeldOut, Retraining
from infopt.core.training.artifact import trained_tensors
from infopt.core.training.causal import CausalLearner, held_out_nll
from infopt.core.training.data import Windows, training_windows
from infopt.core.training.loop import TrainResult, train

_MICRO_TOKENS = 1024
_HELD_OUT_TOKENS = 4096
"""To look at in between; the report's perplexities are of another text."""
FOLDER = "artifact-retrained"


@dataclass(frozen=True, slots=True)
class Retrained:
    """The retrained artifact, beside the one it was trained from, and what is told of it."""

    staged: Artifact
    told: Retraining
    difference: float
    """Of a logit, between the artifact read back from disk and what was trained."""


def retrain(
    job: PruneJob,
    pruned: Artifact,
    tokens: Tensor,
    checkpoint: PartCheckpoint,
    progress: ProgressCallback,
) -> Retrained:
    """Train `pruned` on the calibration's text, from the dense model or the text alone.

    Zeros of the pruned layers are held; the training's state is a stage that `resume` keeps. Raises
    NumericsError for a loss that is not finite.
    """
    settings = train_settings(job.settings)
    windows = training_windows(job.artifact, settings, job.settings.seed)
    model = load_transformers(pruned, torch.float32, job.device)
    dense = job.settings.retrain_from == "dense"
    teacher = load_transformers(job.artifact, job.dtype, job.device) if dense else None
    names, looked_at = _trained(model, job), _few(windows)
    masks = {
        f"{target.name}.weight": model.get_submodule(target.name).weight.detach() != 0
        for target in job.targets
    }
    result = train(
        CausalLearner(model, teacher=teacher, trained=names, masks=masks),
        windows,
        settings,
        seed=job.settings.seed,
        device=job.device,
        identity=_identity(job, pruned, windows),
        folder=checkpoint.stage("retraining"),
        evaluate=lambda: held_out_nll(model, looked_at),
        progress=progress,
    )
    progress(Progress("writing"))
    tensors = trained_tensors(model, pruned, names)
    staged = write_artifact(
        checkpoint.folder / FOLDER,
        source=job.artifact,
        tensors=whole_tensors(pruned, tensors, tensors.__getitem__),
        config=pruned.config,
        extra=recipe_files(job.settings),
        replace=True,
    )
    _check_held(model, staged, masks)
    progress(Progress("comparing with what was written"))
    shown = tokens[:1, :PROBE_TOKENS]
    expected = _logits(model, pruned, shown, job)
    difference = compare_with_disk(staged, shown, expected, job.dtype, job.device)
    return Retrained(staged, _told(job.settings, result), difference)


def check_text(job: PruneJob) -> None:
    """Raise UsageError, before any work, where the text is too short to be trained on."""
    if job.settings.retrain:
        training_windows(job.artifact, train_settings(job.settings), job.settings.seed)


def train_settings(settings: PruneSettings) -> TrainSettings:
    """The retraining in the words of any training."""
    return TrainSettings(
        steps=settings.retrain,
        learning_rate=settings.learning_rate,
        batch_tokens=settings.retrain_tokens,
        micro_tokens=min(_MICRO_TOKENS, settings.retrain_tokens),
        sequence_length=settings.retrain_length,
        text=settings.calibration.text,
        chat=settings.calibration.chat,
    )


def _few(windows: Windows) -> Windows:
    """With as much held out as is looked at often."""
    count = max(1, _HELD_OUT_TOKENS // windows.held_out.shape[1])
    return dataclasses.replace(windows, held_out=windows.held_out[:count])


def _trained(model: PreTrainedModel, job: PruneJob) -> Collection[str] | None:
    """What learns: everything where the shape changed, else the blocks and the norms.

    Embeddings were not pruned, and are large: moments and gradients of theirs are not worth it.
    """
    if job.settings.method == "structured":
        return None
    inside = tuple(f"{name}." for name, _ in blocks(model))
    return {n for n, p in model.named_parameters() if n.startswith(inside) or p.ndim == 1}


def _identity(job: PruneJob, pruned: Artifact, windows: Windows) -> Mapping[str, str]:
    return {
        "pruned model": pruned.fingerprint(),
        "text": windows.hash,
        "compute dtype": str(job.dtype),
        "settings": json.dumps(job.settings.model_dump(mode="json")),
    }


@torch.no_grad()
def _check_held(model: PreTrainedModel, staged: Artifact, masks: Mapping[str, Tensor]) -> None:
    """See in the file itself that every weight that was removed is still 0."""
    for name, mask in masks.items():
        stored = staged.tensor(resolve(model, staged, name)[0])
        value = stored.T if is_transposed(model, name.removesuffix(".weight")) else stored
        if bool((value[~mask.cpu()] != 0).any()):
            raise NumericsError(
                f"retraining gave {name} weights where they had been removed",
                "this is a bug of infopt; nothing was kept of the artifact",
            )


@torch.no_grad()
def _logits(model: PreTrainedModel, pruned: Artifact, shown: Tensor, job: PruneJob) -> Tensor:
    """What the trained model makes of a probe [1, length], computed without its file."""
    fresh = load_transformers(pruned, job.dtype, job.device)
    trained = dict(model.named_parameters())
    for name, parameter in fresh.named_parameters():
        source = resolve(fresh, pruned, name)
        if source:
            value = trained[name].detach().to(getattr(torch, pruned.dtype(source[0])))
            parameter.copy_(value)
    logits: Tensor = fresh(input_ids=shown.to(job.device), use_cache=False).logits
    return logits.cpu()


def _told(settings: PruneSettings, result: TrainResult) -> Retraining:
    return Retraining(
        steps=result.steps,
        tokens=result.tokens,
        seconds=result.seconds,
        source=settings.retrain_from,
        losses=tuple(loss["loss"] for loss in result.losses),
        held_out=tuple(HeldOut(step=step, nll=nll) for step, nll in result.held_out),
        stopped=result.stopped,
        resumed_steps=result.resumed,
    )
