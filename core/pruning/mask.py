"""Which weights stay: exact selections of the lowest scores; pure.

A mask is a bool tensor of the weight's shape [N, K], true where a weight stays. As many weights go
as were asked for, to the last one: where scores are equal, those that come first go.
"""

import math

import torch
from torch import Tensor

from infopt.core.recipe.prune import Pattern


def removed_count(total: int, share: float) -> int:
    """How many of `total` a share is: rounded down, so that something always stays."""
    return math.floor(share * total + 1e-9)


def drop_lowest(scores: Tensor, count: int) -> Tensor:
    """The mask [..., K] that drops the `count` lowest scores of each last dimension."""
    if count <= 0:
        return torch.ones_like(scores, dtype=torch.bool)
    border = scores.kthvalue(count, dim=-1, keepdim=True).values
    below, level = scores < border, scores == border
    wanting = count - below.sum(dim=-1, keepdim=True)
    # Weights in 16 bits have many equals: of those at the border only the first ones go.
    return ~(below | (level & (level.cumsum(dim=-1, dtype=torch.int32) <= wanting)))


def row_mask(scores: Tensor, pattern: Pattern) -> Tensor:
    """The mask for scores [N, K] compared within each row, or within each group of an N:M."""
    if pattern.of is None:
        return drop_lowest(scores, removed_count(scores.shape[1], pattern.share))
    return group_mask(scores, pattern)


def layer_mask(scores: Tensor, pattern: Pattern) -> Tensor:
    """The mask for scores [N, K] compared within the whole layer, or each group of an N:M."""
    if pattern.of is None:
        flat = scores.reshape(-1)
        return drop_lowest(flat, removed_count(flat.numel(), pattern.share)).view_as(scores)
    return group_mask(scores, pattern)


def group_mask(scores: Tensor, pattern: Pattern) -> Tensor:
    """Keep the highest N scores of every M neighbours in a row; M divides K."""
    assert pattern.kept is not None and pattern.of is not None
    groups = scores.reshape(*scores.shape[:-1], -1, pattern.of)
    return drop_lowest(groups, pattern.of - pattern.kept).reshape(scores.shape)


def zeros(weight: Tensor) -> int:
    """How many of a tensor's values are 0."""
    return weight.numel() - int(torch.count_nonzero(weight))


def keeps_pattern(weight: Tensor, pattern: Pattern) -> bool:
    """Whether no group of M in a row of a weight [N, K] has more than N values that are not 0."""
    assert pattern.kept is not None and pattern.of is not None
    groups = weight.reshape(*weight.shape[:-1], -1, pattern.of)
    return bool(((groups != 0).sum(dim=-1) <= pattern.kept).all())
