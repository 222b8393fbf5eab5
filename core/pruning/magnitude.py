"""Magnitude pruning: the smallest weights of a layer go; pure."""

from torch import Tensor

from infopt.core.pruning.mask import layer_mask
from infopt.core.recipe.prune import Pattern


def magnitude_mask(weight: Tensor, pattern: Pattern) -> Tensor:
    """Which weights [N, K] stay: the largest |w| of the layer, or of every group of an N:M.

    Han et al., 2015, https://arxiv.org/abs/1506.02626.
    """
    return layer_mask(weight.abs(), pattern)
