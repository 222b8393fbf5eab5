"""OWL: blocks with more outliers lose fewer weights; pure.

Yin et al., 2023, https://arxiv.org/abs/2310.05175.
"""

from collections.abc import Sequence

from torch import Tensor

_MOST = 0.9
"""How far a block's share may go of the way from the mean to all: none is emptied."""


def outlier_share(scores: Sequence[Tensor], times: float) -> float:
    """The share of a block's scores, of all its layers together, above `times` their mean."""
    count = sum(score.numel() for score in scores)
    total = sum(float(score.double().sum()) for score in scores)
    border = times * total / count
    return sum(int((score > border).sum()) for score in scores) / count


def owl_shares(
    outliers: Sequence[float], weights: Sequence[int], share: float, spread: float
) -> list[float]:
    """The share that each block loses, from its share of outliers and its number of weights.

    The more outliers, the less goes: linear in them over a range of 2 `spread`, so that over all
    weights `share` goes. Where a block would come below none, or near to all, every deviation is
    made smaller by one factor.
    """
    least, most = min(outliers), max(outliers)
    if most == least:
        return [share] * len(outliers)
    kept = [(value - least) / (most - least) * 2 * spread for value in outliers]
    mean = sum(k * n for k, n in zip(kept, weights, strict=True)) / sum(weights)
    deviations = [mean - k for k in kept]
    room = min(
        1.0,
        share / max(-min(deviations), 1e-12),
        _MOST * (1 - share) / max(max(deviations), 1e-12),
    )
    return [share + room * deviation for deviation in deviations]
