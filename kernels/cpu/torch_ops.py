"""The native products as ops of torch, `torch.ops.infopt.*`: for torch.compile, and for whoever has
no decoder of ours. Importing this module registers them.

Weights are the tensors of packed ones (`pack_dense`, `pack_groups`, `pack_int8`); inputs are
[M, K] in float32 or bfloat16, and so are results [M, N]. Threads are torch's.
"""

from functools import cache

import torch
from torch import Tensor

from infopt.kernels.cpu import elementwise
from infopt.kernels.cpu.dense import DensePanels
from infopt.kernels.cpu.dense import dense_linear as _dense
from infopt.kernels.cpu.groups import GroupPanels
from infopt.kernels.cpu.groups import groups_linear as _groups
from infopt.kernels.cpu.groups8 import groups8_linear as _groups8
from infopt.kernels.cpu.int8 import Grid, Int8Panels
from infopt.kernels.cpu.int8 import int8_linear as _int8
from infopt.kernels.cpu.native import Native, load
from infopt.kernels.cpu.program import Program


@cache
def _native() -> Native:
    """Raises NativeError where there are no native kernels."""
    return load()


def dense_linear(x: Tensor, panels: Tensor, outputs: int, bias: Tensor | None = None) -> Tensor:
    """x W^T + b, x and W of one dtype; bias float32 [N]."""
    weight = DensePanels(panels, outputs)
    return _dense(_native(), x, weight, bias, threads=torch.get_num_threads())


def groups_linear(
    x: Tensor,
    codes: Tensor,
    scales: Tensor,
    zeros: Tensor | None,
    zero: int,
    outputs: int,
    bias: Tensor | None = None,
) -> Tensor:
    """x W^T + b with W integers of 2, 3, 4 or 8 bits in groups, x as it is."""
    weight = GroupPanels(codes, scales, zeros, zero, outputs)
    return _groups(_native(), x, weight, bias, threads=torch.get_num_threads())


def groups8_linear(
    x: Tensor,
    codes: Tensor,
    scales: Tensor,
    zeros: Tensor | None,
    zero: int,
    outputs: int,
    bias: Tensor | None = None,
) -> Tensor:
    """The same with W of 4 bits and x rounded to 8, group by group: an approximation."""
    weight = GroupPanels(codes, scales, zeros, zero, outputs)
    return _groups8(_native(), x, weight, bias, threads=torch.get_num_threads())


def int8_linear(
    x: Tensor,
    codes: Tensor,
    scales: Tensor,
    ends: Tensor,
    inputs: int,
    largest: float = 127.0,
    top: int = 128,
    fixed: Tensor | None = None,
    bias: Tensor | None = None,
) -> Tensor:
    """x W^T + b with W of 8 bits and x rounded to them: by row, or by the `fixed` scale [1]."""
    weight, grid = Int8Panels(codes, scales, ends, inputs), Grid(largest, top, fixed)
    return _int8(_native(), x, weight, grid, bias, threads=torch.get_num_threads())


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """x / rms(x) * weight over float32 [M, K]."""
    program = Program(_native(), len(x), torch.get_num_threads())
    out = elementwise.norm(program, x.contiguous(), weight, None, eps)
    program.rows = len(x)
    program.run()
    return out


def _outputs(x: Tensor, outputs: int) -> Tensor:
    return x.new_empty(x.shape[0], outputs)


def _register() -> None:
    library = torch.library
    dense = library.custom_op("infopt::dense_linear", dense_linear, mutates_args=())
    dense.register_fake(lambda x, panels, outputs, bias=None: _outputs(x, outputs))
    for name, function in (("groups_linear", groups_linear), ("groups8_linear", groups8_linear)):
        groups = library.custom_op(f"infopt::{name}", function, mutates_args=())
        groups.register_fake(
            lambda x, codes, scales, zeros, zero, outputs, bias=None: _outputs(x, outputs)
        )
    int8 = library.custom_op("infopt::int8_linear", int8_linear, mutates_args=())
    int8.register_fake(
        lambda x, codes, scales, ends, inputs, largest=127.0, top=128, fixed=None, bias=None: (
            _outputs(x, scales.shape[0])
        )
    )
    norm = library.custom_op("infopt::rms_norm", rms_norm, mutates_args=())
    norm.register_fake(lambda x, weight, eps: x.new_empty(x.shape))


_register()
