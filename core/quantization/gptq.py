"""GPTQ: round column by column, and let the columns to come make up for each error.

Frantar et al., 2022, https://arxiv.org/abs/2210.17323. Pure functions: no module, hook or device.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from infopt.core.compression.factor import inverse_factor
from infopt.core.formats.number import IntegerFormat, QuantizedWeight
from infopt.core.hardware.native import find_native
from infopt.core.quantization.grid import Grid, make_grid
from infopt.core.quantization.nearest import as_quantized, held_zeros, quantize_nearest
from infopt.kernels.cpu.solve import gptq_columns, gptq_columns_reference

_BLOCK = 128
_LEAF = 16


@dataclass(frozen=True, slots=True)
class GptqResult:
    """The codes, and what had to be done to get them.

    damp: the share of the mean diagonal that was added; fallback: None, or in words how far the
    ladder was climbed.
    """

    weight: QuantizedWeight
    damp: float
    fallback: str | None


def gptq(
    weight: Tensor,
    hessian: Tensor,
    number_format: IntegerFormat,
    grid: Grid,
    *,
    act_order: bool = True,
    mse: bool = True,
    damp: float = 0.01,
    block: int = _BLOCK,
    drift: Tensor | None = None,
) -> GptqResult:
    """Quantize a weight [N, K] under a Hessian float32 [K, K] of its inputs; `grid` is [N, G].

    With `act_order` columns go by falling diagonal, on the given grids (static groups); without, a
    group's grid is made anew when its turn comes, from its weights as corrected by then, with or
    without `mse`; then only rounding uses `grid`. Inputs that are always 0 leave their columns to
    rounding, and the zeros of a pruned weight stay. `drift` float32 [K, K], the mean of
    2 (x' - x) x^T against the inputs x' of the original model, lets later columns make up for what
    the inputs are off already (GPTAQ; Li et al., 2025, https://arxiv.org/abs/2504.02692).
    """
    diagonal = hessian.diagonal()
    dead = diagonal <= 0
    if bool(dead.all()):
        fallback = "rtn: no input but zeros reached this layer"
        return GptqResult(quantize_nearest(weight, number_format, grid), 0.0, fallback)
    prepared = hessian.clone()
    prepared.diagonal()[dead] = diagonal[~dead].mean()
    order = torch.argsort(prepared.diagonal(), descending=True, stable=True) if act_order else None
    if order is not None:
        prepared = prepared[order][:, order]
    factor, damp, climbed = inverse_factor(prepared, damp)
    if factor is None:
        return GptqResult(quantize_nearest(weight, number_format, grid), damp, climbed)
    columns, held = weight.float().T, held_zeros(weight)
    if order is None:
        shift = _shift(drift, factor)
        solver = _Solver(columns.contiguous(), factor, shift, number_format, _rows(held))
        codes, grid = _sweep_dynamic(solver, block, mse)
    else:
        moved = None if drift is None else drift[order][:, order]
        shift = _shift(moved, factor)
        solver = _Solver(columns[order], factor, shift, number_format, _rows(held, order))
        codes = _sweep_static(solver, block, grid, order)
    return GptqResult(as_quantized(codes.T, grid, number_format), damp, climbed)


def _rows(held: Tensor | None, order: Tensor | None = None) -> Tensor | None:
    """[N, K] as columns are solved: [K, N], in their order."""
    if held is None:
        return None
    return held.T.contiguous() if order is None else held.T[order]


def _shift(drift: Tensor | None, factor: Tensor) -> Tensor | None:
    """What each column adds to those behind it on account of the drift: triu(D U^T, 1) U."""
    return None if drift is None else (drift @ factor.T).triu(1) @ factor


@dataclass(frozen=True, slots=True)
class _Solver:
    """The columns [K, N] of a weight on their way, changed in place, and what corrects them."""

    columns: Tensor
    factor: Tensor
    shift: Tensor | None
    number_format: IntegerFormat
    held: Tensor | None = None
    """Where weights are 0 and stay so."""

    def quantize(self, start: int, grid: Grid, groups: Tensor) -> Tensor:
        """Round the columns from `start` on; correct all behind them; returns codes [B, N].

        grid: scales and zeros [G, N]; groups: int64 [B], whose each column is.
        """
        stop = start + len(groups)
        block = _Block(
            self.columns[start:stop],
            self.factor[start:stop, start:stop],
            None if self.shift is None else self.shift[start:stop, start:stop],
            None if self.held is None else self.held[start:stop],
            grid,
            groups,
            self.number_format.max_code,
        )
        codes, errors = block.solve()
        behind = self.columns[stop:]
        behind.addmm_(self.factor[start:stop, stop:].T, errors, alpha=-1)
        if self.shift is not None:
            behind.addmm_(self.shift[start:stop, stop:].T, block.columns)
        return codes


@dataclass(frozen=True, slots=True)
class _Block:
    """Neighbouring columns [B, N] that are solved before those behind them are corrected."""

    columns: Tensor
    factor: Tensor
    shift: Tensor | None
    held: Tensor | None
    grid: Grid
    groups: Tensor
    max_code: int

    def solve(self) -> tuple[Tensor, Tensor]:
        """Codes and errors [B, N]; the columns become what was rounded."""
        native = find_native("auto") if self.columns.device.type == "cpu" else None
        if native is not None:
            scales, zeros = self.grid.scale, self.grid.zero
            given = (native, self.columns, self.factor, scales, zeros, self.groups, self.max_code)
            return gptq_columns(*given, shift=self.shift, held=self.held)
        codes, errors = torch.empty_like(self.columns), torch.empty_like(self.columns)
        self._solve_part(codes, errors, 0, len(codes))
        return codes, errors

    def _solve_part(self, codes: Tensor, errors: Tensor, first: int, last: int) -> None:
        """Half by half: corrections between the halves are one product, not many rank-one ones."""
        if last - first <= _LEAF:
            part, groups = slice(first, last), self.groups[first:last]
            codes[part], errors[part] = gptq_columns_reference(
                self.columns[part],
                self.factor[part, part],
                self.grid.scale[groups],
                self.grid.zero[groups],
                self.max_code,
                shift=None if self.shift is None else self.shift[part, part],
                held=None if self.held is None else self.held[part],
            )
            return
        middle = first + (last - first + 1) // 2
        self._solve_part(codes, errors, first, middle)
        behind = self.columns[middle:last]
        behind.addmm_(self.factor[first:middle, middle:last].T, errors[first:middle], alpha=-1)
        if self.shift is not None:
            behind.addmm_(self.shift[first:middle, middle:last].T, self.columns[first:middle])
        self._solve_part(codes, errors, middle, last)


def _sweep_static(solver: _Solver, block: int, grid: Grid, order: Tensor) -> Tensor:
    """Codes [K, N] in the original order; the solver's columns are in the order given."""
    groups = order // (order.numel() // grid.scale.shape[1])
    lying = Grid(grid.scale.T.contiguous(), grid.zero.T.contiguous())
    codes = torch.empty_like(solver.columns)
    for start in range(0, len(order), block):
        part = slice(start, start + block)
        codes[order[part]] = solver.quantize(start, lying, groups[part])
    return codes


def _sweep_dynamic(solver: _Solver, block: int, mse: bool) -> tuple[Tensor, Grid]:
    """Codes [K, N] and grids [N, G]; a group's grid is made at its turn.

    Blocks end where groups do, so that every weight of a group is up to date when its grid is made.
    """
    total = solver.columns.shape[0]
    size = solver.number_format.group_size or total
    block = min(block, size)
    codes = torch.empty_like(solver.columns)
    made: list[Grid] = []
    for first in range(0, total, size):
        group = solver.columns[first : first + size].T
        made.append(make_grid(group, solver.number_format, mse=mse))
        lying = Grid(made[-1].scale[None], made[-1].zero[None])
        for start in range(first, first + size, block):
            count = min(block, first + size - start)
            groups = torch.zeros(count, dtype=torch.int64, device=codes.device)
            codes[start : start + count] = solver.quantize(start, lying, groups)
    scale, zero = (
        torch.stack(parts, dim=1) for parts in ([g.scale for g in made], [g.zero for g in made])
    )
    return codes, Grid(scale, zero)
