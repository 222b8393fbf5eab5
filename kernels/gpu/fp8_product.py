"""Products with float8 e4m3 weights: scales by output or by blocks of 128 x 128.

Inputs of 16 or 32 bits meet the weight's values, which those bits hold exactly; inputs of 8 bits
are multiplied as they are, on GPUs that can (from compute capability 8.9 on), each 128 of them
summed apart: the tensor cores of a Hopper keep only some 14 bits of a sum of float8 products
(DeepSeek-AI 2024, arXiv 2412.19437).
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from infopt.kernels.gpu import fp8_matrix
from infopt.kernels.gpu.fp8_matrix import BLOCK, Fp8Matrix, dequantized, float8_of
from infopt.kernels.gpu.parts import add_parts, results
from infopt.kernels.gpu.shape import product_key
from infopt.kernels.gpu.tile import Card, Key, Tile, cdiv

VECTOR, DOT, LIBRARY, DENSE = 0, 1, 2, 3
"""The ways, as tiles name them: `WAY`."""
FLOAT8_FROM = 89
"""The compute capability from which tensor cores multiply float8."""
_LIBRARY_MULTIPLE = 16


def reference(
    x: Tensor, row_scales: Tensor | None, weight: Fp8Matrix, bias: Tensor | None
) -> Tensor:
    """x [M, K], times row_scales [M] or [M, ceil(K / 128)] if it has them -> [M, N] in float64."""
    values = x.double()
    if row_scales is not None:
        scales = row_scales.double().view(len(x), row_scales.shape[1:].numel())
        wide = BLOCK if row_scales.ndim == 2 else x.shape[1]
        values = values * scales.repeat_interleave(wide, 1)[:, : x.shape[1]]
    found = values @ fp8_matrix.reference(weight).t()
    return found if bias is None else found + bias.double()


@triton.jit
def vector(
    x, codes, scales, bias, out, columns, inputs, x_stride, scale_columns,
    BLOCKS: tl.constexpr, BIAS: tl.constexpr, SPLIT: tl.constexpr, BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
):  # fmt: skip
    """BLOCK_N outputs of one row."""
    n = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    row, split = tl.program_id(1).to(tl.int64), tl.program_id(2)
    rows = codes + n[:, None].to(tl.int64) * inputs
    acc = tl.zeros((BLOCK_N, BLOCK_K), tl.float32)
    for first in range(split * BLOCK_K, inputs, SPLIT * BLOCK_K):
        k = first + tl.arange(0, BLOCK_K)
        bits = tl.load(
            rows + k[None, :], mask=(n[:, None] < columns) & (k[None, :] < inputs), other=0,
            eviction_policy="evict_first",
        )  # fmt: skip
        value = tl.load(x + row * x_stride + k, mask=k < inputs, other=0.0).to(tl.float32)
        part = float8_of(bits, tl.float32) * value[None, :]
        if BLOCKS:
            at = n[:, None] // 128 * scale_columns + k[None, :] // 128
            there = (n[:, None] < columns) & (k[None, :] < inputs)
            part *= tl.load(scales + at, mask=there, other=0.0)
        acc += part
    found = tl.sum(acc, axis=1)
    if not BLOCKS:
        found *= tl.load(scales + n, mask=n < columns, other=0.0)
    if BIAS:
        found += tl.load(bias + n, mask=n < columns, other=0.0).to(tl.float32)
    to = out + (split * tl.num_programs(1) + row) * columns + n
    tl.store(to, found.to(out.dtype.element_ty), mask=n < columns)


@triton.jit
def dot(
    x, row_scales, codes, scales, bias, out, count, columns, inputs, x_stride, row_columns,
    scale_columns, ROUNDED: tl.constexpr, BLOCKS: tl.constexpr, BIAS: tl.constexpr,
    SPLIT: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """ROUNDED: x is float8; 1: each row has a scale, 2: each 128 of a row have one."""
    n = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    m = tl.program_id(1) * BLOCK_M + tl.arange(0, BLOCK_M)
    split = tl.program_id(2)
    x_rows = x + m[:, None].to(tl.int64) * x_stride
    rows = codes + n[None, :].to(tl.int64) * inputs
    acc = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    for first in range(split * BLOCK_K, inputs, SPLIT * BLOCK_K):
        k = first + tl.arange(0, BLOCK_K)
        here = (m[:, None] < count) & (k[None, :] < inputs)
        there = (k[:, None] < inputs) & (n[None, :] < columns)
        a = tl.load(x_rows + k[None, :], mask=here, other=0.0)
        if ROUNDED:
            b = tl.load(rows + k[:, None], mask=there, other=0.0)
        else:
            b = float8_of(tl.load(rows + k[:, None], mask=there, other=0), x.dtype.element_ty)
        part = tl.dot(a, b, input_precision="ieee")
        if ROUNDED == 2:
            at = row_scales + m.to(tl.int64) * row_columns + first // 128
            part *= tl.load(at, mask=m < count, other=0.0)[:, None]
        if BLOCKS:
            at = scales + n // 128 * scale_columns + first // 128
            part *= tl.load(at, mask=n < columns, other=0.0)[None, :]
        acc += part
    if not BLOCKS:
        acc *= tl.load(scales + n, mask=n < columns, other=0.0)[None, :]
    if ROUNDED == 1:
        acc *= tl.load(row_scales + m, mask=m < count, other=0.0)[:, None]
    if BIAS:
        acc += tl.load(bias + n, mask=n < columns, other=0.0).to(tl.float32)[None, :]
    to = out + (split.to(tl.int64) * count + m[:, None]) * columns + n[None, :]
    tl.store(to, acc.to(out.dtype.element_ty), mask=(m[:, None] < count) & (n[None, :] < columns))


def tile_key(count: int, weight: Fp8Matrix, dtype: torch.dtype, *, fixed: bool = False) -> Key:
    """dtype: of the inputs."""
    outputs, inputs = weight.shape
    return product_key(count, outputs, inputs, dtype, fixed=fixed, blocks=int(weight.blocks))


def fp8_linear(
    card: Card, x: Tensor, weight: Fp8Matrix, bias: Tensor | None, *, fixed: bool = False
) -> Tensor:
    """x [M, K] of 16 or 32 bits, its rows contiguous -> [M, N] in its dtype.

    `fixed`: a row's result depends neither on the others nor on how many they are.
    """
    tile = card.tile("fp8_product", **tile_key(len(x), weight, x.dtype, fixed=fixed))
    return with_tile(tile, x, None, weight, bias, x.dtype)


def fp8_rounded_linear(
    card: Card,
    codes: Tensor,
    row_scales: Tensor,
    weight: Fp8Matrix,
    bias: Tensor | None,
    dtype: torch.dtype,
    *,
    fixed: bool = False,
) -> Tensor:
    """float8_e4m3fn codes [M, K] with float32 row_scales [M] or [M, ceil(K / 128)] -> [M, N] in
    `dtype`."""
    assert card.capability >= FLOAT8_FROM
    tile = card.tile("fp8_product", **tile_key(len(codes), weight, codes.dtype, fixed=fixed))
    return with_tile(tile, codes, row_scales, weight, bias, dtype)


def with_tile(
    tile: Tile,
    x: Tensor,
    row_scales: Tensor | None,
    weight: Fp8Matrix,
    bias: Tensor | None,
    dtype: torch.dtype,
) -> Tensor:
    """The product in a given way."""
    assert x.stride(1) == 1 and weight.codes.is_contiguous()
    outputs, inputs = weight.shape
    size = tile.constants
    if size["WAY"] == LIBRARY and _for_library(x, row_scales, weight, dtype):
        assert row_scales is not None
        return torch._scaled_mm(
            x, weight.codes.t(), row_scales[:, None], weight.scales[None, :],
            bias=None if bias is None else bias.to(dtype), out_dtype=dtype,
        )  # fmt: skip
    if size["WAY"] == DENSE and row_scales is None:
        values = dequantized(weight, x.dtype)
        return torch.nn.functional.linear(x, values, None if bias is None else bias.to(dtype))
    out, parts = results(x.new_empty(len(x), 0, dtype=dtype), outputs, size["SPLIT"])
    if len(x) == 0:
        return out
    there = x if bias is None else bias
    adds = bias is not None and parts is out
    if size["WAY"] == VECTOR and row_scales is None:
        vector[(cdiv(outputs, size["BLOCK_N"]), len(x), size["SPLIT"])](
            x, weight.codes.view(torch.uint8), weight.scales, there, parts, outputs, inputs,
            x.stride(0), weight.scales.shape[-1], BLOCKS=weight.blocks, BIAS=adds,
            SPLIT=size["SPLIT"], BLOCK_N=size["BLOCK_N"], BLOCK_K=size["BLOCK_K"],
            num_warps=tile.warps, num_stages=tile.stages,
        )  # fmt: skip
    else:
        grid = (cdiv(outputs, size["BLOCK_N"]), cdiv(len(x), size["BLOCK_M"]), size["SPLIT"])
        dot[grid](
            x, weight.scales if row_scales is None else row_scales,
            weight.codes.view(torch.uint8) if row_scales is None else weight.codes,
            weight.scales, there, parts, len(x), outputs, inputs, x.stride(0),
            0 if row_scales is None else row_scales.shape[-1], weight.scales.shape[-1],
            ROUNDED=0 if row_scales is None else row_scales.ndim, BLOCKS=weight.blocks, BIAS=adds,
            SPLIT=size["SPLIT"], BLOCK_M=size["BLOCK_M"], BLOCK_N=size["BLOCK_N"],
            BLOCK_K=min(size["BLOCK_K"], BLOCK), num_warps=tile.warps, num_stages=tile.stages,
        )  # fmt: skip
    return out if parts is out else add_parts(parts, bias, out)


def _for_library(
    x: Tensor, row_scales: Tensor | None, weight: Fp8Matrix, dtype: torch.dtype
) -> bool:
    """Whether torch._scaled_mm takes it: scales by row and output, results in bfloat16."""
    sides = all(side % _LIBRARY_MULTIPLE == 0 for side in weight.shape)
    by_row = row_scales is not None and row_scales.ndim == 1 and not weight.blocks
    return by_row and sides and dtype == torch.bfloat16 and x.is_cuda and len(x) > 0
