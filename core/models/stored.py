"""What an artifact stores of a decoder's layers, told by its headers."""

import torch

from infopt.core.artifact.quantized import layer_scheme, stored_names
from infopt.core.artifact.read import Artifact
from infopt.core.formats.number import IntegerFormat
from infopt.core.formats.scheme import LayerScheme
from infopt.core.models.config import ModelConfig
from infopt.core.models.shapes import linear_shapes


def runs_in_int8(scheme: LayerScheme | None) -> bool:
    """Whether a layer's weight and inputs are multiplied as 8-bit integers."""
    if scheme is None or scheme.activation is None:
        return False
    weight, inputs = scheme.weight, scheme.activation
    return (
        isinstance(weight, IntegerFormat)
        and weight.symmetric
        and weight.group_size is None
        and inputs.kind == "int"
        and inputs.bits <= 8
        and inputs.strategy in ("token", "tensor")
    )


def weight_bytes(artifact: Artifact, dtype: torch.dtype) -> int:
    """Bytes that the decoder's weights will take in memory, told by the files' headers.

    Of layers that stay packed, what is stored: the layouts in memory differ by little.
    """
    config = ModelConfig.from_hf(artifact.config)
    total = artifact.summary().parameters * dtype.itemsize
    for name, (outputs, inputs) in linear_shapes(config).items():
        found = stored_name(artifact, f"{name}.weight").removesuffix(".weight")
        scheme = layer_scheme(artifact, found)
        if scheme is None:
            continue
        if runs_in_int8(scheme):
            held = outputs * (inputs + torch.float32.itemsize)
        else:
            stored = stored_names(artifact, f"{found}.weight")
            held = sum(artifact.headers[tensor].nbytes for tensor in stored)
        total += held - outputs * inputs * dtype.itemsize
    return total


def stored_name(artifact: Artifact, parameter: str) -> str:
    """A parameter's name in the artifact: checkpoints of a base model leave its first word out."""
    if not stored_names(artifact, parameter):
        short = parameter.partition(".")[2]
        if short and stored_names(artifact, short):
            return short
    return parameter
