"""The grid of each group of weights: its scale and its zero."""

from dataclasses import dataclass

import torch
from torch import Tensor

from infopt.core.errors import NumericsError
from infopt.core.formats.exact import round_up
from infopt.core.formats.number import IntegerFormat
from infopt.core.hardware.native import find_native
from infopt.kernels.cpu.solve import grid_errors, grid_errors_reference

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
    if not mse:
        return range_grid(weights, number_format, 1.0)
    extremes = _extremes(weights)
    grids = [_spanning(*extremes, number_format, share) for share in (1.0, *_SHRINKS)]
    scales = torch.stack([grid.scale for grid in grids])
    zeros = torch.stack([grid.zero for grid in grids])
    best = _errors(weights, scales, zeros, number_format.max_code).argmin(dim=0, keepdim=True)
    return Grid(scales.gather(0, best)[0], zeros.gather(0, best)[0])


def _errors(weights: Tensor, scales: Tensor, zeros: Tensor, max_code: int) -> Tensor:
    """Squared errors [C, ...] of weights [..., columns] on grids [C, ...]."""
    native = find_native("auto") if weights.device.type == "cpu" else None
    if native is None:
        return grid_errors_reference(weights, scales, zeros, max_code)
    return grid_errors(native, weights.float().contiguous(), scales, zeros, max_code)


def round_to_grid(weights: Tensor, grid: Grid, max_code: int) -> Tensor:
    """The nearest codes, as float32; shapes broadcast."""
    return (torch.round(weights / grid.scale) + grid.zero).clamp_(0.0, float(max_code))


def range_grid(weights: Tensor, number_format: IntegerFormat, share: float | Tensor) -> Grid:
    """The grid that spans a share, one for all or [...], of the range of weights [..., columns].

    Symmetric: scale 2 max|w| / (2^bits - 1), zero 2^(bits-1). Asymmetric: the range includes 0,
    which is on the grid exactly, and zero is at least 1, since GPTQ v1 cannot store 0.
    """
    return _spanning(*_extremes(weights), number_format, share)


def _extremes(weights: Tensor) -> tuple[Tensor, Tensor]:
    """The least and the largest of weights [..., columns], and 0: [...] each."""
    return weights.amin(dim=-1).clamp(max=0.0), weights.amax(dim=-1).clamp(min=0.0)


def _spanning(
    low: Tensor, high: Tensor, number_format: IntegerFormat, share: float | Tensor
) -> Grid:
    top = float(number_format.max_code)
    low, high = low * share, high * share
    if number_format.symmetric:
        scale = storable(2 * torch.maximum(-low, high) / top, number_format)
        return Grid(scale, torch.full_like(scale, number_format.middle))
    scale = storable((high - low) / top, number_format)
    zero = torch.round(-low / scale)
    # With the zero held at 1, one code fewer is left for the weights above it.
    wider = storable(torch.maximum(high / (top - 1), -low), number_format)
    scale = torch.where(zero < 1, wider, scale)
    return Grid(scale, torch.round(-low / scale).clamp(1.0, top))


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
