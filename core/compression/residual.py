"""A decoder's residual stream: who reads it, who writes it, and how it is rotated.

With h the stream (rows) and Q orthogonal, h Q takes the place of h: an RMSNorm without a gain
commutes with Q, so its gain g goes into its readers, W diag(g) Q; a writer is Q^T W. Values are
rotated head by head on the way from the values' layer to the output layer, which attention, being
linear in them, does not notice (Ashkboos et al. 2024, arXiv 2404.00456).
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn

from infopt.core.formats.hadamard import Rotation

Gain = Callable[[str], Tensor]
"""Gives what a norm, by name, multiplies by: float64 [hidden]."""


@dataclass(frozen=True, slots=True)
class Values:
    """The way of the values: rows `start` to `stop` of `layer`, in heads of `size`, to `output`."""

    layer: str
    start: int
    stop: int
    size: int
    output: str


@dataclass(frozen=True, slots=True)
class Residual:
    """The modules around a stream of `size` values, by full name."""

    size: int
    embeddings: frozenset[str]
    """Layers whose rows start the stream; none in a part of it."""
    heads: frozenset[str]
    """Those of the readers that end it."""
    norms: Mapping[str, float]
    """RMSNorms on the stream; they multiply by their weight plus this."""
    readers: Mapping[str, str]
    """Layers [outputs, size] that are given a norm's output, and the norm; the head among them."""
    writers: frozenset[str]
    """Layers [size, inputs] whose output is added to the stream."""
    values: Mapping[str, Values]
    """By the values' layer."""

    def changes(self, parameter: str) -> bool:
        """Whether a rotation may change the parameter."""
        module = parameter.rpartition(".")[0]
        known = (self.embeddings, self.norms, self.readers, self.writers, self.values)
        return any(module in modules for modules in known)

    def within(self, block: str) -> "Residual":
        """The same with all names, those of a block's parts, made full."""

        def full(name: str) -> str:
            return f"{block}.{name}"

        return Residual(
            size=self.size,
            embeddings=frozenset(map(full, self.embeddings)),
            heads=frozenset(map(full, self.heads)),
            norms={full(norm): offset for norm, offset in self.norms.items()},
            readers={full(layer): full(norm) for layer, norm in self.readers.items()},
            writers=frozenset(map(full, self.writers)),
            values={
                full(layer): replace(way, layer=full(way.layer), output=full(way.output))
                for layer, way in self.values.items()
            },
        )

    def joined(self, others: Sequence["Residual"]) -> "Residual":
        """This and the parts of the same stream."""
        parts = (self, *others)
        return Residual(
            size=self.size,
            embeddings=frozenset().union(*(part.embeddings for part in parts)),
            heads=frozenset().union(*(part.heads for part in parts)),
            norms={k: v for part in parts for k, v in part.norms.items()},
            readers={k: v for part in parts for k, v in part.readers.items()},
            writers=frozenset().union(*(part.writers for part in parts)),
            values={k: v for part in parts for k, v in part.values.items()},
        )


@dataclass(frozen=True, slots=True, eq=False)
class Turn:
    """A rotation of the stream, and one of the values by the name of their layer."""

    residual: Residual
    stream: Rotation
    values: Mapping[str, Rotation]

    def apply(self, parameter: str, value: Tensor, gain: Gain) -> Tensor:
        """What becomes of a parameter, computed in float64, in its own dtype."""
        module, _, leaf = parameter.rpartition(".")
        residual = self.residual
        if module in residual.norms:
            return torch.full_like(value, 1.0 - residual.norms[module])
        if module in residual.embeddings:
            return self.stream.apply(value)
        writer = module in residual.writers
        ways = [
            way
            for way in residual.values.values()
            if module == (way.output if writer else way.layer)
        ]
        # Where two rotations meet in one tensor it is rounded once, at the end.
        changed = value.to(torch.float64) if ways else value
        if module in residual.readers and leaf == "weight":
            changed = self.stream.apply(changed, gain(residual.readers[module]))
        if writer:
            changed = self.stream.apply(changed.t()).t()  # a bias is a row, and its own t()
        for way in ways:
            turn = self.values[way.layer]
            if not writer:
                changed = turn_heads(changed, way, turn)
            elif leaf == "weight":
                changed = turn_columns(changed, turn)
        return changed.to(value.dtype)


def turn_heads(value: Tensor, way: Values, turn: Rotation) -> Tensor:
    """A weight [N, K] or bias [N] of the values' layer, its heads' rows rotated."""
    rows = value[way.start : way.stop]
    heads = rows.reshape(-1, way.size, *rows.shape[1:])
    turned = turn.apply(heads.transpose(1, -1)).transpose(1, -1).reshape(rows.shape)
    return torch.cat([value[: way.start], turned, value[way.stop :]])


def turn_columns(weight: Tensor, turn: Rotation) -> Tensor:
    """A weight [N, heads * size] that reads the values, rotated to read rotated ones."""
    return turn.apply(weight.reshape(len(weight), -1, turn.size)).reshape(weight.shape)


def rotate_parameters(turn: Turn, part: nn.Module) -> None:
    """Rotate the parameters of a model in memory; of a block, where `turn` has local names."""
    gains = {
        norm: part.get_parameter(f"{norm}.weight").to(torch.float64) + offset
        for norm, offset in turn.residual.norms.items()
    }
    for name, value in list(part.named_parameters(remove_duplicate=False)):
        if turn.residual.changes(name):
            put_parameter(part, name, turn.apply(name, value, gains.__getitem__))


def put_parameter(part: nn.Module, name: str, value: Tensor) -> None:
    """Set a parameter by its name, whatever its shape was."""
    owner, _, leaf = name.rpartition(".")
    part.get_submodule(owner)._parameters[leaf] = nn.Parameter(value, requires_grad=False)
