import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from infopt.core.errors import NumericsError
from infopt.core.formats.activation import ActivationFormat, round_inputs
from infopt.core.formats.number import IntegerFormat
from infopt.core.quantization import smooth
from infopt.core.quantization.nearest import group_grids, quantize_nearest
from infopt.core.quantization.smooth import search_scales, smooth_scales

INT8 = IntegerFormat(8, True, None)
TOKEN = ActivationFormat("int")
FORMATS = {
    "int8": (INT8, TOKEN),
    "int4-inputs": (INT8, ActivationFormat("int", bits=4)),
    "int4": (IntegerFormat(4, True, 16), ActivationFormat("int", bits=4)),
}
PAIRS = torch.arange(16).repeat_interleave(2)
"""Columns two and two with one scale."""


def made(seed: int, outlier: float = 1.0) -> tuple[Tensor, Tensor, list[Tensor]]:
    """Inputs [64, 32] with an outlier channel, their largest magnitudes, two weights.

    As in real models the outputs owe no more to the outlier than to any other channel.
    """
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(64, 32, generator=generator)
    x[:, 5] *= outlier
    weights = [torch.randn(n, 32, generator=generator) * 0.05 for n in (16, 8)]
    for weight in weights:
        weight[:, 5] /= max(outlier, 1.0)
    return x, x.abs().amax(dim=0), weights


def output_error(
    x: Tensor, weights: list[Tensor], scales: Tensor, name: str = "int8", floor: float = 0.0
) -> float:
    """The error written out once more, independent of the search."""
    form, inputs = FORMATS[name]
    lost, power = torch.zeros(len(x)), torch.zeros(len(x))
    for weight in weights:
        scaled = weight * scales
        rounded = quantize_nearest(scaled, form, group_grids(scaled, form, mse=False)).dequantize()
        true = x @ weight.T
        mean = (true.norm(dim=1) ** 2).mean()
        lost += (round_inputs(x / scales, inputs) @ rounded.T - true).norm(dim=1) ** 2 / mean
        power += true.norm(dim=1) ** 2 / mean
    return float((lost / power.clamp(min=floor * power.median())).mean())


def expected_error(x: Tensor, weights: list[Tensor], name: str = "int8") -> smooth._Expected:
    shares, sizes = smooth._alike(x, weights, 0.0)
    return smooth._Expected.of(x * shares, torch.cat(weights) / sizes, *FORMATS[name])


def test_scales_are_those_of_the_paper() -> None:
    abs_max = torch.tensor([4.0, 1.0, 0.0, 9.0])
    weights = [torch.tensor([[1.0, -0.25, 1.0, 0.0]]), torch.tensor([[-4.0, 0.1, 1.0, 0.0]])]
    # The last two are dead: in one no input, in the other no weight.
    expected = torch.tensor([(4.0 / 4.0) ** 0.5, (1.0 / 0.25) ** 0.5, 1.0, 1.0])
    assert torch.allclose(smooth_scales(abs_max, weights, 0.5), expected)
    scales = smooth_scales(abs_max, weights, 1.0)
    assert torch.allclose(scales[:2], abs_max[:2])
    assert float(smooth_scales(torch.full((4,), 1e-30), weights, 1.0).min()) == pytest.approx(1e-5)


def test_columns_with_one_scale_count_as_the_largest_of_them() -> None:
    abs_max = torch.tensor([4.0, 1.0, 9.0, 2.0])
    weights = [torch.tensor([[1.0, 0.25, 0.5, 4.0]])]
    found = smooth_scales(abs_max, weights, 0.5, torch.tensor([0, 1, 0, 1]))
    assert torch.allclose(found, torch.tensor([(9.0 / 1.0) ** 0.5, (2.0 / 4.0) ** 0.5]))


@pytest.mark.parametrize("name", FORMATS)
@pytest.mark.parametrize("channels", [None, PAIRS], ids=["own", "shared"])
def test_a_planted_outlier_is_smoothed_away(name: str, channels: Tensor | None) -> None:
    x, abs_max, weights = made(0, outlier=100.0)
    if channels is not None:
        x[:, 4] *= 100
        weights = [weight.index_fill(1, torch.tensor([4]), 1e-4) for weight in weights]
        abs_max = x.abs().amax(dim=0)
    found = search_scales(x, abs_max, weights, *FORMATS[name], channels)
    assert found.error < found.identity_error / 20
    planted = 5 if channels is None else 2
    assert len(found.scales) == (32 if channels is None else 16)
    assert float(found.scales[planted]) > 5 * float(found.scales.median())


@pytest.mark.parametrize("name", FORMATS)
@pytest.mark.parametrize("channels", [None, PAIRS], ids=["own", "shared"])
@pytest.mark.parametrize("floor", [0.0, 1.0])
def test_the_error_is_that_of_the_rounded_layers(
    name: str, channels: Tensor | None, floor: float
) -> None:
    x, abs_max, weights = made(1, outlier=30.0)
    weights[1] *= 100  # each layer counts alike
    found = search_scales(x, abs_max, weights, *FORMATS[name], channels, floor)
    each = found.scales if channels is None else found.scales[channels]
    assert found.error == pytest.approx(output_error(x, weights, each, name, floor), rel=1e-3)
    expected = output_error(x, weights, torch.ones(32), name, floor)
    assert found.identity_error == pytest.approx(expected, rel=1e-3)


@pytest.mark.parametrize("name", FORMATS)
@pytest.mark.parametrize("outlier", [1.0, 5.0, 100.0])
def test_no_alpha_of_the_paper_is_expected_to_do_better(name: str, outlier: float) -> None:
    x, abs_max, weights = made(2, outlier)
    expected = expected_error(x, weights, name)
    found = search_scales(x, abs_max, weights, *FORMATS[name]).scales
    papers = [smooth_scales(abs_max, weights, step / 10) for step in range(11)]
    least = min(float(expected(scales.log())[0]) for scales in papers)
    assert float(expected(found.log())[0]) < 1.05 * least, "60 steps come close enough"


@pytest.mark.parametrize("name", FORMATS)
def test_the_gradient_is_that_of_the_expected_error(name: str) -> None:
    x, _, weights = made(3)
    expected = smooth._Expected.of(x.double(), torch.cat(weights).double(), *FORMATS[name])
    generator = torch.Generator().manual_seed(0)
    at, along = torch.randn(2, 32, generator=generator, dtype=torch.float64)
    above, below = (float(expected(at + step * along)[0]) for step in (1e-6, -1e-6))
    slope = float((expected(at)[1] * along).sum())
    assert slope == pytest.approx((above - below) / 2e-6, rel=1e-4)


@pytest.mark.parametrize("name", FORMATS)
def test_the_expected_error_is_that_of_rounding(name: str) -> None:
    """On average over many values, which is all that it says."""
    generator = torch.Generator().manual_seed(4)
    x = torch.randn(512, 64, generator=generator)
    weights = [torch.randn(256, 64, generator=generator)]
    expected = expected_error(x, weights, name)
    found, _ = expected(torch.zeros(64))
    share = float(found) / output_error(x, weights, torch.ones(64), name)
    assert share == pytest.approx(1, rel=0.1)


def test_where_the_descent_begins_does_not_matter(monkeypatch: pytest.MonkeyPatch) -> None:
    x, abs_max, weights = made(5, outlier=30.0)
    errors = []
    for alpha in (0.3, 0.5, 0.9):
        monkeypatch.setattr(smooth, "_ALPHA", alpha)
        found = search_scales(x, abs_max, weights, INT8, TOKEN)
        expected = expected_error(x, weights)
        errors.append(float(expected(found.scales.log())[0]))
    assert max(errors) < 1.02 * min(errors)


@settings(deadline=None, max_examples=40)
@given(
    name=st.sampled_from(sorted(FORMATS)),
    seed=st.integers(0, 2**31),
    outlier=st.sampled_from([0.0, 1.0, 20.0, 1e4]),
    shared=st.booleans(),
)
def test_it_is_never_worse_than_no_smoothing(
    name: str, seed: int, outlier: float, shared: bool
) -> None:
    x, abs_max, weights = made(seed, outlier)
    found = search_scales(x, abs_max, weights, *FORMATS[name], PAIRS if shared else None)
    assert found.error <= found.identity_error
    assert found.error < found.identity_error or bool((found.scales == 1).all())
    assert bool((torch.isfinite(found.scales) & (found.scales > 0)).all())


def test_nothing_is_smoothed_where_nothing_is_lost() -> None:
    x, abs_max, _ = made(6)
    found = search_scales(x, abs_max, [torch.zeros(8, 32)], INT8, TOKEN)
    assert found.error == found.identity_error == 0 and bool((found.scales == 1).all())


def test_a_channel_that_the_sample_does_not_show_may_not_outgrow_the_others() -> None:
    x, abs_max, weights = made(7)
    x[:, 9] *= 1e-6
    found = search_scales(x, abs_max, weights, INT8, TOKEN)
    reach = (x.abs() / found.scales).amax()
    assert float((abs_max / found.scales)[9]) <= 1.001 * float(reach)


def test_what_is_not_finite_is_refused() -> None:
    x, abs_max, weights = made(3)
    with pytest.raises(NumericsError, match="finite"):
        search_scales(x.index_fill(0, torch.tensor(0), torch.nan), abs_max, weights, INT8, TOKEN)
    with pytest.raises(NumericsError, match="finite"):
        search_scales(x, abs_max, [w * torch.inf for w in weights], INT8, TOKEN)


def test_scales_beyond_range_are_passed_over() -> None:
    """An input of 1e9, smoothed, may make weights too large for a float16 scale."""
    x, abs_max, weights = made(4)
    x, abs_max = x.clone(), abs_max.clone()
    x[:, 5] *= 1e9
    abs_max[5] *= 1e9
    found = search_scales(x, abs_max, weights, INT8, TOKEN)
    assert found.error <= found.identity_error
    scaled = torch.cat(weights) * found.scales
    group_grids(scaled, INT8, mse=False)  # raises where it is too large


def test_tokens_and_layers_count_alike_up_to_the_floor() -> None:
    x, _, weights = made(8)
    x[3] *= 1000
    for floor in (0.0, 2.0):
        shares, sizes = smooth._alike(x, weights, floor)
        inputs, tall = x * shares, torch.cat(weights) / sizes
        power = (inputs @ tall.T).square().sum(dim=1)
        if floor == 0.0:
            assert torch.allclose(power, torch.ones(64), rtol=1e-4)
            parts = (inputs @ tall[:16].T).square().sum(dim=1), power
            assert 0.2 < float((parts[0] / parts[1]).mean()) < 0.8
        else:
            assert float(power[3]) == pytest.approx(1)
            assert float(power.median()) == pytest.approx(1 / floor, rel=0.01)
