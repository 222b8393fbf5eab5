"""Float8 e4m3 weights as Triton's products read them: as checkpoints have them; and one whole."""

from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor

from infopt.kernels.gpu.tile import cdiv

BLOCK = 128
_ROWS, _COLUMNS = 4, 512


@dataclass(frozen=True, slots=True)
class Fp8Matrix:
    """w = value * scale; no value may be NaN, of which the moved bits would make a number."""

    codes: Tensor
    """float8_e4m3fn [N, K]"""
    scales: Tensor
    """float32 [N], or by block [ceil(N / 128), ceil(K / 128)]."""

    @property
    def blocks(self) -> bool:
        return self.scales.ndim == 2

    @property
    def shape(self) -> tuple[int, int]:
        return self.codes.shape[0], self.codes.shape[1]

    @property
    def nbytes(self) -> int:
        return self.codes.nbytes + self.scales.nbytes


def reference(weight: Fp8Matrix) -> Tensor:
    """The weight in float64, [N, K]."""
    whole, scales = weight.codes.double(), weight.scales.double()
    if not weight.blocks:
        return whole * scales[:, None]
    rows = scales.repeat_interleave(BLOCK, 0)[: whole.shape[0]]
    return whole * rows.repeat_interleave(BLOCK, 1)[:, : whole.shape[1]]


@triton.jit
def float8_of(bits, DTYPE: tl.constexpr):
    """The values of e4m3 codes, uint8: their bits moved to where float16 has them; the biases of
    the exponents differ by 8, and a product makes that good, subnormal values included."""
    wide = bits.to(tl.int16)
    moved = ((wide & 0x80) << 8) | ((wide & 0x7F) << 7)
    return (moved.to(tl.float16, bitcast=True) * 256.0).to(DTYPE)


@triton.jit
def dequantize(
    codes, scales, out, columns, inputs, scale_columns,
    BLOCKS: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    n = (tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N))[:, None]
    k = (tl.program_id(1) * BLOCK_K + tl.arange(0, BLOCK_K))[None, :]
    there = (n < columns) & (k < inputs)
    at = n.to(tl.int64) * inputs + k
    values = float8_of(tl.load(codes + at, mask=there, other=0), tl.float32)
    place = n // 128 * scale_columns + k // 128 if BLOCKS else n + 0 * k
    values *= tl.load(scales + place, mask=there, other=0.0)
    tl.store(out + at, values.to(out.dtype.element_ty), mask=there)


def dequantized(weight: Fp8Matrix, dtype: torch.dtype) -> Tensor:
    """The weight [N, K] in `dtype`: as float32 gives each number, then rounded."""
    outputs, inputs = weight.shape
    out = torch.empty(outputs, inputs, dtype=dtype, device=weight.codes.device)
    dequantize[(cdiv(outputs, _ROWS), cdiv(inputs, _COLUMNS))](
        weight.codes.view(torch.uint8), weight.scales, out, outputs, inputs,
        weight.scales.shape[-1], BLOCKS=weight.blocks, BLOCK_N=_ROWS, BLOCK_K=_COLUMNS,
        num_warps=4,
    )  # fmt: skip
    return out
