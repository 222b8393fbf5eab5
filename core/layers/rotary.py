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
    @property
    def beta_fast(self) -> float: ...
    @property
    def beta_slow(self) -> float: ...
    @property
    def truncate(self) -> bool: ...
    @property
    def short_factors(self) -> tuple[float, ...]: ...


def inverse_frequencies(dim: int, theta: float, scaling: Scaling | None = None) -> Tensor:
    """Radians per position of each pair of `dim` rotated columns, float32 [dim / 2]."""
    exponents = torch.arange(0, dim, 2, dtype=torch.int64).float() / dim
    frequencies = 1.0 / (theta**exponents)
    if scaling is None:
        return frequencies
    match scaling.kind:
        case "linear":
            return frequencies / scaling.factor
        case "llama3":
            return _llama3(frequencies, scaling)
        case "yarn":
            return _yarn(theta**exponents, dim, theta, scaling)
        case "longrope":
            return 1.0 / (torch.tensor(scaling.short_factors) * theta**exponents)
    raise AssertionError(f"unknown rope scaling {scaling.kind}")


def _yarn(periods: Tensor, dim: int, theta: float, scaling: Scaling) -> Tensor:
    """YaRN (Peng et al. 2023, arXiv 2309.00071): slow pairs are stretched, fast ones kept."""

    def pair_that_turns(times: float) -> float:
        turns = scaling.original_positions / (times * 2 * math.pi)
        return dim * math.log(turns) / (2 * math.log(theta))

    low, high = pair_that_turns(scaling.beta_fast), pair_that_turns(scaling.beta_slow)
    if scaling.truncate:
        low, high = math.floor(low), math.ceil(high)
    low, high = max(low, 0), min(high, dim - 1)
    width = high - low or 0.001
    kept = 1 - ((torch.arange(dim // 2, dtype=torch.float32) - low) / width).clamp(0, 1)
    # In the order of transformers' own operations: at high positions the last bit shows.
    return 1.0 / (scaling.factor * periods) * (1 - kept) + 1.0 / periods * kept


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
    """[T, 1, dim]"""
    sin: Tensor
    """[T, 1, dim], its first half negated."""

    @classmethod
    def at(
        cls, positions: Tensor, frequencies: Tensor, dtype: torch.dtype, magnitude: float = 1.0
    ) -> "Rotary":
        """For positions [T] and frequencies float32 [dim / 2]; rounded to dtype at the end.

        Sines and cosines are multiplied by `magnitude`.
        """
        angles = positions[:, None, None].float() * frequencies
        cos, sin = angles.cos() * magnitude, angles.sin() * magnitude
        return cls(
            torch.cat((cos, cos), dim=-1).to(dtype), torch.cat((-sin, sin), dim=-1).to(dtype)
        )

    def rotate_(self, x: Tensor) -> Tensor:
        """Rotate the first `dim` columns of heads [T, heads, head_dim] in place."""
        turned = x[..., : self.cos.shape[-1]]
        swapped = turned.roll(turned.shape[-1] // 2, dims=-1)
        turned.mul_(self.cos).addcmul_(swapped, self.sin)
        return x
