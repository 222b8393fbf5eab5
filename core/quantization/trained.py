"""QAT: GPTQ's codes first, then training on them."""

import time
from dataclasses import replace

import torch
from torch import Tensor

from infopt.core.artifact.quantized import linear_weight
from infopt.core.artifact.read import read_artifact
from infopt.core.compression.checkpoint import open_checkpoint
from infopt.core.compression.output import compare_with_disk, publish
from infopt.core.formats.number import IntegerFormat, QuantizedWeight
from infopt.core.models.conv1d import is_transposed
from infopt.core.models.hf import load_transformers, resolve, skeleton
from infopt.core.progress import Progress, ProgressCallback
from infopt.core.quantization.block import encoded, stored_tensor
from infopt.core.quantization.job import Job
from infopt.core.quantization.made import PROBE_TOKENS, LayerCheckpoint, Made
from infopt.core.quantization.output import stage_artifact
from infopt.core.quantization.qat import QatResult, QatSettings, train
from infopt.core.quantization.rounding import Layer, report_rounded
from infopt.core.quantization.walked import make_walked
from infopt.core.reports.quantize import LayerError

BATCH_TOKENS = 1024
"""Of one update of the training."""


def make_trained(
    job: Job, tokens: Tensor, checkpoint: LayerCheckpoint, progress: ProgressCallback
) -> Made:
    """Train from GPTQ's codes; both stages are kept by `resume`, the training by its steps."""
    initial = _initial(job, tokens, checkpoint, progress)
    settings = job.settings
    forms = {
        name: form
        for name, scheme in job.schemes.items()
        if isinstance(form := scheme.weight, IntegerFormat)
    }
    started = time.perf_counter()
    trained = train(
        job.artifact,
        forms,
        tokens,
        QatSettings(
            steps=settings.steps,
            learning_rate=settings.learning_rate,
            batch_tokens=BATCH_TOKENS,
            micro_tokens=BATCH_TOKENS,
            seed=settings.seed,
        ),
        dtype=job.dtype,
        device=job.device,
        initial=initial,
        folder=checkpoint.stage("training"),
        progress=progress,
    )
    checkpoint.restart()
    _commit(job, trained, checkpoint, time.perf_counter() - started)
    progress(Progress("writing"))
    staged = stage_artifact(job, checkpoint)
    progress(Progress("comparing with what was written"))
    shown = tokens[:1, :PROBE_TOKENS]
    expected = _logits(job, trained, shown)
    difference = compare_with_disk(staged, shown, expected, job.dtype, job.device)
    return Made(staged, job, tuple(checkpoint.rows), difference)


def _initial(
    job: Job, tokens: Tensor, checkpoint: LayerCheckpoint, progress: ProgressCallback
) -> dict[str, QuantizedWeight]:
    """GPTQ's codes of every target, from a stage of its own."""
    place = checkpoint.stage("gptq")
    if not place.exists():
        settings = job.settings.model_copy(update={"method": "gptq", "format": "gptq"})
        first = replace(job, settings=settings)
        identity = first.identity("of the stage")
        with open_checkpoint(place, identity, LayerError, resume=True, replace=False) as own:
            made = make_walked(first, tokens, own, progress)
            publish(made.staged, place, replace=False)
            own.discard()
    artifact = read_artifact(place)
    found = {}
    for stored, target in job.stored.items():
        weight = linear_weight(artifact, stored.removesuffix(".weight"))
        assert isinstance(weight, QuantizedWeight)
        found[target] = weight
    return found


def _commit(job: Job, trained: QatResult, checkpoint: LayerCheckpoint, seconds: float) -> None:
    """Make the trained blocks durable; what lies outside of them goes with the last.

    `seconds` were spent on all layers together.
    """
    whole = sum(target.outputs * target.inputs for target in job.targets)
    model = skeleton(job.artifact)
    stored = {target: name for name, target in job.stored.items()}
    for index, block in enumerate(job.blocks):
        last = index == len(job.blocks) - 1
        tensors: dict[str, Tensor] = {}
        rows: list[LayerError] = []
        for target in block.targets:
            name, weight = stored[target.name], trained.weights[target.name]
            tensors.update(encoded(job, target.name, name, weight))
            original = job.artifact.tensor(name).to(job.device, torch.float32)
            original = original.T if is_transposed(model, target.name) else original
            layer = Layer(target.name, original, job.schemes[target.name])
            share = seconds * original.numel() / whole
            rows.append(report_rounded(layer, weight, None, job.settings, share).row)
        for name, value in trained.others.items():
            inside = any(name.startswith(f"{b.name}.") for b in job.blocks)
            if name.startswith(f"{block.name}.") or (last and not inside):
                key = resolve(model, job.artifact, name)[0]
                tensors[key] = stored_tensor(job.artifact, key, value)
        checkpoint.commit(tensors, rows, ())


@torch.no_grad()
def _logits(job: Job, trained: QatResult, shown: Tensor) -> Tensor:
    """What the trained model makes of a probe [1, length], computed without the artifact."""
    model = load_transformers(job.artifact, job.dtype, job.device)
    for name, weight in trained.weights.items():
        model.get_submodule(name).weight.copy_(weight.dequantize())
    parameters = dict(model.named_parameters())
    for name, value in trained.others.items():
        stored = resolve(model, job.artifact, name)[0]
        parameters[name].copy_(stored_tensor(job.artifact, stored, value))
    logits: Tensor = model(input_ids=shown.to(job.device), use_cache=False).logits
    return logits.cpu()
