import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from infopt.core.pruning.mask import (
    drop_lowest,
    group_mask,
    keeps_pattern,
    layer_mask,
    removed_count,
    row_mask,
    zeros,
)
from infopt.core.recipe.prune import parse_pattern


@pytest.mark.parametrize(
    ("total", "share", "count"),
    [(100, 0.29, 29), (10, 0.7, 7), (64, 0.999, 63), (1, 0.9, 0), (3, 0.5, 1), (4096, 0.5, 2048)],
)
def test_a_share_is_rounded_down_but_not_by_floating_point(
    total: int, share: float, count: int
) -> None:
    assert removed_count(total, share) == count


@given(st.lists(st.integers(-2, 2), min_size=1, max_size=24), st.data())
def test_exactly_as_many_go_as_were_asked_for_and_none_that_is_higher(
    values: list[int], data: st.DataObject
) -> None:
    count = data.draw(st.integers(0, len(values)))
    scores = torch.tensor(values, dtype=torch.float32)
    mask = drop_lowest(scores, count)
    assert int((~mask).sum()) == count
    # As a stable sort has it: the first of equals.
    order = torch.argsort(scores, stable=True)
    assert torch.equal(torch.nonzero(~mask).flatten(), order[:count].sort().values)


def test_a_row_a_layer_and_a_group_compare_within_themselves() -> None:
    scores = torch.tensor([[1.0, 2, 3, 4], [5, 6, 7, 8]])
    half = parse_pattern("0.5")
    assert row_mask(scores, half).tolist() == [[False, False, True, True]] * 2
    assert layer_mask(scores, half).tolist() == [[False] * 4, [True] * 4]
    pairs = parse_pattern("1:2")
    wanted = [[False, True, False, True]] * 2
    for choose in (row_mask, layer_mask, group_mask):
        assert choose(scores, pairs).tolist() == wanted


@pytest.mark.parametrize("word", ["1:2", "2:4", "1:4", "3:4", "4:8", "5:16", "7:32"])
def test_every_group_keeps_exactly_n(word: str) -> None:
    pattern = parse_pattern(word)
    assert pattern.of is not None
    scores = torch.randint(0, 3, (6, 96 if pattern.of == 32 else 48), dtype=torch.float32)
    scores = scores[:, : scores.shape[1] // pattern.of * pattern.of]
    mask = group_mask(scores, pattern)
    groups = mask.reshape(6, -1, pattern.of)
    assert (groups.sum(-1) == pattern.kept).all()
    assert keeps_pattern(mask.float(), pattern)
    # Brute force: no dropped score of a group is higher than one that stays.
    for row, kept in zip(
        scores.reshape(-1, pattern.of), groups.reshape(-1, pattern.of), strict=True
    ):
        assert row[~kept].max() <= row[kept].min()


def test_one_weight_too_many_breaks_a_pattern() -> None:
    weight = torch.tensor([[0.0, 1, 2, 0], [1, 1, 1, 0]])
    assert keeps_pattern(weight[:1], parse_pattern("2:4"))
    assert not keeps_pattern(weight, parse_pattern("2:4"))
    assert zeros(weight) == 3
