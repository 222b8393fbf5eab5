"""Whether a tensor holds only finite numbers."""

import pytest
import torch

from infopt.core.compression.finite import all_finite


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("value", [torch.inf, -torch.inf, torch.nan])
def test_one_value_that_is_not_is_found(dtype: torch.dtype, value: float) -> None:
    tensor = torch.randn(7, 300).to(dtype)
    assert all_finite(tensor)
    tensor[3, 77] = value
    assert not all_finite(tensor)


def test_infinities_that_cancel_are_found() -> None:
    assert not all_finite(torch.tensor([torch.inf, -torch.inf, 1.0]))


def test_a_sum_that_overflows_is_no_fault() -> None:
    assert all_finite(torch.full((4,), torch.finfo(torch.float32).max))


def test_none_at_all_is_finite() -> None:
    assert all_finite(torch.zeros(0))
