"""4-bit NormalFloat weights in blocks of 64 (QLoRA; Dettmers et al. 2023, arXiv 2305.14314)."""

from dataclasses import dataclass

import torch
from torch import Tensor

BLOCK = 64
NESTED_BLOCK = 256


@dataclass(frozen=True, slots=True)
class Nf4Format:
    """NF4 codes; with `double` the blocks' absmax is quantized as well, to 8 bits."""

    double: bool = True

    @property
    def bits(self) -> int:
        return 4

    def bits_per_weight(self, columns: int) -> float:
        """Stored bits per weight, with the absmax of the blocks."""
        if not self.double:
            return 4 + 32 / BLOCK
        return 4 + 8 / BLOCK + 32 / (BLOCK * NESTED_BLOCK)


@dataclass(frozen=True, slots=True)
class Nf4Weight:
    """A weight [N, K]: codes uint8 [N, K] in 0..15; blocks of 64 run over the rows, end to end.

    absmax: float32 [blocks] without double quantization, else uint8 [blocks], codes into
    `nested_map` float32 [256], times `nested_absmax` float32 [blocks / 256], plus `offset`.
    quant_map: float32 [16], the values of the codes.
    """

    codes: Tensor
    absmax: Tensor
    quant_map: Tensor
    nested_absmax: Tensor | None
    nested_map: Tensor | None
    offset: float
    format: Nf4Format

    def block_absmax(self) -> Tensor:
        """float32 [blocks]."""
        if self.nested_absmax is None or self.nested_map is None:
            return self.absmax
        each = self.nested_absmax.repeat_interleave(NESTED_BLOCK)[: self.absmax.numel()]
        return self.nested_map[self.absmax.long()] * each + self.offset

    def dequantize(self, dtype: torch.dtype = torch.float32) -> Tensor:
        """[N, K]."""
        values = self.quant_map[self.codes.long()].flatten()
        each = self.block_absmax().repeat_interleave(BLOCK)[: values.numel()]
        return (values * each).reshape(self.codes.shape).to(dtype)
