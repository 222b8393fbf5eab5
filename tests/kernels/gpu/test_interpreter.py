"""The interpreter that kernels are tested under: what it computes of bfloat16 and float8.

The tests of the kernels mean as much as these.
"""

import pytest
import torch
import triton
import triton.language as tl
from torch import Tensor

BF16 = torch.bfloat16


@triton.jit
def arithmetic(x, y, out, N: tl.constexpr):
    at = tl.arange(0, N)
    a, b = tl.load(x + at), tl.load(y + at)
    found = a * b + a - b / 2
    found = tl.where(a > b, found, -found)
    tl.store(out + at, tl.maximum(found, b) + 1)


@triton.jit
def sums(x, y, out, N: tl.constexpr):
    at = tl.arange(0, N)
    a = tl.load(x + at[:, None] * N + at[None, :])
    b = tl.load(y + at[:, None] * N + at[None, :])
    product = tl.dot(a, b, input_precision="ieee")
    tl.store(out + at, tl.sum(product, axis=1))
    tl.store(out + N + at, tl.sum(a, axis=1).to(tl.float32))
    tl.store(out + 2 * N + at, tl.max(b, axis=0).to(tl.float32))


@triton.jit
def cast(x, out, N: tl.constexpr):
    at = tl.arange(0, N)
    tl.store(out + at, tl.load(x + at).to(out.dtype.element_ty))


def poisoned(*shape: int, dtype: torch.dtype, device: torch.device) -> Tensor:
    return torch.full(shape, torch.nan, dtype=torch.float32, device=device).to(dtype)


def test_arithmetic_is_of_values_not_of_bits(device: torch.device) -> None:
    torch.manual_seed(0)
    x, y = torch.randn(2, 64, dtype=BF16, device=device)
    out = poisoned(64, dtype=BF16, device=device)
    arithmetic[(1,)](x, y, out, 64)
    found = x * y + x - y / 2
    wanted = torch.maximum(torch.where(x > y, found, -found), y) + 1
    torch.testing.assert_close(out, wanted, atol=2**-5, rtol=2**-7)


def test_products_and_sums(device: torch.device) -> None:
    torch.manual_seed(0)
    x, y = torch.randn(2, 32, 32, dtype=BF16, device=device)
    out = poisoned(3, 32, dtype=torch.float32, device=device)
    sums[(1,)](x, y, out, 32)
    torch.testing.assert_close(out[0], (x.double() @ y.double()).sum(1).float(), atol=1e-4, rtol=0)
    torch.testing.assert_close(out[1], x.float().sum(1), atol=2**-3, rtol=0)
    torch.testing.assert_close(out[2], y.amax(0).float(), atol=0, rtol=0)


@pytest.mark.parametrize("target", [BF16, torch.float16, torch.float8_e4m3fn, torch.float8_e5m2])
@pytest.mark.parametrize("source", [torch.float32, BF16])
def test_casts_round_to_nearest_even(
    source: torch.dtype, target: torch.dtype, device: torch.device
) -> None:
    torch.manual_seed(0)
    # Halves of a last place, values that carry into the exponent, small ones, large ones.
    ties = torch.tensor([1.0625, 1.1875, 1.96875, 15.75, 0.99, 2**-9 * 1.5, 2**-10, 440.0])
    x = torch.cat((ties, -ties, torch.randn(112) * 8)).to(source).to(device)
    out = torch.empty(128, dtype=target, device=device)
    cast[(1,)](x, out, 128)
    torch.testing.assert_close(out.float(), x.to(target).float(), atol=0, rtol=0)


def test_float8_saturates_and_nan_stays(device: torch.device) -> None:
    x = torch.tensor([1e9, -1e9, 449.0, torch.nan], device=device)
    out = torch.empty(4, dtype=torch.float8_e4m3fn, device=device)
    cast[(1,)](x, out, 4)
    assert out[:3].float().tolist() == [448.0, -448.0, 448.0] and out[3].isnan()


def test_integers_become_bfloat16(device: torch.device) -> None:
    x = torch.arange(-128, 128, dtype=torch.int8, device=device)
    out = poisoned(256, dtype=BF16, device=device)
    cast[(1,)](x, out, 256)
    torch.testing.assert_close(out, x.to(BF16), atol=0, rtol=0)
