"""The factor of an inverse Hessian by which GPTQ and SparseGPT spread their errors; pure."""

import torch
from torch import Tensor

from infopt.core.compression.finite import all_finite

_LADDER = (0.02, 0.05, 0.1, 0.2, 0.5)


def inverse_factor(hessian: Tensor, damp: float) -> tuple[Tensor | None, float, str | None]:
    """Upper U with U^T U = (H + damp mean(diag H) I)^-1, the damping used, and a word on fallbacks.

    The ladder: `damp`; more and more of it; a floor of that height under the diagonal as well;
    None (which means rounding).
    """
    mean = hessian.diagonal().mean()
    for share in (damp, *(step for step in _LADDER if step > damp)):
        factor = _factor(hessian, share * mean)
        if factor is not None:
            return factor, share, None if share == damp else f"damping raised to {share:g}"
    floored = hessian.clone()
    floored.diagonal().clamp_(min=float(mean))
    factor = _factor(floored, _LADDER[-1] * mean)
    if factor is not None:
        return factor, _LADDER[-1], "diagonal floored at its mean"
    return None, _LADDER[-1], "rtn: the Hessian has no Cholesky factor"


def _factor(hessian: Tensor, added: Tensor) -> Tensor | None:
    """With J the reversal of order, J H J = L L^T gives U = J L^-1 J: no inverse is ever formed."""
    damped = hessian.clone()
    damped.diagonal().add_(added)
    lower, failed = torch.linalg.cholesky_ex(damped.flip(0, 1))
    if bool(failed):
        return None
    identity = torch.eye(lower.shape[0], dtype=lower.dtype, device=lower.device)
    factor = torch.linalg.solve_triangular(lower, identity, upper=False).flip(0, 1)
    return factor if all_finite(factor) else None
