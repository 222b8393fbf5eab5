"""Native projections as numbers and tensors, to be kept in a file and taken up again.

What comes from a file is held to what its kernels read: tensors of other shapes would let them read
beyond.
"""

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from infopt.core.layers.linear import Projection
from infopt.core.layers.native import NativeGroups, NativeInt8, NativeLinear
from infopt.kernels.cpu.dense import PANEL, DensePanels
from infopt.kernels.cpu.groups import BITS, BLOCK, GroupPanels
from infopt.kernels.cpu.int8 import INPUTS, Grid, Int8Panels
from infopt.kernels.cpu.native import Native

LAYOUT = 1
"""Another number for another layout of any panels: what was packed before is then packed anew."""
Native3 = NativeLinear | NativeGroups | NativeInt8
_FLOATS = (torch.float32, torch.bfloat16, torch.float16)
_UNITS = {torch.float32: 1, torch.bfloat16: 2}


def parts_of(projection: Projection) -> tuple[dict[str, Any], dict[str, Tensor | None]] | None:
    """Of a native projection, what `taken_up` makes it from; None of others."""
    match projection:
        case NativeLinear(weight=weight, bias=bias):
            return {"kind": "dense", "outputs": weight.outputs}, {
                "panels": weight.panels,
                "bias": bias,
            }
        case NativeGroups(weight=weight, bias=bias, columns=columns):
            numbers = {"kind": "groups", "outputs": weight.outputs, "zero": weight.zero}
            return numbers, {
                "codes": weight.codes,
                "scales": weight.scales,
                "zeros": weight.zeros,
                "bias": bias,
                "columns": columns,
            }
        case NativeInt8(weight=weight, grid=grid, bias=bias):
            numbers = {"kind": "int8", "inputs": weight.inputs}
            return {**numbers, "largest": grid.largest, "top": grid.top}, {
                "codes": weight.codes,
                "scales": weight.scales,
                "ends": weight.ends,
                "fixed": grid.fixed,
                "bias": bias,
            }
    return None


def taken_up(
    native: Native,
    numbers: Mapping[str, Any],
    tensors: Mapping[str, Tensor],
    shape: tuple[int, int],
) -> Native3 | None:
    """The projection [outputs, inputs] of these parts; None where they are not such a one's."""
    bias = tensors.get("bias")
    if not _is(bias, torch.float32, (shape[0],), optional=True):
        return None
    try:
        match numbers["kind"]:
            case "dense":
                return _dense(native, tensors, bias, shape)
            case "groups":
                return _groups(native, numbers, tensors, bias, shape)
            case "int8":
                return _int8(native, numbers, tensors, bias, shape)
    except (LookupError, TypeError, ValueError):
        pass
    return None


def _dense(
    native: Native, tensors: Mapping[str, Tensor], bias: Tensor | None, shape: tuple[int, int]
) -> NativeLinear | None:
    panels = tensors["panels"]
    unit = _UNITS[panels.dtype]
    if shape[1] % unit or panels.shape != (_panels(shape), shape[1] // unit, PANEL, unit):
        return None
    return NativeLinear(native, DensePanels(panels, shape[0]), bias)


def _groups(
    native: Native,
    numbers: Mapping[str, Any],
    tensors: Mapping[str, Tensor],
    bias: Tensor | None,
    shape: tuple[int, int],
) -> NativeGroups | None:
    codes, scales, zero = tensors["codes"], tensors["scales"], numbers["zero"]
    zeros, columns = tensors.get("zeros"), tensors.get("columns")
    bits, groups = codes.shape[3], scales.shape[1]
    count, inputs = _panels(shape), shape[1]
    if not (
        bits in BITS
        and groups > 0
        and inputs % groups == 0
        and inputs // groups % BLOCK == 0
        and _is(codes, torch.int16, (count, inputs // BLOCK, 2, bits, 16, 2))
        and scales.dtype in _FLOATS
        and scales.shape == (count, groups, PANEL)
        and _is(zeros, torch.uint8, (count, groups, PANEL), optional=True)
        and _is(columns, torch.int32, (inputs,), optional=True)
        and type(zero) is int
        and 0 <= zero < 1 << bits
    ):
        return None
    if columns is not None and (int(columns.min()) < 0 or int(columns.max()) >= inputs):
        return None
    weight = GroupPanels(codes, scales, zeros, zero, shape[0])
    return NativeGroups(native, weight, bias, columns)


def _int8(
    native: Native,
    numbers: Mapping[str, Any],
    tensors: Mapping[str, Tensor],
    bias: Tensor | None,
    shape: tuple[int, int],
) -> NativeInt8 | None:
    codes, scales, ends = tensors["codes"], tensors["scales"], tensors["ends"]
    fixed, largest, top = tensors.get("fixed"), float(numbers["largest"]), numbers["top"]
    if not (
        shape[1] <= INPUTS
        and numbers["inputs"] == shape[1]
        and _is(codes, torch.int8, (_panels(shape), -(-shape[1] // 4), PANEL, 4))
        and _is(scales, torch.float32, (shape[0],))
        and _is(ends, torch.int32, (shape[0],))
        and _is(fixed, torch.float32, (1,), optional=True)
        and type(top) is int
        and 0 < top <= 128
        and largest > 0
    ):
        return None
    weight = Int8Panels(codes, scales, ends, shape[1])
    return NativeInt8(native, weight, Grid(largest, top, fixed), bias)


def _panels(shape: tuple[int, int]) -> int:
    return -(-shape[0] // PANEL)


def _is(
    tensor: Tensor | None, dtype: torch.dtype, shape: tuple[int, ...], *, optional: bool = False
) -> bool:
    if tensor is None:
        return optional
    return tensor.dtype == dtype and tensor.shape == shape
