"""Scale a block's inputs against its weights before rounding, as AWQ or SmoothQuant would."""

from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from infopt.core.compression.gather import Group, gather
from infopt.core.compression.norms import gain_offset
from infopt.core.compression.pairs import Pair, find_pairs, scale_pair
from infopt.core.compression.statistics import InputStatistics
from infopt.core.compression.walk import Walk
from infopt.core.formats.activation import ActivationFormat
from infopt.core.formats.number import IntegerFormat
from infopt.core.formats.scheme import LayerScheme
from infopt.core.models.hf import resolve
from infopt.core.quantization.awq import Ranges, awq_scales
from infopt.core.quantization.job import Job
from infopt.core.quantization.rounding import nearest_error
from infopt.core.quantization.smooth import search_scales, smooth_scales
from infopt.core.recipe.quantize import QuantizeSettings

_FLOOR = 16.0
"""Where no norm is between, a layer writes to the residual stream, which is about as large for all
tokens but a few: errors count by their size, and only the few by their share."""
_SMOOTHED = LayerScheme(IntegerFormat(8, True, None), ActivationFormat("int", 8))
"""What a search assumes where the weights are left dense."""


def clips(settings: QuantizeSettings) -> bool:
    """Whether each group's range is searched by the error of the outputs; GPTQ does better on
    grids of least squared error."""
    return settings.method == "awq" and settings.clip and settings.how == "rtn"


@dataclass(slots=True)
class Scaled:
    """A block after scaling: the statistics of its inputs as they are now.

    changed: parameters that are no targets' weights, such as norms; rtn_errors: of the layers as
    they were.
    """

    statistics: dict[Group, InputStatistics]
    rtn_errors: dict[str, float]
    changed: set[str] = field(default_factory=set)


@torch.no_grad()
def scale_block(walk: Walk, index: int, groups: Sequence[Group], job: Job) -> Scaled:
    """Find and apply the scales of the loaded block; its function stays what it was."""
    statistics = gather(walk, groups, ranges=True)
    scaled = Scaled(statistics, _rtn_errors(walk, statistics, job))
    for pair in find_pairs(walk, index, job.blocks[index].targets):
        group = next((g for g in statistics if set(pair.layers) == set(g)), None)
        if group is None or statistics[group].rows == 0 or _skipped(pair, job):
            continue
        channels = pair.channels(len(statistics[group].hessian)).to(walk.device)
        scales = _search(walk, pair, channels, statistics[group], job)
        if pair.kind == "norm":
            scales = _storable(walk, pair, scales, job)
        scaled.changed.update(scale_pair(walk, pair, scales))
        statistics[group] = statistics[group].divided(scales[channels])
    scaled.changed -= {f"{name}.weight" for name in job.schemes}
    for name in scaled.changed:
        # What is computed with from here on is what will be read back.
        stored = job.artifact.dtype(resolve(walk.model, job.artifact, name)[0])
        parameter = walk.model.get_parameter(name)
        parameter.copy_(parameter.to(getattr(torch, stored)))
    return scaled


def _skipped(pair: Pair, job: Job) -> bool:
    """AWQ has no scale for columns that share one."""
    return job.settings.method == "awq" and pair.repeat > 1


def _search(
    walk: Walk, pair: Pair, channels: Tensor, statistics: InputStatistics, job: Job
) -> Tensor:
    """A scale for each of the source's channels; `channels` says which each column has."""
    weights = [walk.layer(name).weight.to(torch.float32) for name in pair.layers]
    scheme = job.schemes.get(pair.layers[0], _SMOOTHED)
    form = scheme.weight
    assert isinstance(form, IntegerFormat)
    assert statistics.abs_mean is not None and statistics.abs_max is not None
    if job.settings.method == "awq":
        ranges: Ranges = "clip" if clips(job.settings) else job.settings.grid
        return awq_scales(
            statistics.abs_mean, statistics.hessian, weights, form, ranges=ranges
        ).scales
    shared = channels if pair.repeat > 1 else None
    if job.settings.alpha != "search":
        return smooth_scales(statistics.abs_max, weights, float(job.settings.alpha), shared)
    assert statistics.sample is not None and scheme.activation is not None
    return search_scales(
        statistics.sample,
        statistics.abs_max,
        weights,
        form,
        scheme.activation,
        shared,
        floor=0.0 if pair.kind == "norm" else _FLOOR,
    ).scales


def _storable(walk: Walk, pair: Pair, scales: Tensor, job: Job) -> Tensor:
    """Scales that leave the norm's gain exact in the dtype that it is stored in.

    What rounding the gain would change is put into the layers' weights, which are rounded after.
    """
    weight = walk.model.get_parameter(f"{pair.source}.weight").to(torch.float32)
    offset = gain_offset(walk.model.get_submodule(pair.source)) or 0.0
    name = resolve(walk.model, job.artifact, f"{pair.source}.weight")[0]
    stored = getattr(torch, job.artifact.dtype(name))
    gain = weight + offset
    kept = ((gain / scales) - offset).to(stored).to(torch.float32) + offset
    usable = (kept != 0) & (gain != 0) & torch.isfinite(kept)
    return torch.where(usable, gain / kept, scales)


def _rtn_errors(walk: Walk, statistics: dict[Group, InputStatistics], job: Job) -> dict[str, float]:
    """Of each layer of the block as it is, rounded to nearest."""
    found = {}
    for group, part in statistics.items():
        for name in group:
            if name not in job.schemes:
                continue
            form = job.schemes[name].weight
            assert isinstance(form, IntegerFormat)
            weight = walk.layer(name).weight.to(torch.float32)
            found[name] = nearest_error(weight, form, part, job.settings)
    return found
