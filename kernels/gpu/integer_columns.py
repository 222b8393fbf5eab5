"""Integer weights with scales by group as Triton's products read them, and such a weight whole.

A word holds neighbouring inputs of one output, and neighbouring outputs lie side by side: threads
that are neighbours read words that are. Codes become numbers by their bits: a code put into the
last places of a power of two is that power plus the code, and no integer is converted, which a
GPU does at a quarter of its speed.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from itertools import pairwise

import torch
import triton
import triton.language as tl
from torch import Tensor

from infopt.kernels.gpu.tile import Card, cdiv

WORD = 32
BITS = (2, 4, 8)
_LEAST_GROUP = 32
_CHUNK = 1 << 26
"""Numbers dequantized at a time: 128 MiB in 16 bits, a product large enough for a whole GPU."""

MAGIC: tl.constexpr = tl.constexpr(0x4B000000)
"""2^23 as float32, whose last place is 1."""
MAGIC_VALUE: tl.constexpr = tl.constexpr(8388608.0)


@dataclass(frozen=True, slots=True)
class IntegerColumns:
    """w = (code - zero) * scale."""

    words: Tensor
    """int32 [ceil(K * bits / 32), N]: of each word the first input in its lowest bits."""
    scales: Tensor
    """[G, N], of any float dtype; groups of K / G inputs in order."""
    zeros: Tensor | int
    """uint8 [G, N], or the one that all groups have."""
    bits: int
    inputs: int

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
        zeros = self.zeros.nbytes if isinstance(self.zeros, Tensor) else 0
        return self.words.nbytes + self.scales.nbytes + zeros


def packable_columns(bits: int, inputs: int, groups: int) -> bool:
    """Whether products of such a weight are here: no word and no step of a sum is of two groups."""
    if bits not in BITS or inputs % groups:
        return False
    return groups == 1 or inputs // groups % _LEAST_GROUP == 0


def pack_columns(codes: Tensor, scales: Tensor, zeros: Tensor | int, bits: int) -> IntegerColumns:
    """Codes uint8 [N, K], scales [N, G], zeros uint8 [N, G] or one for all; where they lie."""
    outputs, inputs = codes.shape
    assert packable_columns(bits, inputs, scales.shape[1])
    per = WORD // bits
    rows = cdiv(inputs, per)
    words = torch.zeros(rows, outputs, dtype=torch.int32, device=codes.device)
    for place in range(per):
        found = codes[:, place::per].t().to(torch.int32)
        words[: found.shape[0]] |= found << (place * bits)
    zeros = zeros.t().contiguous() if isinstance(zeros, Tensor) else zeros
    return IntegerColumns(words, scales.t().contiguous(), zeros, bits, inputs)


def reference(weight: IntegerColumns) -> Tensor:
    """The weight in float64, [N, K]."""
    per, mask = WORD // weight.bits, (1 << weight.bits) - 1
    places = torch.arange(per, device=weight.words.device) * weight.bits
    codes = (weight.words.long()[:, None, :] >> places[None, :, None]) & mask
    codes = codes.reshape(-1, weight.words.shape[1])[: weight.inputs]
    groups = weight.scales.shape[0]
    grouped = codes.double().view(groups, -1, codes.shape[1])
    zeros = weight.zeros if isinstance(weight.zeros, int) else weight.zeros.double()[:, None]
    return ((grouped - zeros) * weight.scales.double()[:, None]).flatten(0, 1).t()


@triton.jit
def number_of(words, J: tl.constexpr, BITS: tl.constexpr):
    """Code J of each word times its place in the word, or in its upper part: (2^23 + that, the
    place). A product by the other factor over the place is exact: both are powers of two."""
    LOWER: tl.constexpr = 23 // BITS  # codes that fit behind 2^23 where they are
    UPPER: tl.constexpr = J >= LOWER
    AT: tl.constexpr = (J - LOWER if UPPER else J) * BITS
    there = words >> (LOWER * BITS) if UPPER else words
    return ((there & (((1 << BITS) - 1) << AT)) | MAGIC).to(tl.float32, bitcast=True)


@triton.jit
def place_of(J: tl.constexpr, BITS: tl.constexpr):
    """What `number_of` leaves code J multiplied by."""
    LOWER: tl.constexpr = 23 // BITS
    PLACE: tl.constexpr = 1 << ((J - LOWER if J >= LOWER else J) * BITS)
    return PLACE


@triton.jit
def dequantize(
    words, scales, zeros, out, columns, columns_there, rows, inputs, out_stride,
    GROUP: tl.constexpr, BITS: tl.constexpr, ZERO: tl.constexpr,
    BLOCK_N: tl.constexpr, BLOCK_W: tl.constexpr,
):  # fmt: skip
    """`columns` outputs of `columns_there`: each number as float32 gives it, then rounded."""
    PER: tl.constexpr = 32 // BITS
    n = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    w = tl.program_id(1) * BLOCK_W + tl.arange(0, BLOCK_W)
    there = (w[:, None] < rows) & (n[None, :] < columns)
    q = tl.load(words + w[:, None] * columns_there + n[None, :], mask=there, other=0)
    group = w * PER // GROUP if GROUP else w * 0
    at = group[:, None] * columns_there + n[None, :]
    scale = tl.load(scales + at, mask=there, other=0.0).to(tl.float32)
    if ZERO < 0:
        zero = tl.load(zeros + at, mask=there, other=0).to(tl.float32)
    for j in tl.static_range(PER):
        if ZERO < 0:
            steps = (number_of(q, j, BITS) - (MAGIC_VALUE + zero * place_of(j, BITS))) / place_of(
                j, BITS
            )
        else:
            steps = (number_of(q, j, BITS) - (8388608.0 + ZERO * place_of(j, BITS))) / place_of(
                j, BITS
            )
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
    grid = (cdiv(columns, tile.constants["BLOCK_N"]), cdiv(rows, tile.constants["BLOCK_W"]))
    dequantize[grid](
        weight.words[:, first:], weight.scales[:, first:], zeros, out, columns,
        weight.words.shape[1], rows, weight.inputs, out.stride(0), GROUP=weight.group,
        BITS=weight.bits, ZERO=weight.zero, **tile.options(),
    )  # fmt: skip
    return out


def chunks(outputs: int, inputs: int) -> Iterator[slice]:
    """Runs of outputs that are dequantized and multiplied one after the other, alike in size."""
    parts = cdiv(outputs * inputs, _CHUNK)
    bounds = [min(outputs, cdiv(outputs, parts * 16) * 16 * part) for part in range(parts + 1)]
    yield from (slice(start, stop) for start, stop in pairwise(bounds) if start < stop)
