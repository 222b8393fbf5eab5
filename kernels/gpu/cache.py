"""The paged cache of one layer as Triton's kernels read it.

In 16 or 32 bits it is that of `kernels.attention.cache`: [blocks, block_size, 2, kv_heads,
head_dim]. In 8 bits a token is a row of bytes, [blocks, block_size, token_bytes]: the codes of all
keys, then of all values, head by head, then one float32 scale for each, so that a head's codes are
as well aligned as they can be. Whoever copies and keeps blocks need not know.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from infopt.kernels.attention import cache as plain
from infopt.kernels.attention import eight_bits
from infopt.kernels.attention.eight_bits import STORAGE

_ALIGNED = 16
"""Bytes that one thread reads at once."""


def token_bytes(kv_heads: int, head_dim: int, dtype: torch.dtype) -> int:
    """Bytes of one token's keys and values in one layer, scales and padding included."""
    if dtype not in STORAGE:
        return plain.token_bytes(kv_heads, head_dim, dtype)
    return -(-(_code_bytes(kv_heads, head_dim) + 8 * kv_heads) // _ALIGNED) * _ALIGNED


def _code_bytes(kv_heads: int, head_dim: int) -> int:
    """Of a token: padded so that float32 scales may follow."""
    return -(-2 * kv_heads * head_dim // 4) * 4


def new_cache(
    blocks: int,
    block_size: int,
    kv_heads: int,
    head_dim: int,
    dtype: torch.dtype,
    device: torch.device,
) -> Tensor:
    """A cache whose slots hold anything; attention never reads a slot that was not written.

    dtype: that of keys and values; int8 and float8_e4m3fn are kept with scales.
    """
    if dtype not in STORAGE:
        return plain.new_cache(blocks, block_size, kv_heads, head_dim, dtype, device)
    size = token_bytes(kv_heads, head_dim, dtype)
    return torch.empty(blocks, block_size, size, dtype=STORAGE[dtype], device=device)


@dataclass(frozen=True, slots=True)
class Layout:
    """Where a token's numbers lie, counted in elements from the cache's first."""

    block_size: int
    token_stride: int
    value_offset: int
    """From a token's keys to its values."""
    scales: Tensor | None
    """In 8 bits: the same memory as float32, from the first token's first scale."""
    scale_stride: int
    """Of float32 numbers from token to token."""


def layout_of(cache: Tensor, kv_heads: int, head_dim: int) -> Layout:
    block_size, values = cache.shape[1], kv_heads * head_dim
    if cache.dtype not in STORAGE.values():
        return Layout(block_size, 2 * values, values, None, 0)
    floats = cache.view(-1).view(torch.float32)
    first = floats[_code_bytes(kv_heads, head_dim) // 4 :]
    return Layout(block_size, cache.shape[2], values, first, cache.shape[2] // 4)


def decoded(cache: Tensor, kv_heads: int, head_dim: int) -> Tensor:
    """Keys and values in float64, [slots, 2 * kv_heads, head_dim]: what kernels are held to."""
    if cache.dtype not in STORAGE.values():
        return cache.double().view(-1, 2 * kv_heads, head_dim)
    tokens = cache.view(-1, cache.shape[2])
    codes = tokens[:, : 2 * kv_heads * head_dim].contiguous().view(-1, 2 * kv_heads, head_dim)
    start = _code_bytes(kv_heads, head_dim)
    scales = tokens[:, start : start + 8 * kv_heads].contiguous().view(torch.float32)
    if cache.dtype == eight_bits.FP8:
        codes = codes.view(torch.float8_e4m3fn)
    return codes.double() * scales.double()[:, :, None]


def fill_with_noise(cache: Tensor, kv_heads: int, head_dim: int) -> None:
    """Finite keys and values for timing: whatever they are, reading them takes the same time."""
    if cache.dtype not in STORAGE.values():
        cache.normal_()
        return
    cache.random_(0, 64)  # small e4m3 values, none of them NaN
    start = _code_bytes(kv_heads, head_dim)
    cache[..., start : start + 8 * kv_heads].view(torch.float32).fill_(1.0)
