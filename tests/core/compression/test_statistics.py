import pytest
import torch

from infopt.core.compression.statistics import (
    accumulate_hessian,
    complete_hessian,
    relative_error,
)


@pytest.mark.parametrize("columns", [1, 5, 64, 130])
def test_the_hessian_is_the_mean_of_the_outer_products(columns: int) -> None:
    inputs = torch.randn(3, 40, columns)
    hessian, seen = torch.zeros(columns, columns), 0
    for part in inputs.split([1, 2]):
        seen = accumulate_hessian(hessian, part, seen)
    rows = inputs.reshape(-1, columns).double()
    assert seen == 120
    found = complete_hessian(hessian)
    assert float((found - 2 * rows.T @ rows / 120).abs().max()) < 1e-5
    assert torch.equal(found, found.T)


def test_bfloat16_inputs_are_summed_in_float32() -> None:
    inputs = torch.randn(4096, 8, generator=torch.Generator().manual_seed(0)).to(torch.bfloat16)
    hessian = torch.zeros(8, 8)
    accumulate_hessian(hessian, inputs, 0)
    rows = inputs.double()
    expected = 2 * rows.T @ rows / 4096
    # How far float32 may stray depends on the order of the sum, which differs among libraries and
    # threads: up to 4096 roundings of 2^-24, some 6e-5 for random ones. bfloat16 strays by 1e-2.
    assert float((complete_hessian(hessian) - expected).abs().max()) < 1e-4


@pytest.mark.parametrize("columns", [8, 130, 640])
def test_products_of_bfloat16_inputs_lose_nothing(columns: int) -> None:
    """The units that multiply bfloat16 give what float32 would; float32 inputs stay out of them."""
    generator = torch.Generator().manual_seed(0)
    for dtype, inputs in (
        (torch.bfloat16, torch.randn(512, columns, generator=generator).to(torch.bfloat16)),
        (torch.float32, torch.randn(512, columns, generator=generator)),
    ):
        hessian = torch.zeros(columns, columns)
        accumulate_hessian(hessian, inputs, 0)
        rows = inputs.double()
        expected = 2 * rows.T @ rows / 512
        strayed = (complete_hessian(hessian) - expected).abs().max()
        assert float(strayed) < 2e-5, dtype
    matmul = torch.backends.mkldnn.matmul  # type: ignore[attr-defined]
    assert matmul.fp32_precision == "none", "as it was"


def test_the_error_is_that_of_the_outputs() -> None:
    inputs, weight = torch.randn(500, 16), torch.randn(4, 16)
    quantized = weight + 0.1 * torch.randn(4, 16)
    hessian = torch.zeros(16, 16)
    accumulate_hessian(hessian, inputs, 0)
    expected = ((inputs @ (weight - quantized).T) ** 2).sum() / ((inputs @ weight.T) ** 2).sum()
    found = relative_error(weight, quantized, complete_hessian(hessian))
    assert found == pytest.approx(float(expected), rel=1e-4)
    assert relative_error(weight, weight, complete_hessian(hessian)) == 0.0
    assert relative_error(torch.zeros(4, 16), torch.zeros(4, 16), None) == 0.0


def test_without_a_hessian_it_is_that_of_the_weight() -> None:
    weight = torch.tensor([[3.0, 4.0]])
    assert relative_error(weight, torch.zeros(1, 2), None) == 1.0
    assert relative_error(weight, torch.tensor([[3.0, 3.0]]), None) == pytest.approx(1 / 25)
