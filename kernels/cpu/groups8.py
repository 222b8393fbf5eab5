"""Products of 4-bit weights in groups with inputs rounded to 8 bits, group by group and row by row.

An approximation of `groups_linear`, which rounds no input: a group's inputs become integers, 127
steps to their largest magnitude. A group's sum is exact then; a row's result is the same to the
last bit whatever rows stand beside it.
"""

import ctypes
from ctypes import c_int32, c_int64, c_void_p
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from infopt.kernels.cpu.dense import TYPES, parts
from infopt.kernels.cpu.groups import GroupPanels, dequantized_groups
from infopt.kernels.cpu.native import Native, call, in_order
from infopt.kernels.cpu.program import Program

BITS = 4
LARGEST = 127
_LINE = 64
_ORDER = (0, 4, 1, 5, 2, 6, 3, 7)
"""Of eight inputs: that in which a word's codes are met."""


class GroupStepsArgs(ctypes.Structure):
    """groups8.h's `GroupStepsArgs`: `group_steps`."""

    _fields_ = (
        ("x", c_void_p), ("steps", c_void_p), ("scales", c_void_p), ("sums", c_void_p),
        ("rows", c_void_p), ("m", c_int64), ("k", c_int64), ("group", c_int64),
        ("x_stride", c_int64), ("steps_stride", c_int64), ("x_type", c_int32),
    )  # fmt: skip


class Groups8Args(ctypes.Structure):
    """groups8.h's `Groups8Args`: `linear_groups8`."""

    _fields_ = (
        ("x", c_void_p), ("x_scales", c_void_p), ("x_sums", c_void_p), ("codes", c_void_p),
        ("scales", c_void_p), ("zeros", c_void_p), ("bias", c_void_p), ("y", c_void_p),
        ("rows", c_void_p), ("m", c_int64), ("n", c_int64), ("k", c_int64), ("group", c_int64),
        ("x_stride", c_int64), ("y_stride", c_int64), ("y_type", c_int32),
        ("scale_type", c_int32), ("zero", c_int32), ("adds", c_int32),
    )  # fmt: skip


@dataclass(frozen=True, slots=True)
class GroupSteps:
    """Rows rounded group by group."""

    steps: Tensor
    """int8 [M, K'], K' >= K: eights of inputs in the kernel's order; beyond K anything."""
    scales: Tensor
    """float32 [M, groups]; NaN where a group was not finite."""
    sums: Tensor
    """int32 [M, groups], of the steps."""


def takes(weight: GroupPanels) -> bool:
    """Whether a weight has this product."""
    return weight.bits == BITS


def steps_buffer(rows: int, weight: GroupPanels) -> GroupSteps:
    """Where `group_steps` writes: rows an odd number of cache lines apart."""
    inputs, groups = weight.shape[1], weight.scales.shape[1]
    steps = torch.empty(rows, (-(-inputs // _LINE) | 1) * _LINE, dtype=torch.int8)
    return GroupSteps(steps, torch.empty(rows, groups), torch.empty(rows, groups).to(torch.int32))


def rounded_groups(x: Tensor, group: int) -> Tensor:
    """x [M, K] as the product sees it, in float64: steps times scales."""
    values = x.float().reshape(len(x), -1, group)
    scales = values.abs().amax(dim=2, keepdim=True) / LARGEST
    scales = torch.where(scales == 0, torch.ones_like(scales), scales)
    steps = (values / scales).round().clamp(-LARGEST, LARGEST)
    return (steps.double() * scales.double()).reshape(x.shape)


def reference(x: Tensor, weight: GroupPanels, bias: Tensor | None) -> Tensor:
    """What `groups8_linear` computes, by torch in float64: [M, N]."""
    rounded = rounded_groups(x, weight.group)
    wide = None if bias is None else bias.double()
    return F.linear(rounded, dequantized_groups(weight).double(), wide)


def groups8_linear(
    native: Native, x: Tensor, weight: GroupPanels, bias: Tensor | None, *, threads: int
) -> Tensor:
    """x float32 or bfloat16 [M, K], bias float32 [N] -> [M, N] in the dtype of x."""
    assert takes(weight) and x.shape[1] == weight.shape[1]
    if x.stride(1) != 1:
        x = x.contiguous()
    steps, y = steps_buffer(len(x), weight), x.new_empty(len(x), weight.outputs)
    before = GroupStepsArgs(**_pointers(_first(x, steps)), **_first_numbers(x, steps, weight))
    args = Groups8Args(
        **_pointers(_second(steps, weight, bias, y)), **_second_numbers(steps, weight, y)
    )
    calls = (
        call(
            native.op("group_steps", GroupStepsArgs), before, parts(len(x), x.shape[1], 1, threads)
        ),
        call(native.op("linear_groups8", Groups8Args), args, parts(len(x), *weight.shape, threads)),
    )
    native.run(in_order(calls), threads)
    return y


def groups8(
    program: Program,
    x: Tensor,
    weight: GroupPanels,
    bias: Tensor | None,
    into: Tensor | None = None,
) -> Tensor:
    """As `groups8_linear`, appended to a program."""
    steps = _shared_steps(program, weight)
    program.append(
        "group_steps",
        GroupStepsArgs,
        _first(x, steps),
        _first_numbers(x, steps, weight),
        parts=program.parts(x.numel()),
    )
    y = program.buffer(weight.outputs) if into is None else into
    program.append(
        "linear_groups8",
        Groups8Args,
        _second(steps, weight, bias, y),
        _second_numbers(steps, weight, y),
        parts=parts(1, *weight.shape, program.threads),
        changes=y,
        weight=weight.codes,
    )
    return y


def _shared_steps(program: Program, weight: GroupPanels) -> GroupSteps:
    """The same for all layers: the program tells its buffers apart by their shapes."""
    inputs, groups = weight.shape[1], weight.scales.shape[1]
    width = (-(-inputs // _LINE) | 1) * _LINE
    steps = program.buffer(1, width // 4).view(torch.int8).view(program.capacity, width)
    sums = program.buffer(1, 1, groups).view(torch.int32).view(program.capacity, groups)
    return GroupSteps(steps, program.buffer(groups, 1).view(program.capacity, groups), sums)


Tensors = dict[str, Tensor | None]


def _pointers(tensors: Tensors) -> dict[str, int | None]:
    return {key: None if t is None else t.data_ptr() for key, t in tensors.items()}


def _first(x: Tensor, steps: GroupSteps) -> Tensors:
    return {"x": x, "steps": steps.steps, "scales": steps.scales, "sums": steps.sums}


def _first_numbers(x: Tensor, steps: GroupSteps, weight: GroupPanels) -> dict[str, int]:
    return {
        "m": len(x),
        "k": weight.shape[1],
        "group": weight.group,
        "x_stride": x.stride(0),
        "steps_stride": steps.steps.stride(0),
        "x_type": TYPES[x.dtype],
    }


def _second(steps: GroupSteps, weight: GroupPanels, bias: Tensor | None, y: Tensor) -> Tensors:
    return {
        "x": steps.steps,
        "x_scales": steps.scales,
        "x_sums": steps.sums,
        "codes": weight.codes,
        "scales": weight.scales,
        "zeros": weight.zeros,
        "bias": bias,
        "y": y,
    }


def _second_numbers(steps: GroupSteps, weight: GroupPanels, y: Tensor) -> dict[str, int]:
    return {
        "m": len(steps.scales),
        "n": weight.outputs,
        "k": weight.shape[1],
        "group": weight.group,
        "x_stride": steps.steps.stride(0),
        "y_stride": y.stride(0),
        "y_type": TYPES[y.dtype],
        "scale_type": TYPES[weight.scales.dtype],
        "zero": weight.zero,
    }
