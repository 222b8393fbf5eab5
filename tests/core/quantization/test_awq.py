from typing import get_args

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from infopt.core.compression.statistics import relative_error
from infopt.core.errors import NumericsError
from infopt.core.formats.number import IntegerFormat
from infopt.core.quantization.awq import Ranges, awq_clip, awq_scales, clipped_grids
from infopt.core.quantization.grid import Grid
from infopt.core.quantization.nearest import group_grids, quantize_nearest

FORMATS = [
    IntegerFormat(bits, symmetric, size)
    for bits in (3, 4)
    for symmetric in (True, False)
    for size in (16, None)
]
GROUPED = [form for form in FORMATS if form.group_size]


def made(seed: int = 0, salient: float = 1.0) -> tuple[Tensor, Tensor, list[Tensor]]:
    """Mean magnitudes and Hessian of inputs with salient channels, one in 16; two weights."""
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(256, 64, generator=generator) @ torch.randn(64, 64, generator=generator) / 8
    x[:, ::16] *= salient
    weights = [torch.randn(n, 64, generator=generator) * 0.1 for n in (96, 64)]
    return x.abs().mean(dim=0), 2 * x.T @ x / len(x), weights


def error_of(
    weight: Tensor, scales: Tensor, hessian: Tensor, form: IntegerFormat, grid: Grid
) -> float:
    restored = quantize_nearest(weight * scales, form, grid).dequantize() / scales
    return relative_error(weight, restored, hessian)


@pytest.mark.parametrize("ranges", ["minmax", "mse"])
@pytest.mark.parametrize("form", GROUPED, ids=str)
def test_salient_channels_are_scaled_up(form: IntegerFormat, ranges: Ranges) -> None:
    abs_mean, hessian, weights = made(salient=20.0)
    found = awq_scales(abs_mean, hessian, weights, form, ranges=ranges)
    assert found.error < (0.75 if form.symmetric else 0.3) * found.identity_error
    assert float(found.scales[::16].min()) > 1.5 * float(found.scales.median())


@pytest.mark.parametrize("form", GROUPED, ids=str)
def test_clipping_takes_what_scaling_leaves(form: IntegerFormat) -> None:
    """Alone it does much of the same: one range can be set so that one weight is hit."""
    abs_mean, hessian, weights = made(salient=20.0)
    scaled = awq_scales(abs_mean, hessian, weights, form, ranges="minmax")
    both = awq_scales(abs_mean, hessian, weights, form, ranges="clip")
    assert both.identity_error < 0.6 * scaled.identity_error
    assert both.error < 0.95 * scaled.error and both.error < both.identity_error
    if not form.symmetric:
        assert both.error < 0.8 * both.identity_error


@pytest.mark.parametrize("rows", [16, 1000])
@pytest.mark.parametrize("mse", [False, True])
def test_the_errors_are_those_of_the_rounded_layers(rows: int, mse: bool) -> None:
    abs_mean, hessian, weights = made(salient=20.0)
    form, tall, ones = IntegerFormat(4, True, 16), torch.cat(weights), torch.ones(64)
    found = awq_scales(
        abs_mean, hessian, weights, form, ranges="mse" if mse else "minmax", rows=rows
    )
    for scales, error in ((found.scales, found.error), (ones, found.identity_error)):
        grid = group_grids(tall * scales, form, mse=mse)
        assert error == pytest.approx(error_of(tall, scales, hessian, form, grid), rel=1e-3)


def test_clipping_in_the_search_is_the_clipping_that_follows() -> None:
    abs_mean, hessian, weights = made(salient=20.0)
    form, tall = IntegerFormat(3, False, 16), torch.cat(weights)
    found = awq_scales(abs_mean, hessian, weights, form)
    scaled = hessian / (found.scales.unsqueeze(1) * found.scales)
    grid = clipped_grids(tall * found.scales, scaled, form, steps=10)
    assert found.error == pytest.approx(error_of(tall, found.scales, hessian, form, grid), rel=1e-3)


@settings(deadline=None, max_examples=60)
@given(
    form=st.sampled_from(FORMATS),
    seed=st.integers(0, 2**31),
    salient=st.sampled_from([0.0, 1.0, 30.0, 1e4]),
    ranges=st.sampled_from(get_args(Ranges)),
    duo=st.booleans(),
    rows=st.sampled_from([8, 64, 160]),
)
def test_scales_are_never_worse_than_none(
    form: IntegerFormat, seed: int, salient: float, ranges: Ranges, duo: bool, rows: int
) -> None:
    abs_mean, hessian, weights = made(seed, salient)
    found = awq_scales(
        abs_mean, hessian, weights, form, grid_points=5, duo=duo, ranges=ranges, rows=rows
    )
    assert found.error <= found.identity_error
    assert bool((torch.isfinite(found.scales) & (found.scales > 0)).all())
    assert duo or not found.duo
    if found.error == found.identity_error:
        assert (found.ratio, found.duo) == (0.0, False)
        assert torch.equal(found.scales, torch.ones(64))


def test_inputs_that_are_always_zero_need_no_scales() -> None:
    found = awq_scales(torch.zeros(64), torch.zeros(64, 64), made()[2], FORMATS[0])
    assert torch.equal(found.scales, torch.ones(64)) and found.error == 0.0


def test_a_dead_channel_does_not_stretch_the_others() -> None:
    abs_mean, hessian, weights = made(salient=30.0)
    abs_mean[7] = 0.0
    hessian[7] = hessian[:, 7] = 0.0
    scales = awq_scales(abs_mean, hessian, weights, FORMATS[0]).scales
    assert float(scales[7]) >= float(scales.min()) and float(scales.max() / scales.min()) < 1e3


def test_what_is_not_finite_is_refused() -> None:
    abs_mean, hessian, weights = made()
    for bad in (
        (abs_mean, hessian * torch.nan, weights),
        (abs_mean, hessian, [weights[0] * torch.nan, weights[1]]),
        (abs_mean, hessian, [weights[0] * 1e9, weights[1]]),
    ):
        with pytest.raises(NumericsError, match="finite"):
            awq_scales(*bad, FORMATS[0])


def test_scales_that_are_not_finite_are_never_chosen() -> None:
    abs_mean, hessian, weights = made()
    abs_mean[3] = torch.inf
    found = awq_scales(abs_mean, hessian, weights, FORMATS[0])
    assert bool(torch.isfinite(found.scales).all())
    assert torch.equal(found.scales, torch.ones(64)), "every other one has that channel in it"


@settings(deadline=None, max_examples=60)
@given(form=st.sampled_from(FORMATS), seed=st.integers(0, 2**31), steps=st.integers(2, 12))
def test_clipping_is_never_worse_in_any_group(form: IntegerFormat, seed: int, steps: int) -> None:
    _, hessian, weights = made(seed, 20.0)
    weight = torch.cat(weights)
    shares = awq_clip(weight, hessian, form, steps=steps)
    assert float(shares.min()) >= 0.5 and float(shares.max()) <= 1.0
    errors = []
    for grid in (
        clipped_grids(weight, hessian, form, steps=steps),
        group_grids(weight, form, mse=False),
    ):
        delta = quantize_nearest(weight, form, grid).dequantize() - weight
        size = form.group_size or 64
        blocks = [
            (delta[:, i : i + size], hessian[i : i + size, i : i + size])
            for i in range(0, 64, size)
        ]
        errors.append(torch.stack([((d @ h) * d).sum(dim=1) for d, h in blocks], dim=1))
    assert shares.shape == errors[0].shape
    assert bool((errors[0] <= errors[1] * (1 + 1e-3) + 1e-9).all())


def test_clipping_weighs_channels_by_what_reaches_them() -> None:
    """One weight is large. Where its input is silent it is clipped, where it is loud it is kept."""
    generator = torch.Generator().manual_seed(0)
    weight = torch.randn(32, 16, generator=generator) * 0.02
    weight[:, 3] = 0.15
    form = IntegerFormat(3, True, None)
    shares = []
    for power in (1e-4, 1e4):
        hessian = torch.eye(16)
        hessian[3, 3] = power
        shares.append(float(awq_clip(weight, hessian, form).mean()))
    assert shares[0] < 0.55 and shares[1] > 0.9
