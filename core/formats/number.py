"""Number formats: how a weight is stored as integers, and what the integers mean."""

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True, slots=True)
class IntegerFormat:
    """Unsigned integer codes of `bits` bits with a scale and a zero per group of input columns.

    `group_size` is the number of input columns that share a scale; None: the whole row.
    A symmetric format has its zero fixed at 2^(bits-1).
    """

    bits: int
    symmetric: bool
    group_size: int | None

    @property
    def max_code(self) -> int:
        return (1 << self.bits) - 1

    @property
    def middle(self) -> int:
        """The zero of a symmetric format."""
        return 1 << (self.bits - 1)

    def groups(self, columns: int) -> int:
        """How many groups a row of `columns` input columns has; the size must divide it."""
        return columns // (self.group_size or columns)

    def bits_per_weight(self, columns: int, scale_bits: int = 16) -> float:
        """Stored bits per weight, with the scales and zeros."""
        return self.bits + (scale_bits + self.bits) / (self.group_size or columns)


@dataclass(frozen=True, slots=True)
class QuantizedWeight:
    """A weight [N, K] (outputs, inputs) as integer codes.

    codes: uint8 [N, K]; scales: float16 [N, G]; zeros: uint8 [N, G];
    group_index: int32 [K], the group of each input column.
    """

    codes: Tensor
    scales: Tensor
    zeros: Tensor
    group_index: Tensor
    format: IntegerFormat

    def dequantize(self, dtype: torch.dtype = torch.float32) -> Tensor:
        """(codes - zeros) * scales, computed in float32: [N, K]."""
        codes, zeros, scales = (p.to(torch.float32) for p in (self.codes, self.zeros, self.scales))
        outputs, groups = self.scales.shape
        columns = torch.arange(codes.shape[1], device=codes.device)
        if torch.equal(self.group_index.long(), columns * groups // codes.shape[1]):
            # Groups in order need no gather: several times faster.
            steps = codes.reshape(outputs, groups, -1) - zeros.unsqueeze(-1)
            return (steps * scales.unsqueeze(-1)).reshape(codes.shape).to(dtype)
        group = self.group_index.long()
        return ((codes - zeros[:, group]) * scales[:, group]).to(dtype)
