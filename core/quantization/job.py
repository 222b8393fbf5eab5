"""What a quantization will do, resolved from its settings before any weight is read."""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from importlib.metadata import version

import torch
from torch import nn
from transformers import PreTrainedModel

from infopt.core.artifact.read import Artifact
from infopt.core.compression.offload import offloads
from infopt.core.compression.targets import (
    Target,
    TargetBlock,
    choose_group_size,
    find_routers,
    find_targets,
    ignore_pattern,
)
from infopt.core.errors import UnsupportedError
from infopt.core.formats.activation import ActivationFormat
from infopt.core.formats.fp8 import Fp8Format
from infopt.core.formats.layout import why_not
from infopt.core.formats.nf4 import Nf4Format
from infopt.core.formats.number import IntegerFormat
from infopt.core.formats.scheme import LayerScheme
from infopt.core.hardware.choose import choose_device, choose_dtype
from infopt.core.models.conv1d import is_transposed
from infopt.core.models.experts import experts_around
from infopt.core.models.hf import blocks as model_blocks
from infopt.core.models.hf import resolve, skeleton
from infopt.core.models.unfused import unfused
from infopt.core.recipe.quantize import QuantizeSettings


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
    schemes: dict[str, LayerScheme]
    """By the target's name in the model; empty where weights are only transformed."""
    dtype: torch.dtype
    device: torch.device
    experts: bool
    """Whether some targets lie in layers of experts."""

    @property
    def targets(self) -> tuple[Target, ...]:
        return tuple(target for block in self.blocks for target in block.targets)

    @property
    def scales(self) -> bool:
        """Whether inputs are scaled against weights before anything is rounded."""
        return self.settings.method in ("awq", "smoothquant")

    @property
    def refers(self) -> bool:
        """Whether the original model is walked beside the quantized one."""
        return self.settings.gptaq > 0 or self.settings.how == "autoround"

    @property
    def observes(self) -> bool:
        """Whether the statistics of layers' inputs are gathered."""
        settings = self.settings
        static = settings.method == "fp8" and settings.fp8 == "static"
        if settings.method == "rotate" and settings.scheme == "W16A16":
            return False
        return self.scales or static or settings.how in ("gptq", "autoround")

    @property
    def calibrates(self) -> bool:
        """Whether text is run through the model at all."""
        return self.observes or self.settings.kv_cache is not None

    @property
    def tokens(self) -> int:
        """Calibration tokens that are run through the model."""
        calibration = self.settings.calibration
        return calibration.samples * calibration.sequence_length if self.calibrates else 0

    @property
    def hidden_bytes(self) -> int:
        """Of the text's hidden states between two blocks, in all the walks."""
        width = min(target.inputs for target in self.targets)
        return self.tokens * width * self.dtype.itemsize * (2 if self.refers else 1)

    @property
    def offloaded(self) -> bool:
        """Whether these are kept on disk."""
        return offloads(self.settings.offload, self.hidden_bytes)

    def identity(self, token_hash: str) -> dict[str, str]:
        """What must be equal for unfinished work to be continued; equal work has equal results."""
        settings = self.settings.model_dump(mode="json", exclude={"calibration", "offload"})
        return {
            "model": self.artifact.fingerprint(),
            "calibration tokens": token_hash,
            "infopt version": version("infopt"),
            "torch version": torch.__version__,
            "device": self.device.type,
            "compute dtype": str(self.dtype),
            **{f"setting {key}": json.dumps(value) for key, value in settings.items()},
        }


def resolve_job(
    artifact: Artifact, settings: QuantizeSettings, bits: Mapping[str, int] | None = None
) -> Job:
    """Choose targets, schemes, device and dtype; raises UsageError or UnsupportedError.

    `bits` gives each target's width where the scheme is mixed; until it is known, the widest.
    """
    if artifact.quantization is not None:
        raise UnsupportedError(
            f"{artifact.name} is quantized already", "give the model it was made from"
        )
    device = choose_device(settings.device)
    dtype = getattr(torch, choose_dtype(settings.dtype, device))
    model = skeleton(artifact)
    artifact = unfused(model, artifact)
    blocks = find_targets(model, settings.ignore)
    targets = [target for block in blocks for target in block.targets]
    schemes = _schemes(settings, targets, bits or {})
    _check_layout(model, settings, targets, schemes)
    stored = {resolve(model, artifact, f"{t.name}.weight")[0]: t.name for t in targets}
    names = {target.name for target in targets}
    routers = find_routers(model)
    ignored = tuple(
        f"{prefix}.{local}"
        for prefix, block in model_blocks(model)
        for local, module in block.named_modules()
        if (isinstance(module, nn.Linear) and f"{prefix}.{local}" not in names)
        or f"{prefix}.{local}" in routers
    )
    experts = any(experts_around(model, f"{target.name}.weight") for target in targets)
    return Job(
        artifact,
        settings,
        blocks,
        stored,
        ignored,
        schemes,
        dtype,
        torch.device(device),
        experts,
    )


def _schemes(
    settings: QuantizeSettings, targets: Sequence[Target], bits: Mapping[str, int]
) -> dict[str, LayerScheme]:
    match settings.scheme:
        case "W16A16":
            return {}
        case "NF4":
            same = LayerScheme(Nf4Format(settings.double_quant))
        case "W8A8-fp8":
            same = _fp8(settings.fp8)
        case "W8A8-int8":
            threshold = settings.threshold if settings.method == "llm-int8" else None
            form = ActivationFormat("int", 8, outlier_threshold=threshold)
            same = LayerScheme(IntegerFormat(8, True, None), form)
        case _:
            size = choose_group_size(settings.group_size, targets)
            inputs = {"W4A8-int8": 8, "W4A4-int4": 4}.get(str(settings.scheme))
            form_or_none = None if inputs is None else ActivationFormat("int", inputs)
            widest = settings.bits or max(settings.mixed_bits)
            symmetric = bool(settings.symmetric)
            return {
                t.name: LayerScheme(
                    IntegerFormat(bits.get(t.name, widest), symmetric, size), form_or_none
                )
                for t in targets
            }
    return {target.name: same for target in targets}


def _fp8(kind: str) -> LayerScheme:
    match kind:
        case "static":
            form = ActivationFormat("float", 8, "tensor", dynamic=False)
            return LayerScheme(Fp8Format("tensor"), form)
        case "block":
            return LayerScheme(
                Fp8Format("block"), ActivationFormat("float", 8, "group", group_size=128)
            )
        case _:
            return LayerScheme(Fp8Format("channel"), ActivationFormat("float", 8))


def _check_layout(
    model: PreTrainedModel,
    settings: QuantizeSettings,
    targets: Sequence[Target],
    schemes: Mapping[str, LayerScheme],
) -> None:
    """Raise UnsupportedError naming the layers that the checkpoint format cannot hold, and why."""
    if settings.format is None:
        return
    wrong: list[tuple[Target, str]] = []
    for target in targets:
        reason = why_not(settings.format, schemes[target.name], target.outputs, target.inputs)
        if reason is None and is_transposed(model, target.name) and settings.format != "gptq":
            reason = "its loaders look for nn.Linear, and this layer is a Conv1D"
        if reason is not None:
            wrong.append((target, reason))
    if settings.kv_cache is not None and settings.format != "compressed-tensors":
        raise UnsupportedError(
            f"the {settings.format} format has no place for the scales of a KV cache",
            "compressed-tensors has: --format compressed-tensors",
        )
    if wrong:
        first, reason = wrong[0]
        others = f" (and {len(wrong) - 1} more layers)" if len(wrong) > 1 else ""
        if len(wrong) == len(targets):
            raise UnsupportedError(
                f"the {settings.format} format cannot hold {first.name}{others}: {reason}",
                "choose another --format, or leave it to the method and the scheme",
            )
        pattern = ignore_pattern([target for target, _ in wrong])
        raise UnsupportedError(
            f"the {settings.format} format cannot hold {first.name}{others}: {reason}",
            f"choose another --format, or leave layers as they are: --ignore '{pattern}'",
        )
