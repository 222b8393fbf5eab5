"""AWQ: scale up the input channels that matter before rounding, and clip what costs more than it
gives.

Lin et al., 2023, https://arxiv.org/abs/2306.00978. Errors are those of the layers' outputs, by way
of the Hessian of their inputs. Pure functions: no module, hook or device.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from math import inf, isfinite
from typing import Literal

import torch
from torch import Tensor

from infopt.core.compression.statistics import output_power
from infopt.core.errors import NumericsError
from infopt.core.formats.number import IntegerFormat
from infopt.core.quantization.grid import Grid, make_grid, range_grid, round_to_grid

_SMALLEST = 1e-4
_ROWS = 128
_STEPS = 20
_COARSE_STEPS = 10
_FINALISTS = 3

Ranges = Literal["minmax", "mse", "clip"]
"""Of a group: the whole; that of least squared error; that of least output error (`awq_clip`)."""


@dataclass(frozen=True, slots=True)
class AwqSearch:
    """The best scales [K]: divide the inputs by them, multiply the columns.

    ratio: the exponent; `duo`: whether the weights' own sizes took part. Both errors are shares of
    ||W X||^2 over all layers; `identity_error` is that of no scaling (ratio 0, not duo), and
    `error` is never above it.
    """

    scales: Tensor
    ratio: float
    duo: bool
    error: float
    identity_error: float


@dataclass(frozen=True, slots=True)
class _Choice:
    scales: Tensor
    ratio: float
    duo: bool


def awq_scales(
    abs_mean: Tensor,
    hessian: Tensor,
    weights: Sequence[Tensor],
    number_format: IntegerFormat,
    *,
    grid_points: int = 20,
    duo: bool = True,
    ranges: Ranges = "clip",
    rows: int = _ROWS,
) -> AwqSearch:
    """Scales of the least output error sum tr(D H D^T), D = Q(W s) / s - W, over all layers.

    abs_mean: [K], the inputs' mean magnitudes; hessian: [K, K], the mean of 2 x x^T; weights:
    [N, K], all that share the input; `ranges`: how the groups will be rounded after. Tried are
    mean|X|^a for a in 0, 1/n ... (n-1)/n and, with `duo`, AutoAWQ's
    mean|X|^a / (mean(|W| / group max)^(1-a) + 1e-4). `rows` rows drawn at random choose the
    finalists, all rows the winner; no scaling is always one of them. Raises NumericsError where no
    candidate has a finite error.
    """
    tall = torch.cat([weight.float() for weight in weights])
    choices = _choices(abs_mean, tall, number_format, grid_points, duo)
    finalists = choices
    if rows < len(tall) and len(choices) > _FINALISTS:
        judges = tall[_drawn(len(tall), rows, tall.device)]
        errors = [_error(judges, c.scales, hessian, number_format, ranges) for c in choices]
        order = sorted(range(1, len(choices)), key=errors.__getitem__)
        finalists = [choices[index] for index in (0, *order[:_FINALISTS])]
    errors = [_error(tall, c.scales, hessian, number_format, ranges) for c in finalists]
    least = min(errors)
    if not isfinite(least):
        raise NumericsError(
            "no scales, nor their absence, give a finite error",
            "weights or calibration inputs are not finite, or overflow",
        )
    best = finalists[errors.index(least)]
    power = float(output_power(tall, hessian))
    unit = power if power > 0 else 1.0
    return AwqSearch(best.scales, best.ratio, best.duo, least / unit, errors[0] / unit)


def awq_clip(
    weight: Tensor,
    hessian: Tensor,
    number_format: IntegerFormat,
    *,
    steps: int = _STEPS,
    least: float = 0.5,
) -> Tensor:
    """The share of each group's range, [N, G], that rounds with the least output error.

    Tried are `steps` shares, evenly from 1 down to `least`. A group's error is d H_gg d^T for its
    row d of Q(W) - W and its block H_gg of the Hessian [K, K]: the whole range, which is tried
    first, is kept where nothing is better.
    """
    grouped = _grouped(weight, number_format)
    blocks = _diagonal_blocks(hessian, grouped.shape[1])
    return _shares(grouped, blocks, number_format, steps, least)


def clipped_grids(
    weight: Tensor,
    hessian: Tensor,
    number_format: IntegerFormat,
    *,
    steps: int = _STEPS,
    least: float = 0.5,
) -> Grid:
    """One grid for each group of a weight [N, K], over its `awq_clip` range: [N, G]."""
    shares = awq_clip(weight, hessian, number_format, steps=steps, least=least)
    return range_grid(_grouped(weight, number_format), number_format, shares)


def _choices(
    abs_mean: Tensor, tall: Tensor, number_format: IntegerFormat, points: int, duo: bool
) -> list[_Choice]:
    """No scaling first; every other one is normalized to sqrt(max min) = 1."""
    inputs = abs_mean.float()
    alive = inputs > 0
    found = [_Choice(torch.ones_like(inputs), 0.0, False)]
    if not bool(alive.any()):
        return found
    # A dead channel is worth as little as the least of the others, and does not widen the range.
    inputs = torch.where(alive, inputs, inputs[alive].min())
    grouped = _grouped(tall, number_format).abs()
    sizes = (grouped / (grouped.amax(dim=-1, keepdim=True) + 1e-6)).flatten(1).mean(dim=0)
    for step in range(points):
        ratio = step / points
        power = inputs**ratio
        if step:
            found.append(_Choice(_normalized(power), ratio, False))
        if duo:
            found.append(_Choice(_normalized(power / (sizes ** (1 - ratio) + 1e-4)), ratio, True))
    return found


def _normalized(scales: Tensor) -> Tensor:
    scales = scales.clamp(min=_SMALLEST)
    return scales / (scales.max() * scales.min()).sqrt()


def _error(
    weight: Tensor, scales: Tensor, hessian: Tensor, number_format: IntegerFormat, ranges: Ranges
) -> float:
    """tr(D H D^T) for D = Q(W s) / s - W; inf where it is not finite."""
    scaled = _grouped(weight * scales, number_format)
    try:
        grid = _grids(scaled, scales, hessian, number_format, ranges)
    except NumericsError:
        return inf  # too large for a float16 scale: no choice at all
    restored = _restored(scaled, grid, number_format).flatten(1)
    error = float(output_power(restored.div_(scales).sub_(weight), hessian))
    return error if isfinite(error) else inf


def _grids(
    grouped: Tensor, scales: Tensor, hessian: Tensor, number_format: IntegerFormat, ranges: Ranges
) -> Grid:
    """The grids of weights [N, G, size] that were multiplied by `scales` [K]."""
    match ranges:
        case "minmax" | "mse":
            return make_grid(grouped, number_format, mse=ranges == "mse")
        case "clip":
            parts = scales.reshape(grouped.shape[1], -1)
            outer = parts.unsqueeze(2) * parts.unsqueeze(1)
            blocks = _diagonal_blocks(hessian, grouped.shape[1]) / outer
            shares = _shares(grouped, blocks, number_format, _COARSE_STEPS, 0.5)
            return range_grid(grouped, number_format, shares)


def _shares(
    grouped: Tensor, blocks: Tensor, number_format: IntegerFormat, steps: int, least: float
) -> Tensor:
    """The share of least error under the blocks [G, size, size], for each of [N, G]."""
    shares = torch.ones(grouped.shape[:2], device=grouped.device)
    lowest = torch.full_like(shares, inf)
    for share in torch.linspace(1.0, least, steps).tolist():
        grid = range_grid(grouped, number_format, share)
        delta = _restored(grouped, grid, number_format).sub_(grouped).transpose(0, 1)
        error = (delta @ blocks).mul_(delta).sum(dim=-1).T
        better = error < lowest
        lowest = torch.where(better, error, lowest)
        shares = torch.where(better, share, shares)
    return shares


def _restored(grouped: Tensor, grid: Grid, number_format: IntegerFormat) -> Tensor:
    each = grid.each()
    return round_to_grid(grouped, each, number_format.max_code).sub_(each.zero).mul_(each.scale)


def _grouped(weight: Tensor, number_format: IntegerFormat) -> Tensor:
    """[N, G, columns of a group], float32."""
    return weight.float().reshape(len(weight), number_format.groups(weight.shape[1]), -1)


def _diagonal_blocks(hessian: Tensor, groups: int) -> Tensor:
    """The blocks [G, size, size] of a Hessian [K, K] in which groups of columns meet themselves."""
    size = len(hessian) // groups
    cut = hessian.reshape(groups, size, groups, size).diagonal(dim1=0, dim2=2)
    return cut.movedim(-1, 0).contiguous()


def _drawn(total: int, count: int, device: torch.device) -> Tensor:
    """`count` of `total` rows, the same ones every time."""
    order = torch.randperm(total, generator=torch.Generator().manual_seed(0))
    return order[:count].to(device)
