"""Quantize one block: scale it, round its layers stage by stage, round the inputs they will see."""

import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from infopt.core.artifact.read import Artifact
from infopt.core.compression.gather import Group, gather
from infopt.core.compression.statistics import InputStatistics
from infopt.core.compression.targets import stages
from infopt.core.compression.walk import Walk
from infopt.core.formats.activation import FP8_MAX
from infopt.core.formats.layout import encode
from infopt.core.formats.number import IntegerFormat
from infopt.core.formats.scheme import StoredWeight
from infopt.core.models.conv1d import is_transposed
from infopt.core.models.hf import resolve
from infopt.core.quantization.autoround import autoround_block
from infopt.core.quantization.job import Job
from infopt.core.quantization.kv_scales import record_kv
from infopt.core.quantization.rounding import Layer, RoundedLayer, report_rounded, round_layers
from infopt.core.quantization.scaling import Scaled, clips, scale_block
from infopt.core.reports.quantize import LayerError

Tick = Callable[[str], None]
"""Is told the name of each layer that is done."""


@dataclass(slots=True)
class BlockResult:
    """What replaces the block's tensors, by their stored names, and what is reported of it."""

    tensors: dict[str, Tensor] = field(default_factory=dict)
    rows: list[LayerError] = field(default_factory=list)


@torch.no_grad()
def quantize_block(
    walk: Walk, reference: Walk | None, index: int, job: Job, tick: Tick
) -> BlockResult:
    """Quantize the loaded block of the walk in place.

    Layers that share an input share its statistics. With `true_sequential` each group's inputs are
    observed after the groups before it were quantized, else all before any is. `reference` is a
    walk through the original model that stands, loaded, at the same block.
    """
    result = BlockResult()
    if job.settings.kv_cache is not None:
        scales = record_kv(walk, job.settings.kv_cache)
        walk.round_kv(scales, job.settings.kv_cache)
        for name, scale in scales.items():
            result.tensors[_stored_side(name, job)] = scale
    groups = walk.input_groups(job.blocks[index].targets)
    scaled = scale_block(walk, index, groups, job) if job.scales else None
    if job.settings.how == "autoround":
        rounded = _autoround(walk, reference, index, groups, job)
        _take_over(walk, rounded, {}, job, result, tick)
    elif job.schemes:
        _round_stages(walk, reference, groups, scaled, job, result, tick)
    for name in sorted(scaled.changed if scaled else ()):
        _keep_dense(walk, name, job, result)
    return result


def _round_stages(
    walk: Walk,
    reference: Walk | None,
    groups: Sequence[Group],
    scaled: Scaled | None,
    job: Job,
    result: BlockResult,
    tick: Tick,
) -> None:
    settings = job.settings
    # Rounding alone changes no choice of a later group: what was gathered for scaling serves.
    again = job.observes and not (scaled is not None and settings.how == "rtn")
    in_turn = again and settings.true_sequential
    turns = stages(walk.model, groups) if in_turn else [list(groups)]
    static = settings.method == "fp8" and settings.fp8 == "static"
    drifting = reference if settings.gptaq > 0 else None
    known = scaled.statistics if scaled is not None else {}
    for stage in turns:
        if again:
            known = gather(walk, stage, ranges=static, reference=drifting)
        for group in stage:
            layers = [_layer(walk, name, scaled, job) for name in group]
            rounded = round_layers(layers, known.get(group), settings)
            _take_over(walk, rounded, _input_scales(group, known, job), job, result, tick)
        walk.settle([name for group in stage for name in group])


def _layer(walk: Walk, name: str, scaled: Scaled | None, job: Job) -> Layer:
    return Layer(
        name,
        walk.layer(name).weight.to(torch.float32),
        job.schemes[name],
        clips=clips(job.settings),
        rtn_error=scaled.rtn_errors[name] if scaled is not None else None,
    )


def _take_over(
    walk: Walk,
    rounded: Iterable[RoundedLayer],
    input_scales: dict[str, Tensor],
    job: Job,
    result: BlockResult,
    tick: Tick,
) -> None:
    """Put what was found into the walk's layers and into the result."""
    for layer in rounded:
        name = layer.row.name
        module, scheme = walk.layer(name), job.schemes[name]
        scale = input_scales.get(name)
        module.weight.copy_(layer.weight.dequantize())
        if scheme.activation is not None:
            walk.round_inputs(name, scheme.activation, scale)
        stored = resolve(walk.model, job.artifact, f"{name}.weight")[0]
        result.tensors.update(encoded(job, name, stored, layer.weight, scale))
        result.rows.append(layer.row)
        tick(name)


def encoded(
    job: Job, name: str, stored: str, weight: StoredWeight, input_scale: Tensor | None = None
) -> dict[str, Tensor]:
    """The tensors that replace the artifact's `stored`, the weight of the target `name`."""
    assert job.settings.format is not None
    stem, activation = stored.removesuffix("weight"), job.schemes[name].activation
    parts = encode(job.settings.format, weight, input_scale, activation=activation)
    return {f"{stem}{key}": part.cpu() for key, part in parts.items()}


def _input_scales(group: Group, known: dict[Group, InputStatistics], job: Job) -> dict[str, Tensor]:
    """Scales of static inputs; layers that share an input share its scale."""
    form = job.schemes[group[0]].activation
    if form is None or form.dynamic:
        return {}
    abs_max = known[group].abs_max
    largest = float(abs_max.max()) if abs_max is not None else 0.0
    scale = largest / FP8_MAX if largest > 0 else 1.0
    return {name: torch.tensor([scale]) for name in group}


def _autoround(
    walk: Walk, reference: Walk | None, index: int, groups: Sequence[Group], job: Job
) -> list[RoundedLayer]:
    assert reference is not None
    settings = job.settings
    started = time.perf_counter()
    statistics = gather(walk, groups)
    originals = {
        name: walk.layer(name).weight.to(torch.float32, copy=True)
        for group in groups
        for name in group
    }
    forms = {name: job.schemes[name].weight for name in originals}
    integers = {name: form for name, form in forms.items() if isinstance(form, IntegerFormat)}
    # The block is taught what the original block makes of the original inputs.
    reference.advance()
    found = autoround_block(
        walk,
        job.blocks[index].targets,
        integers,
        reference.hidden[1:],
        iterations=settings.iterations,
        mse=settings.grid == "mse",
        seed=settings.seed,
        activations={
            name: form for name in originals if (form := job.schemes[name].activation) is not None
        },
    ).weights
    seconds = time.perf_counter() - started
    whole = sum(weight.numel() for weight in originals.values())
    return [
        report_rounded(
            Layer(name, originals[name], job.schemes[name]),
            found[name],
            statistics[group],
            settings,
            seconds * originals[name].numel() / whole,
        )
        for group in groups
        for name in group
    ]


def stored_tensor(artifact: Artifact, stored: str, value: Tensor) -> Tensor:
    """A changed parameter in the dtype in which the artifact stores it."""
    dtype = getattr(torch, artifact.dtype(stored))
    return value.detach().to(device="cpu", dtype=dtype).contiguous()


def _keep_dense(walk: Walk, name: str, job: Job, result: BlockResult) -> None:
    """A parameter that scaling changed, as the artifact stores it."""
    stored = resolve(walk.model, job.artifact, name)[0]
    value = walk.model.get_parameter(name)
    if is_transposed(walk.model, name.rpartition(".")[0]) and value.ndim == 2:
        value = value.T
    result.tensors[stored] = stored_tensor(job.artifact, stored, value)


def _stored_side(name: str, job: Job) -> str:
    """The stored name of a tensor beside a block's layers, by how its layers are stored."""
    parent = name.rpartition(".")[0]
    for stored, target in job.stored.items():
        if target.startswith(f"{parent}."):
            rest = target.removeprefix(parent)
            return stored.removesuffix(f"{rest}.weight") + name.removeprefix(parent)
    return name
