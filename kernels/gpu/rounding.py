"""Rows rounded to 8 bits with a scale each, as a step of other kernels and as one of its own.

To the last bit as `core.formats.activation` has it, tests say: scale = amax / largest, steps =
value / scale, halves to even.
"""

from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor

from infopt.kernels.gpu.tile import Card, power_of_two

FP8_MAX: tl.constexpr = tl.constexpr(448.0)
_EVEN: tl.constexpr = tl.constexpr(12582912.0)
"""1.5 * 2^23: added and taken away again it leaves a float32 rounded to the nearest integer."""


@dataclass(frozen=True, slots=True)
class Rounding:
    """To int8 or float8_e4m3fn: what the greatest magnitude of a row becomes."""

    dtype: torch.dtype
    largest: float
    threshold: float | None = None
    """Values that reach it become 0 and have no part in the scale (LLM.int8, arXiv 2208.07339)."""


def reference(x: Tensor, to: Rounding, fixed: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """x [M, K] -> codes [M, K], scales float32 [M]; by a scale that is given, or each row's own."""
    values = x.float()
    if to.threshold is not None:
        values = values.masked_fill(values.abs() >= to.threshold, 0.0)
    scale = values.abs().amax(1) / to.largest if fixed is None else fixed.expand(len(x))
    scale = torch.where(scale == 0, 1.0, scale)
    steps = values / scale[:, None]
    if to.dtype == torch.int8:
        return steps.round().clamp(-128, 127).to(torch.int8), scale
    return steps.clamp(-FP8_MAX.value, FP8_MAX.value).to(to.dtype), scale


@triton.jit
def scale_of(values, largest):
    """Of a row: a sum beside the greatest magnitude makes what is not finite a NaN, to be noticed
    after the product (codes are integers, and would not show it)."""
    scale = tl.div_rn(tl.max(tl.abs(values), axis=0), largest)
    scale = tl.where(scale == 0, 1.0, scale)
    return scale + 0.0 * tl.sum(values, axis=0)


@triton.jit
def on_grid(values, scale, dtype: tl.constexpr):
    """Steps of a row, in dtype."""
    steps = tl.div_rn(values, tl.zeros_like(values) + scale)
    if dtype == tl.int8:
        found = tl.clamp((steps + _EVEN) - _EVEN, -128.0, 127.0).to(tl.int8)
    else:
        found = tl.clamp(steps, -448.0, 448.0).to(dtype)
    return found


@triton.jit
def round_row(
    x, codes, scales, fixed, columns, x_stride, largest, threshold,
    FIXED: tl.constexpr, THRESHOLD: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64)
    at = tl.arange(0, BLOCK)
    values = tl.load(x + row * x_stride + at, mask=at < columns, other=0.0).to(tl.float32)
    if THRESHOLD:
        values = tl.where(tl.abs(values) >= threshold, 0.0, values)
    still = 0.0 * tl.sum(values, axis=0)  # what is not finite shows in a static scale, too
    scale = tl.load(fixed) + still if FIXED else scale_of(values, largest)
    found = on_grid(values, scale, codes.dtype.element_ty)
    tl.store(codes + row * columns + at, found, mask=at < columns)
    tl.store(scales + row, scale)


def round_rows(
    card: Card, x: Tensor, to: Rounding, fixed: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """x [M, K], its rows contiguous -> codes [M, K], scales float32 [M].

    `fixed` float32 [1]: the scale of every row, its own where it is None.
    """
    assert x.stride(1) == 1
    count, columns = x.shape
    codes = torch.empty(count, columns, dtype=to.dtype, device=x.device)
    scales = torch.empty(count, dtype=torch.float32, device=x.device)
    tile = card.tile("row", columns=columns)
    if count:
        round_row[(count,)](
            x, codes, scales, scales if fixed is None else fixed, columns, x.stride(0),
            to.largest, to.threshold or 0.0, FIXED=fixed is not None,
            THRESHOLD=to.threshold is not None, BLOCK=power_of_two(columns), **tile.options(),
        )  # fmt: skip
    return codes, scales
