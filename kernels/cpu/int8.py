"""Products of 8-bit integers: inputs rounded row by row, sums exact, then both scales.

Rows are rounded as `core/formats/activation` rounds them, to the same integers; a row's result is
the same to the last bit whatever rows stand beside it.
"""

import ctypes
from ctypes import c_float, c_int32, c_int64, c_void_p
from dataclasses import dataclass

import torch
from torch import Tensor

from infopt.kernels.cpu.dense import PANEL, TYPES, parts
from infopt.kernels.cpu.native import Native, call, in_order

INPUTS = 1 << 16
"""As many as can be summed exactly."""
_UNIT = 4
_LINE = 64
_BIAS = 128
"""What a step is stored with, so that it is not negative."""


class QuantizeArgs(ctypes.Structure):
    """linear.h's `QuantizeArgs`: `quantize_rows`."""

    _fields_ = (
        ("x", c_void_p),
        ("steps", c_void_p),
        ("scales", c_void_p),
        ("fixed", c_void_p),
        ("rows", c_void_p),
        ("m", c_int64),
        ("k", c_int64),
        ("x_stride", c_int64),
        ("steps_stride", c_int64),
        ("largest", c_float),
        ("top", c_int32),
        ("x_type", c_int32),
    )


class Int8Args(ctypes.Structure):
    """linear.h's `Int8Args`: `linear_int8`."""

    _fields_ = (
        ("x", c_void_p),
        ("x_scales", c_void_p),
        ("weight", c_void_p),
        ("scales", c_void_p),
        ("ends", c_void_p),
        ("bias", c_void_p),
        ("y", c_void_p),
        ("rows", c_void_p),
        ("m", c_int64),
        ("n", c_int64),
        ("k", c_int64),
        ("x_stride", c_int64),
        ("y_stride", c_int64),
        ("y_type", c_int32),
        ("adds", c_int32),
    )


@dataclass(frozen=True, slots=True)
class Grid:
    """How a row is rounded: scale = largest magnitude / `largest`, or the one of all; steps within
    [-top, top - 1]."""

    largest: float
    top: int
    fixed: Tensor | None = None
    """float32 [1]"""


@dataclass(frozen=True, slots=True)
class Int8Panels:
    """w = code * scale, one scale an output."""

    codes: Tensor
    """int8 [ceil(outputs / 32), ceil(inputs / 4), 32, 4]; what there is too much is zero."""
    scales: Tensor
    """float32 [outputs]"""
    ends: Tensor
    """int32 [outputs]: 128 times the sum of an output's codes, taken off at the end."""
    inputs: int

    @property
    def shape(self) -> tuple[int, int]:
        return len(self.scales), self.inputs

    @property
    def nbytes(self) -> int:
        return self.codes.nbytes + self.scales.nbytes + self.ends.nbytes


@dataclass(frozen=True, slots=True)
class Steps:
    """Rows rounded to a grid."""

    steps: Tensor
    """uint8 [M, K'], K' >= K: step + 128; beyond K anything."""
    scales: Tensor
    """float32 [M]; NaN where a row was not finite."""


def pack_int8(codes: Tensor, scales: Tensor) -> Int8Panels:
    """Codes int8 [N, K], scales float32 [N]; K at most 65536."""
    outputs, inputs = codes.shape
    assert inputs <= INPUTS, inputs
    filled = torch.nn.functional.pad(codes, (0, -inputs % _UNIT, 0, -outputs % PANEL))
    units = filled.view(-1, PANEL, filled.shape[1] // _UNIT, _UNIT)
    ends = codes.sum(dim=1, dtype=torch.int32).mul_(_BIAS)
    return Int8Panels(units.transpose(1, 2).contiguous(), scales, ends, inputs)


def unpack_int8(weight: Int8Panels) -> Tensor:
    """The codes int8 [N, K] as they were."""
    count, units = weight.codes.shape[:2]
    rows = weight.codes.transpose(1, 2).reshape(count * PANEL, units * _UNIT)
    return rows[: weight.shape[0], : weight.inputs].contiguous()


def reference_steps(x: Tensor, grid: Grid) -> Steps:
    """What `quantize_rows` writes, by torch."""
    values = x.float()
    if grid.fixed is None:
        scales = values.abs().amax(dim=1) / grid.largest
    else:
        scales = grid.fixed.expand(len(x)).clone()
    scales = torch.where(scales == 0, torch.ones_like(scales), scales)
    steps = (values / scales[:, None]).round().clamp(-grid.top, grid.top - 1)
    finite = values.isfinite().all(dim=1)
    scales[~finite] = torch.nan
    steps = torch.where(finite[:, None], steps, torch.zeros_like(steps))
    return Steps((steps + _BIAS).to(torch.uint8), scales)


def reference(steps: Steps, weight: Int8Panels, bias: Tensor | None, dtype: torch.dtype) -> Tensor:
    """What `int8_product` computes, by torch."""
    whole = steps.steps[:, : weight.inputs].to(torch.int64) - _BIAS
    sums = whole @ unpack_int8(weight).to(torch.int64).t()
    y = sums.float().mul_(weight.scales).mul_(steps.scales[:, None])
    return (y if bias is None else y.add_(bias)).to(dtype)


def int8_linear(
    native: Native,
    x: Tensor,
    weight: Int8Panels,
    grid: Grid,
    bias: Tensor | None,
    *,
    threads: int,
) -> Tensor:
    """x float32 or bfloat16 [M, K], bias float32 [N] -> [M, N] in the dtype of x."""
    steps = steps_buffer(len(x), weight.inputs)
    y = x.new_empty(len(x), weight.shape[0])
    if x.stride(1) != 1:
        x = x.contiguous()
    before = quantize_args(x, grid, steps)
    args = int8_args(steps, weight, bias, y)
    count = parts(len(x), *weight.shape, threads)
    calls = (
        call(
            native.op("quantize_rows", QuantizeArgs), before, parts(len(x), x.shape[1], 1, threads)
        ),
        call(native.op("linear_int8", Int8Args), args, count),
    )
    native.run(in_order(calls), threads)
    return y


def steps_buffer(rows: int, inputs: int) -> Steps:
    """Where `quantize_rows` writes: rows an odd number of cache lines apart."""
    lines = -(-inputs // _LINE) | 1
    steps = torch.empty(rows, lines * _LINE, dtype=torch.uint8)
    return Steps(steps, torch.empty(rows))


def quantize_args(
    x: Tensor, grid: Grid, steps: Steps, *, rows: Tensor | None = None
) -> QuantizeArgs:
    """The arguments of `quantize_rows`; `rows`, int64 [1], as in `dense_args`."""
    return QuantizeArgs(
        x.data_ptr(),
        steps.steps.data_ptr(),
        steps.scales.data_ptr(),
        None if grid.fixed is None else grid.fixed.data_ptr(),
        None if rows is None else rows.data_ptr(),
        len(x),
        x.shape[1],
        x.stride(0),
        steps.steps.stride(0),
        grid.largest,
        grid.top,
        TYPES[x.dtype],
    )


def int8_args(
    steps: Steps,
    weight: Int8Panels,
    bias: Tensor | None,
    y: Tensor,
    *,
    rows: Tensor | None = None,
    adds: bool = False,
) -> Int8Args:
    """The arguments of a product into `y`, as `dense_args`; nothing of it is kept alive."""
    return Int8Args(
        steps.steps.data_ptr(),
        steps.scales.data_ptr(),
        weight.codes.data_ptr(),
        weight.scales.data_ptr(),
        weight.ends.data_ptr(),
        None if bias is None else bias.data_ptr(),
        y.data_ptr(),
        None if rows is None else rows.data_ptr(),
        len(steps.scales),
        *weight.shape,
        steps.steps.stride(0),
        y.stride(0),
        TYPES[y.dtype],
        adds,
    )
