"""Causal attention of new tokens over a paged cache, in plain torch.

`paged_attention` is the truth in its plainest form. `planned_attention` is what runs: what is the
same for every layer of a step (which slots to read, what to mask) is worked out once, for each
window that layers look back on.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from infopt.kernels.attention.cache import by_slot
from infopt.kernels.attention.eight_bits import STORAGE, decode
from infopt.kernels.attention.fixed import FixedReads, plan_tiles

# Up to this context, padding costs less than another call.
_PADDED_FREELY = 256


def paged_attention(
    query: Tensor,
    key_cache: Tensor,
    value_cache: Tensor,
    block_tables: Tensor,
    context_lengths: Sequence[int],
    query_starts: Sequence[int],
    scale: float,
    *,
    window: int | None = None,
    cap: float | None = None,
) -> Tensor:
    """Attend causally, request by request; softmax in float32.

    query [T, heads, head_dim]; caches [blocks, block_size, kv_heads, head_dim]; block_tables
    [requests, width]. Request r owns the queries query_starts[r] to query_starts[r + 1], which are
    the last of its context_lengths[r] tokens, and see `window` tokens, their own among them. Scores
    become cap * tanh(score / cap). Returns [T, heads, head_dim].
    """
    output = torch.empty_like(query)
    group = query.shape[1] // key_cache.shape[2]
    for r, context in enumerate(context_lengths):
        rows = slice(query_starts[r], query_starts[r + 1])
        keys = key_cache[block_tables[r]].flatten(0, 1)[:context].repeat_interleave(group, dim=1)
        values = (
            value_cache[block_tables[r]].flatten(0, 1)[:context].repeat_interleave(group, dim=1)
        )
        scores = torch.einsum("thd,chd->htc", query[rows].float(), keys.float()) * scale
        position = torch.arange(context, device=query.device)
        own = position[context - scores.shape[1] :]
        if cap is not None:
            scores = cap * torch.tanh(scores / cap)
        hidden = position > own[:, None]
        if window is not None:
            hidden |= position <= own[:, None] - window
        scores = scores.masked_fill(hidden, -torch.inf)
        attended = torch.einsum("htc,chd->thd", scores.softmax(-1), values.float())
        output[rows] = attended.to(query.dtype)
    return output


@dataclass(frozen=True, slots=True)
class Reads:
    """One attention call: `requests` of equal query length over `context` slots each."""

    rows: slice
    """Of the step's queries."""
    slots: Tensor
    """[requests * context]; a request that is shorter reads its first slot again, masked."""
    requests: int
    mask: Tensor | None
    """Added to the scores; None where nothing but plain causality masks."""


@dataclass(frozen=True, slots=True)
class WindowReads:
    """What one step reads, for every layer with the same window."""

    decodes: tuple[Reads, ...]
    chunks: tuple[Reads, ...]
    tiles: tuple[FixedReads, ...] = ()
    """In place of both, where shapes must not depend on the step."""


class AttentionPlan:
    """What one step reads, worked out when a layer with a window first asks for it."""

    def __init__(
        self,
        block_tables: Sequence[Sequence[int]],
        context_lengths: Sequence[int],
        query_starts: Sequence[int],
        block_size: int,
        dtype: torch.dtype,
        device: torch.device,
    ) -> None:
        """Requests with a single query come first, best in the order of their contexts.

        Contexts include the step's own tokens, which must be in the cache before attention runs.
        Of a table, only the blocks are looked at in which the window lies.
        """
        self._tables, self._contexts, self._starts = block_tables, context_lengths, query_starts
        self._lengths = [query_starts[r + 1] - query_starts[r] for r in range(len(context_lengths))]
        single = next((r for r, n in enumerate(self._lengths) if n > 1), len(self._lengths))
        assert all(n > 1 for n in self._lengths[single:]), "requests with one query come first"
        self._single, self._block_size = single, block_size
        self._dtype, self._device = dtype, device
        self._reads: dict[tuple[int | None, bool], WindowReads] = {}

    @property
    def lengths(self) -> Sequence[int]:
        """How many queries each request has."""
        return self._lengths

    @property
    def single(self) -> int:
        """How many requests have one query; they come first."""
        return self._single

    @property
    def contexts(self) -> Sequence[int]:
        """Tokens of each request in the cache, the step's own among them."""
        return self._contexts

    @property
    def tables(self) -> Sequence[Sequence[int]]:
        """The blocks of each request."""
        return self._tables

    def reads(self, window: int | None = None, *, fixed: bool = False) -> WindowReads:
        """Of layers that look back on `window` tokens, or on all.

        `fixed`: in calls whose shapes do not depend on what else is in the step.
        """
        found = self._reads.get((window, fixed))
        if found is None:
            found = self._tiles(window) if fixed else self._planned(window)
            self._reads[window, fixed] = found
        return found

    def _tiles(self, window: int | None) -> WindowReads:
        tiles = [
            tile
            for r, length in enumerate(self._lengths)
            for tile in plan_tiles(
                self._tables[r],
                self._contexts[r],
                self._starts[r],
                length,
                self._block_size,
                window,
                self._dtype,
                self._device,
            )
        ]
        return WindowReads((), (), tuple(tiles))

    def _planned(self, window: int | None) -> WindowReads:
        seen = [min(context, window or context) for context in self._contexts[: self._single]]
        decodes = tuple(self._decodes(rows, seen[rows]) for rows in _alike(seen))
        chunks = tuple(self._chunk(r, window) for r in range(self._single, len(self._lengths)))
        return WindowReads(decodes, chunks)

    def _decodes(self, rows: slice, seen: Sequence[int]) -> Reads:
        """One query a request, padded to the longest run of tokens that one sees."""
        tables, longest = self._tables[rows], max(seen)
        width = -(-max(self._contexts[rows]) // self._block_size)
        padded = [[*table[:width], *[0] * (width - len(table))] for table in tables]
        position = torch.arange(longest)
        beyond = position >= torch.tensor(seen)[:, None]
        first = torch.tensor(self._contexts[rows])[:, None] - torch.tensor(seen)[:, None]
        positions = first + position.masked_fill(beyond, 0)
        slots = _slots(torch.tensor(padded), positions, self._block_size)
        mask = None
        if min(seen) < longest:
            mask = torch.zeros(beyond.shape, dtype=self._dtype).masked_fill_(beyond, -torch.inf)
            mask = mask[:, None, None].to(self._device)
        return Reads(rows, slots.flatten().to(self._device), len(tables), mask)

    def _chunk(self, r: int, window: int | None) -> Reads:
        """Several queries of one request; the first chunk needs no mask but the causal one."""
        context, start, length = self._contexts[r], self._starts[r], self._lengths[r]
        first = 0 if window is None else max(0, context - length - window + 1)
        position = torch.arange(first, context)
        table = torch.tensor([list(self._tables[r])])
        slots = _slots(table, position[None], self._block_size).flatten().to(self._device)
        mask = None
        if length < context or (window is not None and window < context):
            own = position[-length:, None]
            hidden = position > own
            if window is not None:
                hidden |= position <= own - window
            mask = torch.zeros(hidden.shape, dtype=self._dtype).masked_fill_(hidden, -torch.inf)
            mask = mask.to(self._device)
        return Reads(slice(start, start + length), slots, 1, mask)


def plan_attention(
    block_tables: Sequence[Sequence[int]],
    context_lengths: Sequence[int],
    query_starts: Sequence[int],
    block_size: int,
    dtype: torch.dtype,
    device: torch.device,
) -> AttentionPlan:
    """Plan one step: see `AttentionPlan`."""
    return AttentionPlan(block_tables, context_lengths, query_starts, block_size, dtype, device)


def _alike(contexts: Sequence[int]) -> Iterator[slice]:
    """Runs of requests to pad to one length: none long is padded to more than twice its own."""
    start = 0
    for r in range(1, len(contexts) + 1):
        if r == len(contexts) or contexts[r] > max(_PADDED_FREELY, 2 * contexts[start]):
            yield slice(start, r)
            start = r


def _slots(tables: Tensor, positions: Tensor, block_size: int) -> Tensor:
    """Positions [R, C] of requests with block tables [R, W] -> slots [R, C]."""
    return tables.gather(1, positions // block_size) * block_size + positions % block_size


def planned_attention(
    query: Tensor, cache: Tensor, reads: WindowReads, scale: float, cap: float | None = None
) -> Tensor:
    """The same as `paged_attention` over a layer's cache as `new_cache` makes it.

    query [T, heads, head_dim] -> [T, heads, head_dim]. The softmax is in float32.
    """
    if len(reads.decodes) == 1 and not reads.chunks:
        return _attend_decodes(query, cache, reads.decodes[0], scale, cap)
    output = torch.empty(query.shape, dtype=query.dtype, device=query.device)
    for part in reads.decodes:
        output[part.rows] = _attend_decodes(query[part.rows], cache, part, scale, cap)
    for part in reads.chunks:
        output[part.rows] = _attend_chunk(query[part.rows], cache, part, scale, cap)
    for tile in reads.tiles:
        new = tile.rows.stop - tile.rows.start
        whole = query.new_zeros(len(tile.mask), *query.shape[1:])
        whole[tile.offset : tile.offset + new] = query[tile.rows]
        found = Reads(slice(0, len(tile.mask)), tile.slots, 1, tile.mask)
        attended = _attend_chunk(whole, cache, found, scale, cap)
        output[tile.rows] = attended[tile.offset : tile.offset + new]
    return output


def _attend_decodes(
    query: Tensor, cache: Tensor, reads: Reads, scale: float, cap: float | None
) -> Tensor:
    """Queries that share a key head are its rows: on a CPU far faster than SDPA's enable_gqa."""
    requests, heads, head_dim = query.shape
    keys, values = _read(cache, reads, query)
    grouped = query.view(requests, cache.shape[3], -1, head_dim)
    output = _attend(grouped, keys, values, reads.mask, False, scale, cap)
    return output.reshape(requests, heads, head_dim)


def _attend_chunk(
    query: Tensor, cache: Tensor, reads: Reads, scale: float, cap: float | None
) -> Tensor:
    """Key heads are SDPA's batch, and the query heads that share one its heads: no copies."""
    length, heads, head_dim = query.shape
    kv_heads = cache.shape[3]
    keys, values = (part.transpose(0, 1) for part in _read(cache, reads, query))
    grouped = query.view(length, kv_heads, -1, head_dim).permute(1, 2, 0, 3)
    group = heads // kv_heads
    output = _attend(
        grouped,
        keys.expand(-1, group, -1, -1),
        values.expand(-1, group, -1, -1),
        reads.mask,
        reads.mask is None,
        scale,
        cap,
    )
    return output.permute(2, 0, 1, 3).reshape(length, heads, head_dim)


def _attend(
    query: Tensor,
    keys: Tensor,
    values: Tensor,
    mask: Tensor | None,
    causal: bool,
    scale: float,
    cap: float | None,
) -> Tensor:
    """SDPA, which knows no cap on scores: where there is one, its arithmetic written out."""
    if cap is None:
        return F.scaled_dot_product_attention(
            query, keys, values, attn_mask=mask, is_causal=causal, scale=scale
        )
    scores = (query.float() @ keys.float().transpose(-2, -1)).mul_(scale / cap).tanh_().mul_(cap)
    if causal:
        length = query.shape[-2]
        mask = torch.full((length, length), -torch.inf, device=query.device).triu_(1)
    if mask is not None:
        scores.add_(mask)
    return (scores.softmax(-1) @ values.float()).to(query.dtype)


def _read(cache: Tensor, reads: Reads, query: Tensor) -> tuple[Tensor, Tensor]:
    """Keys and values [requests, kv_heads, context, head_dim], views of one gathered copy."""
    found = by_slot(cache).index_select(0, reads.slots)
    found = found.view(reads.requests, -1, *cache.shape[2:])
    if cache.dtype in STORAGE.values():
        found = decode(found, query.shape[-1], query.dtype)
    return found[:, :, 0].transpose(1, 2), found[:, :, 1].transpose(1, 2)
