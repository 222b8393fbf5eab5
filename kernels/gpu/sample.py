"""One token for each row of logits: temperature, min-p, top-k and top-p without a sort.

The value down to which tokens are kept is searched for by bisection, each step a pass that also
finds the nearest values above and below, so that a search ends with exactly such a value. One
uniform number a row then becomes a token by the inverse of the cumulative distribution, in the
order of the vocabulary: the distribution is that of `core.runtime.sampler`, which sorts, though
the same number stands for another token there.
"""

from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor

from infopt.kernels.gpu.tile import Card

NOT_FINITE, NONE_LEFT = -1, -2
"""In place of a token."""
_LOG2_E: tl.constexpr = tl.constexpr(1.4426950408889634)


@dataclass(frozen=True, slots=True)
class Choosing:
    """How each of R rows is to be chosen from."""

    temperature: Tensor
    """float32 [R]; 0: the likeliest token."""
    top_k: Tensor
    """int32 [R]; 0: no limit."""
    top_p: Tensor
    """float32 [R]"""
    log_min_p: Tensor
    """float32 [R]: the logarithm of min-p; -inf: no limit."""
    uniform: Tensor
    """float32 [R], at least 0 and below 1: of each row's own generator."""


def reference(logits: Tensor, how: Choosing) -> Tensor:
    """logits [R, V] -> probabilities float64 [R, V] with which each token is to be chosen; of
    tokens that are equally likely the first are kept."""
    found = torch.zeros(logits.shape, dtype=torch.float64, device=logits.device)
    for row, values in enumerate(logits.double()):
        temperature = float(how.temperature[row])
        if temperature == 0:
            found[row, values.argmax()] = 1
            continue
        scaled = (values - values.max()) / temperature
        scaled = scaled.masked_fill(scaled < float(how.log_min_p[row]), -torch.inf)
        order = scaled.argsort(descending=True, stable=True)
        order = order[: int(how.top_k[row]) or len(order)]
        kept = scaled[order].softmax(0)
        kept = kept.masked_fill(kept.cumsum(0) - kept >= float(how.top_p[row]), 0.0)
        found[row, order] = kept / kept.sum()
    return found


@triton.jit
def read(logits, at, size):
    return tl.load(logits + at, mask=at < size, other=float("-inf")).to(tl.float32)


@triton.jit
def above(logits, size, floor, level, highest, slope, BLOCK: tl.constexpr):
    """Of tokens from `floor` on: how many are above `level`, their weight, the least of them, and
    the greatest that is not above."""
    count = tl.zeros((BLOCK,), tl.int32)
    weight = tl.zeros((BLOCK,), tl.float32)
    least = tl.full((BLOCK,), float("inf"), tl.float32)
    greatest = tl.full((BLOCK,), float("-inf"), tl.float32)
    for first in range(0, size, BLOCK):
        x = read(logits, first + tl.arange(0, BLOCK), size)
        higher = (x > level) & (x >= floor)
        count += higher.to(tl.int32)
        weight += tl.where(higher, tl.exp2((x - highest) * slope), 0.0)
        least = tl.minimum(least, tl.where(higher, x, float("inf")))
        lower = (x <= level) & (x >= floor)
        greatest = tl.maximum(greatest, tl.where(lower, x, float("-inf")))
    return (
        tl.sum(count, axis=0).to(tl.float32),
        tl.sum(weight, axis=0),
        tl.min(least, axis=0),
        tl.max(greatest, axis=0),
    )


@triton.jit
def level_of(
    logits, size, floor, wanted, below, highest, slope, COUNTS: tl.constexpr, BLOCK: tl.constexpr
):
    """The greatest value v with `wanted` or more at v and above, counted or weighed; and how many
    tokens, and how much weight, are above v. `below`: less than every value from `floor` on."""
    low, high = below, highest
    number, weight = wanted * 0.0, wanted * 0.0
    while low < high:
        middle = low + (high - low) * 0.5
        middle = tl.where(middle < high, middle, low)  # neighbours: what is above the lower?
        many, heavy, least, greatest = above(logits, size, floor, middle, highest, slope, BLOCK)
        if (many if COUNTS else heavy) < wanted:
            high, number, weight = greatest, many, heavy
        else:
            low = tl.where((least >= high) | (middle == low), high, middle)
    return high, number, weight


@triton.jit
def chosen(logits, size, floor, level, ties, target, highest, slope, BLOCK: tl.constexpr):
    """The first token at which the weight so far passes `target`; `ties` of those at `level` count.
    If rounding leads past the end, the last token that counts at all."""
    found, last = tl.full((), -1, tl.int32), tl.full((), -1, tl.int32)
    before, tied = target * 0.0, tl.full((), 0, tl.int32)
    for first in range(0, size, BLOCK):
        at = first + tl.arange(0, BLOCK)
        x = read(logits, at, size)
        equal = (x == level) & (x >= floor)
        place = tied + tl.cumsum(equal.to(tl.int32), axis=0)
        kept = ((x > level) & (x >= floor)) | (equal & (place <= ties))
        weight = tl.where(kept, tl.exp2((x - highest) * slope), 0.0)
        passed = (before + tl.cumsum(weight, axis=0) > target) & (weight > 0)
        here = tl.min(tl.where(passed, at, size), axis=0)
        found = tl.where((found < 0) & (here < size), here, found)
        last = tl.maximum(last, tl.max(tl.where(weight > 0, at, -1), axis=0))
        before += tl.sum(weight, axis=0)
        tied += tl.sum(equal.to(tl.int32), axis=0)
    return tl.where(found < 0, last, found)


@triton.jit
def choose(
    logits, stride, size, temperatures, top_ks, top_ps, log_min_ps, uniforms, tokens,
    BLOCK: tl.constexpr,
):  # fmt: skip
    """One row a program."""
    row = tl.program_id(0)
    logits += row.to(tl.int64) * stride
    highest, lowest, best, bad = extremes(logits, size, BLOCK)
    temperature = tl.load(temperatures + row)
    token = best
    if (temperature > 0) & (bad == 0) & (highest > float("-inf")):
        slope = _LOG2_E / temperature
        floor = tl.maximum(highest + tl.load(log_min_ps + row) * temperature, lowest)
        # Doubled and less one: below any value, and no large number that would swallow the one.
        below = tl.minimum(lowest * 2.0, lowest * 0.5) - 1.0
        many, heavy, level, _ = above(logits, size, floor, below, highest, slope, BLOCK)
        ties = tl.full((), 2147483647, tl.int32)
        total = heavy
        k = tl.load(top_ks + row).to(tl.float32)
        if (k > 0) & (k < many):
            level, number, weight = level_of(
                logits, size, floor, k, below, highest, slope, True, BLOCK
            )
            ties = (k - number).to(tl.int32)
            total = weight + ties.to(tl.float32) * tl.exp2((level - highest) * slope)
        p = tl.load(top_ps + row)
        if p < 1:
            wanted = p * total
            under = tl.where(level > below, level - tl.abs(level) * 0.5 - 1.0, below)
            higher, number, weight = level_of(
                logits, size, tl.maximum(floor, level), wanted, under, highest, slope, False, BLOCK
            )
            each = tl.exp2((higher - highest) * slope)
            needed = tl.maximum(tl.ceil((wanted - weight) / each), 1.0)
            bound = tl.where(higher == level, ties, 2147483647).to(tl.float32)
            needed = tl.minimum(needed, bound)
            level, ties = higher, needed.to(tl.int32)
            total = weight + needed * each
        target = tl.load(uniforms + row) * total
        token = chosen(logits, size, floor, level, ties, target, highest, slope, BLOCK)
    token = tl.where(highest > float("-inf"), token, -2)
    tl.store(tokens + row, tl.where(bad > 0, -1, token).to(tl.int64))


@triton.jit
def extremes(logits, size, BLOCK: tl.constexpr):
    """The greatest logit, the least but -inf, the first token of the greatest, and whether a logit
    is NaN or +inf."""
    highest = tl.full((BLOCK,), float("-inf"), tl.float32)
    lowest = tl.full((BLOCK,), float("inf"), tl.float32)
    where = tl.zeros((BLOCK,), tl.int32)
    bad = tl.zeros((BLOCK,), tl.int32)
    for first in range(0, size, BLOCK):
        at = first + tl.arange(0, BLOCK)
        x = read(logits, at, size)
        bad = tl.where((x != x) | (x == float("inf")), 1, bad)
        where = tl.where(x > highest, at, where)
        highest = tl.where(x > highest, x, highest)
        lowest = tl.where((x < lowest) & (x > float("-inf")), x, lowest)
    top = tl.max(highest, axis=0)
    best = tl.min(tl.where(highest == top, where, size), axis=0)
    return top, tl.min(lowest, axis=0), best, tl.max(bad, axis=0)


def sample(card: Card, logits: Tensor, how: Choosing) -> Tensor:
    """logits [R, V] of any float dtype, their rows contiguous -> tokens int64 [R].

    NOT_FINITE for a row with a NaN or +inf, NONE_LEFT where all is -inf. A row's token depends on
    the row and on how it is chosen from, and on nothing else.
    """
    assert logits.stride(1) == 1
    tokens = torch.empty(len(logits), dtype=torch.int64, device=logits.device)
    tile = card.tile("sample", columns=logits.shape[1])
    if len(logits):
        choose[(len(logits),)](
            logits, logits.stride(0), logits.shape[1], how.temperature, how.top_k, how.top_p,
            how.log_min_p, how.uniform, tokens, **tile.options(),
        )  # fmt: skip
    return tokens
