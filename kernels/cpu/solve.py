"""Rounding weights on grids: GPTQ's neighbouring columns, and what each of many grids would lose.

Each in plain torch (`..._reference`), and natively: by calls of the library, not as part of a
program. All tensors are float32 unless said.
"""

import ctypes
from ctypes import c_float, c_int64, c_void_p

import torch
from torch import Tensor

from infopt.kernels.cpu.native import Native, call

_PARTS = 8
"""Shares of the work for each thread: none waits long for another."""


class ColumnsSolveArgs(ctypes.Structure):
    _fields_ = (
        ("columns", c_void_p), ("factor", c_void_p), ("shift", c_void_p), ("scales", c_void_p),
        ("zeros", c_void_p), ("groups", c_void_p), ("held", c_void_p), ("codes", c_void_p),
        ("errors", c_void_p), ("n", c_int64), ("count", c_int64), ("factor_strides", c_int64 * 2),
        ("shift_strides", c_int64 * 2), ("max_code", c_float),
    )  # fmt: skip


class GridErrorsArgs(ctypes.Structure):
    _fields_ = (
        ("weights", c_void_p), ("scales", c_void_p), ("zeros", c_void_p), ("errors", c_void_p),
        ("groups", c_int64), ("width", c_int64), ("grids", c_int64), ("max_code", c_float),
    )  # fmt: skip


def gptq_columns_reference(
    columns: Tensor,
    factor: Tensor,
    scales: Tensor,
    zeros: Tensor,
    max_code: int,
    *,
    shift: Tensor | None = None,
    held: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Round columns [B, N] one by one on scales and zeros [B, N]; codes and errors [B, N].

    An error, over the diagonal of the upper triangle `factor` [B, B], moves the columns behind it,
    in place, by `factor`'s row; a column moves them by that of `shift`. Where `held` (bool [B, N])
    the code is the zero. Frantar et al., 2022, https://arxiv.org/abs/2210.17323.
    """
    codes, errors = torch.empty_like(columns), torch.empty_like(columns)
    diagonal = factor.diagonal().tolist()
    rows = zip(*(part.unbind(0) for part in (columns, codes, errors, scales, zeros)), strict=True)
    for at, (column, code, error, scale, zero) in enumerate(rows):
        # Written into the given memory, since here calls are what costs.
        torch.div(column, scale, out=code)
        code.round_().add_(zero).clamp_(0.0, float(max_code))
        if held is not None:
            torch.where(held[at], zero, code, out=code)
        torch.sub(code, zero, out=error)
        torch.addcmul(column, error, scale, value=-1, out=error).div_(diagonal[at])
        columns[at + 1 :].addr_(factor[at, at + 1 :], error, alpha=-1)
        if shift is not None:
            columns[at + 1 :].addr_(shift[at, at + 1 :], column)
    return codes, errors


def gptq_columns(
    native: Native,
    columns: Tensor,
    factor: Tensor,
    scales: Tensor,
    zeros: Tensor,
    groups: Tensor,
    max_code: int,
    *,
    shift: Tensor | None = None,
    held: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """As `gptq_columns_reference`, of scales and zeros [G, N]; groups int64 [B] says whose each
    column is. Sums are in another order: a code on the edge between two may differ."""
    for part in (columns, scales, zeros, groups, *(() if held is None else (held,))):
        assert part.is_contiguous()
    codes, errors = torch.empty_like(columns), torch.empty_like(columns)
    args = ColumnsSolveArgs(
        columns.data_ptr(),
        factor.data_ptr(),
        0 if shift is None else shift.data_ptr(),
        scales.data_ptr(),
        zeros.data_ptr(),
        groups.data_ptr(),
        0 if held is None else held.data_ptr(),
        codes.data_ptr(),
        errors.data_ptr(),
        columns.shape[1],
        len(columns),
        factor.stride(),
        (0, 0) if shift is None else shift.stride(),
        max_code,
    )
    _run(native, "gptq_columns", args)
    return codes, errors


def grid_errors_reference(weights: Tensor, scales: Tensor, zeros: Tensor, max_code: int) -> Tensor:
    """The squared error [C, ...] of rounding weights [..., width] on grids [C, ...]."""
    rows = []
    for scale, zero in zip(scales.unsqueeze(-1), zeros.unsqueeze(-1), strict=True):
        codes = (torch.round(weights / scale) + zero).clamp_(0.0, float(max_code))
        rows.append(codes.sub_(zero).mul_(scale).sub_(weights).square_().sum(dim=-1))
    return torch.stack(rows)


def grid_errors(
    native: Native, weights: Tensor, scales: Tensor, zeros: Tensor, max_code: int
) -> Tensor:
    """As `grid_errors_reference`, of contiguous tensors."""
    assert weights.is_contiguous() and scales.is_contiguous() and zeros.is_contiguous()
    errors = torch.empty_like(scales)
    args = GridErrorsArgs(
        weights.data_ptr(),
        scales.data_ptr(),
        zeros.data_ptr(),
        errors.data_ptr(),
        scales[0].numel(),
        weights.shape[-1],
        len(scales),
        max_code,
    )
    _run(native, "grid_errors", args)
    return errors


def _run(native: Native, name: str, args: ctypes.Structure) -> None:
    threads = torch.get_num_threads()
    parts = 1 if threads == 1 else _PARTS * threads
    native.run_one(call(native.op(name, type(args)), args, parts), threads)
