"""RMSNorm (Zhang and Sennrich 2019, arXiv 1910.07467), with what comes before it and after it in
one pass over a row: the sum with the residual stream, and the rounding to 8 bits."""

import torch
import triton
import triton.language as tl
from torch import Tensor

from infopt.kernels.gpu import rounding
from infopt.kernels.gpu.rounding import Rounding, on_grid, scale_of
from infopt.kernels.gpu.tile import Card, power_of_two


def reference(x: Tensor, weight: Tensor, eps: float, residual: Tensor | None = None) -> Tensor:
    """x [M, K] -> [M, K] in float64; of the sum, rounded as the stream is kept."""
    if residual is not None:
        x = (residual.double() + x.double()).to(residual.dtype)
    wide = x.double()
    return wide * (wide.square().mean(1, keepdim=True) + eps).rsqrt() * weight.double()


def reference_rounded(
    x: Tensor, weight: Tensor, eps: float, to: Rounding, residual: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """Codes and scales of the same, rounded to the dtype of x before."""
    return rounding.reference(reference(x, weight, eps, residual).to(x.dtype), to)


@triton.jit
def norm_row(
    x, residual, weight, out, scales, columns, x_stride, residual_stride, eps, largest,
    RESIDUAL: tl.constexpr, ROUND: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64)
    at = tl.arange(0, BLOCK)
    there = at < columns
    values = tl.load(x + row * x_stride + at, mask=there, other=0.0).to(tl.float32)
    if RESIDUAL:
        stream = residual + row * residual_stride + at
        values += tl.load(stream, mask=there, other=0.0).to(tl.float32)
        kept = values.to(residual.dtype.element_ty)
        tl.store(stream, kept, mask=there)
        values = kept.to(tl.float32)
    mean = tl.sum(values * values, axis=0) / columns
    gain = tl.load(weight + at, mask=there, other=0.0).to(tl.float32)
    found = (values * (1.0 / tl.sqrt_rn(mean + eps)) * gain).to(x.dtype.element_ty)
    if ROUND:
        wide = found.to(tl.float32)
        scale = scale_of(wide, largest)
        tl.store(out + row * columns + at, on_grid(wide, scale, out.dtype.element_ty), mask=there)
        tl.store(scales + row, scale)
    else:
        tl.store(out + row * columns + at, found, mask=there)


def rms_norm(
    card: Card, x: Tensor, weight: Tensor, eps: float, residual: Tensor | None = None
) -> Tensor:
    """x [M, K] -> [M, K] in its dtype, whatever that of weight [K]: computed in float32.

    With a residual stream [M, K], x is added to it, in place, and the norm is of the sum.
    """
    out = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    _launch(card, x, weight, eps, residual, out, None, None)
    return out


def rms_norm_rounded(
    card: Card, x: Tensor, weight: Tensor, eps: float, to: Rounding, residual: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """The same in 8 bits: codes [M, K], scales float32 [M]."""
    out = torch.empty(x.shape, dtype=to.dtype, device=x.device)
    scales = torch.empty(x.shape[0], dtype=torch.float32, device=x.device)
    _launch(card, x, weight, eps, residual, out, scales, to)
    return out, scales


def _launch(
    card: Card,
    x: Tensor,
    weight: Tensor,
    eps: float,
    residual: Tensor | None,
    out: Tensor,
    scales: Tensor | None,
    to: Rounding | None,
) -> None:
    assert x.stride(1) == 1 and (residual is None or residual.stride(1) == 1)
    assert to is None or to.threshold is None
    count, columns = x.shape
    tile = card.tile("row", columns=columns)
    if count:
        norm_row[(count,)](
            x, x if residual is None else residual, weight, out, out if scales is None else scales,
            columns, x.stride(0), 0 if residual is None else residual.stride(0), eps,
            1.0 if to is None else to.largest, RESIDUAL=residual is not None,
            ROUND=to is not None, BLOCK=power_of_two(columns), **tile.options(),
        )  # fmt: skip
