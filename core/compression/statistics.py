"""Second-order statistics of a linear layer's inputs, and errors measured by them; pure."""

import torch
from torch import Tensor

_PANELS = 4


def accumulate_hessian(hessian: Tensor, inputs: Tensor, seen: int) -> int:
    """Fold inputs [..., K] into the running mean of 2 x x^T; returns how many rows it is now over.

    `hessian` float32 [K, K] is changed in place, and only its upper triangle is meant:
    `complete_hessian` fills the rest.
    """
    rows = inputs.reshape(-1, inputs.shape[-1]).to(torch.float32)
    total = seen + rows.shape[0]
    size = hessian.shape[0]
    step = -(-size // _PANELS)
    for start in range(0, size, step):
        # Panels from the diagonal to the right: 5/8 of the work of the full product.
        panel = hessian[start : start + step, start:]
        panel.addmm_(
            rows[:, start : start + step].T, rows[:, start:], beta=seen / total, alpha=2 / total
        )
    return total


def complete_hessian(hessian: Tensor) -> Tensor:
    """Mirror the upper triangle: float32 [K, K], exactly symmetric."""
    return hessian.triu() + hessian.triu(1).T


def output_power(weight: Tensor, hessian: Tensor | None) -> Tensor:
    """||W x||^2 on average over the inputs x, up to a constant: tr(W H W^T); a scalar.

    Without a Hessian every input counts the same: ||W||^2.
    """
    return ((weight if hessian is None else weight @ hessian) * weight).sum()


def relative_error(weight: Tensor, quantized: Tensor, hessian: Tensor | None) -> float:
    """||(W - Q) X||^2 / ||W X||^2 by way of the Hessian of the inputs; 0 where W X is 0."""
    error = float(output_power(weight - quantized, hessian))
    power = float(output_power(weight, hessian))
    # Rounding can leave a power that is 0 in truth slightly below it.
    return max(error, 0.0) / power if power > 0 else 0.0
