"""The grid of each group of weights: scale and zero, from the least and the largest weight."""

from dataclasses import dataclass

import torch
from torch import Tensor

from infopt.core.errors import NumericsError
from infopt.core.formats.number import IntegerFormat

_SMALLEST = 2.0**-24
_LARGEST = 65280.0


@dataclass(frozen=True, slots=True)
class Grid:
    """Scales and zeros, float32, of any one shape; the scales are exact in float16.

    They are rounded before any code is chosen, so that what is stored is what was computed with.
    """

    scale: Tensor
    zero: Tensor


def make_grid(weights: Tensor, number_format: IntegerFormat) -> Grid:
    """The min-max grid over the last dimension of weights [..., columns]: scale and zero [...].

    Symmetric: scale 2 max|w| / (2^bits - 1), zero 2^(bits-1). Asymmetric: the range includes 0,
    which is on the grid exactly, and zero is at least 1, since GPTQ v1 cannot store 0.
    Raises NumericsError for weights beyond what a float16 scale reaches.
    """
    top = float(number_format.max_code)
    low = weights.amin(dim=-1).clamp(max=0.0)
    high = weights.amax(dim=-1).clamp(min=0.0)
    if number_format.symmetric:
        scale = _storable(2 * torch.maximum(-low, high) / top, number_format)
        return Grid(scale, torch.full_like(scale, number_format.middle))
    scale = _storable((high - low) / top, number_format)
    zero = torch.round(-low / scale)
    # With the zero held at 1, one code fewer is left for the weights above it.
    wider = _storable(torch.maximum(high / (top - 1), -low), number_format)
    scale = torch.where(zero < 1, wider, scale)
    return Grid(scale, torch.round(-low / scale).clamp(1.0, top))


def round_to_grid(weights: Tensor, grid: Grid, max_code: int) -> Tensor:
    """The nearest codes, as float32; shapes broadcast."""
    return (torch.round(weights / grid.scale) + grid.zero).clamp_(0.0, float(max_code))


def _storable(scale: Tensor, number_format: IntegerFormat) -> Tensor:
    """Rounded to float16; a group of zeros has the scale 1, and none underflows to 0.

    Up to 4 bits a scale keeps bfloat16's 8 significant bits: kernels that hold scales in bfloat16,
    or multiply symmetric codes in float16, then compute with exactly our weights, and the grid is
    no worse for it, as the codes are chosen after. At 8 bits that would clip the largest weights.
    """
    if scale.numel() and float(scale.max()) > _LARGEST:
        raise NumericsError("weights too large for a float16 scale")
    if number_format.bits <= 4:
        scale = scale.to(torch.bfloat16)
    rounded = scale.to(torch.float16).to(torch.float32).clamp(min=_SMALLEST)
    return torch.where(scale > 0, rounded, torch.ones_like(rounded))
