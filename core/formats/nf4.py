"""4-bit NormalFloat weights in blocks of 64 (QLoRA; Dettmers et al. 2023, arXiv 2305.14314)."""

from dataclasses import dataclass

import torch
from torch import Tensor

BLOCK = 64
NESTED_BLOCK = 256
QUANT_MAP = (
    -1.0, -0.6961928009986877, -0.5250730514526367, -0.39491748809814453, -0.28444138169288635,
    -0.18477343022823334, -0.09105003625154495, 0.0, 0.07958029955625534, 0.16093020141124725,
    0.24611230194568634, 0.33791524171829224, 0.44070982933044434, 0.5626170039176941,
    0.7229568362236023, 1.0,
)  # fmt: skip
"""The quantiles of a normal distribution, as bitsandbytes has them."""
_TINY = 1e-38


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


def quantize_nf4(weight: Tensor, form: Nf4Format) -> Nf4Weight:
    """Round a weight [N, K] to NF4, with the arithmetic of bitsandbytes' quantize_4bit.

    The last block may be short. The mean of the absmax is subtracted before they are quantized.
    """
    device = weight.device
    quant_map = torch.tensor(QUANT_MAP, dtype=torch.float32, device=device)
    codes, absmax = _quantize_blocks(weight.flatten().to(torch.float32), quant_map, BLOCK)
    codes = codes.reshape(weight.shape)
    if not form.double:
        return Nf4Weight(codes, absmax, quant_map, None, None, 0.0, form)
    offset = absmax.mean()
    nested_map = dynamic_map().to(device)
    nested, nested_absmax = _quantize_blocks(absmax - offset, nested_map, NESTED_BLOCK)
    return Nf4Weight(codes, nested, quant_map, nested_absmax, nested_map, offset.item(), form)


def dynamic_map() -> Tensor:
    """float32 [256], sorted: the dynamic 8-bit type (Dettmers 2015, arXiv 1511.04561).

    Seven decades below 1, the largest with the finest steps: 2^i means between 0.1 and 1 in
    decade i, of both signs; and 0 and 1.
    """
    values = [0.0, 1.0]
    for decade in range(7):
        edges = torch.linspace(0.1, 1, 2**decade + 1, dtype=torch.float32)
        means = 10 ** (decade - 6) * ((edges[:-1] + edges[1:]) / 2)
        values += means.tolist() + (-means).tolist()
    return torch.tensor(sorted(values), dtype=torch.float32)


def _quantize_blocks(values: Tensor, sorted_map: Tensor, block: int) -> tuple[Tensor, Tensor]:
    """The nearest entries of the map, uint8 [n], for values [n] / absmax, float32 [blocks]."""
    size = values.numel()
    blocks = -(-size // block)
    padded = values.new_zeros(blocks * block)
    padded[:size] = values
    rows = padded.view(blocks, block)
    absmax = rows.abs().amax(dim=1)
    steps = (rows * (1.0 / absmax.clamp(min=_TINY)).unsqueeze(1)).clamp(-1, 1).flatten()[:size]
    borders = (sorted_map[:-1] + sorted_map[1:]) / 2
    return torch.bucketize(steps, borders, out_int32=True).to(torch.uint8), absmax
