"""Causal attention of new tokens over a paged cache, in plain torch.

`paged_attention` is the truth in its plainest form. `planned_attention` is what runs: what is the
same for every layer of a step (which slots to read, what to mask), `plan_attention` works out once.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from infopt.kernels.attention.cache import by_slot

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
) -> Tensor:
    """Attend causally, request by request; softmax in float32.

    query [T, heads, head_dim]; caches [blocks, block_size, kv_heads, head_dim]; block_tables
    [requests, width]. Request r owns the queries query_starts[r] to query_starts[r + 1], which are
    the last of its context_lengths[r] tokens. Returns [T, heads, head_dim].
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
        scores = scores.masked_fill(position > own[:, None], -torch.inf)
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
class AttentionPlan:
    """What one step reads, for every layer alike."""

    decodes: tuple[Reads, ...]
    chunks: tuple[Reads, ...]


def plan_attention(
    block_tables: Sequence[Sequence[int]],
    context_lengths: Sequence[int],
    query_starts: Sequence[int],
    block_size: int,
    dtype: torch.dtype,
    device: torch.device,
) -> AttentionPlan:
    """Plan one step; requests with a single query come first, best in the order of their contexts.

    Contexts include the step's own tokens, which must be in the cache before attention runs.
    """
    lengths = [query_starts[r + 1] - query_starts[r] for r in range(len(context_lengths))]
    single = next((r for r, n in enumerate(lengths) if n > 1), len(lengths))
    assert all(n > 1 for n in lengths[single:]), "requests with one query come first"
    decodes = (
        _decode_reads(rows, block_tables[rows], context_lengths[rows], block_size, dtype, device)
        for rows in _alike(context_lengths[:single])
    )
    chunks = (
        _chunk_reads(
            block_tables[r],
            context_lengths[r],
            query_starts[r],
            lengths[r],
            block_size,
            dtype,
            device,
        )
        for r in range(single, len(lengths))
    )
    return AttentionPlan(tuple(decodes), tuple(chunks))


def _alike(contexts: Sequence[int]) -> Iterator[slice]:
    """Runs of requests to pad to one length: none long is padded to more than twice its own."""
    start = 0
    for r in range(1, len(contexts) + 1):
        if r == len(contexts) or contexts[r] > max(_PADDED_FREELY, 2 * contexts[start]):
            yield slice(start, r)
            start = r


def _decode_reads(
    rows: slice,
    tables: Sequence[Sequence[int]],
    contexts: Sequence[int],
    block_size: int,
    dtype: torch.dtype,
    device: torch.device,
) -> Reads:
    """One query a request, padded to the longest context."""
    longest = max(contexts)
    width = -(-longest // block_size)
    padded = [[*table[:width], *[0] * (width - len(table))] for table in tables]
    position = torch.arange(longest)
    context = torch.tensor(contexts)[:, None]
    beyond = position >= context
    slots = _slots(
        torch.tensor(padded), position.expand_as(beyond).masked_fill(beyond, 0), block_size
    )
    mask = None
    if min(contexts) < longest:
        mask = torch.zeros(beyond.shape, dtype=dtype).masked_fill_(beyond, -torch.inf)
        mask = mask[:, None, None].to(device)
    return Reads(rows, slots.flatten().to(device), len(tables), mask)


def _chunk_reads(
    table: Sequence[int],
    context: int,
    start: int,
    length: int,
    block_size: int,
    dtype: torch.dtype,
    device: torch.device,
) -> Reads:
    """Several queries of one request; the first chunk needs no mask but the causal one."""
    position = torch.arange(context)
    slots = _slots(torch.tensor([list(table)]), position[None], block_size).flatten().to(device)
    mask = None
    if length < context:
        mask = torch.full((length, context), -torch.inf, dtype=dtype)
        mask = mask.triu_(diagonal=context - length + 1).to(device)
    return Reads(slice(start, start + length), slots, 1, mask)


def _slots(tables: Tensor, positions: Tensor, block_size: int) -> Tensor:
    """Positions [R, C] of requests with block tables [R, W] -> slots [R, C]."""
    return tables.gather(1, positions // block_size) * block_size + positions % block_size


def planned_attention(query: Tensor, cache: Tensor, plan: AttentionPlan, scale: float) -> Tensor:
    """The same as `paged_attention` over a layer's cache as `new_cache` makes it.

    query [T, heads, head_dim] -> [T, heads, head_dim]. SDPA keeps its softmax in float32.
    """
    if len(plan.decodes) == 1 and not plan.chunks:
        return _attend_decodes(query, cache, plan.decodes[0], scale)
    output = torch.empty(query.shape, dtype=query.dtype, device=query.device)
    for reads in plan.decodes:
        output[reads.rows] = _attend_decodes(query[reads.rows], cache, reads, scale)
    for reads in plan.chunks:
        output[reads.rows] = _attend_chunk(query[reads.rows], cache, reads, scale)
    return output


def _attend_decodes(query: Tensor, cache: Tensor, reads: Reads, scale: float) -> Tensor:
    """Queries that share a key head are its rows: on a CPU far faster than SDPA's enable_gqa."""
    requests, heads, head_dim = query.shape
    keys, values = _read(cache, reads)
    grouped = query.view(requests, cache.shape[3], -1, head_dim)
    output = F.scaled_dot_product_attention(
        grouped, keys, values, attn_mask=reads.mask, scale=scale
    )
    return output.reshape(requests, heads, head_dim)


def _attend_chunk(query: Tensor, cache: Tensor, reads: Reads, scale: float) -> Tensor:
    """Key heads are SDPA's batch, and the query heads that share one its heads: no copies."""
    length, heads, head_dim = query.shape
    kv_heads = cache.shape[3]
    keys, values = (part.transpose(0, 1) for part in _read(cache, reads))
    grouped = query.view(length, kv_heads, -1, head_dim).permute(1, 2, 0, 3)
    group = heads // kv_heads
    output = F.scaled_dot_product_attention(
        grouped,
        keys.expand(-1, group, -1, -1),
        values.expand(-1, group, -1, -1),
        attn_mask=reads.mask,
        is_causal=reads.mask is None,
        scale=scale,
    )
    return output.permute(2, 0, 1, 3).reshape(length, heads, head_dim)


def _read(cache: Tensor, reads: Reads) -> tuple[Tensor, Tensor]:
    """Keys and values [requests, kv_heads, context, head_dim], views of one gathered copy."""
    found = by_slot(cache).index_select(0, reads.slots)
    found = found.view(reads.requests, -1, *cache.shape[2:])
    return found[:, :, 0].transpose(1, 2), found[:, :, 1].transpose(1, 2)
