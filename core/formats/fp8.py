"""Weights as float8 e4m3 with a scale per tensor, per output channel or per block."""

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from infopt.core.formats.activation import FP8_MAX
from infopt.core.formats.exact import round_up

BLOCK = (128, 128)


@dataclass(frozen=True, slots=True)
class Fp8Format:
    """float8_e4m3fn values; strategy block has one scale for each 128 x 128 of the weight."""

    strategy: Literal["tensor", "channel", "block"]

    @property
    def bits(self) -> int:
        return 8

    def scale_shape(self, outputs: int, inputs: int) -> tuple[int, ...]:
        match self.strategy:
            case "tensor":
                return (1,)
            case "channel":
                return (outputs, 1)
            case "block":
                return (-(-outputs // BLOCK[0]), -(-inputs // BLOCK[1]))

    def bits_per_weight(self, columns: int, scale_bits: int = 32) -> float:
        """Stored bits per weight of a layer with `columns` inputs, with the scales."""
        match self.strategy:
            case "tensor":
                return 8.0
            case "channel":
                return 8 + scale_bits / columns
            case "block":
                return 8 + scale_bits / (BLOCK[0] * BLOCK[1])


@dataclass(frozen=True, slots=True)
class Fp8Weight:
    """A weight [N, K]: codes float8_e4m3fn [N, K], scales of any float dtype in `scale_shape`."""

    codes: Tensor
    scales: Tensor
    format: Fp8Format

    def dequantize(self, dtype: torch.dtype = torch.float32) -> Tensor:
        """codes * scales, computed in float32: [N, K]."""
        values = self.codes.to(torch.float32)
        return (values * spread(self.scales.float(), values.shape, self.format)).to(dtype)


def to_fp8(weight: Tensor, form: Fp8Format) -> Fp8Weight:
    """Round a weight [N, K]: scale = amax / 448, rounded up to bfloat16, float32."""
    values = weight.to(torch.float32)
    match form.strategy:
        case "tensor":
            amax = values.abs().amax().reshape(1)
        case "channel":
            amax = values.abs().amax(dim=1, keepdim=True)
        case "block":
            amax = _block_amax(values)
    # Loaders hold scales in the model's dtype; rounded up, the largest values are not clipped.
    scales = round_up(amax / FP8_MAX).to(torch.float32)
    scales = torch.where(scales > 0, scales, torch.ones_like(scales))
    steps = values / spread(scales, values.shape, form)
    return Fp8Weight(steps.clamp(-FP8_MAX, FP8_MAX).to(torch.float8_e4m3fn), scales, form)


def spread(scales: Tensor, shape: torch.Size, form: Fp8Format) -> Tensor:
    """The scales as they multiply a weight of `shape`."""
    if form.strategy != "block":
        return scales
    rows = scales.repeat_interleave(BLOCK[0], dim=0)[: shape[0]]
    return rows.repeat_interleave(BLOCK[1], dim=1)[:, : shape[1]]


def _block_amax(values: Tensor) -> Tensor:
    outputs, inputs = values.shape
    rows, columns = -(-outputs // BLOCK[0]), -(-inputs // BLOCK[1])
    padded = values.new_zeros(rows * BLOCK[0], columns * BLOCK[1])
    padded[:outputs, :inputs] = values
    return padded.view(rows, BLOCK[0], columns, BLOCK[1]).abs().amax(dim=(1, 3))
