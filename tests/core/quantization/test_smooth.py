import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from infopt.core.errors import NumericsError
from infopt.core.formats.activation import ActivationFormat, round_inputs
from infopt.core.formats.fp8 import Fp8Format
from infopt.core.formats.number import IntegerFormat
from infopt.core.quantization.nearest import group_grids, quantize_nearest
from infopt.core.quantization.smooth import search_alpha, smooth_scales

INT8 = IntegerFormat(8, True, None)
TOKEN = ActivationFormat("int")
FORMATS = {
    "int8": (INT8, TOKEN),
    "int8-static": (INT8, ActivationFormat("int", strategy="tensor", dynamic=False)),
    "int4-inputs": (INT8, ActivationFormat("int", bits=4)),
    "fp8": (Fp8Format("channel"), ActivationFormat("float")),
}


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


def output_error(x: Tensor, weights: list[Tensor], scales: Tensor, static: Tensor | None) -> float:
    """The int8 error written out once more, independent of the search."""
    form = TOKEN if static is None else FORMATS["int8-static"][1]
    tall = torch.cat(weights) * scales
    rounded = quantize_nearest(tall, INT8, group_grids(tall, INT8, mse=False)).dequantize()
    true = x @ torch.cat(weights).T
    lost = round_inputs(x / scales, form, static) @ rounded.T - true
    return float((lost.norm(dim=1) ** 2 / true.norm(dim=1) ** 2).mean())


def test_scales_are_those_of_the_paper() -> None:
    abs_max = torch.tensor([4.0, 1.0, 0.0, 9.0])
    weights = [torch.tensor([[1.0, -0.25, 1.0, 0.0]]), torch.tensor([[-4.0, 0.1, 1.0, 0.0]])]
    # The last two are dead: in one no input, in the other no weight.
    expected = torch.tensor([(4.0 / 4.0) ** 0.5, (1.0 / 0.25) ** 0.5, 1.0, 1.0])
    assert torch.allclose(smooth_scales(abs_max, weights, 0.5), expected)
    scales = smooth_scales(abs_max, weights, 1.0)
    assert torch.allclose(scales[:2], abs_max[:2])
    assert float(smooth_scales(torch.full((4,), 1e-30), weights, 1.0).min()) == pytest.approx(1e-5)


@pytest.mark.parametrize("name", ["int8", "int8-static", "int4-inputs"])
def test_a_planted_outlier_is_smoothed_away(name: str) -> None:
    x, abs_max, weights = made(0, outlier=100.0)
    found = search_alpha(x, abs_max, weights, *FORMATS[name])
    assert found.alpha is not None
    assert found.error < found.identity_error / 50
    assert float(found.scales[5]) > 5 * float(found.scales.median())


@pytest.mark.parametrize("name", ["int8", "int8-static"])
def test_the_error_is_that_of_the_rounded_layer(name: str) -> None:
    x, abs_max, weights = made(1, outlier=30.0)
    found = search_alpha(x, abs_max, weights, *FORMATS[name])
    ones = torch.ones(32)
    scales = [None, None]
    if name == "int8-static":
        scales = [(abs_max / s).amax() / 127.5 for s in (found.scales, ones)]  # type: ignore[misc]
    assert found.error == pytest.approx(output_error(x, weights, found.scales, scales[0]), rel=1e-4)
    assert found.identity_error == pytest.approx(
        output_error(x, weights, ones, scales[1]), rel=1e-4
    )


@settings(deadline=None, max_examples=60)
@given(
    name=st.sampled_from(sorted(FORMATS)),
    seed=st.integers(0, 2**31),
    outlier=st.sampled_from([0.0, 1.0, 20.0, 1e4]),
    alphas=st.lists(st.floats(0, 1), max_size=4),
)
def test_it_is_never_worse_than_no_smoothing(
    name: str, seed: int, outlier: float, alphas: list[float]
) -> None:
    x, abs_max, weights = made(seed, outlier)
    found = search_alpha(x, abs_max, weights, *FORMATS[name], alphas)
    assert found.error <= found.identity_error
    assert found.alpha in (None, *alphas)
    assert (found.alpha is None) == (found.error == found.identity_error)
    assert found.alpha is not None or torch.equal(found.scales, torch.ones(32))
    assert bool((torch.isfinite(found.scales) & (found.scales > 0)).all())


def test_no_smoothing_wins_where_it_harms() -> None:
    """16 bits hold any inputs; alpha 1 moves their range into weights that have but 8."""
    x, abs_max, weights = made(2)
    spread = torch.logspace(-2, 2, 32)
    found = search_alpha(
        x * spread, abs_max * spread, weights, INT8, ActivationFormat("int", bits=16), (1.0,)
    )
    assert found.alpha is None and torch.equal(found.scales, torch.ones(32))
    assert found.error == found.identity_error


def test_what_is_not_finite_is_refused() -> None:
    x, abs_max, weights = made(3)
    with pytest.raises(NumericsError, match="finite"):
        search_alpha(x.index_fill(0, torch.tensor(0), torch.nan), abs_max, weights, INT8, TOKEN)
    with pytest.raises(NumericsError, match="finite"):
        search_alpha(x, abs_max, [w * torch.inf for w in weights], INT8, TOKEN)


def test_an_alpha_beyond_range_is_passed_over() -> None:
    """Scaled weights too large for a float16 scale are no choice; the others still are."""
    x, abs_max, weights = made(4)
    x, abs_max = x.clone(), abs_max.clone()
    x[:, 5] *= 1e9
    abs_max[5] *= 1e9
    found = search_alpha(x, abs_max, weights, INT8, TOKEN, (1.0, 0.5))
    assert found.alpha == 0.5
