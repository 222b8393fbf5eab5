"""How the inputs of a linear layer are rounded at run time (the A8 of W8A8)."""

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

FP8_MAX = 448.0
"""The largest float8_e4m3fn."""


@dataclass(frozen=True, slots=True)
class ActivationFormat:
    """Symmetric rounding of activations [..., K]: integers, or float8 e4m3 (`kind` float, 8 bits).

    strategy: one scale a token, one for the whole tensor, or one for each `group_size` columns of
    a token. Dynamic scales are taken from the values at hand; a static one (strategy tensor) was
    calibrated and is stored beside the weight. `outlier_threshold`: columns in which any value
    reaches it are left as they are (LLM.int8; Dettmers et al. 2022, arXiv 2208.07339).
    """

    kind: Literal["int", "float"]
    bits: int = 8
    strategy: Literal["token", "tensor", "group"] = "token"
    dynamic: bool = True
    group_size: int | None = None
    outlier_threshold: float | None = None

    @property
    def largest(self) -> float:
        """The value that the greatest magnitude is mapped to: scale = amax / largest.

        (2^bits - 1) / 2 as compressed-tensors has it; LLM.int8 maps to 2^(bits-1) - 1.
        """
        if self.kind == "float":
            return FP8_MAX
        if self.outlier_threshold is not None:
            return float(2 ** (self.bits - 1) - 1)
        return (2**self.bits - 1) / 2


def round_inputs(x: Tensor, form: ActivationFormat, scale: Tensor | None = None) -> Tensor:
    """The inputs [..., K] as the layer sees them: quantized and dequantized, in their dtype.

    `scale` is the stored one of a static format, a scalar or [1].
    """
    values = x.to(torch.float32)
    if form.outlier_threshold is None:
        return _rounded(values, form, scale).to(x.dtype)
    flat = values.reshape(-1, values.shape[-1])
    outlier = (flat.abs() >= form.outlier_threshold).any(dim=0)
    rest = _rounded(values.masked_fill(outlier, 0.0), form, scale)
    return torch.where(outlier, values, rest).to(x.dtype)


def _rounded(values: Tensor, form: ActivationFormat, scale: Tensor | None) -> Tensor:
    match form.strategy:
        case "tensor":
            found = values.abs().amax() / form.largest if form.dynamic else scale
        case "token":
            found = values.abs().amax(dim=-1, keepdim=True) / form.largest
        case "group":
            grouped = values.unflatten(-1, (-1, form.group_size or values.shape[-1]))
            each = grouped.abs().amax(dim=-1, keepdim=True) / form.largest
            return _on_grid(grouped, each, form).flatten(-2)
    assert found is not None, "a static format has its scale stored"
    return _on_grid(values, found, form)


def _on_grid(values: Tensor, scale: Tensor, form: ActivationFormat) -> Tensor:
    scale = torch.where(scale > 0, scale, torch.ones_like(scale)).to(torch.float32)
    steps = values / scale
    if form.kind == "float":
        return steps.clamp(-FP8_MAX, FP8_MAX).to(torch.float8_e4m3fn).to(torch.float32) * scale
    top = 2 ** (form.bits - 1)
    return steps.round().clamp(-top, top - 1) * scale
