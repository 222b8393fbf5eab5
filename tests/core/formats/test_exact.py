import pytest
import torch

from infopt.core.errors import UnsupportedError
from infopt.core.formats.exact import exact_cast, in_order, require_order


def test_the_first_dtype_that_loses_nothing_is_taken() -> None:
    dtypes = (torch.bfloat16, torch.float16, torch.float32)
    assert exact_cast(torch.tensor([0.5, 3.0]), dtypes, "x").dtype == torch.bfloat16
    assert exact_cast(torch.tensor([1 + 2**-10]), dtypes, "x").dtype == torch.float16
    assert exact_cast(torch.tensor([1 + 2**-20]), dtypes, "x").dtype == torch.float32
    assert exact_cast(torch.tensor([2.0**100]), dtypes, "x").dtype == torch.bfloat16


@pytest.mark.parametrize("value", [1 + 2**-20, 1e6, 1e-9, float("nan")])
def test_what_would_be_changed_is_refused(value: float) -> None:
    with pytest.raises(UnsupportedError, match="scales of x must be exact in float16"):
        exact_cast(torch.tensor([value]), (torch.float16,), "scales of x")


def test_scattered_groups_are_told_from_ordered_ones() -> None:
    ordered = torch.arange(12, dtype=torch.int32) // 4
    assert in_order(ordered, 3) and not in_order(ordered.flip(0), 3)
    require_order(ordered, 3, "awq")
    with pytest.raises(UnsupportedError, match="awq has no place for groups of scattered columns"):
        require_order(ordered.flip(0), 3, "awq")
