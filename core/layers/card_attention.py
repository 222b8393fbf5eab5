"""Self-attention by a GPU's kernels: what a step hands to its layers there.

Importing this imports Triton: only where a decoder has a card.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from infopt.core.layers.attention import Attention
from infopt.core.layers.rotary import Rotary
from infopt.kernels.attention.eight_bits import STORAGE
from infopt.kernels.attention.paged import AttentionPlan
from infopt.kernels.attention.scores import Scores
from infopt.kernels.gpu.paged_attention import Launch, Part, paged_attention
from infopt.kernels.gpu.plan import plan_part
from infopt.kernels.gpu.rope_cache import HeadWeights, Turn, rope_and_write
from infopt.kernels.gpu.tile import Card, Tile

_HELD = {held: dtype for dtype, held in STORAGE.items()}
"""The dtype of a cache's values by that of its tensor."""


@dataclass(frozen=True, slots=True)
class Planned:
    """One launch of attention."""

    rows: slice
    """Of the step's queries."""
    part: Part
    tile: Tile


class CardPlan(Protocol):
    """Which launches a layer's attention is made of."""

    def launches(self, layer: Attention, held: torch.dtype) -> Sequence[Planned]:
        """held: the dtype of keys and values."""
        ...


def launch_of(layer: Attention, held: torch.dtype, queries: int) -> Launch:
    """By which a layer's tile is chosen."""
    return Launch(
        queries=queries,
        group=layer.heads // layer.kv_heads,
        head_dim=layer.head_dim,
        held=held,
        window=layer.window is not None,
        fixed=layer.fixed,
    )


class StepPlan:
    """Of one step, from its tables: single tokens in one launch, longer runs of tokens in another;
    the same for all layers alike."""

    def __init__(self, card: Card, plan: AttentionPlan, device: torch.device) -> None:
        self._card, self._plan, self._device = card, plan, device
        self._planned: dict[object, tuple[Planned, ...]] = {}

    def launches(self, layer: Attention, held: torch.dtype) -> Sequence[Planned]:
        launch = launch_of(layer, held, 1)
        key = (layer.kv_heads, launch)
        if key not in self._planned:
            self._planned[key] = tuple(self._plan_for(layer, held))
        return self._planned[key]

    def _plan_for(self, layer: Attention, held: torch.dtype) -> Iterator[Planned]:
        plan, row = self._plan, 0
        for requests in (range(plan.single), range(plan.single, len(plan.lengths))):
            if not requests:
                continue
            some = slice(requests.start, requests.stop)
            lengths = plan.lengths[some]
            tile = launch_of(layer, held, max(lengths)).tile(self._card)
            part = plan_part(
                self._card,
                tile,
                plan.tables[some],
                plan.contexts[some],
                lengths,
                heads=layer.heads,
                kv_heads=layer.kv_heads,
                device=self._device,
                fixed=layer.fixed,
            )
            yield Planned(slice(row, row + sum(lengths)), part, tile)
            row += sum(lengths)


@dataclass(frozen=True, slots=True)
class CardInputs:
    """Where the tokens of one step stand, for every layer alike: as `Attending` has it."""

    card: Card
    rotaries: tuple[Rotary, ...]
    slots: Tensor
    """int64 [T]: the cache slots of the step's tokens; negative for rows of none."""
    plan: CardPlan

    def attend(self, layer: Attention, qkv: Tensor, cache: Tensor) -> Tensor:
        """Two launches and what the plan has, and no copy but the queries' own rotation."""
        tokens, heads, kv_heads = len(qkv), layer.heads, layer.kv_heads
        rows = qkv.view(tokens, heads + 2 * kv_heads, layer.head_dim)
        turn = norm = None
        if layer.rotary is not None:
            angles = self.rotaries[layer.rotary]
            turn = Turn(angles.cos, angles.sin)
        if layer.head_norm is not None:
            norm = HeadWeights(layer.head_norm.weight, layer.head_norm.eps)
        rope_and_write(self.card, rows, kv_heads, cache, self.slots, turn, norm, layer.kv_scales)
        query = rows[:, :heads]
        out = torch.empty_like(query, memory_format=torch.contiguous_format)
        scores = Scores(layer.scale, layer.window, layer.cap)
        for one in self.plan.launches(layer, _HELD.get(cache.dtype, cache.dtype)):
            paged_attention(
                self.card, query[one.rows], cache, kv_heads, one.part, scores, one.tile,
                out[one.rows],
            )  # fmt: skip
        return out.view(tokens, heads * layer.head_dim)
