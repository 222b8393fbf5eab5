from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from infopt.core.formats.activation import ActivationFormat, round_inputs
from infopt.core.layers.int8 import Int8Linear, float_product, int8_product

FORMATS = {
    "by token": ActivationFormat("int"),
    "4 bits": ActivationFormat("int", bits=4),
    "static": ActivationFormat("int", strategy="tensor", dynamic=False),
    "outliers kept": ActivationFormat("int", outlier_threshold=2.0),
}
SHAPES = [(1, 8, 8), (3, 7, 5), (17, 33, 96), (2, 40, 2500)]


def layer(form: ActivationFormat, out: int, into: int, **more: Any) -> Int8Linear:
    torch.manual_seed(out)
    return Int8Linear(
        codes=torch.randint(-128, 128, (out, into), dtype=torch.int8),
        scales=torch.rand(out) / 100,
        activation=form,
        bias=torch.randn(out),
        input_scale=None if form.dynamic else torch.tensor([0.02]),
        **more,
    )


def emulated(int8: Int8Linear, x: Tensor) -> Tensor:
    """In float64: what the layer means."""
    weight = int8.codes.double() * int8.scales.double().unsqueeze(1)
    inputs = round_inputs(x, int8.activation, int8.input_scale).double()
    assert int8.bias is not None
    return F.linear(inputs, weight, int8.bias.double())


@pytest.mark.parametrize("form", FORMATS.values(), ids=FORMATS)
@pytest.mark.parametrize(("rows", "out", "into"), SHAPES)
def test_it_is_the_product_of_what_was_rounded(
    form: ActivationFormat, rows: int, out: int, into: int
) -> None:
    int8 = layer(form, out, into)
    x = torch.randn(rows, into)
    found, wanted = int8(x), emulated(int8, x)
    assert found.dtype == torch.float32
    # Integer sums are exact: what is left is the rounding of some float32 factors.
    assert (found - wanted).abs().max() <= 2e-6 * wanted.abs().max()


@pytest.mark.parametrize("form", FORMATS.values(), ids=FORMATS)
def test_a_row_does_not_depend_on_the_others(form: ActivationFormat) -> None:
    int8 = layer(form, 24, 72)
    x = torch.randn(33, 72)
    x[5, 7] = 50.0  # an outlier in one row is none in the others
    together = int8(x)
    exactly = form.outlier_threshold is None
    for row in range(33):
        alone = int8(x[row : row + 1])[0]
        if exactly:
            assert torch.equal(alone, together[row])
        else:
            torch.testing.assert_close(alone, together[row], rtol=1e-5, atol=1e-5)


def test_outliers_matter_and_are_kept() -> None:
    x = torch.randn(4, 64)
    x[:, 3] *= 300
    kept, cut = layer(FORMATS["outliers kept"], 32, 64), layer(FORMATS["by token"], 32, 64)
    exact = F.linear(x, kept.codes * kept.scales.unsqueeze(1), kept.bias)
    assert (kept(x) - exact).abs().max() < 0.1 * (cut(x) - exact).abs().max()


@pytest.mark.parametrize("form", FORMATS.values(), ids=FORMATS)
@pytest.mark.parametrize("poison", [torch.nan, torch.inf])
def test_what_is_not_finite_shows(form: ActivationFormat, poison: float) -> None:
    x = torch.randn(3, 16)
    x[1, 2] = poison
    found = layer(form, 8, 16)(x)
    assert not bool(torch.isfinite(found[1]).all())
    assert bool(torch.isfinite(found[[0, 2]]).all())


def test_batches_and_dtypes_come_back_as_they_went() -> None:
    int8 = layer(FORMATS["by token"], 8, 16)
    found = int8(torch.randn(2, 3, 16, dtype=torch.bfloat16))
    assert found.shape == (2, 3, 8) and found.dtype == torch.bfloat16
    assert int8.nbytes == 8 * 16 + 4 * 8 + 4 * 8


@pytest.mark.parametrize(("rows", "out", "into"), SHAPES)
def test_both_products_are_exact(rows: int, out: int, into: int) -> None:
    a = torch.randint(-128, 128, (rows, into), dtype=torch.int8)
    b = torch.full((out, into), -128, dtype=torch.int8)
    wanted = (a.long() @ b.long().t()).to(torch.int32)
    assert torch.equal(float_product(a, b), wanted)
    assert torch.equal(int8_product(a, b), wanted)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no NVIDIA GPU")
@pytest.mark.parametrize(("rows", "out", "into"), [*SHAPES, (1, 64, 2048), (40, 64, 2048)])
def test_the_product_on_a_gpu_is_exact(rows: int, out: int, into: int) -> None:
    a = torch.randint(-128, 128, (rows, into), dtype=torch.int8)
    b = torch.randint(-128, 128, (out, into), dtype=torch.int8)
    wanted = (a.long() @ b.long().t()).to(torch.int32)
    assert torch.equal(int8_product(a.cuda(), b.cuda()).cpu(), wanted)


def test_fixed_rows_do_not_see_which_columns_are_outliers_in_others() -> None:
    linear = layer(FORMATS["outliers kept"], 33, 96, fixed=True)
    x = torch.randn(20, 96)
    together = linear(x)
    for row in range(20):
        assert torch.equal(linear(x[row : row + 1]), together[row : row + 1])
