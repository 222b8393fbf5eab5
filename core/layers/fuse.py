"""Projections of the same input as one, their outputs side by side (QKV; gate and up)."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from infopt.core.layers.int8 import Int8Linear
from infopt.core.layers.linear import Linear, Projection, fused
from infopt.core.layers.quantized import QuantizedLinear, fused_quantized
from infopt.core.layers.rounded import RoundedLinear


@dataclass(frozen=True, slots=True)
class SideBySide:
    """Projections that are stored differently, run one after the other."""

    parts: tuple[Projection, ...]

    def __call__(self, x: Tensor) -> Tensor:
        return torch.cat([part(x) for part in self.parts], dim=-1)

    @property
    def nbytes(self) -> int:
        return sum(part.nbytes for part in self.parts)


def side_by_side(parts: Sequence[Projection]) -> Projection:
    """One product where all parts hold their weight and round their input alike."""
    linears = [part for part in parts if isinstance(part, Linear)]
    if len(linears) == len(parts):
        return fused(linears)
    rounded = [part for part in parts if isinstance(part, RoundedLinear)]
    if len(rounded) == len(parts) and _alike(rounded):
        first = rounded[0]
        whole = side_by_side([part.linear for part in rounded])
        return RoundedLinear(whole, first.activation, first.input_scale)
    integers = [part for part in parts if isinstance(part, Int8Linear)]
    if len(integers) == len(parts) and _alike(integers):
        return _fused_int8(integers)
    packed = [part for part in parts if isinstance(part, QuantizedLinear)]
    if len(packed) == len(parts) and (joined := fused_quantized(packed)) is not None:
        return joined
    return SideBySide(tuple(parts))


def _alike(parts: Sequence[RoundedLinear] | Sequence[Int8Linear]) -> bool:
    first = parts[0]
    return all(
        part.activation == first.activation and _same(part.input_scale, first.input_scale)
        for part in parts
    )


def _same(one: Tensor | None, other: Tensor | None) -> bool:
    if one is None or other is None:
        return one is other
    return torch.equal(one.flatten(), other.flatten())


def _fused_int8(parts: Sequence[Int8Linear]) -> Int8Linear:
    biases = [part.bias for part in parts if part.bias is not None]
    assert len(biases) in (0, len(parts)), "either all parts have a bias or none"
    return Int8Linear(
        codes=torch.cat([part.codes for part in parts]),
        scales=torch.cat([part.scales for part in parts]),
        activation=parts[0].activation,
        bias=torch.cat(biases) if biases else None,
        input_scale=parts[0].input_scale,
        fixed=parts[0].fixed,
    )
