"""A sum that several programs made of parts of: the second half of a product with split inputs."""

import torch
import triton
import triton.language as tl
from torch import Tensor

from infopt.kernels.gpu.tile import cdiv

_BLOCK = 512


def reference(parts: Tensor, bias: Tensor | None) -> Tensor:
    """parts [S, M, N] -> [M, N] in float64."""
    found = parts.double().sum(0)
    return found if bias is None else found + bias.double()


@triton.jit
def add(parts, bias, out, size, columns, SPLIT: tl.constexpr, BIAS: tl.constexpr,
        BLOCK: tl.constexpr):  # fmt: skip
    """In the order of the parts, whoever was done first: the same sum every time."""
    at = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    acc = tl.zeros((BLOCK,), tl.float32)
    for part in tl.static_range(SPLIT):
        acc += tl.load(parts + part * size + at, mask=at < size, other=0.0)
    if BIAS:
        acc += tl.load(bias + at % columns, mask=at < size, other=0.0).to(tl.float32)
    tl.store(out + at, acc.to(out.dtype.element_ty), mask=at < size)


def add_parts(parts: Tensor, bias: Tensor | None, out: Tensor) -> Tensor:
    """parts float32 [S, M, N], summed into out [M, N] of any float dtype, plus bias [N]."""
    assert parts.dtype == torch.float32 and parts.is_contiguous() and out.is_contiguous()
    size = out.numel()
    add[(cdiv(size, _BLOCK),)](
        parts, parts if bias is None else bias, out, size, out.shape[1], SPLIT=parts.shape[0],
        BIAS=bias is not None, BLOCK=_BLOCK, num_warps=4,
    )  # fmt: skip
    return out


def results(like: Tensor, outputs: int, split: int) -> tuple[Tensor, Tensor]:
    """Where the results of a product go, and where its kernel writes: the same, or `split` parts
    that are still to be added up."""
    out = like.new_empty(like.shape[0], outputs)
    if split == 1:
        return out, out
    return out, like.new_empty(split, *out.shape, dtype=torch.float32)
