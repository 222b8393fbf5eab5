import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from infopt.core.formats.pack import pack, packed_size, unpack


@settings(deadline=None, max_examples=200)
@given(
    bits=st.sampled_from([2, 3, 4, 8]),
    rows=st.integers(1, 101),
    columns=st.integers(1, 101),
    dim=st.sampled_from([0, 1, -1]),
    seed=st.integers(0, 2**31),
)
def test_unpack_reverses_pack(bits: int, rows: int, columns: int, dim: int, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    codes = torch.randint(0, 2**bits, (rows, columns), generator=generator, dtype=torch.uint8)
    words = pack(codes, bits, dim)
    assert words.dtype == torch.int32
    assert words.shape[dim] == packed_size(codes.shape[dim], bits)
    assert torch.equal(unpack(words, bits, dim, codes.shape[dim]), codes)


@pytest.mark.parametrize("bits", [2, 3, 4, 8])
def test_the_words_are_one_stream_of_bits_lowest_first(bits: int) -> None:
    codes = torch.randint(0, 2**bits, (64,), dtype=torch.uint8)
    stream = sum(int(code) << (bits * i) for i, code in enumerate(codes))
    expected = [(stream >> (32 * i)) & 0xFFFFFFFF for i in range(2 * bits)]
    assert [int(word) & 0xFFFFFFFF for word in pack(codes, bits, dim=0)] == expected


def test_four_bits_look_as_other_tools_write_them() -> None:
    assert int(pack(torch.full((8,), 7), 4, dim=0)) == 0x77777777
    assert int(pack(torch.arange(8), 4, dim=0)) == 0x76543210


def test_three_bits_straddle_at_codes_10_and_21() -> None:
    codes = torch.zeros(32, dtype=torch.uint8)
    codes[10], codes[21] = 0b111, 0b101
    words = [int(word) & 0xFFFFFFFF for word in pack(codes, 3, dim=0)]
    # Code 10 has two bits in the first word and one in the second; code 21 has one and two.
    assert words == [0b11 << 30, 0b1 | 0b1 << 31, 0b10]
