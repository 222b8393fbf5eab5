"""How much blocks, heads and channels matter; pure functions on activations.

Minitron (Muralidharan et al. 2024, arXiv 2407.14679): mean over the sequence of |activation|, then
the L2 norm over the batch. Blocks: block influence (Men et al. 2024, ShortGPT, arXiv 2403.03853).
"""

from collections.abc import Sequence

import torch
from torch import Tensor


def influence(before: Tensor, after: Tensor) -> Tensor:
    """1 - cos(before, after) of each token of hidden states [..., h]: float32 [tokens].

    The mean over tokens is a block's influence: 0 for a block that turns nothing, at most 2.
    """
    rows = [part.reshape(-1, part.shape[-1]).to(torch.float32) for part in (before, after)]
    return 1 - torch.nn.functional.cosine_similarity(rows[0], rows[1], dim=1)


def channel_means(activations: Tensor) -> Tensor:
    """[batch, length, K] to the mean over the sequence of |channel|, float32 [batch, K]."""
    return activations.to(torch.float32).abs().mean(dim=1)


def head_means(outputs: Tensor, groups: int, queries: int) -> Tensor:
    """What heads return [batch, length, groups * queries * d] to float32 [batch, groups].

    The mean over the sequence of the L2 norm of each head's output, summed over a group's heads.
    """
    batch, length, _ = outputs.shape
    heads = outputs.to(torch.float32).reshape(batch, length, groups, queries, -1)
    means: Tensor = heads.norm(dim=-1).mean(dim=1).sum(dim=-1)
    return means


def over_batches(means: Sequence[Tensor]) -> Tensor:
    """The L2 norm over all samples of means [batch, K] each: [K]."""
    found: Tensor = torch.cat(list(means)).norm(dim=0)
    return found


def relative_squares(inputs: Tensor) -> Tensor:
    """x^2 / mean(x^2) of each token of [..., h], averaged over tokens: [h] with a mean of 1.

    How much of what an RMSNorm divides by is a channel's own.
    """
    squares = inputs.reshape(-1, inputs.shape[-1]).to(torch.float32).square()
    return (squares / squares.mean(dim=1, keepdim=True).clamp_min(1e-30)).mean(dim=0)


def norm_gain(shares: Tensor, kept: Sequence[int]) -> float:
    """What an RMSNorm's gain is multiplied by when only `kept` channels stay.

    `shares` [h] as `relative_squares` gives them. The norm then divides by the size of the channels
    that stay, which this corrects to that of all: exactly where those that go are zero.
    """
    return float(shares[list(kept)].mean().clamp_min(0).sqrt())


def at_random(units: int, seed: int) -> Tensor:
    """A score for each unit that knows nothing: [units] in [0, 1)."""
    return torch.rand(units, generator=torch.Generator().manual_seed(seed))
