"""Products with integer weights against float64, and the weights themselves."""

from collections.abc import Callable
from dataclasses import dataclass, replace
from types import ModuleType
from typing import Any

import pytest
import torch
from torch import Tensor

from infopt.kernels.gpu import integer_columns, parts
from infopt.kernels.gpu import integer_product as module
from infopt.kernels.gpu.integer_columns import (
    IntegerColumns,
    chunks,
    dequantized,
    joined,
    pack_columns,
    packable_columns,
)
from infopt.kernels.gpu.integer_product import DENSE, DOT, VECTOR, integer_linear, tile_key
from infopt.kernels.gpu.tile import Card, Tile

BF16, F16, F32 = torch.bfloat16, torch.float16, torch.float32
TOLERANCE = {F32: 2e-6, F16: 2e-3, BF16: 1.2e-2}
"""As a share of the largest result: float32 sums in another order, and a rounding of the result."""

pytestmark = pytest.mark.usefixtures("poisoned_memory")


@dataclass(frozen=True)
class Case:
    way: int
    m: int = 1
    n: int = 20
    k: int = 96
    bits: int = 4
    groups: int = 3
    zeros: bool = False
    dtype: torch.dtype = F32
    scales: torch.dtype = F16
    bias: bool = False
    table: bool = False
    split: int = 1
    block_m: int = 16
    block_n: int = 16
    block_k: int = 32


def make(case: Case, device: torch.device) -> tuple[Tensor, IntegerColumns, Tensor | None, Tensor]:
    torch.manual_seed(0)
    top = 1 << case.bits
    codes = torch.randint(0, top, (case.n, case.k), dtype=torch.uint8)
    codes[0], codes[-1] = 0, top - 1
    scales = (torch.rand(case.n, case.groups) + 0.5).to(case.scales)
    zeros: Tensor | int = top // 2
    if case.zeros:
        zeros = torch.randint(0, top, (case.n, case.groups), dtype=torch.uint8)
        zeros[0], zeros[-1] = top - 1, 0
    # A row of x stands in a wider one, as parts of a projection do.
    wide = torch.full((case.m, case.k + 8), torch.nan, dtype=case.dtype)
    wide[:, : case.k] = torch.randn(case.m, case.k)
    bias = torch.randn(case.n).to(case.dtype) if case.bias else None
    table = torch.rand(top) * 2 - 1 if case.table else None
    if table is not None:
        zeros = 0
    there = zeros if isinstance(zeros, int) else zeros.repeat_interleave(case.k // case.groups, 1)
    spread = scales.double().repeat_interleave(case.k // case.groups, 1)
    steps = codes.double() if table is None else table.double()[codes.int()]
    whole = (steps - (there.double() if isinstance(there, Tensor) else there)) * spread
    weight = pack_columns(codes, scales, zeros, case.bits, table)
    names = ("words", "scales", "zeros", "thirds", "table")
    held = {name: getattr(weight, name) for name in names}
    moved = {name: part.to(device) for name, part in held.items() if isinstance(part, Tensor)}
    weight = replace(weight, **moved)
    x = wide.to(device)[:, : case.k]
    return x, weight, None if bias is None else bias.to(device), whole.to(device)


def tile_of(case: Case) -> Tile:
    sizes = {"BLOCK_M": case.block_m, "BLOCK_N": case.block_n, "BLOCK_K": case.block_k}
    return Tile({"WAY": case.way, "SPLIT": case.split, **sizes}, 4, 2)


def check(case: Case, device: torch.device, card: Card, kernels: ModuleType = module) -> None:
    x, weight, bias, whole = make(case, device)
    found = kernels.with_tile(card, tile_of(case), x, weight, bias)
    wanted = module.reference(x, weight, bias)
    assert found.dtype == case.dtype
    torch.testing.assert_close(module.reference(x, weight, None), x.double() @ whole.t())
    tolerance = TOLERANCE[case.dtype] * float(wanted.abs().max())
    torch.testing.assert_close(found.double(), wanted, atol=tolerance, rtol=0)


CASES = {
    "vector": Case(VECTOR),
    "vector, two steps": Case(VECTOR, k=192, groups=6, n=33),
    "vector, a step of several groups": Case(VECTOR, k=128, groups=4, block_k=128),
    "vector, zeros": Case(VECTOR, zeros=True, bias=True),
    "vector, 8 bits": Case(VECTOR, bits=8, zeros=True, block_n=8),
    "vector, 2 bits": Case(VECTOR, bits=2, zeros=True, block_k=64),
    "vector, 3 bits": Case(VECTOR, bits=3, zeros=True, block_k=64),
    "vector, 3 bits, end": Case(VECTOR, bits=3, groups=1, k=101, split=2, dtype=BF16),
    "vector, table": Case(VECTOR, table=True, bias=True, scales=F32),
    "vector, table, end": Case(VECTOR, table=True, groups=1, k=101, split=2, dtype=F16),
    "vector, channel": Case(VECTOR, groups=1, k=101, bits=8, scales=BF16),
    "vector, split": Case(VECTOR, k=200, groups=1, split=3, bias=True, scales=F32),
    "vector, rows": Case(VECTOR, m=3, dtype=BF16, split=2),
    "vector, float16": Case(VECTOR, dtype=F16, zeros=True, split=2, bias=True),
    "dot": Case(DOT, m=5),
    "dot, tiles": Case(DOT, m=35, n=50, k=128, groups=2, dtype=BF16, block_k=64),
    "dot, bfloat16, zeros": Case(DOT, m=2, dtype=BF16, zeros=True, bias=True),
    "dot, float16, zeros": Case(DOT, m=17, dtype=F16, zeros=True),
    "dot, 8 bits": Case(DOT, m=4, bits=8, dtype=BF16, zeros=True),
    "dot, 8 bits, float16": Case(DOT, m=4, bits=8, dtype=F16, zeros=True, groups=1),
    "dot, 2 bits": Case(DOT, m=4, bits=2, dtype=BF16, zeros=True),
    "dot, 3 bits": Case(DOT, m=4, bits=3, dtype=BF16, zeros=True),
    "dot, 3 bits, end": Case(DOT, m=19, bits=3, dtype=F16, k=101, groups=1, bias=True),
    "dot, 3 bits, float32": Case(DOT, m=2, bits=3, split=2, n=33, zeros=True),
    "dot, table": Case(DOT, m=4, table=True, dtype=BF16, scales=F32),
    "dot, table, end": Case(DOT, m=17, table=True, dtype=F16, k=101, groups=1, split=2),
    "dot, table, float32": Case(DOT, m=2, table=True, bias=True),
    "dot, channel": Case(DOT, m=4, k=101, groups=1, bias=True, dtype=BF16, scales=BF16),
    "dot, split": Case(DOT, m=3, k=224, groups=7, split=3, bias=True, dtype=BF16),
    "dot, more parts than steps": Case(DOT, m=3, k=64, groups=2, split=4, dtype=F16),
    "dot, groups of 96": Case(DOT, m=3, k=288, groups=3, dtype=BF16, block_k=64),
    "dense": Case(DENSE, m=19, zeros=True),
    "dense, bias": Case(DENSE, m=6, bits=8, dtype=BF16, bias=True),
    "dense, 3 bits": Case(DENSE, m=7, bits=3, zeros=True, dtype=BF16, n=33),
    "dense, 3 bits, end": Case(DENSE, m=7, bits=3, k=101, groups=1),
    "dense, table": Case(DENSE, m=7, table=True, dtype=F16, scales=F32),
    "dense, channel": Case(DENSE, m=6, k=101, groups=1, dtype=F16, bits=2),
}  # fmt: skip


@pytest.mark.parametrize("name", CASES)
def test_kernel_equals_reference(name: str, device: torch.device, card: Card) -> None:
    check(CASES[name], device, card)


MUTATIONS = {
    "the upper codes": ("there = words >> (LOWER * WIDTH)", "there = words >> WIDTH", "dense"),
    "a place": ("WIDTH)\n    return PLACE", "WIDTH)\n    return 2 * PLACE", "dense"),
    "the third bit": ("third << (AT + 2 - J)", "third << (AT + 1 - J)", "dense, 3 bits"),
    "the upper third bits": ("third >> (J - AT - 2)", "third >> (J - AT - 1)", "dense, 3 bits"),
    "a word's third bits": ("(w[:, None] % 2 * 16)", "(w[:, None] % 2 * 8)", "dense, 3 bits"),
    "the table": ("table + ((q >> (j * BITS))", "table + ((q >> j)", "dense, table"),
    "an output's third bits": ("weight.thirds[:, first:]", "weight.thirds", "chunks, 3 bits"),
    "the group": ("group = w * PER // GROUP if", "group = w // GROUP if", "dense"),
    "an output": ("weight.words[:, first:]", "weight.words", "chunks"),
}


@pytest.mark.parametrize("name", MUTATIONS)
def test_a_weight_that_is_wrong_is_found(
    name: str,
    device: torch.device,
    card: Card,
    mutated: Callable[[ModuleType, str, str], ModuleType],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    text, other, case = MUTATIONS[name]
    wrong = mutated(integer_columns, text, other)
    monkeypatch.setattr(module, "dequantized", wrong.dequantized)
    with pytest.raises(AssertionError, match="not close"):
        if case.startswith("chunks"):
            check_chunks(device, card, monkeypatch, bits=3 if "3 bits" in case else 4)
        else:
            check(CASES[case], device, card)


PRODUCTS = {
    "vector's group": ("group = w * PER // GROUP if", "group = w // GROUP if", "vector, zeros"),
    "vector's end of x": ("mask=k < inputs, other", "mask=k >= 0, other", "vector, channel"),
    "vector's parts": ("split * BLOCK_W, rows", "split, rows", "vector, split"),
    "dot's shifts": ("(places * WIDTH)[None", "(places * 2)[None", "dot"),
    "dot's third bits": ("places[None, :, None]) & 1) << 2", "places[None, :, None]) & 1) << 1",
                         "dot, 3 bits"),
    "dot's table": ("flat = tl.gather(values, tl", "flat = 1 + tl.gather(values, tl", "dot, table"),
    "vector's table": ("table + ((q >> (j * BITS))", "table + ((q >> j)", "vector, table"),
    "dot's magic": ("(zero + 128.0)", "(zero + 127.0)", "dot, bfloat16, zeros"),
    "dot's magic, float16": ("(zero + 1024.0)", "(zero + 1023.0)", "dot, float16, zeros"),
    "dot's group": ("(first // GROUP if", "(first // (2 * GROUP) if", "dot"),
    "dot's steps": ("weight.group & -weight.group or", "0 or", "dot, groups of 96"),
    "dot's columns": ("(k[None, :] < inputs)", "(k[None, :] >= 0)", "dot, channel"),
    "the bias": ('BIAS=bias is not None and parts is out, SPLIT=size["SPLIT"], BLOCK_N',
                 'BIAS=bias is not None, SPLIT=size["SPLIT"], BLOCK_N', "vector, split"),
    "the dense chunk": ("view(inputs, width), part.start", "view(inputs, width), 0", "chunks"),
}  # fmt: skip


@pytest.mark.parametrize("name", PRODUCTS)
def test_a_product_that_is_wrong_is_found(
    name: str,
    device: torch.device,
    card: Card,
    mutated: Callable[[ModuleType, str, str], ModuleType],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    text, other, case = PRODUCTS[name]
    wrong = mutated(module, text, other)
    with pytest.raises(AssertionError, match="not close"):
        if case == "chunks":
            check_chunks(device, card, monkeypatch, wrong)
        else:
            check(CASES[case], device, card, wrong)


def check_chunks(
    device: torch.device,
    card: Card,
    monkeypatch: pytest.MonkeyPatch,
    kernels: ModuleType = module,
    bits: int = 4,
) -> None:
    monkeypatch.setattr(integer_columns, "_CHUNK", 96 * 20)
    case = Case(DENSE, m=5, n=50, bits=bits, zeros=True, bias=True)
    check(case, device, card, kernels)


def test_a_large_weight_is_dequantized_in_chunks(
    device: torch.device, card: Card, monkeypatch: pytest.MonkeyPatch
) -> None:
    for bits in (3, 4):
        check_chunks(device, card, monkeypatch, bits=bits)
    assert list(chunks(50, 96)) == [slice(0, 32), slice(32, 50)]


def test_chunks_cover_all_outputs() -> None:
    for outputs in (1, 16, 17, 1000, 262_144):
        found = [n for part in chunks(outputs, 1 << 20) for n in range(part.start, part.stop)]
        assert found == list(range(outputs))


@pytest.mark.parametrize("dtype", [F32, F16, BF16])
def test_numbers_are_rounded_once(dtype: torch.dtype, device: torch.device, card: Card) -> None:
    """To the last bit what the checkpoint's format says, in the dtype of the run."""
    _, weight, _, whole = make(Case(DENSE, bits=8, zeros=True, n=19), device)
    out = torch.full((96, 19), torch.nan, dtype=dtype, device=device)
    found = dequantized(card, weight, dtype, out, 0)
    torch.testing.assert_close(found.t(), whole.float().to(dtype), atol=0, rtol=0)


@pytest.mark.parametrize("dtype", [F32, F16, BF16])
@pytest.mark.parametrize("bits", [2, 3, 4, 8])
def test_rows_of_a_fixed_product_do_not_depend_on_one_another(
    bits: int, dtype: torch.dtype, device: torch.device, card: Card
) -> None:
    x, weight, bias, _ = make(
        Case(DOT, m=37, n=70, k=192, bits=bits, dtype=dtype, bias=True), device
    )
    whole = integer_linear(card, x, weight, bias, fixed=True)
    for rows in (slice(0, 1), slice(5, 6), slice(20, 37), slice(36, 37)):
        alone = integer_linear(card, x[rows], weight, bias, fixed=True)
        assert torch.equal(alone, whole[rows])


@pytest.mark.parametrize("m", [0, 1, 3, 20, 40, 70])
def test_every_number_of_rows_has_its_way(m: int, device: torch.device, card: Card) -> None:
    x, weight, bias, _ = make(Case(DOT, m=m, n=70, k=96, dtype=BF16, bias=True), device)
    found, wanted = integer_linear(card, x, weight, bias), module.reference(x, weight, bias)
    tolerance = TOLERANCE[BF16] * float(wanted.abs().max()) if m else 0
    torch.testing.assert_close(found.double(), wanted, atol=tolerance, rtol=0)


def test_what_can_be_packed() -> None:
    assert packable_columns(4, 4096, 32) and packable_columns(8, 101, 1)
    assert not packable_columns(4, 96, 6)  # groups of 16
    assert packable_columns(3, 96, 1) and not packable_columns(5, 96, 1)
    assert not packable_columns(4, 100, 3)


def test_keys_are_few_and_fixed_ones_one() -> None:
    weight = pack_columns(torch.zeros(8, 64, dtype=torch.uint8), torch.ones(8, 1), 8, 4)
    assert {tile_key(m, weight, BF16)["m"] for m in (5, 8, 70, 9999)} == {8, 128, 4096}
    assert len({str(tile_key(m, weight, BF16, fixed=True)) for m in (1, 5, 9999)}) == 1


@pytest.mark.parametrize("dtype", [F32, BF16])
def test_parts_are_added(dtype: torch.dtype, device: torch.device) -> None:
    torch.manual_seed(0)
    numbers, bias = torch.randn(3, 7, 111, device=device), torch.randn(111, device=device)
    out = torch.full((7, 111), torch.nan, dtype=dtype, device=device)
    parts.add_parts(numbers, bias, out)
    wanted = parts.reference(numbers, bias)
    torch.testing.assert_close(out.double(), wanted, atol=TOLERANCE[dtype] * 5, rtol=0)


@pytest.mark.parametrize("more", [{}, {"bits": 3, "zeros": True}, {"table": True}])
def test_weights_that_are_packed_alike_are_joined(
    more: dict[str, Any], device: torch.device, card: Card
) -> None:
    x, one, _, whole = make(Case(DOT, m=3, **more), device)
    other = replace(one, scales=one.scales * 2)
    both = joined([one, other])
    assert both is not None
    torch.testing.assert_close(integer_columns.reference(both), torch.cat([whole, 2 * whole]))
    found = module.with_tile(card, tile_of(Case(DOT)), x, both, None)
    wanted = x.double() @ torch.cat([whole, 2 * whole]).t()
    torch.testing.assert_close(found.double(), wanted, atol=1e-4, rtol=0)
    assert joined([one, replace(one, zeros=3)]) is None
    assert joined([one, replace(one, table=torch.ones(16, device=device))]) is None
