"""Quantize the layers of one block, stage by stage."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from infopt.core.compression.statistics import (
    accumulate_hessian,
    complete_hessian,
    relative_error,
)
from infopt.core.compression.walk import Walk
from infopt.core.errors import NumericsError
from infopt.core.formats.number import QuantizedWeight
from infopt.core.quantization.gptq import GptqResult, gptq
from infopt.core.quantization.grid import Grid
from infopt.core.quantization.job import Job
from infopt.core.quantization.nearest import group_grids, quantize_nearest
from infopt.core.reports.quantize import LayerError

Group = tuple[str, ...]


@dataclass(frozen=True, slots=True)
class QuantizedLayer:
    """A layer's codes and what is reported of it."""

    weight: QuantizedWeight
    row: LayerError


def quantize_block(walk: Walk, index: int, job: Job) -> Iterator[QuantizedLayer]:
    """Quantize the loaded block of the walk in place; layers come as they are done.

    Layers that share an input share its Hessian. With `true_sequential` each group's inputs are
    observed after the groups before it were quantized, else all before any is.
    """
    groups = walk.input_groups(job.blocks[index].targets)
    stages = [[group] for group in groups] if job.settings.true_sequential else [groups]
    for number, stage in enumerate(stages, 1):
        hessians = _hessians(walk, stage) if job.settings.method == "gptq" else {}
        for group in stage:
            yield from _quantize_group(walk, group, hessians.get(group), job)
        if number < len(stages):
            walk.settle([name for group in stage for name in group])


@torch.no_grad()
def _quantize_group(
    walk: Walk, group: Group, hessian: Tensor | None, job: Job
) -> Iterator[QuantizedLayer]:
    weights = [walk.layer(name).weight.to(torch.float32) for name in group]
    sizes = [len(weight) for weight in weights]
    # Rows do not touch each other: layers with one Hessian are one taller layer.
    tall = torch.cat(weights)
    try:
        grid = group_grids(tall, job.number_format, mse=job.settings.grid == "mse")
        nearest = GptqResult(quantize_nearest(tall, job.number_format, grid), 0.0, None)
        found = nearest if hessian is None else _gptq(tall, hessian, grid, job)
    except NumericsError as error:
        raise NumericsError(f"{', '.join(group)}: {error.message}", error.hint) from error
    parts = zip(group, weights, _rows(found, sizes), _rows(nearest, sizes), strict=True)
    for name, weight, result, rounded in parts:
        quantized = result.weight.dequantize()
        row = LayerError(
            name=name,
            error=relative_error(weight, quantized, hessian),
            rtn_error=relative_error(weight, rounded.weight.dequantize(), hessian),
            bits=job.number_format.bits,
            group_size=job.number_format.group_size,
            damp=result.damp,
            fallback=result.fallback,
        )
        walk.layer(name).weight.copy_(quantized)
        yield QuantizedLayer(result.weight, row)


def _gptq(weight: Tensor, hessian: Tensor, grid: Grid, job: Job) -> GptqResult:
    settings = job.settings
    return gptq(
        weight,
        hessian,
        job.number_format,
        grid,
        act_order=settings.act_order,
        mse=settings.grid == "mse",
        damp=settings.damp_percent,
    )


def _rows(result: GptqResult, sizes: Sequence[int]) -> list[GptqResult]:
    """The result for a tall weight, parted into those of its layers."""
    weight = result.weight
    parts = zip(
        torch.split(weight.codes, list(sizes)),
        torch.split(weight.scales, list(sizes)),
        torch.split(weight.zeros, list(sizes)),
        strict=True,
    )
    return [
        replace(
            result,
            weight=replace(
                weight,
                codes=codes,
                scales=scales,
                zeros=zeros,
                group_index=weight.group_index.clone(),
            ),
        )
        for codes, scales, zeros in parts
    ]


def _hessians(walk: Walk, groups: Sequence[Group]) -> dict[Group, Tensor]:
    """The Hessian of each group's shared input, over all calibration batches."""
    leaders = {group[0]: group for group in groups}
    sums: dict[str, Tensor] = {}
    for name in leaders:
        columns = walk.layer(name).in_features
        sums[name] = torch.zeros(columns, columns, device=walk.device)
    seen = dict.fromkeys(leaders, 0)

    def sink(name: str, inputs: Tensor) -> None:
        seen[name] = accumulate_hessian(sums[name], inputs, seen[name])

    walk.observe(list(leaders), sink)
    for name, hessian in sums.items():
        if not bool(torch.isfinite(hessian.triu()).all()):
            raise NumericsError(
                f"the activations that reach {name} are not finite or overflow",
                "try --dtype float32; if it is so already, the weights are broken",
            )
    return {leaders[name]: complete_hessian(hessian) for name, hessian in sums.items()}
