"""Second-order statistics of a linear layer's inputs, and errors measured by them; pure."""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor

_PANELS = 8
_ROWS = 4096
_WIDE = 512
"""Columns that a panel has at least where products by tiles are so fast that narrow ones cost."""


@dataclass(frozen=True, slots=True)
class InputStatistics:
    """What is known of the inputs x [rows, K] that a linear layer saw.

    hessian: float32 [K, K], the mean of 2 x x^T. With ranges: abs_mean and abs_max float32 [K],
    and sample float32 [S, K], some of the rows. With a reference: drift float32 [K, K], the mean of
    2 (x' - x) x^T, where x' is what the layer would see in the original model.
    """

    hessian: Tensor
    rows: int
    abs_mean: Tensor | None = None
    abs_max: Tensor | None = None
    sample: Tensor | None = None
    drift: Tensor | None = None

    def divided(self, scales: Tensor) -> "InputStatistics":
        """The statistics of x / scales [K]."""
        outer = scales.unsqueeze(1) * scales
        return InputStatistics(
            hessian=self.hessian / outer,
            rows=self.rows,
            abs_mean=None if self.abs_mean is None else self.abs_mean / scales,
            abs_max=None if self.abs_max is None else self.abs_max / scales,
            sample=None if self.sample is None else self.sample / scales,
            drift=None if self.drift is None else self.drift / outer,
        )


def accumulate_hessian(hessian: Tensor, inputs: Tensor, seen: int) -> int:
    """Fold inputs [..., K] into the running mean of 2 x x^T; returns how many rows it is now over.

    `hessian` float32 [K, K] is changed in place, and only its upper triangle is meant:
    `complete_hessian` fills the rest.
    """
    rows = inputs.reshape(-1, inputs.shape[-1])
    total = seen + rows.shape[0]
    if total == seen:
        return seen  # an expert that no token of the batch was routed to
    hessian.mul_(seen / total)
    size, exact = hessian.shape[0], rows.dtype == torch.bfloat16
    tiles = exact and hessian.device.type == "cpu" and torch.cpu._is_amx_tile_supported()
    step = -(-size // (min(_PANELS, max(2, size // _WIDE)) if tiles else _PANELS))
    with _bfloat16_products(exact):
        for part in torch.split(rows, _ROWS):
            wide = part.to(torch.float32)
            for start in range(0, size, step):
                # From the diagonal to the right: with 8 panels 9/16 of the full product's work.
                panel = hessian[start : start + step, start:]
                panel.addmm_(wide[:, start : start + step].T, wide[:, start:], alpha=2 / total)
    return total


@contextmanager
def _bfloat16_products(exact: bool) -> Iterator[None]:
    """Where factors are bfloat16 in truth, their products are exact in the CPU's units for them,
    and sums are float32 there too: 2 to 4 times as fast where the CPU has such units."""
    matmul = torch.backends.mkldnn.matmul  # type: ignore[attr-defined]  # set by a module hook
    former = matmul.fp32_precision
    try:
        if exact:
            matmul.fp32_precision = "bf16"
        yield
    finally:
        if exact:
            matmul.fp32_precision = former


def complete_hessian(hessian: Tensor) -> Tensor:
    """Mirror the upper triangle: float32 [K, K], exactly symmetric."""
    return hessian.triu() + hessian.triu(1).T


def row_powers(weight: Tensor, hessian: Tensor | None) -> Tensor:
    """||w x||^2 on average over the inputs x, up to a constant, for each row w of a weight: [N].

    Without a Hessian every input counts the same: ||w||^2.
    """
    if hessian is None:
        return (weight * weight).sum(dim=1)
    size = weight.shape[1]
    step = -(-size // _PANELS)
    total = torch.zeros(len(weight), dtype=weight.dtype, device=weight.device)
    for start in range(0, size, step):
        # Symmetric: what lies above the diagonal counts twice; 9/16 of the work of the product.
        panel = weight[:, start : start + step]
        seen = panel @ hessian[start : start + step, start : start + step]
        if start:
            above = hessian[:start, start : start + step]
            seen = seen.addmm_(weight[:, :start], above, alpha=2.0)
        total += (seen * panel).sum(dim=1)
    return total


def output_power(weight: Tensor, hessian: Tensor | None) -> Tensor:
    """||W x||^2 on average over the inputs x, up to a constant: tr(W H W^T); a scalar."""
    return row_powers(weight, hessian).sum()


def error_share(error: Tensor, power: Tensor) -> float:
    """The sum of rows' error powers over that of their output powers; 0 where there is none."""
    whole = float(power.sum())
    # Rounding can leave a power that is 0 in truth slightly below it.
    return max(float(error.sum()), 0.0) / whole if whole > 0 else 0.0


def relative_error(weight: Tensor, quantized: Tensor, hessian: Tensor | None) -> float:
    """||(W - Q) X||^2 / ||W X||^2 by way of the Hessian of the inputs; 0 where W X is 0."""
    return error_share(row_powers(weight - quantized, hessian), row_powers(weight, hessian))
