"""SmoothQuant: move the outliers of activations into the weights before both are rounded.

Xiao et al., 2022, https://arxiv.org/abs/2211.10438. Pure functions: no module, hook or device.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from math import isfinite

import torch
from torch import Tensor

from infopt.core.errors import NumericsError
from infopt.core.formats.activation import ActivationFormat, round_inputs
from infopt.core.formats.number import IntegerFormat
from infopt.core.quantization.nearest import group_grids, quantize_nearest

_SMALLEST = 1e-5
_ALPHA = 0.5
"""Where the search begins."""
_STEPS = 60
_RATE = 0.1
"""Of the first step, in the logarithm of a scale; the last is a tenth of it."""
_MEANS = 0.9, 0.99
"""Adam's."""


@dataclass(frozen=True, slots=True)
class SmoothSearch:
    """The best scales [C]: all 1 where none are better than no smoothing.

    Errors are shares of ||W x||^2, averaged over the inputs x and the layers that share them;
    `identity_error` is that of no smoothing.
    """

    scales: Tensor
    error: float
    identity_error: float


def smooth_scales(
    abs_max: Tensor, weights: Sequence[Tensor], alpha: float, channels: Tensor | None = None
) -> Tensor:
    """max|X_j|^alpha / max|W_j|^(1 - alpha), float32 [C]: divide the inputs, multiply the columns.

    abs_max: [K], the largest magnitudes of the inputs; weights: [N, K], all that share the input;
    channels: int64 [K], which of the C scales each column has; by default each has its own.
    Channels in which inputs or weights are all 0 keep the scale 1.
    """
    inputs, columns = _ranges(abs_max, weights, channels)
    scales = inputs.clamp(min=_SMALLEST) ** alpha / columns.clamp(min=_SMALLEST) ** (1 - alpha)
    dead = (inputs <= 0) | (columns <= 0)
    return torch.where(dead, torch.ones_like(scales), scales.clamp(min=_SMALLEST))


def search_scales(
    sample: Tensor,
    abs_max: Tensor,
    weights: Sequence[Tensor],
    weight_format: IntegerFormat,
    activation_format: ActivationFormat,
    channels: Tensor | None = None,
    floor: float = 0.0,
) -> SmoothSearch:
    """The scales that bring Q(x / s) Q(W s) the nearest to W x, by the error that one expects.

    sample: inputs [rows, K], which are rounded token by token; floor: tokens of less output than
    this many times the median count as if they had so much; the rest as for `smooth_scales`.
    Raises NumericsError where no smoothing, nor its absence, has a finite error.
    """
    shares, sizes = alike = _alike(sample.float(), weights, floor)
    inputs, tall = sample.float(), torch.cat([weight.float() for weight in weights])
    found = smooth_scales(abs_max, weights, _ALPHA, channels)
    ones = torch.ones_like(found)
    identity = _measured(inputs, tall, alike, weight_format, activation_format)
    expected = _Expected.of(inputs * shares, tall / sizes, weight_format, activation_format)
    found = _descend(expected, found, channels)
    largest, columns = _ranges(abs_max, weights, channels)
    # What the sample does not show of a channel must not reach beyond all that it does show.
    reach = (inputs.abs() / _spread(found, channels)).amax()
    found = torch.where((largest > 0) & (columns > 0), torch.maximum(found, largest / reach), ones)
    each = _spread(found, channels)
    error = _measured(inputs / each, tall * each, alike, weight_format, activation_format)
    if not isfinite(min(error, identity)):
        raise NumericsError(
            "no smoothing, nor its absence, gives a finite error",
            "weights or calibration inputs are not finite, or overflow",
        )
    return SmoothSearch(found if error < identity else ones, min(error, identity), identity)


@dataclass(frozen=True, slots=True)
class _Expected:
    """The error that rounding is expected to make, of scales [K] by their logarithms.

    A value is off by a share of its step that is as likely as any other; steps are set by the
    largest value of a token, and of a row's group of weights. So the error is a sum of products
    of such maxima with sums of squares, and convex in the logarithms: where the descent begins
    does not matter.
    """

    inputs: Tensor
    """|x|, [rows, K]."""
    weights: Tensor
    """|W|, [N, G, K / G]."""
    spread_inputs: Tensor
    """[K]: what an error in each input does to the outputs."""
    spread_weights: Tensor
    """[K]: what an error in each column does."""

    @classmethod
    def of(
        cls, inputs: Tensor, tall: Tensor, form: IntegerFormat, seen: ActivationFormat
    ) -> "_Expected":
        step = 2 / form.max_code, 1 / seen.largest
        return cls(
            inputs.abs(),
            tall.abs().reshape(len(tall), -1, form.group_size or tall.shape[1]),
            tall.square().sum(dim=0) * step[1] ** 2 / 12 / len(inputs),
            inputs.square().mean(dim=0) * step[0] ** 2 / 12,
        )

    def __call__(self, logs: Tensor) -> tuple[Tensor, Tensor]:
        """The error, and its gradient [K]."""
        scales = logs.exp()
        groups, size = self.weights.shape[1:]
        of_inputs = scales.square() * self.spread_inputs
        of_weights = (self.spread_weights / scales.square()).reshape(groups, size)
        top, token = (self.inputs / scales).max(dim=1)
        steps = top.square()
        high, column = (self.weights * scales.reshape(groups, size)).max(dim=2)
        rows = high.square()
        error = steps.sum() * of_inputs.sum() + (rows.sum(dim=0) * of_weights.sum(dim=1)).sum()
        gradient = of_inputs * steps.sum() - (of_weights * rows.sum(dim=0).unsqueeze(1)).flatten()
        gradient.index_add_(0, token, -steps * of_inputs.sum())
        column = column + size * torch.arange(groups, device=column.device)
        gradient.index_add_(0, column.flatten(), (rows * of_weights.sum(dim=1)).flatten())
        return error, 2 * gradient


def _alike(inputs: Tensor, weights: Sequence[Tensor], floor: float) -> tuple[Tensor, Tensor]:
    """Factors for the inputs [rows, 1], and divisors for the weights' rows [N, 1], by which an
    error's square is its share of the outputs: else a few tokens of massive activations, or one
    layer of several, decide alone."""
    parts = [(inputs @ weight.float().T).square().sum(dim=1) for weight in weights]
    means = [float(part.mean()) * len(parts) for part in parts]
    powers = [part / mean if mean > 0 else part for part, mean in zip(parts, means, strict=True)]
    power = torch.stack(powers).sum(dim=0)
    power = power.clamp(min=floor * float(power.median()))
    sizes = [
        torch.full((len(weight), 1), mean**0.5 if mean > 0 else 1.0, device=inputs.device)
        for weight, mean in zip(weights, means, strict=True)
    ]
    return torch.where(power > 0, power, torch.inf).rsqrt().unsqueeze(1), torch.cat(sizes)


def _descend(expected: _Expected, scales: Tensor, channels: Tensor | None) -> Tensor:
    """The scales [C] of least expected error on a descent from `scales`, by Adam."""
    logs = scales.log()
    mean, square = torch.zeros_like(logs), torch.zeros_like(logs)
    least, best = torch.full((), torch.inf, device=logs.device), logs
    for step in range(_STEPS):
        error, gradient = expected(_spread(logs, channels))
        best, least = torch.where(error < least, logs, best), torch.minimum(error, least)
        # Of the error's logarithm: the same pace for layers with large and with small errors.
        gradient = gradient / error
        if channels is not None:
            gradient = torch.zeros_like(logs).index_add_(0, channels, gradient)
        mean = torch.lerp(gradient, mean, _MEANS[0])
        square = torch.lerp(gradient.square(), square, _MEANS[1])
        pace = _RATE * 0.1 ** (step / _STEPS) * (1 - _MEANS[1] ** (step + 1)) ** 0.5
        pace /= 1 - _MEANS[0] ** (step + 1)
        logs = logs - pace * mean / (square.sqrt() + 1e-12)
    return best.exp()


def _ranges(
    abs_max: Tensor, weights: Sequence[Tensor], channels: Tensor | None
) -> tuple[Tensor, Tensor]:
    """The largest magnitudes of inputs and of weights in each channel: [C], [C]."""
    columns = torch.stack([weight.float().abs().amax(dim=0) for weight in weights]).amax(dim=0)
    if channels is None:
        return abs_max.float(), columns
    none = columns.new_zeros(int(channels.max()) + 1)
    inputs = none.scatter_reduce(0, channels, abs_max.float(), "amax")
    return inputs, none.scatter_reduce(0, channels, columns, "amax")


def _spread(scales: Tensor, channels: Tensor | None) -> Tensor:
    """The scale of each column: [K]."""
    return scales if channels is None else scales[channels]


def _measured(
    inputs: Tensor,
    tall: Tensor,
    alike: tuple[Tensor, Tensor],
    form: IntegerFormat,
    activation_format: ActivationFormat,
) -> float:
    """The error of inputs [rows, K] and weights [N, K] when both are rounded; may be infinite."""
    try:
        grids = group_grids(tall, form, mse=False)
    except NumericsError:
        return float("inf")  # too large for a float16 scale
    rounded = quantize_nearest(tall, form, grids).dequantize()
    found = round_inputs(inputs, activation_format) @ rounded.T
    lost = (found - inputs @ tall.T) * alike[0] / alike[1].T
    error = float(lost.square_().sum(dim=1).mean())
    return error if isfinite(error) else float("inf")
