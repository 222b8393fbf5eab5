"""What a pruning will do, resolved before any weight is read, and what a way of pruning returns."""

import json
from dataclasses import dataclass, field
from importlib.metadata import version

import torch

from infopt.core.artifact.read import Artifact
from infopt.core.compression.anatomy import Anatomy, anatomy
from infopt.core.compression.checkpoint import Checkpoint
from infopt.core.compression.targets import Target, TargetBlock, find_targets, ignore_pattern
from infopt.core.errors import UnsupportedError, UsageError
from infopt.core.hardware.choose import choose_device, choose_dtype
from infopt.core.models.hf import resolve, skeleton
from infopt.core.models.unfused import UnfusedArtifact, unfused
from infopt.core.pruning.sizes import Shape
from infopt.core.pruning.target import check_shape, needs_text, target_shape, whole_shape
from infopt.core.recipe.prune import PruneSettings
from infopt.core.reports.prune import PrunedPart

PROBE_TOKENS = 64
"""Of the calibration text: the artifact's logits on these are compared before it is done."""

PartCheckpoint = Checkpoint[PrunedPart]


@dataclass(frozen=True, slots=True)
class PruneJob:
    """An artifact, its settings and what follows from both."""

    artifact: Artifact
    """Of unstructured pruning: as if it held the experts of a mixture apart."""
    settings: PruneSettings
    dtype: torch.dtype
    device: torch.device
    blocks: tuple[TargetBlock, ...] = ()
    """The linear layers to prune; empty for structured pruning."""
    stored: dict[str, str] = field(default_factory=dict)
    """The artifact's name of each target's weight, to the target's name in the model."""
    parts: Anatomy | None = None
    """Of structured pruning: what the model is made of, and `shape`, what is to stay of it."""
    shape: Shape | None = None

    @property
    def targets(self) -> tuple[Target, ...]:
        return tuple(target for block in self.blocks for target in block.targets)

    @property
    def calibrates(self) -> bool:
        """Whether the calibration text is looked at."""
        if self.parts is not None and self.shape is not None:
            return needs_text(self.settings, whole_shape(self.parts), self.shape)
        return self.settings.method != "magnitude" or self.settings.allocation == "owl"

    def identity(self, token_hash: str) -> dict[str, str]:
        """What must be equal for unfinished work to be continued; equal work has equal results."""
        settings = self.settings.model_dump(mode="json", exclude={"calibration"})
        if self.settings.retrain:
            settings["text"] = self.settings.calibration.text
        return {
            "model": self.artifact.fingerprint(),
            "calibration tokens": token_hash,
            "infopt version": version("infopt"),
            "torch version": torch.__version__,
            "device": self.device.type,
            "compute dtype": str(self.dtype),
            **{f"setting {key}": json.dumps(value) for key, value in settings.items()},
        }


@dataclass(frozen=True, slots=True)
class Staged:
    """A pruned artifact in the folder of the unfinished work, and what is told of it."""

    staged: Artifact
    rows: tuple[PrunedPart, ...]
    warnings: tuple[str, ...] = ()
    difference: float | None = None
    """Of a logit, between the artifact read back from disk and what was computed; None: unknown."""


def resolve_job(artifact: Artifact, settings: PruneSettings) -> PruneJob:
    """Choose targets or shape, device and dtype; raises UsageError or UnsupportedError.

    What the architecture cannot be is refused here, before any weight is read.
    """
    if artifact.quantization is not None:
        raise UnsupportedError(
            f"{artifact.name} is quantized, and codes are not pruned",
            "prune the model it was made from, then quantize",
        )
    word = choose_device(settings.device)
    dtype: torch.dtype = getattr(torch, choose_dtype(settings.dtype, word))
    device = torch.device(word)
    if settings.method == "structured":
        parts = anatomy(artifact)
        shape = target_shape(artifact, parts, settings)
        check_shape(artifact, parts, settings, shape)
        return PruneJob(artifact, settings, dtype, device, parts=parts, shape=shape)
    model = skeleton(artifact)
    artifact = unfused(model, artifact)
    if settings.retrain and isinstance(artifact, UnfusedArtifact):
        raise UnsupportedError(
            f"{artifact.name} holds its experts fused, and infopt does not train those",
            "leave retrain away",
        )
    blocks = find_targets(model, settings.ignore)
    targets = [target for block in blocks for target in block.targets]
    _check_groups(targets, settings)
    stored = {resolve(model, artifact, f"{t.name}.weight")[0]: t.name for t in targets}
    return PruneJob(artifact, settings, dtype, device, blocks, stored)


def _check_groups(targets: list[Target], settings: PruneSettings) -> None:
    """Raise UsageError naming a layer whose inputs fall into no whole groups of M."""
    size = settings.pattern.of
    odd = [target for target in targets if size and target.inputs % size]
    if odd:
        raise UsageError(
            f"{settings.sparsity}: {size} does not divide the {odd[0].inputs} inputs of "
            f"{odd[0].name}",
            "choose another N:M"
            + ("" if len(odd) == len(targets) else f", or --ignore '{ignore_pattern(odd)}'"),
        )
