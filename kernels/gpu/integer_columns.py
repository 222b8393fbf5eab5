"""Weights of few bits with scales by group as Triton's products read them, and one whole.

A word holds neighbouring inputs of one output, and neighbouring outputs lie side by side: threads
that are neighbours read words that are. Integers become numbers by their bits: a code put into the
last places of a power of two is that power plus the code, and no integer is converted, which a
GPU does at a quarter of its speed. Codes of 3 bits are words of their lower two bits and words of
the third; NormalFloat's codes are looked up in a table.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import pairwise

import torch
import triton
import triton.language as tl
from torch import Tensor

from infopt.kernels.gpu.tile import Card, cdiv

WORD = 32
BITS = (2, 3, 4, 8)
_LEAST_GROUP = 32
_CHUNK = 1 << 26
"""Numbers dequantized at a time: 128 MiB in 16 bits, a product large enough for a whole GPU."""

MAGIC: tl.constexpr = tl.constexpr(0x4B000000)
"""2^23 as float32, whose last place is 1."""
MAGIC_VALUE: tl.constexpr = tl.constexpr(8388608.0)


@dataclass(frozen=True, slots=True)
class IntegerColumns:
    """w = (code - zero) * scale; with a table, table[code] * scale."""

    words: Tensor
    """int32 [ceil(K * bits / 32), N]: of each word the first input in its lowest bits; of codes of
    3 bits the lower two, 16 to a word."""
    scales: Tensor
    """[G, N], of any float dtype; groups of K / G inputs in order."""
    zeros: Tensor | int
    """uint8 [G, N], or the one that all groups have."""
    bits: int
    inputs: int
    thirds: Tensor | None = None
    """int32 [ceil(K / 32), N]: the third bits of codes that have three."""
    table: Tensor | None = None
    """float32 [2^bits]: what codes stand for that are no integers, such as NormalFloat's."""

    @property
    def shape(self) -> tuple[int, int]:
        return self.scales.shape[1], self.inputs

    @property
    def group(self) -> int:
        """Inputs that share a scale; 0 where all do."""
        groups = self.scales.shape[0]
        return 0 if groups == 1 else self.inputs // groups

    @property
    def zero(self) -> int:
        """Of all groups; -1 where each has its own."""
        return self.zeros if isinstance(self.zeros, int) else -1

    @property
    def nbytes(self) -> int:
        parts = (self.words, self.scales, self.zeros, self.thirds, self.table)
        return sum(part.nbytes for part in parts if isinstance(part, Tensor))


def packable_columns(bits: int, inputs: int, groups: int) -> bool:
    """Whether products of such a weight are here: no word and no step of a sum is of two groups."""
    if bits not in BITS or inputs % groups:
        return False
    return groups == 1 or inputs // groups % _LEAST_GROUP == 0


def pack_columns(
    codes: Tensor, scales: Tensor, zeros: Tensor | int, bits: int, table: Tensor | None = None
) -> IntegerColumns:
    """Codes uint8 [N, K], scales [N, G], zeros uint8 [N, G] or one for all; where they lie."""
    inputs = codes.shape[1]
    assert packable_columns(bits, inputs, scales.shape[1])
    thirds = _words(codes >> 2, 1) if bits == 3 else None
    words = _words(codes & 3, 2) if bits == 3 else _words(codes, bits)
    zeros = zeros.t().contiguous() if isinstance(zeros, Tensor) else zeros
    return IntegerColumns(words, scales.t().contiguous(), zeros, bits, inputs, thirds, table)


def _words(codes: Tensor, bits: int) -> Tensor:
    outputs, inputs = codes.shape
    per = WORD // bits
    words = torch.zeros(cdiv(inputs, per), outputs, dtype=torch.int32, device=codes.device)
    for place in range(per):
        found = codes[:, place::per].t().to(torch.int32)
        words[: found.shape[0]] |= found << (place * bits)
    return words


def joined(parts: Sequence[IntegerColumns]) -> IntegerColumns | None:
    """The outputs of all of them as one weight; None where they are not packed alike."""
    first = parts[0]
    kinds = {(p.bits, p.inputs, p.scales.shape[0], p.scales.dtype, p.zero) for p in parts}
    tables = [part.table for part in parts if part.table is not None]
    if len(kinds) > 1 or len(tables) not in (0, len(parts)):
        return None
    if any(not torch.equal(table, tables[0]) for table in tables):
        return None

    def side_by_side(found: Sequence[Tensor | int | None]) -> Tensor:
        return torch.cat([part for part in found if isinstance(part, Tensor)], dim=1)

    return replace(
        first,
        words=side_by_side([part.words for part in parts]),
        scales=side_by_side([part.scales for part in parts]),
        zeros=first.zeros if first.zero >= 0 else side_by_side([part.zeros for part in parts]),
        thirds=None if first.thirds is None else side_by_side([part.thirds for part in parts]),
    )


def reference(weight: IntegerColumns) -> Tensor:
    """The weight in float64, [N, K]."""
    codes = _codes(weight.words, 2 if weight.bits == 3 else weight.bits, weight.inputs)
    if weight.thirds is not None:
        codes |= _codes(weight.thirds, 1, weight.inputs) << 2
    groups = weight.scales.shape[0]
    steps = codes.double() if weight.table is None else weight.table.double()[codes]
    grouped = steps.view(groups, -1, codes.shape[1])
    if weight.table is None:
        zeros = weight.zeros
        grouped = grouped - (zeros if isinstance(zeros, int) else zeros.double()[:, None])
    return (grouped * weight.scales.double()[:, None]).flatten(0, 1).t()


def _codes(words: Tensor, bits: int, inputs: int) -> Tensor:
    """int64 [K, N]"""
    per, mask = WORD // bits, (1 << bits) - 1
    places = torch.arange(per, device=words.device) * bits
    codes = (words.long()[:, None, :] >> places[None, :, None]) & mask
    return codes.reshape(-1, words.shape[1])[:inputs]


@triton.jit
def third_bits(thirds, words, w, n, columns, there, BITS: tl.constexpr):
    """Of codes of 3 bits, those that belong to words `w`: in 16 places, from the lowest on."""
    if BITS == 3:
        at = thirds + w[:, None] // 2 * columns + n[None, :]
        return tl.load(at, mask=there, other=0) >> (w[:, None] % 2 * 16)
    else:
        return words


@triton.jit
def number_of(words, third, J: tl.constexpr, BITS: tl.constexpr):
    """Code J of each word times its place in the word, or in its upper part: (2^23 + that, the
    place). A product by the other factor over the place is exact: both are powers of two."""
    WIDTH: tl.constexpr = 2 if BITS == 3 else BITS
    LOWER: tl.constexpr = (23 - BITS) // WIDTH + 1  # codes that fit behind 2^23 where they are
    UPPER: tl.constexpr = J >= LOWER
    AT: tl.constexpr = (J - LOWER if UPPER else J) * WIDTH
    there = words >> (LOWER * WIDTH) if UPPER else words
    bits = there & (((1 << WIDTH) - 1) << AT)
    if BITS == 3:
        moved = third << (AT + 2 - J) if AT + 2 >= J else third >> (J - AT - 2)
        bits |= moved & (4 << AT)
    return (bits | MAGIC).to(tl.float32, bitcast=True)


@triton.jit
def place_of(J: tl.constexpr, BITS: tl.constexpr):
    """What `number_of` leaves code J multiplied by."""
    WIDTH: tl.constexpr = 2 if BITS == 3 else BITS
    LOWER: tl.constexpr = (23 - BITS) // WIDTH + 1
    PLACE: tl.constexpr = 1 << ((J - LOWER if J >= LOWER else J) * WIDTH)
    return PLACE


@triton.jit
def less_zero(number, zero, J: tl.constexpr, BITS: tl.constexpr, ZERO: tl.constexpr):
    """A code less its zero, times its place."""
    if ZERO < 0:
        return number - (MAGIC_VALUE + zero * place_of(J, BITS))
    else:
        return number - (8388608.0 + ZERO * place_of(J, BITS))


@triton.jit
def dequantize(
    words, thirds, table, scales, zeros, out, columns, columns_there, rows, inputs, out_stride,
    GROUP: tl.constexpr, BITS: tl.constexpr, ZERO: tl.constexpr, TABLE: tl.constexpr,
    BLOCK_N: tl.constexpr, BLOCK_W: tl.constexpr,
):  # fmt: skip
    """`columns` outputs of `columns_there`: each number as float32 gives it, then rounded."""
    PER: tl.constexpr = 32 // (2 if BITS == 3 else BITS)
    n = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    w = tl.program_id(1) * BLOCK_W + tl.arange(0, BLOCK_W)
    there = (w[:, None] < rows) & (n[None, :] < columns)
    q = tl.load(words + w[:, None] * columns_there + n[None, :], mask=there, other=0)
    third = third_bits(thirds, q, w, n, columns_there, there, BITS)
    group = w * PER // GROUP if GROUP else w * 0
    at = group[:, None] * columns_there + n[None, :]
    scale = tl.load(scales + at, mask=there, other=0.0).to(tl.float32)
    zero = scale
    if ZERO < 0:
        zero = tl.load(zeros + at, mask=there, other=0).to(tl.float32)
    for j in tl.static_range(PER):
        if TABLE:
            steps = tl.load(table + ((q >> (j * BITS)) & ((1 << BITS) - 1)))
        else:
            steps = less_zero(number_of(q, third, j, BITS), zero, j, BITS, ZERO)
            steps /= place_of(j, BITS)
        k = w * PER + j
        to = out + k[:, None].to(tl.int64) * out_stride + n[None, :]
        tl.store(to, (steps * scale).to(out.dtype.element_ty), mask=there & (k[:, None] < inputs))


def dequantized(
    card: Card, weight: IntegerColumns, dtype: torch.dtype, out: Tensor, first: int
) -> Tensor:
    """Outputs `first` on into out [K, some outputs], in `dtype`; returns it."""
    tile = card.tile("dequantize_columns", bits=weight.bits)
    rows, columns = weight.words.shape[0], out.shape[1]
    zeros = weight.zeros[:, first:] if isinstance(weight.zeros, Tensor) else weight.words
    thirds = weight.words if weight.thirds is None else weight.thirds[:, first:]
    grid = (cdiv(columns, tile.constants["BLOCK_N"]), cdiv(rows, tile.constants["BLOCK_W"]))
    dequantize[grid](
        weight.words[:, first:], thirds, weight.words if weight.table is None else weight.table,
        weight.scales[:, first:], zeros, out, columns, weight.words.shape[1], rows, weight.inputs,
        out.stride(0), GROUP=weight.group, BITS=weight.bits, ZERO=weight.zero,
        TABLE=weight.table is not None, **tile.options(),
    )  # fmt: skip
    return out


def chunks(outputs: int, inputs: int) -> Iterator[slice]:
    """Runs of outputs that are dequantized and multiplied one after the other, alike in size."""
    parts = cdiv(outputs * inputs, _CHUNK)
    bounds = [min(outputs, cdiv(outputs, parts * 16) * 16 * part) for part in range(parts + 1)]
    yield from (slice(start, stop) for start, stop in pairwise(bounds) if start < stop)
