"""The paged cache of one layer: its layout, and how keys and values get in.

A cache is [blocks, block_size, 2, kv_heads, head_dim], keys before values, so that a token's key
and value lie side by side: one copy writes both and one gather reads both. Slot s is token
s % block_size of block s // block_size.
"""

import torch
from torch import Tensor


def new_cache(
    blocks: int,
    block_size: int,
    kv_heads: int,
    head_dim: int,
    dtype: torch.dtype,
    device: torch.device,
) -> Tensor:
    """A cache whose slots hold anything; attention never reads a slot that was not written."""
    return torch.empty(blocks, block_size, 2, kv_heads, head_dim, dtype=dtype, device=device)


def token_bytes(kv_heads: int, head_dim: int, dtype: torch.dtype) -> int:
    """Bytes of one token's key and value in one layer."""
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


def write_kv(cache: Tensor, key_value: Tensor, slots: Tensor) -> None:
    """Write T tokens' keys, then values, [T, 2 * kv_heads, head_dim], into `slots` [T]."""
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
