"""SmoothQuant: move the outliers of activations into the weights before both are rounded.

Xiao et al., 2022, https://arxiv.org/abs/2211.10438. Pure functions: no module, hook or device.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from math import inf, isfinite

import torch
from torch import Tensor

from infopt.core.errors import NumericsError
from infopt.core.formats.activation import ActivationFormat, round_inputs
from infopt.core.formats.fp8 import Fp8Format, to_fp8
from infopt.core.formats.number import IntegerFormat
from infopt.core.quantization.nearest import group_grids, quantize_nearest

ALPHAS = tuple(step / 20 for step in range(6, 20))
"""0.3 to 0.95: below, weights are smoothed into activations."""
_SMALLEST = 1e-5


@dataclass(frozen=True, slots=True)
class SmoothSearch:
    """The best scales [K] and their alpha, None for no smoothing.

    Errors are shares of ||W x||^2, averaged over the inputs x; `identity_error` is that of no
    smoothing.
    """

    alpha: float | None
    scales: Tensor
    error: float
    identity_error: float


def smooth_scales(abs_max: Tensor, weights: Sequence[Tensor], alpha: float) -> Tensor:
    """max|X_j|^alpha / max|W_j|^(1 - alpha), float32 [K]: divide the inputs, multiply the columns.

    abs_max: [K], the largest magnitudes of the inputs; weights: [N, K], all that share the input.
    Channels in which inputs or weights are all 0 keep the scale 1.
    """
    inputs = abs_max.float()
    columns = torch.stack([weight.float().abs().amax(dim=0) for weight in weights]).amax(dim=0)
    scales = inputs.clamp(min=_SMALLEST) ** alpha / columns.clamp(min=_SMALLEST) ** (1 - alpha)
    dead = (inputs <= 0) | (columns <= 0)
    return torch.where(dead, torch.ones_like(scales), scales.clamp(min=_SMALLEST))


def search_alpha(
    sample: Tensor,
    abs_max: Tensor,
    weights: Sequence[Tensor],
    weight_format: IntegerFormat | Fp8Format,
    activation_format: ActivationFormat,
    alphas: Sequence[float] = ALPHAS,
) -> SmoothSearch:
    """The alpha whose Q(x / s) Q(W s) is nearest to x W in squared error, or no smoothing.

    sample: inputs [rows, K]; weights: [N, K], all that share the input. A static activation format
    gets its scale from `abs_max` [K]. Raises NumericsError where no choice has a finite error.
    """
    tall = torch.cat([weight.float() for weight in weights])
    inputs = sample.float()
    expected = inputs @ tall.T
    # Row by row, as inputs are rounded: else a few tokens of massive activations decide alone.
    power = expected.square().sum(dim=1)

    def measure(scales: Tensor) -> float:
        try:
            rounded = _rounded(tall * scales, weight_format)
        except NumericsError:
            return inf  # too large for a float16 scale
        static = None if activation_format.dynamic else _static(abs_max, scales, activation_format)
        found = round_inputs(inputs / scales, activation_format, static) @ rounded.T
        lost = (found - expected).square_().sum(dim=1) / torch.where(power > 0, power, 1.0)
        error = float(lost.mean())
        return error if isfinite(error) else inf

    scales = torch.ones_like(abs_max, dtype=torch.float32)
    identity = measure(scales)
    best = SmoothSearch(None, scales, identity, identity)
    for alpha in alphas:
        scales = smooth_scales(abs_max, weights, alpha)
        error = measure(scales)
        if error < best.error:
            best = SmoothSearch(alpha, scales, error, identity)
    if not isfinite(best.error):
        raise NumericsError(
            "no smoothing, nor its absence, gives a finite error",
            "weights or calibration inputs are not finite, or overflow",
        )
    return best


def _rounded(weight: Tensor, form: IntegerFormat | Fp8Format) -> Tensor:
    match form:
        case IntegerFormat():
            return quantize_nearest(weight, form, group_grids(weight, form, mse=False)).dequantize()
        case Fp8Format():
            return to_fp8(weight, form).dequantize()


def _static(abs_max: Tensor, scales: Tensor, form: ActivationFormat) -> Tensor:
    """The one scale of a static format, for inputs divided by `scales`."""
    return (abs_max.float() / scales).amax() / form.largest
