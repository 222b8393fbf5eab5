"""Products of a few rows against plain torch."""

import pytest
import torch
from torch import Tensor

from infopt.kernels.cpu.native import Native
from infopt.kernels.cpu.program import Program
from infopt.kernels.cpu.unpacked import unpacked, unpacked_reference

SHAPES = ((1, 1), (5, 3), (64, 16), (67, 40), (130, 577), (300, 64))


@pytest.mark.parametrize("rows", [1, 2, 3, 4, 7])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("by_input", [False, True], ids=["by output", "by input"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_products(
    native: Native, dtype: torch.dtype, by_input: bool, shape: tuple[int, int], rows: int
) -> None:
    torch.manual_seed(0)
    weight = torch.randn(shape).to(dtype)
    x, bias = torch.randn(9, shape[1]), torch.randn(shape[0]) if rows % 2 else None
    wanted = unpacked_reference(x[:rows], weight, bias)
    if by_input:
        weight = weight.t().contiguous().t()
    program = Program(native, 9, 2)
    program.rows = rows
    y = unpacked(program, x, weight, bias).fill_(torch.nan)
    program.run()
    torch.testing.assert_close(y[:rows], wanted, rtol=2e-5, atol=2e-5 * shape[1] ** 0.5)
    assert y[rows:].isnan().all()


@pytest.mark.parametrize("by_input", [False, True], ids=["by output", "by input"])
def test_no_row_depends_on_the_others(native: Native, by_input: bool) -> None:
    torch.manual_seed(0)
    weight, x = torch.randn(133, 95), torch.randn(9, 95)
    weight = weight.t().contiguous().t() if by_input else weight

    def run(rows: Tensor, threads: int) -> Tensor:
        program = Program(native, len(rows), threads)
        program.rows = len(rows)
        y = unpacked(program, rows.contiguous(), weight, None)
        program.run()
        return y

    whole = run(x, 2)
    assert torch.equal(run(x, 1), whole)
    assert all(torch.equal(run(x[r : r + 1], 2)[0], whole[r]) for r in range(9))
