"""The paged cache of one layer: its layout, and how keys and values get in.

A cache is [blocks, block_size, 2, kv_heads, head_dim], keys before values, so that a token's key
and value lie side by side: one copy writes both and one gather reads both. Slot s is token
s % block_size of block s // block_size. In 8 bits a row of head_dim is one of bytes: see
`eight_bits`.
"""

import torch
from torch import Tensor

from infopt.kernels.attention.eight_bits import STORAGE, KvScales, encode, row_bytes


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
    row = row_bytes(head_dim) if dtype in STORAGE else head_dim
    held = STORAGE.get(dtype, dtype)
    return torch.empty(blocks, block_size, 2, kv_heads, row, dtype=held, device=device)


def token_bytes(kv_heads: int, head_dim: int, dtype: torch.dtype) -> int:
    """Bytes of one token's key and value in one layer, scales included."""
    if dtype in STORAGE:
        return 2 * kv_heads * row_bytes(head_dim)
    return 2 * kv_heads * head_dim * dtype.itemsize


def keys_of(cache: Tensor) -> Tensor:
    """[blocks, block_size, kv_heads, head_dim], a view."""
    return cache[:, :, 0]


def values_of(cache: Tensor) -> Tensor:
    """[blocks, block_size, kv_heads, head_dim], a view."""
    return cache[:, :, 1]


def by_slot(cache: Tensor) -> Tensor:
    """[slots, 2 * kv_heads * head_dim], a view."""
    return cache.view(cache.shape[0] * cache.shape[1], -1)


def write_kv(
    cache: Tensor, key_value: Tensor, slots: Tensor, scales: KvScales | None = None
) -> None:
    """Write T tokens' keys, then values, [T, 2 * kv_heads, head_dim], into `slots` [T]."""
    if cache.dtype in STORAGE.values():
        key_value = encode(key_value, cache.dtype, scales)
    by_slot(cache).index_copy_(0, slots, key_value.flatten(1))


def copy_blocks(cache: Tensor, sources: Tensor, targets: Tensor) -> None:
    """Copy whole blocks, int64 [N] to [N]; no block is a target twice, nor a source as well."""
    cache.index_copy_(0, targets, cache.index_select(0, sources))


def read_blocks(cache: Tensor, blocks: Tensor) -> Tensor:
    """The contents of `blocks` int64 [N]: [N, block_size, 2, kv_heads, head_dim], a copy."""
    return cache.index_select(0, blocks)


def write_blocks(cache: Tensor, blocks: Tensor, contents: Tensor) -> None:
    """Put what `read_blocks` gave into `blocks` int64 [N], which are all different."""
    cache.index_copy_(0, blocks, contents.to(cache.device))
