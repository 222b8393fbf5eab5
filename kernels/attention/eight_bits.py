"""Keys and values in 8 bits, each head's row with its scale behind it.

A row is head_dim codes, padded to a multiple of 4, and a float32: so that a cache is one tensor
of bytes, laid out as any other, whose blocks are copied and gathered with all that belongs to
them. int8 tensors hold int8 codes, uint8 tensors those of float8 e4m3.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

INT8, FP8 = torch.int8, torch.uint8
STORAGE = {torch.int8: INT8, torch.float8_e4m3fn: FP8}
"""The dtype of a cache's tensor by that of its values."""
_SCALE_BYTES = 4
_LARGEST = {INT8: 127.0, FP8: 448.0}
# As in kernels/gemm/floats.py: an e4m3's bits moved to where float32 has them, off by 2^120.
_SHIFT, _MASK, _REBIAS = 20, 0x87F00000 - (1 << 32), 2.0**120


@dataclass(frozen=True, slots=True)
class KvScales:
    """Calibrated scales of one layer, for caches of the form that they were calibrated for."""

    storage: torch.dtype
    values: Tensor
    """float32 [2 * kv_heads, 1]: the keys', then the values'."""


def row_bytes(head_dim: int) -> int:
    """Bytes of one head's key, or value, of one token."""
    return _padded(head_dim) + _SCALE_BYTES


def _padded(head_dim: int) -> int:
    return -(-head_dim // 4) * 4


def encode(key_value: Tensor, storage: torch.dtype, scales: KvScales | None) -> Tensor:
    """Rows [T, 2 * kv_heads, row_bytes] of keys, then values, [T, 2 * kv_heads, head_dim].

    Scales are the largest magnitude of a row over the format's, unless they were calibrated for
    this format; what is not finite leaves a row without a finite value.
    """
    values = key_value.to(torch.float32)
    if scales is not None and scales.storage == storage:
        scale = scales.values + 0 * values.sum(dim=-1, keepdim=True)
    else:
        scale = values.abs().amax(dim=-1, keepdim=True) / _LARGEST[storage]
        # Where all is zero, any scale will do but 0.
        scale = torch.where(scale == 0, torch.ones_like(scale), scale)
    steps, head_dim = values / scale, values.shape[-1]
    rows = torch.zeros(*values.shape[:-1], row_bytes(head_dim), dtype=storage, device=values.device)
    if storage == INT8:
        rows[..., :head_dim] = steps.round_().clamp_(-128, 127).to(torch.int8)
    else:
        largest = _LARGEST[FP8]
        codes = steps.clamp_(-largest, largest).to(torch.float8_e4m3fn)
        rows[..., :head_dim] = codes.view(torch.uint8)
    rows[..., -_SCALE_BYTES:].view(torch.float32).copy_(scale)
    return rows


def decode(rows: Tensor, head_dim: int, dtype: torch.dtype) -> Tensor:
    """Rows [..., row_bytes] -> codes times scales, [..., head_dim], rounded to `dtype`."""
    scale = rows[..., -_SCALE_BYTES:].view(torch.float32)
    codes = rows[..., :head_dim]
    if rows.dtype == INT8:
        return torch.mul(codes, scale).to(dtype)
    bits = codes.view(torch.int8).to(torch.int32).bitwise_left_shift_(_SHIFT).bitwise_and_(_MASK)
    return bits.view(torch.float32).mul_(_REBIAS).mul_(scale).to(dtype)


def fill_with_noise(cache: Tensor) -> None:
    """Finite keys and values for timing: whatever they are, reading them takes the same time."""
    if cache.dtype not in (INT8, FP8):
        cache.normal_()
        return
    cache.random_(0, 64)  # small e4m3 values, none of them NaN
    cache[..., -_SCALE_BYTES:].view(torch.float32).fill_(1.0)
