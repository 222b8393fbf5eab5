import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from infopt.core.errors import NumericsError
from infopt.core.formats.number import IntegerFormat
from infopt.core.quantization.grid import Grid, make_grid, round_to_grid


def restored(
    weights: torch.Tensor, number_format: IntegerFormat, *, mse: bool = False
) -> tuple[torch.Tensor, Grid]:
    grid = make_grid(weights, number_format, mse=mse)
    each = Grid(grid.scale.unsqueeze(-1), grid.zero.unsqueeze(-1))
    codes = round_to_grid(weights, each, number_format.max_code)
    assert float(codes.min()) >= 0 and float(codes.max()) <= number_format.max_code
    return (codes - each.zero) * each.scale, grid


@settings(deadline=None, max_examples=200)
@given(
    bits=st.sampled_from([2, 3, 4, 8]),
    symmetric=st.booleans(),
    exponent=st.integers(-6, 4),
    shift=st.floats(-3, 3),
    seed=st.integers(0, 2**31),
)
def test_error_is_within_a_step(
    bits: int, symmetric: bool, exponent: int, shift: float, seed: int
) -> None:
    generator = torch.Generator().manual_seed(seed)
    weights = (torch.randn(8, 32, generator=generator) + shift) * 2.0**exponent
    number_format = IntegerFormat(bits, symmetric, 32)
    found, grid = restored(weights, number_format)
    assert bool(torch.isfinite(found).all())
    # Half a step, or up to a whole one at the clipped end of a range; float16 scales add a little.
    assert float(((found - weights).abs() / grid.scale.unsqueeze(-1)).max()) <= 1.05
    assert torch.equal(grid.scale, grid.scale.half().float()), "what is stored is what is used"
    if bits <= 4:
        assert torch.equal(grid.scale, grid.scale.bfloat16().float()), "kernels may hold it so"
    assert float(grid.zero.min()) >= 1 and float(grid.zero.max()) <= number_format.max_code
    assert torch.equal(grid.zero, grid.zero.round())


def test_symmetric_is_the_grid_of_gptq() -> None:
    weights = torch.tensor([[-1.0, 0.25, 0.5, 0.75]])
    grid = make_grid(weights, IntegerFormat(4, True, 4), mse=False)
    assert float(grid.scale) == pytest.approx(2 / 15, rel=4e-3)
    assert float(grid.zero) == 8


@pytest.mark.parametrize("bits", [2, 3, 4, 8])
@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("value", [0.0, 1.0, -1.0, 1e-9, -1e-9, 3e4])
def test_degenerate_groups(bits: int, symmetric: bool, value: float) -> None:
    found, grid = restored(torch.full((1, 32), value), IntegerFormat(bits, symmetric, 32))
    assert bool(torch.isfinite(found).all()) and float(grid.scale) > 0
    if value == 0.0:
        assert float(found.abs().max()) == 0
    elif not symmetric and abs(value) > 1e-6:
        # A constant group is an end of its own range: exact, up to the scale's rounding.
        assert float((found - value).abs().max()) <= 4e-3 * abs(value)


def test_dequantizing_in_float16_is_exact_at_4_bits() -> None:
    weights = torch.randn(64, 64) * 0.02
    grid = make_grid(weights, IntegerFormat(4, True, 64), mse=True)
    steps = torch.arange(-8, 8).half()
    product = steps[None] * grid.scale.half()[:, None]
    assert torch.equal(product.float(), steps.float()[None] * grid.scale[:, None])


def test_asymmetric_holds_zero_exactly() -> None:
    weights = torch.tensor([[0.0, 0.3, 0.7, 2.0], [-0.01, 0.3, 0.7, 2.0], [-5.0, -1.0, 0.0, -2.0]])
    found, _ = restored(weights, IntegerFormat(4, False, 4))
    assert float(found[0, 0]) == 0.0 and float(found[2, 2]) == 0.0


def test_a_weight_beyond_float16_scales_is_named_as_such() -> None:
    with pytest.raises(NumericsError, match="too large"):
        make_grid(torch.full((1, 4), 1e7), IntegerFormat(4, True, 4), mse=False)


@pytest.mark.parametrize("bits", [2, 3, 4, 8])
@pytest.mark.parametrize("symmetric", [True, False])
def test_the_mse_grid_rounds_no_worse_in_any_group(bits: int, symmetric: bool) -> None:
    weights = torch.randn(256, 64, generator=torch.Generator().manual_seed(0))
    number_format = IntegerFormat(bits, symmetric, 64)
    errors = [
        ((restored(weights, number_format, mse=mse)[0] - weights) ** 2).sum(1)
        for mse in (True, False)
    ]
    assert bool((errors[0] <= errors[1] * (1 + 1e-5)).all())
    if bits < 8:
        assert float(errors[0].sum()) < 0.95 * float(errors[1].sum())
