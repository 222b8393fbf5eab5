import pytest
import torch

from infopt.core.pruning.allocate import outlier_share, owl_shares


def test_outliers_are_counted_against_the_mean_of_the_whole_block() -> None:
    first, second = torch.tensor([[1.0, 1.0]]), torch.tensor([[1.0, 1.0, 16.0]])
    # The mean is 4: only the last is above 3 times it.
    assert outlier_share([first, second], 3.0) == 1 / 5
    assert outlier_share([first, second], 5.0) == 0.0
    # Alone, the first layer's own mean would be 1.
    assert outlier_share([first], 0.5) == 1.0


def test_shares_are_linear_in_outliers_over_the_whole_range() -> None:
    """The formula of the paper's code: density = (d - min) 2 L / (max - min), moved to its mean."""
    found = owl_shares([0.0, 0.01, 0.04], [10, 10, 10], 0.7, 0.08)
    kept = torch.tensor([0.0, 0.04, 0.16])
    wanted = 1 - (kept - kept.mean() + 0.3)
    torch.testing.assert_close(torch.tensor(found), wanted)


@pytest.mark.parametrize("share", [0.1, 0.5, 0.95])
def test_the_mean_over_weights_is_the_share_and_no_block_is_emptied(share: float) -> None:
    outliers, weights = [0.1, 0.3, 0.2, 0.9], [100, 400, 50, 10]
    found = owl_shares(outliers, weights, share, 0.2)
    total = sum(s * w for s, w in zip(found, weights, strict=True))
    assert total == pytest.approx(share * sum(weights))
    assert all(0 <= s < 1 for s in found)
    assert sorted(range(4), key=lambda i: -found[i]) == sorted(range(4), key=lambda i: outliers[i])


def test_blocks_that_are_alike_lose_alike() -> None:
    assert owl_shares([0.2, 0.2], [1, 5], 0.6, 0.08) == [0.6, 0.6]
