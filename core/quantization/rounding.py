"""Round the weights of layers that share an input, in the way that the settings name."""

import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from infopt.core.compression.statistics import (
    InputStatistics,
    error_share,
    relative_error,
    row_powers,
)
from infopt.core.errors import NumericsError
from infopt.core.formats.fp8 import Fp8Format, to_fp8
from infopt.core.formats.nf4 import Nf4Format, quantize_nf4
from infopt.core.formats.number import IntegerFormat, QuantizedWeight
from infopt.core.formats.scheme import LayerScheme, StoredWeight
from infopt.core.quantization.awq import clipped_grids
from infopt.core.quantization.gptq import GptqResult, gptq
from infopt.core.quantization.grid import Grid
from infopt.core.quantization.nearest import group_grids, quantize_nearest
from infopt.core.recipe.quantize import QuantizeSettings
from infopt.core.reports.quantize import LayerError

STARVED = 128
"""A layer that saw fewer tokens than this, and fewer than others did, is rounded to nearest."""
_TALL = 2**26
"""Weights that are solved together, at most."""


@dataclass(frozen=True, slots=True)
class Layer:
    """A layer to be rounded: its weight float32 [N, K], and what is known of it."""

    name: str
    weight: Tensor
    scheme: LayerScheme
    clips: bool = False
    """Whether the range of each group is searched by the error of the outputs (AWQ)."""
    rtn_error: float | None = None
    """Where the weight was transformed: the error of rounding it as it was."""


@dataclass(frozen=True, slots=True)
class RoundedLayer:
    """A layer's codes and what is reported of it."""

    weight: StoredWeight
    row: LayerError


def round_layers(
    layers: Sequence[Layer], statistics: InputStatistics | None, settings: QuantizeSettings
) -> Iterator[RoundedLayer]:
    """Round layers that share an input; without statistics every input counts the same.

    Raises NumericsError naming the layers whose weights no format reaches.
    """
    for batch in _batches(layers):
        started = time.perf_counter()
        try:
            found = _round(batch, statistics, settings)
        except NumericsError as error:
            names = ", ".join(layer.name for layer in batch)
            raise NumericsError(f"{names}: {error.message}", error.hint) from error
        rows = [_row(*entry, statistics, settings) for entry in zip(batch, found, strict=True)]
        whole = sum(layer.weight.numel() for layer in batch)
        seconds = time.perf_counter() - started
        for layer, result, row in zip(batch, found, rows, strict=True):
            share = seconds * layer.weight.numel() / whole
            yield RoundedLayer(result.weight, row.model_copy(update={"seconds": share}))


def report_rounded(
    layer: Layer,
    weight: QuantizedWeight,
    statistics: InputStatistics | None,
    settings: QuantizeSettings,
    seconds: float = 0.0,
) -> RoundedLayer:
    """What is reported of a layer that was rounded elsewhere."""
    error = relative_error(layer.weight, weight.dequantize(), _hessian(statistics))
    found = _Found(weight, error, nearest_error(layer.weight, weight.format, statistics, settings))
    row = _row(layer, found, statistics, settings)
    return RoundedLayer(weight, row.model_copy(update={"seconds": seconds}))


def nearest_error(
    weight: Tensor,
    form: IntegerFormat,
    statistics: InputStatistics | None,
    settings: QuantizeSettings,
) -> float:
    """The relative error of rounding a weight [N, K] to nearest."""
    grid = group_grids(weight, form, mse=settings.grid == "mse")
    nearest = quantize_nearest(weight, form, grid).dequantize()
    return relative_error(weight, nearest, _hessian(statistics))


@dataclass(frozen=True, slots=True)
class _Found:
    weight: StoredWeight
    error: float
    rtn_error: float
    damp: float = 0.0
    fallback: str | None = None


def _batches(layers: Sequence[Layer]) -> Iterator[list[Layer]]:
    """Runs of layers of one scheme: rows do not touch each other, so they are one taller layer."""
    batch: list[Layer] = []
    for layer in layers:
        size = sum(other.weight.numel() for other in batch) + layer.weight.numel()
        alike = batch and (layer.scheme, layer.clips) == (batch[0].scheme, batch[0].clips)
        if batch and (not alike or size > _TALL):
            yield batch
            batch = []
        batch.append(layer)
    if batch:
        yield batch


@torch.no_grad()
def _round(
    batch: Sequence[Layer], statistics: InputStatistics | None, settings: QuantizeSettings
) -> list[_Found]:
    match batch[0].scheme.weight:
        case IntegerFormat() as form:
            return _round_integers(batch, form, statistics, settings)
        case Fp8Format() as form:
            # A scale of the whole tensor is each layer's own.
            fp8 = [to_fp8(layer.weight, form) for layer in batch]
            return [_nearest(*pair, statistics) for pair in zip(batch, fp8, strict=True)]
        case Nf4Format() as form:
            nf4 = [quantize_nf4(layer.weight, form) for layer in batch]
            return [_nearest(*pair, statistics) for pair in zip(batch, nf4, strict=True)]


def _nearest(layer: Layer, weight: StoredWeight, statistics: InputStatistics | None) -> _Found:
    error = relative_error(layer.weight, weight.dequantize(), _hessian(statistics))
    return _Found(weight, error, error)


def _hessian(statistics: InputStatistics | None) -> Tensor | None:
    return statistics.hessian if statistics is not None and statistics.rows else None


def _round_integers(
    batch: Sequence[Layer],
    form: IntegerFormat,
    statistics: InputStatistics | None,
    settings: QuantizeSettings,
) -> list[_Found]:
    tall = torch.cat([layer.weight for layer in batch])
    mse = settings.grid == "mse"
    plain = group_grids(tall, form, mse=mse)
    nearest = quantize_nearest(tall, form, plain)
    clips = batch[0].clips and statistics is not None
    grid = clipped_grids(tall, statistics.hessian, form) if clips and statistics else plain
    rounded = quantize_nearest(tall, form, grid) if clips else nearest
    result = GptqResult(rounded, 0.0, None)
    if settings.how == "gptq" and statistics is not None:
        result = _gptq(tall, form, grid, statistics, settings)
    hessian = _hessian(statistics)
    power = row_powers(tall, hessian)
    lost = row_powers(tall - nearest.dequantize(), hessian)
    own = lost
    if result.weight is not nearest:
        own = row_powers(tall - result.weight.dequantize(), hessian)
    sizes = [len(layer.weight) for layer in batch]
    shares = zip(*(torch.split(part, sizes) for part in (own, lost, power)), strict=True)
    return [
        _Found(weight, error_share(e, p), error_share(n, p), result.damp, result.fallback)
        for weight, (e, n, p) in zip(_rows(result.weight, sizes), shares, strict=True)
    ]


def _gptq(
    weight: Tensor,
    form: IntegerFormat,
    grid: Grid,
    statistics: InputStatistics,
    settings: QuantizeSettings,
) -> GptqResult:
    if starved := _starved(statistics, settings):
        return GptqResult(quantize_nearest(weight, form, grid), 0.0, f"rtn: {starved}")
    return gptq(
        weight,
        statistics.hessian,
        form,
        grid,
        act_order=settings.act_order,
        mse=settings.grid == "mse",
        damp=settings.damp_percent,
        drift=None if statistics.drift is None else settings.gptaq * statistics.drift,
    )


def _row(
    layer: Layer,
    found: _Found,
    statistics: InputStatistics | None,
    settings: QuantizeSettings,
) -> LayerError:
    form = layer.scheme.weight
    return LayerError(
        name=layer.name,
        error=found.error,
        rtn_error=found.rtn_error if layer.rtn_error is None else layer.rtn_error,
        bits=form.bits,
        group_size=form.group_size if isinstance(form, IntegerFormat) else None,
        damp=found.damp,
        fallback=found.fallback or _starved(statistics, settings),
        scheme=layer.scheme.describe(),
        tokens=statistics.rows if statistics is not None else 0,
    )


def _starved(statistics: InputStatistics | None, settings: QuantizeSettings) -> str | None:
    """That a layer, an expert mostly, saw too few tokens to be calibrated on."""
    tokens = settings.calibration.samples * settings.calibration.sequence_length
    if statistics is None or statistics.rows >= min(STARVED, tokens):
        return None
    return f"only {statistics.rows} tokens reached this layer"


def _rows(weight: QuantizedWeight, sizes: Sequence[int]) -> list[QuantizedWeight]:
    """A tall weight parted into those of its layers."""
    parts = zip(
        torch.split(weight.codes, list(sizes)),
        torch.split(weight.scales, list(sizes)),
        torch.split(weight.zeros, list(sizes)),
        strict=True,
    )
    return [
        replace(
            weight,
            codes=codes,
            scales=scales,
            zeros=zeros,
            group_index=weight.group_index.clone(),
        )
        for codes, scales, zeros in parts
    ]
