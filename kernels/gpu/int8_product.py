"""Products of 8-bit integers: sums exact, then the scales of rows and of outputs.

Also those of LLM.int8 (Dettmers et al. 2022, arXiv 2208.07339): inputs that reach a threshold meet
the weight's integers in the dtype of the inputs, in the same pass.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from infopt.kernels.gpu.shape import product_key
from infopt.kernels.gpu.tile import Card, Key, Tile, cdiv

TRITON, LIBRARY = 0, 1
"""The ways, as tiles name them: `WAY`."""
_LIBRARY_ROWS, _LIBRARY_MULTIPLE = 17, 8
"""What torch._int_mm asks for on CUDA: at least so many rows, and sides that this divides."""


def reference(
    codes: Tensor,
    row_scales: Tensor,
    weight: Tensor,
    scales: Tensor,
    bias: Tensor | None,
    outliers: Tensor | None = None,
) -> Tensor:
    """codes [M, K], weight [N, K] of int8; row_scales [M], scales [N] -> [M, N] in float64.

    outliers [M, K]: what is added to the codes' values, zero but for some.
    """
    found = codes.double() @ weight.double().t() * row_scales.double()[:, None]
    if outliers is not None:
        found += outliers.double() @ weight.double().t()
    found *= scales.double()
    return found if bias is None else found + bias.double()


@triton.jit
def product(
    codes, row_scales, weight, scales, bias, x, out, count, columns, inputs, x_stride, threshold,
    BIAS: tl.constexpr, OUTLIERS: tl.constexpr, SPLIT: tl.constexpr, BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """SPLIT above 1: parts of the sums, int32. OUTLIERS: those of x count, where there are any."""
    n = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    m = tl.program_id(1) * BLOCK_M + tl.arange(0, BLOCK_M)
    split = tl.program_id(2)
    code_rows = codes + m[:, None].to(tl.int64) * inputs
    weight_rows = weight + n[None, :].to(tl.int64) * inputs
    acc = tl.zeros((BLOCK_M, BLOCK_N), tl.int32)
    beside = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    for first in range(split * BLOCK_K, inputs, SPLIT * BLOCK_K):
        k = first + tl.arange(0, BLOCK_K)
        here = (m[:, None] < count) & (k[None, :] < inputs)
        a = tl.load(code_rows + k[None, :], mask=here, other=0)
        b = tl.load(
            weight_rows + k[:, None], mask=(k[:, None] < inputs) & (n[None, :] < columns), other=0
        )
        acc = tl.dot(a, b, acc, out_dtype=tl.int32)
        if OUTLIERS:
            rows = x + m[:, None].to(tl.int64) * x_stride
            values = tl.load(rows + k[None, :], mask=here, other=0.0)
            large = tl.abs(values.to(tl.float32)) >= threshold
            if tl.max(tl.max(large.to(tl.int32), axis=1), axis=0) > 0:
                kept = tl.where(large, values, 0.0).to(values.dtype)
                beside = tl.dot(kept, b.to(values.dtype), beside, input_precision="ieee")
    to = out + (split.to(tl.int64) * count + m[:, None]) * columns + n[None, :]
    there = (m[:, None] < count) & (n[None, :] < columns)
    if SPLIT > 1:
        tl.store(to, acc, mask=there)
    else:
        scale = tl.load(scales + n, mask=n < columns, other=0.0)
        row_scale = tl.load(row_scales + m, mask=m < count, other=0.0)
        found = acc.to(tl.float32) * scale[None, :] * row_scale[:, None]
        if OUTLIERS:
            found += beside * scale[None, :]
        if BIAS:
            found += tl.load(bias + n, mask=n < columns, other=0.0).to(tl.float32)[None, :]
        tl.store(to, found.to(out.dtype.element_ty), mask=there)


@triton.jit
def scale_sums(
    sums, row_scales, scales, bias, out, size, columns,
    SPLIT: tl.constexpr, BIAS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """The second half of what was split, or was the library's product."""
    at = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    there = at < size
    acc = tl.zeros((BLOCK,), tl.int32)
    for part in tl.static_range(SPLIT):
        acc += tl.load(sums + part * size + at, mask=there, other=0)
    n = at % columns
    found = acc.to(tl.float32) * tl.load(scales + n, mask=there, other=0.0)
    found *= tl.load(row_scales + at // columns, mask=there, other=0.0)
    if BIAS:
        found += tl.load(bias + n, mask=there, other=0.0).to(tl.float32)
    tl.store(out + at, found.to(out.dtype.element_ty), mask=there)


def tile_key(
    count: int, outputs: int, inputs: int, *, fixed: bool = False, outliers: bool = False
) -> Key:
    """Sums are exact: only those with outliers depend on how they are made."""
    fixed = fixed and outliers
    return product_key(count, outputs, inputs, torch.int8, fixed=fixed, outliers=int(outliers))


def int8_linear(
    card: Card,
    codes: Tensor,
    row_scales: Tensor,
    weight: Tensor,
    scales: Tensor,
    bias: Tensor | None,
    dtype: torch.dtype,
) -> Tensor:
    """int8 codes [M, K] and weight [N, K], float32 row_scales [M] and scales [N] -> [M, N] in
    `dtype`; a row's result does not depend on the others."""
    tile = card.tile("int8_product", **tile_key(len(codes), *weight.shape))
    return with_tile(tile, codes, row_scales, weight, scales, bias, dtype)


def with_tile(
    tile: Tile,
    codes: Tensor,
    row_scales: Tensor,
    weight: Tensor,
    scales: Tensor,
    bias: Tensor | None,
    dtype: torch.dtype,
) -> Tensor:
    """The product in a given way."""
    assert codes.is_contiguous() and weight.is_contiguous()
    count, outputs, inputs = len(codes), *weight.shape
    out = torch.empty(count, outputs, dtype=dtype, device=codes.device)
    if count == 0:
        return out
    size = tile.constants
    if size["WAY"] == LIBRARY and count >= _LIBRARY_ROWS and _for_library(outputs, inputs):
        sums = torch._int_mm(codes, weight.t())[None]
        return _scaled(sums, row_scales, scales, bias, out)
    sums = out
    if size["SPLIT"] > 1:
        sums = torch.empty(size["SPLIT"], *out.shape, dtype=torch.int32, device=codes.device)
    _launch(tile, codes, row_scales, weight, scales, bias, None, 0.0, sums)
    return out if sums is out else _scaled(sums, row_scales, scales, bias, out)


def _for_library(outputs: int, inputs: int) -> bool:
    return outputs % _LIBRARY_MULTIPLE == 0 and inputs % _LIBRARY_MULTIPLE == 0


def int8_linear_with_outliers(
    card: Card,
    x: Tensor,
    threshold: float,
    codes: Tensor,
    row_scales: Tensor,
    weight: Tensor,
    scales: Tensor,
    bias: Tensor | None,
    *,
    fixed: bool = False,
) -> Tensor:
    """The same in the dtype of x [M, K], whose values from `threshold` on are multiplied as they
    are; their codes must be 0. `fixed`: a row does not depend on how many rows there are."""
    assert codes.is_contiguous() and weight.is_contiguous() and x.stride(1) == 1
    out = x.new_empty(len(x), weight.shape[0])
    if len(x):
        key = tile_key(len(x), *weight.shape, fixed=fixed, outliers=True)
        tile = card.tile("int8_product", **key)
        _launch(tile, codes, row_scales, weight, scales, bias, x, threshold, out)
    return out


def _launch(
    tile: Tile,
    codes: Tensor,
    row_scales: Tensor,
    weight: Tensor,
    scales: Tensor,
    bias: Tensor | None,
    x: Tensor | None,
    threshold: float,
    out: Tensor,
) -> None:
    count, outputs, inputs, size = len(codes), *weight.shape, tile.constants
    grid = (cdiv(outputs, size["BLOCK_N"]), cdiv(count, size["BLOCK_M"]), size["SPLIT"])
    product[grid](
        codes, row_scales, weight, scales, scales if bias is None else bias,
        codes if x is None else x, out, count, outputs, inputs, 0 if x is None else x.stride(0),
        threshold, BIAS=bias is not None, OUTLIERS=x is not None, SPLIT=size["SPLIT"],
        BLOCK_M=size["BLOCK_M"], BLOCK_N=size["BLOCK_N"], BLOCK_K=size["BLOCK_K"],
        num_warps=tile.warps, num_stages=tile.stages,
    )  # fmt: skip


def _scaled(
    sums: Tensor, row_scales: Tensor, scales: Tensor, bias: Tensor | None, out: Tensor
) -> Tensor:
    size, block = out.numel(), 512
    scale_sums[(cdiv(size, block),)](
        sums, row_scales, scales, scales if bias is None else bias, out, size, out.shape[1],
        SPLIT=len(sums), BIAS=bias is not None, BLOCK=block, num_warps=4,
    )  # fmt: skip
    return out
