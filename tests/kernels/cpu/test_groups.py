"""Products with integers in groups against torch's with the dequantized weight."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from infopt.kernels.cpu.groups import (
    BITS,
    GroupPanels,
    dequantized_groups,
    groups_args,
    groups_linear,
    pack_groups,
    packable_groups,
    reference,
    unpack_groups,
)
from infopt.kernels.cpu.groups import GroupsArgs as Args
from infopt.kernels.cpu.native import Native, call

DTYPES = (torch.float32, torch.bfloat16)
# Of sums of float32, relative to those of magnitudes; a unit of bfloat16's last place.
TOLERANCE = {torch.float32: 2e-6, torch.bfloat16: 2**-7}


def made(
    bits: int, n: int, k: int, group: int, *, even: bool, scales: torch.dtype = torch.float16
) -> tuple[Tensor, GroupPanels]:
    """Random codes, and the weight that they are packed into."""
    draw = torch.Generator().manual_seed(bits * n * k + group)
    codes = torch.randint(1 << bits, (n, k), generator=draw).to(torch.uint8)
    steps = (torch.rand(n, k // group, generator=draw) + 0.1).to(scales)
    zeros = torch.randint(1 << bits, (n, k // group), generator=draw).to(torch.uint8)
    return codes, pack_groups(codes, steps, 1 << (bits - 1) if even else zeros, bits)


def close(found: Tensor, x: Tensor, weight: GroupPanels, bias: Tensor | None = None) -> None:
    assert found.dtype == x.dtype and not found.isnan().any()
    wanted = reference(x, weight, bias)
    largest = (x.double().abs() @ dequantized_groups(weight).double().abs().t()).amax()
    error = (found.double() - wanted.double()).abs().max() / largest
    assert error < TOLERANCE[x.dtype], error


@given(
    bits=st.sampled_from(BITS),
    n=st.integers(1, 70),
    blocks=st.integers(1, 6),
    even=st.booleans(),
)
def test_packing_keeps_codes_and_values(bits: int, n: int, blocks: int, even: bool) -> None:
    codes, weight = made(bits, n, 32 * blocks, 32, even=even)
    assert weight.shape == codes.shape and weight.bits == bits and weight.group == 32
    assert torch.equal(unpack_groups(weight), codes)
    padded = -(-n // 32) * 32
    assert weight.codes.nbytes * 8 == padded * 32 * blocks * bits


def test_values_are_code_less_zero_times_scale() -> None:
    codes = torch.arange(64, dtype=torch.uint8).view(1, 64) % 16
    scales, zeros = torch.tensor([[0.5, 2.0]]), torch.tensor([[3, 9]], dtype=torch.uint8)
    found = dequantized_groups(pack_groups(codes, scales, zeros, 4))
    wanted = torch.cat(((codes[:, :32].float() - 3) * 0.5, (codes[:, 32:].float() - 9) * 2), 1)
    assert torch.equal(found, wanted)


def test_what_cannot_be_packed() -> None:
    assert packable_groups(4, 96, 3) and packable_groups(3, 96, 1)
    assert not packable_groups(4, 96, 4) and not packable_groups(4, 100, 1)
    assert not packable_groups(5, 64, 1) and not packable_groups(4, 96, 7)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("bits", BITS)
@pytest.mark.parametrize("even", [True, False])
@pytest.mark.parametrize("m", [1, 2, 3, 7, 12, 29, 250])
@pytest.mark.parametrize(("n", "k", "group"), [(1, 32, 32), (45, 96, 96), (130, 1280, 64)])
def test_product_is_torchs(
    native: Native,
    dtype: torch.dtype,
    bits: int,
    even: bool,
    m: int,
    n: int,
    k: int,
    group: int,
) -> None:
    _, weight = made(bits, n, k, group, even=even)
    x, bias = torch.randn(m, k).to(dtype), torch.randn(n)
    for given_bias, threads in ((bias, 2), (None, 1)):
        found = groups_linear(native, x, weight, given_bias, threads=threads)
        close(found, x, weight, given_bias)


@pytest.mark.parametrize("scales", [torch.float32, torch.float16, torch.bfloat16])
def test_scales_of_each_type(native: Native, scales: torch.dtype) -> None:
    _, weight = made(4, 40, 128, 32, even=True, scales=scales)
    assert weight.scales.dtype == scales
    x = torch.randn(3, 128)
    close(groups_linear(native, x, weight, None, threads=1), x, weight)


def test_scales_that_are_subnormal_halves(native: Native) -> None:
    codes = torch.randint(16, (32, 32)).to(torch.uint8)
    scales = torch.full((32, 1), 6e-8, dtype=torch.float16)
    weight, x = pack_groups(codes, scales, 8, 4), torch.randn(2, 32)
    assert scales[0, 0] > 0
    close(groups_linear(native, x, weight, None, threads=1), x, weight)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("bits", BITS)
@pytest.mark.parametrize("even", [True, False])
def test_a_row_is_the_same_whatever_stands_beside_it(
    native: Native, dtype: torch.dtype, bits: int, even: bool
) -> None:
    _, weight = made(bits, 70, 1024, 64, even=even)
    x = torch.randn(250, 1024).to(dtype)
    alone = torch.cat([groups_linear(native, row[None], weight, None, threads=1) for row in x])
    for m in (2, 3, 5, 8, 12, 17, 40, 250):
        found = groups_linear(native, x[:m], weight, None, threads=2)
        assert torch.equal(found, alone[:m]), m


@pytest.mark.parametrize("bits", BITS)
@pytest.mark.parametrize("group", [1184, 32])
def test_groups_larger_than_what_is_laid_out(native: Native, bits: int, group: int) -> None:
    """Over more rows than are taken together; a row alone as among the others."""
    _, weight = made(bits, 40, 1184, group, even=False)
    x = torch.randn(601, 1184).bfloat16()
    found = groups_linear(native, x, weight, None, threads=2)
    close(found, x, weight)
    for row in (0, 31, 520, 600):
        alone = groups_linear(native, x[row : row + 1], weight, None, threads=1)
        assert torch.equal(alone[0], found[row])


def test_bfloat16_inputs_are_not_rounded_further(native: Native) -> None:
    """In one group, products of 4-bit codes and inputs, and their sum, are exact in float32."""
    codes = torch.randint(16, (32, 64)).to(torch.uint8)
    weight = pack_groups(codes, torch.ones(32, 1), 8, 4)
    x = (torch.randint(-128, 128, (5, 64)) / 16).to(torch.bfloat16)
    y = torch.full((5, 32), torch.nan)
    args = groups_args(x, weight, None, y, None)
    native.run_one(call(native.op("linear_groups", Args), args, 1), 1)
    assert torch.equal(y, x.float() @ (codes.float() - 8).t())
