"""Rotary position embedding (Su et al. 2021, arXiv 2104.09864), halves split as in Llama."""

import math
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor


class Scaling(Protocol):
    """How frequencies are stretched to longer contexts."""

    @property
    def kind(self) -> str: ...
    @property
    def factor(self) -> float: ...
    @property
    def low_freq_factor(self) -> float: ...
    @property
    def high_freq_factor(self) -> float: ...
    @property
    def original_positions(self) -> int: ...


def inverse_frequencies(head_dim: int, theta: float, scaling: Scaling | None = None) -> Tensor:
    """Radians per position of each pair, float32 [head_dim / 2]."""
    exponents = torch.arange(0, head_dim, 2, dtype=torch.int64).float() / head_dim
    frequencies = 1.0 / (theta**exponents)
    if scaling is None:
        return frequencies
    match scaling.kind:
        case "linear":
            return frequencies / scaling.factor
        case "llama3":
            return _llama3(frequencies, scaling)
    raise AssertionError(f"unknown rope scaling {scaling.kind}")


def _llama3(frequencies: Tensor, scaling: Scaling) -> Tensor:
    """Llama 3.1: long wavelengths are stretched, short ones kept, those between blended."""
    wavelengths = 2 * math.pi / frequencies
    low, high = scaling.low_freq_factor, scaling.high_freq_factor
    kept = (scaling.original_positions / wavelengths - low) / (high - low)
    blended = (1 - kept) * frequencies / scaling.factor + kept * frequencies
    long = wavelengths > scaling.original_positions / low
    short = wavelengths < scaling.original_positions / high
    return torch.where(long, frequencies / scaling.factor, torch.where(short, frequencies, blended))


@dataclass(frozen=True, slots=True)
class Rotary:
    """The angles of one step, worked out once for all layers."""

    cos: Tensor
    """[T, 1, head_dim]"""
    sin: Tensor
    """[T, 1, head_dim], its first half negated."""

    @classmethod
    def at(cls, positions: Tensor, frequencies: Tensor, dtype: torch.dtype) -> "Rotary":
        """For positions [T] and frequencies float32 [head_dim / 2]; rounded to dtype at the end."""
        angles = positions[:, None, None].float() * frequencies
        cos, sin = angles.cos(), angles.sin()
        return cls(
            torch.cat((cos, cos), dim=-1).to(dtype), torch.cat((-sin, sin), dim=-1).to(dtype)
        )

    def rotate_(self, x: Tensor) -> Tensor:
        """Rotate heads [T, heads, head_dim] in place."""
        swapped = x.roll(x.shape[-1] // 2, dims=-1)
        return x.mul_(self.cos).addcmul_(swapped, self.sin)
