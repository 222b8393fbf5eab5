"""How large the weights of each unit are, for a choice of units without any text."""

from dataclasses import dataclass

import torch
from torch import Tensor

from infopt.core.artifact.read import Artifact
from infopt.core.compression.anatomy import Anatomy
from infopt.core.compression.dissect import Axis
from infopt.core.models.conv1d import is_transposed
from infopt.core.models.hf import resolve, skeleton


@dataclass(frozen=True, slots=True)
class Magnitudes:
    """Sum of squares of each unit's weights, float32; an entry of heads and ffn for each block."""

    heads: tuple[Tensor, ...]
    """[kv_groups] each; empty where not proved."""
    ffn: tuple[Tensor, ...]
    """[ffn_size] each."""
    hidden: Tensor
    """[hidden_size]; empty where not proved."""


def magnitudes(artifact: Artifact, anatomy: Anatomy) -> Magnitudes:
    """Sum the squares of each unit's rows and columns, in float64; every tensor is read once."""
    axes: dict[str, list[tuple[Tensor, Axis, int]]] = {}
    heads: list[Tensor] = []
    ffn: list[Tensor] = []
    for block in anatomy.blocks:
        for group, found in ((block.heads, heads), (block.ffn, ffn)):
            if group is not None:
                found.append(torch.zeros(group.units, dtype=torch.float64))
                for axis in group.axes:
                    axes.setdefault(axis.parameter, []).append((found[-1], axis, group.units))
    size = anatomy.hidden_size
    hidden = torch.zeros(size if anatomy.hidden else 0, dtype=torch.float64)
    for axis in anatomy.hidden:
        axes.setdefault(axis.parameter, []).append((hidden, axis, size))
    model = skeleton(artifact)
    for parameter, own in axes.items():
        names = resolve(model, artifact, parameter)
        if not names:
            continue  # tied to another, which is counted
        value = artifact.tensor(names[0])
        layer = parameter.rpartition(".")[0]
        turned = value.ndim == 2 and is_transposed(model, layer)
        squares = (value.T if turned else value).to(torch.float64).square()
        for total, axis, units in own:
            # A reshape, since a sum over no dimension at all is a sum over all of them.
            along = squares.movedim(axis.axis, 0).reshape(squares.shape[axis.axis], -1).sum(dim=1)
            total += along[axis.by_unit(units)].sum(dim=1)
    return Magnitudes(
        tuple(t.float() for t in heads), tuple(t.float() for t in ffn), hidden.float()
    )


def largest(scores: Tensor, count: int) -> tuple[int, ...]:
    """The indices of the `count` largest scores [n], rising; of equals the first."""
    chosen = scores.sort(descending=True, stable=True).indices[:count]
    return tuple(sorted(int(i) for i in chosen))
