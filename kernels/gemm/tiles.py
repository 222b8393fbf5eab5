"""Dense products whose rows do not depend on one another by a bit.

Libraries choose how to sum by the number of rows: MKL sums one to three rows otherwise than more.
A product of a fixed number of rows is always the same one, and gives a row the same result
wherever in it the row stands; tests hold this on the machine at hand. With up to eight outputs and
an odd number of inputs it does not (MKL, AVX-512): of narrow weights, each row has its own product.
"""

import torch.nn.functional as F
from torch import Tensor

TILE = 16
"""Rows of a product: a decode step pays for all of them, a prompt for many small products."""
_NARROW = 16


def tiled_linear(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """F.linear for x [M, K], in products of exactly `TILE` rows, the last filled up with zeros."""
    y = x.new_empty(x.shape[0], weight.shape[0])
    step = 1 if weight.shape[0] < _NARROW else TILE
    for start in range(0, x.shape[0], step):
        rows = x[start : start + step]
        block = x.new_zeros(TILE, x.shape[1])
        block[: len(rows)] = rows
        y[start : start + step] = F.linear(block, weight, bias)[: len(rows)]
    return y
