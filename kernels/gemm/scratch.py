"""Buffers that are used again: a product that dequantizes allocates nothing."""

import math
from collections.abc import Sequence

import torch
from torch import Tensor


class Scratch:
    """One buffer for each purpose, as large as was ever asked for; for a single thread."""

    def __init__(self) -> None:
        self._held: dict[tuple[str, torch.dtype, torch.device], Tensor] = {}

    def take(
        self, purpose: str, shape: Sequence[int], dtype: torch.dtype, device: torch.device
    ) -> Tensor:
        """A contiguous tensor that holds anything, until the same purpose is asked for again."""
        size, key = math.prod(shape), (purpose, dtype, device)
        held = self._held.get(key)
        if held is None or held.numel() < size:
            # Not of inference mode, or nobody could write into it outside of that.
            with torch.inference_mode(False):
                held = self._held[key] = torch.empty(size, dtype=dtype, device=device)
        return held[:size].view(*shape)
