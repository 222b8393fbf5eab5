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
    calibrated and is stored beside the weight. `outlier_threshold`: values that reach it are left
    as they are (LLM.int8; Dettmers et al. 2022, arXiv 2208.07339), each by itself and not, as in
    the paper, with its column over the whole batch, on which a request's answer would depend.
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
            return float((1 << (self.bits - 1)) - 1)
        return ((1 << self.bits) - 1) / 2


def round_inputs(x: Tensor, form: ActivationFormat, scale: Tensor | None = None) -> Tensor:
    """The inputs [..., K] as the layer sees them: quantized and dequantized, in their dtype.

    `scale` is the stored one of a static format, a scalar or [1].
    """
    if form.strategy == "group":
        return _rounded_groups(x, form).to(x.dtype)
    steps, found = input_steps(x, form, scale)
    rounded = steps.mul_(found)
    if form.outlier_threshold is not None:
        rounded = torch.where(x.abs() >= form.outlier_threshold, x.to(torch.float32), rounded)
    return rounded.to(x.dtype)


def input_steps(
    x: Tensor, form: ActivationFormat, scale: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """What the inputs [..., K] are on the format's grid, and their scale, both float32.

    The scale is [..., 1] by token, else a scalar or [1]; outliers are 0. Not for groups.
    """
    values = x.to(torch.float32)
    if form.outlier_threshold is not None:
        values = values.masked_fill(values.abs() >= form.outlier_threshold, 0.0)
    match form.strategy:
        case "tensor":
            found = values.abs().amax() / form.largest if form.dynamic else scale
        case "token":
            found = values.abs().amax(dim=-1, keepdim=True) / form.largest
        case "group":
            raise AssertionError("groups have no one scale")
    assert found is not None, "a static format has its scale stored"
    return _on_grid(values, found, form)


def _rounded_groups(x: Tensor, form: ActivationFormat) -> Tensor:
    columns = x.shape[-1]
    size = form.group_size or columns
    # The last group may be short; zeros change no group's amax.
    values = torch.nn.functional.pad(x.to(torch.float32), (0, -columns % size))
    grouped = values.reshape(*values.shape[:-1], -1, size)
    steps, scale = _on_grid(grouped, grouped.abs().amax(dim=-1, keepdim=True) / form.largest, form)
    return steps.mul_(scale).flatten(-2)[..., :columns]


def _on_grid(values: Tensor, scale: Tensor, form: ActivationFormat) -> tuple[Tensor, Tensor]:
    # Where all is zero, any scale will do; one that is not finite must stay so, to be noticed.
    scale = torch.where(scale == 0, torch.ones_like(scale), scale).to(torch.float32)
    steps = values / scale
    if form.kind == "float":
        return steps.clamp_(-FP8_MAX, FP8_MAX).to(torch.float8_e4m3fn).to(torch.float32), scale
    top = 2 ** (form.bits - 1)
    return steps.round_().clamp_(-top, top - 1), scale
