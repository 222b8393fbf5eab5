"""Attention in calls whose shape is told by positions alone: the same to the last bit, always.

Queries are taken in tiles of 16 positions, aligned to 16, over the keys up to the tile's end,
whether one query of a tile is new or all, and whoever else is in the step. What is not there is
masked.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

TILE = 16


@dataclass(frozen=True, slots=True)
class FixedReads:
    """One tile of one request."""

    rows: slice
    """Of the step's queries."""
    offset: int
    """Of the first of them within the tile."""
    slots: Tensor
    """[keys]; for what no new query sees, slots that one does, masked."""
    mask: Tensor
    """[16, keys], added to the scores."""


def plan_tiles(
    table: Sequence[int],
    context: int,
    start: int,
    length: int,
    block_size: int,
    window: int | None,
    dtype: torch.dtype,
    device: torch.device,
) -> list[FixedReads]:
    """The tiles of a request's last `length` of `context` tokens, its queries from row `start`."""
    blocks, tiles, position = torch.tensor(list(table)), [], context - length
    while position < context:
        first = position // TILE * TILE
        new = min(first + TILE, context) - position
        lowest = 0 if window is None else max(0, first - window + 1)
        keys, own = torch.arange(lowest, first + TILE), torch.arange(first, first + TILE)[:, None]
        hidden = keys > own
        if window is not None:
            hidden |= keys <= own - window
        # Slots that no new query sees may hold anything, NaN too: others stand in, masked.
        seen = 0 if window is None else max(0, position - window + 1)
        held = keys.clamp(min=seen, max=context - 1)
        slots = blocks[held // block_size] * block_size + held % block_size
        mask = torch.zeros(hidden.shape, dtype=dtype).masked_fill_(hidden, -torch.inf)
        rows = slice(start, start + new)
        tiles.append(FixedReads(rows, position - first, slots.to(device), mask.to(device)))
        start, position = start + new, position + new
    return tiles
