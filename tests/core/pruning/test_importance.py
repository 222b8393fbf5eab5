"""Scores by closed forms."""

import math

import torch

from infopt.core.pruning.importance import (
    at_random,
    channel_means,
    head_means,
    influence,
    norm_gain,
    over_batches,
    relative_squares,
)


def test_influence_is_one_less_the_cosine() -> None:
    before = torch.tensor([[[1.0, 0.0], [1.0, 0.0], [0.0, 2.0]]])
    after = torch.tensor([[[3.0, 0.0], [0.0, 1.0], [0.0, -1.0]]])
    torch.testing.assert_close(influence(before, after), torch.tensor([0.0, 1.0, 2.0]))


def test_a_channel_scores_the_mean_over_time_and_the_norm_over_the_batch() -> None:
    x = torch.tensor([[[3.0, -1.0], [-3.0, 1.0]], [[4.0, 0.0], [4.0, 0.0]]])  # [2, 2, 2]
    means = channel_means(x)
    torch.testing.assert_close(means, torch.tensor([[3.0, 1.0], [4.0, 0.0]]))
    torch.testing.assert_close(over_batches([means]), torch.tensor([5.0, 1.0]))
    torch.testing.assert_close(over_batches([means[:1], means[1:]]), torch.tensor([5.0, 1.0]))


def test_a_group_scores_the_norms_of_its_heads() -> None:
    # Two groups of two heads of two.
    x = torch.tensor([[[3.0, 4.0, 0.0, 0.0, 1.0, 0.0, 0.0, 2.0]]])
    torch.testing.assert_close(head_means(x, 2, 2), torch.tensor([[5.0, 3.0]]))


def test_the_gain_makes_up_for_channels_that_were_empty() -> None:
    x = torch.randn(2, 5, 8, generator=torch.Generator().manual_seed(0))
    x[..., 6:] = 0.0
    shares = relative_squares(x)
    torch.testing.assert_close(shares.mean(), torch.tensor(1.0))
    assert math.isclose(norm_gain(shares, range(6)), math.sqrt(8 / 6), rel_tol=1e-5)
    assert norm_gain(shares, range(8)) == 1.0 or math.isclose(norm_gain(shares, range(8)), 1.0)


def test_random_scores_repeat() -> None:
    assert torch.equal(at_random(5, 1), at_random(5, 1))
    assert not torch.equal(at_random(5, 1), at_random(5, 2))
