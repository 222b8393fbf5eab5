"""Parts of softmaxes, put together."""

from collections.abc import Callable
from types import ModuleType

import pytest
import torch

from infopt.kernels.gpu import merge_splits as module
from infopt.kernels.gpu.merge_splits import reference


def check(
    splits: int,
    head_dim: int,
    dtype: torch.dtype,
    device: torch.device,
    kernels: ModuleType = module,
) -> None:
    torch.manual_seed(0)
    parts = torch.randn(3, 2, splits, head_dim, device=device)
    sums = torch.randn(3, 2, splits, device=device) * 30
    empty = torch.rand(3, 2, splits, device=device) < 0.4
    empty[..., 0] = False
    empty[2, 1] = True  # of no request
    sums[empty], parts[empty] = -torch.inf, torch.nan
    wide = torch.full((3, 5, head_dim), torch.nan, dtype=dtype, device=device)
    kernels.merge_splits(parts, sums, wide[:, :2])
    tolerance = 1e-6 if dtype == torch.float32 else 1.6e-2
    found = wide[:, :2].double()
    torch.testing.assert_close(found, reference(parts, sums), atol=tolerance, rtol=tolerance)
    assert wide[:, 2:].isnan().all()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("head_dim", [16, 80])
@pytest.mark.parametrize("splits", [2, 7, 32])
def test_kernel_equals_reference(
    splits: int, head_dim: int, dtype: torch.dtype, device: torch.device
) -> None:
    check(splits, head_dim, dtype, device)


def test_empty_parts_change_no_bit(device: torch.device) -> None:
    torch.manual_seed(0)
    parts, sums = torch.randn(1, 1, 2, 8, device=device), torch.randn(1, 1, 2, device=device)
    more = torch.full((1, 1, 8, 8), torch.nan, device=device)
    more_sums = torch.full((1, 1, 8), -torch.inf, device=device)
    more[:, :, :2], more_sums[:, :, :2] = parts, sums
    few_out, more_out = torch.empty(2, 1, 1, 8, device=device)
    module.merge_splits(parts, sums, few_out)
    module.merge_splits(more, more_sums, more_out)
    assert torch.equal(few_out, more_out)


@pytest.mark.parametrize(
    ("text", "other"),
    [
        ("acc = acc * kept", "acc = acc"),
        ("total = total * kept", "total = total"),
        ("(first + split) * HEAD_DIM", "(first + split) * BLOCK_D"),
        ("mask=d < HEAD_DIM)\n\n\ndef", "mask=d < BLOCK_D)\n\n\ndef"),
    ],
)
def test_a_kernel_that_is_wrong_is_found(
    text: str,
    other: str,
    device: torch.device,
    mutated: Callable[[ModuleType, str, str], ModuleType],
) -> None:
    with pytest.raises(AssertionError):
        check(7, 80, torch.float32, device, mutated(module, text, other))
