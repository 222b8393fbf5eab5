"""Float weights of few bits, dequantized by rows: float8 e4m3, and 4-bit NormalFloat."""

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from infopt.kernels.gemm.scratch import Scratch

# Sign, exponent and mantissa of an e4m3 moved to where float32 has them; the exponents' biases
# differ by 120, and a product makes that good, subnormal values included.
_SHIFT = 20
_MASK = 0x87F00000 - (1 << 32)
_REBIAS = 2.0**120
_NAN = 0x7F


@dataclass(frozen=True, slots=True)
class Fp8Rows:
    """w = value * scale; no value may be NaN, of which the moved bits would make a number."""

    codes: Tensor
    """float8_e4m3fn [N, K]"""
    scales: Tensor
    """Of any float dtype: [1], [N, 1], or one for each block [ceil(N / b), ceil(K / b)]."""
    block: int | None = None

    @property
    def shape(self) -> tuple[int, int]:
        return self.codes.shape[0], self.codes.shape[1]

    @property
    def multiple(self) -> int:
        return self.block or 1

    @property
    def nbytes(self) -> int:
        return self.codes.nbytes + self.scales.nbytes

    def fill(self, start: int, out: Tensor, scratch: Scratch) -> None:
        """As `Rows.fill`: the cast that torch does number by number, ten times as fast."""
        rows = slice(start, start + out.shape[0])
        bits = out.view(torch.int32).copy_(self.codes[rows].view(torch.int8))
        bits.bitwise_left_shift_(_SHIFT).bitwise_and_(_MASK)
        out.mul_(_REBIAS).mul_(self._scales(rows))

    def _scales(self, rows: slice) -> Tensor:
        if self.block is None:
            return (self.scales if self.scales.numel() == 1 else self.scales[rows]).float()
        blocks = self.scales[rows.start // self.block : -(-rows.stop // self.block)].float()
        tall = blocks.repeat_interleave(self.block, dim=0)[: rows.stop - rows.start]
        return tall.repeat_interleave(self.block, dim=1)[:, : self.codes.shape[1]]


def has_nan(codes: Tensor) -> bool:
    """Whether float8_e4m3fn codes hold a NaN."""
    return bool(((codes.view(torch.uint8) & _NAN) == _NAN).any())


@dataclass(frozen=True, slots=True)
class Nf4Rows:
    """w = quant_map[code] * absmax of its block; blocks run over the rows, end to end."""

    codes: Tensor
    """uint8 [ceil(N * K / 2)]: two codes a byte, the first in the high nibble."""
    pairs: Tensor
    """float64 [256]: by byte, the two float32 values of its codes, side by side in memory."""
    absmax: Tensor
    """float32 [blocks], or uint8 codes into `nested_map`."""
    nested_absmax: Tensor | None
    """float32: of each `nested_block` codes of absmax."""
    nested_map: Tensor | None
    offset: float
    size: tuple[int, int]
    block: int = 64
    nested_block: int = 256

    @property
    def shape(self) -> tuple[int, int]:
        return self.size

    @property
    def multiple(self) -> int:
        """So that a run of rows begins with a block, and at a byte."""
        return self.block // math.gcd(self.block, self.size[1])

    @property
    def nbytes(self) -> int:
        parts = (self.codes, self.pairs, self.absmax, self.nested_absmax, self.nested_map)
        return sum(part.nbytes for part in parts if part is not None)

    def fill(self, start: int, out: Tensor, scratch: Scratch) -> None:
        first, count = start * self.size[1], out.numel()
        stored = self.codes[first // 2 : -(-(first + count) // 2)]
        places = scratch.take("places", stored.shape, torch.int32, out.device).copy_(stored)
        pairs = scratch.take("pairs", stored.shape, torch.float64, out.device)
        torch.index_select(self.pairs, 0, places, out=pairs)
        values, flat = pairs.view(torch.float32)[:count], out.view(-1)
        absmax = self._absmax(first // self.block, -(-(first + count) // self.block))
        whole = count // self.block * self.block
        torch.mul(
            values[:whole].view(-1, self.block),
            absmax[: whole // self.block, None],
            out=flat[:whole].view(-1, self.block),
        )
        if whole < count:
            torch.mul(values[whole:], absmax[-1], out=flat[whole:])

    def block_absmax(self) -> Tensor:
        """float32 [blocks]"""
        return self._absmax(0, self.absmax.numel())

    def _absmax(self, first: int, last: int) -> Tensor:
        if self.nested_absmax is None or self.nested_map is None:
            return self.absmax[first:last]
        places = torch.arange(first, last, device=self.absmax.device) // self.nested_block
        values = self.nested_map[self.absmax[first:last].int()]
        return values * self.nested_absmax[places] + self.offset


def pair_values(quant_map: Tensor) -> Tensor:
    """`Nf4Rows.pairs` for the values float32 [16] of the codes."""
    byte = torch.arange(256, device=quant_map.device)
    pairs = torch.stack((quant_map[byte >> 4], quant_map[byte & 15]), dim=1)
    return pairs.float().contiguous().view(torch.float64).view(256)


def pack_pairs(codes: Tensor) -> Tensor:
    """Codes uint8 [N, K] below 16 -> `Nf4Rows.codes`."""
    flat = torch.nn.functional.pad(codes.flatten(), (0, codes.numel() % 2))
    return flat[::2] << 4 | flat[1::2]
