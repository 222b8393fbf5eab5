"""The shape that the settings of a structured pruning ask for."""

import math

import torch
from torch import nn

from infopt.core.artifact.read import Artifact
from infopt.core.compression.anatomy import Anatomy
from infopt.core.compression.shrink import Kept, shrink
from infopt.core.errors import UsageError
from infopt.core.models.hf import resolve, skeleton
from infopt.core.pruning.sizes import (
    Cost,
    Shape,
    between,
    rounded,
    solve,
    terms,
    width_step,
)
from infopt.core.recipe.prune import PruneSettings, width_of


def whole_shape(parts: Anatomy) -> Shape:
    """Of a model as it is."""
    return Shape(len(parts.blocks), parts.kv_groups, parts.ffn_size, parts.hidden_size)


def target_shape(artifact: Artifact, parts: Anatomy, settings: PruneSettings) -> Shape:
    """What is to stay; raises UsageError for sizes that do not fit, or out of reach, and
    UnsupportedError for parts that cannot be cut."""
    whole = whole_shape(parts)
    if settings.params is not None or settings.latency is not None:
        return _budget(artifact, parts, whole, settings)
    shape = Shape(
        _count("layers", settings.layers, whole.layers),
        _groups(parts, settings.heads),
        _ffn(parts, settings.ffn),
        _hidden(parts, settings),
    )
    if shape == whole:
        raise UsageError(
            f"nothing would be removed: {artifact.name} has {whole.layers} layers, "
            f"{whole.groups * parts.queries} heads, {whole.ffn} feed-forward channels and a hidden "
            f"width of {whole.hidden}"
        )
    return shape


def check_shape(artifact: Artifact, parts: Anatomy, settings: PruneSettings, target: Shape) -> None:
    """Raise UnsupportedError where the architecture cannot have the shape, or one on the way to it.

    Which units stay is not known yet, and the first ones do as well as any.
    """
    whole = whole_shape(parts)
    for shape in between(whole, target, settings.iterations):
        heads, ffn = (tuple(range(count)) for count in (shape.groups, shape.ffn))
        kept = Kept(
            layers=tuple(range(shape.layers)),
            heads=(heads,) * shape.layers if shape.groups < whole.groups else None,
            ffn=(ffn,) * shape.layers if shape.ffn < whole.ffn else None,
            hidden=tuple(range(shape.hidden)) if shape.hidden < whole.hidden else None,
        )
        shrink(artifact, parts, kept)


def needs_text(settings: PruneSettings, whole: Shape, shape: Shape) -> bool:
    """Whether the choice of what stays depends on the calibration text."""
    depth = shape.layers < whole.layers and settings.depth_importance == "block-influence"
    width = (shape.groups, shape.ffn) != (whole.groups, whole.ffn)
    # A cut of the hidden width corrects the norms by what was measured, whatever ranks it.
    return depth or (width and settings.importance == "minitron") or shape.hidden < whole.hidden


def parameter_cost(artifact: Artifact, parts: Anatomy) -> Cost:
    """Parameters, tied ones once."""
    return _cost(artifact, parts, read_only=False)


def read_cost(artifact: Artifact, parts: Anatomy) -> Cost:
    """Weights that are read for one token: all but the rows of embeddings that are not looked up.

    An embedding that is the head as well is read whole. What a memory-bound decode takes is about
    proportional to it; the KV cache, which depends on the length, is left out.
    """
    return _cost(artifact, parts, read_only=True)


def predicted_latency(artifact: Artifact, parts: Anatomy, shape: Shape) -> float:
    """The time of a decoded token as a share of the whole model's, by the bytes of its weights."""
    cost = read_cost(artifact, parts)
    return cost.of(shape) / cost.of(whole_shape(parts))


def _budget(artifact: Artifact, parts: Anatomy, whole: Shape, settings: PruneSettings) -> Shape:
    narrow = "ffn" not in parts.why_not
    if settings.params is not None:
        cost = parameter_cost(artifact, parts)
        return solve(cost, whole, settings.params, narrow=narrow, what=f"params {settings.params}")
    assert settings.latency is not None
    # In shares of the whole, as the setting and the range that an error tells.
    cost = read_cost(artifact, parts)
    cost = cost.scaled(1 / cost.of(whole))
    return solve(
        cost, whole, settings.latency, narrow=narrow, what=f"latency {settings.latency:g}x"
    )


def _cost(artifact: Artifact, parts: Anatomy, *, read_only: bool) -> Cost:
    axes: dict[str, dict[int, str]] = {}
    for axis in parts.hidden:
        axes.setdefault(axis.parameter, {})[axis.axis] = "hidden"
    for block in parts.blocks:
        for part, group in (("heads", block.heads), ("ffn", block.ffn)):
            for axis in group.axes if group is not None and part not in parts.why_not else ():
                axes.setdefault(axis.parameter, {})[axis.axis] = part
    model = skeleton(artifact, torch.float32)
    unread = _looked_up(model, artifact) if read_only else set()
    inside = parts.blocks[0].name.rpartition(".")[0] + "."
    blocks: list[tuple[tuple[int, ...], dict[int, str]]] = []
    ends: list[tuple[tuple[int, ...], dict[int, str]]] = []
    for name, value in model.named_parameters(remove_duplicate=False):
        if name not in unread and resolve(model, artifact, name):
            sized = (tuple(value.shape), axes.get(name, {}))
            (blocks if name.startswith(inside) else ends).append(sized)
    whole, count = whole_shape(parts), len(parts.blocks)
    return Cost(
        {power: size / count for power, size in terms(blocks, whole).items()}, terms(ends, whole)
    )


def _looked_up(model: nn.Module, artifact: Artifact) -> set[str]:
    """Embeddings of which one row is read; not one that the head shares."""
    head = model.get_output_embeddings()  # type: ignore[operator]
    embedding = model.get_input_embeddings()  # type: ignore[operator]
    names = {module: name for name, module in model.named_modules()}
    own_head = head is not None and bool(resolve(model, artifact, f"{names[head]}.weight"))
    return {
        f"{name}.weight"
        for module, name in names.items()
        if isinstance(module, nn.Embedding) and (module is not embedding or own_head)
    }


def _count(word: str, wanted: int | None, whole: int) -> int:
    if wanted is not None and wanted > whole:
        raise UsageError(f"{word} {wanted}: the model has {whole}")
    return whole if wanted is None else wanted


def _groups(parts: Anatomy, heads: int | None) -> int:
    """KV groups that stay, for a number of query heads."""
    if heads is None:
        return parts.kv_groups
    parts.require("heads")
    whole = parts.kv_groups * parts.queries
    if heads % parts.queries or heads > whole:
        raise UsageError(
            f"heads {heads}: {whole} query heads share {parts.kv_groups} key heads, and whole "
            f"groups of {parts.queries} go",
            f"choose a multiple of {parts.queries}, up to {whole}"
            if parts.queries > 1
            else f"choose up to {whole}",
        )
    return heads // parts.queries


def _ffn(parts: Anatomy, wanted: int | str | None) -> int:
    if wanted is None:
        return parts.ffn_size
    parts.require("ffn")
    width = _count("ffn", width_of(wanted, parts.ffn_size), parts.ffn_size)
    step = width_step(parts.ffn_size)
    return width if isinstance(wanted, int) else rounded(width, parts.ffn_size, step)


def _hidden(parts: Anatomy, settings: PruneSettings) -> int:
    if settings.hidden is None:
        return parts.hidden_size
    parts.require("hidden")
    width = _count("hidden", width_of(settings.hidden, parts.hidden_size), parts.hidden_size)
    if isinstance(settings.hidden, int):
        return width
    # Most configs want the hidden width to be a multiple of the number of heads.
    heads = _groups(parts, settings.heads) * parts.queries
    step = math.lcm(heads, 16 if parts.hidden_size >= 256 else 4)
    return rounded(width, parts.hidden_size, min(step, parts.hidden_size))
