"""A smaller checkpoint from a larger one: blocks, heads and channels left out, nothing retrained.

Where the hidden width is cut, its norms see fewer channels; that is right where those that are gone
were as large as the others, and `Kept.gains` corrects the norms where they were not.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

from infopt.core.artifact.read import Artifact
from infopt.core.compression.anatomy import Anatomy
from infopt.core.compression.dissect import Group
from infopt.core.compression.norms import gain_offset
from infopt.core.compression.proof import (
    Cut,
    check_blocks,
    check_shapes,
    embedding_ratio,
    sliced,
    small_skeleton,
)
from infopt.core.compression.smaller import Widths, smaller_config
from infopt.core.errors import UnsupportedError, UsageError
from infopt.core.models.conv1d import TransposedLinear
from infopt.core.models.hf import blocks, skeleton
from infopt.core.models.sources import find_source


@dataclass(frozen=True, slots=True)
class Kept:
    """What stays; every tuple rises. None: all of it.

    `heads` and `ffn` have an entry for each block that stays, in their order, all of one length:
    the KV groups and channels that stay in it.
    """

    layers: tuple[int, ...]
    heads: tuple[tuple[int, ...], ...] | None = None
    ffn: tuple[tuple[int, ...], ...] | None = None
    hidden: tuple[int, ...] | None = None
    gains: Mapping[str, float] = field(default_factory=dict)
    """What norms on the stream, by the model's full name, are multiplied by where hidden is cut."""


@dataclass(frozen=True, slots=True)
class Shrunk:
    """A checkpoint to be written: `write_artifact(..., tensors=it.tensors(), config=it.config)`."""

    config: dict[str, Any]
    tensors: Callable[[], Iterator[tuple[str, Tensor]]]
    """Stored names and tensors in the stored dtype, one at a time; may be called again."""
    parameters: int


@dataclass(frozen=True, slots=True)
class _Scale:
    """A parameter w becomes (w + offset) * factor - offset."""

    factor: float
    offset: float = 0.0

    def apply(self, value: Tensor) -> Tensor:
        changed = (value.to(torch.float64) + self.offset) * self.factor - self.offset
        return changed.to(value.dtype)


@dataclass(frozen=True, slots=True)
class _Piece:
    """How a stored tensor of the smaller checkpoint is made."""

    source: str
    parameter: str
    cuts: tuple[Cut, ...]
    """Along the stored axes."""


def shrink(artifact: Artifact, anatomy: Anatomy, kept: Kept) -> Shrunk:
    """Slice the stored tensors, renumber the blocks and change the config.

    The smaller architecture is tried on made-up weights first. Raises UsageError for indices that
    do not fit, UnsupportedError for parts that are not proved or a shape that the architecture's
    config cannot say.
    """
    _check(anatomy, kept)
    model = skeleton(artifact, torch.float32)
    origin = _origin(model, anatomy, kept)
    cuts = _cuts(anatomy, kept)
    pieces = _pieces(model, artifact, anatomy, kept, cuts)
    config = _config(artifact, model, anatomy, kept)
    shapes = {name: _shape(artifact, piece) for name, piece in pieces.items()}
    small, summary = small_skeleton(artifact, config, shapes)
    check_shapes(artifact.name, model, small, origin, cuts)
    scales = _gains(model, kept)
    if kept.hidden is None:
        _prove(artifact, model, small, anatomy, kept, cuts)
    else:
        _prove_without_hidden(artifact, model, anatomy, kept)
        scales = _merged(scales, _embedding_scales(artifact, model, small, kept.hidden, cuts))

    def tensors() -> Iterator[tuple[str, Tensor]]:
        for name, piece in sorted(pieces.items()):
            value = sliced(artifact.tensor(piece.source), piece.cuts)
            if piece.parameter in scales:
                value = scales[piece.parameter].apply(value)
            yield name, value.contiguous()

    return Shrunk(config, tensors, summary.summary().parameters)


def _check(anatomy: Anatomy, kept: Kept) -> None:
    """Raise UsageError or UnsupportedError for what cannot stay."""
    total = len(anatomy.blocks)
    _check_units("layers", kept.layers, total)
    for part, entries, units in (
        ("heads", kept.heads, anatomy.kv_groups),
        ("ffn", kept.ffn, anatomy.ffn_size),
    ):
        if entries is None:
            continue
        anatomy.require("heads" if part == "heads" else "ffn")
        if len(entries) != len(kept.layers) or len({len(entry) for entry in entries}) != 1:
            raise UsageError(f"{part}: every block that stays must keep as many as the others")
        for entry in entries:
            _check_units(part, entry, units)
    if kept.hidden is not None:
        anatomy.require("hidden")
        _check_units("hidden", kept.hidden, anatomy.hidden_size)


def _check_units(part: str, units: Sequence[int], total: int) -> None:
    if not units or list(units) != sorted(set(units)) or units[0] < 0 or units[-1] >= total:
        raise UsageError(f"{part}: what stays must be some of 0 to {total - 1}, rising")


def _origin(model: PreTrainedModel, anatomy: Anatomy, kept: Kept) -> dict[str, str]:
    """The original's name of each parameter of the smaller model."""
    names = [block.name for block in anatomy.blocks]
    found = {
        name: name
        for name, _ in model.named_parameters(remove_duplicate=False)
        if not name.startswith(names[0].rpartition(".")[0] + ".")
    }
    for new, old in enumerate(kept.layers):
        for local, _ in model.get_submodule(names[old]).named_parameters():
            found[f"{names[new]}.{local}"] = f"{names[old]}.{local}"
    return found


def _cuts(anatomy: Anatomy, kept: Kept) -> dict[str, list[Cut]]:
    """By the original's parameter: the axes that become shorter."""
    found: dict[str, list[Cut]] = {}
    for axis in anatomy.hidden if kept.hidden is not None else ():
        assert kept.hidden is not None
        found.setdefault(axis.parameter, []).append((axis.axis, axis.indices(kept.hidden)))
    for groups in _cut_groups(anatomy, kept).values():
        for group, units in groups:
            for axis in group.axes:
                found.setdefault(axis.parameter, []).append((axis.axis, axis.indices(units)))
    return found


def _cut_groups(anatomy: Anatomy, kept: Kept) -> dict[int, list[tuple[Group, tuple[int, ...]]]]:
    """By the original's block: its parts that are cut, and the units that stay."""
    found: dict[int, list[tuple[Group, tuple[int, ...]]]] = {old: [] for old in kept.layers}
    for new, old in enumerate(kept.layers):
        block = anatomy.blocks[old]
        for group, entries in ((block.heads, kept.heads), (block.ffn, kept.ffn)):
            if entries is not None:
                assert group is not None  # require() has seen to it
                found[old].append((group, entries[new]))
    return found


def _pieces(
    model: PreTrainedModel,
    artifact: Artifact,
    anatomy: Anatomy,
    kept: Kept,
    cuts: Mapping[str, Sequence[Cut]],
) -> dict[str, _Piece]:
    """The stored tensors of the smaller checkpoint, by name."""
    names = [block.name for block in anatomy.blocks]
    places = {old: new for new, old in enumerate(kept.layers)}
    inside = names[0].rpartition(".")[0] + "."
    found: dict[str, _Piece] = {}
    parameters = [name for name, _ in model.named_parameters(remove_duplicate=False)]
    for parameter in dict.fromkeys([*parameters, *model.state_dict()]):
        source = find_source(model, artifact, parameter)
        if not source.names:
            continue  # tied to another
        stored = name = source.names[0]
        if parameter.startswith(inside):
            old = int(parameter.removeprefix(inside).split(".")[0])
            if old not in places:
                continue
            name = _renumbered(stored, old, places[old])
        own = cuts.get(parameter, ()) if source.part is None else ()
        owner = model.get_submodule(parameter.rpartition(".")[0])
        if isinstance(owner, TransposedLinear) and len(artifact.shape(stored)) == 2:
            own = [(1 - axis, indices) for axis, indices in own]
        found[name] = _Piece(stored, parameter, tuple(own))
    return found


def _renumbered(stored: str, old: int, new: int) -> str:
    """The name with the block's number, its first whole part that is this number, changed."""
    parts = stored.split(".")
    if str(old) not in parts:
        raise UnsupportedError(f"the name of the tensor {stored} does not tell its block, {old}")
    parts[parts.index(str(old))] = str(new)
    return ".".join(parts)


def _shape(artifact: Artifact, piece: _Piece) -> tuple[int, ...]:
    shape = list(artifact.shape(piece.source))
    for axis, indices in piece.cuts:
        shape[axis] = len(indices)
    return tuple(shape)


def _config(
    artifact: Artifact, model: PreTrainedModel, anatomy: Anatomy, kept: Kept
) -> dict[str, Any]:
    groups = anatomy.kv_groups
    old = Widths(
        layers=tuple(range(len(anatomy.blocks))),
        hidden=anatomy.hidden_size,
        heads=groups * anatomy.queries,
        kv_groups=groups,
        head_dim=anatomy.head_dim,
        ffn=anatomy.ffn_size or None,
    )
    stay = groups if kept.heads is None else len(kept.heads[0])
    new = replace(
        old,
        layers=kept.layers,
        hidden=old.hidden if kept.hidden is None else len(kept.hidden),
        heads=stay * anatomy.queries,
        kv_groups=stay,
        ffn=old.ffn if kept.ffn is None else len(kept.ffn[0]),
    )
    return smaller_config(model, artifact.config, old, new)


def _prove(
    artifact: Artifact,
    model: PreTrainedModel,
    small: PreTrainedModel,
    anatomy: Anatomy,
    kept: Kept,
    cuts: Mapping[str, Sequence[Cut]],
) -> None:
    groups = _cut_groups(anatomy, kept)
    check_blocks(artifact.name, model, small, kept.layers, groups, cuts)


def _prove_without_hidden(
    artifact: Artifact, model: PreTrainedModel, anatomy: Anatomy, kept: Kept
) -> None:
    """A cut of the hidden width changes what norms compute, so all but that is tried; nothing is
    where the config cannot say the one without the other."""
    rest = replace(kept, hidden=None, gains={})
    cuts = _cuts(anatomy, rest)
    pieces = _pieces(model, artifact, anatomy, rest, cuts)
    shapes = {name: _shape(artifact, piece) for name, piece in pieces.items()}
    try:
        small, _ = small_skeleton(artifact, _config(artifact, model, anatomy, rest), shapes)
        check_shapes(artifact.name, model, small, _origin(model, anatomy, rest), cuts)
    except UnsupportedError:
        return
    _prove(artifact, model, small, anatomy, rest, cuts)


def _gains(model: PreTrainedModel, kept: Kept) -> dict[str, _Scale]:
    found: dict[str, _Scale] = {}
    for norm, factor in kept.gains.items():
        offset = gain_offset(model.get_submodule(norm))
        assert offset is not None, f"{norm} is no norm"
        found[f"{norm}.weight"] = _Scale(factor, offset)
    return found


def _embedding_scales(
    artifact: Artifact,
    model: PreTrainedModel,
    small: PreTrainedModel,
    hidden: Sequence[int],
    cuts: Mapping[str, Sequence[Cut]],
) -> dict[str, _Scale]:
    """Where embeddings are scaled by the hidden width, the embedding takes up the difference.

    A head that is tied to it grows as well, which the norm before it makes up for.
    """
    ratio = embedding_ratio(artifact.name, model, small, hidden, cuts)
    if ratio == 1.0:
        return {}
    embedding = model.get_input_embeddings()
    name = next(n for n, module in model.named_modules() if module is embedding)
    found = {f"{name}.weight": _Scale(ratio)}
    if not getattr(model.config.get_text_config(), "tie_word_embeddings", False):
        return found
    inside = blocks(model)[0][0].rpartition(".")[0] + "."
    norms = [
        (norm, offset)
        for norm, module in model.named_modules()
        if f"{norm}.weight" in cuts
        and not norm.startswith(inside)
        and (offset := gain_offset(module)) is not None
    ]
    if len(norms) != 1:
        raise UnsupportedError(
            f"the hidden width of {artifact.name} cannot be cut: its embeddings are scaled by it, "
            "and no one norm lies before the head"
        )
    norm, offset = norms[0]
    return found | {f"{norm}.weight": _Scale(1 / ratio, offset), f"{norm}.bias": _Scale(1 / ratio)}


def _merged(one: Mapping[str, _Scale], other: Mapping[str, _Scale]) -> dict[str, _Scale]:
    found = {**one, **other}
    for name in one.keys() & other.keys():
        found[name] = replace(one[name], factor=one[name].factor * other[name].factor)
    return found
