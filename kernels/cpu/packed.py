"""Products with packed weights, and rows of them, appended to a program.

Inputs and results are float32 [capacity, K] and [capacity, N]; `into` is where a result goes if it
is not to be a buffer of its own: some columns of one.
"""

import ctypes
from ctypes import c_int32, c_int64, c_void_p

import torch
from torch import Tensor

from infopt.kernels.cpu.dense import (
    NAMES,
    PANEL,
    TYPES,
    DenseArgs,
    DensePanels,
    RowsArgs,
    parts,
)
from infopt.kernels.cpu.elementwise import CURVES, Curve
from infopt.kernels.cpu.groups import GroupPanels, GroupsArgs, GroupSumsArgs
from infopt.kernels.cpu.int8 import Grid, Int8Args, Int8Panels, QuantizeArgs, steps_buffer
from infopt.kernels.cpu.program import Program


class ColumnsArgs(ctypes.Structure):
    _fields_ = (
        ("rows", c_void_p), ("x", c_void_p), ("columns", c_void_p), ("out", c_void_p),
        ("rounded", c_void_p), ("rounded_stride", c_int64), ("width", c_int64),
    )  # fmt: skip


class GatedArgs(ctypes.Structure):
    """linear.h's `GatedArgs`: `gated_bfloat16`."""

    _fields_ = (
        ("x", c_void_p), ("weight", c_void_p), ("out", c_void_p), ("rounded", c_void_p),
        ("rows", c_void_p), ("m", c_int64), ("n", c_int64), ("k", c_int64), ("x_stride", c_int64),
        ("rounded_stride", c_int64), ("curve", c_int32),
    )  # fmt: skip


def dense(
    program: Program,
    x: Tensor,
    weight: DensePanels,
    bias: Tensor | None,
    into: Tensor | None = None,
) -> Tensor:
    """As `dense_linear` of x rounded to the weight's dtype."""
    outputs, inputs = weight.shape
    given = program.rounded(x) if weight.panels.dtype == torch.bfloat16 else x
    y = program.buffer(outputs) if into is None else into
    program.append(
        f"linear_{NAMES[weight.panels.dtype]}",
        DenseArgs,
        {"x": given, "weight": weight.panels, "bias": bias, "y": y},
        {
            "m": program.capacity,
            "n": outputs,
            "k": inputs,
            "x_stride": given.stride(0),
            "y_stride": y.stride(0),
            "y_type": TYPES[y.dtype],
        },
        parts=parts(1, outputs, inputs, program.threads),
        changes=y,
        weight=weight.panels,
    )
    return y


def takes_gates(program: Program, weight: DensePanels) -> bool:
    """Whether `gated` does on this CPU what `dense` and then `gate` would."""
    whole = weight.outputs % (2 * PANEL) == 0 and weight.panels.dtype == torch.bfloat16
    return whole and program.has("gated_bfloat16", GatedArgs)


def gated(program: Program, x: Tensor, weight: DensePanels, curve: Curve, *, keeps: bool) -> Tensor:
    """curve(gate) * up of the product, gates before ups in the weight; what it rounds to bfloat16
    is good without `keeps` too, which writes the rest."""
    outputs, inputs = weight.shape
    given, out = program.rounded(x), program.buffer(outputs // 2)
    program.append(
        "gated_bfloat16",
        GatedArgs,
        {"x": given, "weight": weight.panels, "out": out if keeps else None},
        {
            "m": program.capacity,
            "n": outputs // 2,
            "k": inputs,
            "x_stride": given.stride(0),
            "curve": CURVES[curve],
        },
        parts=parts(1, outputs, inputs, program.threads),
        out=out,
        weight=weight.panels,
    )
    return out


def groups(
    program: Program,
    x: Tensor,
    weight: GroupPanels,
    bias: Tensor | None,
    into: Tensor | None = None,
    *,
    dtype: torch.dtype,
) -> Tensor:
    """As `groups_linear` of x rounded to `dtype`, float32 or bfloat16."""
    outputs, inputs = weight.shape
    given = program.rounded(x) if dtype == torch.bfloat16 else x
    shape = {
        "m": program.capacity,
        "k": inputs,
        "group": weight.group,
        "x_stride": given.stride(0),
        "x_type": TYPES[given.dtype],
    }
    sums = None
    if weight.zeros is not None:
        sums = torch.empty(program.capacity, weight.scales.shape[1])
        count = program.parts(given.numel())
        program.append("group_sums", GroupSumsArgs, {"x": given, "sums": sums}, shape, parts=count)
    y = program.buffer(outputs) if into is None else into
    program.append(
        "linear_groups",
        GroupsArgs,
        {
            "x": given,
            "codes": weight.codes,
            "scales": weight.scales,
            "zeros": weight.zeros,
            "sums": sums,
            "bias": bias,
            "y": y,
        },
        {
            **shape,
            "n": outputs,
            "y_stride": y.stride(0),
            "y_type": TYPES[y.dtype],
            "scale_type": TYPES[weight.scales.dtype],
            "bits": weight.bits,
            "zero": weight.zero,
        },
        parts=parts(1, outputs, inputs, program.threads),
        changes=y,
        weight=weight.codes,
    )
    return y


def int8(
    program: Program,
    x: Tensor,
    weight: Int8Panels,
    grid: Grid,
    bias: Tensor | None,
    into: Tensor | None = None,
) -> Tensor:
    """As `int8_linear`."""
    outputs, inputs = weight.shape
    steps = steps_buffer(program.capacity, inputs)
    program.append(
        "quantize_rows",
        QuantizeArgs,
        {"x": x, "steps": steps.steps, "scales": steps.scales, "fixed": grid.fixed},
        {
            "m": program.capacity,
            "k": inputs,
            "x_stride": x.stride(0),
            "steps_stride": steps.steps.stride(0),
            "largest": grid.largest,
            "top": grid.top,
            "x_type": TYPES[x.dtype],
        },
        parts=program.parts(x.numel()),
    )
    y = program.buffer(outputs) if into is None else into
    program.append(
        "linear_int8",
        Int8Args,
        {
            "x": steps.steps,
            "x_scales": steps.scales,
            "weight": weight.codes,
            "scales": weight.scales,
            "ends": weight.ends,
            "bias": bias,
            "y": y,
        },
        {
            "m": program.capacity,
            "n": outputs,
            "k": inputs,
            "x_stride": steps.steps.stride(0),
            "y_stride": y.stride(0),
            "y_type": TYPES[y.dtype],
        },
        parts=parts(1, outputs, inputs, program.threads),
        changes=y,
        weight=weight.codes,
    )
    return y


def columns(program: Program, x: Tensor, order: Tensor) -> Tensor:
    """x[:, order] for an order int32 [K]."""
    assert order.dtype == torch.int32
    out = torch.empty(program.capacity, len(order))
    program.append(
        "columns",
        ColumnsArgs,
        {"x": x, "columns": order, "out": out},
        {"width": len(order)},
        parts=program.parts(out.numel()),
        out=out,
    )
    return out


def packed_embed(program: Program, ids: Tensor, weight: DensePanels) -> Tensor:
    """Rows of a packed weight, as `embed` has those of a table."""
    x = program.buffer(weight.shape[1])
    program.append(
        f"rows_{NAMES[weight.panels.dtype]}",
        RowsArgs,
        {"weight": weight.panels, "ids": ids, "y": x},
        {"m": program.capacity, "k": weight.shape[1], "y_type": TYPES[x.dtype]},
        parts=program.parts(x.numel()),
        changes=x,
    )
    return x
