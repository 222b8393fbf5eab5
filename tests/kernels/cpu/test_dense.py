"""Dense products against torch's, at shapes that fill no panel and no chunk of rows."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from infopt.kernels.cpu.dense import (
    DenseArgs,
    DensePanels,
    RowsArgs,
    dense_args,
    dense_linear,
    dense_rows,
    pack_dense,
    packable,
    reference,
    rows_args,
    unpack_dense,
)
from infopt.kernels.cpu.native import Native, call

DTYPES = (torch.float32, torch.bfloat16)
# Relative to the largest output: of float32 sums, and a unit of bfloat16's last place.
TOLERANCE = {torch.float32: 1e-5, torch.bfloat16: 2**-7}


def weight_of(n: int, k: int, dtype: torch.dtype) -> torch.Tensor:
    return torch.randn(n, k, generator=torch.Generator().manual_seed(n * k)).to(dtype)


def close(found: torch.Tensor, wanted: torch.Tensor, dtype: torch.dtype) -> None:
    assert not found.isnan().any()
    error = (found.double() - wanted.double()).abs().max() / wanted.double().abs().max()
    assert error < TOLERANCE[dtype], error


@given(n=st.integers(1, 100), half=st.integers(1, 40), dtype=st.sampled_from(DTYPES))
def test_panels_hold_the_weight_and_zeros(n: int, half: int, dtype: torch.dtype) -> None:
    weight = weight_of(n, 2 * half, dtype)
    packed = pack_dense(weight)
    assert packed.shape == (n, 2 * half)
    assert torch.equal(unpack_dense(packed), weight)
    assert packed.panels.float().abs().sum() == pytest.approx(
        float(weight.float().abs().sum()), rel=1e-3
    )


def test_what_cannot_be_packed() -> None:
    assert not packable(torch.zeros(4, 3, dtype=torch.bfloat16))
    assert not packable(torch.zeros(4, 4, dtype=torch.float16))
    assert packable(torch.zeros(4, 3))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("m", [1, 2, 3, 5, 12, 13, 37, 250])
@pytest.mark.parametrize(("n", "k"), [(1, 2), (31, 18), (32, 64), (67, 130), (160, 1026)])
@pytest.mark.parametrize("threads", [1, 3])
def test_product_is_torchs(
    native: Native, dtype: torch.dtype, m: int, n: int, k: int, threads: int
) -> None:
    x = torch.randn(m, k).to(dtype)
    packed, bias = pack_dense(weight_of(n, k, dtype)), torch.randn(n)
    for given_bias in (bias, None):
        found = dense_linear(native, x, packed, given_bias, threads=threads)
        close(found, reference(x, packed, given_bias), dtype)


def test_inputs_that_lie_apart_or_aslant(native: Native) -> None:
    packed = pack_dense(weight_of(40, 64, torch.float32))
    wide = torch.randn(9, 200)
    for x in (wide[:, 100:164], wide.t()[:64].t(), wide[::2, :64]):
        close(
            dense_linear(native, x, packed, None, threads=1),
            reference(x, packed, None),
            torch.float32,
        )


@pytest.mark.parametrize("dtype", DTYPES)
def test_a_row_is_the_same_whatever_stands_beside_it(native: Native, dtype: torch.dtype) -> None:
    packed = pack_dense(weight_of(97, 1100, dtype))
    x = torch.randn(300, 1100).to(dtype)
    alone = torch.cat([dense_linear(native, row[None], packed, None, threads=1) for row in x])
    for m in (2, 3, 4, 7, 12, 13, 31, 40, 241, 300):
        found = dense_linear(native, x[:m], packed, None, threads=2)
        assert torch.equal(found, alone[:m]), m


@pytest.mark.parametrize("inputs", [32, 34, 62, 576, 1100])
@pytest.mark.parametrize("rows", [15, 16, 17, 31, 32, 33, 48, 63, 250])
def test_by_tiles_and_what_is_left_of_them(native: Native, rows: int, inputs: int) -> None:
    weight = weight_of(70, inputs, torch.bfloat16)
    packed, x = pack_dense(weight), torch.randn(rows + 1, inputs).bfloat16()
    x[rows] = torch.nan
    wanted = x[:rows].double() @ weight.double().T
    found = dense_linear(native, x[:rows], packed, None, threads=2)
    torch.testing.assert_close(found.double(), wanted, rtol=1e-2, atol=1e-3 * inputs)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("y_dtype", DTYPES)
def test_nothing_beside_the_outputs_is_written(
    native: Native, dtype: torch.dtype, y_dtype: torch.dtype
) -> None:
    packed = pack_dense(weight_of(35, 34, dtype))
    x, y = torch.randn(5, 34).to(dtype), torch.full((7, 80), torch.nan, dtype=y_dtype)
    args = dense_args(x, packed, None, y[1:6, 16:51])
    native.run_one(call(native.op(f"linear_{str(dtype)[6:]}", DenseArgs), args, 3), 2)
    close(y[1:6, 16:51], reference(x.float(), packed, None), torch.bfloat16)
    y[1:6, 16:51] = torch.nan
    assert y.isnan().all()


@pytest.mark.parametrize("dtype", DTYPES)
def test_rows_are_the_weights(native: Native, dtype: torch.dtype) -> None:
    weight = weight_of(75, 50, dtype)
    ids = torch.randint(75, (41,))
    found = dense_rows(native, pack_dense(weight), ids, threads=2)
    assert torch.equal(found, weight[ids])


@pytest.mark.parametrize("dtype", DTYPES)
def test_rows_in_float32_as_many_as_are_told(native: Native, dtype: torch.dtype) -> None:
    weight = weight_of(75, 50, dtype)
    ids, y, told = torch.randint(75, (9,)), torch.full((9, 50), torch.nan), torch.tensor([4])
    packed = pack_dense(weight)
    args = rows_args(packed, ids, y, rows=told)
    native.run_one(call(native.op(f"rows_{str(dtype)[6:]}", RowsArgs), args, 2), 2)
    assert torch.equal(y[:4], weight[ids[:4]].float()) and y[4:].isnan().all()


@pytest.mark.parametrize("dtype", DTYPES)
def test_a_product_may_add_to_as_many_rows_as_are_told(native: Native, dtype: torch.dtype) -> None:
    packed, bias = pack_dense(weight_of(35, 34, dtype)), torch.randn(35)
    x, y, told = torch.randn(5, 34).to(dtype), torch.randn(5, 35), torch.tensor([3])
    wanted = y[:3] + reference(x[:3].float(), packed, bias)
    before = y.clone()
    args = dense_args(x, packed, bias, y, rows=told, adds=True)
    native.run_one(call(native.op(f"linear_{str(dtype)[6:]}", DenseArgs), args, 3), 2)
    close(y[:3], wanted, torch.float32)
    assert torch.equal(y[3:], before[3:])


@pytest.mark.parametrize("dtype", DTYPES)
def test_what_is_not_finite_stays_in_its_row(native: Native, dtype: torch.dtype) -> None:
    x = torch.randn(6, 64).to(dtype)
    x[2, 5], x[4, 7] = torch.nan, torch.inf
    packed = pack_dense(weight_of(33, 64, dtype))
    found = dense_linear(native, x, packed, None, threads=1)
    assert found[2].isnan().all() and not found[4].isfinite().any()
    assert found[[0, 1, 3, 5]].isfinite().all()


def test_a_weight_that_changed_is_told(native: Native) -> None:
    weight = weight_of(40, 64, torch.float32)
    packed = pack_dense(weight)
    wrong = DensePanels(packed.panels.roll(1, 2), packed.outputs)
    x = torch.randn(3, 64)
    assert not torch.allclose(
        dense_linear(native, x, wrong, None, threads=1), reference(x, packed, None)
    )
