import pytest
import torch
from torch import Tensor

from infopt.core.formats.activation import ActivationFormat, round_inputs
from infopt.core.formats.number import IntegerFormat
from infopt.core.quantization.grid import Grid
from infopt.core.quantization.nearest import as_quantized, group_grids, quantize_nearest
from infopt.core.quantization.straight_through import (
    fake_quantize,
    from_steps,
    round_inputs_through,
    rounded_codes,
    step_codes,
    storable_through,
)

FORMS = [IntegerFormat(2, False, 8), IntegerFormat(3, True, 8), IntegerFormat(4, False, None)]


def made(form: IntegerFormat, *, mse: bool = True) -> tuple[Tensor, Grid]:
    weight = torch.randn(6, 24, generator=torch.Generator().manual_seed(3))
    return weight, group_grids(weight, form, mse=mse)


@pytest.mark.parametrize("form", FORMS)
def test_without_an_offset_it_is_rounding_to_nearest(form: IntegerFormat) -> None:
    weight, grid = made(form)
    nearest = quantize_nearest(weight, form, grid)
    assert torch.equal(fake_quantize(weight, grid.scale, grid.zero, form), nearest.dequantize())
    codes = rounded_codes(weight, grid.scale, grid.zero, form)
    assert torch.equal(codes.to(torch.uint8), nearest.codes)


def test_an_offset_of_half_a_step_turns_codes_up_or_down() -> None:
    form = IntegerFormat(4, True, 8)
    weight, grid = made(form, mse=False)
    offsets = (torch.full_like(weight, -0.499), torch.zeros_like(weight))
    down, nearest = (rounded_codes(weight, grid.scale, grid.zero, form, o) for o in offsets)
    moved = nearest - down
    assert set(moved.unique().tolist()) == {0.0, 1.0}
    assert 0.3 < float(moved.mean()) < 0.7


def leaves(grid: Grid, weight: Tensor) -> tuple[Tensor, ...]:
    parts = (weight, grid.scale, grid.zero, torch.zeros_like(weight))
    return tuple(part.clone().requires_grad_() for part in parts)


def test_gradients_go_straight_through_where_codes_are_not_clipped() -> None:
    form = IntegerFormat(2, False, 8)
    weight, grid = made(form)
    latent, scale, zero, offset = leaves(grid, weight)
    upstream = torch.randn(6, 24, generator=torch.Generator().manual_seed(4))
    fake_quantize(latent, scale, zero, form, offset).backward(upstream)
    raw = torch.round(weight.reshape(6, 3, 8) / grid.scale[..., None]) + grid.zero[..., None]
    inside = ((raw >= 0) & (raw <= 3)).reshape(6, 24)
    assert 0 < int(inside.sum()) < inside.numel(), "both kinds are needed"
    assert latent.grad is not None and offset.grad is not None and zero.grad is not None
    assert torch.equal(latent.grad, upstream * inside)
    wide = grid.scale.repeat_interleave(8, dim=1)
    assert torch.allclose(offset.grad, upstream * inside * wide)
    outside = (upstream * ~inside).reshape(6, 3, 8).sum(-1)
    assert torch.allclose(zero.grad, -outside * grid.scale, atol=1e-6)


def test_the_scale_has_the_gradient_of_lsq() -> None:
    """Code less weight in steps where not clipped, else the code: written out from the paper."""
    form = IntegerFormat(3, True, 8)
    weight, grid = made(form)
    latent, scale, zero, _ = leaves(grid, weight)
    fake_quantize(latent, scale, zero, form).sum().backward()
    steps = weight.reshape(6, 3, 8) / grid.scale[..., None]
    expected = torch.where(
        steps.round() < -4, -4.0, torch.where(steps.round() > 3, 3.0, steps.round() - steps)
    ).sum(-1)
    assert scale.grad is not None
    assert torch.allclose(scale.grad, expected, atol=1e-5)


def test_where_all_is_clipped_finite_differences_agree() -> None:
    form = IntegerFormat(2, False, 8)
    weight = torch.full((1, 8), 9.0)
    scale, zero = torch.tensor([[0.5]]), torch.tensor([[1.0]])
    leaf_scale, leaf_zero = scale.clone().requires_grad_(), zero.clone().requires_grad_()
    fake_quantize(weight, leaf_scale, leaf_zero, form).sum().backward()

    def value(scale: Tensor, zero: Tensor) -> float:
        return float(fake_quantize(weight, scale, zero, form).sum())

    step = 1e-2
    by_scale = (value(scale + step, zero) - value(scale - step, zero)) / (2 * step)
    by_zero = (value(scale, zero + step) - value(scale, zero - step)) / (2 * step)
    assert leaf_scale.grad is not None and leaf_zero.grad is not None
    assert float(leaf_scale.grad) == pytest.approx(by_scale, rel=1e-3)
    assert float(leaf_zero.grad) == pytest.approx(by_zero, rel=1e-3)


@pytest.mark.parametrize("form", FORMS)
def test_steps_round_like_weights_and_the_scales_gradient_is_exact(form: IntegerFormat) -> None:
    weight, grid = made(form)
    steps = (weight.reshape(*grid.scale.shape, -1) / grid.scale[..., None]).reshape(weight.shape)
    scale = grid.scale.clone().requires_grad_()
    steps.requires_grad_()
    upstream = torch.randn(6, 24, generator=torch.Generator().manual_seed(5))
    found = from_steps(steps, scale, grid.zero, form)
    assert torch.equal(found, fake_quantize(weight, grid.scale, grid.zero, form))
    codes = step_codes(steps.detach(), grid.zero, form)
    assert torch.equal(codes, rounded_codes(weight, grid.scale, grid.zero, form))
    found.backward(upstream)
    step = 2.0**-8
    both = [from_steps(steps, grid.scale + d, grid.zero, form) for d in (step, -step)]
    slope = ((both[0] - both[1]) * upstream / (2 * step)).detach()
    assert scale.grad is not None and steps.grad is not None
    assert torch.allclose(scale.grad, slope.reshape(*scale.shape, -1).sum(-1), rtol=1e-3, atol=1e-3)
    wide = grid.scale.repeat_interleave(24 // scale.shape[1], dim=1)
    assert torch.equal(steps.grad, upstream * wide)


@pytest.mark.parametrize("bits", [2, 8])
def test_a_scale_is_exactly_what_is_stored(bits: int) -> None:
    form = IntegerFormat(bits, True, 8)
    scale = torch.rand(5, 3, generator=torch.Generator().manual_seed(6)).requires_grad_()
    found = storable_through(scale, form)
    assert torch.equal(found, found.to(torch.float16).float())
    if bits == 2:
        assert torch.equal(found, found.to(torch.bfloat16).float())
    assert not torch.equal(found, scale)
    found.sum().backward()
    assert scale.grad is not None
    assert torch.equal(scale.grad, torch.ones_like(scale))
    quantized = as_quantized(torch.ones(5, 24), Grid(found.detach(), torch.zeros(5, 3)), form)
    assert torch.equal(quantized.scales.float(), found.detach())


def test_rounded_inputs_pass_gradients() -> None:
    form = ActivationFormat("int")
    x = torch.randn(2, 5, 8, generator=torch.Generator().manual_seed(7)).requires_grad_()
    found = round_inputs_through(x, form)
    assert torch.equal(found, round_inputs(x.detach(), form))
    assert not torch.equal(found, x)
    found.backward(torch.full_like(found, 3.0))
    assert x.grad is not None
    assert torch.equal(x.grad, torch.full_like(x, 3.0))
