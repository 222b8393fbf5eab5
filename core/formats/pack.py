"""Unsigned integer codes packed into int32 words as one stream of bits, lowest bits first.

For 2, 4 and 8 bits each word holds a whole number of codes. For 3 bits, 32 codes fill three words
and codes 10 and 21 straddle their borders: the order of the original GPTQ code and of AutoGPTQ.
"""

import math

import torch
from torch import Tensor

WORD = 32
_MASK = (1 << WORD) - 1
_SIGN = 1 << (WORD - 1)


def packed_size(size: int, bits: int) -> int:
    """Words that `size` codes of `bits` bits take."""
    return -(-size * bits // WORD)


def pack(codes: Tensor, bits: int, dim: int) -> Tensor:
    """Pack codes in [0, 2^bits) along `dim` into int32 words; the last word ends in zeros."""
    rows = codes.movedim(dim, 0)
    size = rows.shape[0]
    # A unit is the shortest run of codes that ends on a word's border.
    unit_words = bits // math.gcd(WORD, bits)
    unit_codes = unit_words * WORD // bits
    units = -(-size // unit_codes)
    padded = torch.zeros(
        units * unit_codes, *rows.shape[1:], dtype=torch.int64, device=codes.device
    )
    padded[:size] = rows
    padded = padded.view(units, unit_codes, *rows.shape[1:])
    words = torch.zeros(units, unit_words, *rows.shape[1:], dtype=torch.int64, device=codes.device)
    for index in range(unit_codes):
        word, shift = divmod(index * bits, WORD)
        words[:, word] |= (padded[:, index] << shift) & _MASK
        if shift + bits > WORD:
            words[:, word + 1] |= padded[:, index] >> (WORD - shift)
    flat = words.flatten(0, 1)[: packed_size(size, bits)]
    signed = torch.where(flat >= _SIGN, flat - (1 << WORD), flat)
    return signed.to(torch.int32).movedim(0, dim).contiguous()


def unpack(words: Tensor, bits: int, dim: int, size: int) -> Tensor:
    """The first `size` codes along `dim`, as uint8: the inverse of `pack`."""
    rows = words.movedim(dim, 0).to(torch.int64) & _MASK
    codes = torch.empty(size, *rows.shape[1:], dtype=torch.uint8, device=words.device)
    mask = (1 << bits) - 1
    unit_words = bits // math.gcd(WORD, bits)
    unit_codes = unit_words * WORD // bits
    for index in range(min(unit_codes, size)):
        word, shift = divmod(index * bits, WORD)
        target = codes[index::unit_codes]
        low = rows[word::unit_words][: target.shape[0]] >> shift
        if shift + bits > WORD:
            low = low | rows[word + 1 :: unit_words][: target.shape[0]] << (WORD - shift)
        target.copy_(low & mask)
    return codes.movedim(0, dim).contiguous()
