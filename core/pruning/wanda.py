"""Wanda: weights by what they bring to the output, |w| times the norm of its input; pure.

Sun et al., 2023, https://arxiv.org/abs/2306.11695.
"""

from torch import Tensor

from infopt.core.pruning.mask import row_mask
from infopt.core.recipe.prune import Pattern


def wanda_scores(weight: Tensor, hessian: Tensor) -> Tensor:
    """|w_ij| ||x_j|| of a weight [N, K], up to a factor that all of a layer share.

    `hessian` float32 [K, K] is the mean of 2 x x^T; its diagonal holds the squared norms.
    """
    return weight.abs() * hessian.diagonal().clamp(min=0).sqrt()


def wanda_mask(weight: Tensor, hessian: Tensor, pattern: Pattern) -> Tensor:
    """Which weights [N, K] stay: the highest scores of each row, or of every group of an N:M."""
    return row_mask(wanda_scores(weight, hessian), pattern)
