"""The planned attention against the plain one, over caches poisoned where nothing was written."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from infopt.kernels.attention.cache import keys_of, new_cache, values_of, write_kv
from infopt.kernels.attention.paged import paged_attention, plan_attention, planned_attention

CPU = torch.device("cpu")
TOLERANCE = {torch.float32: 2e-6, torch.bfloat16: 2e-2}


def poisoned_cache(
    tables: list[list[int]],
    contexts: list[int],
    block_size: int,
    shape: tuple[int, int],
    dtype: torch.dtype,
) -> Tensor:
    """NaN everywhere but in the slots of the contexts."""
    kv_heads, head_dim = shape
    blocks = 1 + max(block for table in tables for block in table)
    cache = new_cache(blocks, block_size, kv_heads, head_dim, dtype, CPU).fill_(torch.nan)
    for table, context in zip(tables, contexts, strict=True):
        slots = [table[p // block_size] * block_size + p % block_size for p in range(context)]
        key_value = torch.randn(context, 2 * kv_heads, head_dim, dtype=dtype)
        write_kv(cache, key_value, torch.tensor(slots))
    return cache


def both(
    requests: list[tuple[int, int]],
    *,
    block_size: int = 4,
    kv_heads: int = 2,
    group: int = 3,
    head_dim: int = 8,
    dtype: torch.dtype = torch.float32,
    window: int | None = None,
    cap: float | None = None,
) -> tuple[Tensor, Tensor]:
    """(planned, plain) for requests of (new tokens, context)."""
    widths = [-(-context // block_size) for _, context in requests]
    order = torch.randperm(sum(widths)).tolist()
    tables = [[order.pop() for _ in range(width)] for width in widths]
    contexts = [context for _, context in requests]
    starts = [0]
    for new, _ in requests:
        starts.append(starts[-1] + new)
    cache = poisoned_cache(tables, contexts, block_size, (kv_heads, head_dim), dtype)
    query = torch.randn(starts[-1], kv_heads * group, head_dim, dtype=dtype)
    padded = torch.tensor([table + [0] * (max(widths) - len(table)) for table in tables])
    scale = head_dim**-0.5
    plain = paged_attention(
        query,
        keys_of(cache),
        values_of(cache),
        padded,
        contexts,
        starts,
        scale,
        window=window,
        cap=cap,
    )
    plan = plan_attention(tables, contexts, starts, block_size, dtype, CPU)
    if window is not None:  # what no query sees may be anything
        for table, (new, context) in zip(tables, requests, strict=True):
            for position in range(context - new - window + 1):
                cache[table[position // block_size], position % block_size] = torch.nan
    fixed = planned_attention(query, cache, plan.reads(window, fixed=True), scale, cap)
    agree(fixed, plain)
    return planned_attention(query, cache, plan.reads(window), scale, cap), plain


def agree(planned: Tensor, plain: Tensor) -> None:
    tolerance = TOLERANCE[plain.dtype]
    torch.testing.assert_close(planned, plain, atol=tolerance, rtol=tolerance)


@pytest.mark.parametrize("dtype", list(TOLERANCE))
@pytest.mark.parametrize("block_size", [1, 3, 16])
@pytest.mark.parametrize(
    "requests",
    [
        [(1, 1)],
        [(1, 33)],
        [(1, 16), (1, 17), (1, 15), (1, 1)],
        [(1, 600), (1, 5)],
        [(1, 5), (1, 256), (1, 257), (1, 500), (1, 3), (1, 600), (3, 9)],
        [(16, 16)],
        [(17, 17), (2, 33), (5, 5)],
        [(1, 7), (1, 48), (31, 31), (4, 40)],
    ],
    ids=str,
)
def test_planned_equals_plain(
    requests: list[tuple[int, int]], block_size: int, dtype: torch.dtype
) -> None:
    torch.manual_seed(0)
    agree(*both(requests, block_size=block_size, dtype=dtype))


@given(
    decodes=st.lists(st.integers(1, 40), max_size=5),
    chunks=st.lists(st.tuples(st.integers(2, 12), st.integers(0, 30)), max_size=3),
    block_size=st.integers(1, 9),
    kv_heads=st.integers(1, 3),
    group=st.integers(1, 4),
    window=st.none() | st.integers(1, 45),
    cap=st.sampled_from([None, 0.5]),
    seed=st.integers(0, 9),
)
@settings(max_examples=80, deadline=None)
def test_planned_equals_plain_on_any_batch(
    decodes: list[int],
    chunks: list[tuple[int, int]],
    block_size: int,
    kv_heads: int,
    group: int,
    window: int | None,
    cap: float | None,
    seed: int,
) -> None:
    requests = [(1, context) for context in decodes] + [(n, n + past) for n, past in chunks]
    if requests:
        torch.manual_seed(seed)
        shape = dict(block_size=block_size, kv_heads=kv_heads, group=group)
        agree(*both(requests, **shape, window=window, cap=cap))


def test_plain_is_sdpa_on_a_contiguous_cache() -> None:
    torch.manual_seed(0)
    query, key, value = (torch.randn(9, 2, 8) for _ in range(3))
    cache = new_cache(3, 3, 2, 8, torch.float32, CPU)
    write_kv(cache, torch.cat((key, value), dim=1), torch.arange(9))
    table = torch.tensor([[0, 1, 2]])
    plain = paged_attention(query, keys_of(cache), values_of(cache), table, [9], [0, 9], 0.3)
    wanted = torch.nn.functional.scaled_dot_product_attention(
        query.transpose(0, 1), key.transpose(0, 1), value.transpose(0, 1), is_causal=True, scale=0.3
    )
    torch.testing.assert_close(plain, wanted.transpose(0, 1), atol=2e-6, rtol=2e-6)


def test_a_short_context_is_not_padded_to_a_long_one() -> None:
    contexts = [5, 256, 257, 514, 515, 2000]
    tables = [list(range(500)) for _ in contexts]
    plan = plan_attention(tables, contexts, list(range(7)), 4, torch.float32, CPU)
    decodes = plan.reads().decodes
    assert [reads.rows for reads in decodes] == [
        slice(0, 2),
        slice(2, 4),
        slice(4, 5),
        slice(5, 6),
    ]
    assert [len(reads.slots) for reads in decodes] == [2 * 256, 2 * 514, 515, 2000]


def test_a_window_is_all_that_is_read_and_planned_once() -> None:
    plan = plan_attention(
        [list(range(500))] * 3, [5, 600, 90], [0, 1, 2, 22], 4, torch.float32, CPU
    )
    near = plan.reads(16)
    assert near is plan.reads(16) and near is not plan.reads(17)
    (decodes,), (chunk,) = near.decodes, near.chunks
    assert decodes.slots.view(2, -1)[1].tolist() == list(range(584, 600))
    assert chunk.slots.tolist() == list(range(55, 90))


def test_requests_with_one_query_must_come_first() -> None:
    with pytest.raises(AssertionError):
        plan_attention([[0], [1]], [2, 1], [0, 2, 3], 4, torch.float32, CPU)
