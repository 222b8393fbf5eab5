"""Products of 8-bit integers against float64: exact but for the last rounding."""

from collections.abc import Callable
from dataclasses import dataclass
from types import ModuleType

import pytest
import torch
from torch import Tensor

from infopt.kernels.gpu import int8_product as module
from infopt.kernels.gpu.int8_product import LIBRARY, TRITON, int8_linear, tile_key
from infopt.kernels.gpu.rounding import Rounding, round_rows
from infopt.kernels.gpu.tile import Card, Tile

BF16, F16, F32 = torch.bfloat16, torch.float16, torch.float32
TOLERANCE = {F32: 1e-6, F16: 1e-3, BF16: 8e-3}
"""As a share of each result: its rounding, and those of the two scales."""

pytestmark = pytest.mark.usefixtures("poisoned_memory")


@dataclass(frozen=True)
class Case:
    m: int = 5
    n: int = 20
    k: int = 96
    dtype: torch.dtype = F32
    bias: bool = False
    way: int = TRITON
    split: int = 1


def make(case: Case, device: torch.device) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor | None]:
    torch.manual_seed(0)
    codes = torch.randint(-128, 128, (case.m, case.k), dtype=torch.int8)
    weight = torch.randint(-128, 128, (case.n, case.k), dtype=torch.int8)
    codes[0], weight[0] = -128, -128
    row_scales, scales = torch.rand(case.m) * 0.01, torch.rand(case.n) + 0.1
    bias = 100 * torch.randn(case.n).to(case.dtype) if case.bias else None
    there = [part.to(device) for part in (codes, row_scales, weight, scales)]
    return there[0], there[1], there[2], there[3], None if bias is None else bias.to(device)


def check(case: Case, device: torch.device, kernels: ModuleType = module) -> None:
    made = make(case, device)
    sizes = {"BLOCK_M": 16, "BLOCK_N": 16, "BLOCK_K": 32}
    tile = Tile({"WAY": case.way, "SPLIT": case.split, **sizes}, 4, 2)
    found = kernels.with_tile(tile, *made, case.dtype)
    tolerance = TOLERANCE[case.dtype]
    wanted = module.reference(*made)
    torch.testing.assert_close(found.double(), wanted, atol=tolerance, rtol=tolerance)


CASES = {
    "one row": Case(m=1),
    "tiles": Case(m=35, n=50, k=128, dtype=BF16, bias=True),
    "ends": Case(k=101, n=17, dtype=F16),
    "split": Case(k=224, split=3, bias=True),
    "more parts than steps": Case(k=64, split=4),
    "the library's": Case(m=19, n=24, k=104, way=LIBRARY, bias=True),
    "not for the library": Case(m=19, n=20, k=101, way=LIBRARY, dtype=BF16),
}


@pytest.mark.parametrize("name", CASES)
def test_kernel_equals_reference(name: str, device: torch.device) -> None:
    check(CASES[name], device)


MUTATIONS = {
    "a scale": ("tl.load(row_scales + m,", "tl.load(row_scales + 0 * m,", "tiles"),
    "the parts": ("first in range(split * BLOCK_K", "first in range(0 * split", "split"),
    "a split row": ("row_scales + at // columns", "row_scales + at % columns", "the library's"),
    "a split bias": ("BIAS=bias is not None, BLOCK=block", "BIAS=False, BLOCK=block", "split"),
}  # fmt: skip


@pytest.mark.parametrize("name", MUTATIONS)
def test_a_kernel_that_is_wrong_is_found(
    name: str, device: torch.device, mutated: Callable[[ModuleType, str, str], ModuleType]
) -> None:
    text, other, case = MUTATIONS[name]
    with pytest.raises(AssertionError, match="not close"):
        check(CASES[case], device, mutated(module, text, other))


def outliers_of(device: torch.device, dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor]:
    """Inputs of which some reach 6, in few places; a weight; its scales."""
    torch.manual_seed(0)
    x = torch.randn(21, 160).clamp(-5, 5)
    x[3, 7], x[20, 130], x[4, 7] = 60.0, -8.5, 6.0
    weight = torch.randint(-127, 128, (18, 160), dtype=torch.int8)
    return x.to(dtype).to(device), weight.to(device), (torch.rand(18) + 0.1).to(device)


@pytest.mark.parametrize("dtype", [F32, F16, BF16])
def test_outliers_are_multiplied_as_they_are(
    dtype: torch.dtype, device: torch.device, card: Card
) -> None:
    x, weight, scales = outliers_of(device, dtype)
    codes, row_scales = round_rows(card, x, Rounding(torch.int8, 127.0, 6.0))
    assert codes[3, 7] == codes[20, 130] == codes[4, 7] == 0
    bias = torch.randn(18, device=device)
    found = module.int8_linear_with_outliers(card, x, 6.0, codes, row_scales, weight, scales, bias)
    large = torch.where(x.abs() >= 6, x, 0.0)
    wanted = module.reference(codes, row_scales, weight, scales, bias, large)
    tolerance = TOLERANCE[dtype] * float(wanted.abs().max())
    torch.testing.assert_close(found.double(), wanted, atol=tolerance, rtol=0)


def test_rows_of_a_fixed_product_do_not_depend_on_one_another(
    device: torch.device, card: Card
) -> None:
    x, weight, scales = outliers_of(device, BF16)
    codes, row_scales = round_rows(card, x, Rounding(torch.int8, 127.0, 6.0))
    whole = module.int8_linear_with_outliers(
        card, x, 6.0, codes, row_scales, weight, scales, None, fixed=True
    )
    for row in (0, 3, 20):
        one = slice(row, row + 1)
        alone = module.int8_linear_with_outliers(
            card, x[one], 6.0, codes[one], row_scales[one], weight, scales, None, fixed=True
        )
        assert torch.equal(alone[0], whole[row])


@pytest.mark.parametrize("m", [0, 1, 20, 70])
def test_every_number_of_rows_has_its_way(m: int, device: torch.device, card: Card) -> None:
    made = make(Case(m=max(m, 1), n=70, k=256, dtype=BF16), device)
    codes, row_scales, weight, scales, _ = made
    found = int8_linear(card, codes[:m], row_scales[:m], weight, scales, None, BF16)
    wanted = module.reference(codes[:m], row_scales[:m], weight, scales, None)
    torch.testing.assert_close(found.double(), wanted, atol=1e-2, rtol=8e-3)


def test_only_sums_of_outliers_need_a_fixed_tile() -> None:
    assert tile_key(5, 64, 64, fixed=True) == tile_key(8, 64, 64)
    assert tile_key(5, 64, 64, fixed=True, outliers=True) == tile_key(
        999, 64, 64, fixed=True, outliers=True
    )
