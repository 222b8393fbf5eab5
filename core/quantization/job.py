"""What a quantization will do, resolved from its settings before any weight is read."""

import json
from dataclasses import dataclass
from importlib.metadata import version

import torch
from torch import nn

from infopt.core.artifact.read import Artifact
from infopt.core.compression.targets import (
    Target,
    TargetBlock,
    choose_group_size,
    find_targets,
    require_multiple,
)
from infopt.core.errors import UnsupportedError
from infopt.core.formats.gptq import MULTIPLE
from infopt.core.formats.number import IntegerFormat
from infopt.core.hardware.choose import choose_device, choose_dtype
from infopt.core.hardware.probe import probe
from infopt.core.models.hf import blocks as model_blocks
from infopt.core.models.hf import resolve, skeleton
from infopt.core.recipe.quantize import QuantizeSettings

BATCH_TOKENS = 4096
"""Calibration tokens that go through a block at once."""
_KEPT_SHARE = 0.25


@dataclass(frozen=True, slots=True)
class Job:
    """An artifact, its settings and what follows from both."""

    artifact: Artifact
    settings: QuantizeSettings
    blocks: tuple[TargetBlock, ...]
    stored: dict[str, str]
    """The artifact's name of each target's weight, to the target's name in the model."""
    ignored: tuple[str, ...]
    """Linear layers of the blocks that stay as they are."""
    number_format: IntegerFormat
    dtype: torch.dtype
    device: torch.device

    @property
    def targets(self) -> tuple[Target, ...]:
        return tuple(target for block in self.blocks for target in block.targets)

    def identity(self, token_hash: str) -> dict[str, str]:
        """What must be equal for unfinished work to be continued; equal work has equal results."""
        settings = self.settings.model_dump(mode="json", exclude={"calibration"})
        return {
            "model": self.artifact.fingerprint(),
            "calibration tokens": token_hash,
            "infopt version": version("infopt"),
            "torch version": torch.__version__,
            "device": self.device.type,
            "compute dtype": str(self.dtype),
            **{f"setting {key}": json.dumps(value) for key, value in settings.items()},
        }


def resolve_job(artifact: Artifact, settings: QuantizeSettings) -> Job:
    """Choose targets, groups, device and dtype; raises UsageError or UnsupportedError."""
    if artifact.quantization is not None:
        raise UnsupportedError(
            f"{artifact.name} is quantized already", "give the model it was made from"
        )
    device = choose_device(settings.device)
    dtype = getattr(torch, choose_dtype(settings.dtype, device))
    model = skeleton(artifact)
    blocks = find_targets(model, settings.ignore)
    targets = [target for block in blocks for target in block.targets]
    group_size = choose_group_size(settings.group_size, targets)
    require_multiple(targets, MULTIPLE, "the gptq format")
    number_format = IntegerFormat(settings.bits, settings.symmetric, group_size)
    stored = {resolve(model, artifact, f"{t.name}.weight")[0]: t.name for t in targets}
    names = {target.name for target in targets}
    ignored = tuple(
        f"{prefix}.{local}"
        for prefix, block in model_blocks(model)
        for local, module in block.named_modules()
        if isinstance(module, nn.Linear) and f"{prefix}.{local}" not in names
    )
    return Job(
        artifact, settings, blocks, stored, ignored, number_format, dtype, torch.device(device)
    )


def keep_bytes(device: torch.device) -> int:
    """Memory for outputs that would else be computed again: a quarter of what is free."""
    if device.type == "cuda":
        return int(_KEPT_SHARE * torch.cuda.mem_get_info(device)[0])
    return int(_KEPT_SHARE * probe().memory_available_bytes)
