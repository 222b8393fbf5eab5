"""Rounding on grids against plain torch, at odd shapes."""

import pytest
import torch
from torch import Tensor

from infopt.kernels.cpu.native import Native
from infopt.kernels.cpu.solve import (
    gptq_columns,
    gptq_columns_reference,
    grid_errors,
    grid_errors_reference,
)

SHAPES = ((1, 1), (2, 16), (7, 63), (16, 64), (33, 65), (128, 200))
TOP = 15


def case(shape: tuple[int, int]) -> dict[str, Tensor]:
    count, n = shape
    factor = 0.02 * torch.randn(count, count).fill_diagonal_(75.0)
    return {
        "columns": torch.randn(count, n),
        "factor": torch.where(torch.ones(count, count).triu() > 0, factor, 99.0),
        "scales": torch.rand(3, n) / 4 + 0.05,
        "zeros": torch.randint(1, TOP, (3, n)).float(),
        "groups": torch.randint(3, (count,)),
    }


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("by_column", [False, True], ids=["rows", "columns"])
@pytest.mark.parametrize("shifts", [False, True], ids=["", "shift"])
@pytest.mark.parametrize("holds", [False, True], ids=["", "held"])
def test_columns(
    native: Native, shape: tuple[int, int], by_column: bool, shifts: bool, holds: bool
) -> None:
    torch.manual_seed(sum(shape))
    given = case(shape)
    groups, factor = given["groups"], given["factor"]
    shift = 0.01 * torch.randn(shape[0], shape[0]) if shifts else None
    held = torch.rand(shape) < 0.3 if holds else None
    # Wide sums: the reference decides edges in float64, where nobody rounds the other way.
    whole = {name: given[name].double() for name in ("columns", "factor", "scales", "zeros")}
    wanted = gptq_columns_reference(
        whole["columns"],
        whole["factor"],
        whole["scales"][groups],
        whole["zeros"][groups],
        TOP,
        shift=None if shift is None else shift.double(),
        held=held,
    )
    if by_column:
        factor = factor.T.contiguous().T
    given["factor"] = factor
    codes, errors = gptq_columns(native, **given, max_code=TOP, shift=shift, held=held)
    # A code that falls on the other side of an edge changes all behind it in its row.
    same = (codes.double() == wanted[0]).all(dim=0)
    assert float(same.double().mean()) > 0.95
    assert torch.equal(codes, codes.round().clamp(0, TOP))
    near = {"rtol": 2e-4, "atol": 2e-4}
    torch.testing.assert_close(errors[:, same].double(), wanted[1][:, same], **near)
    torch.testing.assert_close(
        given["columns"][:, same].double(), whole["columns"][:, same], **near
    )


def test_columns_depend_on_no_neighbours(native: Native) -> None:
    torch.manual_seed(0)
    given = case((40, 150))
    whole, _ = gptq_columns(native, **{**given, "columns": given["columns"].clone()}, max_code=TOP)
    for part in (slice(0, 1), slice(60, 150), slice(149, 150)):
        some = {
            name: tensor[:, part].contiguous() if name in ("columns", "scales", "zeros") else tensor
            for name, tensor in given.items()
        }
        assert torch.equal(gptq_columns(native, **some, max_code=TOP)[0], whole[:, part])


def test_what_is_not_finite_stays_in_its_row(native: Native) -> None:
    torch.manual_seed(0)
    given = case((20, 70))
    given["columns"][3, 5] = torch.nan
    codes, errors = gptq_columns(native, **given, max_code=TOP)
    assert errors[3, 5].isnan() and codes[3, 5].isnan()
    others = [i for i in range(70) if i != 5]
    assert bool(torch.isfinite(codes[:, others]).all() and torch.isfinite(errors[:, others]).all())


@pytest.mark.parametrize("width", [1, 5, 16, 64, 100])
@pytest.mark.parametrize("grids", [1, 11])
def test_grids(native: Native, width: int, grids: int) -> None:
    torch.manual_seed(width)
    weights = torch.randn(9, 3, width)
    scales, zeros = torch.rand(grids, 9, 3) / 4 + 0.05, torch.randint(1, TOP, (grids, 9, 3)).float()
    found = grid_errors(native, weights, scales, zeros, TOP)
    wanted = grid_errors_reference(weights.double(), scales.double(), zeros.double(), TOP)
    torch.testing.assert_close(found.double(), wanted, rtol=1e-5, atol=1e-6)


def test_numbers_far_from_the_grid(native: Native) -> None:
    weights = torch.tensor([[1e30, -1e30, 5e6, -5e6, 0.0]])
    scales, zeros = torch.full((1, 1), 0.5), torch.full((1, 1), 8.0)
    found = grid_errors(native, weights, scales, zeros, TOP)
    torch.testing.assert_close(found, grid_errors_reference(weights, scales, zeros, TOP))
