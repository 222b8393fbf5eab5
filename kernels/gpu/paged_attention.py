"""Attention over a paged cache: prompts, chunks of them, single tokens and trees of guesses.

FlashAttention-2 (Dao 2023, arXiv 2307.08691) with split keys. The queries of all heads that share
a key head are the rows of one product, so that keys are read once for them.
"""

from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor

from infopt.kernels.attention.eight_bits import FP8
from infopt.kernels.attention.scores import Scores
from infopt.kernels.gpu.cache import decoded, layout_of
from infopt.kernels.gpu.merge_splits import merge_splits
from infopt.kernels.gpu.pages import pages_of
from infopt.kernels.gpu.tile import Card, Key, Tile, power_of_two

FIXED_SPLIT = 512
"""Keys that one program takes where results must not depend on the batch."""
_LOG2E = 1.4426950408889634


@dataclass(frozen=True, slots=True)
class Part:
    """The requests of a step that one launch takes."""

    tiles: Tensor
    """int32 [tiles, 2]: a request, and its first query that the tile takes."""
    starts: Tensor
    """int32 [R + 1]: of each request's queries among the rows that are handed over."""
    contexts: Tensor
    """int32 [R]: tokens in the cache, the queries' own among them: they are the last; 0 for rows
    of no request, which become zeros."""
    tables: Tensor
    """int32 [R, width]: each request's blocks."""
    splits: int = 1
    """Programs that share the keys of a tile."""
    fixed: bool = False
    """Whether a result must not depend on what else is in the batch: `splits` of FIXED_SPLIT keys
    each, which must be enough for the longest context."""


@dataclass(frozen=True, slots=True)
class Tree:
    """Of a step whose requests guess: the queries of each are nodes of a tree.

    `kernels.gpu.tree.plan_tree` makes it of each node's parent. A node sees all of the context
    before its request's nodes, and of those the ones that are marked: its ancestors and itself.
    """

    seen: Tensor
    """uint8 [T, width]: whether a query sees its request's j-th query; width >= any's number."""
    positions: Tensor
    """int32 [T]: by which windows reach back; the slots of a tree's nodes tell nothing of it."""


def reference(
    query: Tensor,
    cache: Tensor,
    kv_heads: int,
    part: Part,
    scores: Scores,
    tree: Tree | None = None,
) -> Tensor:
    """Request by request, in float64: [T, heads, head_dim], NaN in rows of no request."""
    out = torch.full(query.shape, torch.nan, dtype=torch.float64, device=query.device)
    group, block_size = query.shape[1] // kv_heads, cache.shape[1]
    held = decoded(cache, kv_heads, query.shape[2])
    for r, context in enumerate(part.contexts.tolist()):
        rows = slice(int(part.starts[r]), int(part.starts[r + 1]))
        new, index = rows.stop - rows.start, torch.arange(context, device=query.device)
        slots = part.tables[r].long()[index // block_size] * block_size + index % block_size
        own = index[context - new :, None]
        seen, position = index <= own, own
        if tree is not None:
            seen = (index < context - new).expand(new, -1).clone()
            seen[:, context - new :] = tree.seen[rows, :new].bool()
            position = tree.positions[rows, None].long()
        if scores.window is not None:
            seen = seen & ((index > position - scores.window) | (index >= context - new))
            if tree is None:
                seen = seen & (index > position - scores.window)
        # What no query sees may hold anything, NaN too.
        found = torch.where(seen.any(0)[:, None, None], held[slots], 0.0)
        keys, values = (x.repeat_interleave(group, 1) for x in found.split(kv_heads, 1))
        products = torch.einsum("thd,chd->htc", query[rows].double(), keys) * scores.scale
        if scores.cap is not None:
            products = scores.cap * torch.tanh(products / scores.cap)
        weights = products.masked_fill(~seen, -torch.inf).softmax(-1)
        out[rows] = torch.einsum("htc,chd->thd", weights, values)
    return out


@triton.jit
def _floats(codes, dtype: tl.constexpr, CODES: tl.constexpr, NATIVE: tl.constexpr):
    """Codes of 8 bits as numbers of another dtype, exactly; anything else as it is."""
    if CODES == "":
        return codes
    elif CODES == "float8" and not NATIVE:
        # An e4m3's bits moved to where float32 has them, off by 2^120.
        bits = (codes.to(tl.int8, bitcast=True).to(tl.int32) << 20) & -2014314496
        return (bits.to(tl.float32, bitcast=True) * 1.329227995784916e36).to(dtype)
    elif CODES == "float8":
        return codes.to(tl.float8e4nv, bitcast=True).to(dtype)
    else:
        return codes.to(dtype)


@triton.jit
def _load(at, there, wide, EVERY: tl.constexpr, WHOLE: tl.constexpr):
    """Of tokens that are there, the numbers of a head; zeros elsewhere."""
    if EVERY and WHOLE:
        return tl.load(at)
    elif EVERY:
        return tl.load(at, mask=wide, other=0)
    elif WHOLE:
        return tl.load(at, mask=there, other=0)
    else:
        return tl.load(at, mask=there & wide, other=0)


@triton.jit
def _slots(table, first, index, there, BLOCK_SIZE: tl.constexpr, N: tl.constexpr):
    """Where keys `first` to `first + N` lie; one look into the table where one block has them."""
    if BLOCK_SIZE % N == 0:
        block = tl.load(table + first // BLOCK_SIZE).to(tl.int64)
        return block * BLOCK_SIZE + index % BLOCK_SIZE
    else:
        block = tl.load(table + index // BLOCK_SIZE, mask=there, other=0).to(tl.int64)
        return block * BLOCK_SIZE + index % BLOCK_SIZE


@triton.jit
def _over_keys(
    acc, total, highest, rows, cache, pages, head, scales, table, tree_rows, begin, end, low, high,
    own, back, past, scale, cap, token_stride, value_offset, scale_stride, values_after,
    HEAD_DIM: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_N: tl.constexpr,
    BLOCK_SIZE: tl.constexpr, EVERY: tl.constexpr, TREE: tl.constexpr, WINDOW: tl.constexpr,
    CAP: tl.constexpr, CODES: tl.constexpr, NATIVE: tl.constexpr, TMA: tl.constexpr,
):  # fmt: skip
    """Keys `begin` to `end`, BLOCK_N at a time; `EVERY`: all are there and seen by all rows, and
    with `TMA` come by the tensor descriptor `pages`."""
    n, d = tl.arange(0, BLOCK_N), tl.arange(0, BLOCK_D)
    wide = d < HEAD_DIM
    WHOLE: tl.constexpr = HEAD_DIM == BLOCK_D
    for first in range(begin, end, BLOCK_N):
        index = first + n
        there = (index >= low) & (index < high)
        slot = _slots(table, first, index, there, BLOCK_SIZE, BLOCK_N)
        token = cache + slot * token_stride
        if TMA and EVERY:
            line = tl.load(table + first // BLOCK_SIZE) * BLOCK_SIZE + first % BLOCK_SIZE
            codes = tl.trans(pages.load([line, head * HEAD_DIM]))
        else:
            codes = _load(token[None, :] + d[:, None], there[None, :], wide[:, None], EVERY, WHOLE)
        found = tl.dot(rows, _floats(codes, rows.dtype, CODES, NATIVE), input_precision="tf32x3")
        found *= scale
        if CODES != "":
            found *= _load(scales + slot * scale_stride, there, there, EVERY, True)[None, :]
        if CAP:
            # tanh in a form that does not overflow; scores and cap are both times log2(e).
            found = cap - 2 * cap / (1 + tl.exp2(found * (2 * 1.4426950408889634 / cap)))
        if not EVERY:
            seen = there[None, :] & (index[None, :] <= own[:, None])
            if TREE:
                guess = index - past
                asked = (there & (guess >= 0))[None, :] & (own >= 0)[:, None]
                marked = tl.load(tree_rows[:, None] + guess[None, :], mask=asked, other=0)
                seen = there[None, :] & ((guess < 0)[None, :] | (marked != 0))
            if WINDOW:
                near = index[None, :] > back[:, None]
                seen = seen & (near | (index >= past)[None, :] if TREE else near)
            found = tl.where(seen, found, float("-inf"))
        new = tl.maximum(highest, tl.max(found, 1))
        # Nothing is added to a row that has seen no key yet: it has no largest score.
        level = new if EVERY else tl.where(new == float("-inf"), 0.0, new)
        weights = tl.exp2(found - level[:, None])
        kept = tl.exp2(highest - level)
        total = total * kept + tl.sum(weights, 1)
        highest = new
        if CODES != "":
            at = scales + slot * scale_stride + values_after
            weights *= _load(at, there, there, EVERY, True)[None, :]
        if TMA and EVERY:
            codes = pages.load([line, value_offset + head * HEAD_DIM])
        else:
            at = token[:, None] + value_offset + d[None, :]
            codes = _load(at, there[:, None], wide[None, :], EVERY, WHOLE)
        values = _floats(codes, rows.dtype, CODES, NATIVE)
        acc = tl.dot(
            weights.to(values.dtype), values, acc * kept[:, None], input_precision="tf32x3"
        )
    return acc, total, highest


@triton.jit
def _reach(
    own, real, row, first, past, new, context, positions, window,
    QUERIES: tl.constexpr, TREE: tl.constexpr, WINDOW: tl.constexpr,
):  # fmt: skip
    """Back to which position each row does not see; then, of the keys, from and up to which some
    row sees, and from and up to which all do."""
    back = own - window
    high, all_high = past + tl.minimum(first + QUERIES, new), past + first + 1
    if TREE:
        back = tl.load(positions + row, mask=real, other=0) - window
        high, all_high = context, past
    low, all_low = 0, 0
    if WINDOW:
        low = tl.maximum(tl.min(tl.where(real, back, 2147483647), 0) + 1, 0)
        all_low = tl.maximum(tl.max(tl.where(real, back, -2147483647), 0) + 1, 0)
    return back, low, high, all_low, all_high


@triton.jit
def _share(low, high, split, BLOCK_N: tl.constexpr, SPLITS: tl.constexpr, SPLIT_KEYS: tl.constexpr):
    """From and up to which key a split goes; fixed ones are cut where no context changes it."""
    begin, end = low // BLOCK_N * BLOCK_N, high
    if SPLITS > 1:
        if SPLIT_KEYS == 0:
            per = tl.cdiv(tl.cdiv(high - begin, BLOCK_N), SPLITS) * BLOCK_N
            end = tl.minimum(begin + (split + 1) * per, high)
            begin = begin + split * per
        else:
            end = tl.minimum((split + 1) * SPLIT_KEYS, high)
            begin = tl.maximum(split * SPLIT_KEYS, begin)
    return begin, end


@triton.jit
def _softmax(
    rows, cache, pages, head, scales, table, tree_rows, begin, end, low, high, all_low, all_high,
    own, back, past, scale, cap, token_stride, value_offset, scale_stride, values_after,
    HEAD_DIM: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_N: tl.constexpr,
    BLOCK_SIZE: tl.constexpr, TREE: tl.constexpr, WINDOW: tl.constexpr, CAP: tl.constexpr,
    CODES: tl.constexpr, NATIVE: tl.constexpr, TMA: tl.constexpr,
):  # fmt: skip
    """Keys that some rows see, those that all see, and again those that some see."""
    acc = tl.zeros((BLOCK_M, BLOCK_D), tl.float32)
    total = tl.zeros((BLOCK_M,), tl.float32)
    highest = tl.full((BLOCK_M,), float("-inf"), tl.float32)
    middle = begin
    if WINDOW:
        middle = tl.minimum(tl.maximum(tl.cdiv(all_low, BLOCK_N) * BLOCK_N, begin), end)
        acc, total, highest = _over_keys(
            acc, total, highest, rows, cache, pages, head, scales, table, tree_rows, begin, middle,
            low, high, own, back, past, scale, cap, token_stride, value_offset, scale_stride,
            values_after, HEAD_DIM, BLOCK_D, BLOCK_N, BLOCK_SIZE, False, TREE, WINDOW, CAP, CODES,
            NATIVE, TMA,
        )  # fmt: skip
    last = tl.maximum(tl.minimum(all_high // BLOCK_N * BLOCK_N, end), middle)
    acc, total, highest = _over_keys(
        acc, total, highest, rows, cache, pages, head, scales, table, tree_rows, middle, last, low,
        high, own, back, past, scale, cap, token_stride, value_offset, scale_stride, values_after,
        HEAD_DIM, BLOCK_D, BLOCK_N, BLOCK_SIZE, True, TREE, WINDOW, CAP, CODES, NATIVE, TMA,
    )  # fmt: skip
    return _over_keys(
        acc, total, highest, rows, cache, pages, head, scales, table, tree_rows, last, end, low,
        high, own, back, past, scale, cap, token_stride, value_offset, scale_stride, values_after,
        HEAD_DIM, BLOCK_D, BLOCK_N, BLOCK_SIZE, False, TREE, WINDOW, CAP, CODES, NATIVE, TMA,
    )  # fmt: skip


# Where small tables lie, and how wide they are, says nothing of how fast they are read.
_TABLES = ["tiles", "starts", "contexts", "tables", "tree", "positions"]


@triton.jit(
    do_not_specialize=["table_stride", "tree_stride"], do_not_specialize_on_alignment=_TABLES
)
def attend_tile(
    query, out, parts, sums, cache, pages, scales, tiles, starts, contexts, tables, tree, positions,
    scale, cap, window, query_stride, out_stride, table_stride, tree_stride,
    token_stride, value_offset, scale_stride,
    GROUP: tl.constexpr, KV_HEADS: tl.constexpr, HEAD_DIM: tl.constexpr, BLOCK_D: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_SIZE: tl.constexpr,
    SPLITS: tl.constexpr, SPLIT_KEYS: tl.constexpr, TREE: tl.constexpr, WINDOW: tl.constexpr,
    CAP: tl.constexpr, CODES: tl.constexpr, NATIVE: tl.constexpr, TMA: tl.constexpr,
):  # fmt: skip
    """BLOCK_M // GROUP queries of one request, all heads of one key head, one split of the keys."""
    QUERIES: tl.constexpr = BLOCK_M // GROUP
    tile, head, split = tl.program_id(0), tl.program_id(1), tl.program_id(2)
    request, first = tl.load(tiles + 2 * tile), tl.load(tiles + 2 * tile + 1)
    start, context = tl.load(starts + request), tl.load(contexts + request)
    new = tl.load(starts + request + 1) - start
    past = context - new
    m, d = tl.arange(0, BLOCK_M), tl.arange(0, BLOCK_D)
    token, of_head = first + m // GROUP, head * GROUP + m % GROUP
    real = (m < QUERIES * GROUP) & (token < new)
    own = tl.where(real, past + token, -1)
    row = (start + token).to(tl.int64)
    back, low, high, all_low, all_high = _reach(
        own, real, row, first, past, new, context, positions, window, QUERIES, TREE, WINDOW
    )
    begin, end = _share(low, high, split, BLOCK_N, SPLITS, SPLIT_KEYS)
    part = (row * (KV_HEADS * GROUP) + of_head) * SPLITS + split
    if SPLITS > 1 and begin >= end:
        tl.store(sums + part, float("-inf"), mask=real)
        return
    stored = real[:, None] & (d < HEAD_DIM)[None, :]
    at = row * query_stride + of_head * HEAD_DIM
    rows = tl.load(query + at[:, None] + d[None, :], mask=stored, other=0.0)
    acc, total, highest = _softmax(
        rows, cache + head * HEAD_DIM, pages, head, scales + head,
        tables + request.to(tl.int64) * table_stride, tree + row * tree_stride, begin, end, low,
        high, all_low, all_high, own, back, past, scale, cap, token_stride, value_offset,
        scale_stride, KV_HEADS, HEAD_DIM, BLOCK_M, BLOCK_D, BLOCK_N, BLOCK_SIZE, TREE, WINDOW, CAP,
        CODES, NATIVE, TMA,
    )  # fmt: skip
    some = tl.where(total > 0, total, 1.0)  # a row may have seen none of this split's keys
    found = acc / some[:, None]
    if SPLITS == 1:
        at = out + row * out_stride + of_head * HEAD_DIM
        tl.store(at[:, None] + d[None, :], found.to(out.dtype.element_ty), mask=stored)
    else:
        tl.store(parts + part[:, None] * HEAD_DIM + d[None, :], found, mask=stored)
        seen = tl.where(total > 0, highest + tl.log2(some), float("-inf"))
        tl.store(sums + part, seen, mask=real)


_CODES = {torch.int8: "int8", FP8: "float8"}


@dataclass(frozen=True, slots=True)
class Launch:
    """What a tile is chosen by."""

    queries: int
    """Of the longest request."""
    group: int
    """Heads that share a key head."""
    head_dim: int
    held: torch.dtype
    """Of keys and values: int8 and float8_e4m3fn in 8 bits."""
    window: bool = False
    tree: bool = False
    fixed: bool = False

    @property
    def key(self) -> Key:
        """Of `fixed` attention a tile must not depend on how many queries there are."""
        return {
            "rows": self.group if self.fixed else self.queries * self.group,
            "group": self.group,
            "head_dim": power_of_two(self.head_dim, 16),
            "cache": str(self.held).removeprefix("torch."),
            "window": int(self.window),
            "tree": int(self.tree),
        }

    def tile(self, card: Card) -> Tile:
        return card.tile("paged_attention", **self.key)


def paged_attention(
    card: Card,
    query: Tensor,
    cache: Tensor,
    kv_heads: int,
    part: Part,
    scores: Scores,
    tile: Tile,
    out: Tensor,
    tree: Tree | None = None,
) -> None:
    """Attend for the requests of `part`, in the rows of `out` that are theirs.

    query, out [T, heads, head_dim], heads contiguous, in 16 bits or float32; cache as
    `kernels.gpu.cache` has it, in the query's dtype or in 8 bits; `part` was planned for `tile`.
    Softmax and sums are in float32.
    """
    _, heads, head_dim = query.shape
    layout, splits = layout_of(cache, kv_heads, head_dim), part.splits
    parts, sums = out, out
    if splits > 1:
        parts = query.new_empty((len(query), heads, splits, head_dim), dtype=torch.float32)
        sums = query.new_empty((len(query), heads, splits), dtype=torch.float32)
    pages = pages_of(card, tile, cache, head_dim)
    attend_tile[(len(part.tiles), kv_heads, splits)](
        query, out, parts, sums, cache, cache if pages is None else pages,
        layout.scales if layout.scales is not None else cache,
        part.tiles, part.starts, part.contexts, part.tables,
        tree.seen if tree is not None else part.tables,
        tree.positions if tree is not None else part.tables,
        scores.scale * _LOG2E, (scores.cap or 1.0) * _LOG2E, scores.window or 0,
        query.stride(0), out.stride(0), part.tables.stride(0),
        tree.seen.stride(0) if tree is not None else 0,
        layout.token_stride, layout.value_offset, layout.scale_stride,
        GROUP=heads // kv_heads, KV_HEADS=kv_heads, HEAD_DIM=head_dim,
        BLOCK_D=power_of_two(head_dim, 16), BLOCK_SIZE=layout.block_size,
        SPLITS=splits, SPLIT_KEYS=FIXED_SPLIT if part.fixed else 0,
        TREE=tree is not None, WINDOW=scores.window is not None, CAP=scores.cap is not None,
        CODES=_CODES.get(cache.dtype, ""), NATIVE=card.capability >= 89,
        **{**tile.options(), "TMA": pages is not None},
    )  # fmt: skip
    if splits > 1:
        merge_splits(parts, sums, out)
