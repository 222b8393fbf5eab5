"""Products with float8 weights against float64."""

from collections.abc import Callable
from dataclasses import dataclass, replace
from types import ModuleType

import pytest
import torch
from torch import Tensor

from infopt.kernels.gpu import fp8_matrix
from infopt.kernels.gpu import fp8_product as module
from infopt.kernels.gpu.fp8_matrix import Fp8Matrix, dequantized
from infopt.kernels.gpu.fp8_product import (
    DENSE,
    DOT,
    FLOAT8_FROM,
    LIBRARY,
    VECTOR,
    fp8_linear,
    fp8_rounded_linear,
)
from infopt.kernels.gpu.tile import Card, Tile

BF16, F16, F32, F8 = torch.bfloat16, torch.float16, torch.float32, torch.float8_e4m3fn
TOLERANCE = {F32: 2e-6, F16: 2e-3, BF16: 1.2e-2}
"""As a share of the largest result: float32 sums in another order, and a rounding of the result."""

pytestmark = pytest.mark.usefixtures("poisoned_memory")


@dataclass(frozen=True)
class Case:
    way: int
    m: int = 1
    n: int = 20
    k: int = 96
    blocks: bool = False
    dtype: torch.dtype = F32
    bias: bool = False
    split: int = 1
    rounded: int = 0
    """1: inputs in float8, a scale a row; 2: a scale for each 128."""


def codes_of(*shape: int) -> Tensor:
    """All values but NaN, subnormal ones included."""
    codes = torch.randint(0, 256, shape, dtype=torch.uint8)
    codes = torch.where((codes & 0x7F) == 0x7F, codes - 1, codes)
    return codes.view(F8)


def make(
    case: Case, device: torch.device
) -> tuple[Tensor, Tensor | None, Fp8Matrix, Tensor | None]:
    torch.manual_seed(0)
    shape = (-(-case.n // 128), -(-case.k // 128)) if case.blocks else (case.n,)
    weight = Fp8Matrix(codes_of(case.n, case.k).to(device), (torch.rand(shape) * 0.01).to(device))
    bias = torch.randn(case.n).to(case.dtype).to(device) if case.bias else None
    if not case.rounded:
        wide = torch.full((case.m, case.k + 8), torch.nan)
        wide[:, : case.k] = torch.randn(case.m, case.k)
        return wide.to(case.dtype).to(device)[:, : case.k], None, weight, bias
    shape = (case.m, -(-case.k // 128)) if case.rounded == 2 else (case.m,)
    scales = (torch.rand(shape) + 0.1).to(device)
    return codes_of(case.m, case.k).to(device), scales, weight, bias


def check(case: Case, device: torch.device, card: Card, kernels: ModuleType = module) -> None:
    if case.rounded and card.capability < FLOAT8_FROM:
        pytest.skip("this GPU's tensor cores have no float8")
    made = make(case, device)
    sizes = {"BLOCK_M": 16, "BLOCK_N": 16, "BLOCK_K": 32}
    tile = Tile({"WAY": case.way, "SPLIT": case.split, **sizes}, 4, 2)
    found = kernels.with_tile(tile, *made, case.dtype)
    wanted = module.reference(*made)
    tolerance = TOLERANCE[case.dtype] * float(wanted.abs().max())
    # Tensor cores keep some 14 bits of a sum of float8 products.
    if case.rounded and device.type == "cuda":
        tolerance = max(tolerance, 1e-3 * float(wanted.abs().max()))
    assert found.dtype == case.dtype
    torch.testing.assert_close(found.double(), wanted, atol=tolerance, rtol=0)


CASES = {
    "vector": Case(VECTOR, bias=True),
    "vector, blocks": Case(VECTOR, n=150, k=300, blocks=True),
    "vector, split": Case(VECTOR, k=201, split=3, dtype=BF16, bias=True),
    "vector, rows": Case(VECTOR, m=3, dtype=F16),
    "dot": Case(DOT, m=5),
    "dot, tiles": Case(DOT, m=35, n=50, k=128, dtype=BF16, bias=True),
    "dot, blocks": Case(DOT, m=3, n=150, k=300, blocks=True, dtype=BF16),
    "dot, ends": Case(DOT, m=3, k=101, dtype=F16),
    "dot, split": Case(DOT, m=3, k=300, split=3, blocks=True, bias=True, dtype=BF16),
    "dense": Case(DENSE, m=9, n=150, k=300, blocks=True, dtype=BF16, bias=True),
    "dense, rows": Case(DENSE, m=9, k=101),
    "rounded, rows": Case(DOT, m=7, rounded=1, dtype=BF16, bias=True),
    "rounded, blocks": Case(DOT, m=18, n=150, k=300, rounded=2, blocks=True, dtype=BF16),
    "rounded, blocks of one side": Case(DOT, m=3, k=150, rounded=1, blocks=True),
    "rounded, groups": Case(DOT, m=3, k=150, rounded=2, dtype=F16),
    "rounded, split": Case(DOT, m=3, k=300, rounded=2, blocks=True, split=3, bias=True),
    "the library's": Case(LIBRARY, m=7, n=32, k=96, rounded=1, dtype=BF16),
    "not for the library": Case(LIBRARY, m=7, n=30, k=90, rounded=1, dtype=BF16),
}


@pytest.mark.parametrize("name", CASES)
def test_kernel_equals_reference(name: str, device: torch.device, card: Card) -> None:
    check(CASES[name], device, card)


MUTATIONS = {
    "vector's blocks": ("n[:, None] // 128 * scale_columns", "n[:, None] // 128", "vector, blocks"),
    "a block of inputs": (
        "n // 128 * scale_columns + first // 128",
        "n // 128 * scale_columns + 0 * first",
        "dot, blocks",
    ),
    "a block of outputs": ("at = scales + n // 128 *", "at = scales + 0 * n *", "dot, blocks"),
    "a row's groups": ("row_columns + first // 128", "row_columns + 0", "rounded, groups"),
    "the end of a row": (
        "(m[:, None] < count) & (k[None, :] < inputs)\n        there",
        "(m[:, None] < count)\n        there",
        "dot, ends",
    ),
    "parts": (
        "in range(split * BLOCK_K, inputs, SPLIT * BLOCK_K):\n"
        "        k = first + tl.arange(0, BLOCK_K)\n        here",
        "in range(0, inputs, SPLIT * BLOCK_K):\n"
        "        k = first + tl.arange(0, BLOCK_K)\n        here",
        "dot, split",
    ),
    "a row's scale": ("row_scales + m, mask", "row_scales + 0 * m, mask", "rounded, rows"),
}


@pytest.mark.parametrize("name", MUTATIONS)
def test_a_kernel_that_is_wrong_is_found(
    name: str,
    device: torch.device,
    card: Card,
    mutated: Callable[[ModuleType, str, str], ModuleType],
) -> None:
    text, other, case = MUTATIONS[name]
    if CASES[case].rounded and card.capability < FLOAT8_FROM:
        pytest.skip("this GPU's tensor cores have no float8")
    with pytest.raises(AssertionError, match="not close"):
        check(CASES[case], device, card, mutated(module, text, other))


@pytest.mark.parametrize("dtype", [F32, F16, BF16])
@pytest.mark.parametrize("blocks", [False, True])
def test_numbers_are_rounded_once(
    blocks: bool, dtype: torch.dtype, device: torch.device, card: Card
) -> None:
    _, _, weight, _ = make(Case(DENSE, n=150, k=300, blocks=blocks), device)
    wanted = (fp8_matrix.reference(weight)).float().to(dtype)
    torch.testing.assert_close(dequantized(weight, dtype), wanted, atol=0, rtol=0)


@pytest.mark.parametrize("dtype", [F32, BF16, F8])
def test_rows_of_a_fixed_product_do_not_depend_on_one_another(
    dtype: torch.dtype, device: torch.device, card: Card
) -> None:
    if dtype == F8 and card.capability < FLOAT8_FROM:
        pytest.skip("this GPU's tensor cores have no float8")
    case = Case(DOT, m=37, n=70, k=192, dtype=BF16, blocks=True, rounded=2 if dtype == F8 else 0)
    x, row_scales, weight, _ = make(replace(case, dtype=BF16 if dtype == F8 else dtype), device)

    def product(rows: slice) -> Tensor:
        if row_scales is None:
            return fp8_linear(card, x[rows], weight, None, fixed=True)
        return fp8_rounded_linear(card, x[rows], row_scales[rows], weight, None, BF16, fixed=True)

    whole = product(slice(0, 37))
    for rows in (slice(0, 1), slice(5, 6), slice(20, 37)):
        assert torch.equal(product(rows), whole[rows])


@pytest.mark.parametrize("rounded", [0, 1, 2])
@pytest.mark.parametrize("m", [0, 1, 20, 70])
def test_every_number_of_rows_has_its_way(
    m: int, rounded: int, device: torch.device, card: Card
) -> None:
    if rounded and card.capability < FLOAT8_FROM:
        pytest.skip("this GPU's tensor cores have no float8")
    case = Case(DOT, m=m, n=70, k=96, dtype=BF16, rounded=rounded, blocks=rounded == 2)
    x, row_scales, weight, _ = make(case, device)
    if row_scales is None:
        found = fp8_linear(card, x, weight, None)
    else:
        found = fp8_rounded_linear(card, x, row_scales, weight, None, BF16)
    wanted = module.reference(x, row_scales, weight, None)
    tolerance = TOLERANCE[BF16] * float(wanted.abs().max()) if m else 0
    torch.testing.assert_close(found.double(), wanted, atol=tolerance, rtol=0)
