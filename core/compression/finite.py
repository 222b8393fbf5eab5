"""Whether a tensor holds only finite numbers; pure."""

import torch
from torch import Tensor


def all_finite(tensor: Tensor) -> bool:
    """Whether no value is infinite or NaN.

    One that is makes the sum so too, and a sum reads the tensor once where a look at each value
    writes several of its size. Finite values may overflow in a sum: then each is looked at.
    """
    total = tensor.sum(dtype=torch.float32)
    return bool(torch.isfinite(total)) or bool(torch.isfinite(tensor.float()).all())
