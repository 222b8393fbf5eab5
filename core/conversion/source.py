"""What there is to convert: a quantized artifact's layers, and what is left as it is."""

from dataclasses import dataclass

import torch
from torch import nn

from infopt.core.artifact.quantized import (
    is_quantized,
    is_side_tensor,
    kv_format,
    layer_scheme,
    stored_names,
)
from infopt.core.artifact.read import Artifact
from infopt.core.artifact.schemes import layout_of
from infopt.core.errors import UnsupportedError, UsageError
from infopt.core.formats.exact import in_order
from infopt.core.formats.scheme import KvFormat, LayerScheme, Layout
from infopt.core.models.conv1d import is_transposed
from infopt.core.models.hf import blocks, skeleton, stored_layer


@dataclass(frozen=True, slots=True)
class Layer:
    """A quantized linear layer [outputs, inputs], by its name in the artifact."""

    name: str
    outputs: int
    inputs: int
    scheme: LayerScheme
    transposed: bool
    """Whether dense checkpoints hold its weight as [inputs, outputs] (Conv1D)."""

    @property
    def bytes(self) -> float:
        """What its codes and scales take, about."""
        bits = self.scheme.weight.bits_per_weight(self.inputs)
        return self.outputs * self.inputs * bits / 8


@dataclass(frozen=True, slots=True)
class Source:
    """A quantized artifact, looked through; no weight was read."""

    artifact: Artifact
    layout: Layout
    layers: tuple[Layer, ...]
    ignored: tuple[str, ...]
    """Linear layers of the blocks that are dense, by their names in the model."""
    kv: KvFormat | None
    owners: dict[str, str]
    """Every tensor of a quantized layer, to that layer's name."""

    @property
    def kept(self) -> tuple[str, ...]:
        """The tensors that are of no quantized layer."""
        return tuple(name for name in self.artifact.names() if name not in self.owners)

    @property
    def dtype(self) -> str:
        """What the model's config says that it computes in."""
        said = self.artifact.config.get("dtype") or self.artifact.config.get("torch_dtype")
        word = str(said).removeprefix("torch.")
        return word if word in ("float32", "bfloat16", "float16") else "float32"


def look_through(artifact: Artifact) -> Source:
    """Find the quantized layers by the model's own linear layers.

    Raises UsageError for a model that is not quantized, UnsupportedError for one that transformers
    or infopt does not know, ArtifactError where files and config do not belong together.
    """
    table = artifact.quantization
    if table is None:
        raise UsageError(
            f"{artifact.name} is not quantized: there is nothing to re-pack",
            "infopt quantize makes such a model, in the format that --format names",
        )
    layout = layout_of(table, str(artifact.path))
    model = skeleton(artifact)
    layers: list[Layer] = []
    ignored: list[str] = []
    inside = tuple(f"{name}." for name, _ in blocks(model))
    for name, module in model.named_modules():
        if not isinstance(module, nn.Linear):
            continue
        stored = stored_layer(model, artifact, name)
        if is_quantized(artifact, stored):
            scheme = layer_scheme(artifact, stored)
            assert scheme is not None, f"{stored} is quantized"
            sides = (module.out_features, module.in_features)
            layers.append(Layer(stored, *sides, scheme, is_transposed(model, name)))
        elif name.startswith(inside):
            ignored.append(name)
    if not layers:
        raise UnsupportedError(
            f"{artifact.path} has a quantization_config, but none of its linear layers is quantized"
        )
    owners = {tensor: layer.name for layer in layers for tensor in _tensors(artifact, layer.name)}
    kv = kv_format(artifact)
    return Source(artifact, layout, tuple(layers), tuple(ignored), kv, owners)


def has_scattered_groups(source: Source) -> bool:
    """Whether the groups of a layer are spread over its columns (act-order of old files)."""
    for layer in source.layers:
        for suffix in ("g_idx", "weight_g_idx"):
            name = f"{layer.name}.{suffix}"
            if source.artifact.has(name):
                index = source.artifact.tensor(name)
                if not in_order(index, int(index.max()) + 1) and bool((index >= 0).all()):
                    return True
    return False


def dense_dtype(source: Source, word: str) -> torch.dtype:
    """The dtype that `--dtype` names; auto is what the model computes in."""
    found: torch.dtype = getattr(torch, source.dtype if word == "auto" else word)
    return found


def side_tensors(source: Source) -> tuple[str, ...]:
    """The scales of the KV cache."""
    return tuple(name for name in source.artifact.names() if is_side_tensor(name))


def _tensors(artifact: Artifact, layer: str) -> tuple[str, ...]:
    return stored_names(artifact, f"{layer}.weight")
