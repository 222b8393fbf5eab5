"""The door: train Medusa heads on a model that stays as it is."""

import json
import os
import time
from collections import Counter
from importlib.metadata import version
from pathlib import Path

import torch
from torch import Tensor

from infopt.core.artifact.heads import TOKEN_MAP, HeadsShape, MedusaHeads, write_heads
from infopt.core.artifact.positions import check_length
from infopt.core.artifact.read import Artifact
from infopt.core.artifact.write import keep_the_source
from infopt.core.compression.checkpoint import open_checkpoint
from infopt.core.compression.quality import held_out
from infopt.core.distillation import medusa
from infopt.core.distillation.backbone import Backbone, HeadsLearner
from infopt.core.errors import NumericsError, UsageError
from infopt.core.files import check_output, require_disk
from infopt.core.hardware.choose import choose_device, choose_dtype
from infopt.core.hardware.probe import peak_memory
from infopt.core.models.hf import load_transformers, skeleton
from infopt.core.progress import Progress, ProgressCallback, silent
from infopt.core.recipe.distill import DistillSettings
from infopt.core.recipe.recipe import Recipe, Step, dump_recipe
from infopt.core.reports.medusa import HeadAccuracy, HeldOutLoss, MedusaReport
from infopt.core.reports.schema import Origin, Plan
from infopt.core.training.data import Windows, training_windows
from infopt.core.training.loop import TrainResult, train

_PROVENANCE: dict[str, Origin] = {
    "model": "measured",
    "parameters": "computed",
    "vocabulary": "computed",
    "covered": "measured",
    "bytes": "measured",
    "training_tokens": "measured",
    "resumed_steps": "measured",
    "losses": "measured",
    "held_out": "measured",
    "held_out_tokens": "measured",
    "heads": "measured",
    "mean_run": "measured",
    "seconds": "measured",
    "peak_memory_bytes": "measured",
}
_TOP = 5
_WATCHED = 4096
"""Held-out tokens that the loss is measured on during the training."""
_FORESEEN = 16_384
"""Tokens from whose states the projections' beginning is computed; more hardly change it."""
_AT_ONCE = 2048
"""Tokens of one pass of a measurement."""
_DENSE = ("bfloat16", "float16", "float32")
_PROCESS_BYTES = 600 * 2**20


def make_heads(
    artifact: Artifact,
    output: Path,
    settings: DistillSettings,
    *,
    resume: bool = False,
    replace: bool = False,
    progress: ProgressCallback = silent,
) -> MedusaReport:
    """Train `settings.medusa_heads` heads on the frozen model and write them to `output`.

    They learn the model's own greedy tokens on the text of the training, or the text's, and are
    measured as they are written, on the text for evaluation. After an interrupt or a kill `resume`
    goes on at the last state. The report's `made` is for the caller. Raises UsageError (output,
    windows too short for the heads, several processes), UnsupportedError (a model whose logits are
    not its lm_head's), ResumeError (unfinished work), NumericsError (the loss is not finite),
    ResourceError (disk).
    """
    started = time.monotonic()
    output = output.expanduser().absolute()
    keep_the_source(output, artifact)
    check_output(output, replace=replace)
    _check_alone()
    windows = training_windows(artifact, settings.train, settings.seed)
    tokens = _tokens(settings, windows)
    shape = _shape(artifact, settings, tokens)
    require_disk(output, _disk(shape), f"training heads for {artifact.name}")
    device = torch.device(choose_device(settings.device))
    dtype = getattr(torch, choose_dtype(settings.dtype, device.type))
    identity = _identity(settings, shape, windows, dtype)
    with open_checkpoint(
        output, identity, HeadAccuracy, resume=resume, replace=replace
    ) as checkpoint:
        progress(Progress("loading"))
        learner = _learner(artifact, settings, shape, tokens, dtype, device)
        try:
            result = _train(
                learner, windows, settings, identity, checkpoint.stage("medusa"), progress
            )
        except NumericsError:
            # It would come again: there is nothing to continue.
            checkpoint.discard()
            raise
        tensors = learner.stored(_dtype(artifact))
        if tokens is not None:
            tensors[TOKEN_MAP] = tokens
        stream = held_out(artifact)
        rows, run = _measure(learner, windows, stream, settings.sequence_length, progress)
        extra = {"recipe.yaml": _recipe(settings)}
        written = write_heads(output, shape, tensors, extra=extra, replace=replace)
        checkpoint.discard()
    report = _report(artifact, settings, written, result, rows)
    covered = 1.0 if tokens is None else float(torch.isin(stream, tokens).double().mean())
    return report.model_copy(
        update={
            "mean_run": run,
            "covered": covered,
            "held_out_tokens": len(stream) // settings.sequence_length * settings.sequence_length,
            "seconds": time.monotonic() - started,
        }
    )


def plan_heads(artifact: Artifact, settings: DistillSettings) -> Plan:
    """What would be trained, and what it needs; the time is not predicted."""
    tokens = None
    if settings.medusa_vocabulary is not None:
        tokens = _tokens(settings, training_windows(artifact, settings.train, settings.seed))
    shape = _shape(artifact, settings, tokens)
    device = choose_device(settings.device)
    width = getattr(torch, choose_dtype(settings.dtype, device)).itemsize
    learned = _parameters(shape)
    summary = artifact.summary()
    teacher = "the model's own greedy tokens" if settings.medusa_targets == "greedy" else "the text"
    projection = "the model's lm_head" if shape.shared else "a projection of its own"
    if shape.guessed is not None:
        projection += f" to {shape.guessed:,} tokens"
    return Plan(
        command="distill",
        actions=(
            f"{shape.heads} Medusa heads of {shape.layers} layer{'s' if shape.layers > 1 else ''} "
            f"of {shape.hidden_size} x {shape.hidden_size}, each with {projection}: "
            f"{learned:,} parameters",
            f"train {settings.steps} steps of {settings.batch_tokens} tokens of {settings.text} "
            f"to predict {teacher}; the model stays as it is",
            "count what each head guesses right on the text for evaluation",
            "write the heads beside the model, and read them back",
        ),
        memory_bytes=_PROCESS_BYTES
        + width * summary.parameters
        + 16 * learned
        + 3 * settings.micro_tokens * shape.hidden_size * 4 * (shape.heads + 2),
        disk_bytes=_disk(shape),
    )


def _tokens(settings: DistillSettings, windows: Windows) -> Tensor | None:
    """Those that heads choose among; None for all."""
    if settings.medusa_vocabulary is None:
        return None
    return medusa.commonest(windows.train[windows.train >= 0], settings.medusa_vocabulary)


def _shape(artifact: Artifact, settings: DistillSettings, tokens: Tensor | None) -> HeadsShape:
    """Of the heads that are wanted; raises UsageError where a window is too short for them."""
    assert settings.medusa_heads is not None
    if settings.sequence_length < settings.medusa_heads + 2:
        raise UsageError(
            f"head {settings.medusa_heads} predicts {settings.medusa_heads + 1} tokens ahead: "
            f"a window of {settings.sequence_length} tokens is too short for it",
            "raise the sequence length or train fewer heads",
        )
    check_length(artifact, settings.sequence_length)
    weight = Backbone.head_of(skeleton(artifact)).weight
    return HeadsShape(
        base=artifact.name,
        fingerprint=artifact.fingerprint(),
        heads=settings.medusa_heads,
        layers=settings.medusa_layers,
        hidden_size=weight.shape[1],
        vocab_size=weight.shape[0],
        shared=settings.medusa_projection == "shared",
        guessed=None if tokens is None else len(tokens),
    )


def _learner(
    artifact: Artifact,
    settings: DistillSettings,
    shape: HeadsShape,
    tokens: Tensor | None,
    dtype: torch.dtype,
    device: torch.device,
) -> HeadsLearner:
    return HeadsLearner(
        Backbone(load_transformers(artifact, dtype, device)),
        shape.heads,
        shape.layers,
        own=not shape.shared,
        targets=settings.medusa_targets,
        tokens=tokens,
    )


def _train(
    learner: HeadsLearner,
    windows: Windows,
    settings: DistillSettings,
    identity: dict[str, str],
    folder: Path,
    progress: ProgressCallback,
) -> TrainResult:
    foretold = settings.medusa_projection == "own" and settings.medusa_start == "least-squares"
    # What is resumed has left its beginning behind.
    if foretold and not (folder.exists() and any(folder.iterdir())):
        progress(Progress("foreseeing"))
        learner.foresee(windows.train[: max(1, _FORESEEN // settings.sequence_length)], _AT_ONCE)
    watched = windows.held_out[: max(1, _WATCHED // windows.held_out.shape[1])]
    return train(
        learner,
        windows,
        settings.train,
        seed=settings.seed,
        device=learner.base.projection.weight.device,
        identity=identity,
        folder=folder,
        evaluate=lambda: learner.mean_loss(watched, _AT_ONCE),
        progress=progress,
    )


def _check_alone() -> None:
    """Raise UsageError under torchrun: the processes would train the same heads."""
    if (count := os.environ.get("WORLD_SIZE", "1")) != "1":
        raise UsageError(
            f"Medusa heads are trained by one process, and there are {count}",
            "start it without torchrun",
        )


def _identity(
    settings: DistillSettings, shape: HeadsShape, windows: Windows, dtype: torch.dtype
) -> dict[str, str]:
    """What must be equal for unfinished work to be continued."""
    values = settings.model_dump(mode="json", exclude={"text", "teacher"})
    return {
        "model": shape.fingerprint,
        "training windows": windows.hash,
        "infopt version": version("infopt"),
        "torch version": torch.__version__,
        "compute dtype": str(dtype),
        **{f"setting {key}": json.dumps(value) for key, value in values.items()},
    }


def _dtype(artifact: Artifact) -> torch.dtype:
    """What heads are stored in: the dtype of most of the model's dense weights."""
    sizes: Counter[str] = Counter()
    for header in artifact.headers.values():
        if header.dtype in _DENSE:
            sizes[header.dtype] += header.numel
    found: torch.dtype = getattr(torch, sizes.most_common(1)[0][0] if sizes else _DENSE[0])
    return found


@torch.no_grad()
def _measure(
    learner: HeadsLearner,
    windows: Windows,
    stream: Tensor,
    length: int,
    progress: ProgressCallback,
) -> tuple[tuple[HeadAccuracy, ...], float]:
    """How often each head is right on windows of `stream`, and how many are in a row."""
    count = len(stream) // length
    rows = stream[: count * length].view(count, length)
    by_text: list[list[Tensor]] = []
    by_base: list[list[Tensor]] = []
    wanted: list[list[Tensor]] = []
    parts = torch.split(rows, max(1, _AT_ONCE // length))
    for number, part in enumerate(parts):
        progress(Progress("measuring", number, len(parts)))
        places = learner.ranks(part, _TOP)
        by_text.append([place.cpu() for place in places.text])
        by_base.append([place.cpu() for place in places.base])
        follow = medusa.following(part)
        wanted.append([medusa.ahead(follow, k) for k in range(learner.heads + 1)])
    text = [torch.cat(places) for places in zip(*by_text, strict=True)]
    base = [torch.cat(places) for places in zip(*by_base, strict=True)]
    targets = [torch.cat(each) for each in zip(*wanted, strict=True)]
    seen = windows.train[windows.train >= 0]
    vocabulary = learner.base.vocabulary
    found = tuple(
        HeadAccuracy(
            head=k,
            top1=medusa.share_within(text[k], 1),
            top5=medusa.share_within(text[k], _TOP),
            unigram_top1=medusa.unigram_share(seen, targets[k], 1, vocabulary),
            unigram_top5=medusa.unigram_share(seen, targets[k], _TOP, vocabulary),
            agreement=medusa.share_within(base[k], 1) if k else None,
        )
        for k in range(learner.heads + 1)
    )
    return found, medusa.mean_run(base[1:])


def _report(
    artifact: Artifact,
    settings: DistillSettings,
    written: MedusaHeads,
    result: TrainResult,
    rows: tuple[HeadAccuracy, ...],
) -> MedusaReport:
    """All but what the door alone knows: time and the measurement."""
    shape = written.shape
    beaten = [row for row in rows[1:] if row.top1 <= row.unigram_top1]
    warnings = tuple(
        f"head {row.head} is right on {row.top1:.1%} of the held-out text, no more than the "
        f"commonest token alone ({row.unigram_top1:.1%}): train for more steps"
        for row in beaten
    )
    on_gpu = torch.cuda.is_available() and choose_device(settings.device) == "cuda"
    return MedusaReport(
        model=artifact.summary(),
        provenance=_PROVENANCE,
        warnings=warnings,
        output=str(written.path),
        medusa_heads=shape.heads,
        medusa_layers=shape.layers,
        projection=settings.medusa_projection,
        targets=settings.medusa_targets,
        base_fingerprint=shape.fingerprint,
        parameters=_parameters(shape),
        vocabulary=shape.vocab_size if shape.guessed is None else shape.guessed,
        covered=1.0,
        bytes=written.nbytes,
        steps=result.steps,
        training_tokens=result.tokens,
        resumed_steps=result.resumed,
        stopped=result.stopped,
        losses=tuple(row["loss"] for row in result.losses),
        held_out=tuple(HeldOutLoss(step=step, loss=loss) for step, loss in result.held_out),
        held_out_tokens=0,
        heads=rows,
        mean_run=0.0,
        seconds=0.0,
        peak_memory_bytes=torch.cuda.max_memory_allocated() if on_gpu else peak_memory(),
    )


def _recipe(settings: DistillSettings) -> str:
    """The recipe that makes these heads again."""
    return dump_recipe(Recipe(name="distill", steps=(Step(verb="distill", settings=settings),)))


def _parameters(shape: HeadsShape) -> int:
    found = shape.shapes()
    return sum(torch.Size(sizes).numel() for name, sizes in found.items() if name != TOKEN_MAP)


def _disk(shape: HeadsShape) -> int:
    """The heads, and their training's state twice while one replaces the other."""
    return _parameters(shape) * (4 + 2 * 12)
