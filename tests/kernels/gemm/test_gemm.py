"""Packed weights against the plain arithmetic of their formats, in buffers poisoned with NaN."""

import pytest
import torch
import torch.nn.functional as F

from infopt.kernels.gemm import rows as rows_module
from infopt.kernels.gemm.floats import Fp8Rows, Nf4Rows, has_nan, pack_pairs, pair_values
from infopt.kernels.gemm.int4 import Int4Tiles, dequantized_int4, int4_linear, to_tiles, usable
from infopt.kernels.gemm.integers import IntegerRows, pack_planes
from infopt.kernels.gemm.rows import Rows, dequantized, rows_linear
from infopt.kernels.gemm.scratch import Scratch
from infopt.kernels.gemm.tiles import tiled_linear

CPU = torch.device("cpu")


def poisoned() -> Scratch:
    """Buffers that hold garbage wherever a product does not write before it reads."""
    scratch = Scratch()
    for purpose in ("values", "rounded", "pairs"):
        for dtype in (torch.float32, torch.bfloat16, torch.float64):
            scratch.take(purpose, (1 << 16,), dtype, CPU).fill_(torch.nan)
    for purpose in ("plane 0", "plane 2", "codes"):
        scratch.take(purpose, (1 << 16,), torch.uint8, CPU).fill_(255)
    return scratch


def integers(
    bits: int, outputs: int, inputs: int, groups: int, *, symmetric: bool
) -> tuple[IntegerRows, torch.Tensor]:
    codes = torch.randint(1 << bits, (outputs, inputs), dtype=torch.uint8)
    scales = torch.rand(outputs, groups).half() + 0.1
    zeros = torch.randint(1 << bits, (outputs, groups), dtype=torch.uint8)
    if symmetric:
        zeros.fill_(1 << (bits - 1))
    spread = [part.float().repeat_interleave(inputs // groups, dim=1) for part in (zeros, scales)]
    wanted = (codes.float() - spread[0]) * spread[1]
    held = 1 << (bits - 1) if symmetric else zeros
    return IntegerRows(pack_planes(codes, bits), scales, held, bits, inputs), wanted


def fp8(outputs: int, inputs: int, kind: str) -> tuple[Fp8Rows, torch.Tensor]:
    codes = (torch.randn(outputs, inputs) * 2.0 ** torch.randint(-9, 8, (outputs, inputs))).to(
        torch.float8_e4m3fn
    )
    match kind:
        case "tensor":
            scales, spread = (s := torch.rand(1)), s
        case "channel":
            scales, spread = (s := torch.rand(outputs, 1).bfloat16()), s.float()
        case _:
            scales = torch.rand(-(-outputs // 8), -(-inputs // 8))
            spread = scales.repeat_interleave(8, 0)[:outputs].repeat_interleave(8, 1)[:, :inputs]
    block = 8 if kind == "block" else None
    return Fp8Rows(codes, scales, block), codes.float() * spread


def nf4(outputs: int, inputs: int, *, nested: bool) -> tuple[Nf4Rows, torch.Tensor]:
    codes = torch.randint(16, (outputs, inputs), dtype=torch.uint8)
    quant_map = torch.randn(16)
    blocks = -(-codes.numel() // 64)
    absmax, outer, inner = torch.rand(blocks), None, None
    each = absmax
    if nested:
        absmax = torch.randint(256, (blocks,), dtype=torch.uint8)
        outer, inner = torch.rand(-(-blocks // 256)), torch.randn(256)
        each = inner[absmax.long()] * outer.repeat_interleave(256)[:blocks] + 0.25
    spread = each.repeat_interleave(64)[: codes.numel()].view(codes.shape)
    weight = Nf4Rows(
        pack_pairs(codes), pair_values(quant_map), absmax, outer, inner, 0.25, (outputs, inputs)
    )
    return weight, quant_map[codes.long()] * spread


CASES = {
    **{
        f"int{bits}{' sym' if symmetric else ''}": lambda b=bits, s=symmetric: integers(
            b, 37, 96, 3, symmetric=s
        )
        for bits in (2, 3, 4, 8)
        for symmetric in (True, False)
    },
    "int4, odd columns": lambda: integers(4, 5, 7, 1, symmetric=False),
    "int3, odd columns": lambda: integers(3, 5, 13, 1, symmetric=True),
    **{f"fp8 {kind}": lambda k=kind: fp8(37, 20, k) for kind in ("tensor", "channel", "block")},
    "nf4": lambda: nf4(37, 96, nested=False),
    "nf4 nested": lambda: nf4(180, 100, nested=True),
    "nf4, odd": lambda: nf4(7, 9, nested=False),
}


@pytest.mark.parametrize("elements", [1 << 19, 1000], ids=["whole", "in blocks"])
@pytest.mark.parametrize("case", CASES)
def test_products_are_those_of_the_dequantized_weight(
    case: str, elements: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    torch.manual_seed(0)
    monkeypatch.setattr(rows_module, "_BLOCK_ELEMENTS", elements)
    weight, wanted = CASES[case]()
    rows: Rows = weight
    assert torch.equal(dequantized(rows, CPU), wanted), "bit by bit"
    x, bias = torch.randn(3, wanted.shape[1]), torch.randn(wanted.shape[0])
    scratch = poisoned()
    torch.testing.assert_close(
        rows_linear(x, rows, bias, scratch), F.linear(x, wanted, bias), atol=1e-4, rtol=1e-5
    )
    fixed = rows_linear(x, rows, bias, scratch, fixed=True)
    alone = torch.cat([rows_linear(row, rows, bias, scratch, fixed=True) for row in x.split(1)])
    assert torch.equal(fixed, alone)
    torch.testing.assert_close(fixed, F.linear(x, wanted, bias), atol=1e-4, rtol=1e-5)
    half = rows_linear(x.bfloat16(), rows, None, scratch)
    rounded = F.linear(x.bfloat16(), wanted.bfloat16())
    assert half.dtype == torch.bfloat16
    torch.testing.assert_close(half, rounded, atol=0.1, rtol=0.016)


def test_bytes_are_those_of_the_codes() -> None:
    weight, _ = integers(3, 32, 64, 2, symmetric=True)
    assert weight.nbytes == 32 * 64 * 3 // 8 + 32 * 2 * 2
    nested, _ = nf4(64, 1024, nested=True)
    assert nested.nbytes == 64 * 512 + 1024 + 4 * 4 + 256 * 4 + 256 * 8


def test_a_nan_is_seen() -> None:
    codes = torch.tensor([0.5, -448.0, 448.0]).to(torch.float8_e4m3fn)
    assert not has_nan(codes)
    assert has_nan(torch.tensor([1.0, torch.nan]).to(torch.float8_e4m3fn))


@pytest.mark.skipif(not usable(), reason="torch's int4 product is another one on this CPU")
@pytest.mark.parametrize("few", [0, 8], ids=["dequantized", "int4 product"])
def test_int4_is_the_rounded_weight(few: int) -> None:
    torch.manual_seed(0)
    outputs, inputs, size = 192, 128, 32
    codes = torch.randint(16, (outputs, inputs), dtype=torch.uint8)
    scales_offsets = torch.randn(inputs // size, outputs, 2).bfloat16()
    weight = Int4Tiles(to_tiles(codes), scales_offsets)
    scale, offset = (
        part.float().t().repeat_interleave(size, dim=1) for part in scales_offsets.unbind(-1)
    )
    wanted = (codes.float() - 8) * scale + offset
    assert torch.equal(dequantized_int4(weight), wanted.bfloat16())
    assert weight.nbytes == outputs * inputs // 2 + scales_offsets.nbytes
    x, bias = torch.randn(5, inputs).bfloat16(), torch.randn(outputs).bfloat16()
    found = int4_linear(x, weight, bias, poisoned(), few=few).float()
    exact = x.float() @ wanted.t() + bias.float()
    assert float((found - exact).norm() / exact.norm()) < 2**-8


@pytest.mark.skipif(not usable(), reason="torch's int4 product is another one on this CPU")
def test_a_row_of_the_int4_product_does_not_see_the_others() -> None:
    codes = torch.randint(16, (64, 64), dtype=torch.uint8)
    weight = Int4Tiles(to_tiles(codes), torch.randn(2, 64, 2).bfloat16())
    x = torch.randn(23, 64).bfloat16()
    together = int4_linear(x, weight, None, Scratch(), few=0, fixed=True)
    for row in range(23):
        alone = int4_linear(x[row : row + 1], weight, None, Scratch())
        assert torch.equal(alone, together[row : row + 1])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize(("outputs", "inputs"), [(960, 576), (31, 97), (5, 13), (576, 1536)])
def test_a_row_of_tiles_does_not_see_the_others(
    outputs: int, inputs: int, dtype: torch.dtype
) -> None:
    weight, bias = torch.randn(outputs, inputs).to(dtype), torch.randn(outputs).to(dtype)
    x = torch.randn(41, inputs).to(dtype)
    together = tiled_linear(x, weight, bias)
    for start, rows in ((0, 1), (3, 1), (40, 1), (7, 2), (10, 16), (1, 33)):
        part = slice(start, start + rows)
        assert torch.equal(tiled_linear(x[part], weight, bias), together[part])
    close = dict(atol=1e-3, rtol=1e-4) if dtype == torch.float32 else dict(atol=0.5, rtol=0.02)
    torch.testing.assert_close(together, F.linear(x, weight, bias), **close)
