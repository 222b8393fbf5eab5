"""Products with packed weights, and rows of them, appended to a program."""

import torch
from torch import Tensor

from infopt.kernels.cpu.dense import NAMES, TYPES, DenseArgs, DensePanels, RowsArgs, parts
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
            "m": program.capacity,
            "n": outputs,
            "k": inputs,
            "x_stride": given.stride(0),
            "y_stride": outputs,
            "y_type": 0,
        },
        parts=parts(1, outputs, inputs, program.threads),
        changes=y,
    )
    return y


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
