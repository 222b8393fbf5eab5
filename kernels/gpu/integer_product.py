"""Products of 16- or 32-bit inputs with weights of few bits in groups, dequantized in registers.

Three ways, and which of them is taken for how many rows is a tile's to say: one row with fused
multiply-adds; some rows on the tensor cores, the sum over the inputs split among programs; many
rows with the weight dequantized once, for the library's product. In the first two the weight is
not rounded: codes less zeros are exact in 16 bits, and scales multiply the sums. (On the tensor
cores the values of a table are: to the dtype of the inputs.)
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from infopt.kernels.gpu import integer_columns
from infopt.kernels.gpu.integer_columns import (
    IntegerColumns,
    chunks,
    dequantized,
    less_zero,
    number_of,
    place_of,
    third_bits,
)
from infopt.kernels.gpu.parts import add_parts, results
from infopt.kernels.gpu.shape import product_key
from infopt.kernels.gpu.tile import Card, Key, Tile, cdiv

VECTOR, DOT, DENSE = 0, 1, 2
"""The ways, as tiles name them: `WAY`."""


def reference(x: Tensor, weight: IntegerColumns, bias: Tensor | None) -> Tensor:
    """x [M, K] -> [M, N] in float64."""
    found = x.double() @ integer_columns.reference(weight).t()
    return found if bias is None else found + bias.double()


@triton.jit
def vector(
    x, words, thirds, table, scales, zeros, bias, out, columns, inputs, rows, x_stride,
    GROUP: tl.constexpr, BITS: tl.constexpr, ZERO: tl.constexpr, TABLE: tl.constexpr,
    BIAS: tl.constexpr, SPLIT: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """BLOCK_N outputs of one row. Each word keeps a sum of its own to the end."""
    PER: tl.constexpr = 32 // (2 if BITS == 3 else BITS)
    BLOCK_W: tl.constexpr = BLOCK_K // PER
    n = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    row, split = tl.program_id(1).to(tl.int64), tl.program_id(2)
    acc = tl.zeros((BLOCK_W, BLOCK_N), tl.float32)
    for first in range(split * BLOCK_W, rows, SPLIT * BLOCK_W):
        w = first + tl.arange(0, BLOCK_W)
        there = (w[:, None] < rows) & (n[None, :] < columns)
        q = tl.load(
            words + w[:, None] * columns + n[None, :], mask=there, other=0,
            eviction_policy="evict_first",
        )  # fmt: skip
        third = third_bits(thirds, q, w, n, columns, there, BITS)
        group = w * PER // GROUP if GROUP else w * 0
        at = group[:, None] * columns + n[None, :]
        zero = 0.0
        if ZERO < 0:
            zero = tl.load(zeros + at, mask=there, other=0).to(tl.float32)
        part = tl.zeros((BLOCK_W, BLOCK_N), tl.float32)
        for j in tl.static_range(PER):
            k = w * PER + j
            value = tl.load(x + row * x_stride + k, mask=k < inputs, other=0.0).to(tl.float32)
            if TABLE:
                steps = tl.load(table + ((q >> (j * BITS)) & ((1 << BITS) - 1)))
                part += steps * value[:, None]
            else:
                steps = less_zero(number_of(q, third, j, BITS), zero, j, BITS, ZERO)
                part += steps * (value / place_of(j, BITS))[:, None]
        if GROUP:
            acc += part * tl.load(scales + at, mask=there, other=0.0).to(tl.float32)
        else:
            acc += part
    found = tl.sum(acc, axis=0)
    if not GROUP:
        found *= tl.load(scales + n, mask=n < columns, other=0.0).to(tl.float32)
    if BIAS:
        found += tl.load(bias + n, mask=n < columns, other=0.0).to(tl.float32)
    to = out + (split * tl.num_programs(1) + row) * columns + n
    tl.store(to, found.to(out.dtype.element_ty), mask=n < columns)


@triton.jit
def steps_of(q, zero, BITS: tl.constexpr, dtype: tl.constexpr):
    """Codes less their zero in dtype, exactly; zero is a float32, or a block of them."""
    if dtype == tl.float16:
        there = (q | 0x6400).to(tl.int16).to(tl.float16, bitcast=True)  # 1024 and the code
        found = there - (zero + 1024.0).to(tl.float16)
    elif dtype == tl.bfloat16 and BITS < 8:
        there = (q | 0x4300).to(tl.int16).to(tl.bfloat16, bitcast=True)  # 128 and the code
        found = there - (zero + 128.0).to(tl.bfloat16)
    else:
        there = (q | 0x4B000000).to(tl.float32, bitcast=True)
        found = (there - (zero + 8388608.0)).to(dtype)
    return found


@triton.jit
def dot(
    x, words, thirds, table, scales, zeros, bias, out, count, columns, inputs, rows, x_stride,
    GROUP: tl.constexpr, BITS: tl.constexpr, ZERO: tl.constexpr, TABLE: tl.constexpr,
    BIAS: tl.constexpr, SPLIT: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
):  # fmt: skip
    """BLOCK_M rows times BLOCK_N outputs. A packed tile is read once and spread by a reshape."""
    WIDTH: tl.constexpr = 2 if BITS == 3 else BITS
    PER: tl.constexpr = 32 // WIDTH
    n = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    m = tl.program_id(1) * BLOCK_M + tl.arange(0, BLOCK_M)
    split = tl.program_id(2)
    dtype: tl.constexpr = x.dtype.element_ty
    places = tl.arange(0, PER)
    x_rows = x + m[:, None].to(tl.int64) * x_stride
    acc = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    if TABLE:  # in registers: a load in the loop would be pipelined through shared memory
        values = tl.load(table + tl.arange(0, 1 << BITS)).to(dtype)
    for first in range(split * BLOCK_K, inputs, SPLIT * BLOCK_K):
        k = first + tl.arange(0, BLOCK_K)
        w = first // PER + tl.arange(0, BLOCK_K // PER)
        a = tl.load(x_rows + k[None, :], mask=(m[:, None] < count) & (k[None, :] < inputs),
                    other=0.0)  # fmt: skip
        there = (w[:, None] < rows) & (n[None, :] < columns)
        q = tl.load(
            words + w[:, None] * columns + n[None, :], mask=there, other=0,
            eviction_policy="evict_first",
        )  # fmt: skip
        spread = (q[:, None, :] >> (places * WIDTH)[None, :, None]) & ((1 << WIDTH) - 1)
        if BITS == 3:
            third = third_bits(thirds, q, w, n, columns, there, BITS)
            spread |= ((third[:, None, :] >> places[None, :, None]) & 1) << 2
        codes = tl.reshape(spread, (BLOCK_K, BLOCK_N))
        at = (first // GROUP if GROUP else 0) * columns + n
        if TABLE:
            flat = tl.gather(values, tl.reshape(codes, (BLOCK_K * BLOCK_N,)), 0)
            b = tl.reshape(flat, (BLOCK_K, BLOCK_N))
        elif ZERO < 0:
            zero = tl.load(zeros + at, mask=n < columns, other=0).to(tl.float32)[None, :]
            b = steps_of(codes, zero, BITS, dtype)
        else:
            b = steps_of(codes, tl.full((1, 1), ZERO, tl.float32), BITS, dtype)
        if GROUP:
            part = tl.dot(a, b, input_precision="ieee")
            acc += part * tl.load(scales + at, mask=n < columns, other=0.0).to(tl.float32)[None, :]
        else:
            acc = tl.dot(a, b, acc, input_precision="ieee")
    if not GROUP:
        acc *= tl.load(scales + n, mask=n < columns, other=0.0).to(tl.float32)[None, :]
    if BIAS:
        acc += tl.load(bias + n, mask=n < columns, other=0.0).to(tl.float32)[None, :]
    to = out + (split.to(tl.int64) * count + m[:, None]) * columns + n[None, :]
    inside = (m[:, None] < count) & (n[None, :] < columns)
    tl.store(to, acc.to(out.dtype.element_ty), mask=inside)


def tile_key(count: int, weight: IntegerColumns, dtype: torch.dtype, *, fixed: bool = False) -> Key:
    """Fixed: the same for any number of rows."""
    return product_key(
        count,
        *weight.shape,
        dtype,
        fixed=fixed,
        bits=weight.bits,
        table=int(weight.table is not None),
    )


def integer_linear(
    card: Card, x: Tensor, weight: IntegerColumns, bias: Tensor | None, *, fixed: bool = False
) -> Tensor:
    """x [M, K] of 16 or 32 bits, its rows contiguous -> [M, N] in its dtype.

    `fixed`: a row's result depends neither on the others nor on how many they are.
    """
    assert x.stride(1) == 1 and x.shape[1] == weight.inputs
    if x.shape[0] == 0:
        return x.new_empty(0, weight.shape[0])
    tile = card.tile("integer_product", **tile_key(len(x), weight, x.dtype, fixed=fixed))
    return with_tile(card, tile, x, weight, bias)


def with_tile(
    card: Card, tile: Tile, x: Tensor, weight: IntegerColumns, bias: Tensor | None
) -> Tensor:
    """The product in a given way."""
    match tile.constants["WAY"]:
        case 0:
            return _vector(tile, x, weight, bias)
        case 1:
            return _dot(tile, x, weight, bias)
        case _:
            return _dense(card, x, weight, bias)


def _vector(tile: Tile, x: Tensor, weight: IntegerColumns, bias: Tensor | None) -> Tensor:
    count, (outputs, inputs), size = x.shape[0], weight.shape, tile.constants
    out, parts = results(x, outputs, size["SPLIT"])
    vector[(cdiv(outputs, size["BLOCK_N"]), count, size["SPLIT"])](
        x, *_tensors(weight), _bias(bias, x), parts, outputs, inputs,
        weight.words.shape[0], x.stride(0), **_form(weight),
        BIAS=bias is not None and parts is out, SPLIT=size["SPLIT"], BLOCK_N=size["BLOCK_N"],
        BLOCK_K=size["BLOCK_K"], num_warps=tile.warps, num_stages=tile.stages,
    )  # fmt: skip
    return out if parts is out else add_parts(parts, bias, out)


def _dot(tile: Tile, x: Tensor, weight: IntegerColumns, bias: Tensor | None) -> Tensor:
    count, (outputs, inputs), size = x.shape[0], weight.shape, tile.constants
    # No step of the sum is of two groups: the largest power of two that divides them bounds it.
    step = min(size["BLOCK_K"], weight.group & -weight.group or size["BLOCK_K"])
    out, parts = results(x, outputs, size["SPLIT"])
    grid = (cdiv(outputs, size["BLOCK_N"]), cdiv(count, size["BLOCK_M"]), size["SPLIT"])
    dot[grid](
        x, *_tensors(weight), _bias(bias, x), parts, count, outputs, inputs,
        weight.words.shape[0], x.stride(0), **_form(weight),
        BIAS=bias is not None and parts is out, SPLIT=size["SPLIT"], BLOCK_M=size["BLOCK_M"],
        BLOCK_N=size["BLOCK_N"], BLOCK_K=step, num_warps=tile.warps, num_stages=tile.stages,
    )  # fmt: skip
    return out if parts is out else add_parts(parts, bias, out)


def _dense(card: Card, x: Tensor, weight: IntegerColumns, bias: Tensor | None) -> Tensor:
    outputs, inputs = weight.shape
    out = x.new_empty(x.shape[0], outputs)
    values = None
    for part in chunks(outputs, inputs):
        width = part.stop - part.start
        if values is None:
            values = x.new_empty(inputs * width)
        whole = dequantized(
            card, weight, x.dtype, values[: inputs * width].view(inputs, width), part.start
        )
        if bias is None:
            torch.mm(x, whole, out=out[:, part])
        else:
            torch.addmm(bias[part].to(x.dtype), x, whole, out=out[:, part])
    return out


def _tensors(weight: IntegerColumns) -> tuple[Tensor, ...]:
    """In the order of the kernels' arguments; the words for what is not there."""
    words = weight.words
    thirds = words if weight.thirds is None else weight.thirds
    table = words if weight.table is None else weight.table
    zeros = weight.zeros if isinstance(weight.zeros, Tensor) else words
    return words, thirds, table, weight.scales, zeros


def _form(weight: IntegerColumns) -> dict[str, int | bool]:
    return {
        "GROUP": weight.group,
        "BITS": weight.bits,
        "ZERO": weight.zero,
        "TABLE": weight.table is not None,
    }


def _bias(bias: Tensor | None, x: Tensor) -> Tensor:
    return x if bias is None else bias
