"""What a projection is, and the dense one."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

import torch
import torch.nn.functional as F
from torch import Tensor

from infopt.kernels.gemm.tiles import tiled_linear


class Projection(Protocol):
    """A linear map of the last dimension, however its weight is held."""

    def __call__(self, x: Tensor) -> Tensor: ...

    @property
    def nbytes(self) -> int:
        """Bytes resident, all of them read by each call."""
        ...


@dataclass(frozen=True, slots=True)
class Linear:
    """y = x W^T + b with weight [out, in] and bias [out] or None."""

    weight: Tensor
    bias: Tensor | None = None
    fixed: bool = False
    """In products of a fixed number of rows: a row's result never depends on the others."""

    def __call__(self, x: Tensor) -> Tensor:
        if self.fixed:
            return tiled_linear(x, self.weight, self.bias)
        return F.linear(x, self.weight, self.bias)

    @property
    def nbytes(self) -> int:
        """Bytes resident, all of them read by each call."""
        return self.weight.nbytes + (self.bias.nbytes if self.bias is not None else 0)


@dataclass(frozen=True, slots=True)
class Given:
    """A projection that costs nothing, its result [T, out] being there already: to time what lies
    around it."""

    output: Tensor

    def __call__(self, x: Tensor) -> Tensor:
        return self.output[: len(x)]

    @property
    def nbytes(self) -> int:
        return 0


def fused(parts: Sequence[Linear]) -> Linear:
    """Dense projections of the same input as one, their outputs side by side."""
    biases = [part.bias for part in parts if part.bias is not None]
    assert len(biases) in (0, len(parts)), "either all parts have a bias or none"
    weight = torch.cat([part.weight for part in parts])
    if weight.device.type == "cpu" and weight.dtype == torch.float32:
        # Stored by input: so MKL multiplies a row or two by a wide matrix 1.2 to 2 times as fast,
        # and more rows about as fast.
        weight = weight.t().contiguous().t()
    return Linear(weight, torch.cat(biases) if biases else None, parts[0].fixed)
