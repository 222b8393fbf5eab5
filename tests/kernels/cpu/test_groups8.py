"""Products of 4-bit weights with inputs in 8 bits, against float64 with the same rounding."""

import pytest
import torch
from torch import Tensor

from infopt.kernels.cpu.groups import GroupPanels, dequantized_groups, pack_groups
from infopt.kernels.cpu.groups8 import (
    groups8,
    groups8_linear,
    reference,
    rounded_groups,
    takes,
)
from infopt.kernels.cpu.native import Native
from infopt.kernels.cpu.program import Program

DTYPES = (torch.float32, torch.bfloat16)
TOLERANCE = {torch.float32: 1e-6, torch.bfloat16: 2**-8}
SHAPES = ((1, 32, 32), (45, 96, 96), (130, 1280, 64), (32, 2304, 128))


def made(n: int, k: int, group: int, *, even: bool) -> GroupPanels:
    draw = torch.Generator().manual_seed(n * k + group)
    codes = torch.randint(16, (n, k), generator=draw).to(torch.uint8)
    scales = (torch.rand(n, k // group, generator=draw) + 0.1).to(torch.float16)
    zeros = torch.randint(16, (n, k // group), generator=draw).to(torch.uint8)
    return pack_groups(codes, scales, 8 if even else zeros, 4)


def close(found: Tensor, x: Tensor, weight: GroupPanels, bias: Tensor | None = None) -> None:
    assert found.dtype == x.dtype and not found.isnan().any()
    rounded = rounded_groups(x, weight.group)
    largest = (rounded.abs() @ dequantized_groups(weight).double().abs().t()).amax()
    error = (found.double() - reference(x, weight, bias)).abs().max() / largest
    assert error < TOLERANCE[x.dtype], error


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("even", [True, False])
@pytest.mark.parametrize("m", [1, 2, 3, 7, 12, 29, 250])
@pytest.mark.parametrize("shape", SHAPES)
def test_product_is_the_references(
    m: int, shape: tuple[int, int, int], even: bool, dtype: torch.dtype, native: Native
) -> None:
    weight = made(*shape, even=even)
    x, bias = torch.randn(m, shape[1]).to(dtype), torch.randn(shape[0])
    for threads in (1, 2):
        close(groups8_linear(native, x, weight, bias, threads=threads), x, weight, bias)
    close(groups8_linear(native, x, weight, None, threads=1), x, weight)


@pytest.mark.parametrize("even", [True, False])
def test_a_row_depends_on_no_other(even: bool, native: Native) -> None:
    weight, x = made(70, 1280, 64, even=even), torch.randn(250, 1280)
    whole = groups8_linear(native, x, weight, None, threads=2)
    for rows in (slice(0, 1), slice(3, 8), slice(200, 232)):
        part = groups8_linear(native, x[rows], weight, None, threads=1)
        assert torch.equal(part, whole[rows])


def test_extremes(native: Native) -> None:
    weight = made(32, 96, 32, even=False)
    x = torch.zeros(6, 96)
    x[1, 5], x[1, 40] = 1e35, -1e-40  # a group of large numbers beside one of subnormal ones
    x[2] = 2.0**-149 * torch.arange(96)
    x[3, 7] = torch.inf
    x[4, 90] = torch.nan
    x[5] = torch.linspace(-3, 3, 96)
    found = groups8_linear(native, x, weight, None, threads=1)
    assert torch.equal(found[0], torch.zeros(32))
    assert found[3].isnan().all() and found[4].isnan().all()
    assert found[2].isfinite().all()
    for row in (1, 5):
        close(found[row : row + 1], x[row : row + 1], weight)


def test_rounding_is_what_is_lost() -> None:
    x = torch.randn(50, 256)
    error = (rounded_groups(x, 64) - x).abs().amax() / x.abs().amax()
    assert 0 < error < 1 / 250


def test_other_widths_have_no_such_product() -> None:
    codes = torch.zeros(32, 64, dtype=torch.uint8)
    assert not takes(pack_groups(codes, torch.ones(32, 1), 0, 2))


def test_appended_to_a_program(native: Native) -> None:
    first, second = made(96, 64, 32, even=True), made(45, 96, 32, even=False)
    program = Program(native, 5, 2)
    program.label = "a"
    x, bias = torch.randn(5, 64), torch.randn(45)
    middle = groups8(program, x, first, None)
    wide = torch.full((5, 50), torch.nan)
    groups8(program, middle, second, bias, wide[:, 5:])
    for rows in (5, 2):
        program.rows = rows
        program.run()
        wanted = groups8_linear(native, x, first, None, threads=1)
        wanted = groups8_linear(native, wanted, second, bias, threads=1)
        assert torch.equal(wide[:rows, 5:], wanted[:rows]) and wide[:, :5].isnan().all()
