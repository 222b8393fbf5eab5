import pytest
import torch

from infopt.core.pruning.wanda import wanda_mask, wanda_scores
from infopt.core.recipe.prune import parse_pattern


def inputs(rows: int = 200, columns: int = 32) -> torch.Tensor:
    torch.manual_seed(1)
    return torch.randn(rows, columns) * torch.logspace(-1, 1, columns)


def test_scores_are_weights_times_the_norms_of_their_inputs() -> None:
    x = inputs()
    weight = torch.randn(8, 32)
    scores = wanda_scores(weight, 2 * x.T @ x / len(x))
    wanted = weight.abs() * x.norm(dim=0)
    torch.testing.assert_close(scores, wanted * (2 / len(x)) ** 0.5)


@pytest.mark.parametrize("word", ["0.5", "0.3", "2:4", "1:8"])
def test_each_row_or_group_loses_its_lowest_by_an_independent_count(word: str) -> None:
    x, pattern = inputs(), parse_pattern(word)
    weight = torch.randn(8, 32)
    mask = wanda_mask(weight, 2 * x.T @ x / len(x), pattern)
    size, gone = 32, int(pattern.share * 32)
    if pattern.of is not None and pattern.kept is not None:
        size, gone = pattern.of, pattern.of - pattern.kept
    norms = x.norm(dim=0)
    for row in range(8):
        for start in range(0, 32, size):
            scores = [
                abs(float(weight[row, j])) * float(norms[j]) for j in range(start, start + size)
            ]
            lowest = sorted(range(size), key=lambda j: scores[j])[:gone]
            dropped = [j for j in range(size) if not mask[row, start + j]]
            assert dropped == sorted(lowest)


def test_with_equal_norms_it_is_magnitude_within_rows_and_zero_inputs_go_first() -> None:
    weight = torch.tensor([[1.0, -2, 3, -4], [8, 7, 6, 5]])
    half = parse_pattern("0.5")
    assert wanda_mask(weight, torch.eye(4), half).tolist() == [
        [False, False, True, True],
        [True, True, False, False],
    ]
    silent = torch.diag(torch.tensor([1.0, 1, 0, 0]))
    assert wanda_mask(weight, silent, half).tolist() == [[True, True, False, False]] * 2
