"""activation(gate) * up (GLU variants; Shazeer 2020, arXiv 2002.05202), and its rounding to 8
bits, in one pass over a row."""

from collections.abc import Mapping

import torch
import torch.nn.functional as F
import triton
import triton.language as tl
from torch import Tensor

from infopt.kernels.gpu import rounding
from infopt.kernels.gpu.rounding import Rounding, on_grid, scale_of
from infopt.kernels.gpu.tile import Card, cdiv, power_of_two

SILU, GELU, GELU_TANH, RELU = 0, 1, 2, 3
ACTIVATIONS: Mapping[str, int] = {"silu": SILU, "gelu": GELU, "gelu_tanh": GELU_TANH, "relu": RELU}
"""By the names that configurations of models have for them."""


def reference(gate_up: Tensor, activation: int) -> Tensor:
    """gate_up [M, 2 K], gate before up -> [M, K] in float64."""
    gate, up = gate_up.double().chunk(2, dim=1)
    match activation:
        case 0:
            return F.silu(gate) * up
        case 1:
            return F.gelu(gate) * up
        case 2:
            return F.gelu(gate, approximate="tanh") * up
        case _:
            return F.relu(gate) * up


def reference_rounded(gate_up: Tensor, activation: int, to: Rounding) -> tuple[Tensor, Tensor]:
    """Codes and scales of the same, rounded to the dtype of gate_up before."""
    return rounding.reference(reference(gate_up, activation).to(gate_up.dtype), to)


@triton.jit
def activated(gate, ACTIVATION: tl.constexpr):
    if ACTIVATION == 0:
        found = gate * tl.sigmoid(gate)
    elif ACTIVATION == 1:
        found = 0.5 * gate * (1.0 + tl.erf(gate * 0.7071067811865476))
    elif ACTIVATION == 2:
        inner = 0.7978845608028654 * (gate + 0.044715 * gate * gate * gate)
        found = gate * tl.sigmoid(2.0 * inner)  # (1 + tanh(z)) / 2
    else:
        found = tl.maximum(gate, 0.0)
    return found


@triton.jit
def gated(gate_up, out, columns, stride, ACTIVATION: tl.constexpr, BLOCK: tl.constexpr):
    """One piece of a row."""
    row = tl.program_id(0).to(tl.int64)
    at = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    there = at < columns
    dtype: tl.constexpr = gate_up.dtype.element_ty
    gate = tl.load(gate_up + row * stride + at, mask=there, other=0.0).to(tl.float32)
    up = tl.load(gate_up + row * stride + columns + at, mask=there, other=0.0).to(tl.float32)
    active = activated(gate, ACTIVATION)
    tl.store(out + row * columns + at, (active * up).to(dtype), mask=there)


@triton.jit
def gated_rounded(
    gate_up, out, scales, columns, stride, largest, ACTIVATION: tl.constexpr, BLOCK: tl.constexpr
):
    """A whole row, since its scale is of all of it."""
    row = tl.program_id(0).to(tl.int64)
    at = tl.arange(0, BLOCK)
    there = at < columns
    dtype: tl.constexpr = gate_up.dtype.element_ty
    gate = tl.load(gate_up + row * stride + at, mask=there, other=0.0).to(tl.float32)
    up = tl.load(gate_up + row * stride + columns + at, mask=there, other=0.0).to(tl.float32)
    found = (activated(gate, ACTIVATION) * up).to(dtype).to(tl.float32)
    scale = scale_of(found, largest)
    tl.store(out + row * columns + at, on_grid(found, scale, out.dtype.element_ty), mask=there)
    tl.store(scales + row, scale)


def gate(card: Card, gate_up: Tensor, activation: int) -> Tensor:
    """gate_up [M, 2 K], gate before up, its rows contiguous -> [M, K] in its dtype."""
    assert gate_up.stride(1) == 1
    count, columns = gate_up.shape[0], gate_up.shape[1] // 2
    out = torch.empty(count, columns, dtype=gate_up.dtype, device=gate_up.device)
    tile = card.tile("gate", columns=columns)
    if count:
        gated[(count, cdiv(columns, tile.constants["BLOCK"]))](
            gate_up, out, columns, gate_up.stride(0), ACTIVATION=activation, **tile.options()
        )
    return out


def gate_rounded(
    card: Card, gate_up: Tensor, activation: int, to: Rounding
) -> tuple[Tensor, Tensor]:
    """The same in 8 bits: codes [M, K], scales float32 [M]."""
    assert gate_up.stride(1) == 1 and to.threshold is None
    count, columns = gate_up.shape[0], gate_up.shape[1] // 2
    out = torch.empty(count, columns, dtype=to.dtype, device=gate_up.device)
    scales = torch.empty(count, dtype=torch.float32, device=gate_up.device)
    tile = card.tile("row", columns=columns)
    if count:
        gated_rounded[(count,)](
            gate_up, out, scales, columns, gate_up.stride(0), to.largest, ACTIVATION=activation,
            BLOCK=power_of_two(columns), **tile.options(),
        )  # fmt: skip
    return out, scales
