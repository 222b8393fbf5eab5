"""Products of 8-bit integers against torch's: integers and scales to the last bit."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from infopt.core.formats.activation import ActivationFormat, input_steps
from infopt.core.layers.int8 import Int8Linear
from infopt.kernels.cpu.int8 import (
    Grid,
    Int8Panels,
    QuantizeArgs,
    int8_linear,
    pack_int8,
    quantize_args,
    reference,
    reference_steps,
    steps_buffer,
    unpack_int8,
)
from infopt.kernels.cpu.native import Native, call

DTYPES = (torch.float32, torch.bfloat16)
TOKEN = Grid(127.5, 128)


def made(n: int, k: int) -> Int8Panels:
    draw = torch.Generator().manual_seed(n * k)
    codes = torch.randint(-128, 128, (n, k), dtype=torch.int8, generator=draw)
    return pack_int8(codes, torch.rand(n, generator=draw))


@given(n=st.integers(1, 70), k=st.integers(1, 70))
def test_panels_hold_the_codes(n: int, k: int) -> None:
    weight = made(n, k)
    codes = unpack_int8(weight)
    assert weight.shape == codes.shape == (n, k)
    assert torch.equal(weight.ends, 128 * codes.sum(1, dtype=torch.int32))
    assert weight.codes.int().sum() == codes.int().sum()


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("grid", [TOKEN, Grid(7.5, 8), Grid(0.0, 128, torch.tensor([0.013]))])
@pytest.mark.parametrize(("m", "k"), [(1, 1), (3, 15), (7, 100), (40, 64)])
def test_steps_are_torchs(native: Native, dtype: torch.dtype, grid: Grid, m: int, k: int) -> None:
    x = (torch.randn(m, k) * 3).to(dtype)
    x[0, 0] = 0 if m > 1 else x[0, 0]
    if m > 2:
        x[2] = 0
    found, wanted = steps_buffer(m, k), reference_steps(x, grid)
    found.steps.fill_(7)
    args = quantize_args(x, grid, found)
    native.run_one(call(native.op("quantize_rows", QuantizeArgs), args, 3), 2)
    assert torch.equal(found.steps[:, :k], wanted.steps)
    assert torch.equal(found.scales, wanted.scales)
    assert (found.steps[:, k:] == 7).all()


def test_the_grid_is_that_of_the_formats() -> None:
    x = torch.randn(9, 50)
    form = ActivationFormat("int")
    steps, scales = input_steps(x, form)
    found = reference_steps(x, Grid(form.largest, 128))
    assert torch.equal(found.steps.float() - 128, steps)
    assert torch.equal(found.scales, scales.squeeze(1))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("m", [1, 2, 5, 12, 27, 250])
@pytest.mark.parametrize(("n", "k"), [(1, 1), (33, 30), (64, 128), (95, 1029)])
def test_product_is_torchs_to_the_last_bit(
    native: Native, dtype: torch.dtype, m: int, n: int, k: int
) -> None:
    weight, bias = made(n, k), torch.randn(n)
    x = torch.randn(m, k).to(dtype)
    for given_bias, threads in ((bias, 3), (None, 1)):
        found = int8_linear(native, x, weight, TOKEN, given_bias, threads=threads)
        wanted = reference(reference_steps(x, TOKEN), weight, given_bias, dtype)
        assert torch.equal(found, wanted)


@pytest.mark.parametrize("dtype", DTYPES)
def test_it_is_what_the_layer_computes(native: Native, dtype: torch.dtype) -> None:
    weight, x = made(70, 200), torch.randn(11, 200).to(dtype)
    layer = Int8Linear(unpack_int8(weight), weight.scales, ActivationFormat("int"))
    assert torch.equal(int8_linear(native, x, weight, TOKEN, None, threads=1), layer(x))


def test_the_largest_sums_are_exact(native: Native) -> None:
    k = 1 << 16
    weight = pack_int8(torch.full((2, k), -128, dtype=torch.int8), torch.ones(2))
    x = -torch.ones(1, k)
    found = int8_linear(native, x, weight, Grid(1 / 128, 128), None, threads=1)
    wanted = reference(reference_steps(x, Grid(1 / 128, 128)), weight, None, torch.float32)
    assert torch.equal(found, wanted)


@pytest.mark.parametrize("bad", [torch.nan, torch.inf, -torch.inf])
@pytest.mark.parametrize("grid", [TOKEN, Grid(0.0, 128, torch.tensor([0.013]))])
def test_what_is_not_finite_spoils_its_row_alone(native: Native, bad: float, grid: Grid) -> None:
    weight, x = made(40, 70), torch.randn(5, 70)
    x[3, 69] = bad
    found = int8_linear(native, x, weight, grid, None, threads=1)
    assert found[3].isnan().all() and found[[0, 1, 2, 4]].isfinite().all()


def test_inputs_that_lie_aslant(native: Native) -> None:
    weight, x = made(40, 70), torch.randn(70, 5)
    found = int8_linear(native, x.t(), weight, TOKEN, None, threads=1)
    assert torch.equal(found, _alone(native, x.t().contiguous(), weight))


def _alone(native: Native, x: Tensor, weight: Int8Panels) -> Tensor:
    rows = [int8_linear(native, row[None], weight, TOKEN, None, threads=1) for row in x]
    return torch.cat(rows)
