"""The tensors of a checkpoint of `quant_method` fp8, as DeepSeek-V3 introduced it.

For a linear layer [N, K]: weight float8_e4m3fn [N, K]; weight_scale_inv float32, one for each
128 x 128 of the weight, [N/128, K/128], by which the weight is multiplied to dequantize it, in
spite of its name. Where the config has no block size there is one scale for the tensor, which
other tools also name weight_scale. Inputs are rounded in groups of 128 as they come, or with a
stored scale, activation_scale (input_scale).
"""

from collections.abc import Mapping

import torch
from torch import Tensor

from infopt.core.errors import ArtifactError
from infopt.core.formats.fp8 import Fp8Format, Fp8Weight

SUFFIXES = ("weight", "weight_scale_inv", "weight_scale", "activation_scale", "input_scale")


def to_fp8_block(weight: Fp8Weight) -> dict[str, Tensor]:
    """The two tensors of a layer with 128 x 128 blocks."""
    assert weight.format.strategy == "block", "the format has blocks"
    scales = weight.scales.to(torch.float32).contiguous()
    return {"weight": weight.codes.contiguous(), "weight_scale_inv": scales}


def from_fp8_block(tensors: Mapping[str, Tensor], form: Fp8Format, where: str) -> Fp8Weight:
    """Read the layer `where`; scales of other dtypes (powers of two as e8m0) become float32.

    Raises ArtifactError for tensors that are missing or do not fit each other.
    """
    name = "weight_scale_inv" if "weight_scale_inv" in tensors else "weight_scale"
    if name not in tensors:
        raise ArtifactError(f"{where} lacks weight_scale_inv")
    codes, scales = tensors["weight"], tensors[name]
    if codes.dtype != torch.float8_e4m3fn or not scales.dtype.is_floating_point:
        raise ArtifactError(f"{where} has a weight of {codes.dtype} and scales of {scales.dtype}")
    shape = form.scale_shape(*codes.shape)
    if form.strategy == "tensor" and scales.numel() == 1:
        scales = scales.reshape(shape)
    if tuple(scales.shape) != shape:
        raise ArtifactError(f"{where}.{name} has the shape {list(scales.shape)}, not {list(shape)}")
    return Fp8Weight(codes, scales.to(torch.float32), form)
