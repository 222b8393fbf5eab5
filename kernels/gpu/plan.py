"""How a step's attention is cut into programs: worked out by the host, sent over in one piece."""

from collections.abc import Sequence

import torch
from torch import Tensor

from infopt.kernels.gpu.paged_attention import FIXED_SPLIT, Part
from infopt.kernels.gpu.tile import Card, Tile, cdiv, power_of_two


def splits_for(card: Card, *, programs: int, context: int, block_n: int) -> int:
    """Programs that share the keys of a tile: enough to fill the card, a power of two.

    No more than the power of two above a quarter of its processors, and a tile of keys for each:
    more would take longer to put together than they save (sglang#21775).
    """
    most = min(power_of_two(card.processors // 4), cdiv(context, block_n))
    wanted = max(1, 2 * card.processors // max(programs, 1))
    return min(_power_below(wanted), power_of_two(most))


def fixed_splits(context: int) -> int:
    """A power of two, so that few kernels are compiled; splits that are empty change nothing."""
    return power_of_two(cdiv(context, FIXED_SPLIT))


def _power_below(number: int) -> int:
    return 1 << (number.bit_length() - 1)


def plan_part(
    card: Card,
    tile: Tile,
    tables: Sequence[Sequence[int]],
    contexts: Sequence[int],
    lengths: Sequence[int],
    *,
    heads: int,
    kv_heads: int,
    device: torch.device,
    fixed: bool = False,
) -> Part:
    """The requests of one launch, the tiles with most keys first, so that none ends late alone.

    lengths: how many queries each has. Raises AssertionError where the tile has not a row for every
    head that shares a key head.
    """
    each = tile.constants["BLOCK_M"] // (heads // kv_heads)
    assert each > 0, "a tile has fewer rows than heads share a key head"
    cut = [(r, first) for r, length in enumerate(lengths) for first in range(0, length, each)]
    cut.sort(key=lambda one: contexts[one[0]] - lengths[one[0]] + one[1], reverse=True)
    starts = [0]
    for length in lengths:
        starts.append(starts[-1] + length)
    # A width that is a multiple of 16 lets a kernel that was compiled once serve them all.
    width = cdiv(max(map(len, tables)), 16) * 16
    rows = [[*table, *[0] * (width - len(table))] for table in tables]
    sent = send(
        [[number for one in cut for number in one], starts, contexts, [n for r in rows for n in r]],
        device,
    )
    longest = max(contexts)
    splits = (
        fixed_splits(longest)
        if fixed
        else splits_for(
            card,
            programs=len(cut) * kv_heads,
            context=longest,
            block_n=tile.constants["BLOCK_N"],
        )
    )
    return Part(sent[0].view(-1, 2), sent[1], sent[2], sent[3].view(-1, width), splits, fixed)


def send(numbers: Sequence[Sequence[int]], device: torch.device) -> list[Tensor]:
    """Lists as int32 tensors on a device: one copy, from pinned memory, that nobody waits for."""
    sizes = [cdiv(len(part), 4) * 4 for part in numbers]
    pinned = device.type == "cuda"
    host = torch.zeros(sum(sizes), dtype=torch.int32, pin_memory=pinned)
    at = 0
    for part, size in zip(numbers, sizes, strict=True):
        host[at : at + len(part)] = torch.tensor(part, dtype=torch.int32)
        at += size
    there = host.to(device, non_blocking=pinned)
    return [piece[: len(part)] for piece, part in zip(there.split(sizes), numbers, strict=True)]
