"""Products with a weight that is dequantized block of rows by block of rows, at each call."""

from typing import Protocol

import torch
import torch.nn.functional as F
from torch import Tensor

from infopt.kernels.gemm.scratch import Scratch
from infopt.kernels.gemm.tiles import tiled_linear

# Weights dequantized at a time: what passes through the cache before it is multiplied.
_BLOCK_ELEMENTS = 1 << 19


class Rows(Protocol):
    """A packed weight [outputs, inputs], of which any run of rows can be had."""

    @property
    def shape(self) -> tuple[int, int]: ...

    @property
    def multiple(self) -> int:
        """A run of rows must begin at a multiple of this."""
        ...

    @property
    def nbytes(self) -> int: ...

    def fill(self, start: int, out: Tensor, scratch: Scratch) -> None:
        """Write the rows from `start` on into `out`, float32 [rows, inputs], contiguous."""
        ...


def dequantized(weight: Rows, device: torch.device) -> Tensor:
    """The whole weight, float32 [outputs, inputs]: what the product is held to."""
    out = torch.empty(weight.shape, dtype=torch.float32, device=device)
    weight.fill(0, out, Scratch())
    return out


def rows_linear(
    x: Tensor, weight: Rows, bias: Tensor | None, scratch: Scratch, *, fixed: bool = False
) -> Tensor:
    """F.linear(x, dequantized weight in the dtype of x, bias): x [M, K] -> [M, N].

    `fixed`: in products of a fixed number of rows.
    """
    product = tiled_linear if fixed else F.linear
    outputs, inputs = weight.shape
    step = block_rows(inputs, weight.multiple)
    y = x.new_empty(x.shape[0], outputs)
    for start in range(0, outputs, step):
        rows = min(step, outputs - start)
        values = scratch.take("values", (rows, inputs), torch.float32, x.device)
        weight.fill(start, values, scratch)
        if x.dtype != torch.float32:
            rounded = scratch.take("rounded", (rows, inputs), x.dtype, x.device)
            values = rounded.copy_(values)
        y[:, start : start + rows] = product(x, values)
    return y if bias is None else y.add_(bias)


def block_rows(inputs: int, multiple: int) -> int:
    """Rows to dequantize at a time."""
    return max(_BLOCK_ELEMENTS // inputs // multiple, 1) * multiple
