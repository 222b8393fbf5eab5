"""Products with packed weights, and rows of them, appended to a program."""

import torch
from torch import Tensor

from infopt.kernels.cpu.dense import NAMES, DenseArgs, DensePanels, RowsArgs, parts
from infopt.kernels.cpu.elementwise import embed
from infopt.kernels.cpu.program import Program


def dense(program: Program, x: Tensor, weight: DensePanels, bias: Tensor | None) -> Tensor:
    """As `dense_linear` of x float32 [capacity, K], rounded to the weight's dtype, float32 sums."""
    outputs, inputs = weight.shape
    name = NAMES[weight.panels.dtype]
    given = program.rounded(x) if weight.panels.dtype == torch.bfloat16 else x
    y = program.buffer(outputs)
    program.append(
        f"linear_{name}",
        DenseArgs,
        {"x": given, "weight": weight.panels, "bias": bias, "y": y},
        {
            "m": 0,
            "n": outputs,
            "k": inputs,
            "x_stride": given.stride(0),
            "y_stride": outputs,
            "y_type": 0,
        },
        parts=parts(1, outputs, inputs, program.threads),
        count="m",
        changes=y,
    )
    return y


def packed_embed(program: Program, ids: Tensor, weight: DensePanels, scale: float = 1.0) -> Tensor:
    """As `embed` with a table that is packed."""
    name, width = NAMES[weight.panels.dtype], weight.shape[1]
    found = torch.empty(program.capacity, width, dtype=weight.panels.dtype)
    program.append(
        f"rows_{name}",
        RowsArgs,
        {"weight": weight.panels, "ids": ids, "y": found},
        {"m": 0, "k": width},
        parts=1,
        count="m",
    )
    return embed(program, torch.arange(program.capacity), found, scale)
