"""Products of a few rows with a weight as a checkpoint has it, appended to a program."""

import ctypes
from ctypes import c_int32, c_int64, c_void_p

import torch
import torch.nn.functional as F
from torch import Tensor

from infopt.kernels.cpu.program import KINDS, Program


class UnpackedArgs(ctypes.Structure):
    _fields_ = (
        ("rows", c_void_p), ("x", c_void_p), ("weight", c_void_p), ("bias", c_void_p),
        ("y", c_void_p), ("inputs", c_int64), ("outputs", c_int64), ("y_stride", c_int64),
        ("kind", c_int32), ("by_input", c_int32),
    )  # fmt: skip


def unpacked_reference(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """x [R, K] times weight [N, K] transposed, plus bias [N], in float32."""
    return F.linear(x.float(), weight.float(), None if bias is None else bias.float())


def unpacked(
    program: Program,
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    into: Tensor | None = None,
) -> Tensor:
    """As `unpacked_reference`, into columns of a buffer or one of its own.

    The weight is float32 or bfloat16, stored by output or by input.
    """
    outputs, inputs = weight.shape
    by_input = not weight.is_contiguous()
    assert (
        x.is_contiguous() and x.shape[1] == inputs and (not by_input or weight.t().is_contiguous())
    )
    y = program.buffer(outputs) if into is None else into
    program.append(
        "unpacked",
        UnpackedArgs,
        {
            "x": x,
            "weight": weight,
            "bias": None if bias is None else bias.float().contiguous(),
            "y": y,
        },
        {
            "inputs": inputs,
            "outputs": outputs,
            "y_stride": y.stride(0),
            "kind": KINDS[weight.dtype],
            "by_input": by_input,
        },
        parts=program.parts(inputs * outputs),
        changes=y,
    )
    return y


def takes(weight: Tensor) -> bool:
    """Whether a weight is one that `unpacked` can multiply as it is."""
    return (
        weight.device.type == "cpu"
        and weight.dtype in (torch.float32, torch.bfloat16)
        and (weight.is_contiguous() or weight.t().is_contiguous())
    )
