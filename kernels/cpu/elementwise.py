"""What a decode step does between its products: each op in plain torch, and appended to a program.

Buffers are float32; tables and weights are float32 or bfloat16 as said.
"""

import ctypes
from ctypes import c_float, c_int32, c_int64, c_void_p
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from infopt.kernels.cpu.program import KINDS, Program

Curve = Literal["silu", "relu", "gelu", "gelu_tanh"]
CURVES: dict[Curve, int] = {"silu": 0, "relu": 1, "gelu": 2, "gelu_tanh": 3}


class EmbedArgs(ctypes.Structure):
    _fields_ = (
        ("rows", c_void_p), ("ids", c_void_p), ("table", c_void_p), ("x", c_void_p),
        ("width", c_int64), ("scale", c_float), ("kind", c_int32), ("adds", c_int32),
    )  # fmt: skip


class NormArgs(ctypes.Structure):
    _fields_ = (
        ("rows", c_void_p), ("x", c_void_p), ("added", c_void_p), ("weight", c_void_p),
        ("bias", c_void_p), ("out", c_void_p), ("rounded", c_void_p), ("rounded_stride", c_int64),
        ("width", c_int64), ("eps", c_float),
    )  # fmt: skip


class AddArgs(ctypes.Structure):
    _fields_ = (("rows", c_void_p), ("x", c_void_p), ("added", c_void_p), ("width", c_int64))


class AnglesArgs(ctypes.Structure):
    _fields_ = (
        ("rows", c_void_p), ("positions", c_void_p), ("frequencies", c_void_p), ("cos", c_void_p),
        ("sin", c_void_p), ("half", c_int64), ("magnitude", c_float),
    )  # fmt: skip


class GateArgs(ctypes.Structure):
    _fields_ = (
        ("rows", c_void_p), ("x", c_void_p), ("out", c_void_p), ("rounded", c_void_p),
        ("rounded_stride", c_int64), ("inner", c_int64), ("curve", c_int32), ("gated", c_int32),
    )  # fmt: skip


class CapArgs(ctypes.Structure):
    _fields_ = (("rows", c_void_p), ("x", c_void_p), ("width", c_int64), ("cap", c_float))


def embed_reference(ids: Tensor, table: Tensor, scale: float = 1.0) -> Tensor:
    """Rows `ids` [R] of a table [vocabulary, width], times `scale`: float32 [R, width]."""
    return table[ids].float() * scale


def embed(program: Program, ids: Tensor, table: Tensor, scale: float = 1.0) -> Tensor:
    """As `embed_reference` of ids int64 [capacity]."""
    x = program.buffer(table.shape[1])
    _embed(program, ids, table, scale, x, adds=False)
    return x


def embed_onto(program: Program, x: Tensor, ids: Tensor, table: Tensor, scale: float = 1.0) -> None:
    """Add to x [capacity, width] what `embed` would give."""
    _embed(program, ids, table, scale, x, adds=True)


def _embed(
    program: Program, ids: Tensor, table: Tensor, scale: float, x: Tensor, *, adds: bool
) -> None:
    assert table.is_contiguous()
    width = table.shape[1]
    program.append(
        "embed",
        EmbedArgs,
        {"ids": ids, "table": table, "x": x},
        {"width": width, "scale": scale, "kind": KINDS[table.dtype], "adds": adds},
        parts=program.parts(x.numel()),
        changes=x,
    )


def norm_reference(x: Tensor, weight: Tensor, bias: Tensor | None, eps: float) -> Tensor:
    """RMSNorm of rows [R, width], or LayerNorm where there is a bias, in float32."""
    if bias is not None:
        return F.layer_norm(x.float(), weight.shape, weight.float(), bias.float(), eps)
    return F.rms_norm(x.float(), weight.shape, weight.float(), eps)


def norm(
    program: Program,
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    eps: float,
    added: Tensor | None = None,
) -> Tensor:
    """As `norm_reference`; `added` [capacity, width] is first added to x, in place."""
    out = program.buffer(x.shape[1])
    program.append(
        "norm",
        NormArgs,
        {
            "x": x,
            "added": added,
            "weight": weight.float().contiguous(),
            "bias": None if bias is None else bias.float().contiguous(),
            "out": out,
        },
        {"width": x.shape[1], "eps": eps},
        parts=program.parts(x.numel()),
        out=out,
        changes=None if added is None else x,
    )
    return out


def add(program: Program, x: Tensor, added: Tensor) -> None:
    """x += added, both [capacity, width]."""
    numbers = {"width": x.shape[1]}
    tensors, parts = {"x": x, "added": added}, program.parts(x.numel())
    program.append("add", AddArgs, tensors, numbers, parts=parts, changes=x)


def angles_reference(
    positions: Tensor, frequencies: Tensor, magnitude: float
) -> tuple[Tensor, Tensor]:
    """Cosines and sines [R, half] of positions [R] times frequencies float32 [half]."""
    turned = positions[:, None].float() * frequencies
    return turned.cos() * magnitude, turned.sin() * magnitude


def angles(
    program: Program, positions: Tensor, frequencies: Tensor, magnitude: float
) -> tuple[Tensor, Tensor]:
    """As `angles_reference` of positions int64 [capacity]."""
    half = len(frequencies)
    both = torch.empty(2, program.capacity, half)
    cos, sin = both[0], both[1]
    tensors = {
        "positions": positions, "frequencies": frequencies, "cos": cos, "sin": sin,
    }  # fmt: skip
    numbers = {"half": half, "magnitude": magnitude}
    program.append("angles", AnglesArgs, tensors, numbers, parts=program.parts(16 * cos.numel()))
    return cos, sin


def gate_reference(x: Tensor, curve: Curve, gated: bool) -> Tensor:
    """curve(gate) * up of rows [R, 2 inner], gate before up; or curve(x) of rows [R, inner]."""
    gate, up = x.chunk(2, dim=-1) if gated else (x, None)
    match curve:
        case "silu":
            y = F.silu(gate)
        case "relu":
            y = F.relu(gate)
        case "gelu":
            y = F.gelu(gate)
        case "gelu_tanh":
            y = F.gelu(gate, approximate="tanh")
    return y if up is None else y * up


def gate(program: Program, x: Tensor, curve: Curve, gated: bool) -> Tensor:
    """As `gate_reference`."""
    out = program.buffer(x.shape[1] // 2 if gated else x.shape[1])
    numbers = {"inner": out.shape[1], "curve": CURVES[curve], "gated": gated}
    tensors, parts = {"x": x, "out": out}, program.parts(4 * x.numel())
    program.append("gate", GateArgs, tensors, numbers, parts=parts, out=out)
    return out


def cap_reference(x: Tensor, cap: float) -> Tensor:
    """cap * tanh(x / cap)."""
    return cap * torch.tanh(x / cap)


def cap(program: Program, x: Tensor, cap: float) -> None:
    """As `cap_reference`, in place."""
    numbers = {"width": x.shape[1], "cap": cap}
    parts = program.parts(4 * x.numel())
    program.append("cap", CapArgs, {"x": x}, numbers, parts=parts, changes=x)
