"""The grid of each group of weights: its scale and its zero."""

from dataclasses import dataclass

import torch
from torch import Tensor

from infopt.core.errors import NumericsError
from infopt.core.formats.exact import round_up
from infopt.core.formats.number import IntegerFormat

_SMALLEST = 2.0**-24
_LARGEST = 65280.0
_SHRINKS = tuple(1 - step / 20 for step in range(1, 11))
"""Shares of the whole range that are tried: 0.95 down to 0.5."""


@dataclass(frozen=True, slots=True)
class Grid:
    """Scales and zeros, float32, of any one shape; the scales are exact in float16.

    They are rounded before any code is chosen, so that what is stored is what was computed with.
    """

    scale: Tensor
    zero: Tensor

    def each(self) -> "Grid":
        """The same, to be broadcast over the columns of each group."""
        return Grid(self.scale.unsqueeze(-1), self.zero.unsqueeze(-1))


def make_grid(weights: Tensor, number_format: IntegerFormat, *, mse: bool) -> Grid:
    """A grid over the last dimension of weights [..., columns]: scale and zero [...].

    With `mse` the range that rounds with the least squared error, down to half of the whole; it
    clips the largest weights for finer steps. Raises NumericsError for weights beyond what a
    float16 scale reaches.
    """
    grid = range_grid(weights, number_format, 1.0)
    if not mse:
        return grid
    least = _squared_error(weights, grid, number_format)
    for shrink in _SHRINKS:
        other = range_grid(weights, number_format, shrink)
        error = _squared_error(weights, other, number_format)
        better = error < least
        least = torch.where(better, error, least)
        grid = Grid(
            torch.where(better, other.scale, grid.scale), torch.where(better, other.zero, grid.zero)
        )
    return grid


def round_to_grid(weights: Tensor, grid: Grid, max_code: int) -> Tensor:
    """The nearest codes, as float32; shapes broadcast."""
    return (torch.round(weights / grid.scale) + grid.zero).clamp_(0.0, float(max_code))


def range_grid(weights: Tensor, number_format: IntegerFormat, share: float | Tensor) -> Grid:
    """The grid that spans a share, one for all or [...], of the range of weights [..., columns].

    Symmetric: scale 2 max|w| / (2^bits - 1), zero 2^(bits-1). Asymmetric: the range includes 0,
    which is on the grid exactly, and zero is at least 1, since GPTQ v1 cannot store 0.
    """
    top = float(number_format.max_code)
    low = weights.amin(dim=-1).clamp(max=0.0) * share
    high = weights.amax(dim=-1).clamp(min=0.0) * share
    if number_format.symmetric:
        scale = storable(2 * torch.maximum(-low, high) / top, number_format)
        return Grid(scale, torch.full_like(scale, number_format.middle))
    scale = storable((high - low) / top, number_format)
    zero = torch.round(-low / scale)
    # With the zero held at 1, one code fewer is left for the weights above it.
    wider = storable(torch.maximum(high / (top - 1), -low), number_format)
    scale = torch.where(zero < 1, wider, scale)
    return Grid(scale, torch.round(-low / scale).clamp(1.0, top))


def _squared_error(weights: Tensor, grid: Grid, number_format: IntegerFormat) -> Tensor:
    each = grid.each()
    codes = round_to_grid(weights, each, number_format.max_code)
    return codes.sub_(each.zero).mul_(each.scale).sub_(weights).square_().sum(dim=-1)


def storable(scale: Tensor, number_format: IntegerFormat) -> Tensor:
    """Rounded to what bfloat16 and float16 both hold; a group of zeros has the scale 1.

    Loaders hold scales in the model's dtype, kernels multiply in float16: with bfloat16's 8
    significant bits all compute with exactly our weights, and the grid is no worse for it, as the
    codes are chosen after. At 8 bits the scale is rounded up: else the largest weights were
    clipped by up to half a step. None underflows to 0.
    """
    if scale.numel() and float(scale.max()) > _LARGEST:
        raise NumericsError("weights too large for a float16 scale")
    rounded = scale.to(torch.bfloat16)
    if number_format.bits > 4:
        rounded = round_up(scale)
    held = rounded.to(torch.float16).to(torch.float32).clamp(min=_SMALLEST)
    return torch.where(scale > 0, held, torch.ones_like(held))
