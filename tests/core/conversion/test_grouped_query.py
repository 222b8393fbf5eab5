import pytest
import torch

from infopt.core.conversion.grouped_query import (
    check_groups,
    pool_heads,
    pool_rows,
    spread_heads,
    spread_rows,
    within_groups,
)


def test_neighbours_become_their_mean() -> None:
    weight = torch.tensor([[1.0], [10.0], [3.0], [30.0], [5.0], [50.0], [9.0], [90.0]])
    # Four heads of two rows: the first two are joined, and the last two.
    assert pool_heads(weight, 4, 2).flatten().tolist() == [2.0, 20.0, 7.0, 70.0]
    assert pool_heads(weight, 4, 1).flatten().tolist() == [4.5, 45.0]
    assert pool_heads(weight[:, 0], 4, 2).tolist() == [2.0, 20.0, 7.0, 70.0]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_as_many_groups_as_heads_change_no_bit(dtype: torch.dtype) -> None:
    weight = torch.randn(12, 5).to(dtype)
    weight[0, 0] = -0.0
    found = pool_heads(weight, 4, 4)
    assert found.dtype == dtype
    assert torch.equal(found.view(torch.uint8), weight.view(torch.uint8))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("groups", [1, 2, 3, 6])
def test_equal_heads_lose_nothing(dtype: torch.dtype, groups: int) -> None:
    few = torch.randn(groups * 4, 7).to(dtype)
    many = spread_heads(few, 6, groups)
    assert many.shape == (24, 7)
    assert torch.equal(pool_heads(many, 6, groups), few)
    assert within_groups(many, 6, groups) == 0.0


def test_the_mean_is_taken_in_float32() -> None:
    weight = (torch.randn(8, 64) * 3).to(torch.bfloat16)
    wanted = weight.double().view(2, 2, 2, 64).mean(1).view(4, 64)
    found = pool_heads(weight, 4, 2)
    assert torch.equal(found, wanted.to(torch.bfloat16))


def test_fused_rows_are_joined_apart() -> None:
    queries, keys, values = torch.randn(12, 3), torch.randn(8, 3), torch.randn(8, 3)
    fused = torch.cat([queries, keys, values])
    parts = [queries, pool_heads(keys, 4, 2), pool_heads(values, 4, 2)]
    assert torch.equal(pool_rows(fused, 4, 2, before=12), torch.cat(parts))
    again = spread_rows(torch.cat(parts), 4, 2, before=12)
    assert again.shape == fused.shape
    assert torch.equal(pool_rows(again, 4, 2, before=12), torch.cat(parts))


def test_the_distance_from_the_mean() -> None:
    weight = torch.tensor([1.0, 3.0, 2.0, 2.0])
    # Means 2 and 2: distances 1, 1, 0, 0 of a power of 18.
    assert within_groups(weight, 4, 2) == pytest.approx(2 / 18)
    assert within_groups(torch.zeros(4), 4, 2) == 0.0


def test_what_cannot_be_joined() -> None:
    assert check_groups(8, 8) is None and check_groups(8, 2) is None and check_groups(3, 1) is None
    assert "divides them: 1, 2, 3, 6" in str(check_groups(6, 4))
    assert "cannot become 16" in str(check_groups(8, 16))
    assert "at least" in str(check_groups(8, 0))
    with pytest.raises(ValueError, match="not of 3 heads"):
        pool_heads(torch.zeros(8), 3, 1)
    with pytest.raises(ValueError, match="as many values"):
        pool_rows(torch.zeros(9), 4, 2, before=4)
