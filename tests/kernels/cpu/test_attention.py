"""Attention over a paged cache against plain torch, where all that no query sees is NaN."""

import pytest
import torch
from torch import Tensor

from infopt.kernels.attention.cache import keys_of, new_cache, values_of, write_kv
from infopt.kernels.attention.eight_bits import INT8, STORAGE, KvScales, decode
from infopt.kernels.attention.paged import paged_attention
from infopt.kernels.cpu.attention import (
    Heads,
    Scores,
    attend,
    most_pieces,
    new_scratch,
    rotate_and_cache,
)
from infopt.kernels.cpu.native import Native
from infopt.kernels.cpu.program import Program

CPU = torch.device("cpu")
DTYPES = (torch.float32, torch.bfloat16, torch.int8)
SHAPES = (Heads(1, 1, 8), Heads(9, 3, 64), Heads(14, 2, 64), Heads(4, 4, 80), Heads(8, 1, 128),
          Heads(5, 1, 40), Heads(2, 1, 256))  # fmt: skip
ALONE = torch.arange(9, dtype=torch.int32)
CONTEXTS = (1, 16, 63, 64, 65, 300, 1500)


def rounds(native: Native, dtype: torch.dtype, shape: Heads) -> bool:
    """Whether queries and weights of few rows are rounded to bfloat16."""
    return native.isa in ("avx512", "amx") and dtype == torch.bfloat16 and shape.head_dim % 32 == 0


def filled(shape: Heads, dtype: torch.dtype, contexts: tuple[int, ...], size: int):  # type: ignore[no-untyped-def]
    """A cache, the blocks of each row, and what of the cache is in use."""
    width = -(-max(contexts) // size)
    blocks = len(contexts) * width + 1
    order = torch.randperm(blocks - 1)[: len(contexts) * width] + 1
    tables = order.view(len(contexts), width).to(torch.int32)
    cache = new_cache(blocks, size, shape.kv_heads, shape.head_dim, dtype, CPU)
    cache.view(torch.uint8).fill_(0xFF)  # NaN, as a float of any width and as a scale
    for row, context in enumerate(contexts):
        at = torch.arange(context)
        slots = tables[row, at // size].long() * size + at % size
        values = torch.randn(context, 2 * shape.kv_heads, shape.head_dim)
        write_kv(cache, values if dtype in STORAGE else values.to(dtype), slots)
    return cache, tables


def reference(
    qkv: Tensor, cache: Tensor, tables: Tensor, contexts: tuple[int, ...], shape: Heads, s: Scores
) -> Tensor:
    held = decode(cache, shape.head_dim, torch.float32) if cache.dtype == INT8 else cache.float()
    query = qkv.view(len(qkv), -1, shape.head_dim)[: len(contexts), : shape.heads]
    found = paged_attention(
        query, keys_of(held), values_of(held), tables.long(), contexts,
        range(len(contexts) + 1), s.scale, window=s.window, cap=s.cap,
    )  # fmt: skip
    return found.flatten(1)


@pytest.mark.parametrize("scores", [Scores(0.3), Scores(0.3, 70), Scores(0.2, None, 5.0)], ids=str)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_attention(native: Native, shape: Heads, dtype: torch.dtype, scores: Scores) -> None:
    torch.manual_seed(0)
    size = 16 if shape.heads % 2 else 3
    cache, tables = filled(shape, dtype, CONTEXTS, size)
    qkv = torch.randn(9, shape.width)
    positions = torch.tensor([*(context - 1 for context in CONTEXTS), 0, 0])
    tables = torch.cat((tables, tables[:2]))
    program = Program(native, 9, 2)
    program.rows = len(CONTEXTS)
    scratch = new_scratch(9, shape, max(CONTEXTS))
    scratch.parts.fill_(torch.nan)
    out = attend(program, qkv, cache, positions, ALONE, tables, shape, scores, scratch)
    rounded = program.rounded(out)
    rounding = rounds(native, dtype, shape)
    given = qkv.bfloat16().float() if rounding else qkv
    wanted = reference(given, cache, tables[: len(CONTEXTS)], CONTEXTS, shape, scores)
    close = {"rtol": 0.0, "atol": 5e-3} if rounding else {"rtol": 2e-5, "atol": 2e-5}
    for _ in range(2):  # the second time as the first
        out.fill_(torch.nan)
        program.run()
        torch.testing.assert_close(out[: len(CONTEXTS)], wanted, **close)
        assert out[len(CONTEXTS) :].isnan().all()
        assert torch.equal(rounded[: len(CONTEXTS)], out[: len(CONTEXTS)].bfloat16())


CHUNK = 8
"""Queries of one request from which on they are taken together."""


@pytest.mark.parametrize(
    "scores", [Scores(0.125), Scores(0.125, 50), Scores(0.2, 50, 4.0)], ids=str
)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("rows", [CHUNK - 2, 61])
def test_several_rows_of_one_request(
    native: Native, rows: int, shape: Heads, dtype: torch.dtype, scores: Scores
) -> None:
    """Between single ones, over where pieces become larger."""
    torch.manual_seed(0)
    contexts, starts = (70, 1040, 3, rows), [0, 1, rows + 1, rows + 2, 2 * rows + 2]
    cache, tables = filled(shape, dtype, contexts, 16)
    positions = torch.tensor([69, *range(1040 - rows, 1040), 2, *range(rows)])
    owners = torch.tensor([0, *[1] * rows, 2, *[3] * rows], dtype=torch.int32)
    qkv = torch.randn(starts[-1], shape.width)

    def run(own: slice, threads: int) -> Tensor:
        count = len(positions[own])
        program = Program(native, count, threads)
        program.rows = count
        scratch = new_scratch(count, shape, 1040)
        out = attend(
            program, qkv[own], cache, positions[own], owners[own], tables, shape, scores, scratch
        ).fill_(torch.nan)
        rounded = program.rounded(out)
        program.run()
        assert torch.equal(rounded, out.bfloat16())
        return out

    whole = run(slice(0, len(qkv)), 2)
    assert torch.equal(run(slice(0, len(qkv)), 1), whole)
    held = decode(cache, shape.head_dim, torch.float32) if cache.dtype == INT8 else cache.float()
    wanted = paged_attention(
        qkv.view(len(qkv), -1, shape.head_dim)[:, : shape.heads], keys_of(held), values_of(held),
        tables.long(), contexts, starts, scores.scale, window=scores.window, cap=scores.cap,
    )  # fmt: skip
    in_pairs = native.isa in ("avx512", "amx") and dtype == torch.bfloat16 and rows >= CHUNK
    close = 2e-2 if in_pairs or rounds(native, dtype, shape) else 3e-5
    torch.testing.assert_close(whole, wanted.flatten(1), rtol=close, atol=close)
    if rows < CHUNK:
        for row in range(len(qkv)):
            assert torch.equal(run(slice(row, row + 1), 1)[0], whole[row])


@pytest.mark.parametrize("scores", [Scores(0.125), Scores(0.125, 150), Scores(0.2, None, 4.0)])
@pytest.mark.parametrize("shape", [Heads(9, 3, 64), Heads(4, 1, 256), Heads(7, 1, 96)], ids=str)
def test_a_long_prompt_in_large_chunks(native: Native, shape: Heads, scores: Scores) -> None:
    """Over several spans of tokens, the last ones not whole, all that no row sees NaN; against
    float64, from the values that the cache holds."""
    torch.manual_seed(0)
    rows, context = 401, 700
    cache, tables = filled(shape, torch.bfloat16, (context,), 16)
    qkv = torch.randn(rows, shape.width)
    program = Program(native, rows, 2)
    program.rows = rows
    positions = torch.arange(context - rows, context)
    owners = torch.zeros(rows, dtype=torch.int32)
    scratch = new_scratch(rows, shape, context)
    out = attend(program, qkv, cache, positions, owners, tables, shape, scores, scratch)
    rounded = program.rounded(out.fill_(torch.nan))
    program.run()
    at = torch.arange(context)
    held = cache[tables[0, at // 16].long(), at % 16].double()[..., : shape.head_dim]
    keys, values = (
        each.repeat_interleave(shape.heads // shape.kv_heads, 1) for each in held.unbind(1)
    )
    query = qkv.view(rows, -1, shape.head_dim)[:, : shape.heads].double()
    logits = torch.einsum("rhd,thd->hrt", query, keys) * scores.scale
    if scores.cap:
        logits = scores.cap * torch.tanh(logits / scores.cap)
    away = positions[:, None] - at
    hidden = (away < 0) | (away >= (scores.window or context))
    weights = logits.masked_fill(hidden, -torch.inf).softmax(-1)
    wanted = torch.einsum("hrt,thd->rhd", weights, values).flatten(1)
    error = (out - wanted).norm() / wanted.norm()
    assert error < (1e-2 if rounds(native, torch.bfloat16, shape) else 1e-5)
    assert torch.equal(rounded, out.bfloat16())


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_no_row_depends_on_the_others(native: Native, dtype: torch.dtype) -> None:
    """To the last bit: not on its place, nor on how many threads there are."""
    torch.manual_seed(0)
    shape, scores = Heads(9, 3, 64), Scores(0.125)
    cache, tables = filled(shape, dtype, CONTEXTS, 16)
    qkv = torch.randn(len(CONTEXTS), shape.width)
    positions = torch.tensor(CONTEXTS) - 1

    def run(rows: list[int], threads: int) -> Tensor:
        program = Program(native, len(rows), threads)
        program.rows = len(rows)
        scratch = new_scratch(len(rows), shape, 96 * 16)
        out = attend(
            program, qkv[rows], cache, positions[rows], ALONE, tables[rows], shape, scores, scratch
        )
        program.run()
        return out

    whole = run(list(range(len(CONTEXTS))), 1)
    assert torch.equal(run(list(range(len(CONTEXTS))), 2), whole)
    for row in range(len(CONTEXTS)):
        assert torch.equal(run([row], 2)[0], whole[row])


def test_what_is_not_finite_is_told(native: Native) -> None:
    shape = Heads(3, 1, 64)
    cache, tables = filled(shape, torch.float32, (70, 70, 70), 16)
    cache[tables[1, 2], 3, 0] = torch.inf
    cache[tables[2, 1], 5, 1, 0, 7] = torch.nan
    program = Program(native, 3, 1)
    program.rows = 3
    positions = torch.full((3,), 69)
    scratch = new_scratch(3, shape, 70)
    qkv = torch.randn(3, shape.width)
    out = attend(program, qkv, cache, positions, ALONE, tables, shape, Scores(0.125), scratch)
    program.run()
    assert [bool(row.isfinite().all()) for row in out] == [True, False, False]


@pytest.mark.parametrize("context", [1, 64, 65, 1000, 1024, 1025, 5000, 16384, 16385, 200000])
def test_pieces_fit_the_scratch(context: int) -> None:
    def pieces(seen: int) -> int:
        each = 64 if seen <= 1024 else 256
        while each * 64 < seen:
            each *= 2
        return -(-seen // each)

    most = max(pieces(seen) for seen in {*range(1, min(context, 3000) + 1), context, context - 255})
    assert most_pieces(context) >= most


@pytest.mark.parametrize("calibrated", [False, True])
@pytest.mark.parametrize("half", [0, 3, 16, 32])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("head_dim", [64, 70])
def test_rotation_and_cache(
    native: Native, dtype: torch.dtype, half: int, head_dim: int, calibrated: bool
) -> None:
    torch.manual_seed(0)
    shape, size, rows = Heads(4, 2, head_dim), 4, 5
    weight = torch.randn(6, head_dim) if half != 3 else None
    cos, sin = torch.rand(7, half), torch.rand(7, half)
    qkv, slots = 3 * torch.randn(7, shape.width), torch.randperm(20)[:7]
    qkv[1, 8:10] = 0.0
    given = qkv.clone()
    scales = KvScales(INT8, torch.rand(4, 1) / 20 + 0.01) if calibrated else None
    cache, wanted = (new_cache(5, size, 2, head_dim, dtype, CPU) for _ in range(2))
    for each in (cache, wanted):
        each.view(torch.uint8).fill_(0xFF)
    program = Program(native, 7, 2)
    program.rows = rows
    rotate_and_cache(
        program,
        qkv,
        slots,
        cache,
        shape,
        rotary=(cos, sin) if half else None,
        norm=None if weight is None else (weight, 1e-6),
        scales=scales,
    )
    program.run()

    heads = given.view(7, 8, head_dim)[:rows].clone()
    turned = heads[:, :6]
    if weight is not None:
        turned = torch.nn.functional.rms_norm(turned, (head_dim,), None, 1e-6) * weight
    low, high = turned[..., :half], turned[..., half : 2 * half]
    c, s = cos[:rows, None], sin[:rows, None]
    rest = turned[..., 2 * half :]
    heads[:, :6] = torch.cat((low * c - high * s, high * c + low * s, rest), dim=-1)
    torch.testing.assert_close(qkv[:rows], heads.flatten(1), rtol=1e-5, atol=1e-5)
    assert torch.equal(qkv[rows:], given[rows:])
    # What was written, to the last bit, is what torch would write of these same numbers.
    kept = qkv.view(7, 8, head_dim)[:rows, 4:]
    write_kv(wanted, kept if dtype in STORAGE else kept.to(dtype), slots[:rows], scales)
    assert torch.equal(cache.view(torch.uint8), wanted.view(torch.uint8))


def test_an_int8_row_tells_of_what_is_not_finite(native: Native) -> None:
    shape = Heads(1, 1, 64)
    for bad in (torch.inf, torch.nan):
        qkv = torch.randn(1, shape.width)
        qkv[0, 70] = bad
        cache = new_cache(1, 1, 1, 64, torch.int8, CPU)
        program = Program(native, 1, 1)
        program.rows = 1
        slots = torch.zeros(1, dtype=torch.int64)
        rotate_and_cache(program, qkv, slots, cache, shape, rotary=None, norm=None)
        program.run()
        key, value = decode(cache, 64, torch.float32)[0, 0, :, 0]
        assert not key.isfinite().any() and value.isfinite().all()
