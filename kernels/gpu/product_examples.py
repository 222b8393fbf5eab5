"""Products as models launch them: a token, a batch of tokens, a piece of a prompt."""

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from infopt.kernels.gpu import fp8_product, int8_product, integer_product
from infopt.kernels.gpu.example import Example, Launch
from infopt.kernels.gpu.fp8_matrix import BLOCK, Fp8Matrix
from infopt.kernels.gpu.integer_columns import WORD, IntegerColumns
from infopt.kernels.gpu.tile import Tile, cdiv

BF16, F16, F32, F8 = torch.bfloat16, torch.float16, torch.float32, torch.float8_e4m3fn
_HIDDEN = (4096, 4096)
_WIDE = (28672, 4096)
"""Outputs, inputs: of an 8B Llama's attention, and of its gate and up."""


def integer_weight(
    n: int, k: int, bits: int, group: int | None, zeros: bool, device: torch.device
) -> IntegerColumns:
    """Codes at random, scales near 1."""
    groups = k // (group or k)
    words = torch.empty(
        cdiv(k * (2 if bits == 3 else bits), WORD), n, dtype=torch.int32, device=device
    )
    thirds = torch.empty(cdiv(k, WORD), n, dtype=torch.int32, device=device) if bits == 3 else None
    codes: Tensor | int = 1 << (bits - 1)
    if zeros:
        codes = torch.full((groups, n), 1 << (bits - 1), dtype=torch.uint8, device=device)
    scales = torch.rand(groups, n, device=device).add_(0.5).to(F16)
    if thirds is not None:
        thirds.random_()
    return IntegerColumns(words.random_(), scales, codes, bits, k, thirds)


def float4_weight(n: int, k: int, device: torch.device) -> IntegerColumns:
    """The same with the values of a table, as NormalFloat's are, in blocks of 64."""
    weight = integer_weight(n, k, 4, 64, False, device)
    table = torch.linspace(-1, 1, 16, device=device)
    return replace(weight, scales=weight.scales.float(), zeros=0, table=table)


def float8_weight(n: int, k: int, blocks: bool, device: torch.device) -> Fp8Matrix:
    """The same in float8."""
    shape = (cdiv(n, BLOCK), cdiv(k, BLOCK)) if blocks else (n,)
    codes = torch.ones(n, k, dtype=torch.uint8, device=device).view(F8)
    return Fp8Matrix(codes, torch.rand(shape, device=device).add_(0.5))


@dataclass(frozen=True, slots=True)
class _Shape:
    m: int
    nk: tuple[int, int] = _HIDDEN
    bits: int = 4
    group: int | None = 128
    zeros: bool = False
    dtype: torch.dtype = BF16
    fixed: bool = False
    table: bool = False

    def weight(self, device: torch.device) -> IntegerColumns:
        if self.table:
            return float4_weight(*self.nk, device)
        return integer_weight(*self.nk, self.bits, self.group, self.zeros, device)


def _integers(name: str, shape: _Shape, wants: tuple[str, ...] = ()) -> Example:
    def build(device: torch.device) -> Launch:
        weight = shape.weight(device)
        x = torch.ones(shape.m, shape.nk[1], dtype=shape.dtype, device=device)
        return lambda card: integer_product.integer_linear(card, x, weight, None, fixed=shape.fixed)

    weight = shape.weight(torch.device("meta"))
    key = integer_product.tile_key(shape.m, weight, shape.dtype, fixed=shape.fixed)
    candidates = _integer_candidates(shape) if not shape.fixed else ()
    return Example(f"integers, {name}", "integer_product", key, build, candidates, wants)


def _integer_candidates(shape: _Shape) -> tuple[Tile, ...]:
    dense = Tile({"WAY": integer_product.DENSE}, 1, 1)
    if shape.m == 1:
        vectors = tuple(
            Tile(
                {"WAY": integer_product.VECTOR, "BLOCK_N": n, "BLOCK_K": k, "SPLIT": split},
                warps, stages,
            )
            for n, k in ((8, 1024), (16, 512), (16, 1024), (32, 512), (64, 256), (128, 128))
            for split in (1, 4)
            for warps in (2, 4)
            for stages in (2, 4)
        )  # fmt: skip
    else:
        vectors = ()
    rows = [m for m in (16, 32, 64, 128) if m == 16 or m // 2 < shape.m][-2:]
    dots = tuple(
        Tile(
            {
                "WAY": integer_product.DOT,
                "BLOCK_M": m,
                "BLOCK_N": n,
                "BLOCK_K": k,
                "SPLIT": split,
            },
            4 if m < 128 else 8,
            stages,
        )
        for m in rows
        for n, k in ((64, 64), (64, 128), (128, 64))
        for split in (1, 4, 8)
        for stages in (1, 3, 4)
    )
    return (*vectors, *dots, dense)


def _int8(name: str, m: int, nk: tuple[int, int], wants: tuple[str, ...], *,
          outliers: bool = False, fixed: bool = False) -> Example:  # fmt: skip
    def build(device: torch.device) -> Launch:
        n, k = nk
        codes = torch.ones(m, k, dtype=torch.int8, device=device)
        weight = torch.ones(n, k, dtype=torch.int8, device=device)
        rows, scales = torch.ones(m, device=device), torch.ones(n, device=device)
        if not outliers:
            return lambda card: int8_product.int8_linear(
                card, codes, rows, weight, scales, None, BF16
            )
        x = torch.ones(m, k, dtype=BF16, device=device)
        return lambda card: int8_product.int8_linear_with_outliers(
            card, x, 6.0, codes, rows, weight, scales, None, fixed=fixed
        )

    key = int8_product.tile_key(m, *nk, fixed=fixed, outliers=outliers)
    candidates = () if outliers else _int8_candidates(m)
    return Example(f"int8, {name}", "int8_product", key, build, candidates, wants)


def _int8_candidates(count: int) -> tuple[Tile, ...]:
    library = Tile({"WAY": int8_product.LIBRARY, "SPLIT": 1, **_sizes(128, 128, 128)}, 8, 3)
    return (*_dots(int8_product.TRITON, count), *((library,) if count >= 17 else ()))


def _sizes(m: int, n: int, k: int) -> dict[str, int]:
    return {"BLOCK_M": m, "BLOCK_N": n, "BLOCK_K": k}


def _dots(way: int, count: int) -> tuple[Tile, ...]:
    rows = [m for m in (16, 64, 128) if m == 16 or m // 2 < count][-2:]
    return tuple(
        Tile({"WAY": way, "SPLIT": split, **_sizes(m, n, 128)}, 8 if m * n > 8192 else 4, stages)
        for m in rows
        for n in (64, 128, 256)
        for split in ((1, 4) if count <= 64 else (1,))
        for stages in (3, 4)
        if (m + n) * 128 * stages <= 200_000
    )


def _float8(
    name: str,
    m: int,
    dtype: torch.dtype,
    wants: tuple[str, ...] = (),
    *,
    nk: tuple[int, int] = _HIDDEN,
    blocks: bool = False,
    fixed: bool = False,
) -> Example:
    def build(device: torch.device) -> Launch:
        weight = float8_weight(*nk, blocks, device)
        x = torch.ones(m, nk[1], dtype=torch.uint8 if dtype == F8 else dtype, device=device)
        if dtype != F8:
            return lambda card: fp8_product.fp8_linear(card, x, weight, None, fixed=fixed)
        codes = x.view(F8)
        shape = (m, cdiv(nk[1], BLOCK)) if blocks else (m,)
        scales = torch.ones(shape, device=device)
        return lambda card: fp8_product.fp8_rounded_linear(
            card, codes, scales, weight, None, BF16, fixed=fixed
        )

    weight = float8_weight(*nk, blocks, torch.device("meta"))
    key = fp8_product.tile_key(m, weight, dtype, fixed=fixed)
    candidates = _float8_candidates(m, dtype) if not fixed else ()
    since = fp8_product.FLOAT8_FROM if dtype == F8 else 80
    return Example(f"float8, {name}", "fp8_product", key, build, candidates, wants, since)


def _float8_candidates(count: int, dtype: torch.dtype) -> tuple[Tile, ...]:
    dots = _dots(fp8_product.DOT, count)
    if dtype == F8:
        library = Tile({"WAY": fp8_product.LIBRARY, "SPLIT": 1, **_sizes(128, 128, 128)}, 8, 3)
        return (*dots, library)
    vectors = tuple(
        Tile({"WAY": fp8_product.VECTOR, "BLOCK_N": n, "BLOCK_K": k, "SPLIT": 1}, warps, stages)
        for n, k in ((1, 4096), (2, 2048), (4, 1024), (8, 512), (16, 256))
        for warps in (2, 4)
        for stages in (2, 4)
    )
    dense = Tile({"WAY": fp8_product.DENSE, "SPLIT": 1}, 4, 1)
    return (*(vectors if count == 1 else ()), *dots, dense)


EXAMPLES = (
    _integers("a token", _Shape(1)),
    _integers("a token, zeros", _Shape(1, zeros=True)),
    _integers("a token, 8 bits by channel", _Shape(1, bits=8, group=None)),
    _integers("a token, 2 bits", _Shape(1, bits=2)),
    _integers("a token, 3 bits", _Shape(1, bits=3)),
    _integers("a token, NormalFloat", _Shape(1, table=True)),
    _integers("a token, float16, wide", _Shape(1, _WIDE, dtype=F16)),
    _integers("a token, float32", _Shape(1, dtype=F32)),
    _integers("16 tokens", _Shape(16), ("HMMA",)),
    _integers("16 tokens, zeros", _Shape(16, zeros=True), ("HMMA",)),
    _integers("16 tokens, wide, groups of 32", _Shape(16, _WIDE, group=32), ("HMMA",)),
    _integers("16 tokens, 8 bits by channel", _Shape(16, bits=8, group=None), ("HMMA",)),
    _integers("16 tokens, 3 bits", _Shape(16, bits=3, zeros=True), ("HMMA",)),
    _integers("16 tokens, NormalFloat", _Shape(16, table=True), ("HMMA",)),
    _integers("64 tokens, wide, 3 bits", _Shape(64, _WIDE, bits=3), ("HGMMA",)),
    _integers("64 tokens, wide, NormalFloat", _Shape(64, _WIDE, table=True), ("HGMMA",)),
    _integers("a prompt, dequantized, 3 bits", _Shape(2048, bits=3)),
    _integers("a prompt, dequantized, NormalFloat", _Shape(2048, table=True)),
    _integers("fixed, NormalFloat", _Shape(40, table=True, fixed=True), ("HMMA",)),
    _integers("fixed, float32, NormalFloat", _Shape(40, table=True, dtype=F32, fixed=True)),
    _integers("16 tokens, float16", _Shape(16, dtype=F16), ("HMMA",)),
    _integers("32 tokens, 8 bits", _Shape(32, bits=8), ("HMMA",)),
    _integers("64 tokens", _Shape(64), ("HGMMA",)),
    _integers("64 tokens, wide", _Shape(64, _WIDE), ("HGMMA",)),
    _integers("64 tokens, wide, 8 bits", _Shape(64, _WIDE, bits=8, zeros=True), ("HGMMA",)),
    _integers("a prompt, dequantized", _Shape(2048)),
    _integers("a prompt, dequantized, float32", _Shape(2048, bits=8, zeros=True, dtype=F32)),
    _integers("fixed", _Shape(40, fixed=True), ("HMMA",)),
    _integers("fixed, float32", _Shape(40, dtype=F32, fixed=True)),
    _int8("16 tokens", 16, _HIDDEN, ("IMMA",)),
    _int8("16 tokens, wide", 16, _WIDE, ("IMMA",)),
    _int8("64 tokens", 64, _HIDDEN, ("IGMMA",)),
    _int8("128 tokens", 128, _HIDDEN, ("IGMMA",)),
    _int8("a prompt", 2048, _HIDDEN, ("IGMMA",)),
    _int8("16 tokens, outliers", 16, _HIDDEN, ("IMMA",), outliers=True),
    _int8("a prompt, outliers", 2048, _HIDDEN, ("IGMMA",), outliers=True),
    _int8("outliers, fixed", 40, _HIDDEN, ("IMMA",), outliers=True, fixed=True),
    _float8("a token", 1, BF16),
    _float8("a token, blocks", 1, BF16, blocks=True),
    _float8("a token, float32", 1, F32),
    _float8("16 tokens", 16, BF16, ("HMMA",)),
    _float8("16 tokens, blocks, wide", 16, F16, ("HMMA",), nk=_WIDE, blocks=True),
    _float8("64 tokens", 64, BF16, ("HGMMA",)),
    _float8("a prompt, dequantized, blocks", 2048, BF16, blocks=True),
    _float8("fixed", 40, BF16, ("HMMA",), fixed=True),
    _float8("fixed, float32", 40, F32, fixed=True),
    _float8("rounded, 16 tokens", 16, F8, blocks=True),
    _float8("rounded, 64 tokens", 64, F8, ("QGMMA",), blocks=True),
    _float8("rounded, 64 tokens, rows", 64, F8, ("QGMMA",)),
    _float8("rounded, a prompt, blocks", 2048, F8, ("QGMMA",), blocks=True),
    _float8("rounded, fixed", 40, F8, fixed=True),
)
