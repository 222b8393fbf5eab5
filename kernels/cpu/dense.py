"""Products with dense weights in panels of 32 outputs, and rows of such weights.

All rows of a product are summed alike, input by input: a row's result is the same to the last bit
whatever rows stand beside it. bfloat16 products are summed in float32 by pairs of inputs; where
the CPU has an instruction for it (AVX512-BF16), that takes subnormal numbers for zero.
"""

import ctypes
from ctypes import c_int32, c_int64, c_void_p
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from infopt.kernels.cpu.native import Native, call

PANEL = 32
"""Outputs of a panel."""
_STEP = {torch.float32: 1, torch.bfloat16: 2}
"""Inputs that lie side by side, by the weight's dtype."""
TYPES = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2}
"""How ops name a buffer's dtype."""
NAMES = {torch.float32: "float32", torch.bfloat16: "bfloat16"}
# Products below this many multiplications are done by the caller alone.
_SMALL = 1 << 15
_PARTS = 4
# Rows that lie a multiple of two cache lines apart would push each other out of the first cache.
_LINE = 64


class DenseArgs(ctypes.Structure):
    """linear.h's `DenseArgs`: `linear_float32`, `linear_bfloat16`."""

    _fields_ = (
        ("x", c_void_p),
        ("weight", c_void_p),
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


class RowsArgs(ctypes.Structure):
    """linear.h's `RowsArgs`: `rows_float32`, `rows_bfloat16`."""

    _fields_ = (
        ("weight", c_void_p),
        ("ids", c_void_p),
        ("y", c_void_p),
        ("rows", c_void_p),
        ("m", c_int64),
        ("k", c_int64),
        ("y_type", c_int32),
    )


@dataclass(frozen=True, slots=True)
class DensePanels:
    """A weight [outputs, inputs] of float32 or bfloat16."""

    panels: Tensor
    """[ceil(outputs / 32), inputs / step, 32, step], step 1 in float32 and 2 in bfloat16; what the
    last panel has too many is zero."""
    outputs: int

    @property
    def shape(self) -> tuple[int, int]:
        return self.outputs, self.panels.shape[1] * self.panels.shape[3]

    @property
    def nbytes(self) -> int:
        return self.panels.nbytes


def packable(weight: Tensor) -> bool:
    """Whether `pack_dense` takes a weight [outputs, inputs]."""
    step = _STEP.get(weight.dtype)
    return weight.device.type == "cpu" and step is not None and weight.shape[1] % step == 0


def pack_dense(weight: Tensor) -> DensePanels:
    """[outputs, inputs] -> panels; inputs must be even in bfloat16."""
    assert packable(weight), (weight.dtype, weight.shape)
    (outputs, inputs), step = weight.shape, _STEP[weight.dtype]
    panels = torch.zeros(-(-outputs // PANEL), inputs // step, PANEL, step, dtype=weight.dtype)
    whole = outputs // PANEL
    split = weight[: whole * PANEL].reshape(whole, PANEL, inputs // step, step)
    panels[:whole] = split.transpose(1, 2)
    if rest := outputs - whole * PANEL:
        panels[whole, :, :rest] = weight[whole * PANEL :].view(rest, -1, step).transpose(0, 1)
    return DensePanels(panels, outputs)


def unpack_dense(weight: DensePanels) -> Tensor:
    """The weight [outputs, inputs] as it was."""
    count, units, _, step = weight.panels.shape
    rows = weight.panels.transpose(1, 2).reshape(count * PANEL, units * step)
    return rows[: weight.outputs].contiguous()


def reference(x: Tensor, weight: DensePanels, bias: Tensor | None) -> Tensor:
    """What `dense_linear` computes, by torch in float32, rounded once."""
    wide = F.linear(x.float(), unpack_dense(weight).float(), bias)
    return wide.to(x.dtype)


def dense_linear(
    native: Native, x: Tensor, weight: DensePanels, bias: Tensor | None, *, threads: int
) -> Tensor:
    """x [M, K] of the weight's dtype, bias float32 [N] -> [M, N] of that dtype."""
    assert x.dtype == weight.panels.dtype and x.shape[1] == weight.shape[1]
    x = apart(x)
    y = x.new_empty(x.shape[0], weight.outputs)
    args = dense_args(x, weight, bias, y)
    op = native.op(f"linear_{NAMES[x.dtype]}", DenseArgs)
    native.run_one(call(op, args, parts(len(x), weight.outputs, x.shape[1], threads)), threads)
    return y


def dense_args(
    x: Tensor,
    weight: DensePanels,
    bias: Tensor | None,
    y: Tensor,
    *,
    rows: Tensor | None = None,
    adds: bool = False,
) -> DenseArgs:
    """The arguments of a product into `y`, float32 or bfloat16; nothing of it is kept alive.

    `rows`, int64 [1]: where the op reads how many of the rows of x there are. `adds`: to what a y
    of float32 holds.
    """
    return DenseArgs(
        x.data_ptr(),
        weight.panels.data_ptr(),
        None if bias is None else bias.data_ptr(),
        y.data_ptr(),
        None if rows is None else rows.data_ptr(),
        x.shape[0],
        weight.outputs,
        weight.shape[1],
        x.stride(0),
        y.stride(0),
        TYPES[y.dtype],
        adds,
    )


def apart(x: Tensor) -> Tensor:
    """x [M, K], its rows an odd number of cache lines apart where there are several: else they
    would meet in the same few places of a cache."""
    if x.stride(1) != 1:
        x = x.contiguous()
    stride = x.stride(0) * x.element_size()
    if x.shape[0] < 4 or stride % _LINE or stride // _LINE % 2:
        return x
    columns = _LINE // x.element_size()
    wide = x.new_empty(x.shape[0], x.shape[1] + columns)
    return wide[:, : x.shape[1]].copy_(x)


def parts(m: int, n: int, k: int, threads: int) -> int:
    """Into how many parts a product is cut."""
    return 1 if threads == 1 or m * n * k < _SMALL else _PARTS * threads


def dense_rows(native: Native, weight: DensePanels, ids: Tensor, *, threads: int) -> Tensor:
    """Rows int64 [M] of the weight, [M, K]."""
    ids = ids.contiguous()
    y = weight.panels.new_empty(len(ids), weight.shape[1])
    op = native.op(f"rows_{NAMES[weight.panels.dtype]}", RowsArgs)
    args = rows_args(weight, ids, y)
    native.run_one(call(op, args, parts(len(ids), y.shape[1], 1, threads)), threads)
    return y


def rows_args(
    weight: DensePanels, ids: Tensor, y: Tensor, *, rows: Tensor | None = None
) -> RowsArgs:
    """The arguments of a look-up into `y` [M, K], of the weight's dtype or float32, contiguous."""
    return RowsArgs(
        weight.panels.data_ptr(),
        ids.data_ptr(),
        y.data_ptr(),
        None if rows is None else rows.data_ptr(),
        len(ids),
        weight.shape[1],
        TYPES[y.dtype],
    )
