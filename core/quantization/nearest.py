"""Rounding to the nearest code (RTN)."""

import torch
from torch import Tensor

from infopt.core.formats.number import IntegerFormat, QuantizedWeight
from infopt.core.quantization.grid import Grid, make_grid, round_to_grid

PRUNED = 0.05
"""A weight with this share of zeros was pruned: chance makes no such number of them."""


def held_zeros(weight: Tensor) -> Tensor | None:
    """Where the zeros of a pruned weight [N, K] are, which must stay zeros; None for any other."""
    zeros = weight == 0
    return zeros if float(zeros.float().mean()) >= PRUNED else None


def group_grids(weight: Tensor, number_format: IntegerFormat, *, mse: bool) -> Grid:
    """One grid for each group of columns of a weight [N, K]: scale and zero [N, G]."""
    grouped = weight.float().reshape(len(weight), number_format.groups(weight.shape[1]), -1)
    return make_grid(grouped, number_format, mse=mse)


def quantize_nearest(weight: Tensor, number_format: IntegerFormat, grid: Grid) -> QuantizedWeight:
    """Round a weight [N, K] to the nearest codes of its groups' grids [N, G]."""
    grouped = weight.float().reshape(*grid.scale.shape, -1)
    codes = round_to_grid(grouped, grid.each(), number_format.max_code).flatten(1)
    return as_quantized(codes, grid, number_format)


def as_quantized(codes: Tensor, grid: Grid, number_format: IntegerFormat) -> QuantizedWeight:
    """Codes [N, K] and grids [N, G] in the dtypes that they are stored in; groups lie in order."""
    columns, groups = codes.shape[1], grid.scale.shape[1]
    index = torch.arange(columns, dtype=torch.int32, device=codes.device)
    return QuantizedWeight(
        codes=codes.to(torch.uint8).contiguous(),
        scales=grid.scale.to(torch.float16),
        zeros=grid.zero.to(torch.uint8),
        group_index=index // (columns // groups),
        format=number_format,
    )
