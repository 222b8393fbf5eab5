"""Paged attention against float64, over caches poisoned where nothing was written."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from types import ModuleType
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import Tensor

from infopt.kernels.attention.eight_bits import encode
from infopt.kernels.attention.scores import Scores
from infopt.kernels.gpu import paged_attention as module
from infopt.kernels.gpu.cache import layout_of, new_cache
from infopt.kernels.gpu.paged_attention import FIXED_SPLIT, Part, Tree, reference
from infopt.kernels.gpu.plan import plan_part
from infopt.kernels.gpu.tile import Card, Tile

BF16, F16, F32 = torch.bfloat16, torch.float16, torch.float32
INT8, FP8 = torch.int8, torch.float8_e4m3fn
TOLERANCE = {F32: 1e-5, F16: 2e-3, BF16: 1.6e-2}
"""Of float64, absolute and relative: a few units of the dtype's last place."""


@dataclass(frozen=True)
class Case:
    requests: Sequence[tuple[int, int]]
    """New tokens, context."""
    block_size: int = 4
    kv_heads: int = 2
    group: int = 3
    head_dim: int = 16
    dtype: torch.dtype = F32
    held: torch.dtype | None = None
    """Of the cache; the run's where it is None."""
    window: int | None = None
    cap: float | None = None
    tree: bool = False
    tma: bool = False
    block_m: int = 16
    block_n: int = 16
    splits: int = 1
    fixed: bool = False


@dataclass
class Made:
    query: Tensor
    cache: Tensor
    part: Part
    scores: Scores
    tile: Tile
    tree: Tree | None


def write(cache: Tensor, slots: list[int], key_value: Tensor, held: torch.dtype) -> None:
    """As the layout says, by plain copies."""
    tokens, rows, head_dim = key_value.shape
    if held not in (INT8, FP8):
        cache.view(-1, rows, head_dim)[slots] = key_value.to(held)
        return
    coded = encode(key_value, cache.dtype, None)
    flat = cache.view(-1, cache.shape[2])
    flat[slots, : rows * head_dim] = coded[..., :head_dim].reshape(tokens, -1)
    scales = coded[..., -4:].contiguous().view(torch.float32)[..., 0]
    layout = layout_of(cache, rows // 2, head_dim)
    assert layout.scales is not None
    for token, slot in enumerate(slots):
        at = slot * layout.scale_stride
        layout.scales[at : at + rows] = scales[token]


def make(case: Case, device: torch.device, card: Card) -> Made:
    held = case.held or case.dtype
    widths = [-(-context // case.block_size) for _, context in case.requests]
    order = torch.randperm(sum(widths) + 1).tolist()
    tables = [[order.pop() for _ in range(width)] for width in widths]
    cache = new_cache(
        sum(widths) + 1, case.block_size, case.kv_heads, case.head_dim, held, torch.device("cpu")
    )
    cache.fill_(torch.nan if held == case.dtype else 127)  # e4m3's NaN, large scales
    if held != case.dtype:
        layout = layout_of(cache, case.kv_heads, case.head_dim)
        assert layout.scales is not None
        layout.scales.fill_(torch.nan)
    for table, (new, context) in zip(tables, case.requests, strict=True):
        first = 0 if case.window is None else max(0, context - new - case.window + 1)
        if case.tree and case.window is not None:
            first = max(0, context - new - case.window + 1)
        at = range(first, context)
        slots = [table[p // case.block_size] * case.block_size + p % case.block_size for p in at]
        write(cache, slots, torch.randn(len(at), 2 * case.kv_heads, case.head_dim), held)
    new, contexts = [list(part) for part in zip(*case.requests, strict=True)]
    sizes = {"BLOCK_M": case.block_m, "BLOCK_N": case.block_n}
    tile = Tile({**sizes, "TMA": 1} if case.tma else sizes, 4, 2)
    part = plan_part(
        card, tile, tables, contexts, new, heads=case.kv_heads * case.group,
        kv_heads=case.kv_heads, device=device, fixed=case.fixed,
    )  # fmt: skip
    # A row of heads as a projection leaves it: keys and values behind it.
    wide = torch.randn(sum(new), case.kv_heads * (case.group + 2), case.head_dim, dtype=case.dtype)
    return Made(
        query=wide.to(device)[:, : case.kv_heads * case.group],
        cache=cache.to(device),
        part=part if case.fixed else replace(part, splits=case.splits),
        scores=Scores(case.head_dim**-0.5, case.window, case.cap),
        tile=tile,
        tree=grown(new, contexts, device) if case.tree else None,
    )


def grown(new: list[int], contexts: list[int], device: torch.device) -> Tree:
    """Trees at random: each query's parent is one before it, or the context's end."""
    seen = torch.zeros(sum(new), max(new) + 1, dtype=torch.uint8)
    positions, start = torch.zeros(sum(new), dtype=torch.int32), 0
    for count, context in zip(new, contexts, strict=True):
        for node in range(count):
            parent = int(torch.randint(-1, node, ())) if node else -1
            if parent >= 0:
                seen[start + node] = seen[start + parent]
            seen[start + node, node] = 1
            positions[start + node] = context - count - 1 + seen[start + node].sum()
        start += count
    return Tree(seen.to(device), positions.to(device))


def attend(made: Made, case: Case, card: Card, kernels: ModuleType = module) -> Tensor:
    out = torch.full_like(made.query, torch.nan)
    kernels.paged_attention(
        card, made.query, made.cache, case.kv_heads, made.part, made.scores, made.tile, out,
        made.tree,
    )  # fmt: skip
    return out


def check(case: Case, device: torch.device, card: Card, kernels: ModuleType = module) -> None:
    torch.manual_seed(0)
    made = make(case, device, card)
    found = attend(made, case, card, kernels)
    wanted = reference(made.query, made.cache, case.kv_heads, made.part, made.scores, made.tree)
    tolerance = TOLERANCE[case.dtype]
    torch.testing.assert_close(found.double(), wanted, atol=tolerance, rtol=tolerance)


MIXED = [(1, 1), (1, 33), (7, 7), (5, 40), (1, 64)]
CASES = {
    "one token": Case([(1, 1)]),
    "a block's edge": Case([(1, 16), (1, 17), (1, 15)], block_size=16),
    "blocks of one token": Case(MIXED, block_size=1),
    "blocks of three": Case(MIXED, block_size=3),
    "blocks larger than tiles": Case(MIXED, block_size=32),
    "a prompt": Case([(37, 37)], block_m=64),
    "chunks": Case([(9, 50), (2, 33)], block_m=32),
    "one head a key head": Case(MIXED, group=1),
    "a group that fills a tile": Case(MIXED, group=16, kv_heads=1),
    "more tiles than one": Case([(23, 61)], group=5),
    "head of 64": Case(MIXED, head_dim=64, dtype=BF16),
    "head of 80": Case(MIXED, head_dim=80, dtype=BF16),
    "head of 128": Case(MIXED, head_dim=128, dtype=F16, block_n=32),
    "head of 96, chunk": Case([(19, 70)], head_dim=96, dtype=BF16, block_m=64, block_n=32),
    "bfloat16": Case(MIXED, dtype=BF16),
    "float16": Case(MIXED, dtype=F16),
    "int8": Case(MIXED, dtype=BF16, held=INT8),
    "int8 in float32": Case(MIXED, held=INT8, kv_heads=1, head_dim=18),
    "float8": Case(MIXED, dtype=BF16, held=FP8),
    "float8, head of 80": Case(MIXED, dtype=F16, held=FP8, head_dim=80, kv_heads=3),
    "window": Case(MIXED, window=5),
    "window of one": Case(MIXED, window=1),
    "window over tiles": Case([(9, 90), (30, 64)], window=33, block_m=32),
    "window, 8 bits": Case(MIXED, window=20, dtype=BF16, held=INT8),
    "cap": Case(MIXED, cap=0.5),
    "cap and window": Case(MIXED, cap=2.0, window=7, dtype=BF16),
    "splits": Case([(1, 100), (1, 3), (1, 65)], splits=4),
    "more splits than keys": Case([(1, 5), (1, 17)], splits=8),
    "splits of a chunk": Case([(6, 90)], splits=2, block_m=32),
    "splits and window": Case([(1, 200), (3, 130)], splits=4, window=50),
    "splits of float8": Case([(1, 100), (1, 3)], splits=4, dtype=BF16, held=FP8, head_dim=80),
    "descriptors": Case([(7, 70), (40, 40)], block_size=32, tma=True),
    "descriptors, bfloat16": Case([(1, 64), (33, 95)], block_size=16, tma=True, dtype=BF16),
    "descriptors, window": Case([(20, 80)], block_size=16, tma=True, window=40, splits=2),
    "descriptors, small blocks": Case([(9, 40)], tma=True),
    "descriptors, 8 bits": Case([(9, 64)], block_size=16, tma=True, held=INT8),
    "tree": Case([(5, 40), (1, 8), (9, 9)], tree=True),
    "tree, many tiles": Case([(13, 60), (4, 5)], tree=True, group=4, splits=2),
    "tree, window": Case([(6, 60), (3, 20)], tree=True, window=9),
    "tree, float8": Case([(6, 60)], tree=True, dtype=BF16, held=FP8, head_dim=64),
    "fixed": Case([(1, 100), (7, 30), (1, 1)], fixed=True),
    "fixed, several splits": Case([(1, FIXED_SPLIT + 70), (3, 20)], fixed=True, block_n=64),
}


@pytest.mark.parametrize("name", CASES)
def test_kernel_equals_reference(name: str, device: torch.device, card: Card) -> None:
    check(CASES[name], device, card)


@pytest.mark.parametrize("native", [False, True])
def test_float8_by_bits_is_float8_by_conversion(
    native: bool, device: torch.device, card: Card
) -> None:
    """Cards before Ada have no conversion."""
    if native and card.capability < 89:
        pytest.skip("this GPU cannot convert float8")
    check(CASES["float8"], device, replace(card, capability=90 if native else 80))


@given(
    requests=st.lists(
        st.tuples(st.integers(1, 9), st.integers(0, 40)).map(lambda r: (r[0], r[0] + r[1])),
        min_size=1, max_size=4,
    ),
    block_size=st.integers(1, 18),
    kv_heads=st.integers(1, 2),
    group=st.integers(1, 4),
    head_dim=st.sampled_from([8, 16, 24]),
    window=st.none() | st.integers(1, 45),
    cap=st.sampled_from([None, 0.5]),
    held=st.sampled_from([None, INT8, FP8]),
    splits=st.sampled_from([1, 2, 4]),
    tree=st.booleans(),
    fixed=st.booleans(),
)  # fmt: skip
@settings(
    max_examples=30, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
def test_kernel_equals_reference_on_any_batch(
    device: torch.device, card: Card, **shape: Any
) -> None:
    check(Case(**shape), device, card)


MUTATIONS = {
    "a block too far": (
        "table + index // BLOCK_SIZE,",
        "table + index // BLOCK_SIZE + 1,",
        "chunks",
    ),
    "a large block": (
        "table + first // BLOCK_SIZE).to",
        "table + 0 * first).to",
        "blocks larger than tiles",
    ),
    "a descriptor's line": (" * BLOCK_SIZE + first % BLOCK_SIZE", " * BLOCK_SIZE", "descriptors"),
    "a descriptor's values": ("[line, value_offset + head", "[line, head", "descriptors"),
    "causality": ("index[None, :] <= own[:, None]", "index[None, :] < own[:, None]", "a prompt"),
    "the window's edge": (
        "near = index[None, :] > back",
        "near = index[None, :] >= back",
        "window",
    ),
    "the window's start": (
        "begin, end = low // BLOCK_N",
        "begin, end = (low + 15) // BLOCK_N",
        "window over tiles",
    ),
    "who sees all": ("past + first + 1\n", "past + first + 17\n", "chunks"),
    "what is kept": ("total * kept + tl.sum", "total + tl.sum", "chunks"),
    "unwritten keys": ("(index >= low) & (index < high)", "index >= 0", "chunks"),
    "the tree": ("(marked != 0)", "(marked >= 0)", "tree"),
    "a tree's positions": (
        "tl.load(positions + row, mask=real, other=0)",
        "own",
        "tree, window",
    ),
    "the cap": ("cap - 2 * cap /", "cap - 1 * cap /", "cap"),
    "scales of keys": ("scales + slot * scale_stride, there", "scales + slot * 0, there", "int8"),
    "scales of values": ("scale_stride + values_after", "scale_stride", "int8"),
    "the level": ("level = new if EVERY", "level = highest if EVERY", "chunks"),
    "where splits begin": (
        "begin = begin + split * per",
        "begin = begin + split * BLOCK_N",
        "splits of a chunk",
    ),
    "an empty split": (
        'tl.where(total > 0, highest + tl.log2(some), float("-inf"))',
        "highest",
        "splits",
    ),
}
"""Text of the kernel, another in its place, and the case that finds it."""


@pytest.mark.parametrize("name", MUTATIONS)
def test_a_kernel_that_is_wrong_is_found(
    name: str,
    device: torch.device,
    card: Card,
    mutated: Callable[[ModuleType, str, str], ModuleType],
) -> None:
    text, other, case = MUTATIONS[name]
    with pytest.raises(AssertionError, match="not close"):
        check(CASES[case], device, card, mutated(module, text, other))


def test_fixed_attention_does_not_depend_on_the_batch(device: torch.device, card: Card) -> None:
    """A request alone, beside others, cut otherwise: the same to the last bit."""
    torch.manual_seed(0)
    case = Case(
        [(1, 70), (6, FIXED_SPLIT + 40), (3, 9)], fixed=True, dtype=BF16, block_n=32, window=530
    )
    made = make(case, device, card)
    whole = attend(made, case, card)
    tables, starts = made.part.tables.tolist(), made.part.starts.tolist()
    for r, (new, context) in enumerate(case.requests):
        for back in range(new):
            row = starts[r] + back
            alone = plan_part(
                card, made.tile, [tables[r]], [context - new + back + 1], [1],
                heads=case.kv_heads * case.group, kv_heads=case.kv_heads, device=device,
                fixed=True,
            )  # fmt: skip
            only = replace(made, part=alone, query=made.query[row : row + 1])
            assert torch.equal(attend(only, case, card)[0], whole[row]), (r, back)


def test_rows_of_no_request_become_zeros_and_read_nothing(device: torch.device, card: Card) -> None:
    case = Case([(1, 9), (1, 40)], splits=2)
    for splits in (1, 2):
        made = make(replace(case, splits=splits), device, card)
        made.part.contexts[0] = 0
        out = attend(made, case, card)
        assert (out[0] == 0).all() and out[1].isfinite().all()
