"""Rounding to the nearest code (RTN)."""

import torch
from torch import Tensor

from infopt.core.formats.number import IntegerFormat, QuantizedWeight
from infopt.core.quantization.grid import Grid, make_grid, round_to_grid


def group_grids(weight: Tensor, number_format: IntegerFormat) -> Grid:
    """One grid for each group of columns: scale and zero [N, G]."""
    groups = number_format.groups(weight.shape[1])
    return make_grid(weight.float().reshape(len(weight), groups, -1), number_format)


def quantize_nearest(weight: Tensor, number_format: IntegerFormat) -> QuantizedWeight:
    """Round a weight [N, K] to the nearest codes of its min-max grid."""
    grid = group_grids(weight, number_format)
    grouped = weight.float().reshape(*grid.scale.shape, -1)
    each = Grid(grid.scale.unsqueeze(-1), grid.zero.unsqueeze(-1))
    codes = round_to_grid(grouped, each, number_format.max_code).flatten(1)
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
