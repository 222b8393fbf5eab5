"""What several programs found of one query's keys, put together: the second half of split KV.

Flash-Decoding (Dao et al. 2023): each part is a softmax of its own and the logarithm, to base 2,
of its sum.
"""

import math

import torch
import triton
import triton.language as tl
from torch import Tensor

from infopt.kernels.gpu.tile import power_of_two


def reference(parts: Tensor, sums: Tensor) -> Tensor:
    """parts [T, heads, splits, head_dim], sums [T, heads, splits], -inf where a part is empty ->
    [T, heads, head_dim] in float64, zeros where all are."""
    weights = (sums.double() * math.log(2)).softmax(-1).nan_to_num(0.0)
    found = torch.where(sums.isfinite()[..., None], parts.double(), 0.0)
    return (weights[..., None] * found).sum(2)


@triton.jit
def merge(
    parts, sums, out, out_stride, splits,
    HEADS: tl.constexpr, HEAD_DIM: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """One query of one head. Parts are added one after the other: empty ones change no bit."""
    token, head = tl.program_id(0).to(tl.int64), tl.program_id(1)
    d = tl.arange(0, BLOCK_D)
    first = (token * HEADS + head) * splits
    highest, total = tl.full((), float("-inf"), tl.float32), tl.zeros((), tl.float32)
    acc = tl.zeros((BLOCK_D,), tl.float32)
    for split in range(0, splits):
        part_sum = tl.load(sums + first + split)
        if part_sum > float("-inf"):
            new = tl.maximum(highest, part_sum)
            kept, weight = tl.exp2(highest - new), tl.exp2(part_sum - new)
            part = tl.load(parts + (first + split) * HEAD_DIM + d, mask=d < HEAD_DIM, other=0.0)
            acc = acc * kept + part * weight
            total = total * kept + weight
            highest = new
    at = out + token * out_stride + head * HEAD_DIM + d
    found = acc / tl.where(total > 0, total, 1.0)  # a row of no request becomes zeros
    tl.store(at, found.to(out.dtype.element_ty), mask=d < HEAD_DIM)


def merge_splits(parts: Tensor, sums: Tensor, out: Tensor) -> None:
    """parts float32 [T, heads, splits, head_dim], sums float32 [T, heads, splits] ->
    out [T, heads, head_dim], whose heads are contiguous.

    Parts whose sum is -inf are not read.
    """
    tokens, heads, splits, head_dim = parts.shape
    merge[(tokens, heads)](
        parts, sums, out, out.stride(0), splits,
        HEADS=heads, HEAD_DIM=head_dim, BLOCK_D=power_of_two(head_dim), num_warps=1,
    )  # fmt: skip
